"""Hugging Face folders (config.json, safetensors or .bin, one file or shards) of the families in `names.HF_TABLES`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt import catalog
from litgpt.checkpoint import WEIGHTS, copy_tokenizer_files, load_weights, new_folder, save_config, save_weights
from litgpt.config import Config
from litgpt.convert.names import HF_TABLES, Stored, assemble
from litgpt.errors import UserError

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order of preference."""


def convert_hf(source: Path, target: Path | None = None, model_name: str | None = None, dtype: torch.dtype | None = None) -> Config:
    """Convert the folder `source` into the checkpoint folder `target`; None: in place. Weights keep their dtype unless one is given.

    Raises UserError for unsupported architectures, broken files, and tensors that do not fit the model.
    """
    settings = read_json(source / "config.json")
    if settings.get("quantization_config"):
        quantised = settings["quantization_config"]
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(f"{source} holds weights quantised with {method!r}: convert the unquantised model, or a GGUF file of it")
    config = choose_config(source, model_name)
    with nullcontext(source) if target is None else new_folder(target) as folder:
        tied = bool(settings.get("tie_word_embeddings", False))
        weights = assemble(open_weights(source), HF_TABLES[settings["model_type"]], config, str(source), tied, dtype)
        if target is not None:
            copy_tokenizer_files(source, folder)
            (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        save_config(config, folder)
        save_weights(weights, folder / WEIGHTS)
    return config


def choose_config(source: Path, model_name: str | None) -> Config:
    """The named model, if a name is given or the folder bears one that fits; else what config.json says, named after the folder."""
    folder = source.resolve().name
    described = Config.from_hf(source / "config.json", name=folder, hf_config={})
    if model_name is None:
        named = catalog.find(folder) and Config.from_name(folder)
        return named if named and not differences(named, described) else described
    named = Config.from_name(model_name)
    if differing := differences(named, described):
        raise UserError(
            f"{source / 'config.json'} is not of the model {model_name}: {differing}. Without --model_name it is converted as it is"
        )
    return named


def differences(named: Config, described: Config, ignore: tuple[str, ...] = ()) -> str:
    """The settings in which two configs compute different things, as text; empty if there are none.

    Names are left out, and what bounds the input instead of changing the result: block_size and the unpadded vocabulary.
    """
    ignore = ("name", "hf_config", "block_size", "vocab_size", "padding_multiple", *ignore)
    left, right = named.base_dict(), described.base_dict()
    return ", ".join(f"{key} is {right[key]}, expected {left[key]}" for key in left if key not in ignore and left[key] != right[key])


def open_weights(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's weight files, not yet read. Raises UserError for missing and broken files."""
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise UserError(f"{folder} holds no weights: one of {', '.join(WEIGHT_FILES)} is needed")
    files = shard_files(folder / name) if name.endswith(".index.json") else [folder / name]
    tensors: dict[str, Stored] = {}
    for file in files:
        tensors.update(_open_safetensors(file) if file.suffix == ".safetensors" else _open_bin(file))
    return tensors


def shard_files(index: Path) -> list[Path]:
    """The files that a `.index.json` names. Raises UserError if one is missing, or is not a plain file name inside the folder."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} has no weight_map from tensors to file names")
    shards = sorted(set(names.values()))
    suffix = index.name.removesuffix(".index.json").rpartition(".")[2]
    if bad := [name for name in shards if "/" in name or "\\" in name or not name.endswith(f".{suffix}")]:
        raise UserError(f"{index} names {', '.join(map(repr, bad))}: only plain .{suffix} file names inside the folder are read")
    if missing := [name for name in shards if not (index.parent / name).is_file()]:
        raise UserError(f"{index.parent} lacks {', '.join(missing)}, named in {index.name}: download the model again")
    return [index.parent / name for name in shards]


def _open_safetensors(file: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        content = safe_open(file, framework="pt")
        names = list(content.keys())
        return {name: Stored(tuple(content.get_slice(name).get_shape()), partial(content.get_tensor, name)) for name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file (truncated?): {error}") from None


def _open_bin(file: Path) -> dict[str, Stored]:
    return {name: Stored(tuple(tensor.shape), partial(_itself, tensor)) for name, tensor in load_weights(file).items()}


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON object file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing: a Hugging Face folder holds it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object")
    return content
