"""GPT-2: learned positions instead of rotary ones, LayerNorm, GELU by its tanh approximation, biases, tied head."""

from __future__ import annotations

from litgpt.families._architecture import Architecture, Key, activation, table
from litgpt.families._family import Family
from litgpt.families._gguf import Gguf
from litgpt.families._pretokenizers import GPT_2
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
    "n_positions max_position_embeddings": Key("block_size", 1024),
    "vocab_size": Key("padded_vocab_size"),
    "n_layer num_hidden_layers": Key("n_layer"),
    "n_head num_attention_heads": Key("n_head"),
    "n_embd hidden_size": Key("n_embd"),
    "n_inner": Key("intermediate_size", None),
    "layer_norm_epsilon": Key("norm_eps", 1e-5),
}

_NAMES = table(
    "transformer.h.{}",
    {
        "ln_1": "norm_1",
        "attn.c_attn": "attn.qkv transposed",
        "attn.c_proj": "attn.proj transposed",
        "ln_2": "norm_2",
        "mlp.c_fc": "mlp.fc transposed",
        "mlp.c_proj": "mlp.proj transposed",
    },
    {
        "transformer.wte": "transformer.wte",
        "transformer.wpe": "transformer.wpe",
        "transformer.ln_f": "transformer.ln_f",
        "lm_head": "lm_head",
    },
)

FAMILY = Family(
    MODELS,
    hf={
        "gpt2": Architecture(
            "GPT2LMHeadModel",
            _NAMES,
            _KEYS,
            _GPT_2,
            {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
            (activation("activation_function", "gelu_new"),),
            tied=True,
            spellings=((r"^(?=(h|wte|wpe|ln_f)\.)", "transformer."),),  # the model without its head
            ignored=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
        )
    },
    gguf={"gpt2": Gguf({**_GPT_2, "bias": True, "gelu_approximate": "tanh"}, joined=True)},
    pretokenizers={"gpt-2": GPT_2},
)
