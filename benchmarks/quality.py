"""The frontier of validation loss against wall time: Skip2-LoRA, its tail presets, LoRA, and LoRA as a warm-up, on real data.

    python -m benchmarks.quality --data python_docs [--samples 1000] [--budget_minutes 40] [--settings 'lora_*' all_1e-3 ...]
    python -m benchmarks.quality --data wordnet --list

Each setting is a `litgpt finetune` in a separate process, the most informative ones first. OUT/DATA/results.json is written after each
setting, and a setting that it has is not measured again without --again. A failure is recorded and the next setting starts. Beside it are
quality.md (a table sorted by loss, the Pareto frontier) and quality.png (loss over time).

`seconds` count from the start of the process: Python, loading, warm-up, filling the training cache, steps. Validation and filling its
cache are subtracted; `wall` includes them. Settings with the same prefix share a cache on disk, and the time that the first of them took
to fill it is added to the others. A fifth of --samples is drawn in addition, for validation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks import report, wordnet
from benchmarks.process import error_line, redacted, run_litgpt
from benchmarks.report import Part, Picture, Sections, Table
from benchmarks.runs import environment, event_times, read_json, read_run
from litgpt import atomic, checkpoint
from litgpt.device import default_device, default_precision
from litgpt.errors import UserError
from litgpt.logs import read_metrics
from litgpt.text import text_table

CHECKPOINT = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")
BLOCKS = 30  # of that model
BATCH = 8
RISE = 0.05  # share of a phase's steps in which the learning rate rises; then it falls to train.min_lr
# Rough seconds on two cores in 32-true: loading; for 1,000 samples, filling a cache, a cached epoch, and the cost in an epoch of each block
# that gradients cross. Measurements correct their sum.
START, FILL, CACHED, CROSSED = 12.0, 60.0, 12.0, 4.6
WARM_LR = 1e-3  # of LoRA's warm-up; the cached epochs after it have the setting's own
ALL_LINEAR = {"lora_query": True, "lora_key": True, "lora_value": True, "lora_projection": True, "lora_mlp": True}
NO_LORA = {"lora_query": False, "lora_value": False}
FIRST = (  # in this order; the other settings follow
    "all_1e-3", "lora_all_5e-4", "warm1_head_1e-4", "warm0.5_head_1e-4", "cut22_lora_1e-3", "lora_all_1e-3", "all_10_epochs", "last6",
    "lora_qv_1e-3", "warm1_head_3e-4", "warm0.5_cut22_5e-4", "cut26_lora_1e-3", "every5", "auto", "first6_raw", "ln_f",
    "warm1_cut26_2e-4", "cut28_lora_1e-3", "lora_qv_5e-4", "all_2e-3",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    name: str
    lr: float
    epochs: int
    keys: dict[str, Any]  # of `litgpt finetune`
    crossed: int = 0  # blocks that gradients cross in the epochs
    warmup: float = 0.0  # epochs of LoRA on every block before them
    group: str = ""  # settings of a group have the same prefix and taps, and share a cache

    @property
    def is_lora(self) -> bool:
        return self.crossed == BLOCKS

    def seconds(self, samples: int, filled: bool = False) -> float:
        """Return the estimated duration. `filled`: its cache exists."""
        fill = 0.0 if self.is_lora or filled else FILL
        work = self.warmup * (CACHED + BLOCKS * CROSSED) + fill + self.epochs * (CACHED + self.crossed * CROSSED)
        return START + work * samples / 1000


def skip(name: str, taps: Any, cut: str = "lm_head", *, lr: float = 1e-3, epochs: int = 3, **more: Any) -> Setting:
    """Return Skip2-LoRA from `taps` to `cut`. `more` has other fields and, in `keys`, other keys."""
    keys = {"skip2lora_enabled": True, "skip2lora_r": 16, "skip2lora_block_indices": taps, "skip2lora_output_layer": cut}
    keys |= {"lora_r": 8, **NO_LORA, **more.pop("keys", {})}
    return Setting(name, lr, epochs, keys, **more)


def tail(blocks: int) -> dict[str, Any]:
    """Return cut and crossed blocks of a preset whose tail has this many of the last blocks; 0 means the head alone."""
    if not blocks:
        return {"cut": "lm_head", "taps": "all"}
    return {"cut": f"transformer.h.{BLOCKS - blocks}", "taps": "every:4", "crossed": blocks}


def settings() -> list[Setting]:
    """Return all settings, those of `FIRST` in front."""
    made = [
        skip("first6_raw", [0, 1, 2, 3, 4, 5], keys={"skip2lora_norm": "none"}),
        skip("every5", "every:5"),
        skip("last6", "last:6"),
        skip("auto", "auto"),
        skip("all_1e-3", "all", group="head"),
        skip("all_2e-3", "all", group="head", lr=2e-3),
        skip("all_10_epochs", "all", group="head", epochs=10),
        skip("ln_f", "all", "transformer.ln_f"),
    ]
    for blocks in (2, 4, 8):
        cut = f"cut{BLOCKS - blocks}"
        made.append(skip(cut, **tail(blocks), group=cut))
        for rate in ("1e-3", "5e-4"):
            made.append(skip(f"{cut}_lora_{rate}", **tail(blocks), lr=float(rate), group=cut, keys=ALL_LINEAR))
    for kind, flags, epochs in (("qv", {}, 2), ("all", ALL_LINEAR, 2), ("all_4_epochs", ALL_LINEAR, 4)):
        grid = ("2e-4", "5e-4", "1e-3")
        made += [Setting(f"lora_{kind}_{rate}", float(rate), epochs, {"lora_r": 8, **flags}, crossed=BLOCKS) for rate in grid]
    wide = {"skip2lora_r": 32, "skip2lora_alpha": 64}
    for blocks, later, more in ((0, ("1e-4", "3e-4"), wide), (4, ("5e-4", "2e-4"), {}), (8, ("5e-4", "2e-4"), {})):
        for share in (0.25, 0.5, 1, 2):
            for rate in later:
                name = f"warm{share:g}_{f'cut{BLOCKS - blocks}' if blocks else 'head'}_{rate}"
                keys = {**ALL_LINEAR, **more, "skip2lora_warmup_lr": WARM_LR}
                made.append(skip(name, **tail(blocks), lr=float(rate), warmup=share, keys=keys))
    return sorted(made, key=lambda setting: FIRST.index(setting.name) if setting.name in FIRST else len(FIRST))


def chosen(patterns: Sequence[str], known: list[Setting]) -> list[Setting]:
    """Return the settings whose names match a glob pattern. Raise UserError that lists the patterns without a match."""
    idle = [pattern for pattern in patterns if not any(fnmatchcase(setting.name, pattern) for setting in known)]
    if idle:
        raise UserError(f"--settings: nothing fits {', '.join(idle)}; --list shows the names")
    return [setting for setting in known if any(fnmatchcase(setting.name, pattern) for pattern in patterns)]


@dataclass(frozen=True)
class Study:
    """What all settings share, and where it is kept."""

    data: str
    samples: int
    checkpoint_dir: Path
    precision: str
    out: Path

    @property
    def folder(self) -> Path:
        return self.out / self.data

    @property
    def file(self) -> Path:
        return self.folder / "results.json"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def steps(self) -> int:
        """Return the steps of an epoch."""
        return math.ceil(self.samples / BATCH)

    @property
    def facts(self) -> dict[str, Any]:
        return {"data": self.data, "samples": self.samples, "checkpoint": self.checkpoint_dir.name, "precision": self.precision}

    def read(self) -> dict[str, dict[str, Any]]:
        """Return name -> record of earlier measurements. Raise UserError if they belong to another study."""
        if not self.file.is_file():
            return {}
        content = read_json(self.file, "this script writes it")
        if content.get("study") != self.facts:
            raise UserError(f"{self.file} is of another study, {content.get('study')}: give another --out, or delete it")
        return content["runs"]

    def write(self, runs: dict[str, dict[str, Any]]) -> None:
        atomic.write_text(self.file, json.dumps({"format": 1, "study": self.facts, "runs": runs}, indent=2) + "\n")

    def data_words(self) -> list[str]:
        val = self.samples // 5
        whole = self.samples + val
        common = ["--data.val_split_fraction", str(val / whole), "--data.mask_prompt", "true"]
        if self.data == "python_docs":
            return ["--data", "PythonDocs", "--data.max_samples", str(whole), *common]
        file = wordnet.prepare(self.out.parent / "data", whole)
        return ["--data", "JSON", "--data.json_path", str(file), *common]


def command(setting: Setting, study: Study) -> list[str]:
    """Return the words after `litgpt`. Validate before the first step only if that comes from the cache and costs next to nothing."""
    keys = {
        "out_dir": str(study.folder / setting.name),
        "overwrite": True,
        "verbose": True,  # for `fills`
        "lora_dropout": 0,
        "precision": study.precision,
        **setting.keys,
        "skip2lora_cache": "disk",
        "skip2lora_cache_dir": str(study.cache / (setting.group or setting.name)),
        "epochs": setting.epochs,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": setting.lr}},
        "train.global_batch_size": BATCH,
        "train.micro_batch_size": BATCH,
        "train.lr_warmup_fraction": RISE,
        "train.save_interval": None,
        "train.keep_best": False,
        "eval.interval": study.steps,
        "eval.max_new_tokens": 0,
        "eval.initial_validation": not (setting.warmup or setting.is_lora),
    }
    if setting.warmup:
        keys["skip2lora_warmup_steps"] = max(1, round(setting.warmup * study.steps))
    words = [word for key, value in keys.items() for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))]
    return ["finetune_lora", str(study.checkpoint_dir), *study.data_words(), *words]


@dataclass(frozen=True)
class Fill:
    """When a cache was filled, in seconds since 1970."""

    begin: float
    end: float
    reused: bool


def fills(heard: Iterable[tuple[float, str]]) -> dict[str, Fill]:
    """Return "training" and "validation" -> what a run said about that cache, from its lines and their times."""
    found: dict[str, Fill] = {}
    for moment, line in heard:
        if match := re.match(r"\s*(training|validation) cache\b", line):
            before = found.get(match[1], Fill(moment, moment, False))
            found[match[1]] = Fill(before.begin, moment, before.reused or "is reused" in line)
    return found


def validation_seconds(steps: Sequence[int], written: dict[int, float], step_times: dict[int, float]) -> dict[int, float]:
    """Return the duration of each validation: the time since the previous step was logged, less its own step.

    The first one is assumed to take as long as the next.
    """
    took: dict[int, float] = {}
    for step in reversed(steps):
        if step - 1 in written and step in step_times:
            took[step] = max(0.0, written[step] - written[step - 1] - step_times[step])
        else:
            took[step] = next(reversed(took.values()), 0.0)
    return took


def timeline(
    losses: Sequence[tuple[int, float]],
    written: dict[int, float],
    step_times: dict[int, float],
    began: float,
    filled: dict[str, Fill],
    borrowed: float,
) -> list[dict[str, float]]:
    """Return step, loss, `seconds` and `wall` of each validation. `borrowed` is the time of a fill that another run did."""
    took, points, validating = validation_seconds([step for step, _ in losses], written, step_times), [], 0.0
    for step, loss in losses:
        validating += took[step]
        beside = [fill for name, fill in filled.items() if name == "validation" and fill.end <= written[step]]
        wall = written[step] - began
        seconds = wall - validating - sum(fill.end - fill.begin for fill in beside) + borrowed
        points.append({"step": step, "loss": loss, "seconds": seconds, "wall": wall})
    return points


def measure(setting: Setting, study: Study, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Run one setting and return its record."""
    words, heard, began = command(setting, study), list[tuple[float, str]](), time.time()
    print(f"\n{setting.name}\n$ {redacted(words)}", flush=True)
    folder = study.folder / setting.name
    shutil.rmtree(folder, ignore_errors=True)
    code, said = run_litgpt(words, lambda line: heard.append((time.time(), line)))
    record: dict[str, Any] = {
        "status": "failed" if code else "completed",
        "error": error_line(said) if code else None,
        "command": redacted(words),
        "lr": setting.lr,
        "epochs": setting.epochs,
        "warmup_epochs": setting.warmup,
        "group": setting.group,
        "environment": environment(),
    }
    if not code:
        record |= figures(setting, study, folder, began, fills(heard), runs)
        shutil.rmtree(folder / "final")
        print(f"{setting.name}: {record['best_loss']:.4f} after {record['best_seconds']:.0f} s", flush=True)
    else:
        print(f"{setting.name} failed: {record['error']}", flush=True)
    return record


def figures(
    setting: Setting, study: Study, folder: Path, began: float, filled: dict[str, Fill], runs: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return what a run measured, from its folder and its output."""
    measured, metrics = read_run(folder), read_metrics(folder)
    times = dict(metrics["step_time"])
    training, own = filled.get("training"), 0.0
    borrowed = 0.0
    if training is not None and training.reused:
        borrowed = next(r["fill_seconds"] for r in runs.values() if r.get("group") == setting.group and r.get("fill_seconds"))
    elif training is not None:
        own = training.end - training.begin
    written = event_times(folder, "train_loss") | event_times(folder, "val_loss")
    points = timeline(metrics["val_loss"], written, times, began, filled, borrowed)
    best = min(points, key=lambda point: point["loss"])
    first = measured["steps"] - setting.epochs * study.steps
    adapters = checkpoint.load_weights(folder / "final" / checkpoint.ADAPTER_WEIGHTS)
    return {
        "trainable_parameters": measured["trainable_parameters"],
        "adapter_parameters": sum(weight.numel() for weight in adapters.values()),
        "initial_loss": measured.get("initial_val_loss"),
        "best_loss": best["loss"],
        "best_seconds": best["seconds"],
        "final_loss": points[-1]["loss"],
        "final_seconds": points[-1]["seconds"],
        "epoch_seconds": sum(seconds for step, seconds in times.items() if step > first) / setting.epochs,
        "warmup_seconds": sum(seconds for step, seconds in times.items() if step <= first),
        "fill_seconds": own or borrowed,
        "fill_borrowed": bool(borrowed),
        "peak_memory_gb": measured["peak_memory_gb"],
        "run_seconds": time.time() - began,
        "estimated_seconds": setting.seconds(study.samples, bool(borrowed)),
        "points": points,
    }


def correction(runs: dict[str, dict[str, Any]]) -> float:
    """Return how much longer runs took than estimated; 1 without runs."""
    done = [record for record in runs.values() if record["status"] == "completed"]
    return sum(r["run_seconds"] for r in done) / sum(r["estimated_seconds"] for r in done) if done else 1.0


def frontier(runs: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, float]]]:
    """Return (name, validation) of all validations that no other one beats in time and loss, sorted by time."""
    every = [(name, point) for name, record in runs.items() if record["status"] == "completed" for point in record["points"]]
    kept: list[tuple[str, dict[str, float]]] = []
    for name, point in sorted(every, key=lambda pair: (pair[1]["seconds"], pair[1]["loss"])):
        if not kept or point["loss"] < kept[-1][1]["loss"]:
            kept.append((name, point))
    return kept


def against_lora(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Return who reaches the best loss of LoRA, on all linear layers and on queries and values, and when."""
    lines = []
    for kind in ("lora_all", "lora_qv"):
        lora = {name: r for name, r in runs.items() if name.startswith(kind) and r["status"] == "completed"}
        if not lora:
            continue
        name, record = min(lora.items(), key=lambda pair: pair[1]["best_loss"])
        goal = f"{name} reaches {record['best_loss']:.4f} after {record['best_seconds']:.0f} s"
        others = {key: r for key, r in runs.items() if not key.startswith("lora_")}
        faster = [(point["seconds"], key) for key, point in frontier(others) if point["loss"] <= record["best_loss"]]
        if faster:
            seconds, key = min(faster)
            lines.append(
                f"{goal}; without plain LoRA {key} is the first there, after {seconds:.0f} s: {seconds / record['best_seconds']:.2f} of it"
            )
        else:
            lines.append(f"{goal}; nothing without plain LoRA does")
    return lines


def sections(study: Study, runs: dict[str, dict[str, Any]]) -> Sections:
    """Return the report: settings by loss, the frontier, failures."""
    done = {name: record for name, record in runs.items() if record["status"] == "completed"}
    rows = []
    for name, r in sorted(done.items(), key=lambda pair: pair[1]["best_loss"]):
        numbers = [
            f"{r['trainable_parameters']:,}",
            f"{r['adapter_parameters']:,}",
            f"{r['lr']:g}",
            f"{r['warmup_epochs']:g} + {r['epochs']}",
        ]
        losses = [f"{r['best_loss']:.4f}", f"{r['best_seconds']:.0f}", f"{r['final_loss']:.4f}", f"{r['final_seconds']:.0f}"]
        times = [f"{r['epoch_seconds']:.1f}", f"{r['fill_seconds']:.1f}{'*' if r['fill_borrowed'] else ''}", f"{r['peak_memory_gb']:.2f}"]
        rows.append([name, *losses, *times, *numbers])
    header = ["setting", "best loss", "after s", "last loss", "after s", "s an epoch", "fill s", "peak GiB"]
    header += ["trained at the end", "in all adapters", "lr", "epochs"]
    machine = next(iter(done.values()))["environment"] if done else environment()
    base = next((r["initial_loss"] for r in done.values() if r["initial_loss"] is not None), None)
    about = [
        f"{study.samples:,} training samples of {study.data}, {study.samples // 5:,} to validate on, batches of {BATCH}, answers only",
        f"{study.checkpoint_dir.name}, {study.precision}; {machine['processor']}, {machine['cores']} cores, {machine['date'][:10]}",
        f"before training: {base:.4f}" if base is not None else "before training: not measured",
        "seconds: from the start of the process, validation not counted; *: filled by an earlier run, and counted",
        f"command: `python -m benchmarks.quality --data {study.data} --samples {study.samples}`",
    ]
    best = []
    for name, stretch in itertools.groupby(frontier(done), key=lambda pair: pair[0]):
        reached = [f"{point['loss']:.4f} after {point['seconds']:.0f} s" for _, point in stretch]
        best.append(f"{name}: {', '.join(reached)}")
    found: dict[str, list[Part]] = {"Settings": [about, Table(header, rows)]}
    found["Frontier"] = [best or "nothing is measured yet", *([lines] if (lines := against_lora(done)) else [])]
    if failed := [f"{name}: {record['error']}" for name, record in runs.items() if record["status"] == "failed"]:
        found["Failed"] = [failed]
    return found


def picture(study: Study, runs: dict[str, dict[str, Any]]) -> Path | None:
    """Draw validation loss over seconds, LoRA in thick lines. Return None without matplotlib or results."""
    done = {name: record for name, record in runs.items() if record["status"] == "completed"}
    figure = report.figure(11, 7) if done else None
    if figure is None:
        return None
    axes = figure.subplots()
    for name, record in sorted(done.items(), key=lambda pair: pair[1]["best_loss"]):
        x, y = ([point[key] for point in record["points"]] for key in ("seconds", "loss"))
        lora = name.startswith("lora_")
        style: dict[str, Any] = {"linewidth": 3, "marker": "s"} if lora else {"linewidth": 1.2, "marker": "o", "markersize": 3}
        axes.plot(x, y, label=name, linestyle="--" if name.startswith("warm") else "-", zorder=3 if lora else 2, **style)
    best = frontier(done)
    axes.step(
        [p["seconds"] for _, p in best], [p["loss"] for _, p in best], where="post", color="0.75", linewidth=6, zorder=1, label="frontier"
    )
    axes.set_xscale("log")
    axes.set_xlabel("seconds since the start, validation not counted")
    axes.set_ylabel("validation loss")
    axes.set_title(f"{study.checkpoint_dir.name}, {study.samples:,} samples of {study.data}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7, ncols=2)
    file = study.folder / "quality.png"
    figure.savefig(file, dpi=130)
    return file


def write_report(study: Study, runs: dict[str, dict[str, Any]]) -> None:
    found = sections(study, runs)
    if file := picture(study, runs):
        found["Settings"].append(Picture("validation loss over seconds", file))
    text = report.as_markdown(f"Loss against time: {study.data}", found)
    atomic.write_text(study.folder / "quality.md", text)
    print(f"\n{text}\nwrote {study.file}, {study.folder / 'quality.md'}", flush=True)


def listing(wanted: list[Setting], study: Study, runs: dict[str, dict[str, Any]]) -> str:
    """Return the settings in their order as text, with the minutes that each takes alone."""
    factor, rows, minutes = correction(runs), [], 0.0
    for setting in wanted:
        keys, seconds = setting.keys, factor * setting.seconds(study.samples)
        taps = f"{keys['skip2lora_block_indices']} to {keys['skip2lora_output_layer']}" if "skip2lora_enabled" in keys else ""
        flags = [flag.removeprefix("lora_") for flag in ALL_LINEAR if keys.get(flag, flag in NO_LORA)]
        lora = "" if not flags else "all linear layers" if len(flags) == len(ALL_LINEAR) else ", ".join(flags)
        state = runs.get(setting.name, {}).get("status", "")
        rows.append([setting.name, state, f"{seconds / 60:.1f}", f"{setting.lr:g}", f"{setting.warmup:g} + {setting.epochs}", taps, lora])
        minutes += seconds / 60
    table = text_table([["setting", "", "minutes", "lr", "epochs", "taps", "LoRA"], *rows])
    return f"{table}\n  in all {minutes:.0f} minutes, without what shared caches save"


def work(wanted: list[Setting], study: Study, again: bool, budget: float | None) -> None:
    """Measure the missing settings within the budget in minutes. One that is too long makes room for shorter ones."""
    runs, began = study.read(), time.time()
    todo = [setting for setting in wanted if again or runs.get(setting.name, {}).get("status") != "completed"]
    shutil.rmtree(study.cache, ignore_errors=True)
    try:
        for number, setting in enumerate(todo):
            filled = any((study.cache / setting.group).glob("*/index.bin")) if setting.group else False
            needed = correction(runs) * setting.seconds(study.samples, filled)
            if budget is not None and time.time() - began + needed > 60 * budget:
                print(f"{setting.name}: left out, it needs {needed / 60:.1f} minutes, more than the budget has left", flush=True)
                continue
            runs[setting.name] = measure(setting, study, runs)
            study.write(runs)
            if not setting.group or all(later.group != setting.group for later in todo[number + 1 :]):
                shutil.rmtree(study.cache / (setting.group or setting.name), ignore_errors=True)
    finally:
        shutil.rmtree(study.cache, ignore_errors=True)
    write_report(study, runs)


def arguments() -> argparse.ArgumentParser:
    def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
        def check(text: str) -> Any:
            if not kind(text) > 0:
                raise ValueError
            return kind(text)

        return check

    parser = argparse.ArgumentParser(description="Validation loss against wall time, a `litgpt finetune` for each setting.")
    parser.add_argument("--data", choices=("python_docs", "wordnet"), required=True)
    parser.add_argument("--samples", type=positive(int), default=1000, help="to train on (default: 1000); a fifth more to validate on")
    parser.add_argument("--settings", nargs="+", default=["*"], help="names or glob patterns. Default: all")
    parser.add_argument("--list", action="store_true", help="show the settings with their estimated minutes, and do nothing")
    parser.add_argument("--again", action="store_true", help="measure again what is measured already")
    parser.add_argument("--budget_minutes", type=positive(float), help="leave out settings that would not finish within this many minutes")
    parser.add_argument("--checkpoint_dir", type=Path, default=CHECKPOINT, help=f"a model of {BLOCKS} blocks (default: {CHECKPOINT})")
    parser.add_argument("--precision", help="bf16-true, 32-true, ... Default: the machine's")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/quality"), help="(default: out/benchmarks/quality)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    study = Study(args.data, args.samples, args.checkpoint_dir, args.precision or default_precision(default_device()), args.out)
    try:
        wanted = chosen(args.settings, settings())
        if args.list:
            print(listing(wanted, study, study.read()))
        else:
            work(wanted, study, args.again, args.budget_minutes)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Interrupted. {study.file} has the finished settings.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
