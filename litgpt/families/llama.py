"""Llama, and the many models with its decoder under other names: RMSNorm, SwiGLU, full rotary, no biases."""

from __future__ import annotations

from typing import Any

from litgpt.families._architecture import BIASES, Architecture, Key, sizes, table
from litgpt.families._family import Family
from litgpt.families._gguf import EXPERTS, WINDOW, Gguf
from litgpt.families._pretokenizers import DIGITS, LLAMA_3
from litgpt.families._rope import rope
from litgpt.families._rows import expand, size
from litgpt.families._styles import INSTRUCTION, RESPONSE, by_role, like, plain, turns

DECODER: dict[str, Any] = {
    "rotary_percentage": 1.0,
    "parallel_residual": False,
    "bias": False,
    "norm_class_name": "RMSNorm",
    "mlp_class_name": "LLaMAMLP",
}
_LLAMA_2 = {**DECODER, "vocab_size": 32000, "padding_multiple": 64}
_LLAMA_3 = {**DECODER, "block_size": 8192, "vocab_size": 128000, "padded_vocab_size": 128256, "rope_base": 500000}


def _llama_3_1(factor: float) -> dict[str, Any]:
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
    return {**_LLAMA_3, "block_size": 131072, "rope_adjustments": scaling}


_CODE = {**DECODER, "block_size": 16384, "rope_base": 1000000}
_CODE_INFILL = {**_CODE, "vocab_size": 32016, "padding_multiple": 16}
_CODE_PLAIN = {**_CODE, "padded_vocab_size": 32000}
_PLATYPUS = {**DECODER, "padded_vocab_size": 32000}
_TINY = {**_LLAMA_2, "block_size": 2048, "n_query_groups": 4, "intermediate_size": 5632}
_FALCON_3 = {**DECODER, "padded_vocab_size": 131072, "vocab_size": 131072, "rope_base": 1000042, "norm_eps": 1e-6, "head_size": 256}
_SALAMANDRA = {**DECODER, "block_size": 8192, "vocab_size": 256000, "padded_vocab_size": 256000}
_SMOL = {**DECODER, "vocab_size": 49152, "padded_vocab_size": 49152}
_SMOL_2 = {**_SMOL, "block_size": 8192, "rope_base": 100000}
_DANUBE_3 = {**DECODER, "block_size": 8192, "padded_vocab_size": 32000, "rope_base": 100000}
_EURO = {**DECODER, "vocab_size": 128000, "padded_vocab_size": 128000}

_7B = size(32, 32, 4096, 11008)
_13B = size(40, 40, 5120, 13824)
_34B = size(48, 64, 8192, 22016, 8)
_70B = size(80, 64, 8192, 28672, 8)
_8B = size(32, 32, 4096, 14336, 8)
_135M = size(30, 9, 576, 1536, 3)
_360M = size(32, 15, 960, 2560, 5)
_1_7B = size(24, 32, 2048, 8192)

MODELS = [
    *expand(
        "openlm-research",
        {**_LLAMA_2, "block_size": 2048, "norm_eps": 1e-6},
        {"open_llama_3b": size(26, 32, 3200, 8640), "open_llama_7b": _7B, "open_llama_13b": _13B},
    ),
    *expand(
        "meta-llama",
        _LLAMA_2,
        {
            "Llama-2-7b-hf Llama-2-7b-chat-hf": _7B,
            "Llama-2-13b-hf Llama-2-13b-chat-hf": _13B,
            "Llama-2-70b-hf Llama-2-70b-chat-hf": _70B,
        },
    ),
    *expand("Trelis", _LLAMA_2, {"Llama-2-7b-chat-hf-function-calling-v2": {**_7B, "norm_eps": 1e-6}}),
    *expand("togethercomputer", _LLAMA_2, {"LLaMA-2-7B-32K": {**_7B, "rope_condense_ratio": 8}}),
    *expand("stabilityai", _LLAMA_2, {"FreeWilly2": _70B}),
    *expand(
        "meta-llama",
        _LLAMA_3,
        {
            "Llama-3-8B=Meta-Llama-3-8B Llama-3-8B-Instruct=Meta-Llama-3-8B-Instruct": _8B,
            "Llama-3-70B=Meta-Llama-3-70B Llama-3-70B-Instruct=Meta-Llama-3-70B-Instruct": _70B,
        },
    ),
    *expand(
        "meta-llama",
        _llama_3_1(8.0),
        {
            "Llama-3.1-8B=Meta-Llama-3.1-8B Llama-3.1-8B-Instruct=Meta-Llama-3.1-8B-Instruct": _8B,
            "Llama-3.1-70B=Meta-Llama-3.1-70B Llama-3.1-70B-Instruct=Meta-Llama-3.1-70B-Instruct Llama-3.3-70B-Instruct": _70B,
            "Llama-3.1-405B=Meta-Llama-3.1-405B Llama-3.1-405B-Instruct=Meta-Llama-3.1-405B-Instruct": size(126, 128, 16384, 53248, 8),
        },
    ),
    *expand(
        "meta-llama",
        _llama_3_1(32.0),
        {
            "Llama-3.2-1B Llama-3.2-1B-Instruct": size(16, 32, 2048, 8192, 8),
            "Llama-3.2-3B Llama-3.2-3B-Instruct": size(28, 24, 3072, 8192, 8),
        },
    ),
    *expand("nvidia", _llama_3_1(8.0), {"Llama-3.1-Nemotron-70B-Instruct-HF": _70B}),
    *expand(
        "deepseek-ai",
        _llama_3_1(8.0),
        {
            "R1-Distill-Llama-8B=DeepSeek-R1-Distill-Llama-8B": _8B,
            "R1-Distill-Llama-70B=DeepSeek-R1-Distill-Llama-70B": _70B,
        },
    ),
    *expand(
        "codellama",
        _CODE_INFILL,
        {
            "CodeLlama-7b-hf CodeLlama-7b-Instruct-hf": _7B,
            "CodeLlama-13b-hf": _13B,
            "CodeLlama-13b-Instruct-hf": {**_13B, "block_size": 2048},
            "CodeLlama-70b-hf CodeLlama-70b-Python-hf": _70B,
            "CodeLlama-70b-Instruct-hf": {**_70B, "vocab_size": 32015},
        },
    ),
    *expand(
        "codellama",
        _CODE_PLAIN,
        {
            "CodeLlama-7b-Python-hf": _7B,
            "CodeLlama-13b-Python-hf": _13B,
            "CodeLlama-34b-hf CodeLlama-34b-Python-hf CodeLlama-34b-Instruct-hf": _34B,
        },
    ),
    *expand(
        "garage-bAInd",
        _PLATYPUS,
        {
            "Platypus-30B": {**size(60, 52, 6656, 17920), "block_size": 2048, "norm_eps": 1e-6},
            "Platypus2-7B": _7B,
            "Platypus2-13B Camel-Platypus2-13B Stable-Platypus2-13B": _13B,
            "Platypus2-70B Camel-Platypus2-70B Platypus2-70B-instruct": _70B,
        },
    ),
    *expand(
        "TinyLlama",
        {**_TINY, "n_layer": 22, "n_head": 32, "n_embd": 2048},
        {"tiny-llama-1.1b=TinyLlama-1.1B-intermediate-step-1431k-3T tiny-llama-1.1b-chat=TinyLlama-1.1B-Chat-v1.0": {}},
    ),
    *expand("keeeeenw", _TINY, {"micro-llama-300M=MicroLlama": {"n_layer": 12, "n_head": 16, "n_embd": 1024}}),
    *expand(
        "tiiuae",
        _FALCON_3,
        {
            "Falcon3-1B-Base Falcon3-1B-Instruct": size(18, 8, 2048, 8192, 4),
            "Falcon3-3B-Base Falcon3-3B-Instruct": {**size(22, 12, 3072, 9216, 4), "block_size": 32768},
            "Falcon3-7B-Base Falcon3-7B-Instruct": {**size(28, 12, 3072, 23040, 4), "block_size": 32768},
            "Falcon3-10B-Base Falcon3-10B-Instruct": {**size(40, 12, 3072, 23040, 4), "block_size": 32768},
        },
    ),
    *expand(
        "BSC-LT",
        _SALAMANDRA,
        {
            "salamandra-2b salamandra-2b-instruct": size(24, 16, 2048, 5440),
            "salamandra-7b salamandra-7b-instruct": {**size(32, 32, 4096, 11008, 8), "norm_eps": 1e-6},
        },
    ),
    *expand(
        "HuggingFaceTB",
        {**_SMOL, "block_size": 2048},
        {
            "SmolLM-135M SmolLM-135M-Instruct": _135M,
            "SmolLM-360M SmolLM-360M-Instruct": _360M,
            "SmolLM-1.7B SmolLM-1.7B-Instruct": _1_7B,
        },
    ),
    *expand(
        "HuggingFaceTB",
        _SMOL_2,
        {
            "SmolLM2-135M SmolLM2-135M-Instruct": _135M,
            "SmolLM2-360M SmolLM2-360M-Instruct": _360M,
            "SmolLM2-1.7B SmolLM2-1.7B-Instruct": {**_1_7B, "rope_base": 130000},
        },
    ),
    *expand(
        "h2oai",
        _DANUBE_3,
        {
            "h2o-danube3-500m-base h2o-danube3-500m-chat": size(16, 16, 1536, 4096, 8),
            "h2o-danube3-4b-base h2o-danube3-4b-chat h2o-danube3.1-4b-chat": size(24, 32, 3840, 10240, 8),
        },
    ),
    *expand(
        "utter-project",
        _EURO,
        {
            "EuroLLM-1.7B EuroLLM-1.7B-Instruct": size(24, 16, 2048, 5632, 8),
            "EuroLLM-9B EuroLLM-9B-Instruct": size(42, 32, 4096, 12288, 8),
        },
    ),
]

SIZES = sizes(rms_norm_eps=Key("norm_eps", 1e-6))
SILU = {"hidden_act": ("silu", "swish")}

# Tensor names, which other families share.
ATTENTION = {
    "self_attn.q_proj": "attn.qkv q",
    "self_attn.k_proj": "attn.qkv k",
    "self_attn.v_proj": "attn.qkv v",
    "self_attn.o_proj": "attn.proj",
}
PAIRED = {**ATTENTION, "self_attn.q_proj": "attn.qkv q pairs", "self_attn.k_proj": "attn.qkv k pairs"}  # neighbours are rotated
QK_NORMS = {"self_attn.q_norm": "attn.norm_q", "self_attn.k_norm": "attn.norm_k"}
NORMS = {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2"}
MLP = {"mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2", "mlp.down_proj": "mlp.proj"}
LAYERS = "model.layers.{}"
ENDS = {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "lm_head": "lm_head"}
NAMES = table(LAYERS, {**NORMS, **ATTENTION, **MLP}, ENDS)

STYLES = {
    "Platypus": plain("platypus", text="### Instruction:\n\n{prompt}\n\n### Response:\n"),
    "NousResearch": plain("nous-research", text=INSTRUCTION + RESPONSE),
    "FreeWilly2": plain(
        "freewilly2",
        system="This is a system prompt, please behave and help the user.",
        text="### System:\n{system}\n\n### User:\n{prompt}\n\n### Assistant:\n",
    ),
    "Vicuna": plain(
        "vicuna",
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        text="{system} USER: {prompt} ASSISTANT:",
        gap=" ",
    ),
    "Llama2": turns(
        "llama2",
        system="You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your "
        "answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your "
        "responses are socially unbiased and positive in nature.\n\nIf a question does not make any sense, or is not factually coherent, "
        "explain why instead of answering something not correct. If you don't know the answer to a question, please don't share false "
        "information.",
        system_turn="<<SYS>>\n{}\n<</SYS>>\n\n",
        system_in_user=True,
        user_turn="[INST] {} [/INST]",
        gap=" ",
        end_of_turn="</s>",
        between="<s>",
    ),
    "CodeLlama": like("Llama2", "codellama", system=""),
    "Llama2FunctionCalling": turns(
        "llama2-function-calling",
        system_turn="<FUNCTIONS>{}</FUNCTIONS>\n\n",
        user_turn="[INST] {} [/INST]\n\n",
        end_of_turn="</s>",
        between="<s>",
    ),  # the system text is the list of functions, as JSON
    "Llama3": turns(
        "llama3",
        system="You are a helpful assistant.",
        start="<|begin_of_text|>",
        **by_role("<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>"),
    ),
    "TinyLlama": turns(
        "tinyllama",
        system="You are a friendly chatbot who always gives helpful, detailed, and polite answers.",
        **by_role("<|ROLE|>\n", "</s>", "\n"),
    ),
    "Falcon3": turns("falcon3", **by_role("<|ROLE|>\n", "\n") | {"end_of_turn": "<|endoftext|>", "between": "\n"}),
    "SmolLM2": like("ChatML", "smollm2", system="You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "Salamandra": like("ChatML", "salamandra"),  # its own template has a default system text that this style leaves out
}

FAMILY = Family(
    MODELS,
    hf={
        "llama": Architecture("LlamaForCausalLM", NAMES, SIZES, DECODER, SILU, (BIASES, rope())),
    },
    gguf={
        "llama": Gguf(DECODER, (*WINDOW, *EXPERTS[:2]), by_tensors=("bias", "attn_bias"), hub=("llama", "mistral", "mixtral"), paired=True)
    },
    prompts={
        "smollm2.*instruct": "smollm2",
        "tiny-?llama.*chat": "tinyllama",
        "code-?llama": "codellama",
        "llama-?3.*instruct": "llama3",
        "llama-?2.*function-calling": "llama2-function-calling",
        "llama-?2.*chat": "llama2",
        "freewilly2": "freewilly2",
        "salamandra.*instruct": "salamandra",
        "falcon3.*instruct": "falcon3",
        "vicuna|longchat": "vicuna",
        "platypus": "platypus",
        "nous-hermes": "nous-research",
        "danube3.*chat": "h2oai",
        "r1-distill-llama": "r1-base",
    },
    styles=STYLES,
    pretokenizers={**dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), LLAMA_3), "smollm": DIGITS},
)
