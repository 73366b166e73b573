"""GPT-2: learned positions instead of rotary ones, LayerNorm, GELU by its tanh approximation, biases, tied head."""

from __future__ import annotations

from litgpt.families._architecture import Architecture, Key, activation
from litgpt.families._rows import expand

_GPT_2 = {"learned_positions": True, "rotary_percentage": 0.0, "parallel_residual": False}
_MODEL = {**_GPT_2, "gelu_approximate": "tanh", "block_size": 1024, "vocab_size": 50257, "padded_vocab_size": 50257}

MODELS = expand(
    "openai-community",
    _MODEL,
    {
        "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768},
        "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
        "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
        "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    },
) + expand("distilbert", _MODEL, {"distilgpt2": {"n_layer": 6, "n_head": 12, "n_embd": 768}})

_KEYS = {
    "n_positions": Key("block_size", 1024),
    "vocab_size": Key("padded_vocab_size"),
    "n_layer num_hidden_layers": Key("n_layer"),
    "n_head num_attention_heads": Key("n_head"),
    "n_embd hidden_size": Key("n_embd"),
    "n_inner": Key("intermediate_size", None),
    "layer_norm_epsilon": Key("norm_eps", 1e-5),
}

ARCHITECTURES = {
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        _KEYS,
        _GPT_2,
        {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
        (activation("activation_function", "gelu_new"),),
    )
}
