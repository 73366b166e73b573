"""GPT-NeoX: Pythia, StableLM alpha. LayerNorm, parallel residual, rotary on a quarter of each head, biases, untied head."""

from __future__ import annotations

from typing import Any

from litgpt.families._architecture import Architecture, Key, activation, sizes, table, without
from litgpt.families._family import Family
from litgpt.families._gguf import Gguf
from litgpt.families._rope import rope
from litgpt.families._rows import expand
from litgpt.families._styles import plain, turns

_PYTHIA = {"block_size": 2048, "padding_multiple": 128}
_SIZES: dict[str, dict[str, Any]] = {
    "14m": {"block_size": 512, "n_layer": 6, "n_embd": 128, "n_head": 4},
    "31m": {"block_size": 1024, "n_layer": 6, "n_embd": 256, "n_head": 8},
    "70m": {"n_layer": 6, "n_embd": 512, "n_head": 8},
    "160m": {"n_layer": 12, "n_embd": 768, "n_head": 12},
    "410m": {"n_layer": 24, "n_embd": 1024, "n_head": 16},
    "1b": {"n_layer": 16, "n_embd": 2048, "n_head": 8},
    "1.4b": {"n_layer": 24, "n_embd": 2048, "n_head": 16},
    "2.8b": {"n_layer": 32, "n_embd": 2560, "n_head": 32},
    "6.9b": {"n_layer": 32, "padding_multiple": 256},
    "12b": {"padding_multiple": 512, "n_layer": 36, "n_embd": 5120, "n_head": 40},
}
_NOT_DEDUPED = ("14m", "31m")

_STABLECODE = {"padded_vocab_size": 49152, "n_layer": 32, "n_embd": 2560}

MODELS = [
    *expand("EleutherAI", _PYTHIA, {f"pythia-{size}": row for size, row in _SIZES.items()}),
    *expand("EleutherAI", _PYTHIA, {f"pythia-{size}-deduped": row for size, row in _SIZES.items() if size not in _NOT_DEDUPED}),
    *expand(
        "EleutherAI",
        {"block_size": 2048, "padded_vocab_size": 50432},
        {"gpt-neox-20b": {"n_layer": 44, "n_head": 64, "n_embd": 6144, "gelu_approximate": "tanh"}},
    ),
    *expand(
        "stabilityai",
        {},
        {
            "stablelm-base-alpha-3b stablelm-tuned-alpha-3b": {},
            "stablelm-base-alpha-7b stablelm-tuned-alpha-7b": {"n_head": 48, "n_embd": 6144, "padding_multiple": 256},
            "stablecode-completion-alpha-3b": {**_STABLECODE, "block_size": 16384},
            "stablecode-completion-alpha-3b-4k stablecode-instruct-alpha-3b": _STABLECODE,
        },
    ),
]

_KEYS = sizes(layer_norm_eps=Key("norm_eps", 1e-5), use_parallel_residual=Key("parallel_residual", True))

_NAMES = table(
    "gpt_neox.layers.{}",
    {
        "input_layernorm": "norm_1",
        "attention.query_key_value": "attn.qkv qkv grouped",
        "attention.dense": "attn.proj",
        "post_attention_layernorm": "norm_2",
        "mlp.dense_h_to_4h": "mlp.fc",
        "mlp.dense_4h_to_h": "mlp.proj",
    },
    {"gpt_neox.embed_in": "transformer.wte", "gpt_neox.final_layer_norm": "transformer.ln_f", "embed_out": "lm_head"},
)

STYLES = {
    "TogetherComputerChat": plain("togethercomputer-chat", text="<human>: {prompt}\n<bot>:", gap=" "),
    "TogetherComputerInstruct": plain("togethercomputer-instruct", text="Q: {prompt}\nA:", gap=" "),
    "StableCode": plain("stablecode", text="###Instruction\n{prompt}###Response\n"),
    "StableLMAlpha": turns(
        "stablelm-alpha",
        system="# StableLM Tuned (Alpha version)\n"
        "- StableLM is a helpful and harmless open-source AI language model developed by StabilityAI.\n"
        "- StableLM is excited to be able to help the user, but will refuse to do anything that could be considered harmful to the user.\n"
        "- StableLM is more than just an information source, StableLM is also able to write poetry, short stories, and make jokes.\n"
        "- StableLM will refuse to participate in anything that could harm a human.\n",
        system_turn="<|SYSTEM|>{}",
        user_turn="<|USER|>{}",
        reply_head="<|ASSISTANT|>",
        marker="<|ASSISTANT|>",
    ),
}

FAMILY = Family(
    MODELS,
    hf={
        "gpt_neox": Architecture(
            "GPTNeoXForCausalLM",
            _NAMES,
            without(_KEYS, "num_key_value_heads", "head_dim"),
            accepts={"attention_bias": (True,)},
            aspects=(activation("hidden_act", "gelu"), rope(partial=0.25, theta_key="rotary_emb_base", partial_key="rotary_pct")),
            spellings=((r"^lm_head\.", "embed_out."),),  # in transformers 5's memory
            ignored=r".*\.attention\.(bias|masked_bias)",
        )
    },
    gguf={"gptneox": Gguf({"bias": True}, ("use_parallel_residual",), hub=("gpt_neox",), joined=True)},
    prompts={
        "stablelm-(tuned|alpha).*alpha": "stablelm-alpha",
        "stablecode-instruct": "stablecode",
        "redpajama.*chat": "togethercomputer-chat",
        "redpajama.*instruct": "togethercomputer-instruct",
    },
    styles=STYLES,
)
