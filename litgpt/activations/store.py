"""The rows of an activation cache in a file: filled once, reused by later runs, resumed after a stop.

FOLDER/KEY/ holds activations.bin, (R, S + 1, d) values, and index.json with the CRC-32 of each filled sample's rows. Rows are compared
with it whenever they are read; a cache that differs when a run starts is filled again. During the filling the folder is named KEY.begun
and the run holds its lock. The next run resumes from there, after a kill as after a signal; a concurrent run waits and then reuses the
cache. Others may write to FOLDER: links are not followed, and another user's folder under these names is an error.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from litgpt.atomic import lock, write_text
from litgpt.files import open_regular, read_json

DATA, INDEX = "activations.bin", "index.json"
SAVE_SECONDS = 20.0  # between two updates of the index during the filling: the work that a kill can cost
POLL_SECONDS = 1.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Contents:
    """The contents of a cache file."""

    key: str  # the fingerprint, in hexadecimal
    shape: tuple[int, int, int]
    dtype: torch.dtype
    spans: Sequence[slice]  # the rows of each sample, in the order of the filling
    stem: slice  # the rows of the stem

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Rows:
    """The rows in FOLDER/activations.bin. Reading those of a sample or of the stem raises OSError if they are not what was written."""

    def __init__(self, folder: Path, contents: Contents, flags: int = os.O_RDONLY) -> None:
        self.folder, self.contents = folder, contents
        self.crcs: dict[tuple[int, int], int] = {}  # by first row and end
        self.descriptor = open_regular(folder / DATA, flags | os.O_NOFOLLOW)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def _place(self, rows: slice) -> tuple[tuple[int, int], int]:
        """Return first row and end of a span, and its offset in the file."""
        total, parts, d = self.contents.shape
        start, end, _ = rows.indices(total)
        return (start, end), start * parts * d * self.contents.dtype.itemsize

    def __getitem__(self, rows: slice) -> torch.Tensor:
        """(n, S + 1, d)"""
        (start, end), offset = self._place(rows)
        values = torch.empty(end - start, *self.contents.shape[1:], dtype=self.contents.dtype)
        content, done = _bytes(values), 0
        while done < len(content) and (count := os.preadv(self.descriptor, [content[done:]], offset + done)):
            done += count
        if done < len(content) or self.crcs.get((start, end)) != zlib.crc32(content):
            reason = f"rows {start:,} to {end:,} are not what was written: the disk is faulty, or another program changed them"
            raise OSError(errno.EIO, f"{reason}. The next run fills the cache again", str(self.folder / DATA))
        return values

    def __setitem__(self, rows: slice, values: torch.Tensor) -> None:
        ends, offset = self._place(rows)
        content, done = _bytes(values), 0
        while done < len(content):
            done += os.pwrite(self.descriptor, content[done:], offset + done)
        self.crcs[ends] = zlib.crc32(content)

    def save_index(self, done: int) -> None:
        """Flush the rows to disk and write the index of the first `done` samples."""
        os.fsync(self.descriptor)
        crcs = [self.crcs[self._place(span)[0]] for span in (self.contents.stem, *self.contents.spans[:done])] if done else []
        write_text(self.folder / INDEX, json.dumps({"fingerprint": self.contents.key, "samples": done, "crc32": crcs}))

    def check_index(self) -> int:
        """Return the number of filled samples after reading them. Raises OSError, TypeError, KeyError or ValueError if they are damaged."""
        facts = read_json(self.folder / INDEX)
        done, crcs = facts["samples"], facts["crc32"]
        spans = [self.contents.stem, *self.contents.spans[:done]] if done else []
        if facts["fingerprint"] != self.contents.key or not 0 <= done <= len(self.contents.spans):
            raise ValueError("another cache's index")
        self.crcs = dict(zip((self._place(span)[0] for span in spans), crcs, strict=True))
        for span in spans:
            self[span]
        return int(done)

    def forget(self) -> None:
        """Drop the file from the system's page cache, so that reading it takes as long as when memory is short."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class Fill(Protocol):
    """Writes the rows of the samples after the first `done` into the store, and after each batch passes the number filled to `advance`."""

    def __call__(self, store: Rows, done: int, advance: Callable[[int], None]) -> None: ...


def open_store(folder: Path, contents: Contents, fill: Fill, say: Say) -> Rows:
    """Return the rows, those of FOLDER/KEY if they are complete, else filled. Raises OSError if that is impossible."""
    target = folder / contents.key[:32]
    store = _complete(target, contents)
    if store is None:
        if target.exists():
            say(f"{target} is damaged, or of an earlier version, and is filled again")
        with _held(target.with_name(f"{target.name}.begun"), say) as begun:
            store = _complete(target, contents)
            if store is None:
                crcs = _fill(begun, contents, fill, say)
                shutil.rmtree(target, ignore_errors=True)
                begun.rename(target)
                store = Rows(target, contents)
                store.crcs = crcs
                return store
    say(f"{target} is reused")
    return store


def _complete(folder: Path, contents: Contents) -> Rows | None:
    """Return the rows in the folder if they are complete and undamaged."""
    _require_own(folder)
    with suppress(OSError, TypeError, KeyError, ValueError):
        store = Rows(folder, contents)
        if store.check_index() == len(contents.spans):
            return store
    return None


def _require_own(folder: Path) -> None:
    """Raise OSError if a link, a file, or in a folder that others may write to another user's folder has the place of ours."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return
    foreign = status.st_uid not in (os.geteuid(), 0) and folder.parent.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if foreign or not stat.S_ISDIR(status.st_mode):
        kind = "belongs to another user" if foreign else "is not a folder"
        raise OSError(errno.ENOTDIR, f"{folder} {kind}: remove it, or name another folder with skip2lora_cache_dir")


@contextmanager
def _held(begun: Path, say: Say) -> Iterator[Path]:
    """Create the folder if needed, and lock it on file systems with locks. Waits for another run that fills it.

    A disk error removes the folder; after any other end it can be resumed.
    """
    held, announced = None, False
    begun.parent.mkdir(parents=True, exist_ok=True)
    while held is None:
        with suppress(FileExistsError):
            begun.mkdir(0o700)
        _require_own(begun)
        try:
            held = lock(begun)
        except BlockingIOError:
            if not announced:
                say(f"another run is filling {begun}: waiting for it")
            announced = True
            time.sleep(POLL_SECONDS)
        except FileNotFoundError:  # finished or removed between the two calls
            continue
        except OSError:
            break
    try:
        yield begun
    except OSError:
        shutil.rmtree(begun, ignore_errors=True)
        raise
    finally:
        with suppress(OSError):
            begun.rmdir()  # empty after waiting for a run that completed the cache
        if held is not None:
            os.close(held)


def _fill(begun: Path, contents: Contents, fill: Fill, say: Say) -> dict[tuple[int, int], int]:
    """Fill the missing rows, flush them to disk, write the index. Return the CRCs."""
    store = Rows(begun, contents, os.O_RDWR | os.O_CREAT)
    status = os.fstat(store.descriptor)
    if status.st_nlink > 1:
        raise OSError(errno.EMLINK, f"{begun / DATA} is a link to another file")
    missing = contents.nbytes - status.st_blocks * 512
    free = shutil.disk_usage(begun).free
    if free < missing:
        raise OSError(errno.ENOSPC, f"{missing / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free")
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(store.descriptor, 0, contents.nbytes)  # a full disk shows here, not after hours
    done, saved = 0, time.monotonic()
    if (begun / INDEX).exists():
        try:
            done = store.check_index()
            say(f"{begun} has {done:,} of {len(contents.spans):,} samples, the others are added")
        except (OSError, TypeError, KeyError, ValueError):
            say(f"{begun} is damaged and is filled from the start")

    def advance(count: int) -> None:
        nonlocal done, saved
        done = count
        if time.monotonic() - saved >= SAVE_SECONDS:
            store.save_index(done)
            saved = time.monotonic()

    try:
        fill(store, done, advance)
    except BaseException:
        with suppress(OSError):
            store.save_index(done)
        raise
    store.save_index(done)
    return store.crcs


def _bytes(rows: torch.Tensor) -> memoryview:
    return rows.reshape(-1).view(torch.uint8).numpy().data
