"""InternLM3: Llama's decoder with heads of a width of their own."""

from __future__ import annotations

from litgpt.families._architecture import BIASES, Architecture, Key, sizes
from litgpt.families._family import Family
from litgpt.families._rope import rope
from litgpt.families.llama import DECODER, NAMES, SILU

FAMILY = Family(
    [],
    hf={
        "internlm3": Architecture(
            "LlamaForCausalLM",
            NAMES,
            sizes(rms_norm_eps=Key("norm_eps", 1e-5), head_dim=Key("head_size", 128)),
            DECODER,
            SILU,
            (BIASES, rope()),
        )
    },
)
