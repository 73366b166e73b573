"""Alpaca and the data sets of its form, from a hub on this machine and without any network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from litgpt.data import Alpaca, Alpaca2k, AlpacaGPT4, Dolly
from litgpt.data.records import read_record
from litgpt.errors import UserError
from tests.data.conftest import publish
from tests.helpers.fake_hub import Hub

ROWS = [{"instruction": f"q{i}", "input": "", "output": f"a{i}"} for i in range(10)]
RECORDS = [read_record(row) for row in ROWS]
ON_HUB = {
    Alpaca: ("yahma/alpaca-cleaned", "alpaca_data_cleaned.json"),
    Alpaca2k: ("mhenrichsen/alpaca_2k_test", "alpaca_2000.parquet"),
    Dolly: ("databricks/databricks-dolly-15k", "databricks-dolly-15k.jsonl"),
}


@pytest.fixture
def filled(hub: Hub, tmp_path: Path) -> Hub:
    for name, file in ON_HUB.values():
        publish(hub, tmp_path / "hub" / name, name, {file: ROWS})
    return hub


@pytest.mark.parametrize("module", ON_HUB)
def test_downloaded_once(module: type[Alpaca], filled: Hub, tmp_path: Path) -> None:
    data = module(download_dir=tmp_path / "new" / "folder")
    assert not data.is_ready()
    data.prepare_data()
    assert data.records() == (RECORDS, None)
    assert filled.fetched() == {ON_HUB[module][1]} and data.is_ready()
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == [module.file_name]
    assert json.loads((tmp_path / "new" / "folder" / module.file_name).read_text()) == ROWS
    filled.requests.clear()
    assert module(download_dir=tmp_path / "new" / "folder").records() == (RECORDS, None) and not filled.requests


def test_dolly_has_contexts(hub: Hub, tmp_path: Path) -> None:
    row = {"instruction": "q", "context": "c", "response": "a", "category": "closed_qa"}
    publish(hub, tmp_path / "dolly", "databricks/databricks-dolly-15k", {"databricks-dolly-15k.jsonl": [row]})
    (record,) = Dolly(download_dir=tmp_path).records()[0]
    assert (record.question, record.input, record.reply, record.unread) == ("q", "c", "a", ("category",))


def test_another_address(hub: Hub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "other", "my/data", {"data.json": ROWS})
    data = AlpacaGPT4(download_dir=tmp_path, file_url=f"{hub.url}/datasets/my/data/resolve/main/data.json")
    assert data.records() == (RECORDS, None)
    assert (tmp_path / "alpacagpt4_data_cleaned_archive.json").is_file()


def test_parquet_without_pyarrow(filled: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'not installed \(pyarrow\): pip install "litgpt\[data\]"'):
        Alpaca2k(download_dir=tmp_path / "new").prepare_data()
    assert not (tmp_path / "new" / Alpaca2k.file_name).exists()


@pytest.mark.parametrize("module", [Alpaca, Alpaca2k, AlpacaGPT4, Dolly])
def test_file_that_is_there_needs_no_network(module: type[Alpaca], filled: Hub, tmp_path: Path) -> None:
    (tmp_path / module.file_name).write_text(json.dumps(ROWS))
    assert module(download_dir=tmp_path).records() == (RECORDS, None)
    assert not filled.requests


def test_file_from_the_hub_put_there_by_hand(filled: Hub, tmp_path: Path) -> None:
    (tmp_path / "alpaca_data_cleaned.json").write_text(json.dumps(ROWS))
    assert Alpaca(download_dir=tmp_path).records() == (RECORDS, None)
    assert not filled.requests


@pytest.mark.parametrize("module", ON_HUB)
def test_offline_says_what_to_do(module: type[Alpaca], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError) as error:
        module(download_dir=tmp_path).records()
    for part in (*ON_HUB[module], module.file_name, str(tmp_path)):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_name_of_the_file() -> None:
    with pytest.raises(UserError, match="file_name"):
        Alpaca(file_name="../x.json")


def test_a_file_whose_name_has_brackets_is_found(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "mine [1].json").write_text(json.dumps([{"instruction": "q", "output": "a"}]))
    data = Alpaca(download_dir=tmp_path, file_name="mine [1].json")
    assert data.is_ready() and len(data.records()[0]) == 1 and not hub.requests
