"""Run one peer in a separate process: its time, memory and checkpoints."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import upstream_venv, who
from benchmarks.peers.job import Job
from benchmarks.peers.who import Peer
from benchmarks.process import ROOT
from benchmarks.runs import read_json
from litgpt.errors import UserError
from litgpt.logs import read_metrics

LOOK = 0.05  # seconds between two readings of a process's memory
ADAPTERS = ("lit_model.pth.lora", "adapter_model.safetensors")
RESIDENT_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class Process:
    """A process that has ended."""

    code: int
    began: float  # by time.time(), like files' dates
    seconds: float
    peak_gb: float  # peak of resident memory with pages of mapped files, GiB
    own_gb: float | None  # the same without such pages, which the system can reclaim; None without Linux's /proc


def run(words: list[str], log: Path, environment: dict[str, str]) -> Process:
    """Run the words to their end, with their output in `log`. An interrupt ends them too."""
    own: float | None = None
    with log.open("wb") as said:
        began = time.time()
        child = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT, env=environment)
        try:
            while not (ended := os.wait4(child.pid, os.WNOHANG))[0]:
                own = max(filter(None, (own, anonymous(child.pid))), default=None)
                time.sleep(LOOK)
        except BaseException:
            child.kill()
            child.wait()
            raise
        seconds = time.time() - began
    child.returncode = os.waitstatus_to_exitcode(ended[1])
    return Process(child.returncode, began, seconds, ended[2].ru_maxrss * RESIDENT_UNIT / 2**30, own)


def anonymous(pid: int) -> float | None:
    """Return RssAnon of a process in GiB; None without Linux's /proc."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) / 2**20 if found else None


def measure(peer: Peer, job: Job, out: Path, measured_epochs: int | None) -> dict[str, Any]:
    """Do the job once and return the peer's record, without losses. Raise UserError if it fails."""
    folder = out / "runs" / peer.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if peer.kind == "upstream":
        upstream_venv.make(out)
        upstream_venv.convert(out, out / "hf" / Path(job.checkpoint).name)
    epochs = min(measured_epochs or job.epochs, job.epochs) if peer.slow else job.epochs
    words = who.command(peer, job, out, folder, epochs)
    process = run(words, folder / "log.txt", surroundings(peer))
    shutil.rmtree(folder / "cache", ignore_errors=True)
    if process.code:
        raise UserError(f"exit code {process.code}: {last_words(folder / 'log.txt')} (its output: {folder / 'log.txt'})")
    seconds, losses, versions = steps(peer, folder)
    return {"command": words, "versions": versions, **figures(peer, job, process, seconds), "first_loss": losses[0]} | {
        "checkpoints": checkpoints(folder / "run", process.began, seconds)
    }


def surroundings(peer: Peer) -> dict[str, str]:
    """Return environment variables: this project is on the path of its own peers only, and no hub is contacted."""
    found = {**os.environ, "HF_HUB_OFFLINE": "1"}
    found.pop("PYTHONPATH", None)
    return found | ({"PYTHONPATH": str(ROOT)} if peer.kind == "litgpt" else {})


def last_words(log: Path) -> str:
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if line.strip()]
    return lines[-1] if lines else "no output"


def steps(peer: Peer, folder: Path) -> tuple[list[float], list[float], dict[str, str]]:
    """Return seconds and loss of each optimizer step, and package versions. Raise UserError if there was no step."""
    if peer.kind == "litgpt":
        metrics = read_metrics(folder / "run")
        seconds, losses = ([value for _, value in metrics.get(key, [])] for key in ("step_time", "train_loss"))
        versions: dict[str, str] = {}
    else:
        content = read_json(folder / "steps.json", "the peer's driver writes it")
        seconds, losses, versions = content["seconds"], content["losses"], content["versions"]
    if not seconds or len(seconds) != len(losses):
        raise UserError(f"{folder} has the time of {len(seconds)} steps and the loss of {len(losses)}")
    return seconds, losses, versions


def figures(peer: Peer, job: Job, process: Process, seconds: list[float]) -> dict[str, Any]:
    """Return the figures that follow from the durations of a run and its steps, in seconds and GiB; tokens without padding."""
    size = job.steps_per_epoch
    epoch_seconds = [sum(seconds[i : i + size]) for i in range(0, len(seconds) - size + 1, size)]
    training = sum(seconds)
    done = len(seconds) / size
    epochs = done if peer.own_schedule else job.epochs
    return {
        "epochs": epochs,
        "measured_epochs": done,
        "wall_seconds": process.seconds,
        "total_seconds": extrapolate(process.seconds, training, done, epochs),
        "training_seconds": training,
        "epoch_seconds": epoch_seconds,
        "median_epoch_seconds": statistics.median(epoch_seconds) if epoch_seconds else None,
        "steps": len(seconds),
        "steps_per_second": len(seconds) / training,
        "tokens_per_second": done * job.tokens / training,
        "peak_memory_gb": process.peak_gb,
        "own_memory_gb": process.own_gb,
    }


def extrapolate(wall: float, training: float, done: float, epochs: float) -> float:
    """Return the seconds of a run of `epochs`, of which `done` took `training` of the `wall` seconds; the rest is spent once."""
    return wall - training + training * epochs / done


def checkpoints(folder: Path, began: float, seconds: list[float]) -> list[dict[str, Any]]:
    """Return the adapters that a run left, in the order of their steps, with the times at which they were written.

    The final folder counts if no other has the last step. Raise UserError without any.
    """
    files = {file.parent.name: file for name in ADAPTERS for file in folder.glob(f"*/{name}")}
    found = {len(seconds): files["final"]} if "final" in files else {}
    found |= {int(match[1]): file for name, file in files.items() if (match := re.fullmatch(r"(?:step|checkpoint)-(\d+)", name))}
    if not found:
        raise UserError(f"{folder} has no checkpoint")
    return [
        {
            "step": step,
            "wall_seconds": file.stat().st_mtime - began,
            "training_seconds": sum(seconds[:step]),
            "folder": str(file.parent),
        }
        for step, file in sorted(found.items())
    ]
