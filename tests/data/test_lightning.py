"""Data modules as LightningDataModules: a plain loop and Lightning's Trainer run on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from litgpt.data import JSON, SFTDataset, get_sft_collate_fn
from litgpt.prompts import PromptStyle, resolve_prompt_style
from litgpt.tokenizer import Tokenizer
from tests.helpers import runs, tiny


def connected(base: Path, tmp_path: Path, **settings: Any) -> Any:
    data = JSON(json_path=runs.write_data(tmp_path / "data.json"), val_split_fraction=0.1, num_workers=0, **settings)
    data.connect(Tokenizer(base), batch_size=4, max_seq_length=200)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("mask_prompt", [False, True])
def test_the_samples_are_those_of_training(mask_prompt: bool, base: Path, tmp_path: Path) -> None:
    data = connected(base, tmp_path, mask_prompt=mask_prompt)
    assert isinstance(data, LightningDataModule) and isinstance(data, JSON) and type(data).__name__ == "JSON"
    splits = data.splits(Tokenizer(base), resolve_prompt_style(None, base), 200)
    assert (len(data.train_dataset), len(data.test_dataset)) == (18, 2)
    for item, sample in zip(data.train_dataset, splits.train, strict=True):
        mask = torch.tensor(list(sample.loss_mask)).bool()
        assert item["input_ids"].tolist() == list(sample.input_ids)
        assert torch.equal(item["labels"] != -100, mask) and torch.equal(item["labels"][mask], item["input_ids"][mask])
    batches = list(data.train_dataloader())
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 4, 4, 2]
    width = max(item["token_counts"]["raw_plus_prompt_template"] for item in data.test_dataset)
    (batch,) = data.val_dataloader()
    assert batch["input_ids"].shape == batch["labels"].shape == (2, width)


def test_trainer(base: Path, tmp_path: Path) -> None:
    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.gpt = tiny.tiny(**tiny.SPEAKING).train()
            self.losses: list[float] = []

        def training_step(self, batch: Any) -> torch.Tensor:
            logits = self.gpt(batch["input_ids"])
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch: Any) -> None:
            self.training_step(batch)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    model, data = Model(), connected(base, tmp_path)
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_epochs=2, accelerator="cpu", num_sanity_val_steps=0, default_root_dir=tmp_path, **off).fit(model, data)
    assert len(model.losses) == 2 * (5 + 1) and sum(model.losses[-3:]) < sum(model.losses[:3])


class Echo(PromptStyle):
    def apply(self, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        return f"[{prompt}|{kwargs['input']}]"


class Letters:
    """A tokenizer whose ids are characters; 0 ends a text."""

    def encode(self, text: str, bos: bool | None = None, eos: bool = False, max_length: int = -1) -> torch.Tensor:
        return torch.tensor([*map(ord, text), *[0] * eos][: max_length if max_length > 0 else None])


@pytest.mark.parametrize("limit", [-1, 6, 3])
@pytest.mark.parametrize("mask_prompt", [False, True])
def test_sft_dataset(limit: int, mask_prompt: bool) -> None:
    data = SFTDataset(
        [{"q": "a", "input": "b", "output": "cd"}], Letters(), Echo(), limit, mask_prompt, -1, lambda r: {"instruction": r["q"], **r}
    )
    (item,) = data
    ids = [*map(ord, "[a|b]cd"), 0][: limit if limit > 0 else None]
    assert item["input_ids"].tolist() == ids and item["input_ids"].dtype == torch.int64
    assert item["labels"].tolist() == ([-1] * min(5, len(ids)) + ids[5:] if mask_prompt else ids)
    assert item["token_counts"] == {"raw": 4, "raw_plus_prompt_template": len(ids)}


def test_collate() -> None:
    items = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids), "token_counts": {"raw": len(ids)}} for ids in ([1, 2, 3], [4])]
    batch = get_sft_collate_fn(pad_id=9, ignore_index=-5)(items)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]] and batch["labels"].tolist() == [[1, 2, 3], [4, -5, -5]]
    assert batch["token_counts"]["raw"].tolist() == [[3], [1]]
    assert get_sft_collate_fn(max_seq_length=2)(items)["labels"].tolist() == [[1, 2], [4, -100]]
