"""Seed-OSS: Llama's decoder with biases on q, k and v, and heads of a width of their own."""

from __future__ import annotations

from litgpt.families._architecture import Architecture, Key, sizes
from litgpt.families._family import Family
from litgpt.families._rope import rope
from litgpt.families.llama import DECODER, NAMES, SILU

FAMILY = Family(
    [],
    hf={
        "seed_oss": Architecture(
            "SeedOssForCausalLM",
            NAMES,
            sizes(rms_norm_eps=Key("norm_eps", 1e-6), head_dim=Key("head_size", 128)),
            {**DECODER, "attn_bias": True},
            {**SILU, "attention_bias": (True,), "attention_out_bias": (False,), "mlp_bias": (False,)},
            (rope(),),
        )
    },
)
