"""Mistral, Mixtral and Danube 1 and 2: Llama's decoder, in early models with a sliding window; Mixtral is a mixture of experts."""

from __future__ import annotations

from litgpt.families._architecture import Architecture, Key, local_windows, sizes, table, window
from litgpt.families._family import Family
from litgpt.families._pretokenizers import Cut, by_case
from litgpt.families._rope import rope
from litgpt.families._rows import expand, size
from litgpt.families._styles import like, turns
from litgpt.families.llama import ATTENTION, DECODER, ENDS, LAYERS, MLP, NAMES, NORMS, SILU, SIZES

MOE = {**DECODER, "mlp_class_name": "LLaMAMoE"}
# Names of the layers of experts, and of those that DeepSeek shares.
EXPERT_LAYERS = {
    "mlp.gate": "mlp.gate",
    **{key.replace("mlp", "mlp.experts.{}"): place.replace("mlp", "mlp.experts.{}") for key, place in MLP.items()},
}
WITH_SHARED = {
    **EXPERT_LAYERS,
    **{key.replace("mlp", "mlp.shared_experts"): place.replace("mlp", "mlp.shared_experts") for key, place in MLP.items()},
}
_7B = {**DECODER, **size(32, 32, 4096, 14336, 8), "block_size": 32768}
_WINDOW = {"block_size": 4096, "sliding_window_size": 4096}
_1M = {"rope_base": 1000000}
_V3 = {**DECODER, "padded_vocab_size": 32768, "rope_base": 1000000}
_NEMO = {**DECODER, **size(40, 32, 5120, 14336, 8), "head_size": 128, "vocab_size": 131072, "padded_vocab_size": 131072}
_8_EXPERTS = {**MOE, **_1M, "n_expert": 8, "n_expert_per_token": 2}
_DANUBE = {**DECODER, **size(24, 32, 2560, 6912, 8), "padded_vocab_size": 32000}

MODELS = [
    *expand(
        "mistralai",
        {**_7B, "padded_vocab_size": 32000},
        {"Mistral-7B-v0.1 Mistral-7B-Instruct-v0.1": _WINDOW, "Mistral-7B-Instruct-v0.2": _1M},
    ),
    *expand("unsloth", {**_7B, "padded_vocab_size": 32000}, {"Mistral-7B-v0.2": _1M}),
    *expand(
        "mistralai",
        {**_7B, **_V3},
        {"Mistral-7B-v0.3 Mistral-7B-Instruct-v0.3 Mathstral-7B-v0.1=mathstral-7B-v0.1": {}},
    ),
    *expand(
        "mistralai",
        {**_V3, "block_size": 32768},
        {"Mistral-Large-Instruct-2407 Mistral-Large-Instruct-2411": size(88, 96, 12288, 28672, 8)},
    ),
    *expand(
        "mistralai",
        _NEMO,
        {
            "Mistral-Nemo-Base-2407 Mistral-Nemo-Instruct-2407": {**_1M, "block_size": 131072},
            "Mistral-Small-24B-Base-2501 Mistral-Small-24B-Instruct-2501": {
                "intermediate_size": 32768,
                "rope_base": 100000000,
                "block_size": 32768,
            },
        },
    ),
    *expand(
        "mistralai",
        _8_EXPERTS,
        {
            "Mixtral-8x7B-v0.1 Mixtral-8x7B-Instruct-v0.1": {**_7B, **_8_EXPERTS, "padded_vocab_size": 32000, "router_aux_loss_coef": 0.02},
            "Mixtral-8x22B-v0.1 Mixtral-8x22B-Instruct-v0.1": {
                **size(56, 48, 6144, 16384, 8),
                "block_size": 65536,
                "padded_vocab_size": 32768,
                "router_aux_loss_coef": 0.001,
            },
        },
    ),
    *expand(
        "h2oai",
        _DANUBE,
        {
            "h2o-danube-1.8b-base h2o-danube-1.8b-chat": {"block_size": 16384, "sliding_window_size": 4096},
            "h2o-danube2-1.8b-base h2o-danube2-1.8b-chat": {"block_size": 8192},
        },
    ),
]

_EXPERTS = {
    "num_local_experts num_experts": Key("n_expert", 8),
    "num_experts_per_tok": Key("n_expert_per_token", 2),
    "router_aux_loss_coef": Key("router_aux_loss_coef", 0.001),
}

_EXPERT_NAMES = {
    "block_sparse_moe.gate": "mlp.gate",
    "block_sparse_moe.experts.{}.w1": "mlp.experts.{}.fc_1",
    "block_sparse_moe.experts.{}.w3": "mlp.experts.{}.fc_2",
    "block_sparse_moe.experts.{}.w2": "mlp.experts.{}.proj",
}

STYLES = {
    "Mistral": turns(
        "mistral", start="<s>", system_turn="{}\n\n", system_in_user=True, user_turn="[INST] {} [/INST]", gap=" ", end_of_turn="</s>"
    ),
    "MistralV3": like("Mistral", "mistral-v3", user_turn="[INST] {}[/INST]"),
}

FAMILY = Family(
    MODELS,
    hf={
        "mistral": Architecture("MistralForCausalLM", NAMES, SIZES, DECODER, SILU, (window(4096), rope())),
        "ministral": Architecture("MinistralForCausalLM", NAMES, SIZES, DECODER, SILU, (local_windows(4096), rope())),
        "mixtral": Architecture(
            "MixtralForCausalLM",
            table(LAYERS, {**NORMS, **ATTENTION, **_EXPERT_NAMES}, ENDS),
            sizes(rms_norm_eps=Key("norm_eps", 1e-5), **_EXPERTS),
            MOE,
            SILU,
            (window(None), rope(1000000.0)),
            spellings=(  # in transformers 5's memory
                (r"\.mlp\.gate\.", ".block_sparse_moe.gate."),
                (r"\.mlp\.(experts\.\d+)\.gate_proj\.", r".block_sparse_moe.\1.w1."),
                (r"\.mlp\.(experts\.\d+)\.up_proj\.", r".block_sparse_moe.\1.w3."),
                (r"\.mlp\.(experts\.\d+)\.down_proj\.", r".block_sparse_moe.\1.w2."),
            ),
        ),
    },
    prompts={
        r"mathstral|mistral-7b-instruct-v0\.3|mixtral-8x22b-instruct|mistral-large-instruct": "mistral-v3",  # their tokenizer's version
        "mi[sx]tral.*instruct": "mistral",
        "danube(?!3).*chat": "h2oai",
    },
    styles=STYLES,
    pretokenizers={"tekken": Cut((by_case(r"\p{N}"),), whole_words=True, bos=True)},
)
