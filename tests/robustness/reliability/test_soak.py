"""Thousands of steps: memory, open files and threads do not grow."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.jobs import ROOT, SKIP, Bench, curve, environ

STEPS = 4000
SETTINGS = {
    **SKIP,
    "skip2lora_cache": "disk",
    "train.epochs": 100_000,
    "train.max_steps": STEPS,
    "train.save_interval": 50,
    "train.keep_last": 2,
    "eval.interval": 25,
    "eval.max_new_tokens": 4,
}


@pytest.mark.slow
def test_thousands_of_steps_take_no_more_memory_and_open_files_than_hundreds(bench: Bench, tmp_path: Path) -> None:
    """With checkpoints, validations and answers all along; measured from step 500 on."""
    out_dir = tmp_path / "out"
    command = [sys.executable, "-m", "litgpt", *bench.argv(out_dir, **SETTINGS)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environ())
    seen, watched = [], psutil.Process(process.pid)
    metrics = out_dir / "logs/version_0/metrics.csv"
    while process.poll() is None:
        if metrics.exists() and metrics.stat().st_size > 500 * 60:
            try:
                seen.append((watched.memory_info().rss / 2**20, watched.num_fds(), watched.num_threads()))
            except psutil.NoSuchProcess:
                break
        time.sleep(0.5)
    assert process.wait() == 0, process.stderr and process.stderr.read()
    assert len(curve(out_dir)) == STEPS + 1
    assert len(seen) > 20
    quarter = len(seen) // 4
    first, last = seen[:quarter], seen[-quarter:]
    before, after = ([sorted(values)[quarter // 2] for values in zip(*part, strict=True)] for part in (first, last))
    assert after[0] < before[0] + 16, f"{before[0]} MiB, then {after[0]}"
    assert after[1:] == before[1:], "open files and threads, most of the time: a checkpoint that is being saved has some open"
    assert sorted(path.name for path in out_dir.glob("step-*")) == [f"step-{STEPS - 50:06d}", f"step-{STEPS:06d}"]
