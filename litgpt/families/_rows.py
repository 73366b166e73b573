"""Compact rows of named models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def expand(org: str, shared: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the Config fields of each model.

    A key of `rows` is one or more names separated by blanks; `name=hub-name` where the hub's differs.
    """
    models = []
    for names, row in rows.items():
        for entry in names.split():
            name, _, hub = entry.partition("=")
            models.append({"name": name, "hf_config": {"org": org, "name": hub or name}, **shared, **row})
    return models


def size(n_layer: int, n_head: int, n_embd: int, intermediate_size: int, n_query_groups: int | None = None) -> dict[str, Any]:
    """Return the five sizes in which the models of a family differ; without groups every head has its own keys and values."""
    row = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "intermediate_size": intermediate_size}
    return row if n_query_groups is None else {**row, "n_query_groups": n_query_groups}
