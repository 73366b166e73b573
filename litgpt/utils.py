"""LitGPT's helpers that scripts import from `litgpt.utils`. The package itself does not use this module."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from litgpt import checkpoint
from litgpt.checkpoint import HOME, save_config
from litgpt.convert.resolve import open_checkpoint
from litgpt.device import default_device, default_precision
from litgpt.download import fetch_named
from litgpt.errors import UserError
from litgpt.loss import chunked_cross_entropy
from litgpt.quantize import count

__all__ = [
    "CycleIterator",
    "auto_download_checkpoint",
    "check_valid_checkpoint_dir",
    "chunked_cross_entropy",
    "copy_config_files",
    "extend_checkpoint_dir",
    "get_default_supported_precision",
    "init_out_dir",
    "num_parameters",
    "parse_devices",
    "reset_parameters",
    "save_config",
]


def num_parameters(module: nn.Module, requires_grad: bool | None = None) -> int:
    """Return the number of parameters, or of those that are, or are not, trained. Quantised weights count as what they stand for."""
    if requires_grad is None:
        return count(module)
    return sum(p.numel() for p in module.parameters() if p.requires_grad == requires_grad)


def reset_parameters(module: nn.Module) -> None:
    """Call `reset_parameters` of every module that has it."""
    for part in module.modules():
        reset: Any = getattr(part, "reset_parameters", None)
        if callable(reset):
            reset()


def check_valid_checkpoint_dir(
    checkpoint_dir: Path,
    model_filename: str = checkpoint.WEIGHTS,
    verbose: bool = True,
    raise_error: bool = False,
    ignore_tokenizer_files: bool = False,
) -> None:
    """Check that a folder has the files of a checkpoint. If not, raise FileNotFoundError or, without `raise_error`, print why and exit."""
    wanted = [model_filename, "model_config.yaml"]
    missing = [name for name in wanted if not (Path(checkpoint_dir) / name).is_file()]
    tokenizers = ("tokenizer.json", "tokenizer.model")
    if not ignore_tokenizer_files and not any((Path(checkpoint_dir) / name).is_file() for name in tokenizers):
        missing.append(" or ".join(tokenizers))
    if not missing:
        return
    exists = Path(checkpoint_dir).is_dir()
    reason = f"checkpoint folder {checkpoint_dir} " + (f"lacks {', '.join(missing)}" if exists else "does not exist")
    message = f"{reason}: `litgpt download ORG/NAME` gets a model"
    if raise_error:
        raise FileNotFoundError(message)
    if verbose:
        print(message, file=sys.stderr)
    raise SystemExit(1)


def extend_checkpoint_dir(checkpoint_dir: Path) -> Path:
    """Return `checkpoints/DIR` if that exists and DIR does not, else the path itself."""
    path = Path(checkpoint_dir)
    extended = HOME / path
    return extended if not path.exists() and not path.is_absolute() and extended.is_dir() else path


def auto_download_checkpoint(model_name: str | Path, access_token: str | None = None, ignore_tokenizer_files: bool = False) -> Path:
    """Return the checkpoint folder of a path or of a name on the hub, which is downloaded if it is not there."""
    fetch_named(model_name, access_token)
    folder = open_checkpoint(model_name)
    check_valid_checkpoint_dir(folder, raise_error=True, ignore_tokenizer_files=ignore_tokenizer_files)
    return folder


def copy_config_files(source_dir: Path, out_dir: Path) -> None:
    """Copy the model's config and the tokenizer's files. Raises FileNotFoundError if the source is no checkpoint."""
    if not Path(source_dir).is_dir() or not (Path(source_dir) / "model_config.yaml").is_file():
        raise FileNotFoundError(f"{source_dir} is no checkpoint folder: it has no model_config.yaml")
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    checkpoint.copy_tokenizer_files(source_dir, out_dir)
    (Path(out_dir) / "model_config.yaml").write_bytes((Path(source_dir) / "model_config.yaml").read_bytes())


def init_out_dir(out_dir: Path) -> Path:
    """Return the path."""
    return Path(out_dir)


def get_default_supported_precision(training: bool) -> str:
    """Return the precision that commands take by default on this machine."""
    return default_precision(default_device())


def parse_devices(devices: str | int) -> int:
    """Return a number of devices; that of the GPUs, or 1, for "auto"."""
    if devices in (-1, "auto"):
        return torch.cuda.device_count() or 1
    if isinstance(devices, int) and devices > 0:
        return devices
    raise UserError(f"devices is {devices!r}: give a number from 1, or auto")


class CycleIterator:
    """Goes through an iterable again and again; `epoch` counts the completed passes."""

    def __init__(self, iterable: Iterable[Any]) -> None:
        self.iterable = iterable
        self.epoch = 0
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> CycleIterator:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(self.iterable)
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self.iterable)
            self.epoch += 1
            return next(self._iterator)
