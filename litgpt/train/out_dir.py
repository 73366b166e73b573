"""The folder that a run is written to: whose it is, what an earlier run left there, and where it is gone on with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from litgpt import atomic
from litgpt.errors import UserError
from litgpt.train.resume import FACTS, TENSORS

RESUME = "the same command with --resume true goes on from it"
AUTO = "auto"
LONGEST_NAME = 255
Resume = bool | str | Path


class Place:
    """`out_dir`, held against other runs while the block lasts. Only the first process (`active`) holds it and writes there.

    Raises UserError if the run cannot be written there, if `base` would be overwritten, or if another run is at work there.
    """

    def __init__(self, out_dir: Path, resume: Resume, overwrite: bool, base: Path, active: bool = True) -> None:
        self.out_dir, self.resume, self.overwrite, self.base, self.active = out_dir, resume, overwrite, base, active
        self._lock: int | None = None
        self._made = False

    def __enter__(self) -> Place:
        self.check()
        try:
            self._take()
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._release()

    def _release(self) -> None:
        if self._made:
            with suppress(OSError):  # not empty: there are results
                self.out_dir.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check(self) -> None:
        """Raises UserError, as entering does, and changes nothing."""
        out_dir = self.out_dir
        if self.resume is not False and self.overwrite:
            raise UserError("--resume goes on with the run in out_dir and --overwrite replaces it: give one of them")
        if any(len(os.fsencode(part)) > LONGEST_NAME for part in out_dir.parts):
            raise UserError(f"out_dir {out_dir} has a name too long for a file system ({LONGEST_NAME} bytes): give a shorter one")
        nearest = next(path for path in (out_dir, *out_dir.absolute().parents) if os.path.lexists(path))
        if not nearest.is_dir():
            raise UserError(
                f"out_dir {out_dir} is no place for a folder: {nearest} is {'a link to no folder' if nearest.is_symlink() else 'a file'}"
            )
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"out_dir {out_dir} cannot be written to: you may not write to {nearest}")
        found = earlier(out_dir)
        if found and self.resume is False and not self.overwrite:
            names = ", ".join(path.name for path in found)
            ways = "give another --out_dir, --resume true to go on with it, or --overwrite true to replace it"
            raise UserError(f"out_dir {out_dir} holds an earlier run ({names}): {ways}")
        if any(self.base.resolve().is_relative_to(path.resolve()) for path in found):
            raise UserError(f"checkpoint_dir {self.base} is part of the run in out_dir, which would be replaced: give another --out_dir")

    def _take(self) -> None:
        """Lock the folder, if it is there and the file system knows locks, and remove what killed processes left in it."""
        if not self.active or not self.out_dir.is_dir() or self._lock is not None:
            return
        try:
            self._lock = atomic.lock(self.out_dir)
        except BlockingIOError:
            raise UserError(
                f"out_dir {self.out_dir} is in use: another run is at work there. Wait for it, or give another --out_dir"
            ) from None
        except OSError:
            return
        atomic.remove_leftovers(self.out_dir)
        for file in (*self.out_dir.glob(".*.tmp"), *self.out_dir.glob("logs/version_0/.*.tmp")):
            if file.is_file():
                file.unlink()

    def make(self, resumed: bool) -> None:
        """Make the folder and hold it; empty it of the earlier run that is to be replaced."""
        if not self.active:
            return
        self._made = not self.out_dir.exists()
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"out_dir {self.out_dir} cannot be made: {error.strerror}. Give another --out_dir") from None
        self._take()
        self.check()  # another run may have been quicker
        if not resumed:
            for path in earlier(self.out_dir):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def resume_point(self, say: Callable[[str], None]) -> Path | None:
        """The checkpoint to go on from; None to start anew. Raises UserError if there is none where one is asked for."""
        if self.resume is False:
            return None
        if self.resume is not True and str(self.resume) != AUTO:
            return self._named(Path(self.resume))
        skipped = []
        for folder in steps(self.out_dir):
            if problem := unusable(folder):
                skipped.append(f"{folder.name} ({problem})")
                say(f"{folder} is not whole and is skipped: {problem}")
            else:
                return folder
        why = f"; not whole: {', '.join(skipped)}" if skipped else ""
        if self.resume is True:
            raise UserError(f"resume: out_dir {self.out_dir} holds no checkpoint to go on from{why}. Leave --resume away to start anew")
        if skipped or (self.out_dir / "final").exists():
            ways = "give another --out_dir, or --overwrite true instead to replace it"
            raise UserError(f"resume: out_dir {self.out_dir} holds a run, but no checkpoint to go on from{why}: {ways}")
        return None

    def _named(self, folder: Path) -> Path:
        if not folder.is_dir():
            raise UserError(f"resume: there is no folder {folder}: give true, auto or a step-* folder of out_dir")
        if folder.resolve().parent != self.out_dir.resolve() or number(folder) is None:
            raise UserError(f"resume: {folder} is no step-* folder of out_dir {self.out_dir}: give --out_dir {folder.resolve().parent}")
        if problem := unusable(folder):
            raise UserError(f"resume: {folder} is not whole: {problem}. Name another step, or give --resume true for the newest whole one")
        later = [path for path in steps(self.out_dir) if (number(path) or 0) > (number(folder) or 0)]
        later += [path for path in (self.out_dir / "final",) if path.exists()]
        if later:
            names = ", ".join(path.name for path in later)
            raise UserError(f"resume: out_dir {self.out_dir} holds later results than {folder.name} ({names}): move them away first")
        return folder

    @property
    def is_finished(self) -> bool:
        """Whether a run to go on with has ended here."""
        return self.resume is not False and not atomic.damages(self.out_dir / "final")


def earlier(out_dir: Path) -> list[Path]:
    """What a run left in the folder."""
    return sorted(path for pattern in ("step-*", "best", "final", "logs", "report.json") for path in out_dir.glob(pattern))


def number(folder: Path) -> int | None:
    digits = folder.name.removeprefix("step-")
    return int(digits) if folder.name != digits and digits.isdecimal() else None


def steps(out_dir: Path) -> list[Path]:
    """The `step-*` folders, newest first."""
    numbered = {path: found for path in out_dir.glob("step-*") if (found := number(path)) is not None}
    return sorted(numbered, key=lambda path: -numbered[path])


def unusable(folder: Path) -> str:
    """Why the checkpoint cannot be gone on from; empty if it can."""
    if problems := atomic.damages(folder, contents=True):
        return "; ".join(problems)
    missing = [name for name in (FACTS, TENSORS) if name not in (atomic.read_manifest(folder) or ())]
    return f"it has no {' and no '.join(missing)}" if missing else ""
