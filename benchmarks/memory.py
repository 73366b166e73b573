"""The largest model that fine-tunes in a given memory: LoRA, LoRA with activation checkpointing, and Skip2-LoRA.

    python -m benchmarks.memory [--parts steps runs] [--models SmolLM2-135M pythia-410m ...] [--gib 12]

steps   The peak of a training step over B x 512 tokens with random weights, each in a separate process, for models that need at most
        --gib; beside it, and for all larger models, the estimate of `litgpt.memory`, and the largest model for 8 to 80 GB in bf16-true.
runs    Real `litgpt finetune` runs of SmolLM2-135M with the settings of skip2lora.yaml, and over 8 x 512 tokens: the memory of Skip2-LoRA
        with its cache on disk as a share of LoRA's, in total and above the loaded model.

Peaks are of resident memory: of a step since the model was loaded, of a run from its start to its end. `own` leaves out pages of mapped
files, such as a cache on disk, which the kernel can reclaim. Results: OUT/memory.json and OUT/memory.md. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import wordnet
from benchmarks.convert_memory import held
from benchmarks.process import environment as child_environment, in_worker
from benchmarks.report import Part, Sections, Table, as_markdown
from benchmarks.runs import environment
from benchmarks.step import TIED, Settings, build, random_samples, time_steps
from litgpt import atomic, lora
from litgpt.device import backbone_dtype, default_device, default_precision
from litgpt.errors import UserError
from litgpt.logs import read_metrics
from litgpt.memory import PROCESS, estimate

MODELS = (  # sorted by size
    "SmolLM2-135M", "SmolLM2-360M", "pythia-410m", "tiny-llama-1.1b", "Llama-3.2-1B", "Llama-3.2-3B", "Llama-2-7b-hf", "Llama-3.1-8B",
    "Llama-2-13b-hf", "CodeLlama-34b-hf", "Llama-2-70b-hf",
)  # fmt: skip
METHODS: dict[str, tuple[dict[str, Any], bool]] = {  # adapter settings, and whether activations are recomputed
    "LoRA": ({"lora_r": 8, "lora_query": True, "lora_value": True}, False),
    "LoRA, checkpointing": ({"lora_r": 8, "lora_query": True, "lora_value": True}, True),
    "Skip2-LoRA": ({"lora_r": 16, "skip2lora_enabled": True, "skip2lora_block_indices": "last:6"}, False),
}
BATCHES, LENGTH = (1, 4), 512
LOSS_SHARE = 0.25
MEMORIES = (8, 16, 24, 40, 80)  # GB
CHECKPOINT = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")
LORA, ALL_LINEAR = ["--lora_dropout", "0"], ["--lora_key", "true", "--lora_projection", "true", "--lora_mlp", "true"]
CHECKPOINTING = ["--train.activation_checkpointing", "true"]
RUNS = {
    "LoRA, query and value": LORA,
    "LoRA, all linear layers": [*LORA, *ALL_LINEAR],
    "LoRA, query and value, checkpointing": [*LORA, *CHECKPOINTING],
    "LoRA, all linear layers, checkpointing": [*LORA, *ALL_LINEAR, *CHECKPOINTING],
    "Skip2-LoRA": ["--skip2lora_enabled", "true", "--lora_query", "false", "--lora_value", "false", *LORA],
}
RUNS["Skip2-LoRA"] += ["--lora_r", "16", "--skip2lora_block_indices", "all", "--skip2lora_cache", "disk"]
PROMPT = 340  # tokens of a question in the long data; an answer fills the rest of `LENGTH`
DEMO_STEPS, LONG_STEPS = 12, 3  # of a run: the batches of the first differ in length
BAR = 0.4


def computed(model: str, method: str, batch: int, width: int) -> float:
    """Return the bytes that a process takes by `litgpt.memory`, without a cache. `width`: bytes of a number."""
    adapter, checkpointing = METHODS[method]
    config = lora.Config.from_name(model, **adapter)
    tied = config.name.startswith(TIED)
    return (
        estimate(config, batch * LENGTH, round(LOSS_SHARE * batch * LENGTH), tied=tied, width=width, checkpointing=checkpointing).total
        + PROCESS
    )


def peak_since(process: str = "self") -> int:
    """Return the kernel's peak of a process's resident memory, in bytes, since it was last reset."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])


def step(job: dict[str, Any]) -> dict[str, float]:
    """Return bytes of two training steps, the second of which has the optimizer's state from the start. Call it once per process."""
    import torch

    from litgpt.activations.cache import Recompute

    settings, (adapter, checkpointing) = Settings(**job["settings"]), METHODS[job["method"]]
    model: Any = build(settings, adapter)
    model.activation_checkpointing = checkpointing
    samples = random_samples(settings, model.config.vocab_size)
    loaded = held(os.getpid())[1]
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back, see proc(5)
    times = time_steps(model, Recompute(model, samples, torch.device("cpu")), settings)
    return {"loaded": loaded, "peak": peak_since(), "step_ms": times["step_ms"]["median"]}


def measured(model: str, method: str, batch: int, precision: str) -> dict[str, Any]:
    """Run `step` in a separate process. Return {"error": ...} if that fails."""
    settings = Settings(model, batch, LENGTH, LOSS_SHARE, 1, 1, precision, "cpu", 8)
    return in_worker("benchmarks.memory", {"settings": asdict(settings), "method": method})


def steps(models: list[str], batches: list[int], precision: str, gib: float) -> list[dict[str, Any]]:
    """Return a row for each model, batch and method."""
    width, rows = backbone_dtype(precision).itemsize, []
    for model in models:
        for batch in batches:
            for method in METHODS:
                row: dict[str, Any] = {"model": model, "batch": batch, "method": method}
                row["computed"], row["computed_bf16"] = computed(model, method, batch, width), computed(model, method, batch, 2)
                if row["computed"] <= gib * 2**30:
                    row |= measured(model, method, batch, precision)
                    told = row.get("error") or f"{row['peak'] / 2**30:.2f} GiB, {row['computed'] / 2**30:.2f} computed"
                    print(f"{model}, {batch} x {LENGTH}, {method}: {told}", flush=True)
                rows.append(row)
    return rows


def largest(models: list[str], method: str, batch: int, gigabytes: float) -> str | None:
    """Return the last of the models, which are sorted by size, that fits; None if none does."""
    fitting = [model for model in models if computed(model, method, batch, 2) <= gigabytes * 1e9]
    return fitting[-1] if fitting else None


def long_data(folder: Path, base: Path, samples: int) -> Path:
    """Write a .jsonl file whose samples all have more than `LENGTH` tokens, about two thirds of them in the question."""
    from litgpt.tokenizer import Tokenizer

    tokenizer, file = Tokenizer(base), folder / f"long-{samples}.jsonl"
    short = [json.loads(line) for line in wordnet.prepare(folder, 60 * samples).read_text(encoding="utf-8").splitlines()]
    records = []
    for number in range(samples):
        text = " ".join(f"{record['instruction']} {record['output']}." for record in short[number::samples])
        ids = tokenizer.ids(text)
        if len(ids) < LENGTH + PROMPT:
            raise UserError(f"sample {number} has only {len(ids)} tokens")
        parts = (tokenizer.decode(list(part)) for part in (ids[:PROMPT], ids[PROMPT:]))
        records.append(dict(zip(("instruction", "output"), parts, strict=True)))
    atomic.write_text(file, "".join(json.dumps(record) + "\n" for record in records))
    return file


def watched(words: list[str]) -> dict[str, Any]:
    """Run a training command in a separate process. Return the bytes held after loading the model and at the peak, or "error"."""
    command = [sys.executable, "-m", "litgpt", *words, "--verbose", "true"]  # which tells when the model is loaded
    said: list[str] = []
    found = {"loaded": 0, "peak": 0, "own": 0}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=child_environment()) as child:

        def read() -> None:
            assert child.stderr is not None
            for line in child.stderr:
                said.append(line)
                if line.startswith("parameters:"):
                    found["loaded"] = held(child.pid)[1]

        reader = threading.Thread(target=read)
        reader.start()
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            with suppress(KeyError, FileNotFoundError):  # it ends while it is looked at
                found["own"] = max(found["own"], held(child.pid)[0])
                found["peak"] = max(found["peak"], peak_since(str(child.pid)))
            time.sleep(0.01)
        reader.join()
    if child.returncode:
        return {"error": ([line.strip() for line in said if line.startswith("Error:")] or ["it failed"])[-1]}
    return found


def runs(base: Path, out: Path, precision: str) -> list[dict[str, Any]]:
    """Return a row for each workload and method."""
    docs = ["--data", "PythonDocs", "--data.max_samples", "400", "--max_steps", str(DEMO_STEPS)]
    long = ["--data", "JSON", "--data.json_path", str(long_data(out.parent / "data", base, 40)), "--data.mask_prompt", "true"]
    long += ["--train.max_seq_length", str(LENGTH + 1), "--max_steps", str(LONG_STEPS)]
    work = {"make demo": docs, f"8 x {LENGTH} tokens": long}
    common = ["--precision", precision, "--train.global_batch_size", "8", "--train.micro_batch_size", "8", "--epochs", "20"]
    common += ["--eval.max_new_tokens", "0", "--train.keep_best", "false", "--overwrite", "true"]
    rows = []
    for title, data in work.items():
        for method, keys in RUNS.items():
            folder = out / "run"
            cache = ["--skip2lora_cache_dir", str(folder / "cache")]
            row = {
                "workload": title,
                "method": method,
                **watched(["finetune_lora", str(base), *data, *common, *keys, *cache, "--out_dir", str(folder)]),
            }
            if "error" not in row:
                row["step_ms"] = 1000 * statistics.median(seconds for _, seconds in read_metrics(folder)["step_time"])
            atomic.remove_folder(folder)
            told = row.get("error") or f"{row['peak'] / 2**30:.2f} GiB, loaded {row['loaded'] / 2**30:.2f}"
            print(f"{title}, {method}: {told}", flush=True)
            rows.append(row)
    return rows


def gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def step_sections(rows: list[dict[str, Any]], models: list[str], batches: list[int], precision: str) -> Sections:
    table = []
    for row in rows:
        peak = gib(row["peak"]) if "peak" in row else "failed" if "error" in row else "computed"
        ratio = f"{row['peak'] / row['computed']:.2f}" if "peak" in row else ""
        cells = [row["model"], row["method"], f"{row['batch']} x {LENGTH}", peak, gib(row["computed"]), ratio, gib(row["computed_bf16"])]
        table.append(cells)
    header = ["model", "method", "tokens", f"peak, GiB, {precision}", "computed", "peak to it", "computed, bf16-true"]
    found: dict[str, list[Part]] = {"A training step": [Table(header, table)]}
    fitting = []
    for batch in batches:
        for method in METHODS:
            fitting.append([f"{method}, {batch} x {LENGTH}", *(largest(models, method, batch, size) or "none" for size in MEMORIES)])
    found["The largest model that fits, bf16-true, computed"] = [Table(["", *(f"{size} GB" for size in MEMORIES)], fitting)]
    if failed := [f"{row['model']}, {row['method']}: {row['error']}" for row in rows if "error" in row]:
        found["Failed"] = [failed]
    return found


def run_sections(rows: list[dict[str, Any]]) -> Sections:
    """Return peaks, and Skip2-LoRA's as a share of each other method's."""
    table = []
    good = [row for row in rows if "error" not in row]
    for row in good:
        cells = [f"{row['workload']}: {row['method']}", gib(row["loaded"]), gib(row["peak"]), gib(row["peak"] - row["loaded"])]
        cells += [gib(row["own"]), f"{row['step_ms']:.0f}"]
        ours = next((one for one in good if one["workload"] == row["workload"] and one["method"] == "Skip2-LoRA"), None)
        if ours is None or ours is row:
            table.append([*cells, "", "", ""])
            continue
        shares = [ours["peak"] / row["peak"], (ours["peak"] - ours["loaded"]) / (row["peak"] - row["loaded"]), ours["own"] / row["own"]]
        table.append([*cells, *(f"{share:.2f}" for share in shares)])
    header = ["run", "loaded, GiB", "peak", "above the loaded model", "own peak", "step, ms"]
    header += ["Skip2-LoRA's peak to it", "above the loaded model", "own"]
    parts: list[Part] = [f"The bar: Skip2-LoRA at most {BAR:.2f} of LoRA.", Table(header, table)]
    failed = [f"{row['workload']}, {row['method']}: {row['error']}" for row in rows if "error" in row]
    return {"Whole runs": [*parts, *([failed] if failed else [])]}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Peak memory of LoRA and Skip2-LoRA, measured and computed.")
    parser.add_argument("--parts", nargs="+", choices=("steps", "runs"), default=["steps", "runs"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help=f"of the catalogue, by size (default: {' '.join(MODELS)})")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="(default: 1 4)")
    parser.add_argument("--gib", type=float, default=8.0, help="measure models that need at most this much, compute the rest (default: 8)")
    parser.add_argument("--precision", help="of what is measured. Default: the machine's")
    parser.add_argument("--checkpoint_dir", type=Path, default=CHECKPOINT, help=f"for the runs (default: {CHECKPOINT})")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/memory"), help="(default: out/benchmarks/memory)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if args.worker:
        print(json.dumps(step(json.loads(args.worker))))
        return 0
    precision = args.precision or default_precision(default_device())
    content: dict[str, Any] = {"format": 1, "environment": environment(), "precision": precision}
    found: Sections = {}
    try:
        if "steps" in args.parts:
            content["steps"] = steps(args.models, args.batches, precision, args.gib)
            found |= step_sections(content["steps"], args.models, args.batches, precision)
        if "runs" in args.parts:
            content["runs"] = runs(args.checkpoint_dir, args.out, precision)
            found |= run_sections(content["runs"])
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    text = as_markdown("Memory", found)
    atomic.write_text(args.out / "memory.json", json.dumps(content, indent=2) + "\n")
    atomic.write_text(args.out / "memory.md", text)
    print(f"\n{text}\nwrote {args.out / 'memory.json'}, {args.out / 'memory.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
