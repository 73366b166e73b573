"""EXAONE 4: norms on the outputs of attention and MLP, and on q and k; with windows the other blocks do not rotate."""

from __future__ import annotations

from typing import Any

from litgpt.families._architecture import Architecture, Aspect, Fields, Hf, Key, local_windows, sizes, table
from litgpt.families._family import Family
from litgpt.families._rope import rope
from litgpt.families.llama import ATTENTION, DECODER, ENDS, LAYERS, MLP, QK_NORMS, SILU

_4 = {**DECODER, "norm_1": False, "norm_2": False, "post_attention_norm": True, "post_mlp_norm": True, "norm_qk": True}
_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_mlp_norm"}


def _read_local(hf: Hf) -> Fields:
    pattern = hf.get("sliding_window_pattern", 4)
    if isinstance(pattern, str):
        pattern = len(pattern)
    fields = local_windows(4096, lambda i: (i + 1) % pattern != 0).read(hf)
    blocks = fields["sliding_window_indices"]
    return {**fields, "rope_indices": [windowed - 1 for windowed in blocks]} if blocks else fields


def _write_local(fields: Fields) -> dict[str, Any]:
    windows, rotary = fields["sliding_window_indices"], fields["rope_indices"]
    if rotary != (windows and [windowed - 1 for windowed in windows]):
        raise ValueError(f"rope_indices {rotary} with sliding_window_indices {windows}")
    return local_windows(4096).write(fields)


LOCAL_ROTATION = Aspect(_read_local, _write_local)  # windows, and rotation only in their blocks

FAMILY = Family(
    [],
    hf={
        "exaone4": Architecture(
            "Exaone4ForCausalLM",
            table(LAYERS, {**_NORMS, **ATTENTION, **QK_NORMS, **MLP}, ENDS),
            sizes(rms_norm_eps=Key("norm_eps", 1e-5)),
            _4,
            SILU,
            (LOCAL_ROTATION, rope()),
        )
    },
)
