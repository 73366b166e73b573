"""Rows of a cache in a file: read back as written, checked, filled once, resumed where a filling ended, and filled by several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch

from litgpt.activations.store import DATA, ENTRY, INDEX, Layout, Rows, open_store

LAYOUT = Layout({4: 3, 0: 1, 7: 3}, 2, (2, 4), torch.bfloat16)
STEM, SPANS = slice(0, 2), {4: slice(2, 5), 0: slice(5, 6), 7: slice(6, 9)}
VALUES = torch.randn(9, 2, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
BATCHES = [[4], [0], [7]]


class Fill:
    """Fill the store, and note the samples that are written. `most`: fail after this many."""

    def __init__(self, most: int = 3, seconds: float = 0.0) -> None:
        self.written, self.most, self.seconds = list[int](), most, seconds

    def __call__(self, store: Rows, batches: Iterator[list[int]], done: int) -> None:
        if not store.has_stem:
            store[STEM] = VALUES[STEM]
        for batch in batches:
            if len(self.written) == self.most:
                raise KeyboardInterrupt
            time.sleep(self.seconds)
            for i in batch:
                store[SPANS[i]] = VALUES[SPANS[i]]
            self.written += batch


def test_filled_once_and_reused(tmp_path: Path) -> None:
    said: list[str] = []
    first, second = Fill(), Fill()
    for fill in (first, second):
        store = open_store(tmp_path / "key", LAYOUT, BATCHES, fill, said.append)
        for span in (STEM, *SPANS.values()):
            assert torch.equal(store[span], VALUES[span])
    assert (first.written, second.written) == ([4, 0, 7], [])
    folder = tmp_path / "key"
    assert said == [f"{folder} is reused"]
    assert (folder / DATA).stat().st_size == 9 * 2 * 4 * 2 and (folder / INDEX).stat().st_size == 4 * ENTRY


def test_a_filling_is_resumed_after_its_last_sample(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        open_store(tmp_path / "key", LAYOUT, BATCHES, Fill(most=2), said.append)
    rest = Fill()
    store = open_store(tmp_path / "key", LAYOUT, BATCHES, rest, said.append)
    assert rest.written == [7] and torch.equal(store[SPANS[4]], VALUES[SPANS[4]])
    assert said == [f"{tmp_path / 'key'} has 2 of 3 samples, the others are added"]


def test_each_takes_the_samples_that_it_needs_and_finds_those_of_others(tmp_path: Path) -> None:
    """As the processes of a run do, and those of a run that is resumed by another number of processes."""
    for batches, written in (([[4], [7]], [4, 7]), ([[0]], [0]), ([[0, 4]], []), (BATCHES, [])):
        fill = Fill()
        store = open_store(tmp_path / "key", LAYOUT, batches, fill, print)
        assert fill.written == written
        assert all(torch.equal(store[SPANS[i]], VALUES[SPANS[i]]) for batch in batches for i in batch)


@pytest.mark.parametrize(("row", "what"), [(0, "rows 0 to 2"), (2, "rows 2 to 5")])
def test_changed_rows_are_an_error_when_read_and_filled_again_when_opened(row: int, what: str, tmp_path: Path) -> None:
    store = open_store(tmp_path / "key", LAYOUT, BATCHES, Fill(), print)
    with (tmp_path / "key" / DATA).open("r+b") as file:
        file.seek(row * 2 * 4 * 2)
        file.write(b"\xff")
    span = SPANS[4] if row else STEM
    with pytest.raises(OSError, match=f"{what} are not what was written"):
        store[span]
    assert torch.equal(store[SPANS[0]], VALUES[SPANS[0]])
    said, fill = list[str](), Fill()
    again = open_store(tmp_path / "key", LAYOUT, BATCHES, fill, said.append)
    assert torch.equal(again[span], VALUES[span]) and "damaged" in said[0] and fill.written == ([4] if row else [])


def test_samples_without_rows_are_never_missing(tmp_path: Path) -> None:
    """A sample of a prompt alone has none where only positions with loss are kept."""
    layout = Layout({0: 0, 1: 0, 2: 1}, 0, (2, 4), torch.float32)
    written: list[int] = []

    def fill(store: Rows, batches: Iterator[list[int]], done: int) -> None:
        for batch in batches:
            for i in batch:
                store[layout.slices[i]] = torch.ones(layout.counts[i], 2, 4)
            written.extend(batch)

    for batches in ([[0, 1]], [[0], [1, 2]], [[0, 1, 2]]):
        store = open_store(tmp_path / "key", layout, batches, fill, print)
    assert written == [1, 2] and len(store[slice(0, 0)]) == 0 and bool((store[slice(0, 1)] == 1).all())


# --- several processes ---

MANY = Layout(dict.fromkeys(range(40), 1), 0, (2, 4), torch.float32)


def work(folder: Path, slow: float, start: Barrier, results: multiprocessing.Queue[tuple[int, list[int]]]) -> None:
    written: list[int] = []

    def fill(store: Rows, batches: Iterator[list[int]], done: int) -> None:
        for batch in batches:
            time.sleep(slow)
            for i in batch:
                store[MANY.slices[i]] = torch.full((1, 2, 4), float(i))
            written.extend(batch)

    start.wait(30)
    store = open_store(folder / "key", MANY, [[i, i + 1] for i in range(0, 40, 2)], fill, str)
    assert all(bool((store[MANY.slices[i]] == i).all()) for i in range(40))
    results.put((os.getpid(), written))


def test_processes_that_fill_a_cache_together_compute_each_sample_once_and_one_takes_what_a_killed_one_held(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results, start = context.Queue(), context.Barrier(3)
    workers = [context.Process(target=work, args=(tmp_path, slow, start, results)) for slow in (0.05, 0.05, 60)]
    for worker in workers:
        worker.start()
    began = time.monotonic()
    while sum(any(entry) for entry in entries(tmp_path)) < 10 and time.monotonic() - began < 30:
        time.sleep(0.01)
    assert workers[2].pid is not None
    time.sleep(0.5)  # the others have the rest; the third one still holds its batch
    os.kill(workers[2].pid, signal.SIGKILL)
    shares = [results.get(timeout=30)[1] for _ in range(2)]
    assert sorted(i for share in shares for i in share) == list(range(40)) and all(len(share) > 4 for share in shares)
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, -signal.SIGKILL]


def entries(folder: Path) -> list[bytes]:
    file = folder / "key" / INDEX
    content = file.read_bytes() if file.exists() else b""
    return [content[k : k + ENTRY] for k in range(0, len(content), ENTRY)]


def test_a_full_disk_costs_no_file_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Rows, "allocate", full)
    folder = tmp_path / "key"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="No space"):
        open_store(tmp_path / "key", LAYOUT, BATCHES, Fill(), lambda text: None)
    assert [file.name for file in folder.iterdir()] == ["notes.txt"]
