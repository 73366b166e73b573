"""LitGPT's module paths."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from litgpt import aliases, data
from litgpt.finetune.adapter import AdapterV2
from litgpt.finetune.lora import Lora


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
    seen: list[AdapterV2 | Lora] = []
    monkeypatch.setattr(AdapterV2, "main", lambda self: seen.append(self))
    monkeypatch.setattr(Lora, "main", lambda self: seen.append(self))
    importlib.import_module("litgpt.finetune.adapter_v2").setup("base", "out", "32-true", adapter_prompt_length=4)
    importlib.import_module("litgpt.finetune.lora").setup(Path("base"), "out", precision="32-true", lora_r=4)
    assert all((one.checkpoint_dir, one.out_dir, one.precision) == (Path("base"), Path("out"), "32-true") for one in seen)
    assert isinstance(seen[0], AdapterV2) and seen[0].adapter_prompt_length == 4
    assert isinstance(seen[1], Lora) and seen[1].lora_r == 4
