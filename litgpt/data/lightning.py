"""The LightningDataModule interface of data modules: LitGPT's `connect`, `setup` and loaders of padded batches.

The training commands do not use it: they pack samples without padding (`litgpt.packing`). They read a user's data module
in LitGPT's form through the data sets of its loaders.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from litgpt.errors import UserError
from litgpt.prompts import PromptStyle, resolve_prompt_style
from litgpt.sample import Sample

Item = dict[str, Any]  # "input_ids" (T,) and "labels" (T,), int64, and "token_counts"


@dataclass(eq=False, repr=False)
class Samples(Dataset[Item]):
    """Samples as tensors; labels without loss are `ignore_index`."""

    samples: Sequence[Sample]
    ignore_index: int = -100

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        sample = self.samples[index]
        ids = torch.tensor(sample.input_ids, dtype=torch.int64)
        labels = torch.where(torch.tensor(sample.loss_mask, dtype=torch.bool), ids, self.ignore_index)
        return {"input_ids": ids, "labels": labels, "token_counts": {"raw": len(ids), "raw_plus_prompt_template": len(ids)}}


@dataclass(eq=False, repr=False)
class SFTDataset(Dataset[Item]):
    """Records as tensors, each encoded on access: the prompt, the answer, EOS.

    Args:
        data: Records with the keys instruction, output and optionally input.
        prompt_style: A style, or its name.
        max_seq_length: Cut prompt, answer and both to this many tokens. -1: no limit.
        mask_prompt: The prompt's labels are `ignore_index`.
        transform: Applied to each record first, for example to rename its keys.
    """

    data: Sequence[Any]
    tokenizer: Any
    prompt_style: Any
    max_seq_length: int = -1
    mask_prompt: bool = True
    ignore_index: int = -100
    transform: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt_style, PromptStyle):
            self.prompt_style = PromptStyle.from_name(self.prompt_style)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        record = self.data[index] if self.transform is None else self.transform(self.data[index])
        limit = self.max_seq_length
        prompt = self.tokenizer.encode(self.prompt_style.apply(prompt=record["instruction"], **record), max_length=limit).long()
        answer = self.tokenizer.encode(record["output"], bos=False, eos=True, max_length=limit).long()
        ids = torch.cat((prompt, answer))[: limit if limit > 0 else None]
        labels = ids.clone()
        if self.mask_prompt:
            labels[: len(prompt)] = self.ignore_index
        raw = len(self.tokenizer.encode(record["instruction"], max_length=limit)) + len(answer)
        return {"input_ids": ids, "labels": labels, "token_counts": {"raw": raw, "raw_plus_prompt_template": len(ids)}}


def get_sft_collate_fn(max_seq_length: int = -1, pad_id: int = 0, ignore_index: int = -100) -> Callable[[list[Item]], Item]:
    """Return a function that makes a batch (B, T) of items, padded on the right and cut to `max_seq_length` if it is above 0."""
    return partial(_collate, max_seq_length if max_seq_length > 0 else None, {"input_ids": pad_id, "labels": ignore_index})


def _collate(length: int | None, padding: dict[str, int], items: list[Item]) -> Item:
    batch: Item = {
        key: pad_sequence([item[key] for item in items], batch_first=True, padding_value=value)[:, :length]
        for key, value in padding.items()
    }
    counts = [item["token_counts"] for item in items]
    return {**batch, "token_counts": {key: torch.tensor([[count[key]] for count in counts]) for key in counts[0]}}


class Face:
    """The methods of LitGPT's data modules, on top of `litgpt.data.DataModule`."""

    def setup(self: Any, stage: str = "") -> None:
        """Read, split and tokenise the data. Labels are shifted by the loss, not here."""
        style = resolve_prompt_style(self.prompt_style, self.tokenizer.folder, self.tokenizer)
        splits = self.splits(self.tokenizer, style, self.max_seq_length if self.max_seq_length > 0 else None)
        self.train_dataset, self.test_dataset = (Samples(part, self.ignore_index) for part in (splits.train, splits.val))
        self.val_dataset = self.test_dataset

    def train_dataloader(self: Any) -> DataLoader[Item]:
        """Return a loader that shuffles with the data's seed."""
        return self._loader("train_dataset", shuffle=True, generator=torch.Generator().manual_seed(self.seed))

    def val_dataloader(self: Any) -> DataLoader[Item]:
        """Return a loader of the validation samples, in their order."""
        return self._loader("test_dataset")

    def _loader(self: Any, name: str, **options: Any) -> DataLoader[Item]:
        if getattr(self, name) is None:
            self.setup()
        collate = get_sft_collate_fn(self.max_seq_length, ignore_index=self.ignore_index)
        return DataLoader(getattr(self, name), self.batch_size, collate_fn=collate, num_workers=self.num_workers, **options)


@cache
def with_face(kind: Any) -> type:
    """Return a subclass of a data module's class that is a LightningDataModule."""
    from lightning.pytorch import LightningDataModule

    return type(kind.__name__, (kind, Face, LightningDataModule), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def connect(data: Any, tokenizer: Any, batch_size: int, max_seq_length: int | None) -> None:
    """Turn a data module into a LightningDataModule, in place."""
    from lightning.pytorch import LightningDataModule

    if not isinstance(data, Face):
        data.__class__ = with_face(data.__class__)
        LightningDataModule.__init__(data)
    data.tokenizer, data.batch_size, data.max_seq_length = tokenizer, batch_size, max_seq_length or -1
    data.train_dataset = data.test_dataset = data.val_dataset = None


def loaded(data: Any, tokenizer: Any, max_seq_length: int | None) -> list[list[Sample]]:
    """Return the samples of both loaders of a data module of LitGPT's form, which has a prompt style and a split of its own."""
    data.connect(tokenizer=tokenizer, batch_size=1, max_seq_length=max_seq_length)
    data.setup()
    parts = []
    for name in ("train_dataloader", "val_dataloader"):
        place, dataset = f"{data.source}.{name}", getattr(getattr(data, name)(), "dataset", None)
        if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UserError(f"{place} is not a loader of a data set with a length and items")
        samples = [_sample(dataset[i], data.ignore_index, f"{place}, item {i}", max_seq_length) for i in range(len(dataset))]
        parts.append([sample for sample in samples if sample.n_targets])
        if not parts[-1]:
            raise UserError(f"{place}: no item has a label to learn")
    return parts


def _sample(item: Item, ignore_index: int, place: str, length: int | None) -> Sample:
    try:
        ids, labels = (torch.as_tensor(item[key]).flatten()[:length].tolist() for key in ("input_ids", "labels"))
    except (TypeError, KeyError, ValueError, RuntimeError):
        raise UserError(f"{place}: a mapping with input_ids and labels is needed") from None
    mask = bytearray(label != ignore_index for label in labels)
    mask[:1] = b"\0"
    if len(ids) != len(labels) or any(learned and label != token for learned, label, token in zip(mask, labels, ids, strict=True)):
        raise UserError(f"{place}: labels are input_ids, or {ignore_index} where nothing is learned; the loss shifts them")
    return Sample(array("i", ids), mask)
