"""Files and folders that appear whole or not at all, locks, and manifests of a folder's files."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any

from litgpt.errors import UserError

MANIFEST = "manifest.json"
"""sizes and sha256 of a folder's files, written last: a training checkpoint without a valid one is none"""
MANIFEST_FORMAT = 1


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(folder: str | Path) -> int:
    """A descriptor that holds the folder's lock until it is closed, or its process ends in whatever way.

    Raises BlockingIOError if another process holds it, another OSError where the file system knows no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def new_folder(path: str | Path, overwrite: bool = False, manifest: bool = True) -> Iterator[Path]:
    """A folder that appears whole or not at all.

    Yields a temporary sibling of `path`; when the block ends a manifest of its files is written, all is flushed to disk and it is renamed
    to `path`. On an error it is removed and an existing `path` stays as it was; what a killed process leaves, `remove_leftovers` removes.
    Raises UserError if `path` exists with content and `overwrite` is false.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, a folder is needed: name another place")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"{path} exists already: name another folder, or move it away")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        temporary, locks = _temporary_folder(path)
    except OSError as error:
        raise UserError(f"{path} cannot be made: {error.strerror}") from None
    try:
        temporary.chmod(0o755)
        yield temporary
        inside = list(temporary.rglob("*"))
        for file in inside:
            if file.is_file():
                _sync(file)
        if manifest:
            write_manifest(temporary)
        for folder in (*(entry for entry in inside if entry.is_dir()), temporary):
            _sync(folder)
        _put_in_place(temporary, path, locks)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        for descriptor in locks:
            os.close(descriptor)


def _temporary_folder(path: Path) -> tuple[Path, list[int]]:
    """A new sibling of `path` and the descriptors that hold its lock, if the file system knows locks."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.litgpt-", suffix=".tmp", dir=path.parent))
        try:
            held = lock(temporary)
        except (BlockingIOError, FileNotFoundError):  # another process takes it for a leftover in this very moment
            continue
        except OSError:
            return temporary, []
        if temporary.exists():
            return temporary, [held]
        os.close(held)


def _put_in_place(temporary: Path, path: Path, locks: list[int]) -> None:
    """Rename `temporary` to `path`; what stood there is kept aside until then."""
    old = None
    if path.exists():
        old = path.with_name(f"{temporary.name}.old")
        with suppress(OSError):
            locks.append(lock(path))
        path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        if old is not None:
            old.rename(path)
        raise
    _sync(path.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary folders in `folder` whose process was killed. A folder that had been put aside for one of them comes back."""
    for left in sorted(Path(folder).glob(".*.litgpt-*.tmp*")):
        match = re.fullmatch(r"\.(.+)\.litgpt-\w+\.tmp(\.old)?", left.name)
        if match is None or left.is_symlink() or not left.is_dir():
            continue
        try:
            held = lock(left)
        except OSError:  # its process lives, or nobody can tell
            continue
        with suppress(OSError):
            if match[2] and not left.with_name(match[1]).exists():
                left.rename(left.with_name(match[1]))
            else:
                shutil.rmtree(left)
        os.close(held)


def remove_folder(path: Path) -> None:
    """Remove a folder so that, whenever the process is killed, it is there whole or not at all."""
    doomed = Path(tempfile.mkdtemp(prefix=f".{path.name}.litgpt-", suffix=".tmp", dir=path.parent))
    path.rename(doomed)  # an empty folder may be renamed over
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that is written under a temporary name, flushed to disk and renamed to `path`; removed on an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file under a temporary name, flush it to disk, rename it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        file.write(text.encode())


def digest(file: Path) -> str:
    """The sha256 of a file's content."""
    found = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(2**22):
            found.update(block)
    return found.hexdigest()


def write_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write size and sha256 of the folder's files to its manifest; with `names`, put those files into the manifest that is there."""
    if names is None:
        names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        files = {}
    else:
        files = read_manifest(folder) or {}
    for name in names:
        if name != MANIFEST:
            files[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}
    write_text(folder / MANIFEST, json.dumps({"litgpt_manifest": MANIFEST_FORMAT, "files": files}, indent=1) + "\n")


def read_manifest(folder: str | Path) -> dict[str, dict[str, Any]] | None:
    """File name -> its `bytes` and `sha256`; None where there is no manifest of ours, or a broken one."""
    try:
        content = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
        files = content["files"]
        known = content["litgpt_manifest"] == MANIFEST_FORMAT
        plain = all(not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts for name in files)
        complete = all(isinstance(facts["bytes"], int) and isinstance(facts["sha256"], str) for facts in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return files if known and plain and complete else None


def damages(folder: str | Path, names: Iterable[str] | None = None, contents: bool = False) -> list[str]:
    """What the folder's manifest and its files disagree in: sizes, and with `contents` the sha256 too. Empty if it is whole.

    `names`: the files to look at, if the manifest has them. Default: all of the manifest.
    """
    folder = Path(folder)
    files = read_manifest(folder)
    if files is None:
        return [f"{MANIFEST} is missing or broken"]
    found = []
    for name in files if names is None else [name for name in names if name in files]:
        file, facts = folder / name, files[name]
        try:
            if not file.is_file():
                found.append(f"{name} is missing")
            elif (size := file.stat().st_size) != facts["bytes"]:
                found.append(f"{name} has {size:,} bytes, not {facts['bytes']:,}")
            elif contents and digest(file) != facts["sha256"]:
                found.append(f"{name} is not what was written (its sha256 differs)")
        except OSError as error:
            found.append(f"{name} cannot be read: {error.strerror}")
    return found


def require_whole(folder: str | Path, *names: str) -> None:
    """UserError if files of these names do not have the size that the folder's manifest gives. A folder without a manifest passes."""
    if read_manifest(folder) is not None and (found := damages(folder, names)):
        raise UserError(f"{folder} is damaged: {'; '.join(found)}. Copy or make it again (its {MANIFEST} says what it should hold)")
