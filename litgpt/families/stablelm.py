"""StableLM 3B and 2: Llama's MLP with LayerNorm, rotary on a quarter of each head."""

from __future__ import annotations

from typing import Any

from litgpt.families._architecture import Architecture, Aspect, Fields, Hf, Key, sizes, without
from litgpt.families._family import Family
from litgpt.families._gguf import Gguf
from litgpt.families._pretokenizers import QWEN
from litgpt.families._rope import rope
from litgpt.families._rows import expand, size
from litgpt.families._styles import by_role, turns
from litgpt.families.llama import DECODER, NAMES, SILU

_LAYER_NORM = {**DECODER, "norm_class_name": "LayerNorm"}
_3B = {**_LAYER_NORM, **size(32, 32, 2560, 6912), "rotary_percentage": 0.25, "padded_vocab_size": 50304}
_2_1_6B = {**_LAYER_NORM, **size(24, 32, 2048, 5632), "rotary_percentage": 0.25, "attn_bias": True}

MODELS = [
    *expand(
        "stabilityai",
        _3B,
        {"stablelm-3b-4e1t stablelm-zephyr-3b": {}, "stable-code-3b": {"block_size": 16384, "rope_base": 1000000}},
    ),
    *expand(
        "stabilityai",
        {**_2_1_6B, "vocab_size": 100352, "padded_vocab_size": 100352},
        {"stablelm-2-1_6b stablelm-2-zephyr-1_6b": {}},
    ),
]


def _read_residual(hf: Hf) -> Fields:
    """Read the kind of residual; a parallel one shares its norm."""
    parallel = hf.get("use_parallel_residual", False)
    return {"parallel_residual": parallel, "shared_attention_norm": parallel}


def _write_residual(fields: Fields) -> dict[str, Any]:
    return {"use_parallel_residual": fields["parallel_residual"]}


STYLES = {
    "StableLMZephyr": turns("stablelm-zephyr", **by_role("<|ROLE|>\n", "<|endoftext|>", "\n")),
}

FAMILY = Family(
    MODELS,
    hf={
        "stablelm": Architecture(
            "StableLmForCausalLM",
            NAMES,
            without(sizes(layer_norm_eps=Key("norm_eps", 1e-5), use_qkv_bias=Key("attn_bias", False)), "head_dim"),
            _LAYER_NORM,
            {**SILU, "qk_layernorm": (False,)},
            (Aspect(_read_residual, _write_residual), rope(partial=0.25)),
        )
    },
    gguf={"stablelm": Gguf(_LAYER_NORM, ("use_parallel_residual",), by_tensors=("attn_bias",))},
    prompts={"stablelm.*zephyr|stable-code.*instruct": "stablelm-zephyr"},
    styles=STYLES,
    pretokenizers={"stablelm2": QWEN},
)
