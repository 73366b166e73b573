"""The portable form of a Skip2-LoRA adapter: what it states is enough to compute it, and nothing is lost."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from litgpt import checkpoint, lora
from litgpt.config import Config
from litgpt.convert import portable as skip2lora
from litgpt.errors import UserError
from tests.helpers import family_configs as configs, tiny

SKIP: dict[str, Any] = {"lora_r": 3, "lora_alpha": 7, "lora_dropout": 0.25, "skip2lora_enabled": True}
KINDS: dict[str, dict[str, Any]] = {
    "head": {"skip2lora_block_indices": "last:2"},
    "literal": {"skip2lora_norm": "none", "skip2lora_r": 2, "skip2lora_alpha": 5, "skip2lora_dropout": 0.0},
    "tail": {"skip2lora_output_layer": "transformer.h.2", "skip2lora_block_indices": [1], **tiny.ALL_LORA},
    "warm-up": {"skip2lora_warmup": True, "lora_query": True, "lora_mlp": True},
    "warm-up of some": {"skip2lora_warmup": True, "lora_value": True, "lora_block_indices": [0, 1]},
}
IDX = tiny.ids(2, 11)


def written(folder: Path, family: str = "llama", **settings: Any) -> Any:
    """A model whose adapter has moved, and its portable folder."""
    model = tiny.move_adapters(configs.ours(family, **SKIP, **settings), size=0.1)
    folder.mkdir()
    skip2lora.write(folder, model.config, adapter_of(model), "org/base", configs.pair(family)[0].config.model_type)
    return model


def read(folder: Path, family: str = "llama") -> Any:
    return skip2lora.read(folder, Config(**configs.pair(family)[1]), "the test's model")


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if lora.lora_filter(name)}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost(family: str, kind: str, tmp_path: Path) -> None:
    model = written(tmp_path / "adapter", family, **KINDS[kind])
    config, weights = read(tmp_path / "adapter", family)
    assert (config.taps, config.lora_blocks, config.cut) == (model.config.taps, model.config.lora_blocks, model.config.cut)
    assert {**vars(config), "lora_block_indices": None, "skip2lora_block_indices": None} == {
        **vars(model.config),
        "lora_block_indices": None,
        "skip2lora_block_indices": None,
    }
    assert weights.keys() == adapter_of(model).keys()
    assert all(torch.equal(value, weights[name]) for name, value in adapter_of(model).items())


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "gemma2"])
@pytest.mark.parametrize("kind", ["head", "literal"])
def test_the_json_says_all_that_is_needed(family: str, kind: str, tmp_path: Path) -> None:
    """Its formula computed as it is written there, on transformers' model, without a line of litgpt."""
    model = written(tmp_path / "adapter", family, **KINDS[kind])
    told = json.loads((tmp_path / "adapter" / "skip2lora_config.json").read_text())
    weights = load_file(tmp_path / "adapter" / "skip2lora_adapter.safetensors")
    hf, x = copy.deepcopy(configs.pair(family)[0]), {}
    for tap in told["taps"]:

        def keep(module: Any, args: Any, output: Any, name: str = tap["module"]) -> None:
            x[name] = output if isinstance(output, torch.Tensor) else output[0]

        hf.get_submodule(tap["module"]).register_forward_hook(keep)

    def add(module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        s = torch.zeros_like(args[0])
        for tap in told["taps"]:
            t = x[tap["module"]]
            if told["norm"] == "rms":
                t = t / (t.square().mean(-1, keepdim=True) + told["norm_eps"]).sqrt()
            s += told["scale"] * t @ weights[f"{tap['weights']}.lora_A"].T @ weights[f"{tap['weights']}.lora_B"].T
        return (args[0] + s,)

    hf.get_submodule(told["output_layer"]["module"]).register_forward_pre_hook(add)
    with torch.no_grad():
        assert_close(hf(IDX).logits, model(IDX), rtol=1e-5, atol=1e-5)


def test_names_in_the_json(tmp_path: Path) -> None:
    written(tmp_path / "adapter", "gpt_neox", **KINDS["tail"])
    told = json.loads((tmp_path / "adapter" / "skip2lora_config.json").read_text())
    assert told["taps"] == [{"block": 1, "module": "gpt_neox.layers.1", "weights": "transformer.h.1.skip2lora"}]
    assert told["output_layer"] == {"module": "gpt_neox.layers.2", "litgpt": "transformer.h.2"}
    assert (told["base_model_name_or_path"], told["model_type"], told["r"], told["alpha"]) == ("org/base", "gpt_neox", 3, 7)
    assert set(told["lora"]["target_modules"]) == {name for name in told["lora"]["target_modules"] if ".2." in name or name == "lm_head"}
    assert "base_model.model.lm_head.lora_A.weight" in load_file(tmp_path / "adapter" / "skip2lora_adapter.safetensors")


def test_for_a_base(tmp_path: Path) -> None:
    """Reading it for a checkpoint folder checks that it is of the same shape."""
    model = written(tmp_path / "adapter", **KINDS["tail"])
    (tmp_path / "base").mkdir()
    checkpoint.save_config(model.config, tmp_path / "base")
    settings, weights = skip2lora.load(tmp_path / "adapter", tmp_path / "base")
    assert settings["skip2lora_output_layer"] == "transformer.h.2" and weights.keys() == adapter_of(model).keys()
    (tmp_path / "other").mkdir()
    checkpoint.save_config(configs.ours("qwen3").config, tmp_path / "other")
    with pytest.raises(UserError, match="does not fit the model in .*other: head_size is 12, the adapter's 8"):
        skip2lora.load(tmp_path / "adapter", tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has an unknown format: only skip2lora, version"),
        ({"settings": None}, "has no settings"),
        ({"settings": {"lora_rank": 3}}, "unknown settings: lora_rank"),
        ({"settings": {"skip2lora_enabled": True, "lora_r": 3, "skip2lora_block_indices": [9]}}, "this model has blocks 0 to 2"),
        ({"lora": [1]}, "peft_type is None"),
        ({"model_type": "bert"}, "model_type 'bert'"),
    ],
)
def test_broken_descriptions(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    written(tmp_path / "adapter", **KINDS["tail"])
    file = tmp_path / "adapter" / "skip2lora_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        read(tmp_path / "adapter")


def test_an_impossible_model_is_not_built(tmp_path: Path) -> None:
    written(tmp_path / "adapter", **KINDS["head"])
    file = tmp_path / "adapter" / "skip2lora_config.json"
    told = json.loads(file.read_text())
    told["model_config"]["n_layer"] = 10_000
    told["settings"]["skip2lora_block_indices"] = [0]
    file.write_text(json.dumps(told))
    with pytest.raises(UserError, match="does not fit the test's model: n_layer is 3, the adapter's 10000"):
        read(tmp_path / "adapter")


def test_broken_weights(tmp_path: Path) -> None:
    written(tmp_path / "adapter", **KINDS["head"])
    file = tmp_path / "adapter" / "skip2lora_adapter.safetensors"
    weights = load_file(file)
    weights.pop("transformer.h.2.skip2lora.lora_A")
    weights["transformer.h.1.skip2lora.lora_B"] = torch.zeros(2, 2)
    save_file(weights, file)
    with pytest.raises(UserError) as caught:
        read(tmp_path / "adapter")
    assert "transformer.h.2.skip2lora.lora_A is missing" in str(caught.value)
    assert "transformer.h.1.skip2lora.lora_B has shape (2, 2), not (32, 3)" in str(caught.value)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="truncated"):
        read(tmp_path / "adapter")


def test_lora_on_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no place for LoRA on"):
        written(tmp_path / "adapter", "mixtral", **KINDS["tail"])


def test_dora_beside_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lora_variant dora with Skip2-LoRA has no portable form"):
        written(tmp_path / "adapter", **KINDS["tail"], lora_variant="dora")


def test_a_folder_from_before_the_warm_up_was_one_flag(tmp_path: Path) -> None:
    model = written(tmp_path / "adapter", **KINDS["warm-up"])
    file = tmp_path / "adapter" / skip2lora.CONFIG
    content = json.loads(file.read_text())
    del content["settings"]["skip2lora_warmup"], content["settings"]["lora_variant"], content["settings"]["lora_rslora"]
    content["settings"] |= {"skip2lora_warmup_steps": 9, "skip2lora_warmup_epochs": 0.0, "skip2lora_warmup_lr": None}
    file.write_text(json.dumps(content))
    config, weights = skip2lora.read(tmp_path / "adapter", model.config, "the model")
    assert config == model.config and weights.keys() == adapter_of(model).keys()
