"""OLMo 1: LayerNorm without weights. OLMo 2: norms on the outputs of attention and MLP, and on q and k over all heads together."""

from __future__ import annotations

from litgpt.families._architecture import Architecture, Key, sizes, table, without
from litgpt.families._family import Family
from litgpt.families._gguf import Gguf
from litgpt.families._pretokenizers import GPT_2_COMPOSED
from litgpt.families._rope import rope
from litgpt.families._rows import expand, size
from litgpt.families._styles import by_role, turns
from litgpt.families.llama import ATTENTION, DECODER, ENDS, LAYERS, MLP, QK_NORMS, SILU

_OLMO = {**DECODER, "norm_class_name": "LayerNorm", "norm_affine": False}
_OLMO_2 = {
    **DECODER,
    "norm_1": False,
    "norm_2": False,
    "post_attention_norm": True,
    "post_mlp_norm": True,
    "norm_qk": True,
    "norm_qk_type": "olmo2",
}
_1 = {**_OLMO, "block_size": 2048, "vocab_size": 50280, "padded_vocab_size": 50304}
_2 = {**_OLMO_2, "norm_eps": 1e-6, "vocab_size": 100278, "padded_vocab_size": 100352, "rope_base": 500000}


def _stages(*names: str) -> str:
    return " ".join(f"{name}{stage}" for name in names for stage in ("", "-SFT", "-DPO", "-Instruct"))


MODELS = [
    *expand(
        "allenai",
        _1,
        {"OLMo-1B-hf": size(16, 16, 2048, 8192), "OLMo-7B-hf OLMo-7B-Instruct-hf": size(32, 32, 4096, 11008)},
    ),
    *expand(
        "allenai",
        _2,
        {
            _stages("OLMo-2-0425-1B"): size(16, 16, 2048, 8192),
            _stages("OLMo-2-1124-7B"): size(32, 32, 4096, 11008),
            _stages("OLMo-2-1124-13B"): size(40, 40, 5120, 13824),
            _stages("OLMo-2-0325-32B"): size(64, 40, 5120, 27648, 8),
        },
    ),
]

_ACCEPTS = {**SILU, "attention_bias": (False,)}

_NORMS_2 = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_mlp_norm"}

STYLES = {
    "OLMo": turns("olmo", start="<|endoftext|>", **by_role("<|ROLE|>\n", between="\n") | {"end_of_turn": "<|endoftext|>"}),
}

FAMILY = Family(
    MODELS,
    hf={
        "olmo": Architecture(
            "OlmoForCausalLM",
            table(LAYERS, {**ATTENTION, **MLP}, without(ENDS, "model.norm")),  # norms have no weights
            sizes(),
            {**_OLMO, "norm_eps": 1e-5},
            {**_ACCEPTS, "clip_qkv": (None,)},
            (rope(),),
        ),
        "olmo2": Architecture(
            "Olmo2ForCausalLM",
            table(LAYERS, {**_NORMS_2, **ATTENTION, **QK_NORMS, **MLP}, ENDS),
            sizes(rms_norm_eps=Key("norm_eps", 1e-5)),
            _OLMO_2,
            _ACCEPTS,
            (rope(),),
        ),
    },
    gguf={"olmo": Gguf(_OLMO, paired=True), "olmo2": Gguf(_OLMO_2)},
    prompts={"olmo.*instruct": "olmo"},
    styles=STYLES,
    pretokenizers={"olmo": GPT_2_COMPOSED},
)
