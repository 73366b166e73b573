"""--help and --print_config, and what they refuse."""

import json
from pathlib import Path

import jsonargparse
import pytest
import yaml

from litgpt.__main__ import COMMANDS, load, main
from litgpt.cli import parse
from litgpt.help import parser_of
from litgpt.keys import Keys
from tests.helpers.cases import quick


@pytest.mark.parametrize(
    "name",
    quick(
        COMMANDS,
        "finetune",
        "finetune_lora",
        "finetune_full",
        "pretrain",
        "sweep",
        "generate",
        "chat",
        "serve",
        "download",
        "evaluate",
        "merge_lora",
    ),
)
def test_help_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every key has a help text."""
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: litgpt {name} [CONFIG.yaml]" in text and "<class" not in text and "\b" not in text
    actions = parser_of(name, load(name), Keys(load(name)))._actions
    assert [action.dest for action in actions if not action.help] == []


def test_help_of_a_data_module(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["finetune", "--data.help", "litgpt.data.JSON"])
    assert end.value.code == 0 and "json_path" in capsys.readouterr().out
    assert main(["finetune", "--data.help", "os.system"]) == 2
    assert "is not allowed" in capsys.readouterr().err


def test_the_printed_configuration_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["c", "--lora_r", "4", "--max_steps", "3", "--data", "JSON", "--data.json_path", "a.json", "--optimizer.lr", "1e-3"]
    words += ["--skip2lora_positions", "[0, -1]", "--log.metadata", "{a: 1}"]
    with pytest.raises(SystemExit):
        main(["finetune", *words, "--print_config"])
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert yaml.safe_load(file.read_text())["train"]["max_steps"] == 3
    assert parse("litgpt finetune", load("finetune_lora"), [str(file)]) == parse("litgpt finetune", load("finetune_lora"), words)


def test_the_configuration_is_printed_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "f.yaml").write_text(json.dumps({"data": "JSON", "lora_r": 3}))
    with pytest.raises(SystemExit) as end:
        main(["finetune", str(tmp_path / "f.yaml"), "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert end.value.code == 0 and printed["lora_r"] == 3 and printed["data"]["class_path"].endswith("JSON")


def test_an_unknown_flag_of_print_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "c", "--print_config=everything"]) == 2
    assert 'Invalid option "everything"' in capsys.readouterr().err


def test_the_parser_itself_refuses_foreign_classes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind our own check, jsonargparse is told the same: a way around the first lock does not open the second."""
    trap = tmp_path / "sprung"
    (tmp_path / "trap_module.py").write_text(f"open({str(trap)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    parser = parser_of("litgpt finetune", load("finetune"), Keys(load("finetune")))
    with pytest.raises(jsonargparse.ArgumentError, match="not allowed"):
        parser.parse_args(["--checkpoint_dir=c", "--data=trap_module.Trap"])
    assert not trap.exists()
