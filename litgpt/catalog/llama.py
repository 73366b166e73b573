"""Llama 2, 3, 3.1, 3.2, 3.3, TinyLlama, SmolLM2: RMSNorm, SwiGLU, full rotary, no biases."""

from __future__ import annotations

from typing import Any

from litgpt.catalog._rows import expand, require, rope_fields

DECODER: dict[str, Any] = {
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
}
_LLAMA_2 = {**DECODER, "vocab_size": 32000, "padding_multiple": 64}
_LLAMA_3 = {**DECODER, "block_size": 8192, "vocab_size": 128000, "padded_vocab_size": 128256, "n_query_groups": 8, "rope_base": 500000}


def _llama_3_1(factor: float) -> dict[str, Any]:
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
    return {**_LLAMA_3, "block_size": 131072, "rope_adjustments": scaling}


_8B = {"n_layer": 32, "n_head": 32, "n_embd": 4096, "intermediate_size": 14336}
_70B = {"n_layer": 80, "n_head": 64, "n_embd": 8192, "intermediate_size": 28672}

MODELS = [
    *expand(
        "meta-llama",
        _LLAMA_2,
        {
            "Llama-2-7b-hf Llama-2-7b-chat-hf": {"n_layer": 32, "intermediate_size": 11008},
            "Llama-2-13b-hf Llama-2-13b-chat-hf": {"n_layer": 40, "n_head": 40, "n_embd": 5120, "intermediate_size": 13824},
            "Llama-2-70b-hf Llama-2-70b-chat-hf": {**_70B, "n_query_groups": 8},
        },
    ),
    *expand(
        "meta-llama",
        _LLAMA_3,
        {
            "Llama-3-8B=Meta-Llama-3-8B Llama-3-8B-Instruct=Meta-Llama-3-8B-Instruct": _8B,
            "Llama-3-70B=Meta-Llama-3-70B Llama-3-70B-Instruct=Meta-Llama-3-70B-Instruct": _70B,
        },
    ),
    *expand(
        "meta-llama",
        _llama_3_1(8.0),
        {
            "Llama-3.1-8B=Meta-Llama-3.1-8B Llama-3.1-8B-Instruct=Meta-Llama-3.1-8B-Instruct": _8B,
            "Llama-3.1-70B=Meta-Llama-3.1-70B Llama-3.1-70B-Instruct=Meta-Llama-3.1-70B-Instruct Llama-3.3-70B-Instruct": _70B,
            "Llama-3.1-405B=Meta-Llama-3.1-405B Llama-3.1-405B-Instruct=Meta-Llama-3.1-405B-Instruct": {
                "n_layer": 126,
                "n_head": 128,
                "n_embd": 16384,
                "intermediate_size": 53248,
            },
        },
    ),
    *expand(
        "meta-llama",
        _llama_3_1(32.0),
        {
            "Llama-3.2-1B Llama-3.2-1B-Instruct": {"n_layer": 16, "n_head": 32, "n_embd": 2048, "intermediate_size": 8192},
            "Llama-3.2-3B Llama-3.2-3B-Instruct": {"n_layer": 28, "n_head": 24, "n_embd": 3072, "intermediate_size": 8192},
        },
    ),
    *expand(
        "TinyLlama",
        {**_LLAMA_2, "block_size": 2048, "n_layer": 22, "n_head": 32, "n_embd": 2048, "intermediate_size": 5632, "n_query_groups": 4},
        {"tiny-llama-1.1b=TinyLlama-1.1B-intermediate-step-1431k-3T tiny-llama-1.1b-chat=TinyLlama-1.1B-Chat-v1.0": {}},
    ),
    *expand(
        "HuggingFaceTB",
        {**DECODER, "block_size": 8192, "vocab_size": 49152, "padded_vocab_size": 49152, "rope_base": 100000},
        {
            "SmolLM2-135M SmolLM2-135M-Instruct": {
                "n_layer": 30,
                "n_head": 9,
                "n_embd": 576,
                "n_query_groups": 3,
                "intermediate_size": 1536,
            },
            "SmolLM2-360M SmolLM2-360M-Instruct": {
                "n_layer": 32,
                "n_head": 15,
                "n_embd": 960,
                "n_query_groups": 5,
                "intermediate_size": 2560,
            },
            "SmolLM2-1.7B SmolLM2-1.7B-Instruct": {
                "n_layer": 24,
                "n_head": 32,
                "n_embd": 2048,
                "n_query_groups": 32,
                "intermediate_size": 8192,
                "rope_base": 130000,
            },
        },
    ),
]


def decoder_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """Fields that every llama-shaped Hugging Face config gives the same way."""
    require(hf, "hidden_act", ("silu", "swish"), "silu")
    require(hf, "mlp_bias", (False,), False)
    return {
        **DECODER,
        "block_size": hf["max_position_embeddings"],
        "vocab_size": hf["vocab_size"],
        "padded_vocab_size": hf["vocab_size"],
        "n_layer": hf["num_hidden_layers"],
        "n_head": hf["num_attention_heads"],
        "n_embd": hf["hidden_size"],
        "n_query_groups": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "head_size": hf.get("head_dim"),
        "intermediate_size": hf["intermediate_size"],
        "norm_eps": hf["rms_norm_eps"],
        **rope_fields(hf),
    }


def _from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    require(hf, "attention_bias", (False,), False)
    return decoder_from_hf(hf)


ARCHITECTURES = {"llama": _from_hf}
