"""Named models and Hugging Face architectures, as data: a module per family with `MODELS` and `ARCHITECTURES`.

`MODELS` holds rows of `litgpt.Config` fields (`_rows.expand`). `ARCHITECTURES` maps the `model_type` of a Hugging Face config.json to a
table that reads it into such fields and writes it from them (`_architecture.Architecture`). A new family is a module here.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from litgpt.families import falcon, gemma, gpt2, granite, llama, mistral, neox, olmo, phi, qwen, smollm, stablelm

if TYPE_CHECKING:
    from litgpt.config import Config
    from litgpt.families._architecture import Architecture

_FAMILIES = (llama, mistral, qwen, gemma, phi, neox, stablelm, olmo, falcon, granite, smollm, gpt2)
_MODELS: dict[str, dict[str, Any]] = {row["name"]: row for family in _FAMILIES for row in family.MODELS}
_BY_HUB_NAME: dict[str, dict[str, Any]] = {row["hf_config"]["name"]: row for row in _MODELS.values()}
_ARCHITECTURES: dict[str, Architecture] = {kind: entry for family in _FAMILIES for kind, entry in family.ARCHITECTURES.items()}
_WHY_NOT = {
    "qwen2_moe": "experts that every token shares",
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention",
    "bloom": "ALiBi",
    "mpt": "ALiBi",
    "gptj": "interleaved rotary positions",
    "cohere": "interleaved rotary positions",
    "cohere2": "interleaved rotary positions",
    "opt": "learned positions with an offset, and ReLU",
    "gpt_bigcode": "learned positions with multi-query attention",
    "gpt_oss": "attention sinks",
    "mamba": "state spaces instead of attention",
    "mamba2": "state spaces instead of attention",
}
"""what keeps other common architectures from being built"""


def names() -> list[str]:
    """Every named model, sorted."""
    return sorted(_MODELS)


def find(name: str) -> dict[str, Any] | None:
    """Config fields of a model by LitGPT's name or the hub's, with or without the organisation; None if unknown."""
    organisation, _, short = name.rpartition("/")
    row = _MODELS.get(short) or _BY_HUB_NAME.get(short)
    if row is None or (organisation and organisation != row["hf_config"]["org"]):
        return None
    return copy.deepcopy(row)


def architectures() -> list[str]:
    """Every `model_type` that can be read and written, sorted."""
    return sorted(_ARCHITECTURES)


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """Config fields for the content of a Hugging Face config.json; of a Gemma 3 with images its text model's.

    ValueError lists all that the file lacks or that cannot be built.
    """
    name = hf.get("_name_or_path")
    if hf.get("model_type") == "gemma3" and isinstance(hf.get("text_config"), dict):
        hf = {"model_type": "gemma3_text", **hf["text_config"]}
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        reason = f" ({_WHY_NOT[str(kind)]})" if str(kind) in _WHY_NOT else ""
        raise ValueError(f"model_type {kind!r} is not supported{reason}; supported are {', '.join(architectures())}")
    fields = _ARCHITECTURES[kind].read(hf)
    organisation, _, short = str(name or kind).rpartition("/")
    return {"name": short, "hf_config": {"org": organisation, "name": short}, **fields}


def model_type(config: Config, prefer: str | None = None) -> str:
    """The architecture that computes what the config computes: `prefer` if it does, else one of the named model's family, else the first.

    ValueError says what keeps the nearest one from it.
    """
    return _express(config, prefer)[0]


def to_hf(config: Config, prefer: str | None = None) -> dict[str, Any]:
    """config.json of `model_type(config, prefer)`: `from_hf` reads the same model from it.

    Whether the head is tied, the dtype and the ids of special tokens are for the caller to add.
    """
    return _express(config, prefer)[1]


def _express(config: Config, prefer: str | None) -> tuple[str, dict[str, Any]]:
    """An architecture expresses a config if what it writes is read back as the same."""
    from litgpt.config import Config

    wanted = essence(config)
    home = next((family for family in _FAMILIES if any(row["name"] == config.name for row in family.MODELS)), None)
    wished = (kind for kind in (prefer, config.name) if kind in _ARCHITECTURES)
    nearest: tuple[str, list[str]] | None = None
    for kind in (*wished, *(home.ARCHITECTURES if home else ()), *_ARCHITECTURES):
        try:
            hf = _ARCHITECTURES[kind].write(config, kind)
            found = essence(Config(**_ARCHITECTURES[kind].read(hf)))
        except ValueError:  # UserError is one
            continue
        differing = [f"{key} {found[key]!r} instead of {value!r}" for key, value in wanted.items() if not _same(found[key], value)]
        if not differing:
            return kind, hf
        if nearest is None or len(differing) < len(nearest[1]):
            nearest = kind, differing
    reason = f"; the nearest, {nearest[0]}, has {', '.join(nearest[1])}" if nearest else ""
    raise ValueError(f"no architecture of transformers expresses this model{reason}")


def _same(one: Any, other: Any) -> bool:
    return one == other or (isinstance(one, float) and isinstance(other, int | float) and math.isclose(one, other, rel_tol=1e-12))


def essence(config: Config) -> dict[str, Any]:
    """The fields that decide what a model computes, unused ones at one value, so that configs that compute the same are equal."""
    f = config.base_dict()
    for key in ("name", "hf_config", "vocab_size", "padding_multiple"):
        del f[key]
    f["rotary_percentage"] = config.rope_n_elem
    f["attention_scores_scalar"] = f["attention_scores_scalar"] or config.head_size
    f["attn_bias"] = config.attn_bias or config.bias
    if not config.norm_qk:
        f["norm_qk_type"] = None
    if config.sliding_window_size is None or not any(config.sliding_window_indices or ()):
        f["sliding_window_size"] = f["sliding_window_indices"] = None
    if config.rope_indices is None or not any(config.rope_indices):
        f["rope_indices"] = None
    if 1 not in (config.rope_indices or ()):
        f["rope_local_base_freq"] = None
        if config.rope_adjustments and config.rope_kind == "linear":
            f["rope_condense_ratio"], f["rope_adjustments"] = f["rope_condense_ratio"] * config.rope_adjustments["factor"], None
    if config.learned_positions:
        for key in [key for key in f if key.startswith(("rope_", "rotary_"))]:
            f[key] = None
    experts = config.mlp_class_name == "LLaMAMoE"
    if experts:
        f["intermediate_size"] = config.moe_intermediate_size or config.intermediate_size
    for key in () if experts else ("n_expert", "n_expert_per_token", "norm_topk_prob", "router_aux_loss_coef"):
        f[key] = None
    f["moe_intermediate_size"] = None
    if config.mlp_class_name in ("LLaMAMLP", "LLaMAMoE"):
        f["gelu_approximate"] = None
    return f
