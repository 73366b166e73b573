"""What needs a CUDA device, in one command (`make gpu`): the tests marked `gpu`, then training steps of a model with random weights.

It needs no model file and no network. The results go into one JSON and one Markdown file.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.process import environment
from litgpt.activations.cache import Activations, CacheSettings, Recompute, activations
from litgpt.args import TrainArgs
from litgpt.checkpoint import load_base
from litgpt.device import MIXED, backbone_dtype, on_meta
from litgpt.errors import UserError
from litgpt.logs import peak_memory_gb
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.optim import make_optimizer
from litgpt.pretrain import fresh
from litgpt.sample import Sample
from litgpt.sharding import part_of, shard
from litgpt.text import text_table
from litgpt.train.loop import Batches, Loop
from litgpt.train.parallel import Rank
from litgpt.train.resume import State

BATCH, STEPS = 8, 6  # samples of a step, steps of a row; the first is not timed
SKIP = {"lora_r": 8, "skip2lora_enabled": True, "skip2lora_block_indices": "last:6"}
LORA = {"lora_r": 8, "lora_query": True, "lora_key": True, "lora_value": True, "lora_projection": True, "lora_mlp": True}


@dataclass(frozen=True)
class Row:
    """A way to train."""

    name: str
    precision: str
    adapters: dict[str, Any]
    cached: bool = False
    sharded: bool = False


ROWS = [
    *(Row("LoRA", precision, LORA) for precision in ("bf16-true", "16-true", "bf16-mixed", "16-mixed", "32-true")),
    Row("LoRA, fsdp on one device", "bf16-true", LORA, sharded=True),
    Row("Skip2-LoRA", "bf16-true", SKIP),
    Row("Skip2-LoRA, cached", "bf16-true", SKIP, cached=True),
    Row("Skip2-LoRA, cached", "16-true", SKIP, cached=True),
    Row("Skip2-LoRA, fsdp on one device", "bf16-true", SKIP, sharded=True),
    Row("all weights", "bf16-true", {}),
]


def random_samples(config: Config, count: int, length: int) -> list[Sample]:
    """Return samples of `length` tokens, the second half of which carries loss."""
    ids = torch.randint(config.vocab_size, (count, length), generator=torch.Generator().manual_seed(0))
    mask = bytearray([0] * (length // 2) + [1] * (length - length // 2))
    return [Sample(array("i", row), mask) for row in ids.tolist()]


def build(row: Row, name: str, weights: dict[str, torch.Tensor], rank: Rank) -> GPT:
    """Return the model on the device, its adapters trainable."""
    dtype = backbone_dtype(row.precision)
    with on_meta():
        model = Config.from_name(name, **row.adapters, lora_dropout=0.0).make_model()
    if row.sharded:
        from litgpt.adapters.base import renew_adapters

        renew_adapters(model)
        mark_only_lora_as_trainable(model)
        shard(model, rank.device, lambda names: {key: weights[key.replace(".linear.", ".")] for key in names}, dtype)
        return model
    load_base(model, dict(weights), dtype, name)
    if row.adapters:
        mark_only_lora_as_trainable(model)
    return model.to(rank.device)


def measure(row: Row, name: str, weights: dict[str, torch.Tensor], length: int, device: torch.device) -> dict[str, Any]:
    """Return loss, tokens a second and peak memory of the steps of a row."""
    rank = Rank.start(row.precision, 1, 1, 600.0, shards=True) if row.sharded else Rank(device=device, mixed=MIXED.get(row.precision))
    if row.sharded:
        rank = replace(rank, sharded=True)
    torch.manual_seed(0)
    model = build(row, name, weights, rank)
    samples = random_samples(model.config, BATCH, length)
    own: Activations = Recompute(model, samples, rank.device)
    if row.cached:
        with rank.autocast():
            own = activations(model, samples, range(BATCH), "training", CacheSettings("memory", Path(), model.dtype), rank.device)
    rate = {"class_path": "AdamW", "init_args": {"lr": 1e-4 if row.adapters else 1e-5}}
    optimizer = make_optimizer(rate, [part_of(p) for p in model.parameters() if p.requires_grad])
    train = TrainArgs(global_batch_size=BATCH, micro_batch_size=BATCH // 2, lr_warmup_steps=0, max_steps=STEPS, epochs=None, max_norm=1.0)
    loop = Loop(model, optimizer, train, Batches(samples, BATCH, rank, 1), own, rank)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    state, losses, began, batches = State(), list[float](), 0.0, loop.batches.after(0)
    for step in range(STEPS):
        if step == 1:
            began = time.perf_counter()
        losses.append(loop.step(state, next(batches))["train_loss"])
    tokens = (STEPS - 1) * sum(sample.n_inputs for sample in samples)
    speed = tokens / (time.perf_counter() - began)
    return {"losses": losses, "tokens_per_second": round(speed), "peak_memory_gb": round(peak_memory_gb(device), 2)}


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `work` returns, or its error: one row that fails does not end the others."""
    try:
        return work()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def run_tests() -> str:
    """Run the tests marked `gpu` and return pytest's last line."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], capture_output=True, text=True, env=environment())
    return (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1].strip("= ")


def report(results: dict[str, Any]) -> str:
    rows: list[tuple[str, ...]] = [("method", "precision", "loss, first and last step", "tokens/s", "peak GiB")]
    for row in results["rows"]:
        if "error" in row:
            rows.append((row["name"], row["precision"], row["error"], "", ""))
        else:
            losses = f"{row['losses'][0]:.3f}, {row['losses'][-1]:.3f}"
            rows.append((row["name"], row["precision"], losses, f"{row['tokens_per_second']:,}", f"{row['peak_memory_gb']:.2f}"))
    about = [f"{key}: {results[key]}" for key in ("device", "torch", "python", "date", "model", "length", "tests") if key in results]
    return "\n".join(["# On a CUDA device", "", *(f"- {line}" for line in about), "", "```", text_table(rows, left=(0, 1, 2)), "```", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu tries the script itself, with a small --model")
    parser.add_argument("--model", default="Llama-3.2-1B", help="a named model, whose shape the random weights have")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for gpu.json and gpu.md")
    parser.add_argument("--no-tests", action="store_true", help="steps only")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("make gpu: torch sees no CUDA device here, so nothing was run and nothing was written", file=sys.stderr)
        return 1
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device(given.device)
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the CPU ({platform.processor() or platform.machine()})"
    results: dict[str, Any] = {"device": processor, "torch": torch.__version__, "python": platform.python_version()}
    results |= {"date": date.today().isoformat(), "model": f"random weights, {given.model}", "length": given.length}
    if not given.no_tests:
        results["tests"] = run_tests()
    try:
        weights = fresh(Config.from_name(given.model), seed=0).state_dict()
    except UserError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 1
    results["rows"] = []
    for row in ROWS:
        measured = attempt(lambda row=row: measure(row, given.model, weights, given.length, device))  # type: ignore[misc]
        results["rows"].append({"name": row.name, "precision": row.precision, **measured})
        print(json.dumps(results["rows"][-1]), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
    (given.out / "gpu.md").write_text(report(results))
    print(f"\n{report(results)}\nwritten: {given.out / 'gpu.json'}, {given.out / 'gpu.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
