"""Variants of LoRA on two small data sets: validation loss, CPU seconds and memory.

    python -m benchmarks.variants CHECKPOINT_DIR [--sets faq docstrings] [--variants lora dora ...] [--rates 3e-4 1e-3] [--out DIR]

Each run is a `litgpt finetune_lora` in a process of its own, on one thread: LoRA of rank 8 on every linear layer of the last 8 blocks. The
blocks before them are cached on disk by a run of one step that is not counted. `faq` are invented facts (`benchmarks.facts`), a fifth of
whose phrasings is held out; `docstrings` are `litgpt.data.PythonDocs`. CPU seconds are of the whole process, and so hardly depend on what
else the machine does. OUT/results.json is written after each run, and a run that it has is not repeated; OUT/variants.md is the table, with
the better rate of each variant.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import facts
from benchmarks.process import error_line, run_litgpt
from benchmarks.runs import measure_missing, read_run, results_in, write_jsonl
from litgpt.text import markdown_table

LINEAR = [word for name in ("query", "key", "value", "projection", "mlp") for word in (f"--lora_{name}", "true")]
COMMON = [
    *LINEAR,
    *("--lora_r", "8", "--lora_alpha", "16", "--lora_dropout", "0", "--lora_block_indices", "last:8", "--skip2lora_cache", "disk"),
    *("--precision", "32-true", "--train.global_batch_size", "4", "--train.micro_batch_size", "4", "--train.lr_warmup_steps", "4"),
    *("--train.min_lr", "0", "--train.save_interval", "null", "--train.keep_best", "false", "--eval.interval", "1000000"),
    *("--eval.max_new_tokens", "0", "--data.val_split_fraction", "0.2", "--data.mask_prompt", "true", "--overwrite", "true"),
]
VARIANTS: dict[str, list[str]] = {  # words that differ from plain LoRA's
    "lora": [],
    "rslora": ["--lora_rslora", "true"],
    "dora": ["--lora_variant", "dora"],
    "pissa": ["--lora_variant", "pissa"],
    "olora": ["--lora_variant", "olora"],
    "lora_fa": ["--lora_freeze_a", "true"],
    "lora_plus": ["--loraplus_lr_ratio", "16"],
    "neftune": ["--train.neftune_noise_alpha", "5"],
    "modules_to_save": ["--modules_to_save", "lm_head"],
}
SETS = {"faq": ["--train.epochs", "4"], "docstrings": ["--train.epochs", "2"]}
RECORDS = 64  # of docstrings


def data_words(name: str, folder: Path) -> list[str]:
    """Return the words that name a set's data, whose file is written if need be."""
    if name == "docstrings":
        return ["--data", "PythonDocs", "--data.max_samples", str(RECORDS)]
    file = folder / f"{name}.jsonl"
    return ["--data", "JSON", "--data.json_path", str(write_jsonl(file, facts.make(name, 60).records))]


def cpu_seconds() -> float:
    """Return the processor time of the processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(checkpoint_dir: Path, name: str, variant: str, rate: str, folder: Path, *words: str) -> dict[str, Any]:
    """Return the figures of a run."""
    out_dir = folder / "run"
    command = ["finetune_lora", str(checkpoint_dir), *data_words(name, folder), "--out_dir", str(out_dir), *COMMON, *SETS[name]]
    begun = cpu_seconds()
    code, output = run_litgpt([*command, "--optimizer.lr", rate, *VARIANTS[variant], *words])
    if code:
        return {"error": error_line(output)}
    run = read_run(out_dir)
    kept = ("initial_val_loss", "final_val_loss", "final_train_loss", "steps", "trainable_parameters", "peak_memory_gb")
    return {**{key: run[key] for key in kept if key in run}, "cpu_seconds": cpu_seconds() - begun}


def table(results: dict[str, Any]) -> str:
    """Return a Markdown table of the variants, each with the learning rate that gave it the lowest loss."""
    rows = []
    for name in SETS:
        for variant in VARIANTS:
            runs = {key.split()[2]: run for key, run in results["runs"].items() if key.split()[:2] == [name, variant]}
            done = {rate: run for rate, run in runs.items() if "error" not in run}
            if not done:
                rows += [[name, variant, *("" for _ in range(5)), next(iter(runs.values()))["error"][:60]]] if runs else []
                continue
            rate, run = min(done.items(), key=lambda item: item[1]["final_val_loss"])
            losses = [f"{run[key]:.3f}" for key in ("final_train_loss", "final_val_loss")]
            figures = [f"{run['trainable_parameters']:,}", *losses, f"{run['cpu_seconds']:.0f}", f"{run['peak_memory_gb']:.2f}"]
            rows.append([name, variant, rate, *figures])
    return markdown_table(["data", "variant", "rate", "parameters", "training loss", "validation loss", "CPU seconds", "peak GiB"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint_dir", type=Path)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--rates", nargs="+", default=["1e-3"])
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/variants"))
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    results = results_in(chosen.out)
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name in chosen.sets:
        if not any(key.startswith(name) for key in results["runs"]):
            print(f"== {name}: the cache", flush=True)
            measure(chosen.checkpoint_dir, name, "lora", "1e-3", chosen.out, "--max_steps", "1")
    jobs = (
        (f"{name} {variant} {rate}", partial(measure, chosen.checkpoint_dir, name, variant, rate, chosen.out))
        for rate, name, variant in itertools.product(chosen.rates, chosen.sets, chosen.variants)
    )
    measure_missing(results, jobs, table, chosen.out / "variants.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
