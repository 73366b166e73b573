"""Do the same fine-tuning job by several packages, each in a separate process: upstream LitGPT, PEFT, and this project's methods.

    python -m benchmarks.peers --epochs 10 --measured_epochs 2 [--preset NAME=FILE.yaml] [--peers upstream peft_all skip2lora]

All read the same tokens and loss masks in the same order, in batches of 8, with the same precision, AdamW and schedule; each saves its
adapter after every epoch, and one evaluator computes the validation losses of these afterwards, outside the measured time. A preset is a
YAML file of `litgpt finetune`, options may follow it; data, batch and precision are the job's, epochs and learning rate its own.

OUT/peers.json keeps the measurements; the same command again does what is missing or has failed. OUT/peers.md has the tables,
OUT/loss_over_time.png the curves, OUT/runs/NAME/log.txt a peer's output. Upstream LitGPT is installed into OUT/upstream-venv. This needs
`pip install peft transformers`, and matplotlib for the picture.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.peers import evaluate, report
from benchmarks.peers.job import Job, prepare, require_same
from benchmarks.peers.measure import measure
from benchmarks.peers.who import PEERS, Peer, choose
from benchmarks.process import ROOT
from benchmarks.report import Sections
from benchmarks.runs import read_json
from litgpt.atomic import write_text
from litgpt.errors import UserError

CHECKPOINT = ROOT / "checkpoints" / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
OUT = ROOT / "out" / "benchmarks" / "peers"


def arguments() -> argparse.ArgumentParser:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=CHECKPOINT, help="the base model (default: SmolLM2-135M-Instruct, see make demo)"
    )
    parser.add_argument("--peers", nargs="*", help=f"of {' '.join(peer.name for peer in PEERS)} (default: all)")
    parser.add_argument("--preset", action="append", default=[], help="NAME=FILE.yaml, more options may follow in quotes; may be repeated")
    parser.add_argument("--samples", type=positive, default=1000, help="training samples (default: 1000); a tenth more are for validation")
    parser.add_argument("--epochs", type=positive, default=10, help="(default: 10)")
    parser.add_argument("--measured_epochs", type=positive, help="run so many epochs of what has no cache, and extrapolate the time")
    parser.add_argument("--precision", help="bf16-true or 32-true (default: bf16-true where the machine computes it natively)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for everything (default: out/benchmarks/peers)")
    parser.add_argument("--again", action="store_true", help="measure the named peers anew, and start anew if the job is another one")
    return parser


def apart(function: Callable[..., Any], *given: Any) -> Any:
    """Return the function's result from a separate process. This process stays small, as a child's peak memory begins with its parent's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *given).result()
        except BrokenProcessPool:
            raise UserError(f"{function.__name__} was killed: is memory short?") from None


def restore(file: Path, job: Job, environment: dict[str, Any], anew: list[str] | None) -> dict[str, Any]:
    """Return the results so far, without failures.

    `anew`: names to measure again, which also allows another job to start; None for none. Raise UserError if the file has results of
    another job or other content.
    """
    fresh = {"format": 1, "job": asdict(job), "environment": environment, "base_loss": None, "records": {}}
    if not file.is_file():
        return fresh
    content = read_json(file, "python -m benchmarks.peers writes it")
    if anew is not None and content.get("job") != asdict(job):
        return fresh
    require_same(job, content.get("job", {}), file)
    kept = {name: record for name, record in content["records"].items() if record["status"] == "completed" and name not in (anew or ())}
    return {**content, "records": kept}


def do(peer: Peer, job: Job, out: Path, measured_epochs: int | None, content: dict[str, Any]) -> None:
    """Measure and evaluate the peer, or what is missing of it, into `content`, which also records failures."""
    record = content["records"].get(peer.name, {})
    if record.get("status") != "completed":
        record = {"status": "failed", "error": None, "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        content["records"][peer.name] = record
        record |= measure(peer, job, out, measured_epochs)
        record["status"] = "completed"
    points = record["checkpoints"]
    folders = [job.checkpoint] * (content["base_loss"] is None) + [point["folder"] for point in points]
    losses = apart(evaluate.losses, job, out / "data" / "tokens.json", folders)
    if content["base_loss"] is None:
        content["base_loss"] = losses.pop(0)
    shown = ("step", "wall_seconds", "training_seconds")
    record["curve"] = [
        {**{key: point[key] for key in shown}, "epoch": point["step"] / job.steps_per_epoch, "val_loss": loss}
        for point, loss in zip(points, losses, strict=True)
    ]
    record["error"] = None


def attempt(peer: Peer, job: Job, out: Path, measured_epochs: int | None, content: dict[str, Any]) -> None:
    """Call `do`; a failure does not end the others."""
    began = time.monotonic()
    print(f"{peer.name} ...", flush=True)
    try:
        do(peer, job, out, measured_epochs, content)
    except Exception as error:
        content["records"][peer.name]["error"] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    record = content["records"][peer.name]
    if record["error"]:
        print(f"  {record['error']}", flush=True)
    else:
        last = record["curve"][-1]
        told = f"{record['wall_seconds']:,.1f} s, {record['steps_per_second']:,.3f} steps/s, {record['peak_memory_gb']:.2f} GiB"
        print(f"  {told}, validation loss {last['val_loss']:.4f} ({time.monotonic() - began:,.0f} s with evaluating)", flush=True)


def save(content: dict[str, Any], out: Path) -> Sections:
    """Write results, tables and picture, the peers in their usual order. Return the tables."""
    order = [peer.name for peer in PEERS]
    content["records"] = dict(sorted(content["records"].items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
    write_text(out / "peers.json", json.dumps(content, indent=1) + "\n")
    parts = report.sections(content, report.draw(content, out / "loss_over_time.png"))
    write_text(out / "peers.md", report.as_document(parts))
    return parts


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    out = args.out.resolve()
    try:
        peers = choose(args.peers, args.preset)
        out.mkdir(parents=True, exist_ok=True)
        job, environment = apart(prepare, args.checkpoint, out, args.samples, args.epochs, args.precision)
        content = restore(out / "peers.json", job, environment, [peer.name for peer in peers] if args.again else None)
        for peer in peers:
            record = content["records"].get(peer.name, {})
            if record.get("curve"):
                print(f"{peer.name} is kept as measured on {record['date']}: --again measures it anew")
            else:
                attempt(peer, job, out, args.measured_epochs, content)
            parts = save(content, out)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Interrupted. {out / 'peers.json'} has the results so far; the same command resumes.", file=sys.stderr)
        return 130
    print(f"{report.as_text(parts)}\n\nwrote peers.json, peers.md and loss_over_time.png in {out}")
    return int(any(content["records"][peer.name]["error"] for peer in peers))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the peer at work ends too
    sys.exit(main())
