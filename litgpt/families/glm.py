"""GLM 4: half of each head is rotated, in neighbouring pairs; GLM-4-0414 has norms on outputs too. GLM 4.5 to 4.7: DeepSeek's mixture.

(GLM-4.7-Flash, with latent attention, is in `deepseek`.)
"""

from __future__ import annotations

from litgpt.families._architecture import Architecture, Key, sizes, table
from litgpt.families._family import Family
from litgpt.families._rope import rope
from litgpt.families._rows import expand, size
from litgpt.families.llama import ATTENTION, DECODER, ENDS, LAYERS, MLP, NORMS, PAIRED, QK_NORMS, SILU
from litgpt.families.mistral import MOE, WITH_SHARED

_GLM_4 = {**DECODER, "post_attention_norm": True, "post_mlp_norm": True}
_GLM_MOE = {**MOE, "n_topk_scores_per_group": 2}
_SIZES = sizes(head_dim=Key("head_size", 128), attention_bias=Key("attn_bias", True), rms_norm_eps=Key("norm_eps", 1.5625e-07))
_MOE_SIZES = {
    **sizes(head_dim=Key("head_size", None), attention_bias=Key("attn_bias", False), rms_norm_eps=Key("norm_eps", 1e-5)),
    "max_position_embeddings": Key("block_size", 131072),
    "moe_intermediate_size": Key("moe_intermediate_size", 1408),
    "n_routed_experts num_local_experts num_experts": Key("n_expert", 128),
    "n_shared_experts": Key("n_shared_expert", 1),
    "num_experts_per_tok": Key("n_expert_per_token", 8),
    "first_k_dense_replace": Key("first_k_dense_replace", 1),
    "routed_scaling_factor": Key("routed_scaling_factor", 1.0),
    "n_group": Key("n_expert_groups", 1),
    "topk_group": Key("n_topk_groups", 1),
    "norm_topk_prob": Key("norm_topk_prob", True),
    "use_qk_norm": Key("norm_qk", False),
}
_SHARED = {"norm_eps": 1e-5, "rotary_percentage": 0.5, "vocab_size": 151552, "padded_vocab_size": 151552, "head_size": 128}
_AIR = {
    **_GLM_MOE,
    **_SHARED,
    **size(46, 96, 4096, 10944, 8),
    "block_size": 131072,
    "rope_base": 1000000,
    "attn_bias": True,
    "moe_intermediate_size": 1408,
    "n_expert": 128,
    "n_shared_expert": 1,
    "n_expert_per_token": 8,
    "first_k_dense_replace": 1,
    "n_expert_groups": 1,
    "n_topk_groups": 1,
}

MODELS = [
    *expand("zai-org", {**_GLM_4, **_SHARED, "block_size": 32768}, {"GLM-4-9B-0414": {**size(40, 32, 4096, 13696, 2), "attn_bias": True}}),
    *expand("zai-org", _AIR, {"GLM-4.5-Air GLM-4.5-Air-Base": {}}),
]

_JOINED = {"mlp.gate_up_proj": "mlp.fc_1 gate up", "mlp.down_proj": "mlp.proj"}
_NORMS_4 = {**NORMS, "post_self_attn_layernorm": "post_attention_norm", "post_mlp_layernorm": "post_mlp_norm"}

FAMILY = Family(
    MODELS,
    hf={
        "glm": Architecture(
            "GlmForCausalLM", table(LAYERS, {**NORMS, **PAIRED, **_JOINED}, ENDS), _SIZES, DECODER, SILU, (rope(partial=0.5),)
        ),
        "glm4": Architecture(
            "Glm4ForCausalLM", table(LAYERS, {**_NORMS_4, **PAIRED, **_JOINED}, ENDS), _SIZES, _GLM_4, SILU, (rope(partial=0.5),)
        ),
        "glm4_moe": Architecture(
            "Glm4MoeForCausalLM",
            table(LAYERS, {**NORMS, **ATTENTION, **QK_NORMS, **MLP, **WITH_SHARED}, ENDS),
            _MOE_SIZES,
            _GLM_MOE,
            SILU,
            (rope(partial=0.5),),
            ignored=r"model\.layers\.(46|92)\..*",  # the module that predicts a second token, of GLM-4.5-Air and GLM-4.5
        ),
    },
)
