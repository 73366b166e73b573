"""Bad input from the command line: a world of small good files to spoil, one run of a command, and what must hold of its end."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from litgpt.__main__ import main

LONGEST_MESSAGE = 2100
"""characters, paths included: what a person will still read"""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
RECORDS = [{"instruction": f"add {i} and {i + 1}", "input": "", "output": f"{2 * i + 1}"} for i in range(8)]


@dataclass(frozen=True)
class World:
    """Good files, made once: never written to, copied into a `Place` before they are spoilt."""

    base: Path
    adapter: Path
    hf: Path
    gguf: Path


class Place:
    """An empty folder, the current one of the command, into which a case puts its input."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world

    def write(self, name: str, content: Any) -> Path:
        """A file: bytes, text, or anything else as JSON."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def base(self) -> Path:
        """A copy of the tiny checkpoint, `base`."""
        return self._copy(self.world.base, "base")

    def adapter(self) -> Path:
        """A copy of an adapter folder, `adapter`, of the base in `base`, which is copied too."""
        self.base()
        folder = self._copy(self.world.adapter, "adapter")
        file = folder / "hyperparameters.yaml"
        file.write_text(file.read_text().replace(str(self.world.base), str(self.folder / "base")))
        return folder

    def hf(self) -> Path:
        """A copy of a Hugging Face folder, `hf`."""
        return self._copy(self.world.hf, "hf")

    def gguf(self) -> Path:
        """A copy of a GGUF file, `model.gguf`."""
        return Path(shutil.copyfile(self.world.gguf, self.folder / "model.gguf"))

    def data(self, content: Any = None, name: str = "data.json") -> Path:
        return self.write(name, RECORDS if content is None else content)

    def _copy(self, source: Path, name: str) -> Path:
        target = self.folder / name
        if not target.exists():
            shutil.copytree(source, target)
        return target


class Case(NamedTuple):
    """`words` spoils a place and gives the command line."""

    name: str
    words: Callable[[Place], list[Any]]
    culprit: str
    """what the message must name: the file, key or value"""
    remedy: str
    """what it must say to do, or what is right"""
    code: int = 1


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class OutOfTimeError(BaseException):
    """Not an Exception, so that nothing takes it for bad input."""


@contextlib.contextmanager
def bounded(seconds: float = 30, memory: int = 2**31) -> Iterator[None]:
    """Neither a hang nor an allocation without bound: `OutOfTimeError` after so long, MemoryError beyond so many bytes more than now."""

    def end(signum: int, frame: object) -> None:
        raise OutOfTimeError

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, end)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run(words: list[Any]) -> Ended:
    """The command in this process, bounded. Any exception but SystemExit is a bug, and comes through."""
    out, err = io.StringIO(), io.StringIO()
    with bounded(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
    return Ended(code, out.getvalue(), err.getvalue())


def tree(folder: Path) -> dict[str, tuple[str, ...]]:
    """Everything below a folder: kind, permissions, and the content's digest or the link's target."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(root) / name
            status = path.lstat()
            content = os.readlink(path) if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
            found[str(path.relative_to(folder))] = (oct(status.st_mode), content)
    return found


def check_message(ended: Ended, culprit: str, remedy: str, code: int) -> None:
    """One error, at the end of standard error, that names the culprit and the remedy; no traceback, nothing on standard output."""
    assert ended.code == code, (ended.code, ended.err[-2000:])
    head, error, message = ("\n" + ended.err).rpartition("\nError: ")
    assert error and not re.search("^Error: ", head, re.MULTILINE), ended.err
    assert "Traceback" not in ended.err and ended.out == ""
    assert len(message) <= LONGEST_MESSAGE, f"{len(message)} characters: {message[:500]}"
    assert not CONTROL.search(message.replace("\n", "")), repr(message)
    assert culprit in message, f"{culprit!r} is not in: {message}"
    assert remedy in message, f"{remedy!r} is not in: {message}"


def check(case: Case, place: Place, run: Callable[[list[Any]], Ended] = run) -> Ended:
    """Run one case in its place; the command may change nothing there."""
    words = case.words(place)
    before = tree(place.folder)
    ended = run(words)
    check_message(ended, case.culprit, case.remedy, case.code)
    assert tree(place.folder) == before
    return ended
