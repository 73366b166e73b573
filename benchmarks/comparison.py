"""Run LoRA and Skip2-LoRA on the same data, one after the other, and collect what each run measured.

    python evaluate_skip2lora_comparison.py [--model llama-2-7b] [--max_steps 100] [--repeats 3] [--KEY VALUE of litgpt finetune ...]
    python evaluate_skip2lora_comparison.py --runs lora_baseline skip2lora skip2lora_tail "mine=my.yaml --lora_r 4"

A run is a YAML file with overrides, done by `litgpt finetune` in a separate process. `--model` is a folder of config_hub/finetune; the
default is the first one whose checkpoint exists. A name in `--runs` is a YAML file of that folder or one of the guide's three, which are
derived from its skip2lora.yaml if they have no file. Keys that this script does not know, such as --checkpoint_dir, --epochs or
--data.json_path, go to every run.

Every run validates before the first step, generates no sample answers, whose time would count, and gets its own cache folder, which is
removed afterwards, so that no run profits from an earlier one. Repetition k of a run has seed + k - 1. A failed run is recorded and the
next one starts. OUT_DIR/comparison_results.json has the results for analyze_results.py; OUT_DIR/<name>/ has each run's logs and adapter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.process import ROOT, error_line, redacted, run_litgpt
from benchmarks.runs import environment, finetune_arguments, read_run, read_settings
from litgpt import atomic, checkpoint
from litgpt.args import defaults as args_defaults
from litgpt.errors import UserError
from litgpt.finetune.lora import Lora
from litgpt.logs import METRICS
from litgpt.text import text_table

HUB = Path(os.path.relpath(ROOT / "config_hub" / "finetune"))
GUIDE = ("lora_baseline", "skip2lora_4blocks", "skip2lora_6blocks")
FIRST_MODEL = "llama-2-7b"  # the guide's; the others follow by name
SEED = 1337  # `litgpt finetune`'s default
CACHE = "comparison_cache"


@dataclass(frozen=True)
class Run:
    name: str
    config: Path
    overrides: tuple[str, ...] = ()


def hub_folder(model: str | None, extra: list[str], hub: Path) -> Path:
    """Return the folder of config_hub/finetune to use. Raise UserError if it is unknown, or if no checkpoint exists to choose."""
    names = sorted((folder.name for folder in hub.iterdir() if folder.is_dir()), key=lambda name: (name != FIRST_MODEL, name))
    if model is not None:
        if model not in names:
            raise UserError(f"--model {model}: config_hub/finetune has {', '.join(names)}")
        return hub / model
    if any(word.startswith("--checkpoint_dir") for word in extra):
        raise UserError(f"--checkpoint_dir needs --model, whose settings are taken: {', '.join(names)}")
    wanted = {name: finetune_arguments(hub / name / "skip2lora.yaml")["checkpoint_dir"] for name in names}
    for name, folder in wanted.items():
        if (folder / checkpoint.WEIGHTS).is_file():
            return hub / name
    raise UserError(
        f"no model found: {', '.join(map(str, wanted.values()))} are all missing. `make demo` fetches SmolLM2-135M; convert another one "
        "with `litgpt convert_to_litgpt`, or give --model NAME and --checkpoint_dir DIR"
    )


def plan(texts: list[str], folder: Path) -> list[Run]:
    """Return the named runs. Raise UserError that lists every unknown name and file, and names used twice."""
    runs, problems = [], []
    for text in texts:
        name, _, command = text.partition("=")
        try:
            words = shlex.split(command)
        except ValueError as error:
            problems.append(f"{text!r}: {error}")
            continue
        if not re.fullmatch(r"[\w-]+", name):
            problems.append(f"{text!r} needs a plain name, such as mine=my.yaml")
        elif words:
            runs.append(Run(name, Path(words[0]), tuple(words[1:])))
        elif (folder / f"{name}.yaml").is_file():
            runs.append(Run(name, folder / f"{name}.yaml"))
        elif name in GUIDE:
            runs.append(derived(name, folder))
        else:
            known = sorted({*GUIDE, *(file.stem for file in folder.glob("[!_]*.yaml"))})
            problems.append(f"{name!r} is neither {', '.join(known)} nor of the form NAME=FILE.yaml")
    problems += [f"{run.config} does not exist" for run in runs if not run.config.is_file()]
    names = [run.name for run in runs]
    problems += [f"{name!r} is named twice" for name in sorted(set(names)) if names.count(name) > 1]
    if problems:
        raise UserError(f"--runs: {'; '.join(problems)}")
    return runs


def derived(name: str, folder: Path) -> Run:
    """Return one of the guide's three runs, derived from skip2lora.yaml so that data and training are the same.

    They are the first 4 or 6 blocks, or LoRA instead. For LoRA every adapter setting is reset to `litgpt finetune`'s default, queries and
    values at rank 8, and the learning rate is that of lora.yaml.
    """
    file = folder / "skip2lora.yaml"
    if name != "lora_baseline":
        blocks = list(range(4 if name == "skip2lora_4blocks" else 6))
        return Run(name, file, ("--skip2lora_block_indices", str(blocks)))
    preset, lora = (finetune_arguments(folder / f"{kind}.yaml") for kind in ("skip2lora", "lora"))
    defaults = args_defaults(Lora)
    reset = {key: defaults[key] for key in preset if key.startswith(("lora_", "skip2lora_")) and preset[key] != defaults[key]}
    words = [word for key, value in reset.items() for word in (f"--{key}", json.dumps(value))]
    return Run(name, file, (*words, "--optimizer.lr", str(lora["optimizer"]["init_args"]["lr"])))


def words_of(run: Run, repeat: int, out_dir: Path, args: argparse.Namespace, extra: list[str]) -> list[str]:
    """Return the words after `litgpt`. The user's own come last, so they take precedence."""
    words = ["finetune", str(run.config), "--out_dir", str(out_dir), "--eval.initial_validation", "true", "--eval.max_new_tokens", "0"]
    words += ["--skip2lora_cache_dir", str(out_dir / CACHE), "--seed", str(SEED + repeat - 1)]
    words += ["--max_steps", str(args.max_steps)] if args.max_steps else []
    words += ["--overwrite", "true"] if args.overwrite else []
    return [*words, *run.overrides, *extra]


def do(run: Run, repeat: int, out_dir: Path, args: argparse.Namespace, extra: list[str]) -> dict[str, Any]:
    """Do one run and return its record for comparison_results.json."""
    words = words_of(run, repeat, out_dir, args, extra)
    print(f"\n$ {redacted(words)}", flush=True)
    began = time.time()
    try:
        code, said = run_litgpt(words)
    finally:
        shutil.rmtree(out_dir / CACHE, ignore_errors=True)
    record = {
        "name": run.name,
        "repeat": repeat,
        "config": str(run.config),
        "command": redacted(words),
        "folder": str(out_dir),
        "status": "failed" if code else "completed",
        "exit_code": code,
        "error": error_line(said) if code else None,
        "wall_seconds": time.time() - began,
        "settings": {},
        "measured": {},
    }
    metrics = out_dir / METRICS
    if metrics.is_file() and metrics.stat().st_mtime >= began:  # else it failed before it began, and the folder holds an earlier run
        record |= {"settings": read_settings(out_dir), "measured": read_run(out_dir)}
    reason = f": {record['error']}" if record["error"] else ""
    print(f"{run.name}: {record['status']} after {record['wall_seconds']:.0f} s{reason}", flush=True)
    return record


def table(records: list[dict[str, Any]]) -> str:
    """Return the measurements as text, a line per run."""
    keys = {
        "final_val_loss": "{:.4f}",
        "initial_val_loss": "{:.4f}",
        "trainable_parameters": "{:,}",
        "steps": "{:,}",
        "steps_per_second": "{:.2f}",
        "total_seconds": "{:.1f}",
        "peak_memory_gb": "{:.2f}",
    }
    rows = []
    for record in records:
        name = record["name"] if record["repeat"] == 1 else f"{record['name']} ({record['repeat']})"
        measured = record["measured"] if record["status"] == "completed" else {}
        rows.append([name, record["status"], *(form.format(measured[key]) if key in measured else "-" for key, form in keys.items())])
    header = ["", "", "final loss", "initial loss", "trainable", "steps", "steps/s", "seconds", "peak GiB"]
    return text_table([header, *rows])


def arguments() -> argparse.ArgumentParser:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    parser = argparse.ArgumentParser(
        description="LoRA and Skip2-LoRA on the same data, one run after the other.",
        epilog="Other keys go to every run's `litgpt finetune`: --checkpoint_dir DIR, --epochs 2, --data.json_path FILE, ...",
        allow_abbrev=False,
    )
    parser.add_argument("--model", help="folder of config_hub/finetune. Default: the first one whose checkpoint exists")
    parser.add_argument("--runs", nargs="+", default=list(GUIDE), help="names of YAML files, or 'NAME=FILE.yaml --key value'")
    parser.add_argument("--max_steps", type=positive, help="stop each run after this many steps")
    parser.add_argument("--out_dir", type=Path, default=Path("out/finetune"), help="for runs and results (default: out/finetune)")
    parser.add_argument("--repeats", type=positive, default=1, help="number of repetitions, each with its own seed")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results and runs in the out_dir")
    return parser


def main(argv: list[str] | None = None) -> int:
    args, extra = arguments().parse_known_args(argv)
    file, records = args.out_dir / "comparison_results.json", []
    try:
        if file.exists() and not args.overwrite:
            raise UserError(f"{file} exists already: give another --out_dir, or --overwrite to replace it and its runs")
        folder = hub_folder(args.model, extra, HUB)
        runs = plan(args.runs, folder)
        common = {"format": 1, "environment": environment(), "model": folder.name}
        for repeat in range(1, args.repeats + 1):
            for run in runs:
                name = run.name if repeat == 1 else f"{run.name}.{repeat}"
                records.append(do(run, repeat, args.out_dir / name, args, extra))
                atomic.write_text(file, json.dumps({**common, "runs": records}, indent=2) + "\n")
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Interrupted. {f'{file} has the finished runs.' if records else ''}", file=sys.stderr)
        return 130
    failed = [record["name"] for record in records if record["status"] == "failed"]
    print(f"\n{table(records)}\n\nwrote {file}; the report: python analyze_results.py {file}")
    if failed:
        print(f"{len(failed)} of {len(records)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))
