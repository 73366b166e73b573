"""Phi 1.5 and 2: GPT-NeoX's block with one norm for both branches. Phi 3 and 4: Llama's decoder with LongRoPE."""

from __future__ import annotations

from typing import Any

from litgpt.families._architecture import Architecture, Aspect, Fields, Hf, Key, Variant, activation, sizes, table, window, without
from litgpt.families._family import Family
from litgpt.families._gguf import WINDOW, Gguf
from litgpt.families._pretokenizers import GPT_2
from litgpt.families._rope import long_attention_factor, rope, settings
from litgpt.families._rows import expand, size
from litgpt.families._styles import by_role, like, plain, turns
from litgpt.families.llama import ATTENTION, DECODER, ENDS, LAYERS, NORMS, SILU

_PHI = {"shared_attention_norm": True, "lm_head_bias": True}
_1 = {**_PHI, "block_size": 2048, "vocab_size": 50257, "padded_vocab_size": 51200, "gelu_approximate": "tanh"}


def _long(short: str, long: str) -> dict[str, Any]:
    """Return LongRoPE from 4,096 to 131,072 positions; the factors to the digits that tell single-precision numbers apart."""
    lists = {"short_factor": [float(word) for word in short.split()], "long_factor": [float(word) for word in long.split()]}
    attention = long_attention_factor(131072 / 4096, 4096)
    return {"rope_adjustments": {"rope_type": "longrope", **lists, "original_max_seq_len": 4096, "attention_factor": attention}}


_LONG_3 = _long(
    """
    1.1 1.1 1.1 1.3 1.35 1.35 1.4 1.55 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2 2.05 2.05 2.05 2.05 2.05 2.05 2.1 2.1 2.15 2.25 2.25 2.25
    2.25 2.25 2.4 2.45 2.5 2.7 2.7 2.75 2.8 2.9 3.05
    """,
    """
    1.07 1.12 1.15 1.42 1.5699999 1.8 2.1299999 2.1299999 3.01 5.9100003 6.9500003 9.070001 9.93 10.71 11.13 14.61 15.409999 19.81
    37.28 38.28 38.6 40.120003 46.200005 50.940006 53.660007 54.93739 56.89739 57.287388 59.987385 60.867386 60.887386 61.717392
    62.917393 62.957394 63.417393 63.817394 63.837395 63.897396 63.937397 64.0674 64.11435 64.12435 64.15435 64.19435 64.244354
    64.574356 64.69 64.76
    """,
)
_LONG_3_5 = _long(
    """
    1 1.02 1.03 1.03 1.05 1.05 1.05 1.05 1.05 1.0699999 1.0999999 1.1099999 1.1599998 1.1599998 1.1699998 1.2899998 1.3399998
    1.6799998 1.7899998 1.8199998 1.8499998 1.8799998 1.9099997 1.9399997 1.9899997 2.0199997 2.0199997 2.0199997 2.0199997 2.0199997
    2.0199997 2.0299997 2.0299997 2.0299997 2.0299997 2.0299997 2.0299997 2.0299997 2.0299997 2.0299997 2.0799997 2.0899997 2.1899996
    2.2199996 2.5899994 2.7299995 2.7499995 2.8399994
    """,
    """
    1.08 1.11 1.14 1.34 1.5899999 1.6 1.62 2.6200001 3.23 3.23 4.79 7.4 7.7000003 9.09 12.2 17.67 24.460001 28.570002 30.420002
    30.840002 32.590004 32.930004 42.320004 44.960003 50.340004 50.450005 57.550003 57.930004 58.210003 60.140003 62.610004 62.620003
    62.710003 63.140003 63.140003 63.770004 63.930004 63.960003 63.97 64.03 64.07 64.08 64.12 64.41 64.48 64.51 64.53 64.84
    """,
)
_LONG_4 = _long(
    "1 " * 48,
    """
    1 1.118320672 1.250641126 1.398617824 1.564103225 1.74916897 1.956131817 2.187582649 2.446418898 2.735880826 3.059592084
    3.421605075 3.826451687 4.279200023 4.785517845 5.351743533 5.984965424 6.693110555 7.485043894 8.370679318 9.36110372 10.4687158
    11.70738129 13.09260651 14.64173252 16.37415215 18.31155283 20.47818807 22.90118105 25.61086418 28.64115884 32.03 32.1 32.13 32.23
    32.6 32.61 32.64 32.66 32.7 32.71 32.93 32.97 33.28 33.49 33.5 44.16 47.77
    """,
)

_3 = {**DECODER, **size(32, 32, 3072, 8192), "vocab_size": 32000, "padded_vocab_size": 32064}
_4 = {**DECODER, **size(40, 40, 5120, 17920, 10), "vocab_size": 100352, "padded_vocab_size": 100352}
_MINI = {**DECODER, **size(32, 24, 3072, 8192, 8), "rotary_percentage": 0.75, "vocab_size": 200019, "padded_vocab_size": 200064}
_FAR = {"block_size": 131072, "sliding_window_size": 262145}

MODELS = [
    *expand(
        "microsoft",
        _1,
        {
            "phi-1_5": {**size(24, 32, 2048, 8192), "rotary_percentage": 0.5},
            "phi-2": {**size(32, 32, 2560, 10240), "rotary_percentage": 0.4},
        },
    ),
    *expand(
        "microsoft",
        _3,
        {
            "Phi-3-mini-4k-instruct": {"sliding_window_size": 2048},
            "Phi-3-mini-128k-instruct": {**_FAR, **_LONG_3},
            "Phi-3.5-mini-instruct": _LONG_3_5,
        },
    ),
    *expand(
        "microsoft",
        _4,
        {
            "phi-4": {"block_size": 16384, "rope_base": 250000},
            "Phi-4-reasoning Phi-4-reasoning-plus": {"block_size": 32768, "rope_base": 500000},
        },
    ),
    *expand("microsoft", {**_MINI, **_FAR, **_LONG_4}, {"Phi-4-mini-instruct Phi-4-mini-reasoning": {}}),
]

_NAMES = table(
    LAYERS,
    {
        "input_layernorm": "norm_1",
        **without(ATTENTION, "self_attn.o_proj"),
        "self_attn.dense": "attn.proj",
        "mlp.fc1": "mlp.fc",
        "mlp.fc2": "mlp.proj",
    },
    {"model.embed_tokens": "transformer.wte", "model.final_layernorm": "transformer.ln_f", "lm_head": "lm_head"},
)
_NAMES_3 = table(
    LAYERS,
    {
        **NORMS,
        "self_attn.qkv_proj": "attn.qkv",
        "self_attn.o_proj": "attn.proj",
        "mlp.gate_up_proj": "mlp.fc_1 gate up",
        "mlp.down_proj": "mlp.proj",
    },
    ENDS,
)

_ROPE_3 = rope(partial=1.0, original=4096)


def _read_rope(hf: Hf) -> Fields:
    """Read the scaling, which early files of Phi 3 call `yarn` where they mean LongRoPE."""
    scaling = settings(hf)
    is_yarn = scaling.get("rope_type", scaling.get("type")) == "yarn"
    return _ROPE_3.read({**hf, "rope_scaling": {**scaling, "rope_type": "longrope"}} if is_yarn else hf)


_REASONING = (
    "You are Phi, a language model trained by Microsoft to help users. Your role as an assistant involves thoroughly exploring "
    "questions through a systematic thinking process before providing the final precise and accurate solutions. This requires engaging in "
    "a comprehensive cycle of analysis, summarizing, exploration, reassessment, reflection, backtracing, and iteration to develop "
    "well-considered thinking process. Please structure your response into two main sections: Thought and Solution using the specified "
    "format: <think> {Thought section} </think> {Solution section}. In the Thought section, detail your reasoning process in steps. Each "
    "step should include detailed considerations such as analysing questions, summarizing relevant findings, brainstorming new ideas, "
    "verifying the accuracy of the current steps, refining any errors, and revisiting previous steps. In the Solution section, based on "
    "various attempts, explorations, and reflections from the Thought section, systematically present the final solution that you deem "
    "correct. The Solution section should be logical, accurate, and concise and detail necessary steps needed to reach the conclusion. "
    "Now, try to solve the following question through the above guidelines:"
)
STYLES = {
    "Phi1": plain("phi-1", text="{prompt}\n\nAnswer:", gap=" "),
    "Phi2": plain("phi-2", text="Instruct: {prompt}\nOutput:", gap=" "),
    "Phi3": turns("phi-3", system="You are a helpful assistant.", **by_role("<|ROLE|>\n", "<|end|>", "\n")),
    "Phi4": turns("phi-4", **by_role("<|im_start|>ROLE<|im_sep|>", "<|im_end|>")),
    "Phi4Reasoning": like("Phi4", "phi-4-reasoning", system=_REASONING),
    "Phi4Mini": turns("phi-4-mini", **by_role("<|ROLE|>", "<|end|>")),
    "Phi4MiniReasoning": like("Phi4Mini", "phi-4-mini-reasoning", system="Your name is Phi, an AI math expert developed by Microsoft."),
}

FAMILY = Family(
    MODELS,
    hf={
        "phi": Architecture(
            "PhiForCausalLM",
            _NAMES,
            sizes(layer_norm_eps=Key("norm_eps", 1e-5)),
            _PHI,
            {"qk_layernorm": (False,)},
            (activation("hidden_act", "gelu_new"), rope(partial=0.5)),
        ),
        "phi3": Architecture(
            "Phi3ForCausalLM",
            _NAMES_3,
            sizes(rms_norm_eps=Key("norm_eps", 1e-5)),
            DECODER,
            {**SILU, "attention_bias": (False,), "mlp_bias": (False,), "lm_head_bias": (False,)},
            (window(None), Aspect(_read_rope, _ROPE_3.write)),
        ),
    },
    gguf={
        "phi2": Gguf({**_PHI, "bias": True, "gelu_approximate": "tanh"}, hub=("phi",)),
        "phi3": Gguf(
            DECODER,
            WINDOW,
            joined=True,
            variant=Variant({"mlp_class_name": "LLaMAMLP"}, {"ffn_gate": None, "ffn_up": "mlp.fc_1 gate up"}),
        ),
    },
    prompts={
        "phi-1": "phi-1",
        "phi-2": "phi-2",
        "phi-3": "phi-3",
        "phi-4-mini-reasoning": "phi-4-mini-reasoning",
        "phi-4-mini": "phi-4-mini",
        "phi-4-reasoning": "phi-4-reasoning",
        "phi-4": "phi-4",
    },
    styles=STYLES,
    pretokenizers={"phi-2": GPT_2},
)
