"""The world of good files, which attacks start from."""

from tests.helpers.worlds import one_parser_for_all, place, world

__all__ = ["one_parser_for_all", "place", "world"]
