"""The trials of a sweep: every combination of a grid's values as settings of its own, and the table of their results."""

import csv
import hashlib
import io
import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from litgpt.args import Grid, marked
from litgpt.atomic import lock_bytes, unlock_bytes, write_text
from litgpt.errors import UserError
from litgpt.files import json_in, open_regular, read_json
from litgpt.text import text_table
from litgpt.train.settings import Run

MOST = 10_000  # trials of a sweep
SHORTER = {"skip2lora_block_indices": "blocks", "lora_block_indices": "lora_blocks"}  # key -> its name in a folder's name
LONGEST = 120  # characters of a folder's name
CSV, JSON = "sweep.csv", "sweep.json"
MEASURED = (  # columns that come from a run's report.json
    *("trainable_parameters", "initial_val_loss", "best_val_loss", "best_step", "final_val_loss"),
    *("steps", "epochs", "skipped_steps", "train_seconds", "total_seconds"),
)
SHOWN = (  # columns on the terminal: title, name, format
    ("parameters", "trainable_parameters", ","),
    ("loss before", "initial_val_loss", ".4f"),
    ("best", "best_val_loss", ".4f"),
    ("at step", "best_step", ","),
    ("after", "final_val_loss", ".4f"),
    ("steps", "steps", ","),
    ("seconds", "total_seconds", ".1f"),
)
WAITING, BEGUN, FINISHED, FAILED, STOPPED = "waiting", "begun", "finished", "failed", "stopped"
LOCKS = ".sweep.lock"


@dataclass(eq=False)
class Trial:
    """One setting of a sweep and its result."""

    name: str  # of its folder in the sweep's out_dir
    values: dict[str, Any]  # of the grid's keys
    settings: Run  # the sweep's own if the values contradict each other
    status: str = WAITING
    reason: str = ""  # why it failed, or cannot be trained
    figures: dict[str, Any] = field(default_factory=dict)  # of its report.json
    method: Any = None  # a `litgpt.train.methods.Method`
    config: Any = None  # of its model
    chosen: list[int] | None = None  # the blocks that `auto` chose


def expand(settings: Run, grid: Grid | None, samples: int | None = None) -> list[Trial]:
    """Return a trial for every combination of the grid's values, the last key varying fastest; with `samples`, for a random subset.

    Raises UserError for keys that may not vary and for values that are named twice.
    """
    if not grid:
        raise UserError("no grid: name the keys to vary and the values to try, for example --grid.lora_r '[4, 8, 16]'")
    if getattr(settings, "modules_to_save", None):
        raise UserError(
            "modules_to_save trains weights of the base, which the trials of a sweep share: run `litgpt finetune_lora` for each"
        )
    grid, varying = without_repeats(grid), list(marked(type(settings), "varies"))
    if fixed := [key for key in grid if key not in varying and not key.startswith("optimizer.")]:
        raise UserError(
            f"grid: {', '.join(fixed)} cannot vary: the frozen layers' outputs are computed once, and every trial is trained from them. "
            f"These may vary: {', '.join(varying)}, optimizer.*. For anything else, run a sweep for each value"
        )
    total = math.prod(map(len, grid.values()))
    numbers: Sequence[int] = range(total)
    if samples is not None and samples < total:
        numbers = sorted(random.Random(settings.seed).sample(numbers, samples))
    if len(numbers) > MOST:
        raise UserError(f"the grid has {total:,} settings, more than {MOST:,}: name fewer values, or draw some with --samples 100")
    combinations = [_combination(grid, number) for number in numbers]
    return [_trial(settings, name, values) for name, values in zip(_names(combinations), combinations, strict=True)]


def foreign_files(out_dir: Path) -> list[str]:
    """Return the names of a sweep's files that are in the folder but that no sweep wrote."""
    files = [file for name in (CSV, JSON, LOCKS) if os.path.lexists(file := out_dir / name)]
    return [file.name for file in files if file.is_symlink() or not file.is_file() or not _is_own(file)]


def _is_own(file: Path) -> bool:
    if file.name == JSON:
        return isinstance(json_in(file).get("identity"), dict)
    with file.open("rb") as content:
        header = content.readline(2**16)
    return not header if file.name == LOCKS else header.startswith(b"setting,") and b",status,trainable_parameters," in header


def without_repeats(grid: Grid) -> Grid:
    """Return the grid with `optimizer.init_args.lr` as `optimizer.lr`. Raises UserError for a key or a value that is named twice."""
    keys = [key.replace("optimizer.init_args.", "optimizer.") for key in grid]
    for key, values in zip(keys, grid.values(), strict=True):
        (text, count), *_ = Counter(json.dumps(value, sort_keys=True, default=str) for value in values).most_common(1)
        if count > 1 or keys.count(key) > 1:
            raise UserError(f"grid.{key} {f'names {text}' if count > 1 else 'is given'} twice: leave one out")
    return dict(zip(keys, grid.values(), strict=True))


def _combination(grid: Grid, number: int) -> dict[str, Any]:
    """Return the values of combination `number`."""
    values: dict[str, Any] = {}
    for key in reversed(grid):
        number, position = divmod(number, len(grid[key]))
        values[key] = grid[key][position]
    return {key: values[key] for key in grid}


def _names(combinations: list[dict[str, Any]]) -> list[str]:
    """Return names such as `lora_r=8,lr=0.001`, safe for file systems and shells; with a digest if a name is too long or not unique."""
    names = [",".join(f"{SHORTER.get(key, key.rpartition('.')[2])}={_plain(value)}" for key, value in v.items()) for v in combinations]
    unique = len(set(names)) == len(names)
    for i, (name, values) in enumerate(zip(names, combinations, strict=True)):
        if not unique or len(name) > LONGEST:
            digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
            names[i] = f"{name[:LONGEST]}-{digest}"
    return names


def _plain(value: Any) -> str:
    """`last:6` -> `last-6`, `[0, 5]` -> `0-5`"""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text.strip('[]{}"'))


def _trial(settings: Run, name: str, values: dict[str, Any]) -> Trial:
    try:
        return Trial(name, values, _with(settings, {**values, "out_dir": settings.out_dir / name}))
    except UserError as error:
        return Trial(name, values, settings, FAILED, str(error))


def _with(settings: Run, values: dict[str, Any]) -> Run:
    """Return the settings with other values of some keys. Raises UserError if the values contradict each other."""
    changes, groups = dict[str, Any](), dict[str, dict[str, Any]]()
    for key, value in sorted(values.items()):  # the optimizer's class before its arguments
        root, _, name = key.partition(".")
        if root == "optimizer":
            optimizer = changes.get("optimizer", settings.optimizer)
            recipe: dict[str, Any] = {"class_path": optimizer} if isinstance(optimizer, str) else optimizer
            if name:
                changes["optimizer"] = {**recipe, "init_args": {**recipe.get("init_args", {}), name: value}}
            elif value != recipe["class_path"]:
                changes["optimizer"] = value
        elif name:
            groups.setdefault(root, {})[name] = value
        else:
            changes[key] = value
    return replace(settings, **changes, **{root: replace(getattr(settings, root), **group) for root, group in groups.items()})


@dataclass
class Table:
    """The results of all trials, in the grid's order, and the files that hold them, which all processes of a sweep read and write.

    A process holds the lock of the trial that it trains, and the table's lock while it writes the table.
    """

    out_dir: Path
    trials: list[Trial]
    keep_best: bool  # the runs keep their checkpoint with the lowest validation loss
    facts: dict[str, Any] = field(default_factory=dict)  # of sweep.json: settings, identity, environment, cache, seconds

    @cached_property
    def _locks(self) -> int:
        """A file with a byte for the table and for each trial."""
        return open_regular(self.out_dir / LOCKS, os.O_RDWR | os.O_CREAT)

    @contextmanager
    def locked(self, trial: Trial | None = None, wait: bool = True) -> Iterator[bool]:
        """Lock the table, or a trial, and yield whether that was possible. File systems without locks are used unlocked."""
        place = 0 if trial is None else 1 + self.trials.index(trial)
        is_held = lock_bytes(self._locks, place, wait=wait)
        try:
            yield is_held
        finally:
            if is_held:
                unlock_bytes(self._locks, place)

    def refresh(self) -> None:
        """Read what the processes of the sweep have recorded."""
        content = read_json(self.out_dir / JSON)
        for trial, row in zip(self.trials, content.pop("runs"), strict=True):
            trial.status, trial.reason = row["status"], row["reason"]
            measured = {name: row[name] for name in MEASURED}
            trial.figures = measured if any(value is not None for value in measured.values()) else {}
        self.facts = {**content, **self.facts}

    def note(self, trial: Trial, status: str, reason: str = "", figures: dict[str, Any] | None = None) -> None:
        """Write the status of a trial."""
        with self.locked():
            self.refresh()
            trial.status, trial.reason, trial.figures = status, reason, figures or {}
            self.save()

    def save(self) -> None:
        """Write both files, each complete or not at all."""
        best = next((trial.name for trial in self.ranked if self.loss(trial) is not None), None)
        content = {**self.facts, "best": best, "runs": [{**self._row(trial), "grid": trial.values} for trial in self.trials]}
        for name, text in ((CSV, self._csv()), (JSON, json.dumps(content, indent=2) + "\n")):
            try:
                write_text(self.out_dir / name, text)
            except OSError as error:
                raise UserError(f"{self.out_dir / name} cannot be written: {error.strerror}") from None

    def _row(self, trial: Trial) -> dict[str, Any]:
        return {
            "setting": trial.name,
            "status": trial.status,
            **{name: trial.figures.get(name) for name in MEASURED},
            "folder": str(self.folder(trial) if trial.figures else self.out_dir / trial.name),
            "reason": trial.reason,
        }

    def _csv(self) -> str:
        text = io.StringIO()
        rows = [self._row(trial) for trial in self.trials]
        writer = csv.DictWriter(text, ["setting", *self.trials[0].values, *list(rows[0])[1:]], lineterminator="\n")
        writer.writeheader()
        for trial, row in zip(self.trials, rows, strict=True):
            values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in trial.values.items()}
            writer.writerow({**row, **values})
        return text.getvalue()

    def loss(self, trial: Trial) -> float | None:
        """Return the validation loss of the checkpoint in the trial's `folder`, by which it is ranked. None if it is not finite."""
        loss = trial.figures.get("best_val_loss" if self.keep_best else "final_val_loss")
        return loss if loss is not None and math.isfinite(loss) else None

    def folder(self, trial: Trial) -> Path:
        """Return the folder with the weights of that loss."""
        figures, run = trial.figures, self.out_dir / trial.name
        return run / ("best" if self.keep_best and figures["best_step"] not in (None, figures["steps"]) else "final")

    def of(self, *statuses: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.status in statuses]

    @property
    def ranked(self) -> list[Trial]:
        """The trials, lowest loss first; then those without one."""
        return sorted(self.trials, key=lambda trial: math.inf if (loss := self.loss(trial)) is None else loss)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("setting", *(title for title, _, _ in SHOWN), "")]
        for trial in self.ranked:
            values = [(trial.figures.get(name), form) for _, name, form in SHOWN]
            note = "" if trial.status == FINISHED else f"{trial.status}: {trial.reason}".rstrip(": ")
            rows.append((trial.name, *("" if value is None else format(value, form) for value, form in values), note))
        return text_table(rows, left=(0, -1))
