"""What every command says to a checkpoint that is none, those included that are added after these tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from litgpt.__main__ import COMMANDS, load
from litgpt.keys import Keys
from tests.helpers.cases import quick
from tests.helpers.places import Place, check_message, run, tree


def broken(name: str, content: bytes) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        (place.base() / name).write_bytes(content)
        return place.base()

    return make


def emptied(place: Place) -> Path:
    folder = place.write("empty/file", "").parent
    (folder / "file").unlink()
    return folder


BAD: dict[str, Callable[[Place], Any]] = {
    "nothing": lambda place: "nowhere",
    "an empty name": lambda place: "",
    "a zero byte": lambda place: "a\0b",
    "an empty folder": emptied,
    "a text file": lambda place: place.write("file.txt", "hello"),
    "an empty GGUF file": lambda place: place.write("file.gguf", ""),
    "empty weights": broken("lit_model.pth", b""),
    "an empty config": broken("model_config.yaml", b""),
    "a config of bytes": broken("model_config.yaml", b"\xff\xfe"),
}


NOT_READ = {("prompts", what) for what in ("empty weights", "an empty config", "a config of bytes")}  # the tokenizer's files alone


@pytest.mark.parametrize("what", quick(BAD, "nothing", "an empty folder", "an empty config"))
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "finetune_lora"])
def test_a_checkpoint_that_is_none(name: str, what: str, place: Place) -> None:
    given = str(BAD[what](place))
    keys = Keys(load(name))
    first = next(iter(keys.parameters))
    words: list[Any] = [name, f"--{first}={given}"]
    if "data" in keys.classes:
        words += ["--data", "JSON", "--data.json_path", place.data()]
    elif name == "sample":
        words += ["--data", place.data(), "--out", "out.jsonl"]
    words += ["--grid.lora_r", "[4]"] if keys.grids else []
    for key in ("out_dir", "output_dir"):
        words += [f"--{key}", "out"] if key in keys.parameters else []
    before = tree(place.folder)
    ended = run(words)
    if (name, what) in NOT_READ:
        assert ended.code == 0 and tree(place.folder) == before
        return
    check_message(ended._replace(out=""), "", "", ended.code)  # validate prints its table first
    assert ended.code in (1, 2) and tree(place.folder) == before
