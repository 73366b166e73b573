"""PiSSA and OLoRA against PEFT's: logits and steps; they start at the base bit for bit, are merged and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.testing import assert_close

from litgpt import lora
from litgpt.adapters.base import adapter_state, renew_adapters
from litgpt.adapters.pissa import PiSSA
from litgpt.convert import peft as converted
from tests.adapters.test_dora import IDX, curve
from tests.helpers import tiny
from tests.helpers.cases import first, quick
from tests.helpers.peft_names import PEFT_NAMES

CHOICES = {"query and value": ("lora_query", "lora_value"), "all but the head": tuple(flag for flag in PEFT_NAMES if flag != "lora_head")}


def pair(variant: str, choice: str = "all but the head", **settings: Any) -> tuple[Any, Any]:
    """PEFT's model and ours, fresh."""
    hf, flags = tiny.hf_llama(), CHOICES[choice]
    ours = tiny.from_hf(hf, lora_r=4, lora_alpha=10, lora_variant=variant, **dict.fromkeys(flags, True), **settings)
    torch.manual_seed(0)
    renew_adapters(ours)
    lora.mark_only_lora_as_trainable(ours)
    targets = [name for flag in flags for name in PEFT_NAMES[flag]]
    made = peft.LoraConfig(r=4, lora_alpha=10, target_modules=targets, lora_dropout=0.0, init_lora_weights=variant)  # type: ignore[arg-type]
    return peft.get_peft_model(hf, made).eval(), ours


def sgd_curve(model: Any, logits: Any) -> list[float]:
    """The losses of SGD, whose steps do not depend on the signs of singular vectors."""
    return curve(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05), logits, 5)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("variant", first(["pissa", "olora"]))
def test_steps_are_pefts(variant: str, choice: str) -> None:
    theirs, ours = pair(variant, choice)
    trained = {name.rpartition(".")[2] for name, p in ours.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    mine, other = sgd_curve(ours, lambda model: model(IDX)), sgd_curve(theirs, lambda model: model(IDX).logits)
    assert_close(mine, other, rtol=1e-3, atol=1e-3)
    assert mine[0] - mine[-1] > 0.05


@pytest.mark.parametrize("variant", quick(["pissa", "olora"], "pissa"))
def test_it_starts_at_the_base_merges_and_is_exported(variant: str, tmp_path: Path) -> None:
    _, ours = pair(variant)
    plain = tiny.from_hf(tiny.hf_llama())
    with torch.no_grad():
        assert torch.equal(ours(IDX), plain(IDX))
        for p in ours.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
        want = ours(IDX)
        assert (want - plain(IDX)).abs().max() > 0.05
        converted.write(tmp_path, *converted.to_peft(ours.config, adapter_state(ours), "base", "llama"))
        assert_close(peft.PeftModel.from_pretrained(tiny.hf_llama(), tmp_path)(IDX).logits, want, rtol=1e-4, atol=1e-4)
        lora.merge_lora_weights(ours)
        assert_close(ours(IDX), want, rtol=1e-4, atol=1e-4)


def test_pissa_takes_the_largest_singular_values() -> None:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 30)
    linear = torch.nn.Linear(30, 40, bias=False)
    linear.weight.data = weight
    kind = type("PiSSALinear", (PiSSA, lora.LoRALinear), {})
    layer = kind(30, 40, r=5, lora_alpha=20, linear=linear)
    U, S, V = torch.linalg.svd(weight)
    assert_close(layer.scaling * layer.lora_B @ layer.lora_A, U[:, :5] * S[:5] @ V[:5], rtol=1e-3, atol=1e-4)
    assert_close(layer.lora_A.square().sum(1) * layer.scaling, S[:5], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", ["pissa", "olora"])
@torch.no_grad()
def test_a_rank_above_a_weights(variant: str, tmp_path: Path) -> None:
    """The key projection has 16 rows, and a mixture's router as many as there are experts."""
    for settings in ({}, {"n_expert": 4, "n_expert_per_token": 2, "mlp_class_name": "LLaMAMoE"}):
        ours = tiny.tiny(lora_r=20, lora_alpha=20, lora_variant=variant, **tiny.ALL_LORA, **settings)
        plain = tiny.tiny(**settings)
        assert torch.equal(ours(IDX), plain(IDX))
        for layer in ours.modules():
            if isinstance(layer, PiSSA):
                assert layer.lora_A.shape[0] % 20 == 0 and layer.lora_A.any(1).all() and torch.equal(layer.lora_A, layer.lora_A0)
        for p in lora.get_lora_parameters(ours):
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
        want = ours(IDX)
        assert (want - plain(IDX)).abs().max() > 0.05
        lora.merge_lora_weights(ours)
        assert_close(ours(IDX), want, rtol=1e-4, atol=1e-4)
