"""The Alpaca modules with a stand-in for the hub, and without any network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from litgpt.data import Alpaca, Alpaca2k
from litgpt.data.records import read_record
from litgpt.errors import UserError

ROWS = [{"instruction": f"q{i}", "input": "", "output": f"a{i}"} for i in range(10)]
RECORDS = [read_record(row) for row in ROWS]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Serves ROWS under whatever file is asked for; the list records the requests."""
    asked: list[tuple[str, str]] = []

    def hf_hub_download(repo_id: str, filename: str, repo_type: str, local_dir: Path) -> str:
        assert repo_type == "dataset"
        asked.append((repo_id, filename))
        file = Path(local_dir) / filename
        file.write_text(json.dumps(ROWS))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return asked


def fake_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_table(file: Path) -> Any:
        return SimpleNamespace(to_pylist=lambda: json.loads(Path(file).read_text()))

    package, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    parquet.read_table = read_table  # type: ignore[attr-defined]
    package.parquet = parquet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)


def test_alpaca_is_downloaded_once(hub: list[tuple[str, str]], tmp_path: Path) -> None:
    data = Alpaca(download_dir=tmp_path / "new" / "folder")
    data.prepare_data()
    assert data.records() == (RECORDS, None)
    assert hub == [("yahma/alpaca-cleaned", "alpaca_data_cleaned.json")]
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == ["alpaca_data_cleaned_archive.json"]


def test_alpaca2k_reads_parquet(hub: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_pyarrow(monkeypatch)
    data = Alpaca2k(download_dir=tmp_path)
    assert data.records() == (RECORDS, None)
    assert hub == [("mhenrichsen/alpaca_2k_test", "alpaca_2000.parquet")]
    assert [file.name for file in tmp_path.iterdir()] == ["alpaca2k_data_cleaned_archive.json"]


def test_parquet_without_pyarrow(hub: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="needs pyarrow: pip install"):
        Alpaca2k(download_dir=tmp_path).prepare_data()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [Alpaca, Alpaca2k])
def test_file_that_is_there_needs_no_network(module: type[Alpaca], hub: list[tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / module.file_name).write_text(json.dumps(ROWS))
    assert module(download_dir=tmp_path).records() == (RECORDS, None)
    assert not hub


def test_file_from_the_hub_put_there_by_hand(hub: list[tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / "alpaca_data_cleaned.json").write_text(json.dumps(ROWS))
    assert Alpaca(download_dir=tmp_path).records() == (RECORDS, None)
    assert not hub


@pytest.mark.parametrize("module", [Alpaca, Alpaca2k])
def test_offline_says_what_to_do(module: type[Alpaca], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*args: Any, **kwargs: Any) -> str:
        raise huggingface_hub.errors.OfflineModeIsEnabled("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UserError) as error:
        module(download_dir=tmp_path).records()
    for part in (module.repo_id, module.repo_file, module.file_name, str(tmp_path), "no network"):
        assert part in str(error.value)
    assert "second line" not in str(error.value)
    assert not list(tmp_path.iterdir())
