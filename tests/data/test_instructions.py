"""Deita, FLAN, LIMA and LongForm, from a hub on this machine, with small files of the same form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from litgpt.args import as_config
from litgpt.data import FLAN, LIMA, Deita, LongForm
from litgpt.data.records import Record
from litgpt.errors import UserError
from tests.data.conftest import publish
from tests.helpers.cases import quick
from tests.helpers.fake_hub import Hub

TURNS = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]


def texts(records: list[Record] | None) -> list[tuple[str, str]]:
    return [(record.question, record.reply) for record in records or []]


@pytest.mark.parametrize("every", [False, True])
def test_deita(every: bool, hub: Hub, tmp_path: Path) -> None:
    row = {"prompt": "q1", "prompt_id": "x", "messages": [{"role": role, "content": text} for role, text in TURNS]}
    files = {f"data/{part}-00000-of-00001.parquet": [row] * n for part, n in (("train_sft", 3), ("test_sft", 1), ("train_gen", 5))}
    publish(hub, tmp_path / "hub", "HuggingFaceH4/deita-10k-v0-sft", files)
    train, val = Deita(download_dir=tmp_path / "deita", include_multiturn_conversations=every).records()
    pairs = [("q1", "a1"), ("q2", "a2")] if every else [("q1", "a1")]
    assert texts(train) == pairs * 3 and texts(val) == pairs
    assert not any("train_gen" in file for file in hub.fetched())


@pytest.mark.parametrize("every", [False, True])
def test_lima(every: bool, hub: Hub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "hub", "GAIR/lima", {"train.jsonl": [{"conversations": [text for _, text in TURNS], "source": "s"}]})
    hub.token = "hf_secret"
    data = LIMA(download_dir=tmp_path / "lima", include_multiturn_conversations=every, access_token="hf_secret")
    train, val = data.records()
    assert val is None and texts(train) == ([("q1", "a1"), ("q2", "a2")] if every else [("q1", "a1")])
    assert "hf_secret" not in repr(data) + yaml.safe_dump(as_config({"data": data}))
    with pytest.raises(UserError, match=r"train.jsonl of the dataset GAIR/lima .*Accept the terms at .*HF_TOKEN"):
        LIMA(download_dir=tmp_path / "other").records()


@pytest.mark.parametrize("subsets", quick(["a_10templates,b_10templates", None, "b_10templates"], None, "b_10templates"))
def test_flan(subsets: str | None, hub: Hub, tmp_path: Path) -> None:
    rows: dict[str, Any] = {
        f"{split}/{name}_10templates_{split}.jsonl": [{"inputs": f"{split} {name} {i}", "targets": "yes", "task": name} for i in range(n)]
        for name in "ab"
        for split, n in (("train", 3), ("test", 1))
    }
    publish(hub, tmp_path / "hub", "Muennighoff/flan", {**rows, "train/readme.md": []})
    train, val = FLAN(download_dir=tmp_path / "flan", subsets=subsets).records()
    names = "b" if subsets == "b_10templates" else "ab"
    assert texts(train) == [(f"train {name} {i}", "yes") for name in names for i in range(3)]
    assert texts(val) == [(f"test {name} 0", "yes") for name in names]
    assert len(hub.fetched()) == 2 * len(names)


def test_flan_without_the_subset(hub: Hub, tmp_path: Path) -> None:
    publish(hub, tmp_path / "hub", "Muennighoff/flan", {"train/a_train.jsonl": []})
    with pytest.raises(UserError, match="train/b_train.jsonl of the dataset Muennighoff/flan .*no such file"):
        FLAN(download_dir=tmp_path / "flan", subsets="b").records()
    with pytest.raises(UserError, match="data.subsets is missing"):
        FLAN(url="http://127.0.0.1/flan")


def test_longform(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {f"{split}.json": [{"input": f"write {split}", "output": "text", "source": "s"}] * n for split, n in (("train", 2), ("val", 1))}
    publish(hub, tmp_path / "hub", "long/form", files)
    monkeypatch.setattr(LongForm, "url", f"{hub.url}/datasets/long/form/resolve/main")
    train, val = LongForm(download_dir=tmp_path / "longform").records()
    assert texts(train) == [("write train", "text")] * 2 and texts(val) == [("write val", "text")]


def test_their_own_prompt_styles_are_litgpts() -> None:
    assert (FLAN().prompt_style, LongForm().prompt_style) == ("flan", "longform")
