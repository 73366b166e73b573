"""What the tests of adapters train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import runs, tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base"), write_tiny_tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_data(tmp_path_factory.mktemp("data") / "sums.json")
