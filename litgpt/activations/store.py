"""The rows of an activation cache in a memory-mapped file: filled once, reused by later runs, resumed after a stop.

FOLDER/KEY/ holds activations.bin, (R, S + 1, d) values, and index.json; with another size or sha256 than that states it is not used.
During the filling the folder is named KEY.begun, the run holds its lock, and progress.json states the number of filled samples and the
sha256 of their rows. The next run resumes from there, after a kill as after a signal; a concurrent run waits and then reuses the cache.
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
SAVE_SECONDS = 20.0  # between two updates of progress.json: the work that a kill can cost
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


class Fill(Protocol):
    """Writes the rows of the samples after the first `done` into the store, and after each batch passes the number filled to `advance`."""

    def __call__(self, store: torch.Tensor, done: int, advance: Callable[[int], None]) -> None: ...


def open_store(folder: Path, contents: Contents, fill: Fill, say: Say) -> torch.Tensor:
    """Return the rows, (R, S + 1, d), mapped: those of FOLDER/KEY if they are complete, else filled. Raises OSError if writing fails."""
    target = folder / contents.key[:32]
    if not _is_whole(target, contents):
        if target.exists():
            say(f"{target} is damaged and is filled again")
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
    """Drop the file from the system's page cache, so that reading it takes as long as when memory is short."""
    if hasattr(os, "posix_fadvise"):
        with (folder / contents.key[:32] / DATA).open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def _held(begun: Path, say: Say) -> Iterator[Path]:
    """Create the folder if needed, and lock it on file systems with locks. Waits for another run that fills it.

    A disk error removes the folder; after any other end it can be resumed.
    """
    held, announced = None, False
    begun.parent.mkdir(parents=True, exist_ok=True)
    while held is None:
        with suppress(FileExistsError):
            begun.mkdir()
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


def _complete(begun: Path, contents: Contents, fill: Fill, say: Say) -> None:
    """Fill the missing rows, flush them to disk, write the index."""
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
    """The number of filled samples and the digest of their rows, kept in `progress.json`."""

    def __init__(self, begun: Path, contents: Contents, store: torch.Tensor, descriptor: int) -> None:
        self.file, self.contents, self.store, self.descriptor = begun / PROGRESS, contents, store, descriptor
        self.done = 0
        self._digest = hashlib.sha256()
        self._saved = time.monotonic()

    def restore(self, say: Say) -> None:
        """Resume from the file if its digest is that of the rows."""
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
        say(f"{self.file.parent} is damaged and is filled from the start")
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
            whole.update(_bytes(self.store[self.contents.stem]))
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
