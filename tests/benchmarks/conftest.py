"""A base to measure, and the settings of a measurement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import step
from tests.helpers import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("model") / "base", write_tiny_tokenizer, n_layer=7)


@pytest.fixture
def settings(base: Path) -> step.Settings:
    return step.Settings(str(base), 2, 8, 0.25, 2, 1, "32-true", "cpu", 8)
