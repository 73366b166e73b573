"""Falcon: LayerNorm, parallel residual, no biases, few key/value heads. (Falcon 3 is Llama's decoder.)"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from litgpt.families._architecture import Architecture, Aspect, Fields, Hf, Key, activation
from litgpt.families._rope import rope
from litgpt.families._rows import expand

if TYPE_CHECKING:
    from litgpt.config import Config

_FALCON = {"block_size": 2048, "vocab_size": 65024, "padded_vocab_size": 65024, "rotary_percentage": 1.0, "bias": False}
_NEW = {"n_query_groups": 8}

MODELS = expand(
    "tiiuae",
    _FALCON,
    {
        "falcon-7b falcon-7b-instruct": {"n_layer": 32, "n_head": 71, "n_embd": 4544, "n_query_groups": 1, "shared_attention_norm": True},
        "falcon-40b falcon-40b-instruct": {"n_layer": 60, "n_head": 128, "n_embd": 8192, **_NEW},
        "falcon-180B falcon-180B-chat": {"n_layer": 80, "n_head": 232, "n_embd": 14848, **_NEW},
        "falcon-11B": {"n_layer": 60, "n_head": 32, **_NEW, "shared_attention_norm": True, "block_size": 8192, "rope_base": 500042},
    },
)


def _read_layout(hf: Hf) -> Fields:
    """Which norms and heads: the first layout shares one norm and has 1 key/value head (multi_query) or all; the new one groups heads."""
    new, parallel = hf.get("new_decoder_architecture", False), hf.get("parallel_attn", True)
    if new and not parallel:
        raise ValueError("new_decoder_architecture with parallel_attn False is not supported")
    n_head = hf["num_attention_heads"]
    groups = hf.get("num_kv_heads") or n_head if new else 1 if hf.get("multi_query", True) else n_head
    norms = (hf.get("num_ln_in_parallel_attn") or 2) if new else 1
    return {"n_query_groups": groups, "parallel_residual": parallel, "shared_attention_norm": parallel and norms == 1}


def _write_layout(config: Config) -> dict[str, Any]:
    groups, shared, parallel = config.n_query_groups, config.shared_attention_norm, config.parallel_residual
    new = parallel and not (shared and groups in (1, config.n_head))
    return {
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (1 if shared else 2) if new else None,
        "parallel_attn": parallel,
        "multi_query": groups == 1,
        "num_kv_heads": groups,
    }


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

ARCHITECTURES = {
    "falcon": Architecture(
        "FalconForCausalLM",
        _KEYS,
        accepts={"alibi": (False,)},
        aspects=(Aspect(_read_layout, _write_layout), activation("activation", "gelu"), rope()),
    )
}
