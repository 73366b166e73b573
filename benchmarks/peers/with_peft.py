"""PEFT's LoRA and transformers' Trainer on the stored samples: with_peft.py RUN.json.

The Trainer without what the other peers do not do either: clipping, validation, logging, optimizer states beside the adapters.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from stored import Orders, collate, read, write_steps
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


class Clock(TrainerCallback):
    """What each step took: forward, backward and update, without fetching the batch, which takes a fraction of a millisecond."""

    def __init__(self) -> None:
        self.began, self.seconds = 0.0, list[float]()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


class OrderedTrainer(Trainer):
    """A Trainer that takes the samples in the given order and notes each step's loss."""

    order: Orders
    losses: list[torch.Tensor]

    def _get_train_sampler(self, train_dataset: Any = None) -> Orders:
        return self.order

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss)
        return loss


def arguments_of(run: dict[str, Any], **more: Any) -> TrainingArguments:
    """Return the Trainer's settings for a run: a cosine schedule, AdamW, nothing logged."""
    return TrainingArguments(
        output_dir=run["out_dir"],
        per_device_train_batch_size=run["batch"],
        num_train_epochs=run["epochs"],
        learning_rate=run["rate"],
        lr_scheduler_type="cosine",
        warmup_steps=run["warmup"],
        weight_decay=run["weight_decay"],
        optim="adamw_torch_fused",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        seed=run["seed"],
        **more,
    )


def main(run: dict[str, Any]) -> None:
    set_seed(run["seed"])
    train, _, order = read(run["tokens"])
    model = AutoModelForCausalLM.from_pretrained(run["checkpoint"], dtype=DTYPES[run["precision"]])
    layers: Any = {"qv": ["q_proj", "v_proj"], "all": "all-linear"}[run["layers"]]
    settings = LoraConfig(r=run["r"], lora_alpha=run["alpha"], lora_dropout=run["dropout"], target_modules=layers, task_type="CAUSAL_LM")
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": run["save_interval"], "save_only_model": True}
    arguments = arguments_of(run, max_grad_norm=0, **saving)
    clock = Clock()
    trainer = OrderedTrainer(get_peft_model(model, settings), arguments, collate, train, callbacks=[clock])
    trainer.order, trainer.losses = order, []
    trainer.train()
    versions = {name: version(name) for name in ("peft", "transformers", "accelerate", "torch")}
    write_steps(run["steps"], clock.seconds, [loss.item() for loss in trainer.losses], versions)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
