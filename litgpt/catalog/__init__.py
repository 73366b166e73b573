"""Named models and Hugging Face architectures, as data: a module per family with `MODELS` and `ARCHITECTURES`.

`MODELS` maps names to rows (`_rows.expand`); `ARCHITECTURES` maps `model_type` of a Hugging Face config.json to a function that turns that
config into `litgpt.Config` fields.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from litgpt.catalog import llama, mistral, neox

_FAMILIES = (llama, mistral, neox)
_MODELS: dict[str, dict[str, Any]] = {row["name"]: row for family in _FAMILIES for row in family.MODELS}
_BY_HUB_NAME: dict[str, dict[str, Any]] = {row["hf_config"]["name"]: row for row in _MODELS.values()}
_ARCHITECTURES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    kind: build for family in _FAMILIES for kind, build in family.ARCHITECTURES.items()
}


def names() -> list[str]:
    """Every named model, sorted."""
    return sorted(_MODELS)


def find(name: str) -> dict[str, Any] | None:
    """Config fields of a model by LitGPT's name or the hub's, with or without the organisation; None if unknown."""
    organisation, _, short = name.rpartition("/")
    row = _MODELS.get(short) or _BY_HUB_NAME.get(short)
    if row is None or (organisation and organisation != row["hf_config"]["org"]):
        return None
    return dict(row)


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """Config fields for the content of a Hugging Face config.json. ValueError for what is unsupported, KeyError for a missing key."""
    kind = hf.get("model_type")
    if kind not in _ARCHITECTURES:
        raise ValueError(f"model_type {kind!r} is not supported; supported are {', '.join(sorted(_ARCHITECTURES))}")
    fields = _ARCHITECTURES[kind](hf)
    organisation, _, short = str(hf.get("_name_or_path") or kind).rpartition("/")
    return {"name": short, "hf_config": {"org": organisation, "name": short}, **fields}
