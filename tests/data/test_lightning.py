"""Data modules as LightningDataModules: a plain loop and Lightning's Trainer run on them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from litgpt import checkpoint
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
    assert type(data) is type(connected(base, tmp_path)), "one class for all data of a kind"
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


OWN = """
from dataclasses import dataclass
from pathlib import Path
import json
from torch.utils.data import DataLoader
from litgpt import PromptStyle
from litgpt.data import DataModule, SFTDataset, get_sft_collate_fn

@dataclass
class Loaders(DataModule):
    path: Path = Path("rows.json")
    mask_prompt: bool = True
    prompt_style: str = "alpaca"
    held_out: int = 3

    def __post_init__(self):
        super().__init__()
        self.prompt_style = PromptStyle.from_name(self.prompt_style)

    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None):
        self.tokenizer, self.batch_size, self.max_seq_length = tokenizer, batch_size, max_seq_length or -1

    def setup(self, stage=""):
        rows = json.loads(self.path.read_text())
        self.parts = [
            SFTDataset(part, self.tokenizer, self.prompt_style, self.max_seq_length, self.mask_prompt, self.ignore_index)
            for part in (rows[self.held_out:], rows[:self.held_out])
        ]

    def train_dataloader(self):
        return DataLoader(self.parts[0], self.batch_size, shuffle=True, collate_fn=get_sft_collate_fn(self.max_seq_length))

    def val_dataloader(self):
        return DataLoader(self.parts[1], self.batch_size, collate_fn=get_sft_collate_fn(self.max_seq_length))

class Shifted(Loaders):
    def val_dataloader(self):
        return DataLoader([{"input_ids": [1, 2, 3], "labels": [2, 3, -100]}])

class Keyless(Loaders):
    def val_dataloader(self):
        return DataLoader([{"tokens": [1, 2, 3]}])

class Nothing(Loaders):
    def val_dataloader(self):
        return DataLoader([{"input_ids": [1, 2, 3], "labels": [1, -100, -100]}])

class Streamed(Loaders):
    def train_dataloader(self):
        return iter([])
"""


def test_a_data_module_with_loaders_of_its_own_is_trained(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LitGPT's form: the data set's ids and labels are learned, and nothing else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("own_loaders.py").write_text(OWN)
    runs.write_data(Path("rows.json"))
    words = ["--data", "own_loaders.Loaders", "--data.held_out", "4", "--eval.max_new_tokens", "3"]
    run = runs.finetune("finetune_lora", base, None, tmp_path / "out", *words, train__max_steps=3)
    assert run.code == 0, run.err
    from own_loaders import Loaders  # type: ignore[import-not-found]

    rows, tokenizer, style = json.loads(Path("rows.json").read_text()), Tokenizer(base), PromptStyle.from_name("alpaca")
    model = checkpoint.load_model(run.final, torch.float32)
    total, count = 0.0, 0
    for row in rows[:4]:
        prompt = tokenizer.encode(style.apply(row["instruction"], **row)).tolist()
        ids = torch.tensor([*prompt, *tokenizer.encode(row["output"], bos=False, eos=True).tolist()])
        with torch.no_grad():
            losses = F.cross_entropy(model(ids[None, :-1])[0], ids[1:].long(), reduction="none")[len(prompt) - 1 :]
        total, count = total + losses.sum().item(), count + len(losses)
    assert abs(run.report["final_val_loss"] - total / count) < 1e-4
    assert f"data: {len(rows) - 4} train and 4 validation samples" in run.err
    assert Loaders(mask_prompt=False).mask_prompt is False  # `super().__init__()` in __post_init__ takes nothing back
    for name, message in {
        "Shifted": "Shifted.val_dataloader, item 0: labels are input_ids, or -100 where nothing is learned",
        "Keyless": "Keyless.val_dataloader, item 0: a mapping with input_ids and labels is needed",
        "Nothing": "Nothing.val_dataloader: no item has a label to learn",
        "Streamed": "Streamed.train_dataloader is not a loader of a data set with a length and items",
    }.items():
        run = runs.finetune("finetune_lora", base, None, tmp_path / name, "--data", f"own_loaders.{name}")
        assert run.code == 1 and message in run.err and "Traceback" not in run.err, run.err
    for objective in ("dpo", "orpo", "kto", "critic"):
        settings = {"objective": objective, **({"lora_query": False, "lora_value": False} if objective == "critic" else {})}
        run = runs.finetune("finetune_lora", base, None, tmp_path / objective, "--data", "own_loaders.Loaders", **settings)
        assert run.code == 1 and f"objective {objective} rates or compares answers, and Loaders gives tokens: give data" in run.err
