"""A style of one's own: the loss on records that were held out, what is forgotten, and how long that takes; and texts with classes.

    python -m benchmarks.styles CHECKPOINT_DIR [--sets docstrings wordnet code classes] [--sizes 300 1000] [--seeds 0 1 2]
                                               [--settings default ...]

Each setting is a `litgpt finetune MODEL --data FILE ...` in a process of its own on records of `litgpt.data.PythonDocs`,
`benchmarks.wordnet` or `benchmarks.code_summaries`; seconds are those of the whole process. The folder that it wrote is measured by
`litgpt evaluate` on 200 other records, which also counts the right classes, and by the general questions of `benchmarks.own_data`.
OUT/results.json is written after each run, and a run that it has is not repeated; OUT/styles.md is the table of means.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import code_summaries, wordnet
from benchmarks.process import error_line, in_worker, run_litgpt
from benchmarks.runs import measure_missing, read_json, results_in, write_jsonl
from litgpt.data import PythonDocs
from litgpt.text import markdown_table

SETS = ["docstrings", "wordnet", "code", "classes"]
HELD_OUT = 200
LONGEST_CLASS = 8  # tokens
LORA = ["--skip2lora_enabled", "false"]
ALONE = [*LORA, "--lora_block_indices", "all", "--lora_r", "8", "--lora_alpha", "16", "--lora_dropout", "0.05", "--train.replay", "0"]
SKIP2 = ["--skip2lora_enabled", "true", "--skip2lora_block_indices"]
SETTINGS: dict[str, list[str]] = {  # words behind `litgpt finetune MODEL --data FILE`
    "default": [],
    "as a style": ["--data.val_split_fraction", "0.1"],
    "with general questions": ["--train.replay", "24"],
    "as facts, by LoRA in every block": ["--data.val_split_fraction", "0", "--alora_enabled", "false"],
    **{
        f"Skip2-LoRA, {where}, rank {r}": [*SKIP2, blocks, "--skip2lora_r", r, "--skip2lora_alpha", alpha, "--optimizer.lr", rate]
        for where, blocks, r, alpha, rate in (
            ("every block", "all", "16", "16", "1e-3"),
            ("every block", "all", "32", "64", "5e-4"),
            ("three late blocks", "[21,25,28]", "192", "384", "5e-4"),
        )
    },
    **{
        f"LoRA, {epochs} epochs at {rate}": [*LORA, "--epochs", str(epochs), "--optimizer.lr", rate]
        for epochs in (2, 3, 4)
        for rate in ("5e-4", "1e-3", "2e-3")
    },
    **{
        f"{method} alone, {epochs} epochs at {rate}": [*words, *ALONE, "--epochs", str(epochs), "--optimizer.lr", rate]
        for method, words in (("LoRA", ["--alora_enabled", "false"]), ("answer-only LoRA", ["--alora_enabled", "true"]))
        for epochs in (2, 4)
        for rate in ("5e-4", "1e-3", "2e-3")
    },
}


def draw(name: str, size: int, seed: int, folder: Path) -> tuple[Path, Path]:
    """Return files of `size` records to train on and of others to measure, written to `folder`."""
    if name == "docstrings":
        records = list(PythonDocs().records()[0])
        random.Random(seed).shuffle(records)
    elif name == "code":
        records = code_summaries.records(seed)
    elif name == "classes":
        records = wordnet.classes(wordnet.read_package(wordnet.fetch(folder)), size + HELD_OUT, seed)
    else:
        records = [json.loads(line) for line in wordnet.prepare(folder, size + HELD_OUT, seed).read_text(encoding="utf-8").splitlines()]
    files = folder / f"{name}-{size}-{seed}.jsonl", folder / f"{name}-{size}-{seed}-held-out.jsonl"
    write_jsonl(files[0], records[:size])
    write_jsonl(files[1], records[size : size + HELD_OUT])
    return files


def judge(model: Path, held_out: Path, folder: Path) -> dict[str, Any]:
    """Return the loss of a model on held-out records, the share of right classes, and its answers to the general questions."""
    file = folder / "judged/results.json"
    longest = LONGEST_CLASS if "label" in json.loads(held_out.read_text(encoding="utf-8").splitlines()[0]) else 0
    words = ["--data.mask_prompt", "true", "--max_new_tokens", str(longest), "--batch_size", "8", "--save_filepath", str(file)]
    code, output = run_litgpt(["evaluate", str(model), "--data", str(held_out), *words])
    if code:
        return {"error": error_line(output)}
    answers = in_worker("benchmarks.own_data", {"folder": str(model), "name": "", "size": 0, "seed": 0})
    found = read_json(file, "litgpt evaluate wrote it")
    return {**{name: found[name] for name in ("loss", "exact_match") if name in found}, **answers}


def measure(checkpoint_dir: Path, files: tuple[Path, Path], seed: int, words: list[str], folder: Path) -> dict[str, Any]:
    """Return the figures of one setting on one set."""
    start, out_dir = time.perf_counter(), folder / "run"
    command = ["finetune", str(checkpoint_dir), "--data", str(files[0]), "--out_dir", str(out_dir), "--overwrite", "true"]
    code, output = run_litgpt([*command, "--seed", str(seed), *words])
    seconds = time.perf_counter() - start
    return {"error": error_line(output)} if code else {"seconds": seconds, **judge(out_dir, files[1], folder)}


def table(results: dict[str, Any]) -> str:
    """Return a Markdown table of each set and size: means over the seeds of the loss, of what is kept of general knowledge, of seconds."""
    groups: dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for key, run in results["runs"].items():
        name, size, seed, setting = key.split(" ", 3)
        if "error" not in run:
            groups.setdefault((f"{name}, {size} records", setting), []).append((run, results["bases"][f"{name} {size} {seed}"]))
    rows = []
    for (data, setting), runs in groups.items():
        before = sum(base["loss"] for _, base in runs) / len(runs)
        known = sum(sum(base["general"]) for _, base in runs)
        kept = sum(a and b for run, base in runs for a, b in zip(run["general"], base["general"], strict=True))
        after, seconds = (sum(run[name] for run, _ in runs) / len(runs) for name in ("loss", "seconds"))
        right = [run["exact_match"] for run, _ in runs if "exact_match" in run]
        share = f"{100 * sum(right) / len(right):.1f} %" if right else ""
        rows.append([data, setting, f"{before:.3f}", f"{after:.3f}", share, f"{kept} of {known}", f"{seconds:.0f}", str(len(runs))])
    return markdown_table(["data", "setting", "loss before", "after", "right classes", "general questions kept", "seconds", "seeds"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint_dir", type=Path)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[300, 1000])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/styles"))
    chosen = parser.parse_args()
    results = results_in(chosen.out)
    bases = results.setdefault("bases", {})

    def measured(name: str, size: int, seed: int, setting: str) -> dict[str, Any]:
        files = draw(name, size, seed, chosen.out)
        if (of_data := f"{name} {size} {seed}") not in bases:
            bases[of_data] = judge(chosen.checkpoint_dir, files[1], chosen.out)
        return measure(chosen.checkpoint_dir, files, seed, SETTINGS[setting], chosen.out)

    jobs = (
        (f"{name} {size} {seed} {setting}", partial(measured, name, size, seed, setting))
        for seed, size, name, setting in itertools.product(chosen.seeds, chosen.sizes, chosen.sets, chosen.settings)
    )
    measure_missing(results, jobs, table, chosen.out / "styles.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
