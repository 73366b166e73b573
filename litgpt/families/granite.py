"""Granite 3: Llama's decoder with four scalars."""

from __future__ import annotations

from typing import Any

from litgpt.families._architecture import BIASES, Architecture, Aspect, Fields, Hf, Key
from litgpt.families._family import Family
from litgpt.families._gguf import Gguf
from litgpt.families._rope import rope, whole
from litgpt.families._rows import expand, size
from litgpt.families.llama import DECODER, NAMES, SILU, SIZES

_2B = {**size(40, 32, 2048, 8192, 8), "attention_scores_scalar": 4096, "logits_scaling": 8.0}
_8B = {**size(40, 32, 4096, 12800, 8), "attention_scores_scalar": 16384, "logits_scaling": 16.0}
_GRANITE = {**DECODER, "vocab_size": 49155, "padded_vocab_size": 49155, "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
_LONG = {"block_size": 131072}

MODELS = expand(
    "ibm-granite",
    _GRANITE,
    {
        "granite-3.0-2b-base granite-3.0-2b-instruct": _2B,
        "granite-3.0-8b-base granite-3.0-8b-instruct": _8B,
        "granite-3.1-2b-base granite-3.1-2b-instruct granite-3.2-2b-instruct": {**_2B, **_LONG, "rope_base": 5000000},
        "granite-3.1-8b-base granite-3.1-8b-instruct granite-3.2-8b-instruct": {**_8B, **_LONG, "rope_base": 10000000},
    },
)


def _read_scale(hf: Hf) -> Fields:
    """Scores are multiplied by attention_multiplier; ours are divided by the root of attention_scores_scalar."""
    multiplier = hf.get("attention_multiplier", 1.0)
    if not isinstance(multiplier, int | float) or not multiplier > 0:
        raise ValueError(f"attention_multiplier is {multiplier!r}: a positive number is needed")
    return {"attention_scores_scalar": whole(float(multiplier) ** -2)}


def _write_scale(fields: Fields) -> dict[str, Any]:
    return {"attention_multiplier": float(fields["attention_scores_scalar"] or fields["head_size"]) ** -0.5}


_SCALARS = {key: Key(key, 1.0) for key in ("embedding_multiplier", "residual_multiplier", "logits_scaling")}

FAMILY = Family(
    MODELS,
    hf={
        "granite": Architecture(
            "GraniteForCausalLM",
            NAMES,
            {**SIZES, **_SCALARS},
            DECODER,
            SILU,
            (Aspect(_read_scale, _write_scale), BIASES, rope()),
        )
    },
    gguf={
        "granite": Gguf(
            DECODER,
            ("attention.scale", "embedding_scale", "residual_scale", "logit_scale"),
            by_tensors=("bias", "attn_bias"),
            paired=True,
        )
    },
)
