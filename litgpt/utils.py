"""LitGPT's helpers that scripts import from `litgpt.utils`. The package itself does not use this module."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from litgpt import checkpoint
from litgpt.args import LogArgs
from litgpt.checkpoint import extend_checkpoint_dir as extend_checkpoint_dir, save_config as save_config
from litgpt.convert.resolve import open_checkpoint
from litgpt.device import default_device, default_precision
from litgpt.download import fetch_named
from litgpt.errors import UserError
from litgpt.logs import remote_logger
from litgpt.loss import chunked_cross_entropy as chunked_cross_entropy
from litgpt.optim import make_optimizer
from litgpt.quantize import count
from litgpt.validate import estimate_model_memory as estimate_model_memory


def num_parameters(module: nn.Module, requires_grad: bool | None = None) -> int:
    """Return the number of parameters, or of the trained or frozen ones. Quantised weights count as the weights that they represent."""
    if requires_grad is None:
        return count(module)
    return sum(p.numel() for p in module.parameters() if p.requires_grad == requires_grad)


def reset_parameters(module: nn.Module) -> None:
    """Call `reset_parameters` of every module that has it."""
    parts: Any = module.modules()
    for part in parts:
        if callable(getattr(part, "reset_parameters", None)):
            part.reset_parameters()


def check_valid_checkpoint_dir(
    checkpoint_dir: Path,
    model_filename: str = checkpoint.WEIGHTS,
    verbose: bool = True,
    raise_error: bool = False,
    ignore_tokenizer_files: bool = False,
) -> None:
    """Check that a folder has the files of a checkpoint. If not, raise FileNotFoundError or, without `raise_error`, print why and exit."""
    missing = [name for name in (model_filename, "model_config.yaml") if not (Path(checkpoint_dir) / name).is_file()]
    if not ignore_tokenizer_files and not checkpoint.has_tokenizer(Path(checkpoint_dir)):
        missing.append("tokenizer.json or tokenizer.model")
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


@dataclass
class CheckpointValidationResult:
    """The differences between a checkpoint's file and a model."""

    is_valid: bool
    missing_keys: list[str]
    unexpected_keys: list[str]
    shape_mismatches: list[str]
    errors: list[str]

    def summary(self) -> str:
        """Return all differences as text."""
        if self.is_valid:
            return "Checkpoint validation passed."
        names = ("errors", "missing_keys", "unexpected_keys", "shape_mismatches")
        found = ((name.replace("_", " ").capitalize(), getattr(self, name)) for name in names)
        return "\n".join(("Checkpoint validation failed:", *(f"  {name} ({len(keys)}): {', '.join(keys)}" for name, keys in found if keys)))


def validate_checkpoint(checkpoint_path: Path, model: nn.Module, verbose: bool = True) -> CheckpointValidationResult:
    """Compare names and shapes of a file's weights with a model's; print the result to standard error if `verbose`."""
    path, stored, errors = Path(checkpoint_path), dict[str, torch.Tensor](), list[str]()
    try:
        stored = checkpoint.load_weights(path)
    except (UserError, OSError) as error:
        errors.append(f"Failed to load checkpoint: {error}" if path.is_file() else f"Checkpoint file not found: {path}")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing, unexpected = ([], []) if errors else (sorted(shapes.keys() - stored), sorted(stored.keys() - shapes))
    both = ((name, shapes[name], tuple(stored[name].shape)) for name in sorted(shapes.keys() & stored))
    odd = [f"{name}: model={ours}, checkpoint={theirs}" for name, ours, theirs in both if ours != theirs]
    result = CheckpointValidationResult(not (errors or missing or unexpected or odd), missing, unexpected, odd, errors)
    if verbose:
        print(result.summary(), file=sys.stderr)
    return result


def auto_download_checkpoint(model_name: str | Path, access_token: str | None = None, ignore_tokenizer_files: bool = False) -> Path:
    """Return the checkpoint folder of a path or of a name on the hub, which is downloaded if it is not there."""
    fetch_named(model_name, access_token)
    folder = open_checkpoint(model_name)
    check_valid_checkpoint_dir(folder, raise_error=True, ignore_tokenizer_files=ignore_tokenizer_files)
    return folder


def copy_config_files(source_dir: Path, out_dir: Path) -> None:
    """Copy the model's config and the tokenizer's files. Raises FileNotFoundError if the source is not a checkpoint."""
    if not Path(source_dir).is_dir() or not (Path(source_dir) / "model_config.yaml").is_file():
        raise FileNotFoundError(f"{source_dir} is not a checkpoint folder: it has no model_config.yaml")
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    checkpoint.copy_tokenizer_files(source_dir, out_dir)
    (Path(out_dir) / "model_config.yaml").write_bytes((Path(source_dir) / "model_config.yaml").read_bytes())


def init_out_dir(out_dir: Path) -> Path:
    """Return the path; a relative one is in the folder LIGHTNING_ARTIFACTS_DIR, if the environment has that."""
    return Path(os.environ.get("LIGHTNING_ARTIFACTS_DIR", ""), out_dir)


def find_resume_path(resume: bool | Literal["auto"] | Path | None, out_dir: Path) -> Path | None:
    """Return the weights to resume from: a path as it is; for true and "auto" those of the newest step in `out_dir`.

    None if there is none; for true that is a FileNotFoundError.
    """
    if not resume or isinstance(resume, Path):
        return resume or None
    steps = sorted(Path(out_dir).glob("step-*/*.pth"), key=lambda file: int(file.parent.name.partition("-")[2]))
    if not steps and resume != "auto":
        raise FileNotFoundError(f"{out_dir} holds no step-*/*.pth to resume from: name the weights, or start anew with resume=False")
    return steps[-1] if steps else None


def load_checkpoint(fabric: Any, model: nn.Module, checkpoint_path: Path, strict: bool = True) -> None:
    """Load weights into a model that `fabric` has set up."""
    from lightning.fabric import strategies

    if isinstance(fabric.strategy, strategies.FSDPStrategy):  # type: ignore[attr-defined]
        fabric.load_raw(checkpoint_path, model, strict=strict)
    else:
        model.load_state_dict(checkpoint.load_weights(checkpoint_path), strict=strict)


def instantiate_torch_optimizer(
    optimizer: str | dict[str, Any], model_parameters: Iterable[nn.Parameter], **kwargs: Any
) -> torch.optim.Optimizer:
    """Return an optimizer by its name, or by `class_path` and `init_args`. Keyword arguments replace those."""
    spec: dict[str, Any] = {"class_path": optimizer} if isinstance(optimizer, str) else optimizer
    return make_optimizer({**spec, "init_args": {**(spec.get("init_args") or {}), **kwargs}}, model_parameters)


def choose_logger(
    logger_name: str,
    out_dir: Path,
    name: str,
    log_interval: int = 1,
    log_args: dict[str, Any] | None = None,
    resume: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Return a logger for Fabric, csv, tensorboard, wandb, mlflow or litlogger; `log_args` are fields of `LogArgs`."""
    from lightning.pytorch import loggers

    folder = Path(out_dir) / "logs"
    if logger_name == "csv":
        return loggers.CSVLogger(folder, "csv", flush_logs_every_n_steps=log_interval, **kwargs)
    if logger_name == "tensorboard":
        return loggers.TensorBoardLogger(folder, "tensorboard", **kwargs)
    if logger_name not in ("wandb", "mlflow", "litlogger"):
        raise UserError(f"logger_name is {logger_name!r}: choose csv, tensorboard, wandb, mlflow or litlogger")
    return remote_logger(Path(out_dir), logger_name, LogArgs(**{"project": name, **(log_args or {})}), {})


def CLI(*args: Any, **kwargs: Any) -> Any:
    """Run jsonargparse's CLI, with the strings below fields as their help, and configs by URL."""
    import jsonargparse

    jsonargparse.set_parsing_settings(config_read_mode_urls_enabled=True, docstring_parse_attribute_docstrings=True)
    return jsonargparse.CLI(*args, **kwargs)  # type: ignore[attr-defined]


def capture_hparams() -> dict[str, Any]:
    """Return the caller's local variables: numbers, texts and paths as they are, dataclasses as dicts, anything else as text."""
    frame = inspect.currentframe()
    assert frame is not None and frame.f_back is not None

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, int | float | str | Path):
            return value
        return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)

    return {name: plain(value) for name, value in frame.f_back.f_locals.items()}


def save_hyperparameters(function: Callable[..., Any], checkpoint_dir: Path) -> None:
    """Write what the command line, of a script or of `litgpt COMMAND`, gives to `function` as hyperparameters.yaml."""
    from jsonargparse import capture_parser

    words = sys.argv[2 if Path(sys.argv[0]).stem in ("litgpt", "__main__") else 1 :]
    parser = capture_parser(lambda: CLI(function))
    parser.save(parser.parse_args(words), Path(checkpoint_dir) / "hyperparameters.yaml", overwrite=True)


def get_default_supported_precision(training: bool) -> str:
    """Return the precision that commands take by default on this machine."""
    return default_precision(default_device())


def parse_devices(devices: str | int) -> int:
    """Return a number of devices; for "auto" the number of GPUs, or 1."""
    if devices in (-1, "auto"):
        return torch.cuda.device_count() or 1
    if isinstance(devices, int) and devices > 0:
        return devices
    raise UserError(f"devices is {devices!r}: a number of devices from 1 on, or auto, is needed")


class CycleIterator:
    """Cycles through an iterable; `epoch` counts the completed passes."""

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
