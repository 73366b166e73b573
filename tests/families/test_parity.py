"""Every family's logits equal transformers': in one pass, with the key/value cache, in padded batches, beyond windows."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from litgpt.activations.cache import Recompute
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.sample import Sample
from tests.helpers import family_configs as configs, tiny
from tests.helpers.cases import quick

LENGTH = 40
SHORT = 6
"""below the windows (8) and the contexts that rotary scaling counts from (16)"""


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the largest difference, over the spread of the logits where that is above 1."""
    return float((got - want).abs().max() / want.std().clamp_min(1.0))


@pytest.mark.parametrize("length", quick([1, SHORT, LENGTH], LENGTH))
@pytest.mark.parametrize("family", configs.FAMILIES)
@torch.inference_mode()
def test_logits(family: str, length: int) -> None:
    hf, _, _ = configs.pair(family)
    idx = tiny.ids(2, length)
    want = hf(idx).logits
    assert want.std() > 0.2  # the comparison would say little about a model that says nothing
    assert difference(configs.ours(family)(idx), want) < 1e-5


@pytest.mark.parametrize("family", configs.QUICK_FIRST)
@torch.inference_mode()
def test_cached_decoding(family: str) -> None:
    """Token by token, and in chunks shorter and longer than the windows: transformers' logits of one pass.

    Those of LongRoPE, whose earlier keys keep the short factors in both, are of the same chunks.
    """
    hf, _, _ = configs.pair(family)
    model = configs.ours(family)
    idx = tiny.ids(2, LENGTH)
    model.set_kv_cache(2, LENGTH)
    pieces, chunks, start, past = [], [], 0, None
    for size in (1, 1, 9, 11, *[1] * 10, 8):
        chunk = idx[:, start : start + size]
        pieces.append(model(chunk, torch.arange(start, start + size)))
        if "longrope" in family:
            output = hf(chunk, past_key_values=past, use_cache=True)
            past = output.past_key_values
            chunks.append(output.logits)
        start += size
    assert difference(torch.cat(pieces, dim=1), torch.cat(chunks, dim=1) if chunks else hf(idx).logits) < 1e-5


@pytest.mark.parametrize("family", configs.QUICK_FIRST)
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


@pytest.mark.parametrize("family", configs.QUICK_FIRST)
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
    ("qwen2_moe", {"attn_bias": False}),
    ("qwen2_moe dense first", {"norm_topk_prob": False}),
    ("qwen2_moe dense first", {"sliding_window_size": None}),
    ("deepseek_v2", {"attention_scores_scalar": None}),
    ("deepseek_v2", {"rope_interleave": False}),
    ("deepseek_v2 groups", {"routed_scaling_factor": 1.0}),
    ("deepseek_v2 groups", {"n_topk_groups": 4}),
    ("deepseek_v3", {"n_topk_scores_per_group": 1}),
    ("deepseek_v3", {"norm_topk_prob": False}),
    ("deepseek_v3", {"rope_adjustments": None}),
    ("olmo", {"norm_eps": 0.1}),
    ("smollm3", {"rope_indices": None}),
    ("olmo clipped", {"clip_qkv": None}),
    ("mpt", {"clip_qkv": None}),
    ("mpt", {"alibi": False}),
    ("mpt scaled", {"attention_scores_scalar": None}),
    ("bloom", {"gelu_approximate": "none"}),
    ("gpt_oss", {"attention_sinks": False}),
    ("gpt_oss", {"router_bias": False}),
    ("gpt_oss", {"swiglu_limit": None}),
    ("gpt_oss", {"swiglu_alpha": 1.702}),
    ("gpt_oss", {"sliding_window_size": None}),
    ("falcon alibi", {"alibi_scaled": False}),
    ("granite", {"embedding_multiplier": 1.0}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"logits_scaling": 1.0}),
    ("granite", {"attention_scores_scalar": None}),
]


@pytest.mark.parametrize(
    ("family", "without"), quick(DETAILS, *DETAILS[::3]), ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
@torch.inference_mode()
def test_the_details_matter(family: str, without: dict[str, Any]) -> None:
    """Without this, a setting that neither side applied would pass the comparisons above."""
    _, fields, weights = configs.pair(family)
    changed = GPT(Config(**{**fields, **without}))
    changed.load_state_dict({name: weights[name] for name in changed.state_dict()})
    idx = tiny.ids(2, LENGTH)
    assert (changed.eval()(idx) - configs.ours(family)(idx)).abs().max() > (1e-4 if "gelu_approximate" in without else 1e-2)


@torch.inference_mode()
def test_yarn_ends_may_be_fractions() -> None:
    """`truncate` false keeps the ends of YaRN's ramp as they are; the two must not give the same."""
    idx = tiny.ids(1, LENGTH)
    assert (configs.ours("llama yarn")(idx) - configs.ours("llama yarn not truncated")(idx)).abs().max() > 1e-2


@torch.inference_mode()
def test_longrope_goes_by_the_sequences_own_length() -> None:
    """16 tokens take the short factors, 17 the long ones, whatever room the key/value cache has."""
    hf, _, _ = configs.pair("phi3 longrope")
    model = configs.ours("phi3 longrope")
    short, long = tiny.ids(1, 16), tiny.ids(1, 17)
    at_16 = hf(short).logits
    assert (at_16 - hf(long).logits[:, :16]).abs().max() > 1e-2  # the same 16 tokens
    model.set_kv_cache(1, 40)
    assert difference(model(short, torch.arange(16)), at_16) < 1e-5
    assert difference(model(long, torch.arange(17)), hf(long).logits) < 1e-5


@pytest.mark.parametrize("start", quick([5, 15, 16, 17], 15, 16))
def test_longrope_answers_are_those_of_transformers(start: int) -> None:
    """Greedy answers beyond the original context do not depend on their largest length."""
    hf, _, _ = configs.pair("phi3 longrope")
    prompt = tiny.ids(1, start)
    want = hf.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert len(set(want[0, start:].tolist())) > 2
    for count in (1, 3, 20):
        answer = list(tiny.generate(configs.ours("phi3 longrope"), prompt[0], start + count, temperature=0.0))
        assert answer == want[0, start : start + count].tolist()


@pytest.mark.parametrize("lengths", [(19, 16, 17), (12, 16), (17, 30)])
def test_longrope_trains_each_sample_by_its_own_length(lengths: tuple[int, ...]) -> None:
    """The losses of a packed batch that shares its first tokens are transformers' for each sample alone."""
    hf, _, _ = configs.pair("phi3 longrope")
    model = configs.ours("phi3 longrope")
    rows = [[*range(9), 20 + length, *tiny.ids(1, length - 10, seed=length)[0].tolist()] for length in lengths]
    samples = [Sample(array("i", row), bytearray([0] + [1] * (len(row) - 1))) for row in rows]
    features = Recompute(model, samples, torch.device("cpu"))(range(len(rows)))
    losses = F.cross_entropy(
        model.logits(model.tail(features.x, features.taps, features.pos))[features.at], features.targets, reduction="none"
    )
    want = [hf(torch.tensor([row]), labels=torch.tensor([row])).loss for row in rows]
    got = [each.mean() for each in losses.split([len(row) - 1 for row in rows])]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
