"""Downloads that break off, and what they leave."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import are_progress_bars_disabled

from litgpt.data.downloads import HUB, download_from_hub
from litgpt.errors import UserError
from litgpt.streams import guard
from tests.data.conftest import publish
from tests.helpers.fake_hub import Hub


def test_all_files_or_none(hub: Hub, tmp_path: Path) -> None:
    """A pattern's files appear together: otherwise a part of them would pass for the data set."""
    publish(hub, tmp_path / "hub", "my/data", {"data/a-1.jsonl": [{}] * 9, "data/a-2.jsonl": [{}] * 9, "data/b.jsonl": []})
    address, folder = f"{HUB}my/data/resolve/main/data/a-*", tmp_path / "new"
    hub.token = "x"
    with pytest.raises(UserError, match=r"data/a-\* of the dataset my/data .*put that file into .*new"):
        download_from_hub(address, folder, "a-*")
    assert not folder.exists() or not list(folder.iterdir())
    download_from_hub(address, folder, "a-*", token="x")
    assert sorted(path.name for path in folder.iterdir()) == ["a-1.jsonl", "a-2.jsonl"]


def test_a_download_that_breaks_off_keeps_its_complete_files(hub: Hub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "hub", "my/data", {"data/a-1.jsonl": [{}] * 9, "data/a-2.jsonl": [{}] * 9})
    address, folder = f"{HUB}my/data/resolve/main/data/a-*", tmp_path / "new"
    hub.breaks["data/a-2.jsonl"] = 99
    with pytest.raises(UserError, match=r"data/a-\* of the dataset my/data could not be downloaded"):
        download_from_hub(address, folder, "a-*")
    assert [path.name for path in folder.iterdir()] == [".download"]
    hub.breaks.clear()
    hub.requests.clear()
    download_from_hub(address, folder, "a-*")
    assert hub.fetched() == {"a-2.jsonl"}
    assert sorted(path.name for path in folder.iterdir()) == ["a-1.jsonl", "a-2.jsonl"]


def test_its_progress_bar_is_drawn(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guarded stream writes control characters out: without its carriage returns, every step of a bar would follow the last one."""
    publish(hub, tmp_path / "hub", "my/data", {"a.jsonl": [{}]})
    bars = sys.modules[are_progress_bars_disabled.__module__]
    monkeypatch.setattr(bars, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(bars, "progress_bar_states", {})  # another library may have switched them off in this process
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", stream)
    guard()
    download_from_hub(f"{HUB}my/data/resolve/main/a.jsonl", tmp_path / "new", "a.jsonl")
    assert "\rFetching" in stream.getvalue() and r"\r" not in stream.getvalue()
