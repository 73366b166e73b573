"""The world of good files for the tables of bad ones, and an empty place for each row."""

from tests.helpers.worlds import place, world

__all__ = ["place", "world"]
