"""The tiny base model and data that the tests of training use."""

from tests.train.conftest import base, data

__all__ = ["base", "data"]
