"""Fine-tuning commands run in this process on a tiny checkpoint, and what the tests read of the folders that they leave."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from litgpt.__main__ import main
from litgpt.data import JSON
from litgpt.prompts import resolve_prompt_style
from litgpt.sample import Sample
from litgpt.tokenizer import Tokenizer
from tests.helpers import jobs

COLUMNS = ["step", "epoch", "train_loss", "val_loss", "val_ppl", "learning_rate", "step_time", "tokens_per_second", "peak_memory_gb"]
SETTINGS = {**jobs.SETTINGS, "eval.interval": 4, "eval.max_new_tokens": 1}
"""18 training samples: 3 steps an epoch, 6 in all."""
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
CHECKPOINT_FILES = {"model_config.yaml", "hyperparameters.yaml", "manifest.json"} | TOKENIZER_FILES
TRAINING_STATE = {"training_state.json", "training_state.safetensors"}


def run_files(weights: str) -> set[str]:
    """The files of a run of `SETTINGS`, TensorBoard's events and merged weights excepted."""
    steps = ("step-000002", "step-000004", "step-000006")
    own = {weights, "base.json"} if weights.endswith(".lora") else {weights}
    expected = {f"{folder}/{name}" for folder in (*steps, "best", "final") for name in CHECKPOINT_FILES | own}
    expected.add("final/identity.json")
    expected |= {f"{folder}/{name}" for folder in steps for name in TRAINING_STATE}
    return expected | {"best/report.json", "final/report.json", "report.json", "report.html", "logs/version_0/metrics.csv"}


@dataclass
class Run:
    """A command that has ended."""

    code: int
    err: str
    out_dir: Path

    @property
    def final(self) -> Path:
        return self.out_dir / "final"

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.out_dir / "report.json").read_text())

    def rows(self) -> list[dict[str, str]]:
        """metrics.csv"""
        with (self.out_dir / "logs/version_0/metrics.csv").open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
        assert reader.fieldnames == COLUMNS
        return rows

    def column(self, name: str) -> list[float]:
        return [float(row[name]) for row in self.rows() if row[name]]


PLAIN = Path(__file__).with_name("plain.yaml")  # with a config file no setting is chosen from the data


def finetune(command: str, base: Path | None, data: Path | None, out_dir: Path, *words: str, **settings: Any) -> Run:
    """`litgpt COMMAND base --data JSON ... --key value`; a dot in a key is written `__`, None leaves a default away."""
    options: dict[str, Any] = {**SETTINGS, **{key.replace("__", "."): value for key, value in settings.items()}}
    argv = [command, *([str(PLAIN)] if command == "sweep" else []), *([str(base)] if base else [])]
    argv += ["--data", "JSON", "--data.json_path", str(data)] if data else []
    argv += ["--data.val_split_fraction", "0.1"] if data and data.is_file() and "data__val_split_fraction" not in settings else []
    argv += ["--out_dir", str(out_dir)]
    for key, value in options.items():
        if value is not None:
            argv += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    return call(argv + list(words), out_dir)


def call(argv: list[str], out_dir: Path) -> Run:
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main(argv)
    return Run(code, err.getvalue(), out_dir)


def greedy_words(folder: Path, prompt: str, new: int) -> list[str]:
    """The command that answers with the most probable tokens."""
    return ["generate", str(folder), "--prompt", prompt, *f"--max_new_tokens {new} --temperature 0 --precision 32-true".split()]


def in_two_processes(one: Path, out_dir: Path) -> Run:
    """The run that left the folder `one`, anew in `out_dir` by two processes."""
    argv = ["finetune_lora", "--config", str(one / "final/hyperparameters.yaml"), "--out_dir", str(out_dir), "--devices", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "litgpt", *argv], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return Run(0, done.stderr, out_dir)


def write_data(file: Path, count: int = 20) -> Path:
    """Records of different lengths; 2 of the 20 are held out for validation."""
    answers = [f"{2 * i + 1} is the sum" + " of the two" * (i % 4) for i in range(count)]
    file.write_text(
        json.dumps([{"instruction": f"add {i} and {i + 1}", "input": "", "output": answer} for i, answer in enumerate(answers)])
    )
    return file


def files(folder: Path) -> dict[str, str]:
    """Every file below a folder, and its digest."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def val_samples(base: Path, data: Path) -> list[Sample]:
    tokenizer = Tokenizer(base)
    return JSON(json_path=data, val_split_fraction=0.1).splits(tokenizer, resolve_prompt_style(None, base, tokenizer), 256).val


@torch.no_grad()
def plain_loss(model: Any, samples: list[Sample]) -> float:
    """Mean cross-entropy over the loss tokens, each sample alone through the whole model."""
    total, count = 0.0, 0
    for sample in samples:
        ids, mask = torch.tensor(sample.input_ids), torch.tensor(list(sample.loss_mask), dtype=torch.bool)
        losses = F.cross_entropy(model(ids[None, :-1])[0].float(), ids[1:].long(), reduction="none")
        total += losses[mask[1:]].double().sum().item()
        count += int(mask.sum())
    return total / count


def load(file: Path) -> Any:
    return torch.load(file, weights_only=True)
