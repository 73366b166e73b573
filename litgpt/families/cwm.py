"""Meta's Code World Model: Llama's decoder with windows in three of four blocks."""

from __future__ import annotations

from litgpt.families._architecture import Architecture, Aspect, Fields, Hf, Key, local_windows
from litgpt.families._family import Family
from litgpt.families._rope import rope, settings
from litgpt.families.llama import DECODER, NAMES, SILU, SIZES

_KEYS = {
    **SIZES,
    "max_position_embeddings": Key("block_size", 131072),
    "head_dim": Key("head_size", 128),
    "rms_norm_eps": Key("norm_eps", 1e-5),
}
_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}
_WINDOW = local_windows(8192, lambda i: i % 4 != 0)
_ROPE = rope(1000000.0)


def _read_rope(hf: Hf) -> Fields:
    return _ROPE.read(hf if settings(hf) else {**hf, "rope_parameters": _SCALING})


FAMILY = Family(
    [],
    hf={
        "cwm": Architecture(
            "CwmForCausalLM", NAMES, _KEYS, DECODER, {**SILU, "mlp_bias": (False,)}, (_WINDOW, Aspect(_read_rope, _ROPE.write))
        )
    },
)
