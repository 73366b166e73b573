"""Rows of a cache in a file: read back as written, checked, filled once, and resumed where a filling ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from litgpt.activations.store import DATA, Contents, Rows, open_store

SPANS = [slice(2, 5), slice(5, 6), slice(6, 9)]
CONTENTS = Contents("0123456789" * 5, (9, 2, 4), torch.bfloat16, SPANS, slice(2))
VALUES = torch.randn(9, 2, 4, generator=torch.Generator().manual_seed(0)).bfloat16()


class Fill:
    """Fill the store, and count the samples that are written. `most`: fail after this many."""

    def __init__(self, most: int = 3) -> None:
        self.written, self.most = 0, most

    def __call__(self, store: Rows, done: int, advance: Callable[[int], None]) -> None:
        if done == 0:
            store[CONTENTS.stem] = VALUES[CONTENTS.stem]
        for number, span in enumerate(SPANS[done:], done + 1):
            if number > self.most:
                raise KeyboardInterrupt
            store[span] = VALUES[span]
            self.written += 1
            advance(number)


def test_bytes_are_rows_times_parts_times_width() -> None:
    assert CONTENTS.nbytes == 9 * 2 * 4 * 2


def test_filled_once_and_reused(tmp_path: Path) -> None:
    said: list[str] = []
    first, second = Fill(), Fill()
    for fill in (first, second):
        store = open_store(tmp_path, CONTENTS, fill, said.append)
        for span in (CONTENTS.stem, *SPANS):
            assert torch.equal(store[span], VALUES[span])
    assert (first.written, second.written) == (3, 0)
    assert said == [f"{tmp_path / CONTENTS.key[:32]} is reused"]
    assert (tmp_path / CONTENTS.key[:32] / DATA).stat().st_size == CONTENTS.nbytes


def test_a_filling_is_resumed_after_its_last_sample(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        open_store(tmp_path, CONTENTS, Fill(most=2), said.append)
    rest = Fill()
    store = open_store(tmp_path, CONTENTS, rest, said.append)
    assert rest.written == 1 and torch.equal(store[SPANS[0]], VALUES[SPANS[0]])
    assert said == [f"{tmp_path / CONTENTS.key[:32]}.begun has 2 of 3 samples, the others are added"]


def test_changed_rows_are_an_error_when_read_and_filled_again_when_opened(tmp_path: Path) -> None:
    store = open_store(tmp_path, CONTENTS, Fill(), print)
    with (tmp_path / CONTENTS.key[:32] / DATA).open("r+b") as file:
        file.seek(2 * 2 * 4 * 2)  # the first row of the first sample
        file.write(b"\xff")
    with pytest.raises(OSError, match="rows 2 to 5 are not what was written"):
        store[SPANS[0]]
    assert torch.equal(store[SPANS[1]], VALUES[SPANS[1]])
    said: list[str] = []
    again = open_store(tmp_path, CONTENTS, Fill(), said.append)
    assert torch.equal(again[SPANS[0]], VALUES[SPANS[0]]) and "is damaged" in said[0]


def test_another_fingerprint_is_another_cache(tmp_path: Path) -> None:
    open_store(tmp_path, CONTENTS, Fill(), print)
    other = Fill()
    open_store(tmp_path, Contents("f" * 50, *list(vars(CONTENTS).values())[1:]), other, print)
    assert other.written == 3 and len(list(tmp_path.iterdir())) == 2
