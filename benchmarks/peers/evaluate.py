"""Validation losses of all peers' adapters by one evaluator: this project's model, on the stored tokens."""

from __future__ import annotations

import io
import json
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.peers.job import Job

BATCH = 16


def losses(job: Job, tokens: Path, folders: list[str]) -> list[float]:
    """Return the mean loss per answer token of each folder: the base model, or one of its adapters by upstream, PEFT or us."""
    content = json.loads(tokens.read_text())
    return [loss(Path(job.checkpoint), Path(folder), job.precision, content["val"]) for folder in folders]


def loss(base: Path, folder: Path, precision: str, samples: list[dict[str, list[int]]]) -> float:
    """Return the mean loss per answer token of one folder."""
    import torch
    import torch.nn.functional as F

    model = load(base, folder, precision)
    longest_first = sorted(samples, key=lambda sample: -len(sample["input_ids"]))
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(samples), BATCH):
            part = longest_first[start : start + BATCH]
            ids, mask = (
                torch.nn.utils.rnn.pad_sequence([torch.tensor(sample[key]) for sample in part], batch_first=True)
                for key in ("input_ids", "loss_mask")
            )  # (B, T)
            at = mask[:, 1:].bool()
            logits = model(ids[:, :-1])[at].float()  # (N, V)
            total += F.cross_entropy(logits, ids[:, 1:][at], reduction="sum").item()
            count += len(logits)
    return total / count


def load(base: Path, folder: Path, precision: str) -> Any:
    """Return the model with the folder's adapter; PEFT's is converted by `litgpt convert_adapter`."""
    from litgpt.checkpoint import load_model
    from litgpt.convert.adapter import PEFT, convert_adapter
    from litgpt.device import backbone_dtype

    dtype = backbone_dtype(precision)
    if not (folder / PEFT).is_file():
        return load_model(folder, dtype, base=base)
    with tempfile.TemporaryDirectory() as converted:
        target = Path(converted) / "adapter"
        with redirect_stdout(io.StringIO()):
            convert_adapter(folder, target, base)
        return load_model(target, dtype, base=base)
