"""What the evaluation scripts stand on: the machine, what runs measured, read and checked, and tables, pictures and documents of it."""

from __future__ import annotations

import base64
import csv
import html
import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import yaml

import litgpt
from litgpt.errors import UserError
from litgpt.text import markdown_table

METRICS = Path("logs") / "version_0"
"""of a run's folder: metrics.csv and TensorBoard's events"""
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { border: 1px solid #ccc; padding: .3em .7em; text-align: right }
td:first-child, th:first-child { text-align: left } th { background: #f3f3f3 } img { max-width: 100% }"""
SETTINGS = ("checkpoint_dir", "precision", "data", "train", "optimizer", "seed", "skip2lora_enabled")
"""of hyperparameters.yaml: what has to be known to judge whether runs can be compared"""
NEEDED = ("steps", "trainable_parameters", "total_parameters", "train_seconds", "total_seconds", "peak_memory_gb")
"""what a completed run must have measured"""
WHAT = "evaluate_skip2lora_comparison.py writes it"


def environment() -> dict[str, Any]:
    """The machine, the versions and the time."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": psutil.virtual_memory().total / 2**30,
        "gpu": ", ".join(gpus) or None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "litgpt": litgpt.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def less(base: float, value: float) -> float:
    """By how many percent smaller than the baseline; negative where larger."""
    return 100 * (1 - value / base)


def percent(less_than_base: float) -> str:
    """75.0 -> "-75.0 %", the change that a reduction is."""
    return f"{-less_than_base + 0.0:+.1f} %"


@dataclass
class Table:
    header: list[str]
    rows: list[list[str]]


@dataclass
class Picture:
    title: str
    file: Path
    """a PNG, in the report's folder"""


Part = str | list[str] | Table | Picture
Sections = dict[str, list[Part]]


def as_markdown(title: str, sections: Sections) -> str:
    lines = [f"# {title}"]
    for heading, parts in sections.items():
        lines.append(f"## {heading}")
        for part in parts:
            if isinstance(part, Table):
                lines.append(markdown_table(part.header, part.rows))
            elif isinstance(part, Picture):
                lines.append(f"![{part.title}]({part.file.name})")
            else:
                lines.append(part if isinstance(part, str) else "\n".join(f"- {item}" for item in part))
    return "\n\n".join(lines) + "\n"


def as_html(title: str, sections: Sections) -> str:
    """One file: pictures are inside."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, parts in sections.items():
        body.append(f"<h2>{html.escape(heading)}</h2>")
        for part in parts:
            if isinstance(part, Table):
                head = "".join(f"<th>{html.escape(cell)}</th>" for cell in part.header)
                rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in part.rows]
                body.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
            elif isinstance(part, Picture):
                data = base64.b64encode(part.file.read_bytes()).decode()
                body.append(f'<img alt="{html.escape(part.title)}" src="data:image/png;base64,{data}">')
            elif isinstance(part, str):
                body.append(f"<p>{html.escape(part)}</p>")
            else:
                body.append(f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in part)}</ul>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, in inches; None without matplotlib, and one line on standard error that says so."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed, so there are no pictures: pip install matplotlib", file=sys.stderr)
        return None
    return Figure(figsize=(width, height), layout="constrained")


def bars(axes: Any, title: str, values: dict[str, float], unit: str) -> None:
    """Horizontal bars, the first on top, each with its value."""
    drawn = axes.barh(list(values), list(values.values()), color=[f"C{i}" for i in range(len(values))])
    axes.bar_label(drawn, fmt=lambda value: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(values.values()) or 1)
    axes.set_title(title)
    axes.set_xlabel(unit)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError that says what was expected."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {what}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): {what}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: {what}")
    return content


def read_metrics(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Column -> (step, value) of each row that has one, from a run's metrics.csv; {} without the file. Raises UserError if it is broken."""
    path = folder / METRICS / "metrics.csv"
    columns: dict[str, list[tuple[int, float]]] = {}
    if not path.is_file():
        return columns
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                step = int(row["step"])
                for key, text in row.items():
                    if text and key != "step":
                        columns.setdefault(key, []).append((step, float(text)))
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{path}, line {number}: not a row of a run's metrics") from None
    return columns


def read_run(folder: Path) -> dict[str, Any]:
    """What a run measured, by its report.json and metrics.csv: what it did not measure is missing, and a broken-off run has less.

    Times in seconds, memory in GiB; losses are means per token.
    """
    metrics = read_metrics(folder)
    measured: dict[str, Any] = {}
    if (folder / "report.json").is_file():
        measured = read_json(folder / "report.json", "a run writes its report there")
    for name in ("train", "val"):
        rows = metrics.get(f"{name}_loss", [])
        if rows:
            measured[f"best_{name}_loss"] = min(value for _, value in rows)
        if rows and name == "train":
            measured["initial_train_loss"], measured["final_train_loss"] = rows[0][1], rows[-1][1]
    if "steps" not in measured and "train_loss" in metrics:
        measured["steps"] = metrics["train_loss"][-1][0]
    if measured.get("train_seconds") and measured.get("steps"):
        measured["steps_per_second"] = measured["steps"] / measured["train_seconds"]
    return {key: value for key, value in measured.items() if value is not None}


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that decide whether two runs can be compared, from a finished run's hyperparameters.yaml; {} without it."""
    path = folder / "final" / "hyperparameters.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return {key: values[key] for key in SETTINGS if key in values} if isinstance(values, dict) else {}


def val_curve(folder: Path, total_seconds: float | None) -> list[tuple[int, float | None, float]]:
    """(step, wall seconds since the run began, validation loss) of each validation; the loss from metrics.csv.

    TensorBoard's events say when each was written, and a run's clock stops right after the last one: loading, filling the cache and
    validating are all counted. The time is None where events or `total_seconds` are missing.
    """
    losses = read_metrics(folder).get("val_loss", [])
    written = event_times(folder, "val_loss") if total_seconds else {}
    last = written.get(losses[-1][0], math.nan) if losses else math.nan
    curve = []
    for step, loss in losses:
        seconds = (total_seconds or math.nan) - (last - written.get(step, math.nan))
        curve.append((step, seconds if math.isfinite(seconds) else None, loss))
    return curve


def event_times(folder: Path, column: str) -> dict[int, float]:
    """Step -> when a run wrote a value of that column, in seconds since 1970, from TensorBoard's events; {} without them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any((folder / METRICS).glob("events.out.tfevents.*")):
        return {}
    events = EventAccumulator(str(folder / METRICS), size_guidance={"scalars": 0})
    events.Reload()
    if column not in events.Tags()["scalars"]:
        return {}
    return {event.step: event.wall_time for event in events.Scalars(column)}


def read_comparison(path: Path) -> dict[str, Any]:
    """The content of comparison_results.json, or the same made from the runs below a folder. UserError that lists all that is wrong."""
    file = path / "comparison_results.json" if path.is_dir() else path
    content = _gather(path) if path.is_dir() and not file.is_file() else read_json(file, WHAT)
    runs = content.get("runs")
    if not isinstance(runs, list) or not runs or not all(isinstance(record, dict) for record in runs):
        raise UserError(f"{file} holds no list of runs: {WHAT}")
    if not isinstance(content.setdefault("environment", {}), dict):
        raise UserError(f"{file}: environment is not an object: {WHAT}")
    problems = [f"run {number}: {text}" for number, record in enumerate(runs, 1) for text in _mistakes(record)]
    if not problems:
        keys = [(record["name"], record["repeat"]) for record in runs]
        problems = [f"{name}, repetition {repeat}, is there twice" for name, repeat in sorted(set(keys)) if keys.count((name, repeat)) > 1]
    if problems:
        raise UserError(f"{file} cannot be used: {'; '.join(problems)}")
    models = {str(record.get("settings", {}).get("checkpoint_dir")): record["name"] for record in runs if record["status"] == "completed"}
    if len(models) > 1:
        found = ", ".join(f"{model} ({name})" for model, name in models.items())
        raise UserError(f"{path} has runs of different models, whose figures say nothing about each other: {found}. Name a folder with one")
    return {**content, "source": str(file if file.is_file() else path)}


def _mistakes(record: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a run's record."""
    if not isinstance(record.get("name"), str) or not isinstance(record.get("repeat"), int) or not isinstance(record.get("folder"), str):
        yield "name, repeat or folder is missing"
    if record.get("status") not in ("completed", "failed"):
        yield f"status is {record.get('status')!r}"
    measured = record.get("measured")
    if not isinstance(measured, dict) or not isinstance(record.get("settings", {}), dict):
        yield "measured or settings is no object"
    elif record.get("status") == "completed":
        wrong = [f"{key} is {value!r}" for key, value in measured.items() if not _is_amount(value)]
        missing = [f"{key} is missing or 0" for key in NEEDED if not measured.get(key)]
        if wrong or missing:
            yield ", ".join(wrong + missing)
        elif measured["trainable_parameters"] > measured["total_parameters"]:
            yield "more trainable parameters than parameters"


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _gather(path: Path) -> dict[str, Any]:
    """The runs below a folder, as evaluate_skip2lora_comparison.py would have written them down."""
    folders = sorted(file.parents[2] for file in path.rglob(str(METRICS / "metrics.csv")))
    if not folders:
        raise UserError(f"{path} holds neither comparison_results.json nor runs with {METRICS / 'metrics.csv'}: {WHAT}")
    runs = []
    for folder in folders:
        done = (folder / "report.json").is_file()
        about = {"name": str(folder.relative_to(path)), "repeat": 1, "folder": str(folder), "settings": read_settings(folder)}
        reason = None if done else "it did not finish: report.json is missing"
        runs.append({**about, "status": "completed" if done else "failed", "error": reason, "measured": read_run(folder)})
    return {"environment": environment(), "note": "machine and date are those of this report, not of the runs", "runs": runs}
