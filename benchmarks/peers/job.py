"""The job that all peers do: its settings, and the files that every one of them reads."""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from litgpt.atomic import write_text
from litgpt.errors import UserError

BATCH = 8
SEED = 1337
LORA_R, LORA_ALPHA, LORA_DROPOUT = 8, 16, 0.05
# Steps in which the learning rate rises, if the run is long enough. Then half a cosine to 0, the one schedule that all peers have.
WARMUP = 20


@dataclass(frozen=True)
class Job:
    """What must be the same for two measurements to be comparable."""

    machine: str
    checkpoint: str  # the base model's folder
    precision: str
    samples: int
    val_samples: int
    epochs: int
    tokens: int  # of the training samples, without padding
    digest: str  # of all token ids and loss masks

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.samples / BATCH)

    def warmup(self, epochs: int) -> int:
        return min(WARMUP, max(1, epochs * self.steps_per_epoch // 5))


def validation_samples(samples: int) -> int:
    """Return a tenth, and at least 8."""
    return max(8, samples // 10)


def prepare(checkpoint: Path, out: Path, samples: int, epochs: int, precision: str | None) -> tuple[Job, dict[str, Any]]:
    """Write the peers' input below `out` and return the job and `benchmarks.runs.environment`.

    data/train.json, data/val.json   records, which `litgpt finetune` reads
    data/tokens.json                 the same as token ids and loss masks, and the order of the samples in each epoch
    hf/NAME                          the base model for transformers

    Raise UserError for an unusable checkpoint, precision or number of samples.
    """
    if samples < 2 * BATCH:
        raise UserError(f"--samples {samples}: a schedule needs two batches of {BATCH}, {2 * BATCH} samples, at least")
    from benchmarks.runs import environment
    from litgpt.convert.resolve import open_checkpoint
    from litgpt.device import backbone_dtype, default_device, default_precision

    base = open_checkpoint(checkpoint).resolve()
    precision = precision or default_precision(default_device())
    backbone_dtype(precision)
    val_samples = validation_samples(samples)
    if counts(out / "data") != (samples, val_samples):
        write_records(out / "data", samples, val_samples)
    train, val = encode(base, out / "data", samples, val_samples)
    content = {"train": train, "val": val, "orders": orders(train, epochs)}
    write_text(out / "data" / "tokens.json", json.dumps(content))
    hugging_face(base, out)
    digest = hashlib.sha256(json.dumps([train, val]).encode()).hexdigest()
    tokens = sum(len(sample["input_ids"]) for sample in train)
    found = environment()
    return Job(f"{found['processor']}, {found['cores']} cores", str(base), precision, samples, val_samples, epochs, tokens, digest), found


def counts(folder: Path) -> tuple[int, int]:
    """Return the number of records for training and for validation."""
    files = [folder / f"{name}.json" for name in ("train", "val")]
    train, val = (len(json.loads(file.read_text())) if file.is_file() else 0 for file in files)
    return train, val


def write_records(folder: Path, samples: int, val_samples: int) -> None:
    """Write docstrings of this Python's packages as questions and answers."""
    from litgpt.data import PythonDocs

    records, _ = PythonDocs(max_samples=samples + val_samples).records()
    if len(records) < samples + val_samples:
        raise UserError(f"--samples {samples}: there are only {len(records):,} records, {val_samples} of them are for validation")
    random.Random(SEED).shuffle(records)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("val", records[samples:]), ("train", records[:samples])):
        write_text(folder / f"{name}.json", json.dumps(part, indent=1) + "\n")


def encode(base: Path, folder: Path, samples: int, val_samples: int) -> list[list[dict[str, list[int]]]]:
    """Return the samples as `litgpt finetune` reads them from the same files: ids, and 1 where a token carries loss."""
    from litgpt.data import JSON
    from litgpt.prompts import resolve_prompt_style
    from litgpt.tokenizer import Tokenizer

    tokenizer = Tokenizer(base)
    splits = JSON(json_path=folder, mask_prompt=True).splits(tokenizer, resolve_prompt_style(None, base, tokenizer))
    if (len(splits.train), len(splits.val)) != (samples, val_samples):
        raise UserError(f"{folder} gives {splits.report}, not the {samples:,} and {val_samples:,} asked for: name another --out")
    return [[{"input_ids": list(s.input_ids), "loss_mask": list(s.loss_mask)} for s in part] for part in (splits.train, splits.val)]


def orders(train: list[dict[str, list[int]]], epochs: int) -> list[list[int]]:
    """Return the order in which `litgpt finetune` goes through the samples in each epoch; the other peers follow it."""
    from array import array

    from litgpt.sample import Sample
    from litgpt.train.loop import Batches
    from litgpt.train.parallel import Rank

    samples = [Sample(array("i", sample["input_ids"]), bytearray(sample["loss_mask"])) for sample in train]
    batches = Batches(samples, BATCH, Rank(), SEED)
    return [[row for rows, *_ in batches.epoch(epoch) for row in rows] for epoch in range(epochs)]


def hugging_face(base: Path, out: Path) -> Path:
    """Return the base model as a Hugging Face folder, converted once."""
    from litgpt.convert.from_litgpt import convert_from_litgpt

    folder = out / "hf" / base.name
    if not (folder / "config.json").is_file():
        convert_from_litgpt(base, folder)
    return folder


def require_same(job: Job, stored: dict[str, Any], file: Path) -> None:
    """Raise UserError unless the results in `file` are of this job."""
    now = asdict(job)
    changed = [f"{key} was {stored.get(key)!r} and is {value!r}" for key, value in now.items() if stored.get(key) != value]
    if changed:
        raise UserError(f"{file} has results of another job ({'; '.join(changed)}): name another --out, or drop them with --again")
