"""GPT-NeoX: Pythia. LayerNorm, parallel residual, rotary on a quarter of each head, biases, untied head."""

from __future__ import annotations

from typing import Any

from litgpt.catalog._rows import expand, require, rope_fields

_PYTHIA = {"block_size": 2048, "padding_multiple": 128}
_SIZES: dict[str, dict[str, Any]] = {
    "14m": {"block_size": 512, "n_layer": 6, "n_embd": 128, "n_head": 4},
    "31m": {"block_size": 1024, "n_layer": 6, "n_embd": 256, "n_head": 8},
    "70m": {"n_layer": 6, "n_embd": 512, "n_head": 8},
    "160m": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "410m": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "1b": {"n_layer": 16, "n_embd": 2048, "n_head": 8},
    "1.4b": {"n_layer": 24, "n_embd": 2048, "n_head": 16},
    "2.8b": {"n_layer": 32, "n_embd": 2560, "n_head": 32},
    "6.9b": {"n_layer": 32, "padding_multiple": 256},
    "12b": {"padding_multiple": 512, "n_layer": 36, "n_embd": 5120, "n_head": 40},
}
_NOT_DEDUPED = ("14m", "31m")

MODELS = [
    *expand("EleutherAI", _PYTHIA, {f"pythia-{size}": row for size, row in _SIZES.items()}),
    *expand("EleutherAI", _PYTHIA, {f"pythia-{size}-deduped": row for size, row in _SIZES.items() if size not in _NOT_DEDUPED}),
]


def _from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    activation = require(hf, "hidden_act", ("gelu", "gelu_new", "gelu_pytorch_tanh"), "gelu")
    require(hf, "attention_bias", (True,), True)
    rotary = (hf.get("rope_parameters") or {}).get("partial_rotary_factor", hf.get("rotary_pct", 0.25))
    return {
        "block_size": hf["max_position_embeddings"],
        "vocab_size": hf["vocab_size"],
        "padded_vocab_size": hf["vocab_size"],
        "n_layer": hf["num_hidden_layers"],
        "n_head": hf["num_attention_heads"],
        "n_embd": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "norm_eps": hf["layer_norm_eps"],
        "rotary_percentage": rotary,
        "parallel_residual": hf.get("use_parallel_residual", True),
        "gelu_approximate": "none" if activation == "gelu" else "tanh",
        **rope_fields(hf),
    }


ARCHITECTURES = {"gpt_neox": _from_hf}
