"""The stored samples as torch's data sets, for the peers that are not this project's. Imported in their environments too: torch only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

IGNORED = -100  # label of a token without loss


class Samples(Dataset[dict[str, torch.Tensor]]):
    """Samples as `input_ids` (T,) and `labels` (T,), neither shifted nor padded."""

    def __init__(self, samples: list[dict[str, list[int]]]) -> None:
        self.data = [{"instruction": ""}]
        """upstream's fit() looks for an example here, which it then finds too long to answer"""
        self.tensors = []
        for sample in samples:
            ids, mask = torch.tensor(sample["input_ids"]), torch.tensor(sample["loss_mask"], dtype=torch.bool)
            self.tensors.append({"input_ids": ids, "labels": ids.where(mask, torch.tensor(IGNORED))})

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.tensors[index]


class Orders(Sampler[int]):
    """A sampler with a given order for each epoch."""

    def __init__(self, orders: list[list[int]]) -> None:
        self.orders, self.epoch = orders, -1

    def __len__(self) -> int:
        return len(self.orders[0])

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(self.orders[self.epoch % len(self.orders)])


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return a batch (B, T), padded on the right. Causal attention needs no mask for padding on the right."""
    padding = {"input_ids": 0, "labels": IGNORED}
    return {
        name: torch.nn.utils.rnn.pad_sequence([sample[name] for sample in samples], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }


def read(file: str) -> tuple[Samples, Samples, Orders]:
    """Return training and validation samples, and the order of the training samples."""
    content = json.loads(Path(file).read_text())
    return Samples(content["train"]), Samples(content["val"]), Orders(content["orders"])


def write_steps(file: str, seconds: list[float], losses: list[float], versions: dict[str, Any]) -> None:
    """Write the duration of each step and its loss before the update, for `measure`."""
    Path(file).write_text(json.dumps({"seconds": seconds, "losses": losses, "versions": versions}))
