"""Write the evaluation report of comparison_results.json and the runs' logs, as Markdown and as one HTML file.

    python analyze_results.py [RESULTS] [--baseline NAME] [--benchmark FILE] [--out FOLDER]

RESULTS is comparison_results.json or a folder: that file in it, or else all runs below it (for runs that were started by hand). Every
sentence of the conclusions is computed. Repetitions of a run are averaged, and "±" gives their standard deviation.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import report, runs
from benchmarks.report import Part, Picture, Sections, Table, as_html, as_markdown, less, percent
from litgpt import atomic
from litgpt.errors import UserError

TITLE = "LoRA and Skip2-LoRA compared"
UNUSED = ("ignore_index", "num_workers")  # keys of a data set without effect
BENCHMARK = Path("out/benchmark/benchmark_results.json")


@dataclass
class Group:
    """A run and its repetitions."""

    name: str
    done: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)

    def values(self, key: str) -> list[float]:
        return [record["measured"][key] for record in self.done if key in record["measured"]]

    def mean(self, key: str) -> float | None:
        values = self.values(key)
        return statistics.fmean(values) if values else None

    def show(self, key: str, form: str) -> str:
        """Return the mean, with the standard deviation if there are repetitions; "-" if nothing was measured."""
        values = self.values(key)
        if not values:
            return "-"
        spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):{form}}{spread}"


def group(records: list[dict[str, Any]]) -> list[Group]:
    groups: dict[str, Group] = {}
    for record in records:
        found = groups.setdefault(record["name"], Group(record["name"]))
        (found.done if record["status"] == "completed" else found.failed).append(record)
    return list(groups.values())


def baseline(groups: list[Group], name: str | None) -> Group | None:
    """Return the run to compare with, or None if it did not complete.

    It is the named run, or else lora_baseline..., or else the first without Skip2-LoRA.
    """
    if name is not None and name not in [found.name for found in groups]:
        raise UserError(f"--baseline {name}: the runs are {', '.join(found.name for found in groups)}")
    fitting = [found for found in groups if found.name == name or (name is None and Path(found.name).name.startswith("lora_baseline"))]
    fitting += [found for found in groups if found.done and found.done[0].get("settings", {}).get("skip2lora_enabled") is False]
    return fitting[0] if fitting and fitting[0].done else None


def curves(found: Group, source: str) -> list[list[tuple[int, float | None, float]]]:
    """Return (step, wall seconds, validation loss) of each completed repetition. A moved folder is looked for beside the results."""
    lines = []
    for record in found.done:
        folder = Path(record["folder"])
        folder = folder if folder.is_dir() else Path(source).parent / folder.name
        lines.append(runs.val_curve(folder, record["measured"]["total_seconds"]))
    return [line for line in lines if line]


def against(base: Group | None, found: Group, key: str) -> str:
    if base is None or found is base:
        return ""
    old, new = base.mean(key), found.mean(key)
    return percent(less(old, new)) if old and new is not None else "-"


def environment(content: dict[str, Any], groups: list[Group]) -> Table:
    about = content["environment"]
    settings: dict[str, Any] = next((record.get("settings", {}) for found in groups for record in found.done), {})
    data, train = settings.get("data") or {}, settings.get("train") or {}
    arguments = {key: value for key, value in (data.get("init_args") or {}).items() if value not in (None, False) and key not in UNUSED}
    rows = {
        "GPU": about.get("gpu") or "none",
        "processor": f"{about.get('processor')}, {about.get('cores')} cores, {about.get('memory_gb') or 0:.0f} GiB",
        "PyTorch": about.get("torch"),
        "versions": f"litgpt {about.get('litgpt')}, Python {about.get('python')}, {about.get('system')}",
        "date": about.get("date"),
        "model": settings.get("checkpoint_dir"),
        "data set": f"{str(data.get('class_path')).rpartition('.')[2]} ({', '.join(f'{key} {value}' for key, value in arguments.items())})",
        "precision": settings.get("precision") or "the device's default",
        "batch": f"{train.get('global_batch_size')} samples a step, {train.get('micro_batch_size')} at a time",
        "read from": content["source"],
        "note": content.get("note", ""),
    }
    return Table(["", ""], [[key, str(value)] for key, value in rows.items() if value != ""])


def figures(groups: list[Group], base: Group | None, reached: Callable[[Group], str]) -> dict[str, Table]:
    """Return the guide's tables, with a row for each run that has figures."""
    done = [found for found in groups if found.done]
    compared = f"against {base.name}" if base else "compared"
    parameters, speed, memory, accuracy, convergence = [], [], [], [], []
    for found in done:
        trainable, total = found.values("trainable_parameters")[0], found.values("total_parameters")[0]
        counts = [f"{trainable:,}", f"{trainable / 1e6:.2f} M", f"{total:,}", f"{100 * trainable / total:.4f} %"]
        parameters.append([found.name, *counts, against(base, found, "trainable_parameters")])
        rates = [found.show("steps", ",.0f"), found.show("steps_per_second", ".2f"), found.show("tokens_per_second", ",.0f")]
        times = [(found.show(key, ".1f"), against(base, found, key)) for key in ("train_seconds", "total_seconds")]
        speed.append([found.name, *rates, *times[0], *times[1]])
        memory.append([found.name, found.show("peak_memory_gb", ".2f"), against(base, found, "peak_memory_gb")])
        losses = [found.show(f"{kind}_val_loss", ".4f") for kind in ("initial", "final", "best")]
        accuracy.append([found.name, *losses, *_gain(found, base)])
        gained = _gained(found)
        rates = ["-", "-"] if gained is None else [f"{gained / (found.mean(key) or 1):.6f}" for key in ("steps", "total_seconds")]
        convergence.append([found.name, *rates, reached(found)])
    whose = f"{base.name if base else 'the baseline'}'s final loss reached after"
    losses = ["initial loss", "final loss", "best loss", "gain", f"final loss {compared}", "share of its gain"]
    return {
        "Parameter efficiency": Table(["run", "trainable", "", "total", "ratio", compared], parameters),
        "Speed": Table(["run", "steps", "steps/s", "tokens/s", "training steps, s", compared, "whole run, s", compared], speed),
        "Memory": Table(["run", "peak, GiB", compared], memory),
        "Accuracy": Table(["run", *losses], accuracy),
        "Convergence": Table(["run", "loss per step", "loss per second of the whole run", whose], convergence),
    }


def _gained(found: Group | None) -> float | None:
    """Return the decrease of the validation loss from before the first step to after the last."""
    first, last = (found.mean("initial_val_loss"), found.mean("final_val_loss")) if found else (None, None)
    return None if first is None or last is None else first - last


def _gain(found: Group, base: Group | None) -> list[str]:
    gained, theirs, last = _gained(found), _gained(base), found.mean("final_val_loss")
    cells = ["-" if gained is None else f"{gained:.4f}"]
    if base is None or found is base:
        return [*cells, "", ""]
    other = base.mean("final_val_loss")
    cells.append("-" if last is None or other is None else f"{last - other:+.4f}")
    return [*cells, "-" if gained is None or theirs is None or theirs <= 0 else f"{100 * gained / theirs:.0f} %"]


def reaching(base: Group | None, source: str) -> Callable[[Group], str]:
    """Return a function that says when a run's validation loss, in its first repetition, reaches the baseline's final one."""
    goal = base.mean("final_val_loss") if base and (_gained(base) or 0) > 0 else None

    def reached(found: Group) -> str:
        known = curves(found, source)
        if goal is None or found is base or not known:
            return "" if found is base else "-"
        for step, seconds, loss in known[0]:
            if loss <= goal:
                return f"step {step}" + ("" if seconds is None else f", {seconds:.1f} s")
        return "not reached"

    return reached


def conclusions(groups: list[Group], base: Group | None) -> list[str]:
    """Return what the figures support, and nothing else."""
    lines = [f"{found.name} failed ({len(found.failed)}x): {found.failed[0].get('error')}" for found in groups if found.failed]
    done = [found for found in groups if found.done]
    if base is None:
        return [*lines, "There is no completed run to compare with, so there are no reductions and no conclusions about them."]
    for found in done:
        if found is not base:
            lines += _compared(found, base)
    for text, key in (
        ("lowest final validation loss", "final_val_loss"),
        ("shortest run", "total_seconds"),
        ("smallest peak memory", "peak_memory_gb"),
    ):
        known = {found.name: value for found in done if (value := found.mean(key)) is not None}
        if len(known) > 1:
            best = min(known.values())
            lines.append(f"The {text}: {' and '.join(name for name, value in known.items() if value == best)} ({best:.4g}).")
    lines += _unlike([found for found in done if found is not base], base)
    few = [found.name for found in done if len(found.done) < 3]
    if few:
        lines.append(f"Fewer than three repetitions of {', '.join(few)}: small differences may be due to chance.")
    return lines


def _compared(found: Group, base: Group) -> list[str]:
    """Return a sentence each on parameters, time, memory and loss of a run, compared with the baseline."""
    lines = []
    texts = {
        "trainable_parameters": ("trains {0:,.0f} parameters, {1:,.0f} in {2}", "fewer", "more"),
        "total_seconds": ("took {0:.1f} s, {1:.1f} s in {2}", "less time", "more time"),
        "peak_memory_gb": ("needed {0:.2f} GiB, {1:.2f} GiB in {2}", "less memory", "more memory"),
    }
    for key, (text, smaller, larger) in texts.items():
        new, old = found.mean(key), base.mean(key)
        assert new is not None and old is not None  # completed runs have them
        if key != "trainable_parameters" and _overlap(found.values(key), base.values(key)):
            verdict = "no clear difference, the repetitions overlap"
        else:
            verdict = "the same" if new == old else f"{abs(less(old, new)):.1f} % {smaller if new < old else larger}"
        lines.append(f"{found.name} {text.format(new, old, base.name)}: {verdict}.")
    if found.mean("steps") != base.mean("steps"):
        lines[1] += f" Note that it made {found.mean('steps'):,.0f} steps and {base.name} {base.mean('steps'):,.0f}."
    new, old = found.mean("final_val_loss"), base.mean("final_val_loss")
    if new is None or old is None:
        return [*lines, f"{found.name} and {base.name} cannot be compared in accuracy: a final validation loss is missing."]
    if _overlap(found.values("final_val_loss"), base.values("final_val_loss")):
        verdict = "no clear difference, the repetitions overlap"
    else:
        verdict = "the same" if new == old else f"{abs(new - old):.4f} {'better' if new < old else 'worse'}"
    share = _gain(found, base)[2]
    more = f" It gained {share} of what {base.name} gained." if share != "-" else ""
    return [*lines, f"{found.name} ended at a validation loss of {new:.4f}, {base.name} at {old:.4f}: {verdict}.{more}"]


def _unlike(others: list[Group], base: Group) -> list[str]:
    """Return a warning for each run whose settings differ from the baseline's in more than the adapter."""

    def given(found: Group) -> dict[str, Any]:
        settings = found.done[0].get("settings", {})
        return {
            "data": settings.get("data"),
            "precision": settings.get("precision"),
            "batch": (settings.get("train") or {}).get("global_batch_size"),
        }

    lines = []
    for found in others:
        different = [key for key, value in given(found).items() if value != given(base)[key]]
        if different:
            lines.append(f"{found.name} and {base.name} differ in {', '.join(different)} too, so the adapter is not the only cause.")
    return lines


def _overlap(a: list[float], b: list[float]) -> bool:
    """Return True if both were repeated and their ranges overlap."""
    return len(a) > 1 and len(b) > 1 and max(min(a), min(b)) <= min(max(a), max(b))


def benchmark(file: Path) -> list[Part]:
    """Return the benchmark's forward and backward times, which a training run does not measure separately."""
    content = runs.read_json(file, "benchmark_skip2lora.py writes it")
    try:
        settings = content["settings"]
        rows: list[list[str]] = []
        for row in content["configurations"]:
            found, plain, cached = content["comparison"][row["name"]], row["uncached"], row["cached"] or {}
            times = [f"{plain[key]['median']:.2f}" if key in plain else "-" for key in ("forward_ms", "backward_ms", "step_ms")]
            times.append(f"{cached['step_ms']['median']:.2f}" if "step_ms" in cached else "-")
            change = found.get("backward_reduction_percent") if rows else None
            rows.append([row["name"], *times[:2], "" if change is None else percent(change), *times[2:]])
        size = f"{settings['batch_size']} x {settings['seq_length']} tokens"
        about = f"{settings['model']}, {size}, {settings['precision']} on {settings['device']}; medians"
        header = ["configuration", "forward, ms", "backward, ms", "backward against LoRA", "step, ms", "cached step, ms"]
        return [f"From {file}, made on {content['environment']['date']}: {about}.", Table(header, rows)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file} is not a benchmark's result ({type(error).__name__}: {error}): benchmark_skip2lora.py writes it") from None


def pictures(groups: list[Group], source: str, folder: Path) -> list[Part]:
    """Draw validation loss over steps and over wall time, and bars, as PNG files in `folder`; nothing without matplotlib."""
    done = [found for found in groups if found.done]
    bars = report.figure(13, 1.6 + 0.5 * len(done))
    if bars is None or not done:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[Part] = [Picture("Time, memory, parameters", folder / "bars.png")]
    units = {"total_seconds": ("Whole run", "s", 1), "peak_memory_gb": ("Peak memory", "GiB", 1)}
    units["trainable_parameters"] = ("Trainable parameters", "million", 1_000_000)
    for axes, (key, (title, unit, scale)) in zip(bars.subplots(1, 3), units.items(), strict=True):
        report.bars(axes, title, {found.name: (found.mean(key) or 0.0) / scale for found in done}, unit)
    bars.savefig(folder / "bars.png", dpi=110)
    known = {found.name: curves(found, source) for found in done}
    if any(known.values()):
        loss_curves(known).savefig(folder / "validation_loss.png", dpi=110)
        drawn.insert(0, Picture("Validation loss", folder / "validation_loss.png"))
    return drawn


def loss_curves(known: dict[str, list[list[tuple[int, float | None, float]]]]) -> Any:
    """Draw a line for each repetition, those of one run in one colour."""
    figure = report.figure(13, 4.8)
    left, right = figure.subplots(1, 2)
    for number, (name, repetitions) in enumerate(known.items()):
        for nth, curve in enumerate(repetitions):
            style = {"color": f"C{number}", "marker": ".", "label": name if nth == 0 else None}
            left.plot([step for step, _, _ in curve], [loss for _, _, loss in curve], **style)
            timed = [(seconds, loss) for _, seconds, loss in curve if seconds is not None]
            right.plot([seconds for seconds, _ in timed], [loss for _, loss in timed], **style)
    for axes, label in ((left, "step"), (right, "seconds since the run began, loading and cache fill included")):
        axes.set(xlabel=label, ylabel="validation loss")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def sections_of(content: dict[str, Any], base_name: str | None, measured: Path | None, folder: Path) -> Sections:
    """Return the sections of the report."""
    groups = group(content["runs"])
    base = baseline(groups, base_name)
    tables = figures(groups, base, reaching(base, content["source"]))
    status = []
    for found in groups:
        reason = str(found.failed[0].get("error")) if found.failed else ""
        status.append([found.name, str(len(found.done)), str(len(found.failed)), reason])
    sections: Sections = {
        "Environment": [environment(content, groups)],
        "Runs": [Table(["run", "completed", "failed", "reason"], status)],
        **{title: [table] for title, table in tables.items()},
    }
    if measured is not None:
        sections["Forward and backward pass"] = benchmark(measured)
    sections["Pictures"] = pictures(groups, content["source"], folder) or ["None: they need matplotlib and a completed run."]
    sections["Conclusions"] = [conclusions(groups, base)]
    return sections


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The evaluation report, from comparison_results.json or a folder of runs.")
    parser.add_argument("results", type=Path, nargs="?", default=Path("out/finetune"), help="file or folder (default: out/finetune)")
    parser.add_argument("--baseline", help="the run to compare with. Default: lora_baseline, or the first one without Skip2-LoRA")
    parser.add_argument("--benchmark", type=Path, help=f"benchmark_results.json to include. Default: {BENCHMARK} if it is there")
    parser.add_argument("--out", type=Path, help="folder for the report. Default: report, beside the results")
    args = parser.parse_args(argv)
    try:
        content = runs.read_comparison(args.results)
        folder = args.out or (args.results if args.results.is_dir() else args.results.parent) / "report"
        sections = sections_of(content, args.baseline, args.benchmark or (BENCHMARK if BENCHMARK.is_file() else None), folder)
        for name, text in (("report.md", as_markdown(TITLE, sections)), ("report.html", as_html(TITLE, sections))):
            atomic.write_text(folder / name, text)
            print(f"wrote {folder / name}")
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print("", *sections["Conclusions"][0], sep="\n")  # type: ignore[misc]
    return 0
