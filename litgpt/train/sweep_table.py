"""What became of the settings of a sweep: sweep.csv and sweep.json, and the table on the terminal."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litgpt import atomic
from litgpt.errors import UserError
from litgpt.text import text_table
from litgpt.train.grid import Variant

CSV, JSON = "sweep.csv", "sweep.json"
MEASURED = (
    *("trainable_parameters", "initial_val_loss", "best_val_loss", "best_step", "final_val_loss"),
    *("steps", "epochs", "skipped_steps", "train_seconds", "total_seconds"),
)
"""Columns from a run's report.json."""
SHOWN = (
    ("parameters", "trainable_parameters", ","),
    ("loss before", "initial_val_loss", ".4f"),
    ("best", "best_val_loss", ".4f"),
    ("at step", "best_step", ","),
    ("after", "final_val_loss", ".4f"),
    ("steps", "steps", ","),
    ("seconds", "total_seconds", ".1f"),
)
"""Those on the terminal: title, name, format."""
WAITING, FINISHED, FAILED, STOPPED = "waiting", "finished", "failed", "stopped"


@dataclass
class Outcome:
    """What became of one setting."""

    variant: Variant
    status: str = WAITING
    reason: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    """of its report.json"""


@dataclass
class Table:
    """The outcomes of all settings, in the grid's order, and the files that tell them."""

    out_dir: Path
    outcomes: list[Outcome]
    keep_best: bool
    """whether the runs keep their checkpoint with the lowest validation loss"""
    facts: dict[str, Any] = field(default_factory=dict)
    """of sweep.json: settings, identity, environment, cache, seconds"""

    def save(self) -> None:
        """Write both files, each whole or not at all."""
        content = {**self.facts, "runs": [{**self._row(outcome), "grid": outcome.variant.values} for outcome in self.outcomes]}
        for name, text in ((CSV, self._csv()), (JSON, json.dumps(content, indent=2) + "\n")):
            try:
                atomic.write_text(self.out_dir / name, text)
            except OSError as error:
                raise UserError(f"{self.out_dir / name} cannot be written: {error.strerror}") from None

    def _row(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "setting": outcome.variant.name,
            "status": outcome.status,
            **{name: outcome.figures.get(name) for name in MEASURED},
            "folder": str(self.folder(outcome) if outcome.figures else self.out_dir / outcome.variant.name),
            "reason": outcome.reason,
        }

    def _csv(self) -> str:
        text = io.StringIO()
        keys = list(self.outcomes[0].variant.values)
        writer = csv.DictWriter(text, ["setting", *keys, *list(self._row(self.outcomes[0]))[1:]], lineterminator="\n")
        writer.writeheader()
        for outcome in self.outcomes:
            values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in outcome.variant.values.items()}
            writer.writerow({**self._row(outcome), **values})
        return text.getvalue()

    def loss(self, outcome: Outcome) -> float | None:
        """The validation loss that a setting is judged by: that of the checkpoint in its `folder`. None if it is no number."""
        loss = outcome.figures.get("best_val_loss" if self.keep_best else "final_val_loss")
        return loss if loss is not None and math.isfinite(loss) else None

    def folder(self, outcome: Outcome) -> Path:
        """Where the weights of that loss are."""
        figures, run = outcome.figures, self.out_dir / outcome.variant.name
        return run / ("best" if self.keep_best and figures["best_step"] not in (None, figures["steps"]) else "final")

    def of(self, status: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == status]

    @property
    def ranked(self) -> list[Outcome]:
        """The lowest loss first; then those without one."""
        losses = [math.inf if (loss := self.loss(outcome)) is None else loss for outcome in self.outcomes]
        return [self.outcomes[i] for i in sorted(range(len(losses)), key=losses.__getitem__)]

    def __str__(self) -> str:
        """A line for each setting, the best one first."""
        rows: list[tuple[str, ...]] = [("setting", *(title for title, _, _ in SHOWN), "")]
        for outcome in self.ranked:
            values = [(outcome.figures.get(name), form) for _, name, form in SHOWN]
            note = "" if outcome.status == FINISHED else f"{outcome.status}: {outcome.reason}".rstrip(": ")
            rows.append((outcome.variant.name, *("" if value is None else format(value, form) for value, form in values), note))
        return text_table(rows, left=(0, -1))
