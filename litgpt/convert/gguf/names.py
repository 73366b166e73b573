"""The architectures of GGUF files as data: what every model of one has, which keys say the rest, which tensor is which LitGPT tensor.

Adding a family = adding a row to ARCHITECTURES. Tensor names are one vocabulary for all of them; the few differences:

    q, k, v           one tensor each, or joined as `attn_qkv` (all q heads, all k heads, all v heads: LitGPT's own order)
    `paired` rows     of q and k, for rotation by neighbours: row j of a head's first half lies next to row j of its second
    `unit_offset`     norms are stored as 1 + weight (Gemma)
    `ffn_*_exps`      the experts of a block, one behind the other: here "ffn_up_exps.3" is expert 3's part
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, NamedTuple

from litgpt.config import Config
from litgpt.convert.names import Table

LLAMA = {
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
    "parallel_residual": False,
    "rotary_percentage": 1.0,
    "lm_head_bias": False,
}
NO_BIAS = {"bias": False, "attn_bias": False}
GEMMA = {**LLAMA, **NO_BIAS, "mlp_class_name": "GemmaMLP", "gelu_approximate": "tanh", "scale_embeddings": True}
GEMMA_2 = {**GEMMA, "post_attention_norm": True, "post_mlp_norm": True}
OLMO_2 = {"norm_1": False, "norm_2": False, "post_attention_norm": True, "post_mlp_norm": True, "norm_qk": True, "norm_qk_type": "olmo2"}
GPT = {"norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "lm_head_bias": False}
WINDOW = ("attention.sliding_window",)
EXPERTS = ("expert_count", "expert_used_count", "expert_feed_forward_length")
SCALARS = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


class Architecture(NamedTuple):
    """One value of `general.architecture`."""

    fields: Mapping[str, Any]
    """of Config, in every model of it"""
    keys: tuple[str, ...] = ()
    """that say more than those which all architectures share"""
    hub: tuple[str, ...] = ()
    """`model_type` on the Hugging Face hub, where it is not the architecture's name"""
    paired: bool = False
    joined: bool = False
    """written with `attn_qkv`; both forms are read"""
    window_period: int = 0
    """a window, and the local rotary base, in all blocks but every n-th; 0: in all blocks"""
    rest_period: int = 0
    """every n-th block does not rotate"""
    square_heads: int = -1
    """a model of this many blocks divides scores by sqrt(n_embd / n_head) instead of sqrt(head_size)"""


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(LLAMA, (*WINDOW, *EXPERTS[:2]), hub=("llama", "mistral", "mixtral"), paired=True),
    "qwen2": Architecture({**LLAMA, **NO_BIAS, "attn_bias": True}),
    "qwen3": Architecture({**LLAMA, **NO_BIAS, "norm_qk": True}),
    "qwen3moe": Architecture({**LLAMA, **NO_BIAS, "norm_qk": True}, EXPERTS, hub=("qwen3_moe",)),
    "gemma": Architecture(GEMMA),
    "gemma2": Architecture(GEMMA_2, (*WINDOW, *SOFT_CAPS), window_period=2, square_heads=46),
    "gemma3": Architecture(
        {**GEMMA_2, "norm_qk": True}, (*WINDOW, "rope.freq_base_swa"), hub=("gemma3_text", "gemma3"), window_period=6, square_heads=62
    ),
    "phi2": Architecture(
        {**GPT, "bias": True, "gelu_approximate": "tanh", "shared_attention_norm": True, "lm_head_bias": True}, hub=("phi",)
    ),
    "phi3": Architecture({**LLAMA, **NO_BIAS}, WINDOW, joined=True),
    "gpt2": Architecture(
        {**GPT, "bias": True, "gelu_approximate": "tanh", "parallel_residual": False, "learned_positions": True, "rotary_percentage": 0.0},
        joined=True,
    ),
    "gptneox": Architecture({**GPT, "bias": True}, ("use_parallel_residual",), hub=("gpt_neox",), joined=True),
    "falcon": Architecture({**GPT, **NO_BIAS}, joined=True),
    "stablelm": Architecture({**GPT, "bias": False, "mlp_class_name": "LLaMAMLP"}, ("use_parallel_residual",)),
    "olmo": Architecture({**LLAMA, **NO_BIAS, "norm_class_name": "LayerNorm", "norm_affine": False}, paired=True),
    "olmo2": Architecture({**LLAMA, **NO_BIAS, **OLMO_2}),
    "granite": Architecture(LLAMA, SCALARS, paired=True),
    "smollm3": Architecture({**LLAMA, **NO_BIAS}, paired=True, rest_period=4),
}
"""By `general.architecture`."""

MODEL = {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f", "output": "lm_head"}
BLOCK = {
    "attn_norm": "norm_1",
    "attn_q_norm": "attn.norm_q",
    "attn_k_norm": "attn.norm_k",
    "attn_output": "attn.proj",
    "post_attention_norm": "post_attention_norm",
    "ffn_norm": "norm_2",
    "post_ffw_norm": "post_mlp_norm",
}
MLPS = {
    "GptNeoxMLP": {"ffn_up": "fc", "ffn_down": "proj"},
    "LLaMAMLP": {"ffn_gate": "fc_1", "ffn_up": "fc_2", "ffn_down": "proj"},
    "LLaMAMoE": {"ffn_gate_inp": "gate"},
}
MLPS["GemmaMLP"] = MLPS["LLaMAMLP"]
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that belong to the rotary settings."""


def table(architecture: str, config: Config, joined: bool) -> Table:
    """GGUF's modules and LitGPT's, for `litgpt.convert.names`; `joined`: q, k and v are one tensor."""
    block = {name: (module, "all") for name, module in BLOCK.items()}
    if architecture == "falcon" and not config.shared_attention_norm:
        del block["ffn_norm"]
        block |= {"attn_norm": ("norm_2", "all"), "attn_norm_2": ("norm_1", "all")}
    if joined:
        block["attn_qkv"] = ("attn.qkv", "all")
    else:
        block |= {f"attn_{part}": ("attn.qkv", part) for part in ("q", "k", "v")}
    block |= {name: (f"mlp.{layer}", "all") for name, layer in MLPS[config.mlp_class_name].items()}
    if architecture == "phi3" and "ffn_gate" in block:
        del block["ffn_gate"]
        block["ffn_up"] = ("mlp.fc_1", "gate up")
    if config.mlp_class_name == "LLaMAMoE":
        block |= {f"{name}_exps.{{}}": (f"mlp.experts.{{}}.{layer}", "all") for name, layer in MLPS["LLaMAMLP"].items()}
    whole: Table = {name: (module, "all") for name, module in MODEL.items()}
    return whole | {f"blk.{{}}.{name}": (f"transformer.h.{{}}.{module}", part) for name, (module, part) in block.items()}


def has_offset(config: Config, module: str) -> bool:
    """Whether 1 is added to what is stored."""
    return config.unit_offset and module.endswith("_norm")


def is_paired(architecture: str, module: str) -> bool:
    """Whether rows of neighbouring pairs are stored together."""
    return ARCHITECTURES[architecture].paired and module.endswith((".attn_q", ".attn_k"))


def is_joined(names: Container[str]) -> bool:
    """Whether a file with the tensors `names` has q, k and v in one."""
    return "blk.0.attn_qkv.weight" in names
