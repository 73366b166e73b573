"""Gemma: scaled embeddings, GeGLU, RMSNorm by 1 + weight. Gemma 2 adds norms on outputs and local attention, Gemma 3 a second rotary base.

VaultGemma is Gemma 2 without the norms on outputs.
"""

from __future__ import annotations

from typing import Any

from litgpt.families._architecture import Architecture, Aspect, Fields, Hf, Key, local_windows, sizes, table, without
from litgpt.families._family import Family
from litgpt.families._gguf import WINDOW, Gguf
from litgpt.families._rope import read_two_bases, rope, write_scaling
from litgpt.families._rows import expand, size
from litgpt.families._styles import turns
from litgpt.families.llama import ATTENTION, DECODER, ENDS, LAYERS, MLP, NAMES, QK_NORMS

_GEMMA = {**DECODER, "mlp_class_name": "GemmaMLP", "gelu_approximate": "tanh", "scale_embeddings": True}
_GEMMA_2 = {**_GEMMA, "post_attention_norm": True, "post_mlp_norm": True}
_GEMMA_3 = {**_GEMMA_2, "norm_qk": True}

_1 = {**_GEMMA, "norm_eps": 1e-6, "vocab_size": 256000, "padding_multiple": 64, "head_size": 256}
_CAPS = {"attention_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_2 = {**_GEMMA_2, **_CAPS, "norm_eps": 1e-6, "block_size": 8192, "vocab_size": 256000, "padded_vocab_size": 256000}
_3 = {**_GEMMA_3, "norm_eps": 1e-6, "block_size": 131072, "rope_base": 1000000, "rope_local_base_freq": 10000}
_IMAGES = {"rope_adjustments": {"factor": 8.0}, "vocab_size": 262144, "padded_vocab_size": 262208}


def _2_size(head_size: int, scalar: int, row: dict[str, Any]) -> dict[str, Any]:
    blocks = [int(i % 2 == 0) for i in range(row["n_layer"])]
    windows = {"sliding_window_size": 4096, "sliding_window_indices": blocks}
    return {**row, **windows, "head_size": head_size, "attention_scores_scalar": scalar}


def _3_size(window: int, head_size: int, scalar: int, row: dict[str, Any]) -> dict[str, Any]:
    blocks = [int((i + 1) % 6 != 0) for i in range(row["n_layer"])]
    windows = {"sliding_window_size": window, "sliding_window_indices": blocks, "rope_indices": blocks}
    return {**row, **windows, "head_size": head_size, "attention_scores_scalar": scalar}


def _hub(*names: str) -> str:
    """Return rows' names with the hub's, which are in small letters."""
    return " ".join(f"{name}={name.lower()}" for name in names)


MODELS = [
    *expand(
        "google",
        _1,
        {
            _hub("Gemma-2b", "Gemma-2b-it"): size(18, 8, 2048, 16384, 1),
            _hub("Gemma-7b", "Gemma-7b-it", "CodeGemma-7b-it"): size(28, 16, 3072, 24576),
        },
    ),
    *expand(
        "google",
        _2,
        {
            _hub("Gemma-2-2b", "Gemma-2-2b-it"): _2_size(256, 256, size(26, 8, 2304, 9216, 4)),
            _hub("Gemma-2-9b", "Gemma-2-9b-it"): _2_size(256, 256, size(42, 16, 3584, 14336, 8)),
            _hub("Gemma-2-27b", "Gemma-2-27b-it"): _2_size(128, 144, size(46, 32, 4608, 36864, 16)),
        },
    ),
    *expand(
        "google",
        {**_3, "vocab_size": 262144, "padded_vocab_size": 262144},
        {
            _hub("Gemma-3-270m", "Gemma-3-270m-it"): {**_3_size(512, 256, 256, size(18, 4, 640, 2048, 1)), "block_size": 32768},
            _hub("Gemma-3-1b-pt", "Gemma-3-1b-it"): _3_size(512, 256, 256, size(26, 4, 1152, 6912, 1)),
        },
    ),
    *expand(
        "google",
        {**_3, **_IMAGES},
        {
            _hub("Gemma-3-4b-pt", "Gemma-3-4b-it"): _3_size(1024, 256, 256, size(34, 8, 2560, 10240, 4)),
            _hub("Gemma-3-12b-pt", "Gemma-3-12b-it"): _3_size(1024, 256, 256, size(48, 16, 3840, 15360, 8)),
            _hub("Gemma-3-27b-pt", "Gemma-3-27b-it"): _3_size(1024, 128, 168, size(62, 32, 5376, 21504, 16)),
        },
    ),
]

_ACCEPTS = {"attention_bias": (False,), "use_bidirectional_attention": (None, False)}
_TANH = ("gelu_pytorch_tanh", None, "gelu_new")


def _read_3(hf: Hf) -> Fields:
    period = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or 6
    local = local_windows(4096, lambda i: (i + 1) % period != 0).read(hf)
    return {**local, "rope_indices": local["sliding_window_indices"], **read_two_bases(hf, 1000000, 10000)}


def _write_3(fields: Fields) -> dict[str, Any]:
    bases = {"rope_theta": float(fields["rope_base"]), "rope_local_base_freq": float(fields["rope_local_base_freq"] or 10000)}
    scaling = write_scaling(fields)
    if "type" in (kind := scaling["rope_scaling"] or {}):  # the older name, which counts for nothing here
        kind["rope_type"] = kind.pop("type")
    return {**local_windows(4096).write(fields), **bases, **scaling}


def _keys(**others: Key) -> dict[str, Key]:
    return sizes(head_dim=Key("head_size", 256), rms_norm_eps=Key("norm_eps", 1e-6), **others)


_SOFT_CAPPED = {
    "query_pre_attn_scalar": Key("attention_scores_scalar", 256),
    "attn_logit_softcapping": Key("attention_logit_softcapping", 50.0),
    "final_logit_softcapping": Key("final_logit_softcapping", 30.0),
}
_TEXT_3 = {  # the files of the models with images leave out transformers' defaults
    "max_position_embeddings": Key("block_size", 131072),
    "vocab_size": Key("padded_vocab_size", 262208),
    "num_attention_heads": Key("n_head", 8),
    "num_key_value_heads": Key("n_query_groups", 4),
    "query_pre_attn_scalar": Key("attention_scores_scalar", 256),
    "final_logit_softcapping": Key("final_logit_softcapping", None),
}

_NORMS_2 = {
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "norm_2",
    "post_feedforward_layernorm": "post_mlp_norm",
}
_NAMES_2 = {**_NORMS_2, **ATTENTION, **MLP}

STYLES = {
    "Gemma": turns(
        "gemma",
        system_turn="{}\n\n",
        system_in_user=True,
        user_turn="<start_of_turn>user\n{}<end_of_turn>\n",
        reply_head="<start_of_turn>model\n",
        end_of_turn="<end_of_turn>",
        between="\n",
    ),
}

FAMILY = Family(
    MODELS,
    hf={
        "gemma": Architecture(
            "GemmaForCausalLM",
            NAMES,
            _keys(),
            _GEMMA,
            {**_ACCEPTS, "hidden_act": ("gelu_pytorch_tanh", "gelu", "gelu_new"), "hidden_activation": (None, *_TANH)},
            (rope(),),
            tied=True,
        ),
        "gemma2": Architecture(
            "Gemma2ForCausalLM",
            table(LAYERS, _NAMES_2, ENDS),
            _keys(**_SOFT_CAPPED),
            _GEMMA_2,
            {**_ACCEPTS, "hidden_activation": _TANH},
            (local_windows(4096, lambda i: i % 2 == 0), rope()),
            tied=True,
        ),
        "vaultgemma": Architecture(
            "VaultGemmaForCausalLM",
            table(LAYERS, without(_NAMES_2, "post_attention_layernorm", "post_feedforward_layernorm"), ENDS),
            _keys(**_SOFT_CAPPED),
            _GEMMA,
            {**_ACCEPTS, "hidden_activation": _TANH},
            (local_windows(4096, lambda i: i % 2 == 0), rope()),
            tied=True,
        ),
        "gemma3_text": Architecture(
            "Gemma3ForCausalLM",
            table(LAYERS, {**_NAMES_2, **QK_NORMS}, ENDS),
            _keys(**_TEXT_3),
            _GEMMA_3,
            {**_ACCEPTS, "hidden_activation": _TANH, "attn_logit_softcapping": (None,)},
            (Aspect(_read_3, _write_3),),
            tied=True,
            # with images: in files, and in transformers 5's memory
            spellings=((r"^language_model\.", ""), (r"^model\.language_model\.", "model.")),
        ),
    },
    gguf={
        "gemma": Gguf(_GEMMA),
        "gemma2": Gguf(_GEMMA_2, (*WINDOW, "attn_logit_softcapping", "final_logit_softcapping"), window_period=2, square_heads=46),
        "gemma3": Gguf(_GEMMA_3, (*WINDOW, "rope.freq_base_swa"), hub=("gemma3_text", "gemma3"), window_period=6, square_heads=62),
    },
    prompts={"gemma.*-it": "gemma"},
    styles=STYLES,
    multimodal={"gemma3": "gemma3_text"},
)
