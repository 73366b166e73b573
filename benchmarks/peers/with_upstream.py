"""Upstream LitGPT's LoRA on the stored samples: with_upstream.py RUN.json, in upstream's own environment.

Its `finetune_lora` as it is, called directly, which spares it its command line's seconds. Left out as far as it allows: it validates on
one sample once, and a sample answer that would be longer than the longest sample is not generated.
"""

from __future__ import annotations

import csv
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stored import collate, read, write_steps
from torch.utils.data import DataLoader, Subset

from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.finetune import lora
from litgpt.prompts import Default

NEVER = 10**6


class StoredSamples(DataModule):
    """The samples of tokens.json, whatever the tokenizer."""

    def __init__(self, tokens: str, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.prompt_style: Any = Default()
        self.train_dataset, self.test_dataset, self.order = read(tokens)

    def connect(self, *args: Any, **kwargs: Any) -> None:
        pass

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, self.batch, sampler=self.order, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Subset(self.test_dataset, [0]), 1, collate_fn=self.collate)

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        lengths = torch.tensor([[len(sample["input_ids"])] for sample in samples])
        return {**collate(samples), "token_counts": {"raw": lengths, "raw_plus_prompt_template": lengths}}


def main(run: dict[str, Any]) -> None:
    out, lora_settings = Path(run["out_dir"]), {"lora_r": run["r"], "lora_alpha": run["alpha"], "lora_dropout": run["dropout"]}
    words = [word for key, value in {**lora_settings, "precision": run["precision"]}.items() for word in (f"--{key}", str(value))]
    sys.argv = ["litgpt", "finetune_lora", run["checkpoint"], *words]  # it stores its command line with each checkpoint
    lora.setup(
        Path(run["checkpoint"]),
        out,
        run["precision"],
        **lora_settings,
        data=StoredSamples(run["tokens"], run["batch"]),
        train=TrainArgs(
            save_interval=run["save_interval"],
            global_batch_size=run["batch"],
            micro_batch_size=run["batch"],
            lr_warmup_steps=run["warmup"],
            epochs=run["epochs"],
        ),
        eval=EvalArgs(interval=NEVER, max_new_tokens=NEVER, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": run["rate"], "weight_decay": run["weight_decay"], "fused": True}},
        seed=run["seed"],
    )
    with next((out / "logs").rglob("metrics.csv")).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["iter_time"]]
    versions = {name: version(name) for name in ("litgpt", "torch", "lightning")}
    write_steps(run["steps"], [float(row["iter_time"]) for row in rows], [float(row["loss"]) for row in rows], versions)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
