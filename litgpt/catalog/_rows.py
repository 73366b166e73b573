"""Helpers that the family tables share: expand compact rows, read the rotary settings of a Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def expand(org: str, shared: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Config fields per model. A key of `rows` is one or more names separated by blanks; `name=hub-name` where the hub's differs."""
    models = []
    for names, row in rows.items():
        for entry in names.split():
            name, _, hub = entry.partition("=")
            models.append({"name": name, "hf_config": {"org": org, "name": hub or name}, **shared, **row})
    return models


def rope_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """rope_base, rope_adjustments and rope_condense_ratio from `rope_theta` / `rope_scaling`, or transformers 5's `rope_parameters`."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    fields: dict[str, Any] = {"rope_base": int(rope.get("rope_theta") or hf.get("rope_theta") or hf.get("rotary_emb_base") or 10000)}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "linear":
        factor = float(rope["factor"])
        fields["rope_condense_ratio"] = int(factor) if factor.is_integer() else factor
    elif kind == "llama3":
        fields["rope_adjustments"] = {
            "factor": float(rope["factor"]),
            "low_freq_factor": float(rope["low_freq_factor"]),
            "high_freq_factor": float(rope["high_freq_factor"]),
            "original_max_seq_len": int(rope["original_max_position_embeddings"]),
        }
    elif kind != "default":
        raise ValueError(f"rotary scaling {kind!r} is not supported; supported are default, linear, llama3")
    return fields


def require(hf: dict[str, Any], key: str, supported: tuple[Any, ...], default: Any) -> Any:
    """`hf[key]`, or the default; ValueError if the value is not one of those supported."""
    value = hf.get(key, default)
    if value not in supported:
        raise ValueError(f"{key} {value!r} is not supported; supported: {', '.join(map(repr, supported))}")
    return value
