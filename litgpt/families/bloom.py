"""BLOOM and BLOOMZ: ALiBi, normalised embeddings, biases everywhere."""

from __future__ import annotations

from litgpt.families._architecture import FOUR_TIMES, Architecture, Key, table
from litgpt.families._family import Family
from litgpt.families._rows import expand

_BLOOM = {
    "parallel_residual": False,
    "rotary_percentage": 0.0,
    "alibi": True,
    "norm_embedding": True,
    "gelu_approximate": "tanh",
}
_SIZES = {
    name: {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    for name, n_layer, n_head, n_embd in (
        ("-560m", 24, 16, 1024),
        ("-1b1", 24, 16, 1536),
        ("-1b7", 24, 16, 2048),
        ("-3b", 30, 32, 2560),
        ("-7b1", 30, 32, 4096),
        ("", 70, 112, 14336),
    )
}

MODELS = expand(
    "bigscience",
    {**_BLOOM, "block_size": 2048, "vocab_size": 250880, "padded_vocab_size": 250880},
    {f"bloom{name} bloomz{name}": row for name, row in _SIZES.items()},
)

_KEYS = {
    "seq_length": Key("block_size", 2048),  # of the training; ALiBi has no limit
    "vocab_size": Key("padded_vocab_size", 250880),
    "n_layer num_hidden_layers": Key("n_layer", 2),
    "n_head num_attention_heads": Key("n_head", 8),
    "hidden_size n_embed": Key("n_embd", 64),
    "layer_norm_epsilon": Key("norm_eps", 1e-5),
}

_NAMES = table(
    "transformer.h.{}",
    {
        "input_layernorm": "norm_1",
        "self_attention.query_key_value": "attn.qkv qkv grouped",
        "self_attention.dense": "attn.proj",
        "post_attention_layernorm": "norm_2",
        "mlp.dense_h_to_4h": "mlp.fc",
        "mlp.dense_4h_to_h": "mlp.proj",
    },
    {
        "transformer.word_embeddings": "transformer.wte",
        "transformer.word_embeddings_layernorm": "transformer.norm_emb",
        "transformer.ln_f": "transformer.ln_f",
        "lm_head": "lm_head",
    },
)

FAMILY = Family(
    MODELS,
    hf={
        "bloom": Architecture(
            "BloomForCausalLM",
            _NAMES,
            _KEYS,
            _BLOOM,
            {"apply_residual_connection_post_layernorm": (False,)},
            (FOUR_TIMES,),
            tied=True,
            spellings=((r"^(?=(h|word_embeddings|word_embeddings_layernorm|ln_f)\.)", "transformer."),),  # the model without its head
        )
    },
)
