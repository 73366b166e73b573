"""Files and folders that appear completely or not at all, locks of folders, and manifests of their files."""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from litgpt.errors import UserError
from litgpt.files import is_inside, read_json
from litgpt.text import as_utf8

MANIFEST = "manifest.json"  # sizes and sha256 of a folder's files, written last: a training checkpoint is unusable without it
MANIFEST_FORMAT = 1
EXISTS = "{} exists already: name another folder, or move it away"


# --- Locks ---


def lock(path: str | Path, wait: bool = False) -> int:
    """Return a descriptor that holds the lock of a folder or a file until it is closed or its process ends.

    Raises BlockingIOError if another process holds the lock and `wait` is false, another OSError if the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder if needed and hold its lock, after waiting for other processes. File systems without locks are used unlocked."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as locks:
        with suppress(OSError):
            locks.callback(os.close, lock(folder, wait=True))
        yield


def lock_bytes(descriptor: int, start: int, count: int = 1, wait: bool = False) -> bool:
    """Lock bytes of an open file against other processes; return False if one of them holds the lock and `wait` is false.

    File systems without locks are used unlocked. The system frees the locks of a process that ends or closes the file.
    """
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), count, start)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def unlock_bytes(descriptor: int, start: int, count: int = 1) -> None:
    with suppress(OSError):
        fcntl.lockf(descriptor, fcntl.LOCK_UN, count, start)


# --- Files ---


@contextmanager
def new_file(path: Path, replace: bool = True) -> Iterator[IO[bytes]]:
    """Open a new file under a temporary name, in a folder made if needed; at the end flush it to disk and rename it to `path`.

    On an error it is removed.
    Raises UserError as `put_file` does, and OSError that names `path` if the disk is full, inside `torch.save` and numpy's `tofile` too.
    """
    try:
        temporary, locks = _temporary(path, partial(Path.touch, exist_ok=False))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    with locks:
        try:
            with temporary.open("r+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            put_file(temporary, path, replace)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides the cause
            if isinstance(cause, OSError) and cause.filename in (None, str(temporary)):
                reason = cause.strerror or f"the disk is full, or a limit on the size of files is reached ({cause})"  # `tofile` gives none
                raise OSError(cause.errno, reason, str(path)) from None
            raise


def put_file(made: Path, path: Path, replace: bool) -> None:
    """Rename a file. Without `replace` raise UserError if another process has written `path` in the meantime."""
    if not replace:
        try:
            os.link(made, path)
            made.unlink()
            return
        except OSError:  # the file system may have no hard links
            if os.path.lexists(path):
                raise UserError(f"{path} exists already: it was written in the meantime. Name another file, or move it away") from None
    made.replace(path)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as `new_file` does."""
    write_bytes(path, as_utf8(text).encode())


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file as `new_file` does."""
    with new_file(Path(path)) as file:
        file.write(content)


# --- Folders ---


@contextmanager
def new_folder(path: str | Path, overwrite: bool = False, manifest: bool = True) -> Iterator[Path]:
    """Make a folder that appears completely or not at all.

    Yields a temporary sibling of `path`. At the end its manifest is written, everything is flushed to disk and the folder is renamed to
    `path`. On an error it is removed and an existing `path` stays; `remove_leftovers` removes the folder of a killed process.
    Raises UserError if `path` exists with content and `overwrite` is false.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, a folder is needed: name another place")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(EXISTS.format(path))
    try:
        temporary, locks = _temporary(path, Path.mkdir)
    except OSError as error:
        raise UserError(f"{path} cannot be created: {error.strerror}") from None
    with locks:
        try:
            yield temporary
            content = list(temporary.rglob("*"))
            for file in content:
                if file.is_file():
                    _sync(file)
            if manifest:
                write_manifest(temporary)
            for folder in (*(entry for entry in content if entry.is_dir()), temporary):
                _sync(folder)
            _put_in_place(temporary, path, locks, overwrite, keep_others=manifest)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError) and (error.filename is None or str(temporary) in str(error.filename)):
                raise OSError(error.errno, error.strerror or str(error), str(path)) from None
            raise


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Make a folder in `parent` that is removed at the end, or by `remove_leftovers` if the process is killed."""
    folder, locks = _temporary(parent / "scratch", Path.mkdir)
    with locks:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _temporary(path: Path, create: Callable[[Path], None]) -> tuple[Path, ExitStack]:
    """Create a sibling of `path` in a folder that is made if needed and cleaned of leftovers.

    Return it and what holds its lock, if the file system has locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    locks = ExitStack()
    while True:
        temporary = path.with_name(f".{path.name}.litgpt-{secrets.token_hex(4)}.tmp")
        create(temporary)
        try:
            descriptor = lock(temporary)
        except (BlockingIOError, FileNotFoundError):  # another process is removing it as a leftover
            continue
        except OSError:
            return temporary, locks
        if temporary.exists():
            locks.callback(os.close, descriptor)
            return temporary, locks
        os.close(descriptor)


def _put_in_place(temporary: Path, path: Path, locks: ExitStack, overwrite: bool, keep_others: bool) -> None:
    """Rename `temporary` to `path`. An existing `path` is set aside, locked, and removed; without `overwrite` it has to be empty.

    With `keep_others` files that its manifest does not list move over, and none of the new ones is replaced.
    """
    old = None
    if overwrite and path.exists():
        old = path.with_name(f"{temporary.name}.old")
        with suppress(OSError):
            locks.callback(os.close, lock(path))
        path.rename(old)
    try:
        temporary.rename(path)
    except OSError as error:
        if old is not None:
            old.rename(path)
        if error.errno == errno.ENOTEMPTY:  # another process was faster
            raise UserError(EXISTS.format(path)) from None
        raise
    _sync(path.parent)
    if old is not None:
        for file in unlisted(old) if keep_others and read_manifest(old) is not None else ():
            kept = path / file.relative_to(old)
            with suppress(OSError):
                kept.parent.mkdir(parents=True, exist_ok=True)
                if not os.path.lexists(kept):
                    file.rename(kept)
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files and folders of killed processes in `folder`. A folder that one of them had set aside is restored."""
    for leftover in sorted(Path(folder).glob(".*.litgpt-*.tmp*")):
        match = re.fullmatch(r"\.(.+)\.litgpt-[0-9a-f]{8}\.tmp(\.old)?", leftover.name)
        if match is None or leftover.is_symlink() or not (leftover.is_dir() or leftover.is_file()):
            continue
        try:
            descriptor = lock(leftover)
        except OSError:  # its process may be alive
            continue
        with suppress(OSError):
            if match[2] and not leftover.with_name(match[1]).exists():
                leftover.rename(leftover.with_name(match[1]))
            elif leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is complete or gone if the process is killed."""
    temporary, locks = _temporary(path, Path.mkdir)
    with locks:
        shutil.rmtree(path.rename(temporary), ignore_errors=True)  # a rename replaces an empty folder


# --- Manifests ---


def digest(file: Path) -> str:
    """Return the sha256 of a file's content."""
    result = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(2**22):
            result.update(block)
    return result.hexdigest()


def write_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """Write size and sha256 of the folder's files to its manifest. With `names`, update these files' entries only."""
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
    """Return `bytes` and `sha256` by file name; None if the folder has no valid manifest."""
    try:
        content = read_json(Path(folder) / MANIFEST)
        files = content["files"]
        known = content["litgpt_manifest"] == MANIFEST_FORMAT
        typed = all(isinstance(facts["bytes"], int) and isinstance(facts["sha256"], str) for facts in files.values())
    except (UserError, KeyError, TypeError, AttributeError):
        return None
    return files if known and typed and all(map(is_inside, files)) else None


def unlisted(folder: Path) -> list[Path]:
    """Return the files in a folder that its manifest does not list."""
    listed = {*(read_manifest(folder) or ()), MANIFEST}
    return sorted(file for file in folder.rglob("*") if not file.is_dir() and file.relative_to(folder).as_posix() not in listed)


def damages(folder: str | Path, names: Iterable[str] | None = None, contents: bool = False) -> list[str]:
    """Return the differences between the folder and its manifest: sizes, and with `contents` the sha256 too. Empty if it is intact.

    `names` restricts the check to these files, as far as the manifest has them.
    """
    folder = Path(folder)
    files = read_manifest(folder)
    if files is None:
        return [f"{MANIFEST} is missing or broken"]
    problems = []
    for name in files if names is None else [name for name in names if name in files]:
        file, facts = folder / name, files[name]
        try:
            if not file.is_file():
                problems.append(f"{name} is missing")
            elif (size := file.stat().st_size) != facts["bytes"]:
                problems.append(f"{name} has {size:,} bytes, not {facts['bytes']:,}")
            elif contents and digest(file) != facts["sha256"]:
                problems.append(f"{name} is not what was written (its sha256 differs)")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
    return problems


def require_whole(folder: str | Path, *names: str) -> None:
    """Raise UserError if one of these files does not have the size in the folder's manifest. A folder without a manifest passes."""
    if read_manifest(folder) is not None and (problems := damages(folder, names)):
        raise UserError(f"{folder} is damaged: {'; '.join(problems)}. Copy or make it again (its {MANIFEST} lists its files)")
