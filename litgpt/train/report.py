"""What a run measured: the figures of report.json, and the same for the terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from litgpt.logs import peak_memory_gb
from litgpt.quantize import count
from litgpt.train.loop import Loop
from litgpt.train.resume import State

REPORT = "report.json"


def as_json(figures: dict[str, Any]) -> str:
    return json.dumps(figures, indent=2) + "\n"


def report(state: State, loop: Loop, device: torch.device) -> dict[str, Any]:
    """The figures of a run that has ended; seconds are those of all its sessions."""
    losses, best = state.losses, state.best
    return {
        "steps": state.step,
        "epochs": round(state.step / loop.batches.per_epoch, 4),
        "initial_val_loss": losses[0][1] if losses and losses[0][0] == 0 else None,
        "final_val_loss": losses[-1][1] if losses and losses[-1][0] == state.step else None,
        "best_val_loss": best[1] if best else None,
        "best_step": best[0] if best else None,
        "skipped_steps": state.skipped,
        "trainable_parameters": sum(p.numel() for p in loop.trained),
        "total_parameters": count(loop.model),
        "train_seconds": state.seconds,
        "total_seconds": state.clock.seconds,
        "tokens_per_second": state.tokens / state.seconds if state.seconds else 0.0,
        "peak_memory_gb": peak_memory_gb(device),
    }


def readable(figures: dict[str, Any], best: Path) -> dict[str, str]:
    """The lines of the summary. `best`: the folder of the checkpoint with the lowest validation loss, if it was kept."""

    def loss(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.4f} (perplexity {math.exp(min(value, 700)):.2f})"

    trained, total = figures["trainable_parameters"], figures["total_parameters"]
    lines = {
        "validation loss before": loss(figures["initial_val_loss"]),
        "validation loss after": loss(figures["final_val_loss"]),
        "trainable parameters": f"{trained:,} of {total:,} ({100 * trained / total:.3f} %)",
        "steps": f"{figures['steps']:,} ({figures['epochs']:g} epochs)",
        "time": f"{figures['total_seconds']:.1f} s, {figures['train_seconds']:.1f} s of it in training steps",
        "speed": f"{figures['tokens_per_second']:,.0f} tokens/s in training steps",
        "peak memory": f"{figures['peak_memory_gb']:.2f} GiB",
    }
    if figures["skipped_steps"]:
        lines["steps left out"] = f"{figures['skipped_steps']:,}, their loss or gradient was no number"
    if figures["best_step"] is not None and best.is_dir():
        lines["best checkpoint"] = f"{best}: step {figures['best_step']:,}, validation loss {figures['best_val_loss']:.4f}"
    return lines
