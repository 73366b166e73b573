"""Hugging Face folders (config.json, safetensors or .bin, one file or shards) of the families in `names.HF_TABLES`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from litgpt import families as catalog
from litgpt import files
from litgpt.atomic import new_folder
from litgpt.checkpoint import WEIGHTS, copy_tokenizer_files, is_mappable, load_weights, read_hyperparameters, save_config
from litgpt.config import Config
from litgpt.convert.names import IMAGES, TIED_BY_DEFAULT, Stored, fit, hf_table, summary
from litgpt.convert.write import write_pth
from litgpt.errors import UserError

if TYPE_CHECKING:
    import torch

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order of preference."""
RELEASE = 2**27
"""bytes: a memory map is let go and made again after that many have been read, so that its pages do not pile up"""


def convert_hf(source: Path, target: Path, model_name: str | None = None, dtype: torch.dtype | None = None) -> Config:
    """Convert the folder `source` into the checkpoint folder `target`, a tensor at a time. Weights keep their dtype unless one is given.

    Raises UserError for unsupported architectures, broken files, and tensors that do not fit the model.
    """
    settings = read_json(source / "config.json")
    if settings.get("quantization_config"):
        quantised = settings["quantization_config"]
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(f"{source} holds weights quantised with {method!r}: convert the unquantised model, or a GGUF file of it")
    config = choose_config(source, model_name)
    tensors = open_weights(source)
    plan = fit(tensors, hf_table(settings["model_type"], config), config, str(source), is_tied(settings), dtype)
    if images := [name for name in tensors if IMAGES.fullmatch(name)]:
        print(f"{source}: {len(images)} tensors of the image side are left out, the text model is converted.")
    with new_folder(target) as folder:
        copy_tokenizer_files(source, folder)
        shutil.copyfile(source / "config.json", folder / "config.json")
        save_config(config, folder)
        write_pth(plan, folder / WEIGHTS)
    return config


def is_tied(settings: dict[str, Any]) -> bool:
    """Whether a config.json says that the head is the embedding, or its model type does where it is silent."""
    text = settings.get("text_config") or {}
    default = text.get("tie_word_embeddings", settings["model_type"] in TIED_BY_DEFAULT)
    return bool(settings.get("tie_word_embeddings", default))


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


def differences(named: Config, described: Config) -> str:
    """The settings in which two configs compute different things, as text; empty if there are none.

    What bounds the input instead of changing the result, block_size, is left out, and what only training uses.
    """
    left, right = catalog.essence(named), catalog.essence(described)
    different = [key for key in left if key not in ("block_size", "router_aux_loss_coef") and left[key] != right[key]]
    return ", ".join(f"{key} is {right[key]}, expected {left[key]}" for key in different)


def hf_settings(config: Config, source: Path) -> dict[str, Any]:
    """Return the config.json of a model: the one in its folder `source` or its base's if that describes `config`, else a new one.

    Raises UserError if no architecture of transformers computes the model.
    """
    base = read_hyperparameters(source).get("checkpoint_dir")
    settings: dict[str, Any] = {}
    for folder in (source, *([Path(base)] if isinstance(base, str) else [])):
        if (folder / "config.json").is_file():
            settings = read_json(folder / "config.json")
            with suppress(UserError):
                if "text_config" not in settings and not differences(Config.from_hf(settings), config):
                    return settings
    try:
        return catalog.to_hf(config, prefer=settings.get("model_type"))
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


class Content(NamedTuple):
    """An opened weight file."""

    shapes: dict[str, tuple[int, ...]]
    get: Callable[[str], torch.Tensor]
    mapped: bool
    """reading takes pages of the file instead of memory"""


class Reader:
    """Reads tensors of weight files; one file is open at a time."""

    def __init__(self) -> None:
        self.file: Path | None = None
        self.content: Content | None = None
        self.read = 0

    def open(self, file: Path) -> Content:
        """The file's content. Raises UserError if it is broken."""
        if self.content is None or self.file != file or (self.content.mapped and self.read > RELEASE):
            self.content = None
            self.content = _open_safetensors(file) if file.suffix == ".safetensors" else _open_torch(file)
            self.file, self.read = file, 0
        return self.content

    def load(self, file: Path, name: str) -> torch.Tensor:
        """A tensor of a file. It stays valid as long as it is held."""
        tensor = self.open(file).get(name)
        self.read += tensor.nbytes
        return tensor

    def stored(self, file: Path) -> dict[str, Stored]:
        """Every tensor of a file, unread."""
        return {name: Stored(shape, partial(self.load, file, name)) for name, shape in self.open(file).shapes.items()}


def open_weights(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's weight files, not yet read. Raises UserError for missing and broken files."""
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise UserError(f"{folder} holds no weights: one of {', '.join(WEIGHT_FILES)} is needed")
    reader = Reader()
    if not name.endswith(".index.json"):
        return reader.stored(folder / name)
    tensors: dict[str, Stored] = {}
    problems = []
    weight_map = read_index(folder / name)
    for shard in sorted(set(weight_map.values())):
        found = reader.stored(folder / shard)
        announced = [tensor for tensor, place in weight_map.items() if place == shard]
        if absent := [tensor for tensor in announced if tensor not in found]:
            problems.append(f"{shard} lacks {summary(absent)}")
        tensors.update({tensor: stored for tensor, stored in found.items() if weight_map.get(tensor, shard) == shard})
    if problems:
        raise UserError(f"{folder} is not what its {name} says: {'; '.join(problems)}. Download the model again")
    return tensors


def read_index(index: Path) -> dict[str, str]:
    """Which file of the folder holds which tensor, by a `.index.json`.

    Raises UserError if a file is missing, or is not a plain file name inside the folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensors to file names")
    shards = sorted(set(weight_map.values()))
    suffix = index.name.removesuffix(".index.json").rpartition(".")[2]
    if bad := [name for name in shards if not _is_plain(name) or not name.endswith(f".{suffix}")]:
        raise UserError(f"{index} names {', '.join(map(repr, bad))}: only plain .{suffix} file names inside the folder are read")
    if missing := [name for name in shards if not (index.parent / name).is_file()]:
        raise UserError(f"{index.parent} lacks {', '.join(missing)}, named in {index.name}: download the model again")
    return weight_map


def _is_plain(name: str) -> bool:
    """Whether it names a file in the folder itself, as every file system takes it."""
    return "/" not in name and "\\" not in name and name.isprintable() and len(name.encode(errors="replace")) <= 255


def shard_files(index: Path) -> list[Path]:
    """The files that a `.index.json` names, each of which is there."""
    return [index.parent / name for name in sorted(set(read_index(index).values()))]


def _open_safetensors(file: Path) -> Content:
    from safetensors import SafetensorError, safe_open

    try:
        content = safe_open(file, framework="pt")
        shapes = {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file (truncated?): {error}") from None
    return Content(shapes, content.get_tensor, mapped=True)


def _open_torch(file: Path) -> Content:
    tensors = load_weights(file)
    return Content({name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__, is_mappable(file))


def read_json(file: Path) -> dict[str, Any]:
    """The content of a JSON object file."""
    return files.read_json(file, "is missing: a Hugging Face folder holds it")
