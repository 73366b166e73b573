"""The estimate of memory against what autograd really keeps, and against counts."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from litgpt import lora
from litgpt.loss import CHUNK_BYTES
from litgpt.memory import NF4_BYTES, estimate, kept_by_block
from litgpt.packing import Packing
from tests.helpers import tiny
from tests.helpers.cases import quick

ALL = {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "norm_class_name": "RMSNorm",
        "mlp_class_name": "LLaMAMLP",
        "n_query_groups": 2,
        "bias": False,
        "parallel_residual": False,
        "rotary_percentage": 1.0,
        "intermediate_size": 384,
    },
    "neox": {"intermediate_size": 512},
}
FAMILIES["moe"] = {**FAMILIES["llama"], "mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora_r": 4, "lora_query": True, "lora_value": True},
    "lora on all, dropout": {"lora_r": 4, "lora_dropout": 0.1, **ALL},
}


@pytest.fixture(autouse=True)
def _without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litgpt.memory.is_supported", lambda dtype: False)


def config(family: str, n_layer: int = 2, **settings: Any) -> lora.Config:
    return lora.Config(n_layer=n_layer, n_embd=128, n_head=4, vocab_size=64, padded_vocab_size=64, **FAMILIES[family], **settings)


def saved(config: lora.Config, dtype: torch.dtype, full: bool, checkpointing: bool = False, stem: int = 0) -> float:
    """Bytes that autograd keeps for a token, parameters excepted."""
    model = lora.GPT(config).to(dtype).train()
    if checkpointing:
        for block in model.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if not full:
        lora.mark_only_lora_as_trainable(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    idx, pos = tiny.ids(2, 64, 64), None
    if stem:
        idx = torch.cat((idx[0, :stem], idx[:, stem:].flatten()))
        pos = model.packed_positions(Packing.of([64 - stem] * 2, stem, idx.device))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model.tail(*model.prefix(idx, pos), pos)
    assert result.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / idx.numel()


@pytest.mark.parametrize("dtype", quick([torch.float32, torch.bfloat16], torch.bfloat16), ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_keeps_what_the_formula_says(family: str, method: str, dtype: torch.dtype) -> None:
    """Two more blocks keep twice A more."""
    full = method == "full"
    two, four = (saved(config(family, n, **METHODS[method]), dtype, full) for n in (2, 4))
    model = lora.GPT(config(family, **METHODS[method]))
    if not full:
        lora.mark_only_lora_as_trainable(model)
    assert kept_by_block(model.blocks[-1], dtype.itemsize) == pytest.approx((four - two) / 2, rel=0.15)


@pytest.mark.parametrize("settings", [{"attention_logit_softcapping": 50.0}, {"attention_sinks": True}], ids=["cap", "sinks"])
def test_plain_attention_keeps_its_scores(settings: dict[str, Any]) -> None:
    """64 keys of two samples."""
    settings |= METHODS["lora"]
    two, four = (saved(config("llama", n, **settings), torch.bfloat16, False) for n in (2, 4))
    few, many = (estimate(config("llama", n, **settings), 128, keys=64) for n in (2, 4))
    assert (many.activations - few.activations) / 128 == pytest.approx(four - two, rel=0.15)


def test_weights_and_training(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = METHODS["lora"]
    numbers = sum(p.numel() for p in lora.GPT(config("llama")).parameters())
    adapters = sum(p.numel() for name, p in lora.GPT(config("llama", **settings)).named_parameters() if lora.lora_filter(name))
    need = estimate(config("llama", **settings), 16)
    assert (need.trained, need.weights, need.training) == (adapters, 2 * numbers, 16 * adapters)
    assert need.total == need.weights + need.training + need.activations
    full = estimate(config("llama"), 16)
    assert (full.trained, full.weights, full.training) == (numbers, 2 * numbers, 16 * numbers)  # fp32: a copy, the gradient, two moments
    assert estimate(config("llama"), 16, tied=True).trained == numbers - 64 * 128
    linear = 2 * (128 * (128 + 2 * 64) + 128 * 128 + 3 * 128 * 384)
    packed = 2 * 512 * 2 * (128 + 2 * 64 + 128 + 128 + 128 + 3 * 384 + 3 * 128)  # in blocks of 512 inputs, there and back
    assert estimate(config("llama", **settings), 16, width=4).weights == 4 * (numbers - linear) + packed + 2 * 512 * (64 + 128)
    monkeypatch.setattr("litgpt.memory.is_supported", lambda dtype: True)
    assert estimate(config("llama", **settings), 16).weights == 2 * numbers + 2 * 2 * 64 * 128  # the head, there and back
    monkeypatch.setattr("litgpt.packed.LARGE", 64 * 128 - 1)
    assert estimate(config("llama", **settings), 16).weights == 2 * numbers + 2 * 64 * 128  # back alone
    monkeypatch.setattr("litgpt.memory.is_supported", lambda dtype: False)
    quantised = estimate(config("llama", **settings), 16, quantize="bnb.nf4")
    assert quantised.weights == 2 * (numbers - linear) + NF4_BYTES * linear


def test_skip2lora_keeps_nothing_of_the_blocks() -> None:
    """Whatever their number: the activations of one frozen block at a time, the taps, a chunk of logits."""
    skip = {"lora_r": 4, "skip2lora_enabled": True, "skip2lora_block_indices": [0, 1]}
    few, many = (estimate(config("llama", n, **skip), 64) for n in (2, 8))
    assert few.activations == many.activations
    model = lora.GPT(config("llama", **skip))
    lora.mark_only_lora_as_trainable(model)
    assert few.activations == 64 * (kept_by_block(model.blocks[-1], 2) + 128 * (4 + 8 * 2)) + CHUNK_BYTES
    few_with_loss = estimate(config("llama", 2, **skip), 64, 10)
    assert few.activations - few_with_loss.activations == 54 * 128 * (4 + 8 * 2)
    into_a_block = config("llama", 8, **skip, skip2lora_output_layer="transformer.h.6")
    assert estimate(into_a_block, 64, 10) == estimate(into_a_block, 64), "it hands on every position"
    late = estimate(config("llama", 8, lora_r=4, lora_query=True, lora_block_indices=[6, 7]), 64)
    assert late.activations == pytest.approx(few.activations + 64 * (2 * kept_by_block(model.blocks[-1], 2) - 128 * 16), rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_keeps_the_blocks_inputs(method: str) -> None:
    """Two more blocks keep w d more each for a token; A is there once, whatever their number."""
    full, width, d = method == "full", 4, 128
    two, four = (saved(config("llama", n, **METHODS[method]), torch.float32, full, checkpointing=True) for n in (2, 4))
    assert four - two == 2 * width * d
    few, many = (estimate(config("llama", n, **METHODS[method]), 64, checkpointing=True, width=width) for n in (2, 8))
    assert many.activations - few.activations == 64 * 6 * width * d
    model = lora.GPT(config("llama", **METHODS[method]))
    if not full:
        lora.mark_only_lora_as_trainable(model)
    plain = estimate(config("llama", **METHODS[method]), 64, width=width)
    assert plain.activations - few.activations == 64 * 2 * (kept_by_block(model.blocks[-1], width) - width * d)
    assert plain.weights == few.weights and plain.training == few.training
