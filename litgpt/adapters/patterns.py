"""Patterns of layer names, PEFT's `rank_pattern` and `alpha_pattern`, which give layers their own rank and alpha. Light.

A *unit* is a linear layer, `transformer.h.3.mlp.fc_1`, or a part of the joined projection, `transformer.h.3.attn.qkv:q`. A pattern is its
name, a suffix of it after a dot, or a regular expression for either, in the names of this package or of transformers' Llama:

    attn.qkv                                 all adapted parts of q, k and v
    attn.q_proj, attn.k_proj, attn.v_proj    one of them, also self_attn.q_proj, ...
    attn.proj                                self_attn.o_proj
    mlp.fc_1, mlp.fc_2, mlp.proj             mlp.gate_proj, mlp.up_proj, mlp.down_proj
    mlp.fc, mlp.gate, mlp.experts.0.fc_1     only these names; lm_head, in any family
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from litgpt.args import Range
from litgpt.errors import UserError

PARTS = ("q", "k", "v")  # of the joined projection
MAX_LENGTH = 200
REPEATED_GROUP = re.compile(r"\)[*+?]?[*+{]")  # they may take exponential time
LLAMA = {"attn.proj": "self_attn.o_proj", "mlp.fc_1": "mlp.gate_proj", "mlp.fc_2": "mlp.up_proj", "mlp.proj": "mlp.down_proj"}


def wrong(pattern: str) -> str:
    """Return what is wrong with a regular expression; "" if it can be used."""
    if len(pattern) > MAX_LENGTH or REPEATED_GROUP.search(pattern):
        return f"it repeats a group, or is longer than {MAX_LENGTH} characters"
    try:
        re.compile(pattern)
    except re.error as error:
        return f"it is not a regular expression: {error}"
    return ""


def matching(patterns: Iterable[str], *names: str) -> str | None:
    """Return the first pattern that matches a layer's name, in full or its suffix after a dot, as in PEFT; None if there is none."""
    return next((pattern for pattern in patterns if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)), None)


@cache
def names_of(unit: str) -> tuple[str, ...]:
    """Return the names of a unit."""
    match = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", unit)
    if match is None:
        return (unit,)
    index, name = match.groups()
    own, llama = [name], LLAMA.get(name, "")
    if ":" in name:
        joined, _, part = name.partition(":")
        own, llama = [joined, f"attn.{part}_proj"], f"self_attn.{part}_proj"
    return (*(f"transformer.h.{index}.{name}" for name in own), *([f"model.layers.{index}.{llama}"] if llama else []))


def require_patterns(key: str, patterns: Any, numbers: Range) -> None:
    """Raise UserError, naming `key`, for patterns that are not regular expressions, or a value out of range."""
    if not isinstance(patterns, Mapping):
        raise UserError(f"{key} is {str(patterns)[:60]}: give names of layers with a value each, such as {{q_proj: 4}}")
    for pattern, value in patterns.items():
        if problem := wrong(str(pattern)):
            raise UserError(f"{key} has {str(pattern)[:60]!r}: {problem}")
        if not numbers.holds(value):
            raise UserError(f"{key}.{pattern} is {str(value)[:60]!r}: {numbers} is needed")


def require_used(key: str, patterns: Iterable[str], units: Iterable[str]) -> None:
    """Raise UserError, naming `key`, for patterns that match no unit, or only those that an earlier pattern matches."""
    units = list(units)
    used = {matching(patterns, *names_of(unit)) for unit in units}
    if unused := [pattern for pattern in patterns if pattern not in used]:
        kinds = ", ".join(dict.fromkeys(within_block(_own_name(unit)) for unit in units)) or "none"
        raise UserError(
            f"{key} names {', '.join(map(repr, unused))}, which fits no layer with LoRA, or none that an earlier pattern leaves. "
            f"Layers with LoRA: {kinds[:200]}"
        )


def _own_name(unit: str) -> str:
    return names_of(unit)[1 if ":" in unit else 0]


def within_block(name: str) -> str:
    """Return a layer's name within its block: model.layers.3.mlp.up_proj -> mlp.up_proj."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def compact(
    values: Mapping[str, Any], default: Any, name_of: Callable[[str], str] = _own_name, kind_of: Callable[[str], str] = within_block
) -> dict[str, Any] | None:
    """Return patterns that give layers, by default units, the values that differ from the default; None if none does."""
    named = {name_of(layer): value for layer, value in values.items()}
    kinds: dict[str, set[Any]] = {}
    for name, value in named.items():
        kinds.setdefault(kind_of(name), set()).add(value)
    return {kind_of(name) if len(kinds[kind_of(name)]) == 1 else name: v for name, v in named.items() if v != default} or None
