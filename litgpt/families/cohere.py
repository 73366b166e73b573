"""Cohere's Command and Aya: LayerNorm without bias, parallel residual, neighbouring pairs are rotated; Cohere 2 has windows, and blocks
without a window do not rotate.
"""

from __future__ import annotations

from typing import Any

from litgpt.families._architecture import Architecture, Aspect, Fields, Hf, Key, sizes, table, without
from litgpt.families._family import Family
from litgpt.families._rope import rope, whole
from litgpt.families.exaone import LOCAL_ROTATION
from litgpt.families.llama import DECODER, ENDS, LAYERS, MLP, PAIRED, SILU

_COHERE = {
    **DECODER,
    "norm_class_name": "LayerNorm",
    "norm_bias": False,
    "parallel_residual": True,
    "shared_attention_norm": True,
}


def _read_scale(hf: Hf) -> Fields:
    scale = hf.get("logit_scale", 0.0625)
    return {"logits_scaling": whole(1 / float(scale)) if scale else 1.0}


_SCALE = Aspect(_read_scale, lambda fields: {"logit_scale": 1 / float(fields["logits_scaling"])})
_SIZES: dict[str, Any] = sizes(max_position_embeddings=Key("block_size", 8192), layer_norm_eps=Key("norm_eps", 1e-5))
_NAMES = table(LAYERS, {"input_layernorm": "norm_1", **PAIRED, **MLP}, ENDS)
_ACCEPTS = {**SILU, "attention_bias": (False,)}

FAMILY = Family(
    [],
    hf={
        "cohere": Architecture(
            "CohereForCausalLM",
            _NAMES,
            without(_SIZES, "head_dim"),
            _COHERE,
            {**_ACCEPTS, "use_qk_norm": (False,)},
            (_SCALE, rope(500000.0)),
            tied=True,
        ),
        "cohere2": Architecture(
            "Cohere2ForCausalLM", _NAMES, without(_SIZES, "head_dim"), _COHERE, _ACCEPTS, (_SCALE, LOCAL_ROTATION, rope()), tied=True
        ),
    },
)
