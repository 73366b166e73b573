"""gpt-oss: attention sinks, a window in every other block, biases, and a mixture of experts with a clamped SwiGLU."""

from __future__ import annotations

from typing import Any

from litgpt.families._architecture import Architecture, Aspect, Fields, Hf, Key, local_windows, sizes, table
from litgpt.families._family import Family
from litgpt.families._rope import rope, settings
from litgpt.families._rows import expand
from litgpt.families.llama import ATTENTION, ENDS, LAYERS, NORMS, SILU
from litgpt.families.mistral import MOE

_GPT_OSS = {**MOE, "bias": True, "attention_sinks": True, "router_bias": True}
_YARN = {"factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_ROPE = rope(150000.0)


def _read_rope(hf: Hf) -> Fields:
    return _ROPE.read(hf if settings(hf) else {**hf, "rope_parameters": {"rope_type": "yarn", **_YARN}})


def _model(n_layer: int, n_expert: int) -> dict[str, Any]:
    windows = {"sliding_window_size": 128, "sliding_window_indices": [int(i % 2 == 0) for i in range(n_layer)]}
    return {**windows, "n_layer": n_layer, "n_expert": n_expert}


MODELS = expand(
    "openai",
    {
        **_GPT_OSS,
        **_read_rope({"max_position_embeddings": 131072}),
        "n_head": 64,
        "head_size": 64,
        "n_query_groups": 8,
        "n_embd": 2880,
        "intermediate_size": 2880,
        "n_expert_per_token": 4,
        "swiglu_limit": 7.0,
        "block_size": 131072,
        "vocab_size": 201088,
        "padded_vocab_size": 201088,
        "router_aux_loss_coef": 0.9,
    },
    {"gpt-oss-20b": _model(24, 32), "gpt-oss-120b": _model(36, 128)},
)

_KEYS = sizes(
    rms_norm_eps=Key("norm_eps", 1e-5),
    max_position_embeddings=Key("block_size", 131072),
    head_dim=Key("head_size", 64),
    swiglu_limit=Key("swiglu_limit", 7.0),
    swiglu_alpha=Key("swiglu_alpha", 1.702),
    router_aux_loss_coef=Key("router_aux_loss_coef", 0.001),
    **{
        "num_local_experts num_experts": Key("n_expert", 128),
        "num_experts_per_tok": Key("n_expert_per_token", 4),
    },
)
_EXPERT_NAMES = {  # of one expert: see `litgpt.convert.experts`
    "mlp.router": "mlp.gate",
    "mlp.experts.{}.gate_proj": "mlp.experts.{}.fc_1",
    "mlp.experts.{}.up_proj": "mlp.experts.{}.fc_2",
    "mlp.experts.{}.down_proj": "mlp.experts.{}.proj",
}

FAMILY = Family(
    MODELS,
    hf={
        "gpt_oss": Architecture(
            "GptOssForCausalLM",
            table(LAYERS, {**NORMS, "self_attn": "attn", **ATTENTION, **_EXPERT_NAMES}, ENDS),
            _KEYS,
            _GPT_OSS,
            {**SILU, "attention_bias": (True,)},
            (local_windows(128, lambda i: i % 2 == 0), Aspect(_read_rope, _ROPE.write)),
        )
    },
)
