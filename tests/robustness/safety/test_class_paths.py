"""A file that names a class, or a Python object, makes no command import or call it, wherever it stands."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from litgpt.__main__ import COMMANDS, load
from litgpt.args import ALLOWED_CLASSES, require_allowed_class
from litgpt.cli import parse
from litgpt.errors import UserError
from litgpt.keys import Keys
from litgpt.optim import make_optimizer
from tests.helpers.cases import first, quick
from tests.helpers.places import Place, check_message, run, tree

TARGETS = (
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "torch.load",
    "torch.hub.load",
    "torch.utils.data.DataLoader",
    "trap_module.Trap",
    "litgpt_evil.Trap",
    "torch.optimus.Trap",
    "importlib.import_module",
    "pickle.loads",
    "jsonargparse.CLI",
    "lightning.pytorch.loggers.CSVLogger",
    "litgpt..os.system",
    "litgpt.data/../os.system",
    "LITGPT.data.JSON",
    " litgpt.data.JSON",
    "torch.optim.AdamW; import os",
    "__main__.Trap",
    ".litgpt.data.JSON",
)
INSIDE = (
    "litgpt.convert.to_litgpt.convert_to_litgpt",
    "litgpt.data.sources.read_records",
    "litgpt.checkpoint.shutil.rmtree",
    "litgpt.api.LLM",
)
"""Names that the allow-list lets pass, but that are no class of the kind asked for."""
TAGS = (
    "!!python/object/apply:os.system [touch sprung]",
    "!!python/object/new:subprocess.Popen [[touch, sprung]]",
    '!!python/object/apply:builtins.eval [\'open("sprung", "w")\']',
    "!!python/object:trap_module.Trap {}",
    "!!python/name:os.system",
    "!!python/name:trap_module.Trap",
    "!!python/module:trap_module",
    "!!python/tuple [1]",
    "!python/object/apply:os.system [touch sprung]",
    "!<tag:yaml.org,2002:python/object/apply:os.system> [touch sprung]",
)


@pytest.fixture(autouse=True)
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An importable module that leaves a file when it is imported; nothing may be left after the test."""
    (tmp_path / "trap_module.py").write_text("open('sprung', 'w').close()\nclass Trap: pass\n")
    for name in ("litgpt_evil", "antigravity"):
        (tmp_path / f"{name}.py").write_text("open('sprung', 'w').close()\nclass Trap: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    assert not list(tmp_path.rglob("sprung")) and not {"trap_module", "litgpt_evil", "antigravity"} & set(sys.modules)


def forms(target: str) -> list[Any]:
    """The ways in which a class may be named."""
    return [target, {"class_path": target}, {"class_path": target, "init_args": {"command": "touch sprung"}}]


@pytest.mark.parametrize(
    "target",
    quick(
        [*TARGETS, *INSIDE],
        "os.system",
        "torch.hub.load",
        "trap_module.Trap",
        "litgpt_evil.Trap",
        "litgpt.data/../os.system",
        "torch.optim.AdamW; import os",
        "litgpt.checkpoint.shutil.rmtree",
        "litgpt.api.LLM",
    ),
)
def test_no_key_takes_a_foreign_class(target: str, place: Place) -> None:
    """The keys that take a class, and one of every other kind: refused, or taken for a plain text."""
    check_keys("finetune_lora", target, place, ["data", "optimizer", "logger_name", "out_dir", "log", "log.metadata", "train"])


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_no_key_of_any_command_does(command: str, place: Place) -> None:
    keys = Keys(load(command))
    for target in ("os.system", "trap_module.Trap"):
        check_keys(command, target, place, [*keys.types, *keys.groups])


def check_keys(command: str, target: str, place: Place, names: list[str]) -> None:
    keys = Keys(load(command))
    first = next(iter(keys.parameters))
    for key in names:
        for value in forms(target):
            nested: Any = {key: value} if "." not in key else {key.partition(".")[0]: {key.partition(".")[2]: value}}
            file = place.write("f.yaml", yaml.safe_dump({first: "c", **nested}))
            given: dict[str, Any] = {}
            try:
                given = parse(f"litgpt {command}", load(command), [str(file)])
            except UserError as error:
                message = str(error)
                assert "is not allowed" in message or target not in TARGETS or key not in keys.classes, (
                    key,
                    value,
                    message,
                )
            else:
                assert key not in keys.classes or target in INSIDE or "." not in target, (key, value)
            assert not callable(given.get(key)) and not isinstance(given.get(key), type)


@pytest.mark.parametrize("target", [*TARGETS, *INSIDE])
def test_no_optimizer_but_torchs(target: str) -> None:
    import torch

    for spec in forms(target):
        with pytest.raises(UserError, match="optimizer"):
            make_optimizer(spec, [torch.nn.Parameter(torch.zeros(1))])


def test_an_allowed_name_that_is_no_optimizer_is_refused_where_it_is_used(place: Place) -> None:
    ended = run(
        [
            "finetune_lora",
            place.base(),
            "--data",
            "JSON",
            "--data.json_path",
            place.data(),
            "--optimizer",
            "torch.optim.lr_scheduler.LRScheduler",
            "--out_dir",
            "out",
        ]
    )
    check_message(ended, "torch.optim.lr_scheduler.LRScheduler is not an optimizer", "", 1)


@pytest.mark.parametrize("target", TARGETS)
def test_the_allow_list(target: str) -> None:
    with pytest.raises(UserError, match="is not allowed, only those of litgpt"):
        require_allowed_class(target, "here")
    assert ALLOWED_CLASSES == ("litgpt.", "torch.optim.", "bitsandbytes.optim.")


@pytest.mark.parametrize("target", quick(TARGETS[:10], "os.system", "torch.hub.load", "trap_module.Trap"))
def test_files_that_litgpt_wrote_are_not_believed_either(target: str, place: Place) -> None:
    """The settings of an adapter and a prompt style name classes; a foreign one is not looked up when the folder is used."""
    folder = place.adapter()
    settings = yaml.safe_load((folder / "hyperparameters.yaml").read_text())
    recipe = {"class_path": target, "init_args": {"command": "touch sprung"}}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({**settings, "data": recipe, "optimizer": recipe, "log": recipe}))
    assert run(["generate", folder, "--max_new_tokens", 1]).code == 0  # they are not its business
    ended = run(["finetune_lora", folder / "hyperparameters.yaml", "--out_dir", "out"])
    check_message(ended, f"{target!r} is not allowed", "only those of litgpt.", 2)
    (folder / "prompt_style.yaml").write_text(yaml.safe_dump(recipe))
    check_message(run(["generate", folder]), "prompt_style.yaml", "There are chat, alpaca", 1)


@pytest.mark.parametrize("tag", first(TAGS, 3))
def test_python_tags_are_no_values(tag: str, place: Place) -> None:
    """In every YAML file that a command reads."""
    folder = place.adapter()
    for file, words in (
        (place.folder / "f.yaml", ["finetune_lora", "f.yaml"]),
        (place.folder / "data.yaml", ["finetune_lora", "c", "--data", "data.yaml"]),
        (place.folder / "base/model_config.yaml", ["generate", "base"]),
        (folder / "hyperparameters.yaml", ["generate", "adapter"]),
        (folder / "hyperparameters.yaml", ["merge_lora", "adapter"]),
        (place.folder / "base/prompt_style.yaml", ["generate", "base"]),
    ):
        kept = file.read_text() if file.exists() else None
        file.write_text(f"checkpoint_dir: base\nclass_path: litgpt.data.JSON\nx: {tag}\n")
        before = tree(place.folder)
        ended = run(words)
        check_message(ended, f"{file.name}, line 3", "not valid YAML", ended.code)
        assert ended.code in (1, 2) and tree(place.folder) == before
        file.unlink() if kept is None else file.write_text(kept)


@pytest.mark.parametrize("tag", first(TAGS, 3))
def test_python_tags_on_the_command_line(tag: str, place: Place) -> None:
    base, data = place.base(), place.data()
    for key in ("--data", "--optimizer", "--train", "--skip2lora_block_indices", "--log", "--config"):
        words = ["finetune_lora", base, "--data", "JSON", "--data.json_path", data, "--skip2lora_enabled", "--out_dir", "out", key, tag]
        ended = run(words)
        check_message(ended, "", "", ended.code)
        assert ended.code in (1, 2)


def test_json_is_no_way_around(place: Place) -> None:
    """A config file and inline values may be JSON, which is YAML: the same checks hold."""
    recipe = {"class_path": "trap_module.Trap"}
    file = place.write("f.yaml", json.dumps({"checkpoint_dir": "c", "data": recipe}))
    check_message(run(["finetune_lora", file]), "'trap_module.Trap' is not allowed", "litgpt.", 2)
    check_message(run(["finetune_lora", "c", "--data", json.dumps(recipe)]), "'trap_module.Trap' is not allowed", "litgpt.", 2)
    check_message(run(["finetune_lora", "c", "--data.class_path", "trap_module.Trap"]), "'trap_module.Trap' is not allowed", "litgpt.", 2)
    check_message(run(["finetune_lora", "c", "--data.help", "trap_module.Trap"]), "'trap_module.Trap' is not allowed", "litgpt.", 2)


def test_every_command_reads_its_settings_here() -> None:
    """A command of its own parser would have locks of its own."""
    for name in COMMANDS:
        assert Keys(load(name)).parameters, name
