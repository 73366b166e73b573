"""OLMo 1: LayerNorm without weights. OLMo 2: norms on the outputs of attention and MLP, and on q and k over all heads together.

OLMo 3: OLMo 2 with attention over a window in three of four blocks, whose rotation is not scaled. OLMoE: a mixture, with OLMo 1's norms
(RMSNorm) and OLMo 2's on q and k. FlexOlmo: a mixture of OLMo 2.
"""

from __future__ import annotations

from typing import Any

from litgpt.families._architecture import Architecture, Aspect, Fields, Hf, Key, local_windows, sizes, table, without
from litgpt.families._family import Family
from litgpt.families._gguf import Gguf
from litgpt.families._pretokenizers import GPT_2_COMPOSED
from litgpt.families._rope import read_two_bases, rope, write_scaling
from litgpt.families._rows import expand, size
from litgpt.families._styles import by_role, turns
from litgpt.families.llama import ATTENTION, DECODER, ENDS, LAYERS, MLP, NORMS, QK_NORMS, SILU
from litgpt.families.mistral import EXPERT_LAYERS, MOE

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

_LOCAL = local_windows(4096, lambda i: (i + 1) % 4 != 0)
_MIXTURE = {
    "num_experts num_local_experts": Key("n_expert", 64),
    "num_experts_per_tok": Key("n_expert_per_token", 8),
    "norm_topk_prob": Key("norm_topk_prob", False),
    "router_aux_loss_coef": Key("router_aux_loss_coef", 0.01),
}
_FLEX = {**_MIXTURE, "num_experts num_local_experts": Key("n_expert", 7), "num_experts_per_tok": Key("n_expert_per_token", 5)}
_NORMS_2 = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_mlp_norm"}


def _read_3(hf: Hf) -> Fields:
    local = _LOCAL.read(hf)
    return {**local, "rope_indices": local["sliding_window_indices"], **read_two_bases(hf, 500000, 500000)}


def _write_3(fields: Fields) -> dict[str, Any]:
    """Write the rotary settings in transformers 5's form: the older one has no place for the local base."""
    scaling = write_scaling(fields)["rope_scaling"] or {"rope_type": "default"}
    local = {"rope_type": "default", "rope_theta": float(fields["rope_local_base_freq"] or fields["rope_base"])}
    far = {**scaling, "rope_theta": float(fields["rope_base"])}
    return {**_LOCAL.write(fields), "rope_parameters": {"full_attention": far, "sliding_attention": local}}


STYLES = {
    "OLMo": turns("olmo", start="<|endoftext|>", **by_role("<|ROLE|>\n", between="\n") | {"end_of_turn": "<|endoftext|>"}),
}

FAMILY = Family(
    MODELS,
    hf={
        "olmo": Architecture(
            "OlmoForCausalLM",
            table(LAYERS, {**ATTENTION, **MLP}, without(ENDS, "model.norm")),  # norms have no weights
            sizes(clip_qkv=Key("clip_qkv", None)),
            {**_OLMO, "norm_eps": 1e-5},
            _ACCEPTS,
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
        "olmoe": Architecture(
            "OlmoeForCausalLM",
            table(LAYERS, {**NORMS, **ATTENTION, **QK_NORMS, **EXPERT_LAYERS}, ENDS),
            {**sizes(rms_norm_eps=Key("norm_eps", 1e-5)), **_MIXTURE},
            {**MOE, "norm_qk": True, "norm_qk_type": "olmo2"},
            {**_ACCEPTS, "clip_qkv": (None,)},
            (rope(),),
        ),
        "flex_olmo": Architecture(
            "FlexOlmoForCausalLM",
            table(LAYERS, {**_NORMS_2, **ATTENTION, **QK_NORMS, **EXPERT_LAYERS}, ENDS),
            {**sizes(rms_norm_eps=Key("norm_eps", 1e-6)), **_FLEX},
            {**_OLMO_2, "mlp_class_name": "LLaMAMoE"},
            _ACCEPTS,
            (rope(500000.0),),
        ),
        "olmo3": Architecture(
            "Olmo3ForCausalLM",
            table(LAYERS, {**_NORMS_2, **ATTENTION, **QK_NORMS, **MLP}, ENDS),
            sizes(rms_norm_eps=Key("norm_eps", 1e-5)),
            _OLMO_2,
            _ACCEPTS,
            (Aspect(_read_3, _write_3),),
        ),
    },
    gguf={"olmo": Gguf(_OLMO, paired=True), "olmo2": Gguf(_OLMO_2)},
    prompts={"olmo.*(instruct|sft|dpo)": "olmo"},
    styles=STYLES,
    pretokenizers={"olmo": GPT_2_COMPOSED},
)
