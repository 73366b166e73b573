"""Fixtures of the reliability tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "finetune")]

import finetune_runs  # noqa: E402
import tiny  # noqa: E402
from jobs import Bench, Driver  # noqa: E402


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    return Bench(tiny.write_base(folder / "base", write_tiny_tokenizer), finetune_runs.write_data(folder / "sums.json"))


@pytest.fixture(scope="session")
def driver() -> Iterator[Driver]:
    one = Driver()
    yield one
    one.close()
