"""Block indices: lists, names, "last:6", "every:5", "auto:6", and what they refuse."""

from typing import Any

import pytest

from litgpt.adapters.blocks import auto_count, listed, resolve_blocks
from litgpt.errors import UserError


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ([0, 1, 2], (0, 1, 2)),
        ((3, 1), (1, 3)),
        ([-1, 0], (0, 9)),
        ([-10], (0,)),
        ("all", tuple(range(10))),
        ("last:3", (7, 8, 9)),
        ("last:10", tuple(range(10))),
        ("every:4", (1, 5, 9)),
        ("every:1", tuple(range(10))),
        ("every:10", (9,)),
        (["transformer.h.3", "transformer.h.0"], (0, 3)),
        (["transformer.h.3", -1, 0], (0, 3, 9)),
        ("transformer.h.3", (3,)),
        (4, (4,)),
        (-1, (9,)),
        (0, (0,)),
    ],
    ids=str,
)
def test_block_indices(spec: Any, want: tuple[int, ...]) -> None:
    assert resolve_blocks(spec, 10, range(10), "skip2lora_block_indices") == want


def test_words_count_over_what_is_available() -> None:
    assert resolve_blocks("all", 10, range(6), "key") == (0, 1, 2, 3, 4, 5)
    assert resolve_blocks("last:2", 10, range(6), "key") == (4, 5)
    assert resolve_blocks("every:2", 10, range(6), "key") == (1, 3, 5)
    assert resolve_blocks("every:2", 10, range(6, 10), "key") == (7, 9)
    assert resolve_blocks([-1], 10, range(6), "key") == (9,)  # numbers always count over the whole model


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ([10], ["10", "0 to 9"]),
        ([-11, 3, 12], ["-11", "12"]),
        (["transformer.h.10"], ["transformer.h.10", "0 to 9"]),
        (["block 3"], ["'block 3'"]),
        ([1.0], ["1.0"]),
        ([True], ["True"]),
        ([[0, 1]], ["[0, 1]"]),
        ([], ["no block"]),
        ([1, 2, 1], ["block 1", "twice"]),
        ([9, -1], ["block 9", "twice"]),
        ("last:0", ["last:0", "1 to the 10"]),
        ("last:11", ["last:11", "1 to the 10"]),
        ("last:", ["'last:'"]),
        ("last:-1", ["last:-1"]),
        ("last:²", ["last:"]),
        ("every:0", ["every:0"]),
        ("every:x", ["every:x"]),
        ("first:2", ["first:2", "last:6", "every:5"]),
        ("", ["''"]),
        ("transformer.h.", ["transformer.h."]),
        ("transformer.h.³", ["transformer.h."]),
    ],
    ids=str,
)
def test_wrong_block_indices(spec: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve_blocks(spec, 10, range(10), "lora_block_indices")
    assert all(word in str(caught.value) for word in ["lora_block_indices", *words]), caught.value


def test_auto() -> None:
    assert [auto_count(spec, 10) for spec in ("auto", "auto:3", "auto:10", "auto:11", "auto:0", "all", None, [1])] == [
        6,
        3,
        10,
        *[None] * 5,
    ]
    assert auto_count("auto", 4) == 4
    assert listed([3]) == "block 3" and listed([3, 5]) == "blocks 3, 5"
