"""The base model against transformers' logits, and against itself: cached, padded, windowed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import GPT2Config

from litgpt.attention import FEW, CausalSelfAttention, KVCache, Positions, plain_attention
from litgpt.config import Config
from litgpt.fused import attention
from litgpt.lora import GPT as LoRAGPT, Config as LoRAConfig, lora_filter
from litgpt.model import GPT
from tests.helpers import tiny
from tests.helpers.cases import quick

CLOSE = {"rtol": 1e-4, "atol": 2e-5}

FAMILIES: dict[str, Any] = {
    "llama": lambda: tiny.hf_llama(),
    "llama multi-head": lambda: tiny.hf_llama(num_key_value_heads=4),
    "llama multi-query": lambda: tiny.hf_llama(num_key_value_heads=1),
    "llama tied": lambda: tiny.hf_llama(tie_word_embeddings=True),
    "llama wide heads": lambda: tiny.hf_llama(head_dim=12),
    "llama large eps": lambda: tiny.hf_llama(rms_norm_eps=0.3),
    "llama rope theta": lambda: tiny.hf_llama(rope_theta=500.0),
    "llama dynamic rope": lambda: tiny.hf_llama(rope_scaling={"rope_type": "dynamic", "factor": 4.0}, rope_theta=100.0),
    "llama 3.1 rope": lambda: tiny.hf_llama(rope_scaling=tiny.LLAMA3_ROPE, rope_theta=100.0),
    "llama linear rope": lambda: tiny.hf_llama(rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama linear rope, a fraction": lambda: tiny.hf_llama(rope_scaling={"rope_type": "linear", "factor": 2.5}),
    "mistral": lambda: tiny.hf_mistral(),
    "mistral window": lambda: tiny.hf_mistral(sliding_window=7),
    "mistral window of the whole sequence": lambda: tiny.hf_mistral(sliding_window=40),
    "neox": lambda: tiny.hf_neox(),
    "neox sequential": lambda: tiny.hf_neox(use_parallel_residual=False),
    "neox full rotary": lambda: tiny.hf_neox(rotary_pct=1.0),
    "neox tanh gelu": lambda: tiny.hf_neox(hidden_act="gelu_pytorch_tanh"),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_logits_against_transformers(family: str) -> None:
    hf = FAMILIES[family]()
    idx = tiny.ids(2, 40)
    want = hf(idx).logits
    got = tiny.from_hf(hf)(idx)
    assert got.shape == (2, 40, 101)
    assert want.std() > 0.5  # the comparison would say little about a model that says nothing
    assert_close(got, want, **CLOSE)


@pytest.mark.parametrize(
    ("plain", "changed"),
    [
        ("llama", "llama 3.1 rope"),
        ("llama", "llama linear rope"),
        ("llama", "llama large eps"),
        ("mistral", "mistral window"),
        ("neox", "neox sequential"),
        ("neox", "neox full rotary"),
        ("neox", "neox tanh gelu"),
    ],
)
@torch.inference_mode()
def test_families_differ_where_they_should(plain: str, changed: str) -> None:
    """Without this, an option that neither side applied would pass the comparison above."""
    idx = tiny.ids(1, 40)
    difference = (tiny.from_hf(FAMILIES[plain]())(idx) - tiny.from_hf(FAMILIES[changed]())(idx)).abs().max()
    assert difference > (1e-4 if changed == "neox tanh gelu" else 1e-2)


@torch.inference_mode()
def test_tied_head_is_one_tensor() -> None:
    _, weights = tiny.converted(tiny.hf_llama(tie_word_embeddings=True))
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()


WINDOWS: dict[str, dict[str, Any]] = {
    "global": {},
    "window": {"sliding_window_size": 6},
    "window in some blocks": {"sliding_window_size": 6, "sliding_window_indices": [1, 0, 1, 0, 0]},
    "neox": {
        "n_query_groups": 4,
        "norm_class_name": "LayerNorm",
        "mlp_class_name": "GptNeoxMLP",
        "bias": True,
        "parallel_residual": True,
        "rotary_percentage": 0.25,
    },
    "one norm for both": {"norm_class_name": "LayerNorm", "parallel_residual": True, "shared_attention_norm": True},
    "llama 3.1 rope": {"rope_adjustments": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 16}},
}
SKIPS: dict[str, dict[str, Any]] = {
    "base": {},
    "at lm_head": {"skip2lora_enabled": True, "lora_r": 3},
    "at ln_f": {"skip2lora_enabled": True, "lora_r": 3, "skip2lora_output_layer": "transformer.ln_f", "skip2lora_norm": "none"},
    "at block 2": {"skip2lora_enabled": True, "lora_r": 3, "skip2lora_output_layer": "transformer.h.2", **tiny.ALL_LORA},
}


@pytest.mark.parametrize("skip", quick(SKIPS, "base", "at block 2"))
@pytest.mark.parametrize("window", WINDOWS)
@torch.inference_mode()
def test_cached_decoding_equals_full_pass(window: str, skip: str) -> None:
    model = tiny.move_adapters(tiny.tiny(**WINDOWS[window], **SKIPS[skip]))
    idx = tiny.ids(2, 20)
    full = model(idx)
    assert full.std() > 0.3
    model.set_kv_cache(batch_size=2, max_seq_length=20)
    pieces = [model(idx[:, :9], torch.arange(9), 9)]
    pieces.append(model(idx[:, 9:13], torch.arange(9, 13)))  # several at once on top of a cache
    pieces += [model(idx[:, t : t + 1], torch.tensor([t]), t + 1) for t in range(13, 20)]
    assert_close(torch.cat(pieces, dim=1), full, **CLOSE)
    model.clear_kv_cache()
    assert all(block.attn.kv_cache is None for block in model.blocks)
    assert_close(model(idx), full, rtol=0, atol=0)


@torch.inference_mode()
def test_window_hides_what_lies_further_back() -> None:
    """A change of token 0 reaches position t in one block only if t < window."""
    model = tiny.tiny(n_layer=1, sliding_window_size=6)
    idx = tiny.ids(1, 20)
    other = idx.clone()
    other[0, 0] = (other[0, 0] + 1) % 101
    moved = (model(idx) - model(other)).abs().amax(dim=(0, 2)) > 0
    assert moved.tolist() == [True] * 6 + [False] * 14


@torch.inference_mode()
def test_causal() -> None:
    model = tiny.tiny()
    idx = tiny.ids(1, 20)
    other = idx.clone()
    other[0, 12] = (other[0, 12] + 1) % 101
    moved = (model(idx) - model(other)).abs().amax(dim=(0, 2)) > 0
    assert moved.tolist() == [False] * 12 + [True] * 8


@pytest.mark.parametrize("skip", SKIPS)
@torch.inference_mode()
def test_right_padded_batch_equals_single(skip: str) -> None:
    model = tiny.move_adapters(tiny.tiny(**SKIPS[skip]))
    lengths = [17, 5, 11]
    rows = [tiny.ids(1, length, seed=length)[0] for length in lengths]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    together = model(batch)
    for row, logits in zip(rows, together, strict=True):
        assert_close(logits[: len(row)], model(row[None])[0], **CLOSE)


def test_too_long_and_no_cache() -> None:
    model = tiny.tiny(n_layer=1, block_size=8)
    with pytest.raises(ValueError, match="9 tokens is longer than max_seq_length, 8"):
        model(tiny.ids(1, 9))
    with pytest.raises(ValueError, match="set_kv_cache"):
        model(tiny.ids(1, 2), torch.arange(2))
    model.set_kv_cache(1, 4)
    with pytest.raises(ValueError, match=r"position 4 .* cache of 4"):
        model(tiny.ids(1, 1), torch.tensor([4]))


def test_training_after_inference_mode() -> None:
    """Rotary tables made under inference_mode must not poison a later backward pass."""
    model = tiny.tiny(n_layer=2)
    with torch.inference_mode():
        model(tiny.ids(1, 10))
    model(tiny.ids(1, 10)).sum().backward()
    assert model.transformer["wte"].weight.grad.abs().sum() > 0


def test_bf16_close_to_fp32() -> None:
    model = tiny.tiny()
    idx = tiny.ids(1, 30)
    with torch.inference_mode():
        exact = model(idx)
        rough = model.bfloat16()(idx)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).std() < 0.05 * exact.std()


@pytest.mark.parametrize(
    ("name", "count", "tied"),
    [  # from the models' own cards and safetensors headers
        ("Llama-2-7b-hf", 6_738_415_616, False),
        ("Llama-3-8B", 8_030_261_248, False),
        ("Llama-3.2-1B", 1_235_814_400, True),
        ("tiny-llama-1.1b", 1_100_048_384, False),
        ("SmolLM2-135M", 134_515_008, True),
        ("SmolLM2-360M", 361_821_120, True),
        ("SmolLM2-1.7B", 1_711_376_384, True),
        ("Mistral-7B-v0.1", 7_241_732_096, False),
        ("Mistral-7B-v0.3", 7_248_023_552, False),
        ("pythia-160m", 162_322_944, False),
        ("pythia-1b", 1_011_781_632, False),
        ("pythia-6.9b", 6_857_302_016, False),
    ],
)
def test_parameter_counts(name: str, count: int, tied: bool) -> None:
    with torch.device("meta"):
        model = GPT(Config.from_name(name))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert counted - (model.lm_head.weight.numel() if tied else 0) == count


def test_state_dict_keys() -> None:
    """LitGPT's names, all of them."""
    llama = tiny.tiny(n_layer=1).state_dict()
    block = ["norm_1", "attn.qkv", "attn.proj", "norm_2", "mlp.fc_1", "mlp.fc_2", "mlp.proj"]
    ends = ["lm_head.weight", "transformer.wte.weight", "transformer.ln_f.weight"]
    assert set(llama) == {*ends, *(f"transformer.h.0.{part}.weight" for part in block)}
    assert llama["transformer.h.0.attn.qkv.weight"].shape == (32 + 16 + 16, 32)
    neox = tiny.tiny(n_layer=1, **WINDOWS["neox"]).state_dict()
    block = ["norm_1", "attn.qkv", "attn.proj", "norm_2", "mlp.fc", "mlp.proj"]
    both = [f"transformer.h.0.{part}" for part in block] + ["transformer.ln_f"]
    assert set(neox) == {"lm_head.weight", "transformer.wte.weight", *(f"{part}.{kind}" for part in both for kind in ("weight", "bias"))}


FAMILY_KEYS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "Qwen 3": (
        {"norm_qk": True, "head_size": 12},
        {"transformer.h.0.attn.norm_q.weight": (12,), "transformer.h.0.attn.norm_k.weight": (12,)},
    ),
    "OLMo 2": (
        {"norm_qk": True, "norm_qk_type": "olmo2", "norm_1": False, "norm_2": False, "post_attention_norm": True, "post_mlp_norm": True},
        {
            "transformer.h.0.attn.norm_q.weight": (32,),
            "transformer.h.0.attn.norm_k.weight": (16,),
            "transformer.h.0.post_attention_norm.weight": (32,),
            "transformer.h.0.post_mlp_norm.weight": (32,),
        },
    ),
    "Gemma 2": (
        {"mlp_class_name": "GemmaMLP", "post_attention_norm": True, "post_mlp_norm": True},
        {"transformer.h.0.post_attention_norm.weight": (32,), "transformer.h.0.post_mlp_norm.weight": (32,)},
    ),
    "Qwen 2": ({"attn_bias": True}, {"transformer.h.0.attn.qkv.bias": (64,)}),
    "Mixtral": (
        {"mlp_class_name": "LLaMAMoE", "n_expert": 2, "n_expert_per_token": 1, "moe_intermediate_size": 24},
        {
            "transformer.h.0.mlp.gate.weight": (2, 32),
            **{f"transformer.h.0.mlp.experts.{e}.{part}.weight": (24, 32) for e in (0, 1) for part in ("fc_1", "fc_2")},
            **{f"transformer.h.0.mlp.experts.{e}.proj.weight": (32, 24) for e in (0, 1)},
        },
    ),
    "GPT-2": ({"learned_positions": True}, {"transformer.wpe.weight": (64, 32)}),
    "Phi": ({"lm_head_bias": True}, {"lm_head.bias": (101,)}),
    "OLMo": ({"norm_class_name": "LayerNorm", "norm_affine": False}, {}),
}
REPLACED = {
    "Mixtral": ("mlp.fc_1.weight", "mlp.fc_2.weight", "mlp.proj.weight"),
    "OLMo 2": ("norm_1.weight", "norm_2.weight"),
    "OLMo": ("norm_1.weight", "norm_2.weight", "ln_f.weight"),
}


@pytest.mark.parametrize("family", FAMILY_KEYS)
def test_state_dict_keys_of_the_families(family: str) -> None:
    """What each adds to llama's keys, or has in their place: LitGPT's names and shapes, and wpe for GPT-2."""
    settings, added = FAMILY_KEYS[family]
    llama = {key for key in tiny.tiny(n_layer=1).state_dict() if not key.endswith(REPLACED.get(family, ("-",)))}
    got = {key: tuple(value.shape) for key, value in tiny.tiny(n_layer=1, **settings).state_dict().items()}
    assert {key: shape for key, shape in got.items() if key not in llama} == added
    assert llama <= got.keys()


def test_gpt2_and_its_lora_tutorial() -> None:
    """124,439,808 parameters (the head is the embedding), and 998,024 more with LoRA r 8 on q, k, v, projection and head."""
    fields = Config.from_hf(GPT2Config().to_dict()).base_dict()
    flags = dict.fromkeys(("lora_query", "lora_key", "lora_value", "lora_projection", "lora_head"), True)
    with torch.device("meta"):
        model = LoRAGPT(LoRAConfig(**fields, lora_r=8, **flags))
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    adapters = sum(count for name, count in counts.items() if lora_filter(name))
    assert adapters == 998_024
    assert sum(counts.values()) - adapters - counts["lm_head.linear.weight"] == 124_439_808


@torch.inference_mode()
def test_capped_attention_is_torchs_where_the_cap_is_far_away() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 9, 8, generator=generator) for heads in (6, 2, 2))
    mask = torch.ones(9, 9).tril().bool()
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    assert_close(plain_attention(q, k, v, mask, 0.3, 1e3), want, rtol=1e-4, atol=1e-5)
    assert (plain_attention(q, k, v, mask, 0.3, 0.5) - want).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("kind", ["everything", "places", "rows", "by head"])
@pytest.mark.parametrize("few", [FEW, 0])
def test_attention_of_the_last_places(
    dtype: torch.dtype, groups: int, T: int, kind: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One place, as in decoding, and several: the softmax written out in fp64 and its gradients, for masks of all forms."""
    monkeypatch.setattr("litgpt.attention.FEW", few)
    B, H, K, h = 3, 6, 11, 8
    generator = torch.Generator().manual_seed(0)
    config = Config(block_size=16, vocab_size=8, n_layer=1, n_head=H, n_embd=H * h, n_query_groups=groups)
    q, k, v = (torch.randn(B, K, heads, h, generator=generator).to(dtype).transpose(1, 2) for heads in (H, groups, groups))
    T = K if T > 1 and kind == "everything" else T
    q = q[:, :, -T:]
    causal = torch.arange(K) <= torch.arange(K - T, K)[:, None]  # (T, K)
    rows = (causal & (torch.arange(K) <= torch.tensor([4, 10, 7])[:, None, None]))[:, None]  # (B, 1, T, K)
    added = torch.where(rows, torch.randn(H, 1, K, generator=generator), -torch.inf).to(dtype)  # (B, H, T, K)
    mask = {"everything": None, "places": causal, "rows": rows, "by head": added}[kind]

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        q, k, v = (each.double() for each in tensors)
        k, v = (each.repeat_interleave(H // groups, 1) for each in (k, v))
        scores = q @ k.mT * h**-0.5
        allowed = causal if mask is None else mask
        scores = scores + allowed.double() if kind == "by head" else scores.masked_fill(~allowed, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    want_inputs, inputs = ([each.detach().clone().requires_grad_() for each in (q, k, v)] for _ in range(2))
    want = attend(*want_inputs)
    got = CausalSelfAttention(config, 0)._attend(*inputs, Positions((), mask, None, None, K))
    with torch.no_grad():
        without_gradients = CausalSelfAttention(config, 0)._attend(q, k, v, Positions((), mask, None, None, K))
    assert got.dtype == dtype and got.shape == want.shape
    weight = torch.randn(want.shape, generator=generator)
    (want * weight).sum().backward()
    (got * weight).sum().backward()
    least = 1e-5 if dtype == torch.float32 else 2e-2
    for each in (got, without_gradients):
        assert_close(each.double(), want, rtol=0, atol=least)
    for one, other in zip(inputs, want_inputs, strict=True):
        assert_close(one.grad.float(), other.grad.float(), rtol=0, atol=4 * least)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_key_value_cache_with_places_of_each_row(dtype: torch.dtype) -> None:
    """(T,) places for all rows, (B, T) for each: those of other rows stay as they are."""
    B, G, T, h = 2, 3, 4, 5
    new = torch.randn(B, T, G, h).to(dtype).transpose(1, 2)
    index = torch.tensor([[3, 0, 5, 1], [2, 4, 6, 0]])
    for places in (index, index[0]):
        cache = KVCache([(G, h), (G, h)], B + 1, 8, "cpu", dtype)
        want = torch.zeros(B + 1, G, 8, h, dtype=dtype)
        for b in range(B):
            for t in range(T):
                want[b, :, (places if places.dim() == 1 else places[b])[t]] = new[b, :, t]
        k, v = cache(places, new, new * 2, 7)
        assert torch.equal(cache.k, want) and torch.equal(cache.v, want * 2) and torch.equal(k, want[:B, :, :7])
        assert torch.equal(v, want[:B, :, :7] * 2)


@pytest.mark.slow
@torch.inference_mode()
def test_smollm2_against_transformers(smollm2_dir: Path) -> None:
    """The real model: transformers, given the same weights, computes the same logits."""
    from litgpt.checkpoint import load_model, load_weights
    from litgpt.tokenizer import Tokenizer

    idx = Tokenizer(smollm2_dir).encode("The capital of France is Paris, and that of Spain is")[None]
    want = tiny.hf_of(Config.from_checkpoint(smollm2_dir), load_weights(smollm2_dir / "lit_model.pth"))(idx).logits
    got = load_model(smollm2_dir, torch.float32)(idx)
    assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("T", [40, 10])
@pytest.mark.parametrize("kind", ["causal", "window", "rows", "no mask"])
@pytest.mark.parametrize("scores", [2**20, 20_000, 2_000, 1], ids=["at once", "by sample", "by query", "few queries"])
def test_bf16_attention_in_parts(scores: int, kind: str, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fits into the cache: the output and the gradients are those of float64 to bf16's precision."""
    monkeypatch.setattr("litgpt.fused.SCORES", scores // torch.get_num_threads())
    monkeypatch.setattr("litgpt.fused.KEYS", 4)
    B, H, G, K, h = 3, 4, 2, T if kind == "no mask" else 45, 8
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, heads, n, h, generator=generator).bfloat16() for heads, n in ((H, T), (G, K), (G, K)))
    places = torch.arange(K - T, K)[:, None] - torch.arange(K)
    mask = (places >= 0) & (places < (9 if kind == "window" else K))
    if kind == "rows":  # the first keys are another number for each sample
        mask = (mask & (torch.arange(K) >= torch.tensor([0, 3, 5])[:, None, None]))[:, None]
    weight, found = torch.randn(B, T, H, h, generator=generator), []
    for dtype in (torch.float64, torch.bfloat16):
        inputs = [each.to(dtype).requires_grad_() for each in (q, k, v)]
        if dtype == torch.bfloat16:
            y = attention(*inputs, None if kind == "no mask" else mask, 0.3)
        else:
            y = plain_attention(*inputs, mask, 0.3).transpose(1, 2)
        (y * weight).sum().backward()
        found.append([y.detach(), *(each.grad for each in inputs)])
    for want, got in zip(*found, strict=True):
        assert got.dtype == torch.bfloat16 and got.shape == want.shape
        assert (got - want).norm() < 0.01 * want.norm()


@pytest.mark.parametrize("few", [FEW, 0])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_bf16_gradients_are_those_of_fp32(precision: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To bf16's precision, with and without autocast, with torch's attention and with this package's."""
    monkeypatch.setattr("litgpt.attention.FEW", few)
    reference = tiny.move_adapters(tiny.tiny(lora_r=4, lora_query=True, lora_value=True))
    model = copy.deepcopy(reference) if precision == "bf16-mixed" else copy.deepcopy(reference).bfloat16()
    idx = tiny.ids(2, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        logits = model(idx)
    logits.float().square().mean().backward()
    reference(idx).square().mean().backward()
    for (name, got), want in zip(model.named_parameters(), reference.parameters(), strict=True):
        if lora_filter(name):
            assert (got.grad.float() - want.grad).norm() < 0.05 * want.grad.norm(), name
