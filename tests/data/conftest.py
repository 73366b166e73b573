"""A hub on this machine that serves data sets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
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
    """Put a data set on the hub; `.jsonl` files have a row a line, `.json` files hold a list."""
    for path, rows in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".parquet"):
            parquet.write_table(pyarrow.Table.from_pylist(rows), folder / path)
        else:
            (folder / path).write_text("\n".join(map(json.dumps, rows)) if path.endswith(".jsonl") else json.dumps(rows))
    hub.models[name] = folder
