"""Every family's logits equal transformers': in one pass, with the key/value cache, in padded batches, beyond windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.model import GPT
from tests.helpers import family_configs as configs
from tests.helpers import tiny

LENGTH = 40
SHORT = 6
"""below the windows (8) and the contexts that rotary scaling counts from (16)"""


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the largest difference, over the spread of the logits where that is above 1."""
    return float((got - want).abs().max() / want.std().clamp_min(1.0))


@pytest.mark.parametrize("length", [1, SHORT, LENGTH])
@pytest.mark.parametrize("family", configs.FAMILIES)
@torch.inference_mode()
def test_logits(family: str, length: int) -> None:
    hf, _, _ = configs.pair(family)
    idx = tiny.ids(2, length)
    want = hf(idx).logits
    assert want.std() > 0.2  # the comparison would say little about a model that says nothing
    assert difference(configs.ours(family)(idx), want) < 1e-5


@pytest.mark.parametrize("family", configs.FAMILIES)
@torch.inference_mode()
def test_cached_decoding(family: str) -> None:
    """Token by token, and in chunks shorter and longer than the windows: transformers' logits of one pass."""
    hf, _, _ = configs.pair(family)
    model = configs.ours(family)
    idx = tiny.ids(2, LENGTH)
    model.set_kv_cache(2, LENGTH)
    pieces, start = [], 0
    for size in (1, 1, 9, 11, *[1] * 10, 8):
        pieces.append(model(idx[:, start : start + size], torch.arange(start, start + size)))
        start += size
    assert difference(torch.cat(pieces, dim=1), hf(idx).logits) < 1e-5


@pytest.mark.parametrize("family", configs.FAMILIES)
@torch.inference_mode()
def test_right_padded_batch(family: str) -> None:
    """Rows padded on the right, in transformers with its attention mask: the logits of the real tokens."""
    hf, _, _ = configs.pair(family)
    lengths = [LENGTH, 5, 23]
    rows = [tiny.ids(1, length, seed=length)[0] for length in lengths]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    real = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    want = hf(batch, attention_mask=real.long()).logits
    assert difference(configs.ours(family)(batch)[real], want[real]) < 1e-5


@pytest.mark.parametrize("family", configs.FAMILIES)
@torch.inference_mode()
def test_bf16_close_to_fp32(family: str) -> None:
    """Every step keeps the dtype, and none loses more than bf16 must."""
    model, idx = configs.ours(family), tiny.ids(1, LENGTH)
    exact = model(idx)
    rough = model.bfloat16()(idx)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().median() < 0.05 * exact.std()


# What a family has beyond llama, and a value without it.
DETAILS: list[tuple[str, dict[str, Any]]] = [
    ("llama 3.1", {"rope_adjustments": None}),
    ("llama linear", {"rope_condense_ratio": 1}),
    ("llama yarn", {"rope_adjustments": None}),
    ("mistral", {"sliding_window_size": None}),
    ("mixtral", {"n_expert_per_token": 1}),
    ("mixtral window", {"sliding_window_size": None}),
    ("gpt_neox", {"parallel_residual": False}),
    ("gpt_neox sequential", {"gelu_approximate": "none"}),
    ("phi", {"rotary_percentage": 1.0}),
    ("phi3 longrope", {"rope_adjustments": None}),
    ("phi4 mini", {"rotary_percentage": 0.5}),
    ("gemma", {"scale_embeddings": False}),
    ("gemma", {"gelu_approximate": "none"}),
    ("gemma2", {"attention_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"attention_scores_scalar": None}),
    ("gemma2", {"sliding_window_indices": [1, 1, 1]}),
    ("gemma3", {"sliding_window_indices": [1, 1, 1]}),
    ("gemma3", {"rope_indices": None}),
    ("gemma3 linear", {"rope_adjustments": None}),
    ("gemma3 linear", {"rope_local_base_freq": 5000.0}),
    ("qwen2 window", {"sliding_window_size": None}),
    ("qwen3_moe not normalised", {"norm_topk_prob": True}),
    ("olmo", {"norm_eps": 0.1}),
    ("smollm3", {"rope_indices": None}),
    ("granite", {"embedding_multiplier": 1.0}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"logits_scaling": 1.0}),
    ("granite", {"attention_scores_scalar": None}),
]


@pytest.mark.parametrize(("family", "without"), DETAILS, ids=lambda value: value if isinstance(value, str) else "-".join(value))
@torch.inference_mode()
def test_the_details_matter(family: str, without: dict[str, Any]) -> None:
    """Without this, a setting that neither side applied would pass the comparisons above."""
    _, fields, weights = configs.pair(family)
    changed = GPT(Config(**{**fields, **without}))
    changed.load_state_dict(weights)
    idx = tiny.ids(2, LENGTH)
    assert (changed.eval()(idx) - configs.ours(family)(idx)).abs().max() > (1e-4 if "gelu_approximate" in without else 1e-2)


@torch.inference_mode()
def test_yarn_ends_may_be_fractions() -> None:
    """`truncate` false keeps the ends of YaRN's ramp as they are; the two must not give the same."""
    idx = tiny.ids(1, LENGTH)
    assert (configs.ours("llama yarn")(idx) - configs.ours("llama yarn not truncated")(idx)).abs().max() > 1e-2


@torch.inference_mode()
def test_longrope_goes_by_the_length_at_hand_or_by_the_caches() -> None:
    """16 tokens take the short factors, 17 the long ones; a cache for 17 takes the long ones from the first token on, and so does a
    model whose training saw 17."""
    hf, _, _ = configs.pair("phi3 longrope")
    model = configs.ours("phi3 longrope")
    short, long = tiny.ids(1, 16), tiny.ids(1, 17)
    at_16, at_17 = hf(short).logits, hf(long).logits
    assert (at_16 - at_17[:, :16]).abs().max() > 1e-2  # the same 16 tokens
    for size, want in ((16, at_16), (17, at_17[:, :16])):
        model.set_kv_cache(1, size)
        assert difference(model(short, torch.arange(16), 16), want) < 1e-5
    model.clear_kv_cache()
    assert difference(model(short), at_16) < 1e-5
    model.reach = 17
    assert difference(model(short), at_17[:, :16]) < 1e-5


def test_clipped_projections_are_refused() -> None:
    """OLMo 7B clamps q, k and v, which is not built: said, not ignored."""
    with pytest.raises(UserError, match="clip_qkv"):
        Config.from_hf(configs.hf_config("olmo", clip_qkv=8.0).to_dict())
