"""MPT: ALiBi, no biases anywhere, clipped queries, keys and values in some models."""

from __future__ import annotations

from typing import Any

from litgpt.families._architecture import FOUR_TIMES, Architecture, Aspect, Fields, Hf, Key, table
from litgpt.families._family import Family
from litgpt.families._rope import whole
from litgpt.families._rows import expand

_MPT = {"parallel_residual": False, "rotary_percentage": 0.0, "bias": False, "norm_bias": False, "alibi": True}
_7B = {"n_layer": 32, "n_head": 32, "n_embd": 4096}
_30B = {"n_layer": 48, "n_head": 64, "n_embd": 7168, "block_size": 8192}

MODELS = expand(
    "mosaicml",
    {**_MPT, "block_size": 2048, "vocab_size": 50432, "padded_vocab_size": 50432},
    {
        "mpt-7b mpt-7b-instruct mpt-7b-chat": _7B,
        "mpt-30b mpt-30b-instruct mpt-30b-chat": _30B,
    },
)

# transformers computes with an alibi_bias_max of 8 whatever a file says: MPT StoryWriter, with 16, would be another model there
_ATTENTION = {"attn_type": "multihead_attention", "prefix_lm": False, "qk_ln": False, "alibi": True, "alibi_bias_max": 8}


def _read_attention(hf: Hf) -> Fields:
    attention = hf.get("attn_config") or {}
    if wrong := [f"{key} {attention[key]!r}" for key, value in _ATTENTION.items() if attention.get(key, value) != value]:
        raise ValueError(f"attn_config with {', '.join(wrong)} is not supported")
    scale = attention.get("softmax_scale")
    return {
        "clip_qkv": attention.get("clip_qkv"),
        "attention_scores_scalar": None if scale is None else whole(float(scale) ** -2),
    }


def _write_attention(fields: Fields) -> dict[str, Any]:
    scalar, clip = fields["attention_scores_scalar"], fields["clip_qkv"]
    settings = {"clip_qkv": None if clip is None else float(clip), "softmax_scale": None if scalar is None else float(scalar) ** -0.5}
    return {"attn_config": {**_ATTENTION, **settings}}


_KEYS = {
    "max_seq_len": Key("block_size", 2048),
    "vocab_size": Key("padded_vocab_size", 50368),
    "n_layers num_hidden_layers": Key("n_layer", 24),
    "n_heads num_attention_heads": Key("n_head", 16),
    "d_model hidden_size": Key("n_embd", 2048),
    "layer_norm_epsilon": Key("norm_eps", 1e-5),
}

_NAMES = table(
    "transformer.blocks.{}",
    {
        "norm_1": "norm_1",
        "attn.Wqkv": "attn.qkv",
        "attn.out_proj": "attn.proj",
        "norm_2": "norm_2",
        "ffn.up_proj": "mlp.fc",
        "ffn.down_proj": "mlp.proj",
    },
    {"transformer.wte": "transformer.wte", "transformer.norm_f": "transformer.ln_f", "lm_head": "lm_head"},
)

FAMILY = Family(
    MODELS,
    hf={
        "mpt": Architecture(
            "MptForCausalLM",
            _NAMES,
            _KEYS,
            {**_MPT, "gelu_approximate": "none"},
            {"no_bias": (True,), "logit_scale": (None,), "expansion_ratio": (4,)},
            (Aspect(_read_attention, _write_attention), FOUR_TIMES),
            tied=True,
        )
    },
    prompts={"mpt-.*chat": "chatml", "mpt-.*instruct": "alpaca"},
)
