"""The commands of README.md, run or parsed as they are written there."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from litgpt.__main__ import COMMANDS, load, main
from litgpt.cli import parse
from tests.helpers import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND_LINES = re.findall(r"^    (litgpt .+)$", README, re.MULTILINE)
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_is_understood(line: str) -> None:
    _, name, *words = shlex.split(line, comments=True)
    assert name in COMMANDS
    assert parse(f"litgpt {name}", load(name), words)


def test_own_data_in_three_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_tiny_tokenizer: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The section "Your own data" from a Hugging Face folder to an answer, with a tiny model in the place of a real one."""
    section = README.split("## Your own data")[1].split("## ")[0]
    lines = [line for line in COMMAND_LINES if line in section][:3]
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "path" / "to" / "model"
    tiny.hf_llama(vocab_size=512, max_position_embeddings=128).save_pretrained(model)
    write_tiny_tokenizer(model)
    records = [{"instruction": f"Say {word}.", "output": word} for word in WORDS]
    Path("my.json").write_text(json.dumps(records), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("Say one.\n"))
    for line in lines:
        assert main(shlex.split(line, comments=True)[1:]) == 0, capsys.readouterr().err
    assert [line.split()[1] for line in lines] == ["convert_to_litgpt", "finetune", "chat"]
    for snippet in PYTHON:
        exec(snippet, {})


def test_the_tree_is_the_tree() -> None:
    """Every file that the README names is there, and every module is in it."""
    tree = README.split("## The tree")[1].split("## ")[0]
    listed = set(re.findall(r"^ {4,6}(\S+)", tree, re.MULTILINE))
    package = set(re.findall(r"^      (\S+)", tree, re.MULTILINE))
    modules = {path.name + ("/" if path.is_dir() else "") for path in (ROOT / "litgpt").iterdir()}
    assert package == modules - {"__init__.py", "__pycache__/"}
    for name in listed - package:
        assert (ROOT / name.replace("<model>/", "")).exists(), name
