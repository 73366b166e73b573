"""The vocabulary of GGUF files, and the row of an architecture in it.

Tensor names are the same for all architectures, but for a row's `variant` and

    q, k, v           one tensor each, or joined as `attn_qkv` (all q heads, all k heads, all v heads: LitGPT's own order)
    `paired` rows     of q and k, for rotation by neighbours: row j of a head's first half is next to row j of its second
    `unit_offset`     norms are stored as 1 + weight (Gemma)
    `ffn_*_exps`      the experts of a block in one tensor: here "ffn_up_exps.3" is the part of expert 3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from litgpt.families._architecture import Fields, Table, Variant, table

# Keys, after the architecture's name, and fields of Config.
INTEGERS = {
    "context_length": "block_size",
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "n_head",
    "attention.head_count_kv": "n_query_groups",
    "attention.key_length": "head_size",
    "attention.sliding_window": "sliding_window_size",
    "expert_count": "n_expert",
    "expert_used_count": "n_expert_per_token",
    "expert_feed_forward_length": "moe_intermediate_size",
}
REALS = {
    "rope.freq_base": "rope_base",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attention_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
NORM_EPS = {"RMSNorm": "attention.layer_norm_rms_epsilon", "LayerNorm": "attention.layer_norm_epsilon"}
REQUIRED = ("context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count")
SHARED = (*REQUIRED, "attention.head_count_kv", "attention.key_length", "rope.freq_base")  # by all architectures; others are a row's `keys`
WINDOW = ("attention.sliding_window",)
EXPERTS = ("expert_count", "expert_used_count", "expert_feed_forward_length")
NEUTRAL: dict[str, Any] = {  # keys with one supported value
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.causal": True,
    "expert_shared_count": 0,
    "expert_gating_func": 1,
    "expert_weights_scale": 1,
    "leading_dense_block_count": 0,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
}

ENDS = {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f", "output": "lm_head"}
BLOCK = {
    "attn_norm": "norm_1",
    "attn_q_norm": "attn.norm_q",
    "attn_k_norm": "attn.norm_k",
    "attn_output": "attn.proj",
    "post_attention_norm": "post_attention_norm",
    "ffn_norm": "norm_2",
    "post_ffw_norm": "post_mlp_norm",
}
GATED = {"ffn_gate": "mlp.fc_1", "ffn_up": "mlp.fc_2", "ffn_down": "mlp.proj"}
MLPS = {
    "GptNeoxMLP": {"ffn_up": "mlp.fc", "ffn_down": "mlp.proj"},
    "LLaMAMLP": GATED,
    "GemmaMLP": GATED,
    "LLaMAMoE": {
        "ffn_gate_inp": "mlp.gate",
        **{f"{name}_exps.{{}}": place.replace("mlp.", "mlp.experts.{}.") for name, place in GATED.items()},
    },
}


@dataclass(frozen=True)
class Gguf:
    """One `general.architecture`. Linear layers have no biases unless `fields` or `by_tensors` say so."""

    fields: Fields  # of every such model
    keys: tuple[str, ...] = ()  # besides SHARED
    by_tensors: tuple[str, ...] = ()  # fields that the presence of tensors decides, of bias and attn_bias
    hub: tuple[str, ...] = ()  # `model_type` of transformers, where it is not the architecture's name
    paired: bool = False
    joined: bool = False  # written with `attn_qkv`; both forms are read
    window_period: int = 0  # a window, and the local rotary base, in all blocks but every n-th; 0: in all blocks
    rest_period: int = 0  # every n-th block does not rotate
    square_heads: int = -1  # a model of this many blocks divides scores by sqrt(n_embd / n_head) instead of sqrt(head_size)
    variant: Variant[dict[str, str | None]] | None = None  # other names in a block; None for one that it lacks

    def names(self, fields: Fields, joined: bool) -> Table:
        """Return the table of tensor names for a model with these Config fields; `joined`: q, k and v are one tensor."""
        block: dict[str, str | None] = {**BLOCK, **MLPS[fields["mlp_class_name"]]}
        block |= {"attn_qkv": "attn.qkv"} if joined else {f"attn_{part}": f"attn.qkv {part}" for part in "qkv"}
        if self.variant and self.variant.applies(fields):
            block |= self.variant.names
        return table("blk.{}", {name: place for name, place in block.items() if place}, ENDS)

    def is_paired(self, module: str) -> bool:
        """Return True if the module's rows are stored as neighbouring pairs."""
        return self.paired and module.endswith((".attn_q", ".attn_k"))
