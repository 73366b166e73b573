"""Latent attention: by the paper's formula for each head, what is cached, which layers LoRA has, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from litgpt import adapter, lora
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.generate.divide import shard
from litgpt.model import GPT
from tests.helpers import tiny

C, R, NOPE, V = 10, 6, 8, 7
SIZES = {"q_lora_rank": 12, "kv_lora_rank": C, "qk_rope_head_dim": R, "qk_nope_head_dim": NOPE, "v_head_dim": V}
LATENT: dict[str, Any] = {"latent_attention": SIZES, "n_query_groups": 4, "rope_interleave": True}


def turned(x: torch.Tensor, place: int) -> torch.Tensor:
    """Return x (R,) with neighbours as the real and imaginary part of a number, turned by the position."""
    angles = place * 10000.0 ** (-torch.arange(0, R, 2) / R)
    return torch.view_as_real(
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones(R // 2), angles)
    ).flatten()


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


@torch.no_grad()
def test_each_head_by_the_formula() -> None:
    model = tiny.tiny(**LATENT)
    attention = model.blocks[1].attn
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    for t in range(5):
        q = attention.q_b_proj.weight @ rms(attention.q_a_proj.weight @ x[t], attention.q_a_norm.weight)
        heads = []
        for i in range(4):
            own = q.view(4, NOPE + R)[i]
            scores, values = [], []
            for s in range(t + 1):
                row = attention.kv_a_proj_with_mqa.weight @ x[s]
                key, value = (attention.kv_b_proj.weight @ rms(row[:C], attention.kv_a_norm.weight)).view(4, NOPE + V)[i].split((NOPE, V))
                scores.append((own[:NOPE] @ key + turned(own[NOPE:], t) @ turned(row[C:], s)) / (NOPE + R) ** 0.5)
                values.append(value)
            heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
        outputs.append(attention.proj.weight @ torch.cat(heads))
    got = attention(x[None], model.positions(torch.zeros(1, 5, dtype=torch.long)))[0]
    assert_close(got, torch.stack(outputs), rtol=1e-4, atol=1e-5)


def test_the_cache_holds_the_latent_vectors() -> None:
    model = GPT(Config(**{**tiny.TINY, **LATENT}))
    model.set_kv_cache(2, 9)
    cache = model.blocks[0].attn.kv_cache
    assert cache is not None and (cache.k.shape, cache.v.shape) == ((2, 1, 9, C), (2, 1, 9, R))


@pytest.mark.parametrize("low_rank_q", [True, False])
def test_layers_of_lora(low_rank_q: bool) -> None:
    """Keys and values share their layers: either setting adapts them."""
    sizes = {**LATENT, "latent_attention": {**SIZES, "q_lora_rank": 12 if low_rank_q else None}}

    def adapted(**settings: bool) -> set[str]:
        model = lora.GPT(lora.Config(**{**tiny.TINY, **sizes, "lora_r": 2, **settings}))
        return {name for name, layer in model.blocks[0].attn.named_modules() if isinstance(layer, lora.LoRALinear)}

    off = {"lora_query": False, "lora_key": False, "lora_value": False}
    queries, both = {"q_a_proj", "q_b_proj"} if low_rank_q else {"q_proj"}, {"kv_a_proj_with_mqa", "kv_b_proj"}
    assert adapted(**{**off, "lora_query": True}) == queries
    assert adapted(**{**off, "lora_key": True}) == adapted(**{**off, "lora_value": True}) == both
    assert adapted(**off, lora_projection=True) == {"proj"}


def test_what_does_not_go_with_it() -> None:
    settings = {**tiny.TINY, **LATENT}
    with pytest.raises(UserError, match="LLaMA-Adapter"):
        adapter.Config(**settings)
    with pytest.raises(UserError, match="alora_enabled does not go with lora_key and lora_value"):
        lora.Config(**settings, lora_r=2, lora_value=True, alora_enabled=True, alora_invocation_tokens=[1])
    with pytest.raises(UserError, match="latent attention"):
        shard(tiny.tiny(**LATENT), 0, 2, lambda tensor: tensor)
