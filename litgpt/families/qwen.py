"""Qwen 1.5, 2, 2.5 and QwQ: Llama's decoder with biases on q, k and v. Qwen 3: without them, q and k normalised. Dense or mixtures."""

from __future__ import annotations

from typing import Any

from litgpt.families._architecture import DENSE_FIRST, Architecture, Aspect, Fields, Hf, Key, optional_window, table
from litgpt.families._family import Family
from litgpt.families._gguf import EXPERTS, Gguf
from litgpt.families._pretokenizers import QWEN
from litgpt.families._rope import rope
from litgpt.families._rows import expand, size
from litgpt.families._styles import like
from litgpt.families.llama import ATTENTION, DECODER, ENDS, LAYERS, MLP, NAMES, NORMS, QK_NORMS, SILU, SIZES
from litgpt.families.mistral import EXPERT_LAYERS, MOE

_QWEN_2 = {**DECODER, "attn_bias": True}
_QWEN_2_MOE = {**MOE, "shared_expert_gate": True}
_QWEN_3 = {**DECODER, "norm_qk": True}
_QWEN_3_MOE = {**MOE, "norm_qk": True}

_VOCAB = {"vocab_size": 151643, "padded_vocab_size": 151936}
_WIDE = {"vocab_size": 151643, "padded_vocab_size": 152064}
_1_5 = {**_QWEN_2, "block_size": 32768, "rope_base": 1000000, "norm_eps": 1e-6, **_VOCAB}
_2 = {**_1_5, "block_size": 131072}
_3 = {**_QWEN_3, **_VOCAB, "norm_eps": 1e-6, "block_size": 40960, "rope_base": 1000000, "head_size": 128}
_3_MOE = {**_QWEN_3_MOE, **_3, "mlp_class_name": "LLaMAMoE", "n_expert": 128, "n_expert_per_token": 8, "router_aux_loss_coef": 0.001}
_2_MOE = {**_QWEN_2_MOE, **_1_5, "mlp_class_name": "LLaMAMoE", "norm_topk_prob": False, "router_aux_loss_coef": 0.001}
_05B = {**size(24, 14, 896, 4864, 2), "block_size": 32768}
_15B = size(28, 12, 1536, 8960, 2)
_3B = {**size(36, 16, 2048, 11008, 2), "block_size": 32768}
_7B = {**size(28, 28, 3584, 18944, 4), **_WIDE}
_14B = {**size(48, 40, 5120, 13824, 8), **_WIDE, "norm_eps": 1e-5}
_32B = {**size(64, 40, 5120, 27648, 8), **_WIDE, "norm_eps": 1e-5}
_72B = {**size(80, 64, 8192, 29568, 8), **_WIDE, "norm_eps": 1e-5}
_4B_3 = size(36, 32, 2560, 9728, 8)
_30B_3 = {**size(48, 32, 2048, 6144, 4), "moe_intermediate_size": 768}
_235B_3 = {**size(94, 64, 4096, 12288, 4), "moe_intermediate_size": 1536}
_A27B = {**size(24, 16, 2048, 5632), "moe_intermediate_size": 1408, "n_expert": 60, "n_expert_per_token": 4, "n_shared_expert": 4}
_57B = {**size(28, 28, 3584, 18944, 4), "moe_intermediate_size": 2560, "n_expert": 64, "n_expert_per_token": 8, "n_shared_expert": 8}
_32K = {"block_size": 32768}
_4K = {"block_size": 4096, "rope_base": 10000}
_1M = {"block_size": 1010000, "rope_base": 10000000, "norm_eps": 1e-5}
_2507 = {"block_size": 262144}


def _both(*names: str, ending: str = "Instruct") -> str:
    """Return the names of base models and their instruction-tuned or chat versions."""
    return " ".join(f"{name} {name}-{ending}" for name in names)


MODELS = [
    *expand(
        "Qwen",
        _1_5,
        {
            _both("Qwen1.5-0.5B", ending="Chat"): size(24, 16, 1024, 2816),
            _both("Qwen1.5-1.8B", ending="Chat"): size(24, 16, 2048, 5504),
            _both("Qwen1.5-4B", ending="Chat"): {**size(40, 20, 2560, 6912), "rope_base": 5000000},
            _both("Qwen1.5-7B", ending="Chat"): size(32, 32, 4096, 11008),
            _both("Qwen1.5-14B", ending="Chat"): {**size(40, 40, 5120, 13696), **_WIDE},
        },
    ),
    *expand(
        "Qwen",
        _2,
        {
            "Qwen2-0.5B": {**_05B, "block_size": 131072},
            "Qwen2-0.5B-Instruct": _05B,
            "Qwen2-1.5B": _15B,
            "Qwen2-1.5B-Instruct": {**_15B, **_32K},
            "Qwen2-7B": _7B,
            "Qwen2-7B-Instruct": {**_7B, **_32K},
        },
    ),
    *expand(
        "Qwen",
        _2,
        {
            _both("Qwen2.5-0.5B", "Qwen2.5-Coder-0.5B"): _05B,
            _both("Qwen2.5-1.5B"): _15B,
            _both("Qwen2.5-3B", "Qwen2.5-Coder-3B"): _3B,
            _both("Qwen2.5-7B"): _7B,
            _both("Qwen2.5-14B"): _14B,
            _both("Qwen2.5-32B") + " QwQ-32B": _32B,
            _both("Qwen2.5-72B"): _72B,
            _both("Qwen2.5-Coder-1.5B"): {**_15B, **_32K},
            _both("Qwen2.5-Coder-7B"): {**_7B, **_32K},
            _both("Qwen2.5-Coder-14B"): {**_14B, **_32K},
            _both("Qwen2.5-Coder-32B") + " QwQ-32B-Preview": {**_32B, **_32K},
            _both("Qwen2.5-Math-1.5B"): {**_15B, **_4K},
            _both("Qwen2.5-Math-7B"): {**_7B, **_4K},
            _both("Qwen2.5-Math-72B"): {**_72B, **_4K},
            "Qwen2.5-7B-Instruct-1M": {**_7B, **_1M},
            "Qwen2.5-14B-Instruct-1M": {**_14B, **_1M},
        },
    ),
    *expand(
        "Qwen",
        _2_MOE,
        {
            "Qwen1.5-MoE-A2.7B": {**_A27B, "block_size": 8192},
            "Qwen1.5-MoE-A2.7B-Chat": _A27B,
            "Qwen2-57B-A14B": {**_57B, "block_size": 131072},
            "Qwen2-57B-A14B-Instruct": _57B,
        },
    ),
    *expand(
        "deepseek-ai",
        _2,
        {
            "R1-Distill-Qwen-1.5B=DeepSeek-R1-Distill-Qwen-1.5B": {**_15B, "rope_base": 10000},
            "R1-Distill-Qwen-7B=DeepSeek-R1-Distill-Qwen-7B": {**_7B, "rope_base": 10000},
            "R1-Distill-Qwen-14B=DeepSeek-R1-Distill-Qwen-14B": _14B,
            "R1-Distill-Qwen-32B=DeepSeek-R1-Distill-Qwen-32B": _32B,
        },
    ),
    *expand(
        "Qwen",
        _3,
        {
            "Qwen3-0.6B Qwen3-0.6B-Base": size(28, 16, 1024, 3072, 8),
            "Qwen3-1.7B Qwen3-1.7B-Base": size(28, 16, 2048, 6144, 8),
            "Qwen3-4B Qwen3-4B-Base": _4B_3,
            "Qwen3-8B Qwen3-8B-Base": size(36, 32, 4096, 12288, 8),
            "Qwen3-14B Qwen3-14B-Base": size(40, 40, 5120, 17408, 8),
            "Qwen3-32B": size(64, 64, 5120, 25600, 8),
            "Qwen3-4B-Thinking-2507 Qwen3-4B-Instruct-2507": {**_4B_3, **_2507, "rope_base": 5000000},
        },
    ),
    *expand(
        "Qwen",
        _3_MOE,
        {
            "Qwen3-30B-A3B Qwen3-30B-A3B-Base": _30B_3,
            "Qwen3-30B-A3B-Thinking-2507 Qwen3-30B-A3B-Instruct-2507": {**_30B_3, **_2507, "rope_base": 10000000},
            "Qwen3-235B-A22B": _235B_3,
            "Qwen3-235B-A22B-Thinking-2507 Qwen3-235B-A22B-Instruct-2507": {**_235B_3, **_2507, "rope_base": 5000000},
        },
    ),
]

_WINDOW = optional_window(lambda i, hf: i >= hf.get("max_window_layers", 28))
_WINDOW_OF_ALL = optional_window(lambda i, hf: True)
_WINDOW_OF_EVEN = optional_window(lambda i, hf: i % 2 == 0 and i < hf.get("max_window_layers", 28))
_EXPERTS = {
    "num_experts num_local_experts": Key("n_expert", 128),
    "num_experts_per_tok": Key("n_expert_per_token", 8),
    "moe_intermediate_size": Key("moe_intermediate_size", 768),
    "norm_topk_prob": Key("norm_topk_prob", False),
    "router_aux_loss_coef": Key("router_aux_loss_coef", 0.001),
}
_ACCEPTS = {**SILU, "attention_bias": (False,)}


def _read_shared(hf: Hf) -> Fields:
    width, each = hf.get("shared_expert_intermediate_size", 5632), hf.get("moe_intermediate_size", 1408)
    if width % each or not width:
        raise ValueError(f"shared_expert_intermediate_size {width} is not supported, only multiples of moe_intermediate_size, {each}, are")
    return {"n_shared_expert": width // each}


def _write_shared(fields: Fields) -> dict[str, Any]:
    return {"shared_expert_intermediate_size": (fields["n_shared_expert"] or 0) * (fields["moe_intermediate_size"] or 0)}


_EXPERTS_2 = {
    **_EXPERTS,
    "num_experts": Key("n_expert", 60),
    "num_experts_per_tok": Key("n_expert_per_token", 4),
    "moe_intermediate_size": Key("moe_intermediate_size", 1408),
    "qkv_bias": Key("attn_bias", True),
}
del _EXPERTS_2["num_experts num_local_experts"]

_SHARED_NAMES = {
    "mlp.shared_expert.gate_proj": "mlp.shared_experts.fc_1",
    "mlp.shared_expert.up_proj": "mlp.shared_experts.fc_2",
    "mlp.shared_expert.down_proj": "mlp.shared_experts.proj",
    "mlp.shared_expert_gate": "mlp.shared_expert_gate",
}

STYLES = {
    "Qwen2_5": like("ChatML", "qwen2.5", system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "Qwen2_5_Math": like("ChatML", "qwen2.5-math", system="Please reason step by step, and put your final answer within \\boxed{}."),
    "QwQ": like(
        "ChatML",
        "qwq",
        system="You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step.",
    ),
    "Qwen3": like("ChatML", "qwen3"),
}

FAMILY = Family(
    MODELS,
    hf={
        "qwen2": Architecture("Qwen2ForCausalLM", NAMES, SIZES, _QWEN_2, SILU, (_WINDOW, rope())),
        "qwen2_moe": Architecture(
            "Qwen2MoeForCausalLM",
            table(LAYERS, {**NORMS, **ATTENTION, **MLP, **EXPERT_LAYERS, **_SHARED_NAMES}, ENDS),
            {**SIZES, **_EXPERTS_2},
            _QWEN_2_MOE,
            SILU,
            (_WINDOW_OF_EVEN, DENSE_FIRST, Aspect(_read_shared, _write_shared), rope()),
        ),
        "qwen3": Architecture(
            "Qwen3ForCausalLM",
            table(LAYERS, {**NORMS, **ATTENTION, **MLP, **QK_NORMS}, ENDS),
            {**SIZES, "head_dim": Key("head_size", 128)},
            _QWEN_3,
            _ACCEPTS,
            (_WINDOW, rope()),
        ),
        "qwen3_moe": Architecture(
            "Qwen3MoeForCausalLM",
            table(LAYERS, {**NORMS, **ATTENTION, **QK_NORMS, **MLP, **EXPERT_LAYERS}, ENDS),
            {**SIZES, **_EXPERTS},
            _QWEN_3_MOE,
            _ACCEPTS,
            (_WINDOW_OF_ALL, DENSE_FIRST, rope()),
        ),
    },
    gguf={"qwen2": Gguf(_QWEN_2), "qwen3": Gguf(_QWEN_3), "qwen3moe": Gguf(_QWEN_3_MOE, EXPERTS, hub=("qwen3_moe",))},
    prompts={
        "r1-distill-qwen": "r1-base",
        r"qwen2\.5-math": "qwen2.5-math",
        r"qwen2\.5": "qwen2.5",
        "qwq": "qwq",
        "qwen3": "qwen3",
    },
    styles=STYLES,
    pretokenizers=dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN),
)
