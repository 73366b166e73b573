"""The rows of an activation cache in a memory-mapped file: made once, found by later runs, gone on with after a stop.

FOLDER/KEY/ has activations.bin, (R, S + 1, d) values, and index.json; without that, or with another size or sha256, it is not used. While
it is being filled it is called KEY.begun, a run holds its lock, and progress.json says how many samples it has and the sha256 of their
rows. The next run, after a kill as after a signal, goes on from there; one at the same time waits and then finds it whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from litgpt.atomic import digest, lock, write_text
from litgpt.errors import UserError
from litgpt.files import read_json

DATA, INDEX, PROGRESS = "activations.bin", "index.json", "progress.json"
SAVE_SECONDS = 20.0
"""between two notes of how far the filling has come: what a kill can cost"""
POLL_SECONDS = 1.0

Say = Callable[[str], None]


@dataclass(frozen=True)
class Contents:
    """What the file is to hold."""

    key: str
    """the fingerprint, in hexadecimal"""
    shape: tuple[int, int, int]
    dtype: torch.dtype
    spans: Sequence[slice]
    """the rows of each sample, in the order in which they are filled"""
    shared: slice
    """the rows that all samples share"""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Fill(Protocol):
    """Writes the rows of all samples but the first `done` into the store, and calls `advance` with how many are there, after each batch."""

    def __call__(self, store: torch.Tensor, done: int, advance: Callable[[int], None]) -> None: ...


def open_store(folder: Path, contents: Contents, fill: Fill, say: Say) -> torch.Tensor:
    """The rows, (R, S + 1, d), mapped: those of FOLDER/KEY if they are whole, else filled. Raises OSError if they cannot be written."""
    target = folder / contents.key[:32]
    if not _is_whole(target, contents):
        if target.exists():
            say(f"{target} is damaged and is made again")
        with _held(target.with_name(f"{target.name}.begun"), say) as begun:
            if not _is_whole(target, contents):
                _complete(begun, contents, fill, say)
                shutil.rmtree(target, ignore_errors=True)
                begun.rename(target)
                (target / PROGRESS).unlink()
                return _map(target / DATA, contents)
    say(f"{target} is reused")
    return _map(target / DATA, contents)


def forget(folder: Path, contents: Contents) -> None:
    """Have the system drop what it holds of the file in memory, so that reading it is timed as it will be when memory is short."""
    if hasattr(os, "posix_fadvise"):
        with (folder / contents.key[:32] / DATA).open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _held(begun: Path, say: Say) -> Iterator[Path]:
    """The folder, made if it is not there, and locked where the file system knows locks. Waits for a run that fills it.

    An error of the disk removes it, anything else leaves it to be gone on with.
    """
    held, told = None, False
    begun.parent.mkdir(parents=True, exist_ok=True)
    while held is None:
        with suppress(FileExistsError):
            begun.mkdir()
        try:
            held = lock(begun)
        except BlockingIOError:
            if not told:
                say(f"another run is filling {begun}: waiting for it")
            told = True
            time.sleep(POLL_SECONDS)
        except FileNotFoundError:  # it was finished or removed in this very moment
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
            begun.rmdir()  # of one that waited, and found the cache whole
        if held is not None:
            os.close(held)


def _complete(begun: Path, contents: Contents, fill: Fill, say: Say) -> None:
    """Fill what is missing, flush it to disk, write the index."""
    data = begun / DATA
    missing = contents.nbytes - (data.stat().st_blocks * 512 if data.is_file() else 0)
    free = shutil.disk_usage(begun).free
    if free < missing:
        raise OSError(28, f"{missing / 2**30:.2f} GiB are needed and {free / 2**30:.2f} GiB are free")
    with data.open("ab") as handle:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle.fileno(), 0, contents.nbytes)  # a full disk shows here, not as a crash in the mapped file
        handle.truncate(contents.nbytes)
        progress = _Progress(begun, contents, _map(data, contents), handle.fileno())
        progress.restore(say)
        try:
            fill(progress.store, progress.done, progress.advance)
        except BaseException:
            with suppress(OSError):
                progress.save()
            raise
        progress.save()
    write_text(begun / INDEX, json.dumps({"fingerprint": contents.key, "bytes": contents.nbytes, "sha256": digest(data)}))


class _Progress:
    """How many samples are filled, and the digest of their rows, kept in `progress.json`."""

    def __init__(self, begun: Path, contents: Contents, store: torch.Tensor, descriptor: int) -> None:
        self.file, self.contents, self.store, self.descriptor = begun / PROGRESS, contents, store, descriptor
        self.done = 0
        self._digest = hashlib.sha256()
        self._saved = time.monotonic()

    def restore(self, say: Say) -> None:
        """Go on from what the file says, if the rows are those that it speaks of."""
        if not self.file.exists():
            return
        total = len(self.contents.spans)
        try:
            facts = read_json(self.file)
            if facts["fingerprint"] == self.contents.key and 0 <= facts["samples"] <= total:
                self._count(facts["samples"])
            if self._facts() == facts:
                say(f"{self.file.parent} has {self.done:,} of {total:,} samples, the others are added")
                return
        except (UserError, KeyError, TypeError):
            pass
        say(f"{self.file.parent} is damaged and is begun again")
        self.done, self._digest = 0, hashlib.sha256()

    def advance(self, done: int) -> None:
        self._count(done)
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        os.fsync(self.descriptor)
        write_text(self.file, json.dumps(self._facts()))
        self._saved = time.monotonic()

    def _count(self, done: int) -> None:
        for span in self.contents.spans[self.done : done]:
            self._digest.update(_bytes(self.store[span]))
        self.done = done

    def _facts(self) -> dict[str, Any]:
        whole = self._digest.copy()
        if self.done:
            whole.update(_bytes(self.store[self.contents.shared]))
        return {"fingerprint": self.contents.key, "samples": self.done, "sha256": whole.hexdigest()}


def _bytes(rows: torch.Tensor) -> Any:
    return rows.view(torch.uint8).numpy()


def _map(file: Path, contents: Contents) -> torch.Tensor:
    rows, parts, d = contents.shape
    return torch.from_file(str(file), shared=True, size=rows * parts * d, dtype=contents.dtype).view(contents.shape)


def _is_whole(folder: Path, contents: Contents) -> bool:
    data = folder / DATA
    try:
        facts = read_json(folder / INDEX)
        same = facts["fingerprint"] == contents.key and facts["bytes"] == contents.nbytes == data.stat().st_size
        return same and facts["sha256"] == digest(data)
    except (OSError, UserError, KeyError, TypeError):
        return False
