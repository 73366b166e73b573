"""Checkpoint folders: what they hold, and how they are read and written so that a crash never leaves half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from litgpt.config import Config
from litgpt.errors import UserError

if TYPE_CHECKING:
    import torch

    from litgpt.model import GPT

WEIGHTS = "lit_model.pth"
ADAPTER_WEIGHTS = "lit_model.pth.lora"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears whole or not at all.

    Yields a temporary sibling of `path`; when the block ends its files are flushed to disk and it is renamed to `path`. On an error
    it is removed and an existing `path` stays as it was. Raises UserError if `path` exists with content and `overwrite` is false.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file, a folder is needed: name another place")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"{path} exists already: name another folder, or move it away")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise UserError(f"{path} cannot be made: {error.strerror}") from None
    try:
        temporary.chmod(0o755)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        old = None
        if path.exists():
            old = path.with_name(f"{temporary.name}.old")
            path.rename(old)
        temporary.rename(path)
        _sync(path.parent)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file under a temporary name, flush it to disk, rename it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def save_weights(weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Write a state dict under a temporary name, flush it to disk, rename it."""
    import torch

    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save(weights, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def on_cpu(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU; those that share memory, such as a tied head and embedding, still do."""
    shared = {value.data_ptr(): value for value in weights.values()}
    moved = {place: value.detach().cpu() for place, value in shared.items()}
    return {name: moved[value.data_ptr()] for name, value in weights.items()}


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.pth` file, memory-mapped on the CPU; a `{"model": {...}}` envelope is opened.

    Only tensors are unpickled (`weights_only`). Raises UserError for a missing, broken or foreign file.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is not a readable checkpoint (truncated, or not made of plain tensors): {reason[:200]}") from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UserError(f"{path} holds no state dict of tensors")
    return content


def save_config(config: Config, folder: str | Path) -> None:
    """Write `model_config.yaml` with the base model's fields."""
    write_text(Path(folder) / "model_config.yaml", yaml.safe_dump(config.base_dict(), sort_keys=False))


def copy_tokenizer_files(source: str | Path, target: str | Path) -> None:
    """Copy the tokenizer and generation files that `source` has."""
    for name in TOKENIZER_FILES:
        file = Path(source) / name
        if file.is_file():
            shutil.copyfile(file, Path(target) / name)


def require_checkpoint(folder: str | Path) -> Path:
    """The folder, if it holds a model; UserError that names what is missing if not."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"checkpoint folder {folder} does not exist: make one with `litgpt convert_to_litgpt`, or check the path")
    missing = [name for name in (WEIGHTS, "model_config.yaml") if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        missing.append("tokenizer.json")
    if missing:
        hint = ""
        if (folder / "config.json").is_file():
            hint = f": it looks like a Hugging Face folder, convert it with `litgpt convert_to_litgpt {folder}`"
        raise UserError(f"checkpoint folder {folder} lacks {', '.join(missing)}{hint}")
    return folder


def load_base(model: GPT, weights: dict[str, torch.Tensor], dtype: torch.dtype, source: str | Path) -> None:
    """Give a model made on the meta device its base weights, cast to `dtype`; adapters get fresh fp32 values.

    The head and the embedding share one tensor if they do in `weights`. Raises UserError that lists every missing, unknown and
    misshapen weight.
    """
    import torch

    from litgpt.lora import LoRALayer, lora_filter

    config = model.config
    embedding, output = weights.get("transformer.wte.weight"), weights.get("lm_head.weight")
    tied = embedding is not None and (output is None or output.data_ptr() == embedding.data_ptr())
    if tied:
        weights = {**weights, "lm_head.weight": embedding}  # type: ignore[dict-item]
    wanted = {name.replace(".linear.", "."): value.shape for name, value in model.state_dict().items() if not lora_filter(name)}
    problems = [f"{name} is missing" for name in wanted if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in wanted]
    problems += [
        f"{name} has shape {tuple(value.shape)}, not {tuple(wanted[name])}"
        for name, value in weights.items()
        if name in wanted and value.shape != wanted[name]
    ]
    if problems:
        raise UserError(f"{source} does not fit model {config.name!r}: {'; '.join(problems)}")
    cast = {name: value.to(dtype) for name, value in weights.items() if not (tied and name == "lm_head.weight")}
    model.load_state_dict(cast, strict=False, assign=True)
    head: Any = model.lm_head
    if tied:
        getattr(head, "linear", head).weight = model.transformer["wte"].weight
    for module in model.modules():
        if isinstance(module, LoRALayer) and module.r:
            module.lora_A = torch.nn.Parameter(torch.empty(module.lora_A.shape))
            module.lora_B = torch.nn.Parameter(torch.empty(module.lora_B.shape))
            module.reset_parameters()


def load_adapter(model: GPT, weights: dict[str, torch.Tensor], source: str | Path) -> None:
    """Copy an adapter's A and B into the model. Raises UserError that lists every name and shape that does not fit."""
    from litgpt.lora import lora_filter

    own = {name: value for name, value in model.named_parameters() if lora_filter(name)}
    problems = [f"{name} is missing" for name in own if name not in weights]
    for name, value in weights.items():
        if name not in own:
            problems.append(f"{name} is not in the model")
        elif value.shape != own[name].shape:
            problems.append(f"{name} has shape {tuple(value.shape)}, not {tuple(own[name].shape)}")
    if problems:
        raise UserError(f"{source} does not fit the adapter settings beside it: {'; '.join(problems)}")
    for name, value in weights.items():
        own[name].data.copy_(value)


def adapter_settings(folder: str | Path, base: str | Path | None = None) -> tuple[Path, dict[str, Any]]:
    """The base checkpoint's folder and the adapter settings (`lora_*`, `skip2lora_*`) of an adapter folder.

    Both stand in its `hyperparameters.yaml`, as LitGPT has it; `base` counts more. Raises UserError if they do not, or the base is
    not there.
    """
    from litgpt.lora import Config as LoRAConfig

    file = Path(folder) / "hyperparameters.yaml"
    try:
        values = dict(yaml.safe_load(file.read_text(encoding="utf-8")))
        base = Path(base or values["checkpoint_dir"])
    except (OSError, yaml.YAMLError, TypeError, ValueError, KeyError):
        raise UserError(f"{file} must hold the adapter's settings and its base's checkpoint_dir, and does not") from None
    if not base.is_dir():
        raise UserError(f"{file} names {base} as the adapter's base checkpoint, and there is no such folder: correct checkpoint_dir there")
    settings = {key: value for key, value in values.items() if key in LoRAConfig.adapter_fields()}
    if values.get("skip2lora_positions") is not None:
        settings["skip2lora_block_indices"] = values["skip2lora_positions"]
    return base, settings


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether the folder holds an adapter and no whole model."""
    return (Path(folder) / ADAPTER_WEIGHTS).is_file() and not (Path(folder) / WEIGHTS).is_file()


def load_model(folder: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu", base: str | Path | None = None) -> GPT:
    """A model ready to run (eval mode, nothing trainable) from a base or merged checkpoint, or from an adapter folder and its base.

    `base`: the adapter's base checkpoint, if it is not where hyperparameters.yaml says.
    """
    import torch

    from litgpt.lora import GPT as LoRAGPT
    from litgpt.lora import Config as LoRAConfig

    adapter = is_adapter_folder(folder)
    base, settings = adapter_settings(folder, base) if adapter else (Path(folder), {})
    require_checkpoint(base)
    config = LoRAConfig.from_checkpoint(base, **settings)
    with torch.device("meta"):
        model = LoRAGPT(config)
    load_base(model, load_weights(base / WEIGHTS), dtype, base / WEIGHTS)
    if adapter:
        load_adapter(model, load_weights(Path(folder) / ADAPTER_WEIGHTS), Path(folder) / ADAPTER_WEIGHTS)
    return model.to(device).eval().requires_grad_(False)
