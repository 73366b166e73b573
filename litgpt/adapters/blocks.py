"""Which blocks get adapters: the forms [0, -1], "all", "last:6", "every:5", "auto:6" and "transformer.h.3" as block numbers."""

import re
from collections.abc import Sequence

from litgpt.adapters.settings import BlockIndices
from litgpt.errors import UserError

DEFAULT_TAPS = 6
AUTO = re.compile("auto(?::([0-9]{1,9}))?")
NAME = re.compile(r"transformer\.h\.([0-9]{1,9})")


def resolve_blocks(spec: BlockIndices | tuple[int | str, ...], n_layer: int, available: range, key: str) -> tuple[int, ...]:
    """Return the sorted block numbers of a setting's value.

    Ints and names "transformer.h.3" count over all blocks, negative ints from the end. "all", "last:n" and "every:n" (which ends at the
    last block) count over `available`. Raises UserError, naming `key`, for anything else.
    """
    if isinstance(spec, str) and not spec.startswith("transformer.h."):
        return _by_rule(spec, list(available), key)
    if spec is not None and not isinstance(spec, int | str | list | tuple):
        raise UserError(f"{key} is {str(spec)[:60]}: give a list of block numbers such as [0, 1, -1]")
    blocks: list[int] = []
    wrong: list[int | str] = []
    for entry in [spec] if isinstance(spec, int | str) else spec or ():
        match = NAME.fullmatch(entry) if isinstance(entry, str) else None
        index = int(match[1]) if match else entry
        if not isinstance(index, int) or isinstance(index, bool) or not -n_layer <= index < n_layer:
            wrong.append(entry)
        else:
            blocks.append(index % n_layer)
    if wrong:
        named = ", ".join(repr(entry)[:60] for entry in wrong[:6]) + (", ..." if len(wrong) > 6 else "")
        raise UserError(f"{key} names {named}: this model has blocks 0 to {n_layer - 1} (-1 is the last)")
    if not blocks:
        raise UserError(f"{key} names no block: name at least one, such as [-1]")
    if repeated := sorted({block for block in blocks if blocks.count(block) > 1}):
        raise UserError(f"{key} names {listed(repeated)} twice")
    return tuple(sorted(blocks))


def _by_rule(rule: str, available: list[int], key: str) -> tuple[int, ...]:
    form, _, count = rule.partition(":")
    number = int(count) if re.fullmatch("[0-9]{1,9}", count) else 0
    if rule == "all" and available:
        return tuple(available)
    if form == "last" and 1 <= number <= len(available):
        return tuple(available[-number:])
    if form == "every" and 1 <= number <= len(available):
        return tuple(sorted(available[::-1][::number]))
    auto = ", 'every:5' or 'auto:6'" if key == "skip2lora_block_indices" else " or 'every:5'"
    forms = f"a list such as [0, 1, -1], 'all', 'last:6'{auto}"
    raise UserError(f"{key} is {rule[:60]!r}: give {forms}, with a number from 1 to the {len(available)} blocks there are")


def auto_count(spec: object, available: int) -> int | None:
    """Return the number of `available` blocks for "auto" (6, or all if there are fewer) or "auto:n"; None for any other value."""
    match = AUTO.fullmatch(str(spec))
    count = int(match[1] or min(DEFAULT_TAPS, available)) if match else 0
    return count if 1 <= count <= available else None


def listed(blocks: Sequence[int]) -> str:
    """Return "block 3" or "blocks 3, 5"."""
    return ("block " if len(blocks) == 1 else "blocks ") + ", ".join(map(str, blocks))
