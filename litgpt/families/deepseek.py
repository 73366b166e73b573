"""DeepSeek V2, V3 and R1, Moonlight and GLM-4.7-Flash: Llama's decoder with latent attention; shared experts, and experts in groups."""

from __future__ import annotations

import math
from typing import Any

from litgpt.families._architecture import Architecture, Aspect, Fields, Hf, Key, table, without
from litgpt.families._family import Family
from litgpt.families._rope import rope, settings
from litgpt.families._rows import expand, size
from litgpt.families._styles import turns
from litgpt.families.llama import ENDS, LAYERS, MLP, NORMS, SILU, SIZES
from litgpt.families.mistral import MOE, WITH_SHARED

_DEFAULTS = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}


def _score_factor(factor: float, m: float) -> float:
    """Return the factor of the scores with YaRN: m' squared, m' = 0.1 m ln(factor) + 1."""
    return (0.1 * m * math.log(factor) + 1) ** 2 if factor > 1 else 1.0


def _scalar(factor: float, m: float, head: int = 192) -> float:
    """Return `attention_scores_scalar` for heads of that size."""
    return head / _score_factor(factor, m) ** 2


def _yarn(m: float) -> Fields:
    """Return the fields of YaRN by 40 with mscale and mscale_all_dim m."""
    scaling = {"factor": 40, "original_max_seq_len": 4096, "beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0}
    return {"rope_adjustments": {"rope_type": "yarn", **scaling}, "attention_scores_scalar": _scalar(40, m)}


_LATENT = {**MOE, "rope_interleave": True, "latent_attention": _DEFAULTS}
_WITHOUT_Q = {"latent_attention": {**_DEFAULTS, "q_lora_rank": None}}
_V2 = {
    **_LATENT,
    "padded_vocab_size": 102400,
    "vocab_size": 102400,
    "block_size": 163840,
    "norm_eps": 1e-6,
    "norm_topk_prob": False,
    "n_shared_expert": 2,
    "n_expert_per_token": 6,
    "first_k_dense_replace": 1,
}
_LITE = {**size(27, 16, 2048, 10944), **_WITHOUT_Q, **_yarn(0.707), "moe_intermediate_size": 1408, "n_expert": 64}
_V2_LARGE = {
    **size(60, 128, 5120, 12288),
    "moe_intermediate_size": 1536,
    "n_expert": 160,
    "routed_scaling_factor": 16.0,
    "n_expert_groups": 8,
    "n_topk_groups": 3,
    "n_topk_scores_per_group": 1,
    "router_softmax": True,
}
_V3 = {
    **_LATENT,
    **size(61, 128, 7168, 18432),
    **_yarn(1.0),
    "padded_vocab_size": 129280,
    "vocab_size": 129280,
    "block_size": 163840,
    "norm_eps": 1e-6,
    "moe_intermediate_size": 2048,
    "n_expert": 256,
    "n_shared_expert": 1,
    "n_expert_per_token": 8,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "n_expert_groups": 8,
    "n_topk_groups": 4,
    "n_topk_scores_per_group": 2,
}
_MOONLIGHT = {
    **_LATENT,
    **_WITHOUT_Q,
    **size(27, 16, 2048, 11264),
    "padded_vocab_size": 163840,
    "vocab_size": 163840,
    "block_size": 8192,
    "rope_base": 50000,
    "moe_intermediate_size": 1408,
    "n_expert": 64,
    "n_shared_expert": 2,
    "n_expert_per_token": 6,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.446,
    "n_expert_groups": 1,
    "n_topk_groups": 1,
    "n_topk_scores_per_group": 2,
}

MODELS = [
    *expand(
        "deepseek-ai",
        _V2,
        {
            "DeepSeek-V2-Lite DeepSeek-V2-Lite-Chat DeepSeek-Coder-V2-Lite-Base DeepSeek-Coder-V2-Lite-Instruct": _LITE,
            "DeepSeek-V2 DeepSeek-V2-Chat": {**_V2_LARGE, **_yarn(0.707)},
            "DeepSeek-V2.5": {**_V2_LARGE, **_yarn(1.0)},
        },
    ),
    *expand("deepseek-ai", _V3, {"DeepSeek-V3 DeepSeek-V3-Base DeepSeek-V3-0324 DeepSeek-R1 DeepSeek-R1-Zero DeepSeek-R1-0528": {}}),
    *expand("moonshotai", _MOONLIGHT, {"Moonlight-16B-A3B Moonlight-16B-A3B-Instruct": {}}),
]


def _read_latent(hf: Hf, defaults: dict[str, int]) -> Fields:
    """Read the rotary settings, the sizes of latent attention, and the effect of YaRN's mscale_all_dim on the scores."""
    sizes = {key: hf.get(key, default) for key, default in defaults.items()}
    head, scaling = sizes["qk_rope_head_dim"] + sizes["qk_nope_head_dim"], settings(hf)
    kind, m = scaling.get("rope_type") or scaling.get("type") or "default", scaling.get("mscale_all_dim")
    fields: Fields = {**_ROPE.read(hf), "latent_attention": sizes, "attention_scores_scalar": None}
    return fields if kind == "default" or not m else {**fields, "attention_scores_scalar": _scalar(scaling["factor"], m, head)}


def _read_dense_first(hf: Hf) -> Fields:
    types = hf.get("mlp_layer_types") or ["dense", *["sparse"] * (hf["num_hidden_layers"] - 1)]
    if types != sorted(types) or not set(types) <= {"dense", "sparse"}:
        raise ValueError(f"mlp_layer_types {types} is not supported: experts in all blocks but the first ones are")
    return {"first_k_dense_replace": types.count("dense")}


def _write_dense_first(fields: Fields) -> dict[str, Any]:
    dense = fields["first_k_dense_replace"] or 0
    return {"mlp_layer_types": ["dense"] * dense + ["sparse"] * (fields["n_layer"] - dense)}


def _write_latent(fields: Fields) -> dict[str, Any]:
    latent, scalar, head = fields["latent_attention"], fields["attention_scores_scalar"], fields["head_size"]
    if not latent:
        raise ValueError("latent attention is needed")
    hf = {**_ROPE.write(fields), **latent}
    if scalar and not math.isclose(scalar, head):
        factor = (hf["rope_scaling"] or {}).get("factor", 1)
        if not factor > 1 or scalar > head:
            raise ValueError("attention_scores_scalar without YaRN")
        hf["rope_scaling"]["mscale_all_dim"] = round(((head / scalar) ** 0.25 - 1) / (0.1 * math.log(factor)), 14)
    return hf


_ROPE = rope()
_LATENT_ASPECT = Aspect(lambda hf: _read_latent(hf, _DEFAULTS), _write_latent)
_GLM_LATENT = Aspect(
    lambda hf: _read_latent(hf, {**_DEFAULTS, "q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256}), _write_latent
)


def _read_v2_groups(hf: Hf) -> Fields:
    method = hf.get("topk_method", "greedy")
    if method == "greedy":
        return {}
    if method != "group_limited_greedy":
        raise ValueError(f"topk_method {method!r} is not supported, only 'greedy', 'group_limited_greedy' are")
    groups = {"n_expert_groups": hf["n_group"], "n_topk_groups": hf["topk_group"], "n_topk_scores_per_group": 1}
    return {**groups, "router_softmax": True}


def _write_v2_groups(fields: Fields) -> dict[str, Any]:
    groups = {"n_group": fields["n_expert_groups"], "topk_group": fields["n_topk_groups"]}
    return {"topk_method": "group_limited_greedy" if groups["n_group"] else "greedy", **groups}


_SIZES = {
    **without(SIZES, "head_dim"),
    "moe_intermediate_size": Key("moe_intermediate_size", 2048),
    "n_routed_experts num_local_experts": Key("n_expert", 256),
    "n_shared_experts": Key("n_shared_expert", 1),
    "num_experts_per_tok": Key("n_expert_per_token", 8),
    "first_k_dense_replace": Key("first_k_dense_replace", 3),
    "routed_scaling_factor": Key("routed_scaling_factor", 2.5),
}
_V2_SIZES = {
    **_SIZES,
    "moe_intermediate_size": Key("moe_intermediate_size", 1407),
    "n_routed_experts num_experts": Key("n_expert", 64),
    "n_shared_experts": Key("n_shared_expert", 2),
    "num_experts_per_tok": Key("n_expert_per_token"),
    "first_k_dense_replace": Key("first_k_dense_replace", 0),
    "routed_scaling_factor": Key("routed_scaling_factor", 1.0),
}
del _V2_SIZES["n_routed_experts num_local_experts"]
_GLM_FLASH = {
    **without(_SIZES, "first_k_dense_replace"),
    "moe_intermediate_size": Key("moe_intermediate_size", 1536),
    "n_routed_experts num_local_experts": Key("n_expert", 64),
    "num_experts_per_tok": Key("n_expert_per_token", 4),
    "routed_scaling_factor": Key("routed_scaling_factor", 1.8),
    "rms_norm_eps": Key("norm_eps", 1e-5),
    "n_group": Key("n_expert_groups", 1),
    "topk_group": Key("n_topk_groups", 1),
}
_V3_KEYS = {
    "rope_interleave": Key("rope_interleave", True),
    "norm_topk_prob": Key("norm_topk_prob", True),
    "n_group": Key("n_expert_groups", 8),
    "topk_group": Key("n_topk_groups", 4),
}
_ACCEPTS = {**SILU, "attention_bias": (False,), "moe_layer_freq": (1,)}

_NAMES = table(
    LAYERS,
    {
        **NORMS,
        **MLP,
        **{f"self_attn.{name}": f"attn.{name}" for name in ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")},
        **{f"self_attn.{name}_a_layernorm": f"attn.{name}_a_norm" for name in ("q", "kv")},
        "self_attn.o_proj": "attn.proj",
        **WITH_SHARED,
    },
    ENDS,
)

STYLES = {
    "DeepSeekV2": turns(
        "deepseek-v2",
        start="<｜begin▁of▁sentence｜>",
        system_turn="{}\n\n",
        user_turn="User: {}\n\n",
        reply_head="Assistant:",
        gap=" ",
        end_of_turn="<｜end▁of▁sentence｜>",
    ),
}

FAMILY = Family(
    MODELS,
    hf={
        "deepseek_v2": Architecture(
            "DeepseekV2ForCausalLM",
            _NAMES,
            _V2_SIZES,
            {**MOE, "rope_interleave": True, "norm_topk_prob": False},
            {**_ACCEPTS, "mlp_bias": (False,), "norm_topk_prob": (False, None), "scoring_func": ("softmax",)},
            (_LATENT_ASPECT, Aspect(_read_v2_groups, _write_v2_groups)),
        ),
        "deepseek_v3": Architecture(
            "DeepseekV3ForCausalLM",
            _NAMES,
            {**_SIZES, **_V3_KEYS},
            {**MOE, "n_topk_scores_per_group": 2},
            {**_ACCEPTS, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
            (_LATENT_ASPECT,),
            ignored=r"model\.layers\.61\..*",  # DeepSeek-V3's module that predicts a second token
        ),
        "glm4_moe_lite": Architecture(
            "Glm4MoeLiteForCausalLM",
            _NAMES,
            {**_GLM_FLASH, "rope_interleave": Key("rope_interleave", True), "norm_topk_prob": Key("norm_topk_prob", True)},
            {**MOE, "n_topk_scores_per_group": 2},
            {**SILU, "attention_bias": (False,)},
            (_GLM_LATENT, Aspect(_read_dense_first, _write_dense_first)),
            ignored=r"model\.layers\.47\..*",  # the module that predicts a second token
        ),
    },
    prompts={"deepseek-(coder-)?v2.*(chat|instruct)": "deepseek-v2", r"deepseek-(v3(?!-base)|r1|v2\.5)": "r1-base"},
    styles=STYLES,
)
