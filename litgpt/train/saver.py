"""The folders that a run writes: `step-*` to resume from, `best`, `final`. Each appears whole or not at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from litgpt import atomic
from litgpt.errors import UserError
from litgpt.files import read_json
from litgpt.logs import MetricLoggers
from litgpt.train import out_dir as place
from litgpt.train.report import REPORT, as_json
from litgpt.train.resume import State, random_states, read, write


@dataclass
class Checkpoints:
    """Writes what `write` (weights, settings, tokenizer) and the training state put into a folder, from the first process."""

    out_dir: Path
    write: Callable[[Path], None]
    facts: dict[str, Any]
    """of the training state: identity and environment"""
    keep_last: int | None
    keep_best: bool
    gather: Callable[[torch.Tensor], torch.Tensor]
    """a tensor (n,) of every process -> (processes, n)"""
    barrier: Callable[[], None]
    log: MetricLoggers | None
    """None in processes other than the first"""
    newest: Path | None = None
    """the last checkpoint to go on from"""
    newest_of: tuple[int, bool] | None = None
    """the step it is of, and whether its validation is pending"""

    def step(self, state: State, optimizer: torch.optim.Optimizer | None, device: torch.device, kept: bool) -> Path:
        """Write `step-NNNNNN`, from which the run can go on. One that is not `kept` is removed when the next one is whole."""
        folder = self.out_dir / f"step-{state.step:06d}"
        states = {name: self.gather(value.to(device)) for name, value in (state.random or random_states(device)).items()}
        random = {f"{name}.{rank}": value.cpu() for name, all_ranks in states.items() for rank, value in enumerate(all_ranks)}
        with self._together(), self._folder(folder) as temporary:
            if temporary is not None:
                self.write(temporary)
                write(temporary, state, optimizer, random, {**self.facts, "kept": kept})
        self.newest, self.newest_of = folder, (state.step, state.pending is not None)
        if self.log is not None:
            self._prune(state.step)
        return folder

    def rescue(self, state: State, optimizer: torch.optim.Optimizer | None, device: torch.device) -> Path | None:
        """The checkpoint of the state as it is, written if need be; None before the first step, or in the middle of an update."""
        if not state.step or not state.consistent:
            return self.newest
        if self.newest_of == (state.step, state.pending is not None):
            return self.newest
        return self.step(state, optimizer, device, kept=False)

    def best(self, state: State) -> None:
        """Write `best` in place of the one before."""
        if self.keep_best and state.best is not None:
            step, loss = state.best
            self._write("best", {"step": step, "val_loss": loss})

    def final(self, report: dict[str, Any], finish: Callable[[Path], None]) -> None:
        """Write `final` and report.json; with it, checkpoints that were there only to resume from have served."""
        self._write("final", report, finish)
        if self.log is not None:
            atomic.write_text(self.out_dir / REPORT, as_json(report))
            self._prune(report["steps"] + 1)

    def _write(self, name: str, measured: dict[str, Any], finish: Callable[[Path], None] | None = None) -> None:
        with self._together(), self._folder(self.out_dir / name) as temporary:
            if temporary is not None:
                self.write(temporary)
                atomic.write_text(temporary / REPORT, as_json(measured))
                if finish is not None:
                    finish(temporary)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """All processes go on when the first has written, or failed to."""
        try:
            yield
        except UserError:
            self.barrier()
            raise
        self.barrier()

    @contextmanager
    def _folder(self, folder: Path) -> Iterator[Path | None]:
        """A new folder, in the first process. UserError if it cannot be written, which names the checkpoint that can be gone on from."""
        from safetensors import SafetensorError

        if self.log is None:
            yield None
            return
        try:
            self.log.flush()
            with atomic.new_folder(folder, overwrite=True) as temporary:
                yield temporary
        except (OSError, RuntimeError, SafetensorError) as error:
            cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides the one behind the other
            if not isinstance(cause, OSError | SafetensorError):
                raise
            remedy = f". {self.newest} is whole: make room, and {place.RESUME}" if self.newest else ""
            inner = re.search(r"I/O error: (.+?) \(os error", str(cause))  # as safetensors words it
            reason = inner[1] if inner else getattr(cause, "strerror", None) or cause
            raise UserError(f"{folder} cannot be written: {reason}{remedy}") from None

    def _prune(self, step: int) -> None:
        """Remove checkpoints before `step` that were only to resume from, and of the others all but the `keep_last` newest."""
        kept = 0
        for folder in place.steps(self.out_dir):
            number = place.number(folder) or 0
            flag = _is_kept(folder)
            kept += number <= step and flag is True
            surplus = flag is True and self.keep_last is not None and kept > self.keep_last
            if number < step and (surplus or flag is False):
                atomic.remove_folder(folder)


def _is_kept(folder: Path) -> bool | None:
    """What a checkpoint says of itself; None if it says nothing: it is none of ours."""
    try:
        return bool(read(folder).facts["kept"])
    except (UserError, KeyError):
        return None


def best_on_disk(out_dir: Path) -> tuple[int, float] | None:
    """Step and validation loss of `best`, if it is whole."""
    folder = out_dir / "best"
    if atomic.damages(folder):
        return None
    try:
        measured = read_json(folder / REPORT)
        return int(measured["step"]), float(measured["val_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
