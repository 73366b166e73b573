"""The world of good files for the tables of bad ones, and an empty place for each row."""

from tests.helpers.worlds import one_parser_for_all, place, world

__all__ = ["one_parser_for_all", "place", "world"]
