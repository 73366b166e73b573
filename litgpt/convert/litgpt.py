"""LitGPT's own weight files, of any version."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from litgpt.atomic import new_folder
from litgpt.checkpoint import WEIGHTS, copy_tokenizer_files, is_tied, load_weights, save_config
from litgpt.config import Config
from litgpt.convert.hf import Reader
from litgpt.convert.names import Plan, fit, shapes
from litgpt.convert.write import write_pth
from litgpt.device import is_finite
from litgpt.errors import UserError
from litgpt.families import Table
from litgpt.prompts import copy_prompt_style

BEFORE_0_5: Table = {"transformer.h.{}.attn.attn": ("transformer.h.{}.attn.qkv", "qkv grouped")}


def convert_own(source: Path, target: Path, model_name: str | None = None, dtype: torch.dtype | None = None) -> Config:
    """Convert a `.pth` file, in a `{"model": ...}` envelope or not, or its folder, into the checkpoint folder `target`.

    The model is that of `model_name`, else of the model_config.yaml next to the file. Raise UserError if it is missing, and for tensors
    that do not fit.
    """
    file = source / WEIGHTS if source.is_dir() else source
    if model_name is None and not (file.parent / "model_config.yaml").is_file():
        raise UserError(f"{file} says nothing about its model: give --model_name to convert_to_litgpt, or put model_config.yaml next to it")
    config = Config.from_checkpoint(file.parent) if model_name is None else Config.from_name(model_name)
    with new_folder(target) as folder:
        copy_tokenizer_files(file.parent, folder)
        copy_prompt_style(file.parent, folder)
        save_config(config, folder)
        write_pth(open_own(file, config, dtype), folder / WEIGHTS)
    return config


def open_own(file: Path, config: Config, dtype: torch.dtype | None = None) -> Plan:
    """Return how to load each tensor of a `.pth` file, one at a time. A head equal to the embedding shares its tensor.

    Loading raises UserError for non-finite numbers.
    """
    tensors = Reader().stored(file)
    modules = {key.rpartition(".")[0] for key in shapes(config, str(file), len(tensors))}
    table: Table = {module: (module, "all") for module in modules}
    if any(".attn.attn." in name for name in tensors):
        table = {module: slot for module, slot in table.items() if not module.endswith(".attn.qkv")} | BEFORE_0_5
    plan = fit(tensors, table, config, str(file), is_tied(load_weights(file), by_value=True), dtype)
    return {keys: partial(_load_finite, load, keys[0], file) for keys, load in plan.items()}


def _load_finite(load: Callable[[], torch.Tensor], name: str, file: Path) -> torch.Tensor:
    tensor = load()
    require_finite({name: tensor}, file)
    return tensor


def require_finite(
    weights: Mapping[str, torch.Tensor], file: Path, agree: Callable[[torch.Tensor], torch.Tensor] = lambda flags: flags
) -> None:
    """Raise UserError for non-finite numbers in a file's weights. `agree` combines the flags of processes that hold parts of them."""
    numbers = {name: value for name, value in weights.items() if value.is_floating_point()}
    broken = agree(torch.tensor([not is_finite(value) for value in numbers.values()])).tolist()
    for name in [name for name, is_broken in zip(numbers, broken, strict=True) if is_broken][:1]:
        check = f"`litgpt validate {file.parent}` lists all"
        raise UserError(f"{file}: {name} holds non-finite numbers ({check}): use an earlier checkpoint")
