"""SmolLM 3: Llama's decoder without rotation in every fourth block. (SmolLM 1 and 2 are Llama's own.)"""

from __future__ import annotations

from typing import Any

from litgpt.families._architecture import BIASES, Architecture, Aspect, Fields, Hf, optional_window
from litgpt.families._family import Family
from litgpt.families._gguf import Gguf
from litgpt.families._rope import rope
from litgpt.families._rows import expand, size
from litgpt.families.llama import DECODER, NAMES, SILU, SIZES

_3B = {**DECODER, **size(36, 16, 2048, 11008, 4), "norm_eps": 1e-6, "vocab_size": 128256, "padded_vocab_size": 128256}
_INDICES = [-1 if (i + 1) % 4 == 0 else 0 for i in range(36)]

MODELS = expand(
    "HuggingFaceTB",
    {**_3B, "rope_indices": _INDICES},
    {"SmolLM3-3B": {"block_size": 65536, "rope_base": 5000000}},
)


def _rotated(i: int, hf: Hf) -> bool:
    flags = hf.get("no_rope_layers")
    return bool(flags[i]) if flags else (i + 1) % hf.get("no_rope_layer_interval", 4) != 0


def _read_rotated(hf: Hf) -> Fields:
    n_layer = hf["num_hidden_layers"]
    flags = hf.get("no_rope_layers")
    if not isinstance(n_layer, int) or (flags and len(flags) != n_layer):
        raise ValueError(f"no_rope_layers has {len(flags or [])} entries: one for each of num_hidden_layers, {n_layer!r}, is needed")
    return {"rope_indices": [0 if _rotated(i, hf) else -1 for i in range(n_layer)]}


def _write_rotated(fields: Fields) -> dict[str, Any]:
    """Write `no_rope_layers`, which despite its name holds 1 for the blocks with rotation."""
    return {"no_rope_layers": [int(entry == 0) for entry in fields["rope_indices"] or [0] * fields["n_layer"]]}


FAMILY = Family(
    MODELS,
    hf={
        "smollm3": Architecture(
            "SmolLM3ForCausalLM",
            NAMES,
            SIZES,
            DECODER,
            SILU,
            (Aspect(_read_rotated, _write_rotated), optional_window(lambda i, hf: not _rotated(i, hf)), BIASES, rope(2000000.0)),
            tied=True,
        )
    },
    gguf={"smollm3": Gguf(DECODER, paired=True, rest_period=4)},
)
