"""Fixtures of the GGUF tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import gguf_files
from tests.helpers.gguf_files import AddMetadata


@pytest.fixture(scope="session")
def byte_level(tiny_tokenizer_dir: Path) -> AddMetadata:
    """The tiny tokenizer's vocabulary as GGUF metadata."""
    return gguf_files.byte_level_of(tiny_tokenizer_dir)


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    """A mixture of experts, d 32 but an odd width of the MLP, fp32."""
    return gguf_files.checkpoint_folder(tmp_path_factory.mktemp("mixture"), write_tiny_tokenizer, "mixtral", intermediate_size=50)[1]
