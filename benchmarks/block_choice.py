"""Compare choices of blocks to tap: validation losses of `auto`, simple rules and random sets, trained from one cache of all blocks.

    python -m benchmarks.block_choice CHECKPOINT [--samples 1000] [--epochs 3] [--counts 4 6] [--random 3] [--seeds 1] [--out FILE.json]

The data are PythonDocs' docstrings, a tenth held out. All blocks' outputs are computed once; each set of blocks then trains its adapters
with the same loop, seeds and order of samples, so that only the blocks differ. `predicted` is the criterion of `auto`: the share of the
loss's gradient that the blocks predict on samples that were not fitted (`litgpt.activations.choose`). The JSON file is written after each
run, and the same command resumes. Only losses are measured, so other work on the machine does no harm.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from litgpt.activations.cache import ActivationCache, CacheSettings, filled
from litgpt.activations.choose import SAMPLES, Evidence, draw, gather, select
from litgpt.args import TrainArgs
from litgpt.convert.resolve import open_checkpoint
from litgpt.data import JSON, PythonDocs
from litgpt.data.base import Splits
from litgpt.finetune.lora import Lora
from litgpt.logs import Console
from litgpt.optim import make_optimizer
from litgpt.prompts import resolve_prompt_style
from litgpt.tokenizer import Tokenizer
from litgpt.train.loop import Batches, Loop
from litgpt.train.methods import Method, ranges
from litgpt.train.parallel import Rank
from litgpt.train.resume import State

CPU = torch.device("cpu")
BATCH, WARMUP, SEED = 8, 20, 1337


def method(base: Path, blocks: Any, rank: int) -> Method:
    own: dict[str, Any] = {"lora_r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "lora_query": False, "lora_value": False}
    return Lora(checkpoint_dir=base, data=JSON(), skip2lora_enabled=True, skip2lora_block_indices=blocks, **own).method()


def cached(model: Any, splits: Splits, console: Console) -> dict[str, ActivationCache]:
    options = CacheSettings("memory", Path(), model.dtype, console)
    both = {"training": splits.train, "validation": splits.val}
    return {name: filled(model, samples, len(samples), name, options, CPU) for name, samples in both.items()}


def tuned(base: Path, blocks: list[int], given: argparse.Namespace, splits: Splits, caches: dict[str, ActivationCache], seed: int) -> float:
    """Return the validation loss after training adapters on these blocks."""
    torch.manual_seed(seed)
    model = method(base, blocks, given.rank).build(base, torch.float32)
    val = list(range(len(splits.val)))
    rank = Rank()
    spec = {"class_path": "torch.optim.AdamW", "init_args": {"lr": given.lr}}
    size: dict[str, Any] = {"global_batch_size": BATCH, "micro_batch_size": BATCH, "lr_warmup_steps": WARMUP}
    loop = Loop(
        model=model,
        optimizer=make_optimizer(spec, [p for p in model.parameters() if p.requires_grad]),
        train=TrainArgs(epochs=given.epochs, save_interval=None, save_every_minutes=None, **size),
        batches=Batches(splits.train, BATCH, rank, seed),
        activations=caches["training"].narrowed(blocks),
        rank=rank,
    )
    state = State()
    for batch in itertools.islice(loop.batches.after(0), loop.total_steps):
        loop.step(state, batch)
    val_batches = [val[i : i + 4 * BATCH] for i in range(0, len(val), 4 * BATCH)]
    return loop.validate(caches["validation"].narrowed(blocks), val_batches, lambda: False)


def contenders(parts: Any, L: int, given: argparse.Namespace) -> dict[str, list[int]]:
    """Return name -> blocks of 0 to L - 1. `parts` is the evidence that `auto` uses."""
    everything, draw = list(range(L)), random.Random(0)
    found: dict[str, list[int]] = {}
    for k in given.counts:
        found[f"auto:{k}"] = list(select(parts, everything, k, SAMPLES).blocks)
        found[f"first {k}"] = everything[:k]
        found[f"last:{k}"] = everything[-k:]
        found[f"evenly spaced {k}"] = sorted(everything[:: -(L // k)][:k])
        for number in range(given.random):
            found[f"random {k}, {number + 1}"] = sorted(draw.sample(everything, k))
    return {**found, "all": everything}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 6])
    parser.add_argument("--random", type=int, default=3, help="random sets for each count")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each set, whose mean is shown")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/block_choice.json"))
    given = parser.parse_args()
    base, console = open_checkpoint(given.checkpoint).resolve(), Console()
    tokenizer = Tokenizer(base)
    splits = PythonDocs(max_samples=given.samples).splits(tokenizer, resolve_prompt_style(None, base, tokenizer))
    console.say(splits.report)
    torch.manual_seed(SEED)
    model = method(base, "all", given.rank).build(base, torch.float32)
    parts = gather(model, draw(splits.train, SEED), BATCH, SEED, lambda done, total: None)
    sets, evidence = contenders(parts, model.config.n_layer, given), Evidence(parts)
    of_runs = {key: getattr(given, key) for key in ("samples", "epochs", "seeds", "rank", "lr")}
    facts = {"command": " ".join(["python", *sys.argv]), "machine": platform.platform(), "torch": torch.__version__, "settings": of_runs}
    found = json.loads(given.out.read_text()) if given.out.is_file() else {"settings": of_runs, "runs": {}}
    if found["settings"] != of_runs:
        raise SystemExit(f"{given.out} has runs with other settings ({found['settings']}): name another --out")
    kept = {name: run for name, run in found["runs"].items() if run["blocks"] == sets.get(name)}
    caches = cached(model, splits, console) if sets.keys() - kept.keys() else {}
    print("| blocks | | predicted | validation loss |\n|---|---|---|---|", flush=True)
    for name, blocks in sets.items():
        if name not in kept:
            losses = [tuned(base, blocks, given, splits, caches, SEED + number) for number in range(given.seeds)]
            kept[name] = {"blocks": blocks, "predicted": evidence.explained(blocks), "losses": losses}
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps({**facts, "date": time.strftime("%Y-%m-%d"), "runs": kept}, indent=2) + "\n")
        row = kept[name]
        loss = sum(row["losses"]) / len(row["losses"])
        print(f"| {name} | {ranges(tuple(blocks))} | {100 * row['predicted']:.2f} % | {loss:.4f} |", flush=True)


if __name__ == "__main__":
    main()
