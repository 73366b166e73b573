"""The folder that a run writes: who may write there, where a run is resumed, and its checkpoints `step-*`, `best` and `final`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from litgpt import atomic
from litgpt.errors import UserError
from litgpt.files import json_in, read_json, require_utf8
from litgpt.logs import COLUMNS, EVENTS_SUFFIX, METRICS, MetricLoggers
from litgpt.sharding import gathered
from litgpt.train import resume as training_state
from litgpt.train.loop import Loop
from litgpt.train.page import MARK
from litgpt.train.parallel import Rank
from litgpt.train.report import PAGE, REPORT, as_json
from litgpt.train.resume import FACTS, TENSORS, State, random_states
from litgpt.train.settings import Run

RESUME = "the same command with --resume true continues from it"
LOGS, LOG_FILES = METRICS.parent, (METRICS.name, f"events.out.tfevents.*{EVENTS_SUFFIX}")


class OutDir:
    """`out_dir`, locked against other runs for the duration of the block. Only the first process (`active`) locks it and writes there.

    Raises UserError if the run cannot be written there, if its base would be overwritten, or if another run is using the folder.
    """

    def __init__(self, settings: Run, active: bool = True) -> None:
        self.path, self.resume, self.overwrite, self.active = settings.out_dir, settings.resume, settings.overwrite, active
        self.base = settings.checkpoint_dir
        self._lock: int | None = None
        self._made = False

    def __enter__(self) -> OutDir:
        self.check()
        try:
            self._take()
        except BaseException:  # a lock that stays would refuse the next run of this process
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._made:
            with suppress(OSError):  # not empty: there are results
                self.path.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check(self, refuse_earlier: bool = True) -> None:
        """Raise the UserErrors that entering raises, but change nothing. `refuse_earlier`: also for an earlier run in the folder."""
        path = self.path
        if self.resume is not False and self.overwrite:
            raise UserError("--resume continues the run in out_dir and --overwrite replaces it: give one of them")
        require_utf8(path, "the writers of weights and of TensorBoard's files")
        nearest = next(parent for parent in (path, *path.absolute().parents) if os.path.lexists(parent))
        if not nearest.is_dir():
            kind = "a broken link" if nearest.is_symlink() else "a file"
            raise UserError(f"out_dir {path} cannot be a folder: {nearest} is {kind}")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"out_dir {path} cannot be written to: you may not write to {nearest}")
        results, foreign = earlier(path)
        if misplaced := foreign if self.overwrite else _misplaced_logs(path):
            self._refuse(misplaced)
        only_logs = all(result.is_relative_to(path / LOGS) for result in results)  # of a run that ended before its first checkpoint
        if (foreign or not only_logs) and refuse_earlier and self.resume is False and not self.overwrite:
            names = ", ".join(dict.fromkeys(result.relative_to(path).parts[0] for result in sorted(results + foreign)))
            ways = "give another --out_dir, --resume true to continue it, or --overwrite true to replace it"
            raise UserError(f"out_dir {path} holds an earlier run ({names}): {ways}")
        if any(self.base.resolve().is_relative_to(result.resolve()) for result in results):
            raise UserError(f"checkpoint_dir {self.base} is part of the run in out_dir, which would be replaced: give another --out_dir")

    def _refuse(self, foreign: list[Path]) -> NoReturn:
        names = ", ".join(str(file.relative_to(self.path)) for file in foreign[:6])
        raise UserError(f"out_dir {self.path} holds files named like a run's that no run wrote ({names}): move them away first")

    def _take(self) -> None:
        """Lock the folder, if it exists and the file system supports locks, and remove the leftovers of killed processes."""
        if not self.active or not self.path.is_dir() or self._lock is not None:
            return
        try:
            self._lock = atomic.lock(self.path)
        except BlockingIOError:
            raise UserError(f"out_dir {self.path} is in use by another run: wait for it, or give another --out_dir") from None
        except OSError:
            return
        for folder in (self.path, self.path / "logs" / "version_0"):
            atomic.remove_leftovers(folder)

    def make(self, resumed: bool) -> None:
        """Make the folder and lock it; remove an earlier run that is to be replaced."""
        if not self.active:
            return
        self._made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"out_dir {self.path} cannot be created: {error.strerror}. Give another --out_dir") from None
        self._take()
        self.check()  # another run may have been quicker
        if not resumed:
            results, foreign = earlier(self.path)
            if foreign:
                self._refuse(foreign)
            for result in results:
                atomic.remove_folder(result) if result.is_dir() else result.unlink()
            for folder in (self.path / LOGS, (self.path / LOGS).parent):
                with suppress(OSError):  # not empty, or missing
                    folder.rmdir()

    def resume_point(self, say: Callable[[str], None]) -> Path | None:
        """Return the checkpoint to resume, or None for a new run. Raises UserError if `resume` requires one and there is none."""
        if self.resume is False:
            return None
        if (named := self._named_step()) is not None:
            if problem := unusable(named):
                raise UserError(f"resume: {named} is incomplete: {problem}. Name another step, or give --resume true for the newest one")
            later = [path.name for path in steps(self.path) if number(path) > number(named)]
            later += ["final"] if (self.path / "final").exists() else []
            if later:
                names = ", ".join(later)
                raise UserError(f"resume: out_dir {self.path} holds later results than {named.name} ({names}): move them away first")
            return named
        skipped = []
        for folder in steps(self.path):
            if problem := unusable(folder):
                skipped.append(f"{folder.name} ({problem})")
                say(f"{folder} is incomplete and is skipped: {problem}")
            else:
                return folder
        why = f"; incomplete: {', '.join(skipped)}" if skipped else ""
        if self.resume is True:
            raise UserError(f"resume: out_dir {self.path} holds no checkpoint to resume{why}. To start anew, give --overwrite true instead")
        if skipped or (self.path / "final").exists():
            ways = "give another --out_dir, or --overwrite true instead to replace it"
            raise UserError(f"resume: out_dir {self.path} holds a run, but no checkpoint to resume{why}: {ways}")
        return None

    def _named_step(self) -> Path | None:
        """Return the folder that `resume` names. Raises UserError if it is not one of this run's checkpoints."""
        if isinstance(self.resume, bool) or str(self.resume) == "auto":
            return None
        folder = Path(self.resume)
        if not folder.is_dir():
            raise UserError(f"resume: there is no folder {folder}: give true, auto or a step-* folder of out_dir")
        if folder.resolve().parent != self.path.resolve() or number(folder) < 0:
            raise UserError(f"resume: {folder} is not a step-* folder of out_dir {self.path}: give --out_dir {folder.resolve().parent}")
        return folder

    @property
    def is_finished(self) -> bool:
        """True if the run to resume is finished."""
        self._named_step()
        return self.resume is not False and not atomic.damages(self.path / "final")


@dataclass
class Checkpoints:
    """Writes the checkpoints of a run, from the first process. Each folder appears complete or not at all."""

    out_dir: Path
    contents: Callable[[Path | None], None]
    """gathers the weights of all ranks, and writes them, settings and tokenizer into a folder if one is given"""
    facts: dict[str, Any]  # of the training state: identity and environment
    keep_last: int | None
    rank: Rank
    log: MetricLoggers | None  # None in processes other than the first
    newest: Path | None = None  # the last checkpoint that can be resumed
    unproven: list[Path] = field(default_factory=list)
    """checkpoints since the last one whose weights gave a sound loss; they do not replace earlier ones"""

    def step(self, state: State, loop: Loop | None, kept: bool) -> Path:
        """Write `step-NNNNNN`, which can be resumed, with the loop's optimizer. Unless `kept`, a later one of sound loss replaces it."""
        folder = self.out_dir / f"step-{state.step:06d}"
        states = {name: self.rank.gather(value) for name, value in (state.random or random_states(self.rank.device)).items()}
        random = {f"{name}.{rank}": value.cpu() for name, all_ranks in states.items() for rank, value in enumerate(all_ranks)}
        optimizer = {} if loop is None else gathered(loop.optimizer.state_dict()["state"], loop.weights)
        with self._folder(folder) as temporary:
            facts = {**self.facts, "kept": kept}
            self._gather(temporary, self.contents, lambda place: training_state.write(place, state, optimizer, random, facts))
        self.newest, state.saved = folder, True
        self.unproven.append(folder)
        return folder

    def prove(self) -> None:
        """Remove the checkpoints that the newest one replaces: its weights, or later ones, gave a sound loss."""
        if self.unproven and self.log is not None:
            prune(self.out_dir, number(self.unproven[-1]), self.keep_last)
        self.unproven.clear()

    def discard_unproven(self) -> None:
        """Remove the checkpoints of weights that have diverged. The oldest stays if there is no other."""
        others = set(steps(self.out_dir)) - set(self.unproven)
        for folder in self.unproven[0 if others else 1 :] if self.log is not None else ():
            atomic.remove_folder(folder)
        self.unproven.clear()
        self.newest = next((folder for folder in steps(self.out_dir) if not unusable(folder)), None)

    def rescue(self, state: State, loop: Loop | None) -> Path | None:
        """Return a checkpoint of the state, written if necessary; the last one if the optimizer was writing, None before the first step."""
        if not state.step or not state.consistent or state.saved:
            return self.newest
        return self.step(state, loop, kept=False)

    def folder(self, name: str, measured: dict[str, Any], finish: Callable[[Path], None] | None = None) -> None:
        """Write `best` or `final` with the figures `measured`; `finish` adds files and figures."""
        with self._folder(self.out_dir / name) as temporary:
            self._gather(temporary, self.contents)
            if temporary is not None:
                if finish is not None:
                    finish(temporary)
                atomic.write_text(temporary / REPORT, as_json(measured))

    def _gather(self, folder: Path | None, *writers: Callable[[Path | None], None]) -> None:
        """Call functions that gather tensors of all ranks and write them. One that fails to write keeps no rank from the others."""
        failure = None
        for write in writers if folder is not None or self.rank.sharded else ():
            try:
                write(None if failure else folder)
            except (OSError, UserError) as error:
                failure = error
        if failure is not None:
            raise failure

    @contextmanager
    def _folder(self, folder: Path) -> Iterator[Path | None]:
        """Yield a new folder in the first process and None in the others, which wait until it is written or has failed.

        Raises a UserError that names the checkpoint to resume.
        """
        try:
            if self.log is None:
                yield None
            else:
                self.log.flush()
                with atomic.new_folder(folder, overwrite=True) as temporary:
                    yield temporary
        except (OSError, UserError) as error:
            self.rank.barrier()
            if isinstance(error, UserError):
                raise
            remedy = f". {self.newest} is complete: make room, and {RESUME}" if self.newest else ""
            raise UserError(f"{folder} cannot be written: {error.strerror or error}{remedy}") from None
        else:
            self.rank.barrier()


def conclude(out_dir: Path, report: dict[str, Any], keep_last: int | None) -> None:
    """Remove a finished run's checkpoints that were only for resuming. report.json is written last: it marks this as done."""
    prune(out_dir, report["steps"] + 1, keep_last)
    atomic.write_text(out_dir / REPORT, as_json(report))


def prune(out_dir: Path, step: int, keep_last: int | None) -> None:
    """Remove the temporary checkpoints before `step`, and all but the `keep_last` newest of the permanent ones.

    A folder to which the user has added a file stays.
    """
    kept = 0
    for folder in steps(out_dir):
        folder_step, flag = number(folder), _is_kept(folder)
        kept += folder_step <= step and flag is True
        surplus = flag is True and keep_last is not None and kept > keep_last
        if folder_step < step and (surplus or flag is False) and not atomic.unlisted(folder):
            atomic.remove_folder(folder)


def earlier(out_dir: Path) -> tuple[list[Path], list[Path]]:
    """Return the results of an earlier run in the folder, and the files with names of results that no run wrote."""
    logs = sorted(file for pattern in LOG_FILES for file in (out_dir / LOGS).glob(pattern))
    ours = [file for file in logs if _is_log(file)]
    foreign = [*_misplaced_logs(out_dir), *(file for file in logs if file not in ours)]
    for path in (*steps(out_dir), out_dir / "best", out_dir / "final"):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            foreign.append(path)
        elif path.is_dir():
            extra = atomic.unlisted(path)
            foreign += extra
            ours += [] if extra else [path]
    if (report := out_dir / REPORT).exists():
        (ours if "trainable_parameters" in json_in(report) else foreign).append(report)
    if (about := out_dir / PAGE).exists():
        (ours if about.is_file() and MARK in about.read_bytes()[:400] else foreign).append(about)
    return ours, foreign


def _is_log(file: Path) -> bool:
    """Return True for a file of a run's logs. Another program's metrics.csv has other columns."""
    if file.is_symlink() or not file.is_file():
        return False
    with file.open("rb") as content:
        return file.name != METRICS.name or content.readline(200).startswith(",".join(COLUMNS).encode())


def _misplaced_logs(out_dir: Path) -> list[Path]:
    """Return the paths of the logs' folders that are not folders, or are links, which would lead the logs elsewhere."""
    places = ((out_dir / LOGS).parent, out_dir / LOGS)
    return [place for place in places if os.path.lexists(place) and (place.is_symlink() or not place.is_dir())]


def number(folder: Path) -> int:
    """Return the step of a `step-*` folder, -1 for another name."""
    digits = folder.name.removeprefix("step-")
    return int(digits) if folder.name != digits and digits.isdecimal() else -1


def steps(out_dir: Path) -> list[Path]:
    """Return the `step-*` folders, newest first."""
    return sorted((path for path in out_dir.glob("step-*") if number(path) >= 0), key=number, reverse=True)


def unusable(folder: Path) -> str:
    """Return why the checkpoint cannot be resumed; empty if it can."""
    if problems := atomic.damages(folder, contents=True):
        return "; ".join(problems)
    missing = [name for name in (FACTS, TENSORS) if name not in (atomic.read_manifest(folder) or ())]
    return f"it has no {' and no '.join(missing)}" if missing else ""


def _is_kept(folder: Path) -> bool | None:
    """Return the flag of a checkpoint; None for a folder that this program did not write."""
    try:
        return bool(training_state.read(folder).facts["kept"])
    except (UserError, KeyError):
        return None


def best_on_disk(out_dir: Path) -> tuple[int, float] | None:
    """Return step and validation loss of a complete `best`."""
    folder = out_dir / "best"
    if atomic.damages(folder):
        return None
    try:
        measured = read_json(folder / REPORT)
        return int(measured["step"]), float(measured["val_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
