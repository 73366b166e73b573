"""LitGPT's own weight files: the current layout, and that of LitGPT before 0.5, whose `attn.attn` holds the rows of q, k, v by group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from litgpt.atomic import new_folder
from litgpt.checkpoint import WEIGHTS, copy_tokenizer_files, load_weights, save_config
from litgpt.config import Config
from litgpt.convert.hf import Reader
from litgpt.convert.names import LITGPT_BEFORE_0_5, Plan, Stored, Table, fit, shapes
from litgpt.convert.write import write_pth
from litgpt.errors import UserError

if TYPE_CHECKING:
    import torch


def convert_own(source: Path, target: Path, model_name: str | None = None, dtype: torch.dtype | None = None) -> Config:
    """A `.pth` file, of any layout and in a `{"model": ...}` envelope or not, or the folder of one, into the checkpoint folder `target`.

    The model is that of `model_name`, else of the model_config.yaml beside the file. Raises UserError if it is not there, and for
    tensors that do not fit.
    """
    file = source / WEIGHTS if source.is_dir() else source
    if model_name is None and not (file.parent / "model_config.yaml").is_file():
        raise UserError(f"{file} says nothing about its model: give --model_name, or put its model_config.yaml beside it")
    config = Config.from_checkpoint(file.parent) if model_name is None else Config.from_name(model_name)
    with new_folder(target) as folder:
        copy_tokenizer_files(file.parent, folder)
        save_config(config, folder)
        write_pth(open_own(file, config, dtype), folder / WEIGHTS)
    return config


def open_own(file: Path, config: Config, dtype: torch.dtype | None = None) -> Plan:
    """How to get each tensor of a `.pth` file in the current layout, read one at a time. A head equal to the embedding is one with it."""
    return _plan(Reader().stored(file), config, str(file), is_tied(load_weights(file)), dtype)


def is_old(names: Iterable[str]) -> bool:
    """Whether tensors of these names are in the layout before 0.5."""
    return any(".attn.attn." in name for name in names)


def is_tied(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether the head is missing, or the same as the embedding number by number: a trained head never is by chance."""
    import torch

    embedding, head = weights.get("transformer.wte.weight"), weights.get("lm_head.weight")
    return embedding is not None and (head is None or (head.dtype == embedding.dtype and torch.equal(head, embedding)))


def _plan(tensors: Mapping[str, Stored], config: Config, source: str, tied: bool, dtype: torch.dtype | None) -> Plan:
    modules = {key.rpartition(".")[0] for key in shapes(config, len(tensors), source)}
    table: Table = {module: (module, "all") for module in modules if not (is_old(tensors) and module.endswith(".attn.qkv"))}
    if is_old(tensors):
        table.update(LITGPT_BEFORE_0_5)
    return fit(tensors, table, config, source, tied, dtype)
