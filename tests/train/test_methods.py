"""The ways to fine-tune: what each trains, saves and loads, and the lines that describe it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.adapters.base import adapter_state
from litgpt.args import TrainArgs
from litgpt.data import JSON
from litgpt.errors import UserError
from litgpt.finetune.full import Full
from litgpt.finetune.lora import Lora
from litgpt.sharding import is_sharded
from litgpt.train.methods import Method, adapters, describe, full, ranges
from tests.helpers import tiny

SKIP: dict[str, Any] = {"skip2lora_enabled": True, "skip2lora_block_indices": [0, 2], "lora_query": False, "lora_value": False}


def lora(base: Path, **settings: Any) -> Method:
    return adapters(Lora(checkpoint_dir=base, data=JSON(), **settings))


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("settings", [{}, SKIP, {"lora_block_indices": "last:2", "lora_mlp": True}], ids=["LoRA", "Skip2-LoRA", "late"])
def test_adapters_are_trained_saved_and_loaded_and_nothing_else(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    method = lora(base, lora_r=2, **settings)
    model, other = method.build(base, torch.float32), method.build(base, torch.float32)
    names = trained(model)
    assert names and all(name.endswith(("lora_A", "lora_B")) for name in names)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    method.save(model, tmp_path)
    method.load(other, tmp_path)
    ours, theirs = model.state_dict(), other.state_dict()
    assert {name for name in ours if torch.equal(ours[name], theirs[name])} == names


def whole(tie_embeddings: bool | None = None) -> Method:
    return full(Full(checkpoint_dir=Path("base"), train=TrainArgs(tie_embeddings=tie_embeddings)))


def test_a_sharded_mixture_is_saved_with_the_corrections_of_its_routers(tmp_path: Path) -> None:
    groups = {"n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 2}
    model = tiny.tiny(mlp_class_name="LLaMAMoE", n_expert=8, n_expert_per_token=2, **groups)
    corrections = {name: buffer for name, buffer in model.named_buffers() if name.endswith("mlp.gate.e_score_correction_bias")}
    for number, correction in enumerate(corrections.values()):
        correction.copy_(torch.arange(8) + number / 4)
    model.reshard = None  # FSDP's mark
    assert is_sharded(model) and len(corrections) == model.config.n_layer
    whole().save(model, tmp_path)
    saved = torch.load(tmp_path / "lit_model.pth", weights_only=True)
    assert all(saved[name].tolist() == [i + number / 4 for i in range(8)] for number, name in enumerate(corrections))


def test_full_trains_and_saves_every_weight(base: Path, tmp_path: Path) -> None:
    method = whole()
    model, other = method.build(base, torch.float32), method.build(base, torch.float32)
    assert trained(model) == set(dict(model.named_parameters()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    method.save(model, tmp_path)
    method.load(other, tmp_path)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_full_ties_the_head_if_asked(base: Path) -> None:
    assert [whole(tie).build(base, torch.float32).is_tied for tie in (None, True, False)] == [False, True, False]


def test_nothing_to_train_is_an_error(base: Path) -> None:
    with pytest.raises(UserError, match="nothing would be trained: set lora_query"):
        lora(base, lora_query=False, lora_value=False).build(base, torch.float32)


def test_rebuilt_adapters_leave_the_frozen_weights(base: Path) -> None:
    model = lora(base, lora_r=2).build(base, torch.float32)
    frozen = model.transformer["wte"].weight
    lora(base, lora_r=3, **SKIP).rebuild(model, base)
    assert model.transformer["wte"].weight is frozen
    assert trained(model) == trained(lora(base, lora_r=3, **SKIP).build(base, torch.float32))


@pytest.mark.parametrize("variant", ["dora", "pissa", "olora"])
def test_rebuilt_adapters_start_from_the_weights_before_quantisation(variant: str, base: Path) -> None:
    """As those of a model that is built: a setting of a sweep is the run of its own."""
    method, states = lora(base, lora_r=2, lora_variant=variant, quantize="int8"), []
    model = method.build(base, torch.float32)
    for make in (lambda: method.rebuild(model, base), lambda: method.build(base, torch.float32)):
        torch.manual_seed(1)
        states.append(adapter_state(make() or model))
    assert states[0].keys() == states[1].keys() and all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("values", "length"),
    [
        ({"skip2lora_warmup_steps": 1}, "1 step"),
        ({"skip2lora_warmup_epochs": 1}, "1 epoch"),
        ({"skip2lora_warmup_epochs": 0.5}, "0.5 epochs"),
    ],
)
def test_the_length_of_a_warm_up(values: dict[str, float], length: str, base: Path) -> None:
    method = lora(base, lora_r=4, **{**SKIP, "lora_query": True}, **values)
    assert describe(method.build(base, torch.float32), method.warmup)[1] == f"LoRA warm-up: {length} on blocks 0-4"


def test_what_is_described(base: Path) -> None:
    """Skip2-LoRA of rank 4 from 2 of 5 blocks of width 32: 2 x 2 x 4 x 32 parameters."""
    method = lora(base, lora_r=4, **{**SKIP, "lora_query": True})
    parameters, taps, flags, frozen = describe(method.build(base, torch.float32), method.warmup)
    assert parameters.startswith("parameters: 512 trainable of ")
    assert taps == "Skip2-LoRA: outputs of blocks 0, 2, normalised, rank 4, to lm_head"
    assert flags == "LoRA (lora_query) applies to layers behind lm_head's input only: none there"
    assert frozen == "frozen, run without gradients: the embedding and blocks 0-4 of 5"


@pytest.mark.parametrize(("numbers", "text"), [((), ""), ((3,), "3"), ((0, 1, 2, 5), "0-2, 5"), ((1, 3, 4), "1, 3-4")])
def test_ranges(numbers: tuple[int, ...], text: str) -> None:
    assert ranges(numbers) == text
