"""Read and check what runs of `litgpt finetune` measured; describe the machine."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import yaml

import litgpt
from litgpt import atomic
from litgpt.__main__ import load
from litgpt.cli import parse
from litgpt.errors import UserError
from litgpt.logs import METRICS, read_metrics

SETTINGS = ("checkpoint_dir", "precision", "data", "train", "optimizer", "seed", "skip2lora_enabled")  # needed to compare runs
NEEDED = ("steps", "trainable_parameters", "total_parameters", "train_seconds", "total_seconds", "peak_memory_gb")  # of a completed run
WRITTEN_BY = "evaluate_skip2lora_comparison.py writes it"


def write_jsonl(file: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Write records to a .jsonl file. Returns the file."""
    atomic.write_text(file, "".join(json.dumps(record) + "\n" for record in records))
    return file


def results_in(out: Path) -> dict[str, Any]:
    """Return the content of OUT/results.json, or that of a benchmark that begins."""
    file = out / "results.json"
    return read_json(file, "delete it to start anew") if file.is_file() else {"environment": environment(), "runs": {}}


def measure_missing(
    results: dict[str, Any], jobs: Iterable[tuple[str, Callable[[], dict[str, Any]]]], table: Callable[[dict[str, Any]], str], file: Path
) -> None:
    """Run the jobs, each with its key, that `results` lacks or has an error of. results.json beside `file`, and the table in `file`, are
    written after each; the table is printed at the end.
    """
    for key, measure in jobs:
        if "error" in results["runs"].get(key, {"error": None}):
            print(f"== {key}", flush=True)
            results["runs"][key] = measure()
            atomic.write_text(file.with_name("results.json"), json.dumps(results, indent=1) + "\n")
            atomic.write_text(file, table(results) + "\n")
    print(table(results))


def environment() -> dict[str, Any]:
    """Return the machine, the versions and the time."""
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


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file. Raise UserError that says what was expected."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {what}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): {what}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object: {what}")
    return content


def read_run(folder: Path) -> dict[str, Any]:
    """Return what a run measured, from its report.json and metrics.csv. Figures that it did not measure are missing.

    Times are in seconds, memory in GiB; losses are means per token.
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


def finetune_arguments(source: Path | str) -> dict[str, Any]:
    """Return the arguments of `litgpt finetune` for a YAML file, the file that it names as its base included, or for a checkpoint."""
    return parse("litgpt finetune", load("finetune_lora"), [str(source)])


def read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings that decide whether two runs can be compared, from a finished run's hyperparameters.yaml; {} without it."""
    path = folder / "final" / "hyperparameters.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return {key: values[key] for key in SETTINGS if key in values} if isinstance(values, dict) else {}


def val_curve(folder: Path, total_seconds: float | None) -> list[tuple[int, float | None, float]]:
    """Return (step, wall seconds since the run began, validation loss) of each validation.

    The losses come from metrics.csv. TensorBoard's events say when each was written, and the run's clock stops right after the last
    one, so the time includes loading, filling the cache and validating. It is None if events or `total_seconds` are missing.
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
    """Return step -> seconds since 1970 at which a run wrote a value of that column, from TensorBoard's events; {} without them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not any((folder / METRICS).parent.glob("events.out.tfevents.*")):
        return {}
    events = EventAccumulator(str((folder / METRICS).parent), size_guidance={"scalars": 0})
    events.Reload()
    if column not in events.Tags()["scalars"]:
        return {}
    return {event.step: event.wall_time for event in events.Scalars(column)}


def read_comparison(path: Path) -> dict[str, Any]:
    """Return the content of comparison_results.json, or the same collected from the runs below a folder.

    Raise UserError that lists everything that is wrong.
    """
    file = path / "comparison_results.json" if path.is_dir() else path
    content = _gather(path) if path.is_dir() and not file.is_file() else read_json(file, WRITTEN_BY)
    runs = content.get("runs")
    if not isinstance(runs, list) or not runs or not all(isinstance(record, dict) for record in runs):
        raise UserError(f"{file} holds no list of runs: {WRITTEN_BY}")
    if not isinstance(content.setdefault("environment", {}), dict):
        raise UserError(f"{file}: environment is not an object: {WRITTEN_BY}")
    problems = [f"run {number}: {text}" for number, record in enumerate(runs, 1) for text in _mistakes(record)]
    if not problems:
        keys = [(record["name"], record["repeat"]) for record in runs]
        problems = [f"{name}, repetition {repeat}, occurs twice" for name, repeat in sorted(set(keys)) if keys.count((name, repeat)) > 1]
    if problems:
        raise UserError(f"{file} cannot be used: {'; '.join(problems)}")
    models = {str(record.get("settings", {}).get("checkpoint_dir")): record["name"] for record in runs if record["status"] == "completed"}
    if len(models) > 1:
        named = ", ".join(f"{model} ({name})" for model, name in models.items())
        raise UserError(f"{path} has runs of different models, which cannot be compared: {named}. Name a folder with one model")
    return {**content, "source": str(file if file.is_file() else path)}


def _mistakes(record: dict[str, Any]) -> Iterator[str]:
    """Yield everything that is wrong with a run's record."""
    if not isinstance(record.get("name"), str) or not isinstance(record.get("repeat"), int) or not isinstance(record.get("folder"), str):
        yield "name, repeat or folder is missing"
    if record.get("status") not in ("completed", "failed"):
        yield f"status is {record.get('status')!r}"
    measured = record.get("measured")
    if not isinstance(measured, dict) or not isinstance(record.get("settings", {}), dict):
        yield "measured or settings is not an object"
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
    """Return the runs below a folder in the form that evaluate_skip2lora_comparison.py writes."""
    folders = sorted(file.parents[2] for file in path.rglob(str(METRICS)))
    if not folders:
        raise UserError(f"{path} holds neither comparison_results.json nor runs with {METRICS}: {WRITTEN_BY}")
    runs = []
    for folder in folders:
        done = (folder / "report.json").is_file()
        about = {"name": str(folder.relative_to(path)), "repeat": 1, "folder": str(folder), "settings": read_settings(folder)}
        reason = None if done else "it did not finish: report.json is missing"
        runs.append({**about, "status": "completed" if done else "failed", "error": reason, "measured": read_run(folder)})
    return {"environment": environment(), "note": "machine and date are those of this report, not of the runs", "runs": runs}
