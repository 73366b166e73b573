"""A tiny random model of every family, in transformers and with the same weights here.

A new family is a new entry of FAMILIES. 3 or 4 blocks, d 32, 4 heads, V 101; windows (8 tokens) and the contexts that rotary scaling
counts from (16 tokens) are shorter than the sequences of the tests.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from litgpt import config as base_config, lora, model
from litgpt.convert.hf import open_weights
from tests.helpers import tiny

transformers.utils.logging.disable_progress_bar()

WINDOW = 8
ORIGINAL = 16
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
MULTI_HEAD = {"num_key_value_heads": 4}
MOE = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.2}
GEMMA = {"head_dim": 10, "tie_word_embeddings": True}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def rope(kind: str, theta: float = 100.0, **scaling: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}


LLAMA_3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=ORIGINAL)
NEAR = {"rope_type": "default", "rope_theta": 50.0}
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL, beta_fast=1.5, beta_slow=0.2)
LONG = rope(
    "longrope", short_factor=[1.0, 1.1, 1.3, 1.6], long_factor=[1.0, 2.0, 3.5, 6.0], original_max_position_embeddings=ORIGINAL, factor=4.0
)

LATENT = {"kv_lora_rank": 12, "qk_rope_head_dim": 6, "qk_nope_head_dim": 8, "v_head_dim": 10, "moe_intermediate_size": 24, **MULTI_HEAD}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama multi-head": ("Llama", MULTI_HEAD),
    "llama multi-query tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama wide heads": ("Llama", {"head_dim": 12}),
    "llama 3.1": ("Llama", LLAMA_3),
    "llama linear": ("Llama", rope("linear", factor=4.0)),
    "llama yarn": ("Llama", YARN),
    "llama yarn not truncated": ("Llama", rope(**{**YARN["rope_parameters"], "truncate": False, "kind": "yarn"})),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mistral global": ("Mistral", {"sliding_window": None, "head_dim": 6}),
    "mixtral": ("Mixtral", {**MOE, "num_local_experts": 4}),
    "mixtral window": ("Mixtral", {**MOE, "num_local_experts": 5, "sliding_window": WINDOW}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt_neox sequential": ("GPTNeoX", {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "gpt_oss": (
        "GptOss",
        {
            **MOE,
            "num_local_experts": 4,
            "head_dim": 6,
            "sliding_window": WINDOW,
            "layer_types": [LOCAL, GLOBAL, LOCAL],
            "swiglu_limit": 0.6,
            "swiglu_alpha": 1.3,
            "rope_parameters": {**YARN["rope_parameters"], "truncate": False},
        },
    ),
    "cwm": ("Cwm", {"head_dim": 8, "sliding_window": WINDOW, "layer_types": [GLOBAL, LOCAL, LOCAL], **LLAMA_3}),
    "glm": ("Glm", {"head_dim": 8, "attention_bias": True, "rope_parameters": {**NEAR, "partial_rotary_factor": 0.5}}),
    "glm4": ("Glm4", {"head_dim": 12, "rope_parameters": {**NEAR, "partial_rotary_factor": 0.5}}),
    "glm4_moe": (
        "Glm4Moe",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_qk_norm": True,
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "routed_scaling_factor": 1.5,
            "rope_parameters": {**NEAR, "partial_rotary_factor": 0.5},
        },
    ),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        {**LATENT, "q_lora_rank": 16, "n_routed_experts": 5, "num_experts_per_tok": 2},
    ),
    "cohere": ("Cohere", {"logit_scale": 0.3, "tie_word_embeddings": True}),
    "cohere2": (
        "Cohere2",
        {"logit_scale": 0.3, "tie_word_embeddings": True, "sliding_window": WINDOW, "layer_types": [LOCAL, LOCAL, GLOBAL]},
    ),
    "ernie4_5": ("Ernie4_5", {"head_dim": 12, "use_bias": True}),
    "helium": ("Helium", {"head_dim": 8, "num_key_value_heads": 2}),
    "olmoe": ("Olmoe", {**MOE, "num_experts": 5}),
    "flex_olmo": ("FlexOlmo", {**MOE, "num_experts": 4, "norm_topk_prob": True}),
    "falcon alibi": (
        "Falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "num_attention_heads": 4, "tie_word_embeddings": True},
    ),
    "falcon": ("Falcon", {"tie_word_embeddings": True}),
    "falcon new decoder": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": True}),
    "stablelm": ("StableLm", {"use_qkv_bias": False}),
    "stablelm biased": ("StableLm", {"use_qkv_bias": True, **MULTI_HEAD}),
    "stablelm parallel": ("StableLm", {"use_parallel_residual": True}),
    "phi": ("Phi", MULTI_HEAD),
    "phi3": ("Phi3", {"sliding_window": WINDOW}),
    "phi3 longrope": ("Phi3", {**LONG, "original_max_position_embeddings": ORIGINAL}),
    "phi4 mini": ("Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.75}}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": (
        "Gemma2",
        {
            **GEMMA,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
            "layer_types": [LOCAL, GLOBAL, LOCAL],
        },
    ),
    "gemma3": ("Gemma3Text", {**GEMMA, "sliding_window": WINDOW, "query_pre_attn_scalar": 20, "layer_types": [LOCAL, LOCAL, GLOBAL]}),
    "gemma3 linear": (
        "Gemma3Text",
        {
            **GEMMA,
            "sliding_window": WINDOW,
            "layer_types": [LOCAL, GLOBAL, LOCAL],
            "rope_parameters": {
                LOCAL: {"rope_type": "default", "rope_theta": 100.0},
                GLOBAL: {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
            },
        },
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2 window": ("Qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**MOE, "num_experts": 5, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 48},
    ),
    "qwen2_moe dense first": (
        "Qwen2Moe",
        {
            **MOE,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "mlp_only_layers": [0],
            "qkv_bias": False,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**MOE, "num_experts": 5, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 8, "decoder_sparse_step": 1},
    ),
    "qwen3_moe not normalised": (
        "Qwen3Moe",
        {**MOE, "num_experts": 4, "moe_intermediate_size": 24, "norm_topk_prob": False, "head_dim": 8},
    ),
    "olmo": ("Olmo", {}),
    "olmo clipped": ("Olmo", {"clip_qkv": 0.7}),
    "olmo2": ("Olmo2", {}),
    "mpt": ("Mpt", {"hidden_size": 36, "num_attention_heads": 6, "tie_word_embeddings": True, "attn_config": {"clip_qkv": 0.7}}),
    "mpt scaled": ("Mpt", {"tie_word_embeddings": True, "attn_config": {"softmax_scale": 0.2}}),
    "bloom": ("Bloom", {"tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 0, 1], "tie_word_embeddings": True}),
    "granite": (
        "Granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.5, "attention_multiplier": 0.2},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_routed_experts": 5,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": {**YARN["rope_parameters"], "mscale": 0.7, "mscale_all_dim": 0.9},
        },
    ),
    "deepseek_v2 groups": (
        "DeepseekV2",
        {
            **LATENT,
            "q_lora_rank": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **LATENT,
            "q_lora_rank": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": {**YARN["rope_parameters"], "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "deepseek_v3 one group": (
        "DeepseekV3",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rope_interleave": False,
            "first_k_dense_replace": 0,
            "n_shared_experts": 2,
        },
    ),
    "gpt2": ("GPT2", {"tie_word_embeddings": True}),
    "starcoder2": ("Starcoder2", {"sliding_window": WINDOW, "tie_word_embeddings": True}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": WINDOW,
            "layer_types": [LOCAL, GLOBAL, LOCAL],
            "rope_parameters": {GLOBAL: YARN["rope_parameters"], LOCAL: NEAR},
        },
    ),
    "ministral": ("Ministral", {"head_dim": 8, "sliding_window": WINDOW, "layer_types": [LOCAL, GLOBAL, LOCAL]}),
    "seed_oss": ("SeedOss", {"head_dim": 12}),
    "exaone4": ("Exaone4", {"sliding_window": WINDOW, "layer_types": [LOCAL, LOCAL, GLOBAL], "num_key_value_heads": 2}),
    "exaone4 global": ("Exaone4", {"sliding_window": None, "layer_types": [GLOBAL] * 3}),
    "vaultgemma": (
        "VaultGemma",
        {
            "head_dim": 8,
            "tie_word_embeddings": True,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
            "layer_types": [LOCAL, GLOBAL, LOCAL],
        },
    ),
}
# Each way in which a family differs is in one of these; the others run among the slow tests where a test is not about the families.
QUICK = (
    "llama 3.1",
    "mistral",
    "mixtral",
    "gpt_neox",
    "falcon",
    "stablelm parallel",
    "phi3 longrope",
    "gemma2",
    "gemma3",
    "qwen2_moe",
    "gpt_oss",
    "falcon alibi",
    "glm4",
    "cohere2",
    "qwen3",
    "olmo2",
    "deepseek_v2",
    "deepseek_v3",
    "gpt2",
    "mpt",
    "bloom",
)
# The most different ones of these: for tests that go through what all families share.
DISTINCT = ("llama 3.1", "mixtral", "gpt_neox", "phi3 longrope", "gemma2", "deepseek_v2", "gpt2")
QUICK_FIRST = [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]


def hf_config(family: str, **changes: Any) -> Any:
    kind, settings = FAMILIES[family]
    return getattr(transformers, f"{kind}Config")(**{**SIZES, **settings, **changes})


def hf_model(family: str, **changes: Any) -> Any:
    """Return a transformers model with random weights, norms and biases included, in eval mode. `changes` apply to its config."""
    # transformers' own attention adds Falcon's ALiBi twice
    how = "sdpa" if family == "falcon alibi" else "eager"
    hf = transformers.AutoModelForCausalLM.from_config(hf_config(family, **changes), attn_implementation=how)
    for name, buffer in hf.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.2, 0.2, len(buffer)))
    return tiny.randomise(hf)


def converted(hf: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the Config fields and LitGPT state dict of a transformers model, read from the files that it writes."""
    settings = hf.config.to_dict()
    config = base_config.Config.from_hf(settings)
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        tensors = open_weights(Path(folder))
        weights = tiny.assemble(tensors, settings["model_type"], config, settings["tie_word_embeddings"])
        return config.base_dict(), {name: weight.clone() for name, weight in weights.items()}


@functools.cache
def pair(family: str) -> tuple[Any, dict[str, Any], dict[str, torch.Tensor]]:
    """Return a family's transformers model, and its config fields and state dict here. All tests share them: do not change them."""
    with torch.inference_mode(False):  # a test in inference mode may ask first
        hf = hf_model(family)
        return hf, *converted(hf)


def ours(family: str, **adapter: Any) -> Any:
    """Return the family's model here, in eval mode; with adapter settings a `litgpt.lora.GPT`, whose B are zero."""
    _, fields, weights = pair(family)
    torch.manual_seed(0)
    built: Any = lora.GPT(lora.Config(**fields, **adapter)) if adapter else model.GPT(base_config.Config(**fields))
    missing, unknown = built.load_state_dict({name: weight.clone() for name, weight in weights.items()}, strict=False)
    assert not unknown and all(lora.lora_filter(name) for name in missing), (missing, unknown)
    return built.eval()
