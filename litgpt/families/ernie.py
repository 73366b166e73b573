"""ERNIE 4.5 (dense) and Helium: Llama's decoder with rotation of neighbouring pairs."""

from __future__ import annotations

from litgpt.families._architecture import Architecture, Key, sizes, table
from litgpt.families._family import Family
from litgpt.families._rope import rope
from litgpt.families._rows import expand, size
from litgpt.families.llama import DECODER, ENDS, LAYERS, MLP, NORMS, PAIRED, SILU

_NAMES = table(LAYERS, {**NORMS, **PAIRED, **MLP}, ENDS)
_ERNIE = {**DECODER, "vocab_size": 103424, "padded_vocab_size": 103424, "block_size": 131072, "rope_base": 500000, "head_size": 128}

MODELS = expand("baidu", _ERNIE, {"ERNIE-4.5-0.3B-PT ERNIE-4.5-0.3B-Base-PT": size(18, 16, 1024, 3072, 2)})

FAMILY = Family(
    MODELS,
    hf={
        "ernie4_5": Architecture(
            "Ernie4_5ForCausalLM",
            _NAMES,
            sizes(head_dim=Key("head_size", 128), rms_norm_eps=Key("norm_eps", 1e-5), use_bias=Key("bias", False)),
            DECODER,
            SILU,
            (rope(500000.0),),
            tied=True,
        ),
        "helium": Architecture(
            "HeliumForCausalLM",
            _NAMES,
            sizes(head_dim=Key("head_size", 128), rms_norm_eps=Key("norm_eps", 1e-8)),
            DECODER,
            {**SILU, "attention_bias": (False,), "mlp_bias": (False,)},
            (rope(100000.0),),
        ),
    },
)
