"""Pretrain a small model with `litgpt pretrain`, and in a loop over transformers' model from the same weights; compare the losses.

    python -m benchmarks.pretraining TEXT_FOLDER [--steps 150] [--out out/pretraining]

Both start from one file of fresh weights and take the blocks in one order; AdamW, learning rate, clipping and accumulation are the same.
The text is a folder of .txt files, for example the documentation of installed packages; a byte-level BPE is trained on it first. Writes
benchmarks/results/pretrain.md.
"""

from __future__ import annotations

import argparse
import csv
import math
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer

from litgpt.data import TextFiles
from litgpt.prompts import PromptStyle
from litgpt.tokenizer import Tokenizer

SHAPE = {
    "name": "Llama-small",
    "block_size": 128,
    "n_layer": 3,
    "n_head": 4,
    "n_embd": 128,
    "intermediate_size": 384,
    "padded_vocab_size": 2048,
    "rotary_percentage": 1.0,
    "parallel_residual": "false",
    "bias": "false",
    "norm_class_name": "RMSNorm",
    "norm_eps": 1e-6,
    "mlp_class_name": "LLaMAMLP",
}
BATCH, MICRO, RATE, FLOOR, WARMUP, SEED = 8, 4, 2e-3, 4e-5, 10, 42
RESULT = Path(__file__).parent / "results" / "pretrain.md"


def make_tokenizer(text: Path, folder: Path) -> Path:
    """Train a byte-level BPE on the text and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    bpe = ByteLevelBPETokenizer()
    files = sorted(map(str, text.rglob("*.txt")))
    bpe.train(files, vocab_size=int(str(SHAPE["padded_vocab_size"])), special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return folder


def ours(text: Path, tokenizer: Path, out: Path, steps: int) -> tuple[list[float], list[float], float]:
    """Return training losses, validation losses before and after, and seconds in steps of `litgpt pretrain`."""
    options = {
        "tokenizer_dir": tokenizer,
        "data": text,
        "out_dir": out,
        "overwrite": "true",
        "precision": "32-true",
        "devices": 1,
        "train.global_batch_size": BATCH,
        "train.micro_batch_size": MICRO,
        "train.max_steps": steps,
        "train.lr_warmup_steps": WARMUP,
        "train.min_lr": FLOOR,
        "optimizer.lr": RATE,
        "eval.interval": steps,
        "eval.initial_validation": "true",
        **{f"model_config.{key}": value for key, value in SHAPE.items()},
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    subprocess.run([sys.executable, "-m", "litgpt", "pretrain", *words], check=True)
    with (out / "logs/version_0/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ([float(row[name]) for row in rows if row[name]] for name in ("train_loss", "val_loss", "step_time"))
    train, val, seconds = columns
    return train, val, sum(seconds)


def theirs(text: Path, out: Path, steps: int) -> tuple[list[float], list[float], float]:
    """Return the same of a plain loop over the model that `convert_from_litgpt` makes of the fresh weights."""
    from transformers import AutoModelForCausalLM

    hf = out / "hf"
    if not hf.is_dir():
        subprocess.run([sys.executable, "-m", "litgpt", "convert_from_litgpt", str(out / "initial"), str(hf)], check=True)
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    length = int(str(SHAPE["block_size"]))
    splits = TextFiles(train_data_path=text).splits(Tokenizer(out / "initial"), PromptStyle.from_name("default"), length)
    train, val = (torch.tensor([list(sample.input_ids) for sample in part]) for part in (splits.train, splits.val))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    @torch.no_grad()
    def validate() -> float:
        parts = val[: 100 * MICRO].split(MICRO)
        return sum(model(part, labels=part).loss.item() * len(part) for part in parts) / sum(map(len, parts))

    losses, vals, seconds, epoch = list[float](), [validate()], 0.0, 0
    while len(losses) < steps:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(SEED + 1_000_003 * epoch))
        for batch in order.split(BATCH)[: steps - len(losses)]:
            start, step = time.perf_counter(), len(losses)
            share = (step - WARMUP) / max(1, steps - WARMUP)
            rate = RATE * (step + 1) / WARMUP if step < WARMUP else FLOOR + (RATE - FLOOR) * 0.5 * (1 + math.cos(math.pi * share))
            optimizer.param_groups[0]["lr"] = rate
            total = 0.0
            for part in train[batch].split(MICRO):
                loss = model(part, labels=part).loss * len(part) / len(batch)
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds += time.perf_counter() - start
            losses.append(total)
        epoch += 1
    return losses, [*vals, validate()], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("out/pretraining"))
    given = parser.parse_args()
    tokenizer = make_tokenizer(given.text, given.out / "tokenizer")
    first = ours(given.text, tokenizer, given.out, given.steps)
    second = theirs(given.text, given.out, given.steps)
    marks = [step for step in (1, 10, 50, 100, given.steps) if step <= given.steps]
    lines = [
        "# A small model from scratch",
        "",
        f"`{SHAPE['name']}`, {SHAPE['n_layer']} blocks of {SHAPE['n_embd']}, fp32, {given.steps} steps of {BATCH} blocks of",
        f"{SHAPE['block_size']} tokens on {sum(file.stat().st_size for file in given.text.rglob('*.txt')):,} bytes of documentation.",
        f"{date.today()}, {torch.get_num_threads()} threads, torch {torch.__version__}; other work ran on the machine.",
        "",
        f"`python -m benchmarks.pretraining TEXT --steps {given.steps}`",
        "",
        "| | validation before | " + " | ".join(f"step {mark}" for mark in marks) + " | validation after | seconds in steps |",
        "|---|" + "---:|" * (len(marks) + 3),
    ]
    for name, (losses, vals, seconds) in (("litgpt pretrain", first), ("transformers, plain loop", second)):
        cells = [f"{vals[0]:.4f}", *(f"{losses[mark - 1]:.4f}" for mark in marks), f"{vals[-1]:.4f}", f"{seconds:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    largest = max(abs(a - b) for a, b in zip(first[0], second[0], strict=True))
    lines += ["", f"The training losses differ by at most {largest:.1e} in any step."]
    RESULT.write_text("\n".join(lines) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
