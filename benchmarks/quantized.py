"""Compare quantised frozen weights with bf16: memory, speed and validation loss.

    python -m benchmarks.quantized CHECKPOINT [--modes int8 bnb.nf4 ...] [--samples 300] [--epochs 4]

Weights are everything that the model keeps, the embedding and the head in bf16. Each mode is timed in a separate process, alternating
with a bf16 model: a frozen forward pass and a LoRA step over 8 x 128 tokens, and an answer token by token. The losses are those of a
Skip2-LoRA run on the docstrings of PythonDocs, before and after. Without bitsandbytes its modes are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.process import ROOT

MODES = ("bf16", "int8", "bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq")
BATCH, LENGTH, ANSWER = 8, 128, 32
LORA: dict[str, Any] = {"lora_r": 8, "lora_query": True, "lora_value": True}


def measure(folder: Path, mode: str, rounds: int) -> dict[str, float]:
    """Return bytes, and ratios of times to bf16's."""
    import torch

    from litgpt.data import JSON
    from litgpt.finetune.lora import Lora
    from litgpt.loss import HeadLoss
    from litgpt.packed import pack
    from litgpt.train.methods import adapters

    def build(quantize: Any = None) -> Any:
        return adapters(Lora(checkpoint_dir=folder, data=JSON(), quantize=quantize, **LORA)).build(folder, torch.bfloat16)

    model, reference = build(None if mode == "bf16" else mode), build()
    ids = torch.randint(0, model.config.vocab_size, (BATCH, LENGTH))
    storages = {value.untyped_storage().data_ptr(): value.nbytes for value in (*model.parameters(), *model.buffers())}
    found = {"weights_mb": sum(storages.values()) / 1e6}
    for one in (model, reference):
        pack(one, backward=True)
    loss = HeadLoss(model.lm_head)

    def forward(one: Any) -> None:
        with torch.no_grad():
            one.tail(*one.prefix(ids))

    def step(one: Any) -> None:
        hidden = one.tail(*one.prefix(ids)).flatten(0, 1)
        (loss(hidden, ids.flatten()) / ids.numel()).backward()
        one.zero_grad()

    def answer(one: Any) -> None:
        from litgpt.generate.engine import Session
        from litgpt.generate.sampling import Sampling

        list(Session(one).answer(ids[0, :16].tolist(), ANSWER, Sampling(temperature=0.0)))

    for name, work in (("forward", forward), ("step", step), ("answer", answer)):
        found[f"{name}_ms"], found[f"{name}_ratio"] = in_turns(work, model, reference, rounds)
    return found


def in_turns(work: Callable[[Any], None], model: Any, reference: Any, rounds: int) -> tuple[float, float]:
    """Return the median time in ms for `model`, and its ratio to that for `reference`."""
    times: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        for one, into in zip((model, reference), times, strict=True):
            start = time.perf_counter()
            work(one)
            if turn:
                into.append(time.perf_counter() - start)
    own, other = map(statistics.median, times)
    return own * 1e3, own / other


def tune(folder: Path, mode: str, samples: int, epochs: int) -> dict[str, float]:
    """Return validation losses before and after a Skip2-LoRA run, and its seconds."""
    with tempfile.TemporaryDirectory() as out:
        words = [
            str(folder),
            "--out_dir",
            f"{out}/run",
            "--data",
            "PythonDocs",
            "--data.max_samples",
            str(samples),
            "--epochs",
            str(epochs),
        ]
        words += ["--skip2lora_enabled", "true", "--skip2lora_block_indices", "all", "--lora_alpha", "8", "--optimizer.lr", "2e-3"]
        words += ["--train.global_batch_size", "8", "--train.micro_batch_size", "8", "--train.lr_warmup_steps", "10"]
        words += ["--train.max_seq_length", "192", "--eval.initial_validation", "true", "--eval.max_new_tokens", "0"]
        words += ["--precision", "bf16-true", *(["--quantize", mode] if mode != "bf16" else [])]
        done = subprocess.run([sys.executable, "-m", "litgpt", "finetune_lora", *words], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        report = json.loads(Path(out, "run", "report.json").read_text())
    return {"loss_before": report["initial_val_loss"], "loss_after": report["final_val_loss"], "run_s": report["total_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    from litgpt.convert.resolve import open_checkpoint
    from litgpt.errors import UserError
    from litgpt.quantize import FOUR_BITS, bitsandbytes

    folder = open_checkpoint(given.checkpoint).resolve()
    if given.child:
        print(json.dumps(measure(folder, given.child, given.rounds)))
        return
    modes = given.modes
    try:
        bitsandbytes()
    except UserError as error:
        modes = [mode for mode in modes if mode not in FOUR_BITS]
        print(f"left out: {', '.join(FOUR_BITS)} ({error})", file=sys.stderr)
    columns = ["mode", "weights", "forward, ms", "to bf16", "LoRA step, ms", "to bf16", "ms a token", "to bf16", "loss", "tuned"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for mode in modes:
        command = [sys.executable, "-m", "benchmarks.quantized", str(folder), "--child", mode, "--rounds", str(given.rounds)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        row = {**json.loads(done.stdout.splitlines()[-1]), **tune(folder, mode, given.samples, given.epochs)}
        print(
            f"| {mode} | {row['weights_mb']:.0f} MB | {row['forward_ms']:.0f} | {row['forward_ratio']:.2f} "
            f"| {row['step_ms']:.0f} | {row['step_ratio']:.2f} | {row['answer_ms'] / ANSWER:.1f} | {row['answer_ratio']:.2f} "
            f"| {row['loss_before']:.3f} | {row['loss_after']:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
