"""The settings of a sweep: all combinations of the values of a grid, each as arguments of `litgpt finetune` and a name for its folder."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from litgpt.args import Grid
from litgpt.errors import UserError
from litgpt.finetune.lora import LORA_FLAGS

VARYING = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_variant", "lora_rslora", *LORA_FLAGS, "lora_block_indices"),
    *("skip2lora_enabled", "skip2lora_block_indices", "skip2lora_r", "skip2lora_alpha", "skip2lora_dropout", "optimizer", "seed"),
    *("train.epochs", "train.max_steps", "train.max_tokens", "train.max_time", "train.global_batch_size", "train.micro_batch_size"),
    "train.group_by_length",
    *("train.lr_warmup_steps", "train.lr_warmup_fraction", "train.min_lr", "train.max_norm", "train.skip_nonfinite", "eval.patience"),
)
"""Keys that change neither the data nor what the frozen layers make of them; and all of `optimizer.*`."""
MOST = 10_000
"""settings of a sweep"""
SHORTER = {"skip2lora_block_indices": "blocks", "lora_block_indices": "lora_blocks"}
"""Keys as they are called in a folder's name; others have their last part there."""
LONGEST = 120
"""characters of a folder's name"""


@dataclass
class Variant:
    """One setting of a sweep."""

    name: str
    """of its folder in the sweep's out_dir"""
    values: dict[str, Any]
    """of the grid's keys"""
    arguments: dict[str, Any]
    """of `litgpt finetune`, as `litgpt.finetune.lora.checked` gives them; empty if the values do not go together"""
    problem: str = ""
    """why it cannot be trained"""


def expand(arguments: dict[str, Any], grid: Grid, samples: int | None = None) -> list[Variant]:
    """Every combination of the grid's values, the last key's changing fastest; or `samples` of them, drawn with the seed.

    Raises UserError for keys that may not vary and for values that are named twice.
    """
    if not grid:
        raise UserError("no grid: name what is to vary and the values to try, for example --grid.lora_r '[4, 8, 16]'")
    if samples is not None and samples < 1:
        raise UserError(f"samples is {samples}: give at least 1, or leave it out to train every setting of the grid")
    grid = _allowed(grid)
    total = math.prod(map(len, grid.values()))
    numbers: Sequence[int] = range(total)
    if samples is not None and samples < total:
        numbers = sorted(random.Random(arguments["seed"]).sample(numbers, samples))
    if len(numbers) > MOST:
        raise UserError(f"the grid has {total:,} settings, more than {MOST:,}: name fewer values, or draw some with --samples 100")
    combinations = [_combination(grid, number) for number in numbers]
    return [_variant(arguments, name, values) for name, values in zip(_names(combinations), combinations, strict=True)]


def _allowed(grid: Grid) -> Grid:
    """The grid with newer names of keys."""
    older = {"skip2lora_positions": "skip2lora_block_indices"}
    renamed = [older.get(key, key.replace("optimizer.init_args.", "optimizer.")) for key in grid]
    fixed = [key for key in renamed if key not in VARYING and not key.startswith("optimizer.")]
    if fixed:
        raise UserError(
            f"grid: {', '.join(fixed)} cannot vary: what the frozen layers make of the data is computed once, and every setting is trained "
            f"from that. These may vary: {', '.join(VARYING)}, optimizer.*. For anything else make a sweep of each value"
        )
    for key, values in zip(renamed, grid.values(), strict=True):
        (text, count), *_ = Counter(json.dumps(value, sort_keys=True) for value in values).most_common(1)
        if count > 1 or renamed.count(key) > 1:
            raise UserError(f"grid.{key} {f'names {text}' if count > 1 else 'is given'} twice: leave one out")
    return dict(zip(renamed, grid.values(), strict=True))


def _combination(grid: Grid, number: int) -> dict[str, Any]:
    """The values of combination `number`."""
    values: dict[str, Any] = {}
    for key in reversed(grid):
        number, place = divmod(number, len(grid[key]))
        values[key] = grid[key][place]
    return {key: values[key] for key in grid}


def _names(combinations: list[dict[str, Any]]) -> list[str]:
    """`lora_r=8,lr=0.001`: for a file system and a shell; with a digest where that is too long or not unique."""
    names = [
        ",".join(f"{SHORTER.get(key, key.rpartition('.')[2])}={_plain(value)}" for key, value in values.items()) for values in combinations
    ]
    unique = len(set(names)) == len(names)
    for i, (name, values) in enumerate(zip(names, combinations, strict=True)):
        if not unique or len(name) > LONGEST:
            digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
            names[i] = f"{name[:LONGEST]}-{digest}"
    return names


def _plain(value: Any) -> str:
    """`last:6` -> `last-6`, `[0, 5]` -> `0-5`"""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text.strip('[]{}"'))


def _variant(arguments: dict[str, Any], name: str, values: dict[str, Any]) -> Variant:
    try:
        return Variant(name, values, {**_with(arguments, values), "out_dir": Path(arguments["out_dir"]) / name})
    except UserError as error:
        return Variant(name, values, {}, str(error))


def _with(arguments: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The arguments with other values of some keys. Raises UserError if they do not go together."""
    changed, groups = {**arguments}, dict[str, dict[str, Any]]()
    for key, value in sorted(values.items()):  # the optimizer's class before its arguments
        root, _, name = key.partition(".")
        if root == "optimizer" and (name or value != _recipe(changed["optimizer"])["class_path"]):
            recipe = _recipe(changed["optimizer"])
            changed["optimizer"] = {**recipe, "init_args": {**recipe.get("init_args", {}), name: value}} if name else value
        elif name:
            groups.setdefault(root, {})[name] = value
        elif root != "optimizer":
            changed[key] = value
    return {**changed, **{root: replace(changed[root], **changes) for root, changes in groups.items()}}


def _recipe(optimizer: str | dict[str, Any]) -> dict[str, Any]:
    return {"class_path": optimizer} if isinstance(optimizer, str) else optimizer
