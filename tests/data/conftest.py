"""A hub on this machine that serves data sets, and a stand-in for pyarrow."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.helpers import fake_hub
from tests.helpers.fake_hub import Hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that data modules download from, without data sets. `publish` adds them."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with fake_hub.serve(Hub({})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def publish(hub: Hub, folder: Path, name: str, files: dict[str, Any]) -> None:
    """Put a data set on the hub; `.jsonl` files have a row a line, the others hold a list."""
    for path, rows in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("\n".join(map(json.dumps, rows)) if path.endswith(".jsonl") else json.dumps(rows))
    hub.models[name] = folder


@pytest.fixture
def json_as_parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pyarrow whose parquet files are JSON lists."""

    def read_table(file: Path) -> Any:
        return SimpleNamespace(to_pylist=lambda: json.loads(Path(file).read_text()))

    package, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    parquet.read_table = read_table  # type: ignore[attr-defined]
    package.parquet = parquet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
