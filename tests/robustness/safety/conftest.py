"""The world of good files, which attacks start from."""

from tests.helpers.worlds import place, world

__all__ = ["place", "world"]
