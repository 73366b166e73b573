"""Running text: blocks, documents, folders, TinyStories from a hub on this machine."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from litgpt.data import OpenWebText, TextFiles, TinyStories
from litgpt.data.base import DataModule
from litgpt.data.text_files import PIECE, pieces
from litgpt.errors import UserError
from litgpt.keys import Keys
from litgpt.pretrain import Pretrain
from tests.helpers.fake_hub import Hub


class Letters:
    """A tokenizer whose ids are characters; 1 begins, 2 ends a text."""

    def __init__(self, bos_id: int | None, eos_id: int | None = 2) -> None:
        self.bos_id, self.eos_id = bos_id, eos_id

    def ids(self, text: str, bos: bool | None = None) -> list[int]:
        return ([1] if bos else []) + [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def split(data: Any, length: int, bos_id: int | None = 1) -> tuple[list[str], list[str]]:
    splits = data.splits(Letters(bos_id), None, length)
    for sample in (*splits.train, *splits.val):
        assert len(sample.input_ids) == length + 1 and list(sample.loss_mask) == [0] + [1] * length
    train, val = ([Letters(1).decode(list(sample.input_ids)) for sample in part] for part in (splits.train, splits.val))
    return train, val


def test_blocks_run_over_documents(tmp_path: Path) -> None:
    for name, text in (("a", "validate me"), ("b", "  abcdef\n"), ("c", "ghij"), ("d", "klmnop")):
        (tmp_path / f"{name}.txt").write_text(text)
    train, val = split(TextFiles(train_data_path=tmp_path), 4)
    assert train == ["\1abcd", "ef\1gh", "ij\1kl"] and val == ["\1vali", "date "]  # the rest of each is shorter than a block
    for val_path, end in ((None, "; a.txt is held out for validation"), (tmp_path / "a.txt", "")):
        splits = TextFiles(train_data_path=tmp_path, val_data_path=val_path).splits(Letters(1), None, 4)  # type: ignore[arg-type]
        assert splits.report.partition(" validation blocks of 5 tokens")[2] == end
    assert split(TextFiles(train_data_path=tmp_path), 4, None)[0] == ["abcde", "f\2ghi", "j\2klm"]


def test_validation(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x" * 99)
    (tmp_path / "two").mkdir()
    (tmp_path / "two/v.txt").write_text("y" * 9)
    file = tmp_path / "one.txt"
    assert [len(part) for part in split(TextFiles(train_data_path=file), 4)] == [19, 1]
    assert [len(part) for part in split(TextFiles(train_data_path=file, val_split_fraction=0.5), 4)] == [10, 10]
    assert [len(part) for part in split(TextFiles(train_data_path=file, val_split_fraction=0.99), 4)] == [1, 19]
    data = TextFiles(train_data_path=file, val_split_fraction=0)
    assert split(data, 4) == (["\1xxxx"] + ["xxxxx"] * 19,) * 2 and split(data, 99)[0] == ["\1" + "x" * 99]
    assert [len(part) for part in split(data, 2)] == [33, 17]  # every second of them
    assert data.splits(Letters(1), None, 4).report == "20 train blocks of 5 tokens, 20 of them validated again"  # type: ignore[arg-type]
    assert split(TextFiles(train_data_path=file, val_data_path=tmp_path / "two"), 4)[1] == ["\1yyyy", "yyyyy"]


def test_mistakes(tmp_path: Path) -> None:
    (file := tmp_path / "text").write_text("x" * 99)
    for data, said in (
        (TextFiles(train_data_path=file, val_split_fraction=1.5), "val_split_fraction is 1.5: a number from 0 to below 1"),
        (TextFiles(train_data_path=file, val_split_fraction=-0.5), "val_split_fraction is -0.5"),
        (TextFiles(), "train_data_path is missing"),
        (
            TextFiles(train_data_path=file, val_data_path=file, val_split_fraction=0.5),
            "data.val_split_fraction is set, and data.val_data_path",
        ),
        (TextFiles(train_data_path=tmp_path), "holds no .txt or .md files"),
        (TextFiles(train_data_path=tmp_path / "no.txt"), "does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            data.splits(Letters(1), None, 4)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="running text"):
        TextFiles(train_data_path=tmp_path).records()
    for length, said in ((99, r"two blocks of 100, one of which"), (100, r"training text is shorter than a block of 101 tokens")):
        with pytest.raises(UserError, match=said):
            split(TextFiles(train_data_path=file), length)
    (tmp_path / "short").write_text("xy")
    with pytest.raises(UserError, match=r"the validation text is shorter than a block of 9 tokens \(all of it: 3\)"):
        split(TextFiles(train_data_path=file, val_data_path=tmp_path / "short"), 8)


def test_a_folder_of_text_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.md").write_text("# Text")
    (tmp_path / "C.TXT").write_text("text")
    for name in (tmp_path, tmp_path / "a.txt", tmp_path / "b.md", tmp_path / "C.TXT"):
        keys = Keys(Pretrain)
        config = keys.merge([keys.of_mapping({"data": str(name)})])
        assert config["data"] == {"class_path": TextFiles, "init_args": {"train_data_path": name}}


@pytest.mark.parametrize(
    ("files", "read"),
    [
        ("a.txt b.txt", "a.txt b.txt"),
        ("a.txt notes.md", "a.txt"),  # as LitGPT reads a folder
        ("notes.md deep/more.md .trash/gone.md .obsidian/app.json", "deep/more.md notes.md"),
        ("a.txt b.txt list.json", "a.txt b.txt"),
        ("README.md data/train-0000.parquet", None),  # a data set of the hub
        ("README.md LICENSE.txt train.jsonl val.jsonl", None),
        ("A.TXT list.json", "A.TXT"),
        ("LICENSE.TXT train.JSONL val.JSONL", None),
        ("picture.png", None),
    ],
)
def test_what_a_folder_of_text_is(files: str, read: str | None, tmp_path: Path) -> None:
    (tmp_path / "folder.md").mkdir()
    for name in files.split():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert DataModule.reader_of(str(tmp_path)) == (("TextFiles", "train_data_path") if read else ("JSON", "json_path"))
    if read:
        chosen, held_out = TextFiles(train_data_path=tmp_path).files()
        assert [str(file.relative_to(tmp_path)) for file in sorted([*chosen, *(held_out or [])])] == read.split()


@pytest.mark.parametrize("mark", ["\n\n", "\n", " ", ""])
def test_pieces_of_a_long_text(mark: str) -> None:
    text = ("x" * (PIECE - 10) + mark) * 3
    parts = list(pieces(text))
    assert "".join(parts) == text and len(parts) == 3 and max(map(len, parts)) <= PIECE


def test_tiny_stories(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    with tarfile.open(tmp_path / "hub" / TinyStories.archive, "w:gz") as archive:
        for n in range(3):
            content = json.dumps([{"story": f"story {n}", "instruction": {}}] * 2).encode()
            entry = tarfile.TarInfo(f"data{n:02}.json")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    hub.models["roneneldan/TinyStories"] = tmp_path / "hub"
    data = TinyStories(data_path=tmp_path / "data")
    assert not data.is_ready()
    train, val = split(data, 4)
    assert "".join(train) == "\1story 1\1story 1\1story 2\1story 2"[: len(train) * 5] and val[0] == "\1stor"
    assert data.is_ready() and hub.fetched() == {TinyStories.archive}
    (tmp_path / "data/data01.json").write_text('[{"text": "x"}]')
    with pytest.raises(UserError, match="record 1: an object with the text `story`"):
        split(data, 4)


def test_open_web_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library: Any = ModuleType("datasets")
    library.load_dataset = lambda name, cache_dir: {"train": [{"text": f"page {i}"} for i in range(20)]}
    monkeypatch.setitem(sys.modules, "datasets", library)
    train, val = split(OpenWebText(data_path=tmp_path), 7)
    assert len(val) == 1 and train[0] == "\1page 0\1"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'not installed \(datasets\): pip install "litgpt\[data\]"'):
        split(OpenWebText(data_path=tmp_path), 7)
