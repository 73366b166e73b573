"""A short run of TRL's DPOTrainer, where TRL is installed, has the losses of ours: same model, pairs, order and optimizer."""

from __future__ import annotations

import copy
import itertools
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from litgpt.objectives.named import objective_of
from litgpt.objectives.settings import ObjectiveSettings
from litgpt.sample import Sample
from litgpt.train.resume import State
from tests.helpers import tiny
from tests.helpers.training import make_loop
from tests.objectives.test_preferences import log_p

trl = pytest.importorskip("trl", reason="TRL is not installed")
datasets = pytest.importorskip("datasets", reason="TRL's data sets are not installed")
KEYS = ("prompt_ids", "chosen_ids", "rejected_ids")
STEPS = 6


def pairs(count: int) -> list[dict[str, list[int]]]:
    """Random prompts with two answers each, of 2 to 8 tokens."""
    generator = torch.Generator().manual_seed(4)

    def text() -> list[int]:
        return torch.randint(3, 101, (int(torch.randint(2, 9, (), generator=generator)),), generator=generator).tolist()

    return [{key: text() for key in KEYS} for _ in range(count)]


def samples_of(rows: list[dict[str, list[int]]], base: Any) -> list[Sample]:
    samples = []
    for row in rows:
        prompt, *answers = (row[key] for key in KEYS)
        samples += [Sample(array("i", prompt + a), bytearray([0] * len(prompt) + [1] * len(a))) for a in answers]
    for sample in samples:
        with torch.no_grad():
            sample.reference = array("f", [-log_p(base, sample).item() / sample.n_targets] * sample.n_targets)
    return samples


def theirs(hf: Any, rows: list[dict[str, list[int]]], folder: Path) -> list[float]:
    class Trainer(trl.DPOTrainer):  # type: ignore[misc, name-defined]
        def _prepare_dataset(self, dataset: Any, *args: Any, **settings: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *args: Any, **settings: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    backend = Tokenizer(models.WordLevel({f"t{i}": i for i in range(101)}, unk_token="t2"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="t0", eos_token="t1", unk_token="t2")
    table = datasets.table.InMemoryTable.from_pydict({key: [row[key] for row in rows] for key in KEYS})
    settings = trl.DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_epsilon=1e-4,
        weight_decay=0.0,
        max_grad_norm=0.0,
        beta=0.3,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = datasets.Dataset(table, fingerprint="pairs")
    trainer = Trainer(
        model=copy.deepcopy(hf).train(), ref_model=copy.deepcopy(hf), args=settings, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_losses_of_a_short_run_are_trls(tmp_path: Path) -> None:
    hf, rows = tiny.hf_llama(), pairs(4 * STEPS)
    model = tiny.from_hf(copy.deepcopy(hf)).requires_grad_(True)
    loop = make_loop(
        model,
        samples_of(rows, model),
        objective=objective_of(ObjectiveSettings(objective="dpo", dpo_beta=0.3)),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4, weight_decay=0.0),
        global_batch_size=4,
        min_lr=1e-3,
    ).loop
    batches = list(itertools.islice(loop.batches.after(0), STEPS))
    ours = [loop.step(State(step=k), batch)["train_loss"] for k, batch in enumerate(batches)]
    order = [i // 2 for batch in batches for i in batch.indices[::2]]
    assert_close(ours, theirs(hf, [rows[i] for i in order], tmp_path), rtol=1e-5, atol=1e-6)
