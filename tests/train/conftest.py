"""What the tests of training commands start from, made once for each module of tests, which leaves it as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import runs as finetune_runs
from tests.helpers import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    """A tiny base model."""
    return tiny.write_base(tmp_path_factory.mktemp("base"), write_tiny_tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few sums, as instructions and answers."""
    return finetune_runs.write_data(tmp_path_factory.mktemp("data") / "sums.json")
