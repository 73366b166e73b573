"""Hugging Face folders: config.json, and safetensors or .bin, in one file or shards."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from litgpt import checkpoint, families
from litgpt.archive import is_mappable
from litgpt.atomic import new_folder, write_bytes
from litgpt.config import Config
from litgpt.convert.compare import INPUT_AND_TRAINING, differences, named_or_described
from litgpt.convert.names import IMAGES, Stored, fit, hf_table
from litgpt.convert.write import write_pth
from litgpt.errors import UserError
from litgpt.files import kind_note, read_json, read_own, require_file

RELEASE = 2**27  # a memory map is renewed after that many bytes, so that its pages do not pile up


def convert_hf(source: Path, target: Path, model_name: str | None = None, dtype: torch.dtype | None = None) -> Config:
    """Convert the folder `source` into the checkpoint folder `target`, one tensor at a time. Weights keep their dtype unless one is given.

    Raise UserError for unsupported architectures, broken files, and tensors that do not fit the model.
    """
    settings = read_json(source / "config.json", "is missing: a Hugging Face folder holds it")
    config = choose_config(source, model_name)
    tensors = open_weights(source)
    row = families.architecture(settings["model_type"])
    default = (settings.get("text_config") or {}).get("tie_word_embeddings", row is not None and row.tied)
    tied = bool(settings.get("tie_word_embeddings", default))
    plan = fit(tensors, hf_table(settings["model_type"], config), config, str(source), tied, dtype)
    if images := [name for name in tensors if IMAGES.fullmatch(name)]:
        print(f"{source}: {len(images)} vision tensors are left out; the text model is converted.", file=sys.stderr)
    if adapters := [name for name in checkpoint.FOREIGN_ADAPTERS if (source / name).is_file()]:
        print(f"{source}: the model is converted; the adapter next to it ({adapters[0]}) is left out.", file=sys.stderr)
    with new_folder(target) as folder:
        checkpoint.copy_tokenizer_files(source, folder)
        write_bytes(folder / "config.json", read_own(source, "config.json") or b"")
        checkpoint.save_config(config, folder)
        write_pth(plan, folder / checkpoint.WEIGHTS)
    return config


def choose_config(source: Path, model_name: str | None) -> Config:
    """Return the config of the named model if a name is given or the folder's name fits; else that of config.json, named after the folder.

    Raise UserError for an unsupported architecture, quantised weights and a model other than the named one.
    """
    method = families.quantisation(read_json(source / "config.json"))
    if method not in (None, "mxfp4"):
        raise UserError(f"{source} holds weights quantised with {method!r}: convert the unquantised model, or a GGUF file of it")
    folder = source.resolve().name
    described = Config.from_hf(source / "config.json", name=folder, hf_config={})
    return named_or_described(model_name, [folder], described, source / "config.json", INPUT_AND_TRAINING)


def to_hf(config: Config, prefer: str | None = None) -> dict[str, Any]:
    """Return a config.json that `Config.from_hf` reads as the same model.

    Its architecture is `prefer` if that computes the model, else one of the named model's family, else the first that does. The caller
    adds whether the head is tied, the dtype and the ids of special tokens. Raise UserError with the nearest architecture's differences.
    """
    home = families.home(config.name)
    preferred = [kind for kind in (prefer, config.name) if kind in families.HF]
    problems: dict[str, list[str]] = {}
    for kind in dict.fromkeys((*preferred, *(home.hf if home else ()), *families.HF)):
        try:
            hf = families.HF[kind].write(config.base_dict(), kind)
            different = differences(config, Config(**families.HF[kind].read(hf)))
        except ValueError:  # UserError is one
            continue
        if not different:
            return hf
        problems[kind] = [f"{key} {actual!r} instead of {expected!r}" for key, (expected, actual) in different.items()]
    nearest = min(problems, key=lambda kind: len(problems[kind]), default=None)
    reason = f"; the nearest, {nearest}, has {', '.join(problems[nearest])}" if nearest else ""
    raise UserError(f"no architecture of transformers expresses this model{reason}")


def hf_settings(config: Config, source: Path) -> dict[str, Any]:
    """Return the config.json of a model: the one in its folder `source` or its base's if that describes `config`, else a new one.

    Raises UserError if no architecture of transformers computes the model.
    """
    base = checkpoint.read_hyperparameters(source).get("checkpoint_dir")
    settings: dict[str, Any] = {}
    for folder in (source, *([Path(base)] if isinstance(base, str) else [])):
        if os.path.lexists(folder / "config.json"):
            settings = read_json(folder / "config.json")
            with suppress(UserError):
                if "text_config" not in settings and not differences(Config.from_hf(settings), config, INPUT_AND_TRAINING):
                    return settings
    return to_hf(config, prefer=settings.get("model_type"))


class Content(NamedTuple):
    """An opened weight file."""

    shapes: dict[str, tuple[int, ...]]
    get: Callable[[str], torch.Tensor]
    mapped: bool  # memory-mapped


class Reader:
    """Reads tensors of weight files; one file is open at a time."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self.content: Content | None = None
        self.read = 0

    def open(self, file: Path) -> Content:
        """Open a file. Raise UserError if it is broken."""
        if self.content is None or self.file != file or (self.content.mapped and self.read > RELEASE):
            self.content = None
            require_file(file, "is missing")
            if file.suffix == ".safetensors":
                self.content = _open_safetensors(file)
            else:
                tensors = checkpoint.load_weights(file)
                self.content = Content({name: tuple(t.shape) for name, t in tensors.items()}, tensors.__getitem__, is_mappable(file))
            self.file, self.read = file, 0
        return self.content

    def load(self, file: Path, name: str) -> torch.Tensor:
        """Return a tensor of a file. It stays valid as long as it is held."""
        tensor = self.open(file).get(name)
        self.read += tensor.nbytes
        return tensor

    def stored(self, file: Path) -> dict[str, Stored]:
        """Return every tensor of a file, unread, by its name without torch.compile's prefix."""
        shapes = self.open(file).shapes
        return {name.replace(checkpoint.COMPILED, ""): Stored(shape, partial(self.load, file, name)) for name, shape in shapes.items()}


def open_weights(folder: Path) -> dict[str, Stored]:
    """Return every tensor of the folder's weight files, unread. Raise UserError for missing and broken files."""
    file, reader = checkpoint.hf_weights(folder), Reader()
    if file is None:
        raise UserError(f"{folder} holds no weights: one of {', '.join(checkpoint.WEIGHT_FILES)} is needed")
    if not file.name.endswith(".index.json"):
        return reader.stored(file)
    return {name: stored for shard in read_index(file) for name, stored in reader.stored(folder / shard).items()}


def read_index(index: Path) -> list[str]:
    """Return the names of the files that a `.index.json` lists.

    Raise UserError if a file is missing, or is not a plain file name inside the folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensors to file names")
    shards = sorted(set(weight_map.values()))
    suffix = index.name.removesuffix(".index.json").rpartition(".")[2]
    if bad := [name for name in shards if not _is_plain(name) or not name.endswith(f".{suffix}")]:
        raise UserError(f"{index} names {', '.join(map(repr, bad))}: only plain .{suffix} file names inside the folder are read")
    if missing := [name + kind_note(index.parent / name) for name in shards if not (index.parent / name).is_file()]:
        raise UserError(f"{index.parent} lacks {', '.join(missing)}, named in {index.name}: download the model again")
    return shards


def _is_plain(name: str) -> bool:
    """Return True for the name of a file in the folder itself that every file system accepts."""
    return "/" not in name and "\\" not in name and name.isprintable() and len(name.encode(errors="replace")) <= 255


def _open_safetensors(file: Path) -> Content:
    try:
        content = safe_open(file, framework="pt")
        parts = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file (truncated?): {error}") from None
    if scaled := [f"{name} ({part.get_dtype()})" for name, part in parts.items() if part.get_dtype().startswith(("F4", "F6_", "F8"))]:
        raise UserError(f"{file} holds quantised weights, such as {scaled[0]}: convert the unquantised model")
    return Content({name: tuple(part.get_shape()) for name, part in parts.items()}, content.get_tensor, mapped=True)
