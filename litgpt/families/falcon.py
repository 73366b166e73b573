"""Falcon: LayerNorm, parallel residual, no biases, few key/value heads; Falcon-RW: biases, ALiBi. (Falcon 3 is Llama's decoder.)"""

from __future__ import annotations

from typing import Any

from litgpt.families._architecture import Architecture, Aspect, Fields, Hf, Key, Variant, activation, table
from litgpt.families._family import Family
from litgpt.families._gguf import Gguf
from litgpt.families._pretokenizers import Cut
from litgpt.families._rope import rope
from litgpt.families._rows import expand
from litgpt.families._styles import plain

_FALCON = {"block_size": 2048, "vocab_size": 65024, "padded_vocab_size": 65024, "rotary_percentage": 1.0, "bias": False}
_RW = {"bias": True, "parallel_residual": False, "alibi": True, "alibi_scaled": True, "vocab_size": 50304, "padded_vocab_size": 50304}
_NEW = {"n_query_groups": 8}

MODELS = expand(
    "tiiuae",
    _FALCON,
    {
        "falcon-7b falcon-7b-instruct": {"n_layer": 32, "n_head": 71, "n_embd": 4544, "n_query_groups": 1, "shared_attention_norm": True},
        "falcon-40b falcon-40b-instruct": {"n_layer": 60, "n_head": 128, "n_embd": 8192, **_NEW},
        "falcon-180B falcon-180B-chat": {"n_layer": 80, "n_head": 232, "n_embd": 14848, **_NEW},
        "falcon-rw-1b": {**_RW, "n_layer": 24, "n_head": 32, "n_embd": 2048},
        "falcon-11B": {"n_layer": 60, "n_head": 32, **_NEW, "shared_attention_norm": True, "block_size": 8192, "rope_base": 500042},
    },
)


def _read_layout(hf: Hf) -> Fields:
    """Read norms and heads. The first layout shares one norm and has 1 key/value head (multi_query) or all; the new one groups heads."""
    new, parallel = hf.get("new_decoder_architecture", False), hf.get("parallel_attn", True)
    if new and not parallel:
        raise ValueError("new_decoder_architecture with parallel_attn False is not supported")
    n_head = hf["num_attention_heads"]
    groups = hf.get("num_kv_heads") or n_head if new else 1 if hf.get("multi_query", True) else n_head
    norms = (hf.get("num_ln_in_parallel_attn") or 2) if new else 1
    return {"n_query_groups": groups, "parallel_residual": parallel, "shared_attention_norm": parallel and norms == 1}


def _write_layout(fields: Fields) -> dict[str, Any]:
    groups, shared, parallel = fields["n_query_groups"], fields["shared_attention_norm"], fields["parallel_residual"]
    new = parallel and not (shared and groups in (1, fields["n_head"]))
    return {
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (1 if shared else 2) if new else None,
        "parallel_attn": parallel,
        "multi_query": groups == 1,
        "num_kv_heads": groups,
    }


def _read_positions(hf: Hf) -> Fields:
    return {**_ROPE.read(hf), "alibi": hf.get("alibi", False), "alibi_scaled": hf.get("alibi", False)}


def _write_positions(fields: Fields) -> dict[str, Any]:
    return {**_ROPE.write(fields), "alibi": fields["alibi"]}


_ROPE = rope()
_KEYS = {
    "max_position_embeddings": Key("block_size", 2048),
    "vocab_size": Key("padded_vocab_size"),
    "num_hidden_layers": Key("n_layer"),
    "num_attention_heads": Key("n_head"),
    "hidden_size": Key("n_embd"),
    "ffn_hidden_size": Key("intermediate_size", None),
    "layer_norm_epsilon": Key("norm_eps", 1e-5),
    "bias": Key("bias", False),
}

_NORMS = {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2"}
_TWO_NORMS = {"ln_attn": "norm_1", "ln_mlp": "norm_2"}
_LAYERS = {
    "self_attention.query_key_value": "attn.qkv qkv grouped",
    "self_attention.dense": "attn.proj",
    "mlp.dense_h_to_4h": "mlp.fc",
    "mlp.dense_4h_to_h": "mlp.proj",
}
_ENDS = {"transformer.word_embeddings": "transformer.wte", "transformer.ln_f": "transformer.ln_f", "lm_head": "lm_head"}

STYLES = {
    "Falcon": plain("falcon", text="User: {prompt}\n\nAssistant:", gap=" "),
}

FAMILY = Family(
    MODELS,
    hf={
        "falcon": Architecture(
            "FalconForCausalLM",
            table("transformer.h.{}", {**_NORMS, **_LAYERS}, _ENDS),
            _KEYS,
            aspects=(Aspect(_read_layout, _write_layout), activation("activation", "gelu"), Aspect(_read_positions, _write_positions)),
            tied=True,
            variant=Variant(
                {"parallel_residual": True, "shared_attention_norm": False}, table("transformer.h.{}", {**_TWO_NORMS, **_LAYERS}, _ENDS)
            ),
            spellings=((r"\.ln_attn\.", ".input_layernorm."), (r"\.ln_mlp\.", ".post_attention_layernorm.")),
        )
    },
    gguf={
        "falcon": Gguf(
            {},
            joined=True,
            variant=Variant({"shared_attention_norm": False}, {"attn_norm": "norm_2", "attn_norm_2": "norm_1", "ffn_norm": None}),
        )
    },
    prompts={"falcon-.*instruct": "falcon"},
    styles=STYLES,
    pretokenizers={"falcon": Cut(("punctuation", "gpt-2", "digit runs", "[0-9][0-9][0-9]"))},
)
