"""Report the measurements: tables, ratios, a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.peers import job
from benchmarks.report import Part, Picture, Sections, Table, as_markdown, figure
from litgpt.text import text_table

REFERENCES = ("upstream", "peft_qv", "peft_all", "lora_qv", "lora_all")
TITLE = "The same fine-tuning job, by several packages"
AGREEMENT = 0.01  # relative difference of first losses above which the peers do not read the same data

Record = dict[str, Any]


def sections(content: dict[str, Any], picture: Path | None) -> Sections:
    """Return the report of a results file's content."""
    records: dict[str, Record] = content["records"]
    done = {name: record for name, record in records.items() if record["status"] == "completed"}
    parts: Sections = {"What was done": [settings(content), *warnings(records)]}
    if not done:
        return parts
    parts["Time and memory"] = [times(done), *extrapolations(done)]
    references = {name: done[name] for name in REFERENCES if name in done}
    if references:
        parts["Compared"] = [
            "How many times faster the whole run is than that of the package on top, start and end included:",
            ratios(done, references, lambda one, other: f"{other['total_seconds'] / one['total_seconds']:.2f}x"),
            "How many times faster a step is, on average over all measured ones:",
            ratios(done, references, lambda one, other: f"{one['steps_per_second'] / other['steps_per_second']:.2f}x"),
            "Peak memory, as a share of that of the package on top:",
            ratios(done, references, lambda one, other: f"{100 * one['peak_memory_gb'] / other['peak_memory_gb']:.0f} %"),
        ]
    judged = {name: record for name, record in done.items() if record.get("curve")}
    if judged:
        parts["Validation loss"] = loss_parts(judged, content["base_loss"])
        if picture is not None:
            parts["Validation loss"].append(Picture("Validation loss over wall time", picture))
    return parts


def settings(content: dict[str, Any]) -> list[str]:
    what, machine = content["job"], content["environment"]
    dates = sorted({record["date"] for record in content["records"].values()})
    return [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GiB, {machine['gpu'] or 'no GPU'}",
        f"{machine['system']}, Python {machine['python']}, torch {machine['torch']}, litgpt {machine['litgpt']}",
        *([f"in the other packages' runs: {', '.join(found)}"] if (found := versions(content["records"])) else []),
        f"{Path(what['checkpoint']).name}, {what['precision']}, {what['samples']:,} training samples ({what['tokens']:,} tokens) and "
        f"{what['val_samples']:,} for validation, the same tokens, loss masks and order for all; loss on the answers only",
        f"{what['epochs']} epochs, batches of {job.BATCH}, AdamW, linear warm-up, then half a cosine to 0 over the epochs that were run; "
        f"LoRA of rank {job.LORA_R}, alpha {job.LORA_ALPHA}, dropout {job.LORA_DROPOUT}; a checkpoint after every epoch, no validation",
        f"measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))}",
    ]


def versions(records: dict[str, Record]) -> list[str]:
    """Return each package of the other peers' environments once."""
    found = {f"{name} {number}" for record in records.values() for name, number in record.get("versions", {}).items() if name != "torch"}
    return [f"upstream's {text}" if text.startswith("litgpt ") else text for text in sorted(found)]


def warnings(records: dict[str, Record]) -> list[Part]:
    """Return what a reader has to know before the figures."""
    told = [f"{name} failed: {record['error']}" for name, record in records.items() if record["status"] == "failed"]
    told += [
        f"{name} has no losses: {record['error']}" for name, record in records.items() if record["status"] != "failed" and record["error"]
    ]
    first = {name: record["first_loss"] for name, record in records.items() if record["status"] == "completed"}
    if first and max(first.values()) - min(first.values()) > AGREEMENT * min(first.values()):
        listed = ", ".join(f"{name} {loss:.4f}" for name, loss in first.items())
        told.append(f"the peers do not read the same data: their losses on the first batch, before any update, differ: {listed}")
    return [told] if told else []


def times(records: dict[str, Record]) -> Table:
    header = ["", "epochs", "whole run, s", "start and end, s", "an epoch, s", "steps/s", "tokens/s", "peak, GiB", "own, GiB"]
    rows = []
    for name, record in records.items():
        values = [
            number(record["epochs"]) if record["measured_epochs"] == record["epochs"] else f"{measured(record)} measured",
            f"{record['total_seconds']:,.1f}",
            f"{record['wall_seconds'] - record['training_seconds']:,.1f}",
            form("{:,.2f}", record["median_epoch_seconds"]),
            f"{record['steps_per_second']:,.3f}",
            f"{record['tokens_per_second']:,.0f}",
            f"{record['peak_memory_gb']:.2f}",
            form("{:.2f}", record["own_memory_gb"]),
        ]
        rows.append([name, *values])
    return Table(header, rows)


def extrapolations(records: dict[str, Record]) -> list[Part]:
    told = [
        f"{name}: {measured(record)} epochs measured, in {record['wall_seconds']:,.1f} s. The whole run is an extrapolation: start and "
        "end once, the time of the measured epochs in proportion"
        for name, record in records.items()
        if record["measured_epochs"] != record["epochs"]
    ]
    notes: Part = [
        *told,
        "a whole run is a process from its start to its end: imports, loading, filling a cache, saving and merging are counted; start "
        "and end is what is not in steps; an epoch is the median of those measured; peak is resident memory with the pages of mapped "
        "files, which the system takes back when it needs them, own is without them",
    ]
    return [notes]


def measured(record: Record) -> str:
    return f"{number(record['measured_epochs'])} of {number(record['epochs'])}"


def number(value: float) -> str:
    """Return 10.0 as "10" and 2.5 as "2.5"."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def form(text: str, value: float | None) -> str:
    return "-" if value is None else text.format(value)


def ratios(records: dict[str, Record], references: dict[str, Record], compare: Callable[[Record, Record], str]) -> Table:
    rows = [[name, *(compare(record, other) for other in references.values())] for name, record in records.items()]
    return Table(["", *references], rows)


def loss_parts(records: dict[str, Record], base: float) -> list[Part]:
    """Return the losses of each peer, and when it first reached the best of each reference."""
    references = {name: best(records[name]) for name in REFERENCES if name in records}
    rows = []
    for name, record in records.items():
        lowest, last = best(record), record["curve"][-1]
        row = [name, f"{record['first_loss']:.4f}", f"{lowest['val_loss']:.4f}", number(lowest["epoch"]), f"{lowest['wall_seconds']:,.1f}"]
        row.append(f"{last['val_loss']:.4f}")
        for other in references.values():
            seconds = reached(record, other["val_loss"])
            row.append("-" if seconds is None else f"{seconds:,.1f} s ({seconds / other['wall_seconds']:.2f}x)")
        rows.append(row)
    header = ["", "first batch", "best", "at epoch", "after, s", "last", *(f"{name}'s best" for name in references)]
    return [
        f"Mean per answer token on the validation set, by one evaluator; {base:.4f} before training. First batch: its loss as each "
        "package computes it, before any update. To the right: when a checkpoint first was as low as the best of that package, in "
        "seconds since the process began and as a share of the time that package took to get there. Only measured epochs count.",
        Table(header, rows),
    ]


def best(record: Record) -> Record:
    return min(record["curve"], key=lambda point: point["val_loss"])


def reached(record: Record, loss: float) -> float | None:
    """Return the seconds after which the loss was first reached."""
    return next((point["wall_seconds"] for point in record["curve"] if point["val_loss"] <= loss), None)


def draw(content: dict[str, Any], file: Path) -> Path | None:
    """Draw losses over wall time as a PNG. Return None without curves or matplotlib."""
    curves = {name: record["curve"] for name, record in content["records"].items() if record.get("curve")}
    picture = figure(9, 5.5) if curves else None
    if picture is None:
        return None
    axes = picture.subplots()
    axes.axhline(content["base_loss"], color="grey", linestyle="--", label="before training")
    for i, (name, curve) in enumerate(curves.items()):
        seconds, losses = ([point[key] for point in curve] for key in ("wall_seconds", "val_loss"))
        axes.plot(seconds, losses, marker="o", markersize=3, color=f"C{i}", linestyle=("-", "-.")[i >= 10], label=name)
    axes.set_xscale("log")
    for formatted in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        formatted(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("seconds since the process began")
    axes.set_ylabel("validation loss per answer token")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.savefig(file, dpi=140)
    return file


def as_text(parts: Sections) -> str:
    """Return the report as plain text, for a terminal."""
    lines = []
    for heading, content in parts.items():
        lines.append(f"\n{heading}\n")
        for part in content:
            if isinstance(part, Table):
                lines.append(text_table([part.header, *part.rows]))
            elif isinstance(part, list):
                lines += [f"  {item}" for item in part]
            elif isinstance(part, str):
                lines.append(f"  {part}")
    return "\n".join(lines)


def as_document(parts: Sections) -> str:
    return as_markdown(TITLE, parts)
