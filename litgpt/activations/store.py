"""The rows of an activation cache in a file: filled once by one process or several, reused by later runs, resumed after a stop.

The folder holds activations.bin, (R, S + 1, d) values, and index.bin with 8 bytes for the stem and for each sample, in little-endian
order: the CRC-32 of its rows, and 1 once they are written. Rows are checked against the CRC on every read; those that differ when a run
starts are computed again. Processes that fill a cache together lock the bytes of the samples that they are working on: a sample is
computed once, or by another process if the first is killed. The parent folder may be writable by others, so links are not followed, and
another user's folder under these names is an error.
"""

import errno
import itertools
import math
import os
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from litgpt.atomic import lock_bytes, unlock_bytes
from litgpt.files import open_regular

DATA, INDEX = "activations.bin", "index.bin"
ENTRY, WRITTEN = 8, 1 << 32  # bytes of the index for a sample, and their flag
POLL_SECONDS = 0.2

Say = Callable[[str], None]


@dataclass(frozen=True)
class Layout:
    """The rows of a cache and its size, known before anything is computed."""

    counts: Mapping[int, int]  # rows of each sample, by its index
    first: int  # rows of the stem, the first of the cache: P, or 0 if each sample has only its own positions with loss
    width: tuple[int, int]  # (S + 1, d): x, then the taps; or (1, W) with prompts' keys and values (`litgpt.activations.prompts`)
    dtype: torch.dtype
    stem: int = 0  # P

    @property
    def shape(self) -> tuple[int, int, int]:
        """(R, S + 1, d)"""
        return self.first + sum(self.counts.values()), *self.width

    @property
    def row_bytes(self) -> int:
        return math.prod(self.width) * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.row_bytes

    @cached_property
    def slices(self) -> dict[int, slice]:
        """The rows of each sample, by its index."""
        ends = itertools.accumulate(self.counts.values(), initial=self.first)
        return {i: slice(*span) for i, span in zip(self.counts, itertools.pairwise(ends), strict=True)}


class Rows:
    """The rows in activations.bin. Reading those of a sample or of the stem raises OSError if they are not what was written."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout, self.slices = folder, layout, layout.slices
        self.places = {i: k for k, i in enumerate(self.slices, 1)}  # places of the samples in the index; the stem has place 0
        self.stem = slice(0, layout.first)
        spans = enumerate((self.stem, *self.slices.values()))
        self._by_rows = {(span.start, span.stop): k for k, span in spans if span.start != span.stop}
        self.descriptor = self.index = -1

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        for descriptor in (self.descriptor, self.index):
            if descriptor >= 0:
                os.close(descriptor)
        self.descriptor = self.index = -1

    def open(self, flags: int) -> None:
        """Reopen the files. Raises OSError for a link, a pipe or a device, or if they are missing and must not be created."""
        self._close()
        self.index = open_regular(self.folder / INDEX, flags | os.O_NOFOLLOW)
        self.descriptor = open_regular(self.folder / DATA, flags | os.O_NOFOLLOW)
        for descriptor, name in ((self.index, INDEX), (self.descriptor, DATA)):
            if flags & os.O_RDWR and os.fstat(descriptor).st_nlink > 1:
                raise OSError(errno.EMLINK, f"{self.folder / name} is a link to another file")

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """(n, S + 1, d)"""
        values = torch.empty(rows.stop - rows.start, *self.layout.width, dtype=self.layout.dtype)
        content, done, offset = _bytes(values), 0, rows.start * self.layout.row_bytes
        while done < len(content) and (count := os.preadv(self.descriptor, [content[done:]], offset + done)):
            done += count
        entry = self._entry(self._by_rows.get((rows.start, rows.stop), -1))
        if done < len(content) or (content and entry != WRITTEN | zlib.crc32(content)):
            reason = f"rows {rows.start:,} to {rows.stop:,} are not what was written: the disk is faulty, or another program changed them"
            raise OSError(errno.EIO, f"{reason}. The next run fills the cache again", str(self.folder / DATA))
        return values

    def __setitem__(self, rows: slice, values: torch.Tensor) -> None:
        if content := _bytes(values):
            _write(self.descriptor, content, rows.start * self.layout.row_bytes)
            self._note(self._by_rows[rows.start, rows.stop], WRITTEN | zlib.crc32(content))

    def _entry(self, place: int) -> int:
        return int.from_bytes(os.pread(self.index, ENTRY, ENTRY * place), "little") if place >= 0 else 0

    def _note(self, place: int, entry: int) -> None:
        _write(self.index, memoryview(entry.to_bytes(ENTRY, "little")), ENTRY * place)

    def is_written(self, indices: Sequence[int]) -> bool:
        return all(not self.layout.counts[i] or self._entry(self.places[i]) & WRITTEN for i in indices)

    def written(self, indices: Sequence[int]) -> list[int]:
        """Return the samples that are written, by one read of the index."""
        length = ENTRY * (1 + len(self.places))
        flags = os.pread(self.index, length, 0).ljust(length, b"\0")[ENTRY // 2 :: ENTRY]  # the byte of `WRITTEN`
        return [i for i in indices if flags[self.places[i]] or not self.layout.counts[i]]

    @property
    def has_stem(self) -> bool:
        return bool(self._entry(0))

    def damaged(self, indices: Sequence[int]) -> list[int]:
        """Return the places of samples, and of the stem, that are marked as written but cannot be read. Reads all of them."""
        places, written = list[int](), self.written(indices)
        for place, span in ((0, self.stem), *((self.places[i], self.slices[i]) for i in written)):
            try:
                if written:  # after the stem
                    self[span]
            except OSError:
                places.append(place)
        return places

    def allocate(self, indices: Sequence[int], damaged: Sequence[int]) -> None:
        """Prepare the files for the rows of the stem and the samples. Raises OSError if the disk is too full."""
        for place in damaged:
            self._note(place, 0)
        spans, row_bytes = [self.stem, *(self.slices[i] for i in indices)], self.layout.row_bytes
        missing = sum(span.stop - span.start for span in spans) * row_bytes - os.fstat(self.descriptor).st_blocks * 512
        free = shutil.disk_usage(self.folder).free
        if free < missing:
            raise OSError(errno.ENOSPC, f"{missing / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free")
        for span in spans if hasattr(os, "posix_fallocate") else ():
            if size := (span.stop - span.start) * row_bytes:
                os.posix_fallocate(self.descriptor, span.start * row_bytes, size)  # a full disk shows here, not after hours

    def missing(self, batches: Sequence[list[int]]) -> Iterator[list[int]]:
        """Yield the batches to write, each locked against other processes; then wait for those that other processes are writing."""
        left = list(batches)
        while left := [batch for batch in left if not self.is_written(batch)]:
            was_idle = True
            for batch in left:
                if self._lock(batch):
                    try:
                        if not self.is_written(batch):
                            was_idle = False
                            yield batch
                    finally:
                        self._unlock(batch)
            if was_idle:
                time.sleep(POLL_SECONDS)

    def _lock(self, batch: Sequence[int]) -> bool:
        """Return whether no other process has locked one of the samples."""
        if all(lock_bytes(self.index, ENTRY * self.places[i], ENTRY) for i in batch):
            return True
        self._unlock(batch)
        return False

    def _unlock(self, batch: Sequence[int]) -> None:
        for i in batch:
            unlock_bytes(self.index, ENTRY * self.places[i], ENTRY)

    def forget(self) -> None:
        """Drop the file from the system's page cache, so that reading it takes as long as when memory is short."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


Fill = Callable[[Rows, Iterator[list[int]], int], None]
"""Writes the stem, if it is missing, and the rows of each batch from the iterator. The number is that of the samples already written."""


def open_store(
    folder: Path, layout: Layout, batches: Sequence[list[int]], fill: Fill, say: Say, agreed: Callable[[bool], bool] = bool
) -> Rows:
    """Return the rows in `folder`, with at least those of the samples in `batches` written.

    `agreed` returns whether a flag is set in any of the processes that fill together. Raises OSError if the rows cannot be written.
    """
    store, indices = Rows(folder, layout), [i for batch in batches for i in batch]
    left, failure = indices, None
    try:
        left = _opened(store, indices, say)
    except OSError as error:
        failure = error
    if agreed(failure is not None):
        raise failure or OSError(errno.EIO, "another process of the run cannot write it")
    if agreed(bool(left)):
        try:
            fill(store, store.missing(batches), len(indices) - len(left))
            os.fsync(store.descriptor)
            os.fsync(store.index)
        except OSError:
            _remove(store.folder)
            raise
        store.open(os.O_RDONLY)
    return store


def _opened(store: Rows, indices: list[int], say: Say) -> list[int]:
    """Open the files for reading or writing, as needed, and return the samples that are still to be written."""
    folder = store.folder
    _require_own(folder)
    with suppress(FileNotFoundError):
        store.open(os.O_RDONLY)
    damaged, written = ([], set()) if store.index < 0 else (store.damaged(indices), set(store.written(indices)))
    left = [i for i in indices if i not in written or store.places[i] in damaged]
    if not left and not damaged:
        say(f"{folder} is reused")
        return left
    if damaged:
        say(f"{folder}: {len(damaged):,} of {len(indices):,} samples are damaged and are filled again")
    elif len(left) < len(indices):
        say(f"{folder} has {len(indices) - len(left):,} of {len(indices):,} samples, the others are added")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(0o700)
    _require_own(folder)
    try:
        store.open(os.O_RDWR | os.O_CREAT)
        store.allocate(left, damaged)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            _remove(folder)
        raise
    return left or indices[:1]


def _remove(folder: Path) -> None:
    with suppress(OSError):  # not empty: it has files of others
        for name in (DATA, INDEX):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _require_own(folder: Path) -> None:
    """Raise OSError if `folder` is a link or a file, or belongs to another user and its parent is writable by others."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return
    foreign = status.st_uid not in (os.geteuid(), 0) and folder.parent.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if foreign or not stat.S_ISDIR(status.st_mode):
        kind = "belongs to another user" if foreign else "is not a folder"
        raise OSError(errno.ENOTDIR, f"{folder} {kind}: remove it, or name another folder with skip2lora_cache_dir")


def _write(descriptor: int, content: memoryview, offset: int) -> None:
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], offset + done)


def _bytes(rows: torch.Tensor) -> memoryview:
    return rows.reshape(-1).view(torch.uint8).numpy().data
