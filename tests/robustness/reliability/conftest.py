"""Fixtures of the reliability tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers import runs as finetune_runs, tiny
from tests.helpers.jobs import Bench, Driver


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> Bench:
    folder = tmp_path_factory.mktemp("bench")
    return Bench(tiny.write_base(folder / "base", write_tiny_tokenizer), finetune_runs.write_data(folder / "sums.json"))


@pytest.fixture(scope="session")
def driver() -> Iterator[Driver]:
    one = Driver()
    yield one
    one.close()
