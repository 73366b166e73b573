"""The models that requests may name: a base model and any number of adapters over its weights.

A Skip2-LoRA adapter at the output layer leaves the backbone's keys and values as they are, so its requests run in one batch with those of
the base and of other such adapters: the sum over its taps is added for its rows alone. LoRA changes every block: it is a separate model,
with a batch of its own, that shares the base's weights in memory.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from litgpt import checkpoint
from litgpt.api import LLM
from litgpt.convert.resolve import open_checkpoint
from litgpt.errors import UserError
from litgpt.generate.engine import Batch, Row
from litgpt.lora import GPT as LoRAGPT, Skip2LoRA, skip_sum
from litgpt.model import Positions
from litgpt.packed import pack

CHUNK = 256  # prompt tokens that a step computes besides the running answers
KEPT = 256 * 2**20  # bytes of keys and values of past answers, whose conversations may go on


class Head:
    """A Skip2-LoRA adapter that adds to the input of `ln_f` or `lm_head`."""

    def __init__(self, model: LoRAGPT) -> None:
        assert model.cut is not None
        self.cut = model.cut
        self.layers: dict[int, Skip2LoRA] = {i: block.skip2lora for i, block in enumerate(model.blocks) if block.skip2lora is not None}

    def __call__(self, outputs: dict[int, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """Return the sum over the taps for some rows of blocks' outputs (n, d): (rows, d)."""
        taps = torch.stack([layer.tap(outputs[i][rows]) for i, layer in self.layers.items()], dim=-2)  # (rows, S, d)
        return skip_sum(list(self.layers.values()), taps)


class SharedBatch(Batch):
    """Rows of one backbone, each with the Head of its adapter or none."""

    def hidden(self, idx: torch.Tensor, pos: Positions, rows: Sequence[Row]) -> torch.Tensor:
        users: dict[Head, list[int]] = {}
        for number, row in enumerate(rows):
            if row.head is not None:
                users.setdefault(row.head, []).append(number)
        if not users:
            return super().hidden(idx, pos, rows)
        tapped, outputs = {i for head in users for i in head.layers}, {}
        model, L = self.model, self.model.config.n_layer
        x = model.embed(idx, pos)  # (n, T, d)
        for i, block in enumerate(model.blocks):
            x = block(x, pos)
            if i in tapped:
                outputs[i] = x[:, -1]
        places = {head: torch.tensor(numbers, device=x.device) for head, numbers in users.items()}
        x = x[:, -1].clone()
        for layer in (L, L + 1):
            for head, numbers in places.items():
                if head.cut == layer:
                    x[numbers] = (x[numbers] + head(outputs, numbers)).to(x.dtype)  # fp32, rounded once, as in `GPT.tail`
            if layer == L:
                x = model.transformer["ln_f"](x)
        return x


@dataclass(eq=False)
class Served:
    """A model that requests may name."""

    name: str
    llm: LLM
    batch: Batch
    head: Head | None = None
    parent: str | None = None  # the name of the base
    created: int = field(default_factory=lambda: int(time.time()))


class Models(dict[str, Served]):
    """A checkpoint, and adapters over it, by name. A request without a name gets the first, which cannot be removed, nor can the base.

    If `folder` holds an adapter its base is served too. `how` are arguments of `LLM.load`: precision, device and quantize. Raises UserError
    for folders that cannot be loaded or do not belong together.
    """

    def __init__(self, folder: str | Path, adapters: dict[str, Path], **how: Any) -> None:
        super().__init__()
        opened = self.folder = open_checkpoint(folder)
        if is_adapter := _is_over_a_base(opened):
            self.folder, _ = checkpoint.adapter_settings(opened)
        self.how = how
        self.base = self._open_whole(self.folder)
        if is_adapter:
            self[own_name(opened)] = self.open(own_name(opened), opened)
        self[self.base.name] = self.base
        for name, path in adapters.items():
            self[name] = self.open(name, open_checkpoint(path))

    def open(self, name: str, folder: Path) -> Served:
        """Load an adapter over the base, or a model of its own. It is neither converted nor registered. Raises UserError."""
        if name in (*self, self.base.name):
            raise UserError(f"adapters: {name!r} is the name of a model that is served already: choose another for {folder}")
        folder = open_checkpoint(folder, convert=False)
        if not _is_over_a_base(folder):
            return self._open_whole(folder, name)
        _, config = checkpoint.adapted(folder, self.folder)
        base: Any = self.base.llm.model
        model = base.sharing(config)
        checkpoint.load_adapter(model, checkpoint.load_weights(folder / checkpoint.ADAPTER_WEIGHTS), folder / checkpoint.ADAPTER_WEIGHTS)
        model.to(self.base.batch.device).eval().requires_grad_(False)
        pack(model)
        llm = LLM.around(model, folder, self.folder)
        changes_blocks = config.lora_blocks or (config.lora_r and config.lora_head) or config.modules_to_save
        if config.skip2lora_enabled and not changes_blocks and (config.cut or 0) >= config.n_layer:
            return Served(name, llm, self.base.batch, Head(model), self.base.name)
        return Served(name, llm, Batch(model, CHUNK, KEPT), parent=self.base.name)

    def _open_whole(self, folder: Path, name: str = "") -> Served:
        """Load a model with weights of its own."""
        llm = LLM.load(folder, **self.how)
        pack(llm.model)
        return Served(name or llm.config.name or folder.name, llm, SharedBatch(llm.model, CHUNK, KEPT))

    def drop(self, name: str) -> None:
        """Remove an adapter. Its running answers are completed. Raises UserError for the base and the first."""
        if name in (self.base.name, next(iter(self))):
            raise UserError(f"{name!r} is served as long as the server runs")
        del self[name]


def _is_over_a_base(folder: Path) -> bool:
    """Return True for LoRA and Skip2-LoRA whose base is to be loaded: always if there are no merged weights, else if the base is there."""
    is_lora = (folder / checkpoint.ADAPTER_WEIGHTS).is_file()
    return is_lora and (checkpoint.is_adapter_folder(folder) or checkpoint.has_base(folder))


def own_name(folder: Path) -> str:
    """Return a name for an adapter by its folder: that of the run for its best/ or final/."""
    folder = Path(os.path.abspath(folder))  # "." and "final" name none
    return folder.parent.name if folder.name in ("best", "final") or folder.name.startswith("step-") else folder.name
