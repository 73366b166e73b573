"""Small fine-tuning jobs in processes of their own, and what must hold of their folders at every moment."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt import atomic
from litgpt.activations.store import ENTRY
from litgpt.train import out_dir as place

ROOT = Path(__file__).parents[2]
CURVE = ("step", "epoch", "train_loss", "val_loss", "val_ppl", "learning_rate")
SETTINGS: dict[str, Any] = {
    "precision": "32-true",
    "train.epochs": 2,
    "train.global_batch_size": 6,
    "train.micro_batch_size": 2,
    "train.lr_warmup_steps": 2,
    "train.save_interval": 2,
    "eval.interval": 2,
    "eval.max_new_tokens": 0,
    "eval.initial_validation": True,
    "optimizer.lr": 0.02,
}
SKIP: dict[str, Any] = {"skip2lora_enabled": True, "skip2lora_block_indices": "[0, 2]", "lora_r": 4, "lora_dropout": 0.2}
WARM: dict[str, Any] = {
    **SKIP,
    "lora_projection": True,
    "lora_mlp": True,
    "skip2lora_output_layer": "transformer.h.3",
    "skip2lora_warmup_steps": 2,
}


@dataclass
class Ended:
    """A command that has ended: its exit code, or the negative number of the signal that ended it."""

    status: int
    err: str
    events: int = 0


@dataclass
class Bench:
    """A base checkpoint and data to fine-tune it on."""

    base: Path
    data: Path

    def argv(self, out_dir: Path, command: str = "finetune_lora", **settings: Any) -> list[str]:
        words = [
            command,
            str(self.base),
            "--data",
            "JSON",
            "--data.json_path",
            str(self.data),
            "--out_dir",
            str(out_dir),
            "--data.val_split_fraction",
            "0.1",
        ]
        for key, value in {**SETTINGS, **{key.replace("__", "."): value for key, value in settings.items()}}.items():
            if value is not None:
                words += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
        return words


class Driver:
    """driver.py: runs commands in forks of a process that has imported everything."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "tests.helpers.driver"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        assert self._answer() == {"ready": True}

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def run(self, argv: list[str], *at: Any, number: int = signal.SIGKILL, limit: int | None = None, powerless: bool = False) -> Ended:
        """Run a command, with a signal at each of the events `at`, or without."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"argv": argv, "at": at, "signal": number, "limit": limit, "powerless": powerless}) + "\n")
        self.process.stdin.flush()
        return Ended(**self._answer())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def litgpt(argv: list[str], timeout: float = 300) -> Ended:
    """`python -m litgpt`, for real."""
    done = subprocess.run([sys.executable, "-m", "litgpt", *argv], capture_output=True, text=True, cwd=ROOT, env=environ(), timeout=timeout)
    return Ended(done.returncode, done.stderr)


def environ() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def curve(out_dir: Path) -> list[tuple[str, ...]]:
    """metrics.csv without what depends on the clock."""
    with (out_dir / "logs/version_0/metrics.csv").open(newline="") as file:
        return [tuple(row[name] for name in CURVE) for row in csv.DictReader(file)]


def results(out_dir: Path) -> dict[str, str]:
    """Digests of every file that must not depend on how often a run was stopped: weights, optimizer, random states."""
    endings = (".pth", ".lora", ".safetensors")
    files = [path for path in out_dir.rglob("*") if path.name.endswith(endings)]
    return {str(path.relative_to(out_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_same(out_dir: Path, reference: Path) -> None:
    """The run has the curve, the weights, the checkpoints and the report of the other one, bit for bit."""
    assert curve(out_dir) == curve(reference)
    assert results(out_dir) == results(reference)
    one, other = (json.loads((folder / "report.json").read_text()) for folder in (out_dir, reference))
    clock = {"train_seconds", "total_seconds", "tokens_per_second", "peak_memory_gb"}
    assert {key: value for key, value in one.items() if key not in clock} == {
        key: value for key, value in other.items() if key not in clock
    }
    assert (out_dir / "final/report.json").read_text() == (out_dir / "report.json").read_text()
    assert {path.name for path in out_dir.iterdir()} == {path.name for path in reference.iterdir()}


def assert_sound(out_dir: Path) -> None:
    """What holds at any moment, whenever the process was killed: every folder that has its name is whole, and metrics.csv is a table."""
    for folder in (*place.steps(out_dir), out_dir / "best", out_dir / "final"):
        if folder.exists():
            assert atomic.damages(folder, contents=True) == [], folder
    for folder in place.steps(out_dir):
        assert place.unusable(folder) == ""
    if (out_dir / "report.json").exists():
        assert (out_dir / "final").is_dir()
    metrics = out_dir / "logs/version_0/metrics.csv"
    if metrics.exists():
        steps = [int(row[0]) for row in curve(out_dir)]
        assert steps == sorted(set(steps))
    for index in out_dir.parent.glob("activation_cache/[!.]*/index.bin"):
        assert index.stat().st_size % ENTRY == 0
