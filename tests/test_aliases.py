"""LitGPT's module paths."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from litgpt import aliases, data
from litgpt.finetune.adapter import AdapterV2


@pytest.mark.parametrize("name", aliases.MODULES)
def test_every_path_has_its_names(name: str) -> None:
    module = importlib.import_module(f"litgpt.{name}")
    for member in aliases.MODULES[name]:
        assert callable(getattr(module, member)), member


def test_a_path_is_the_same_thing() -> None:
    from litgpt.convert.merge import merge_lora

    assert importlib.import_module("litgpt.scripts.merge_lora").merge_lora is merge_lora
    assert importlib.import_module("litgpt.data.alpaca_2k").Alpaca2k is data.Alpaca2k
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("litgpt.scripts.none")


def test_a_command_takes_arguments_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[AdapterV2] = []
    monkeypatch.setattr(AdapterV2, "main", lambda self: seen.append(self))
    importlib.import_module("litgpt.finetune.adapter_v2").setup("base", "out", "32-true", adapter_prompt_length=4)
    assert (seen[0].checkpoint_dir, seen[0].out_dir, seen[0].precision) == (Path("base"), Path("out"), "32-true")
    assert seen[0].adapter_prompt_length == 4
