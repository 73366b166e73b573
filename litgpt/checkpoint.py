"""Checkpoint folders: load, save, adapters."""

from __future__ import annotations

import importlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.adapters.settings import UNMERGEABLE, model_settings
from litgpt.archive import is_mappable, refuse_compressed, require_full_records
from litgpt.atomic import digest, new_file, require_whole, write_bytes, write_text
from litgpt.config import CHOSEN_TAPS, CORRECTION, Config
from litgpt.errors import UserError
from litgpt.files import decode_text, dump_yaml, json_in, kind_note, parse_object, read_json, read_own, read_yaml
from litgpt.text import first_line
from litgpt.tokenizer import template_files

if TYPE_CHECKING:
    import torch

    from litgpt.lora import GPT as LoRAGPT, Config as LoRAConfig
    from litgpt.model import GPT

WEIGHTS = "lit_model.pth"
COMPILED = "_orig_mod."  # torch.compile's part of a tensor's name
PROMPT_SETTINGS = ("adapter_prompt_length", "adapter_start_layer")  # of LLaMA-Adapter
ADAPTER_WEIGHTS = "lit_model.pth.lora"
ADAPTERS = {ADAPTER_WEIGHTS: "litgpt.lora", "lit_model.pth.adapter": "litgpt.adapter", "lit_model.pth.adapter_v2": "litgpt.adapter_v2"}
PEFT_ADAPTER, PORTABLE_ADAPTER = FOREIGN_ADAPTERS = ("adapter_config.json", "skip2lora_config.json")  # PEFT's; Skip2-LoRA's portable one
READ_AS_IT_IS = "which generate, chat, serve, evaluate and validate read as it is"
BASE = "base.json"  # beside an adapter: sha256, size and modification time of its base's weights
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")  # best first
HOME = Path("checkpoints")  # in the current folder: holds models that are named ORG/NAME, and conversions
HUB_NAME = re.compile(r"[a-zA-Z0-9_][\w.-]*/[a-zA-Z0-9_][\w.-]*")


def save_weights(weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Write a state dict atomically."""
    import torch

    with new_file(Path(path)) as file:
        torch.save(weights, file)


def load_weights(path: str | Path, mapped: bool = True) -> dict[str, torch.Tensor]:
    """Load the tensors of a `.pth` file on the CPU, `mapped` into memory or read, out of a `{"model": {...}}` envelope if there is one.

    Only tensors are unpickled (`weights_only`). Raises UserError for a missing, broken or foreign file.
    """
    import torch

    path = Path(path)
    is_zip = is_mappable(path)
    try:
        if is_zip:
            refuse_compressed(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a foreign file's pickle
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)
            if is_zip:
                require_full_records(path)
    except Exception as error:
        reason = first_line(error)
        if "Weights only load failed" in reason:
            reason = "it holds other Python objects, which could run code: they are not loaded"
        raise UserError(f"{path} is not a readable checkpoint (truncated, or not made of plain tensors): {reason[:200]}") from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in content.items()):
        raise UserError(f"{path} holds no state dict of tensors: it is not what its name says, copy or convert it again")
    for name, value in content.items():
        if reason := _not_plain(value):
            raise UserError(f"{path}: {name} {reason}: save it as an ordinary tensor")
    return {name.replace(COMPILED, ""): value for name, value in content.items()}


def _not_plain(value: torch.Tensor) -> str:
    """Return why a tensor is not dense with all its values in the file; "" if it is."""
    import torch

    is_small = value.is_floating_point() and value.itemsize < 2
    if value.is_nested or value.layout != torch.strided or value.is_neg() or value.is_quantized or is_small:
        return "is not a dense tensor, or is quantised"
    if value.is_meta:
        return "has a shape but no data"
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return "has more elements than numbers are stored"  # an expanded scalar would fill the memory when it is copied
    return ""


def save_config(config: Config, folder: str | Path, chosen: Sequence[int] | None = None) -> None:
    """Write `model_config.yaml` with the base model's fields, and the blocks that `skip2lora_block_indices: auto` chose if it did."""
    taps = {} if chosen is None else {CHOSEN_TAPS: list(chosen)}
    write_text(Path(folder) / "model_config.yaml", dump_yaml({**config.file_dict(), **taps}))


def chosen_taps(folder: str | Path) -> list[int] | None:
    """Return the blocks that `auto` chose for the adapter in this folder, if its `model_config.yaml` names any."""
    values = read_yaml(Path(folder) / "model_config.yaml", f"is missing: it names the blocks that {CHOSEN_TAPS} auto chose")
    return values.get(CHOSEN_TAPS) if isinstance(values, dict) else None


def read_hyperparameters(folder: str | Path) -> dict[str, Any]:
    """Return the settings of the run that wrote the folder; {} if no run did."""
    file = Path(folder) / "hyperparameters.yaml"
    values = read_yaml(file) if os.path.lexists(file) else {}
    if not isinstance(values, dict):
        raise UserError(f"{file} holds no settings: copy it again, or remove it")
    return values


def tokenizer_contents(source: str | Path) -> dict[str, bytes]:
    """Return name and content of each tokenizer and generation file of `source`.

    Without a generation_config.json, one is made from the values that the tokenizer reads in config.json. Raises UserError if a file is a
    link out of the folder, not a regular file, or not what its name says.
    """
    contents: dict[str, bytes] = {}
    for name in dict.fromkeys((*TOKENIZER_FILES, *template_files(source))):
        if (raw := read_own(source, name)) is None:
            continue
        file = Path(source) / name
        if name.endswith(".json"):
            parse_object(decode_text(raw, file), file)
        elif name.endswith(".jinja"):
            decode_text(raw, file)
        elif not _is_tokenizer_model(raw):
            raise UserError(f"{file} is not what its name says: copy it again from where the model came from")
        contents[name] = raw
    config = read_own(source, "config.json")
    if config is not None and "generation_config.json" not in contents:
        content = parse_object(decode_text(config, "config.json"), Path(source) / "config.json")
        ids = {key: value for key, value in content.items() if key in ("bos_token_id", "eos_token_id")}
        contents["generation_config.json"] = (json.dumps(ids) + "\n").encode()
    return contents


def copy_tokenizer_files(source: str | Path, target: str | Path) -> None:
    """Copy `tokenizer_contents`."""
    write_tokenizer(tokenizer_contents(source), target)


def write_tokenizer(contents: Mapping[str, bytes], target: str | Path) -> None:
    """Write the files of `tokenizer_contents` to a folder."""
    for name, raw in contents.items():
        write_bytes(Path(target) / name, raw)


def _is_tokenizer_model(raw: bytes) -> bool:
    """Return True for a SentencePiece model, protobuf that begins with a piece, and for tiktoken's lines of base64 and rank."""
    from google.protobuf.empty_pb2 import Empty
    from google.protobuf.message import DecodeError

    lines = raw.splitlines()
    if lines and all(re.fullmatch(rb"[A-Za-z0-9+/]+={0,2} \d+", line) for line in lines):
        return True
    try:
        Empty.FromString(raw)
    except DecodeError:
        return False
    return raw.startswith(b"\n")


def hf_weights(folder: Path) -> Path | None:
    """Return the weights file of a Hugging Face folder, or the index of several; None if it has none."""
    return next((file for name in WEIGHT_FILES if os.path.lexists(file := folder / name)), None)


def unmergeable(folder: Path, settings: Mapping[str, Any]) -> str:
    """Return the kind of an adapter that the base's weights cannot take in; "" for LoRA."""
    is_lora = adapter_file(folder).name == ADAPTER_WEIGHTS
    return next((kind for key, kind in UNMERGEABLE.items() if settings.get(key)), "" if is_lora else "a LLaMA-Adapter")


def adapter_hint(folder: Path) -> str:
    """Return advice, to end a message, on a folder that holds an adapter or other folders where a model is needed; else ""."""
    if adapter_file(folder).is_file():
        settings: dict[str, Any] = {}
        with suppress(UserError):
            settings = read_hyperparameters(folder)
        if kind := unmergeable(folder, settings):
            base = settings.get("checkpoint_dir")
            return f": it holds {kind}, {READ_AS_IT_IS} and which cannot be merged. To train, name its base ({base})"
        return f": it holds a LoRA adapter, {READ_AS_IT_IS}. `litgpt merge_lora {folder}` makes a checkpoint of it"
    if any((folder / name).is_file() for name in FOREIGN_ADAPTERS):
        command = f"litgpt convert_adapter {folder} OUTPUT_DIR --checkpoint_dir BASE"
        return f": it holds an adapter. `{command}` makes a folder that generate, chat and merge_lora read"
    if best := json_in(folder / "sweep.json").get("best"):
        return f": it holds a sweep, name its best setting {folder / str(best)}"
    names = (WEIGHTS, *ADAPTERS, *FOREIGN_ADAPTERS)
    for inner in sorted(folder.glob("*")):
        for place in (inner, inner / "final", inner / "best"):  # a model, or a run
            if hf_weights(place) or any((place / name).is_file() for name in names):
                return f": the folder {inner.name} in it holds a model or an adapter, name {inner}"
    return ""


def require_checkpoint(folder: str | Path) -> Path:
    """Return the folder. Raises UserError that names the missing files if it does not hold a model."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"checkpoint folder {folder} does not exist: make one with `litgpt convert_to_litgpt`, or check the path")
    missing = [name + kind_note(folder / name) for name in (WEIGHTS, "model_config.yaml") if not (folder / name).is_file()]
    if not has_tokenizer(folder):
        missing.append(f"tokenizer.json{kind_note(folder / 'tokenizer.json')}")
    if missing:
        hint = adapter_hint(folder) or ": copy what is missing, or convert the model again with `litgpt convert_to_litgpt`"
        if hf_weights(folder) and (folder / "config.json").is_file() and not (folder / WEIGHTS).is_file():
            hint = f": it looks like a Hugging Face folder, convert it with `litgpt convert_to_litgpt {folder}`"
        raise UserError(f"checkpoint folder {folder} lacks {', '.join(missing)}{hint}")
    require_whole(folder, WEIGHTS)
    return folder


def require_tokenizer(folder: Path) -> Path:
    """Return the folder. Raises UserError if it holds no tokenizer, and says what it holds."""
    return folder if has_tokenizer(folder) else require_checkpoint(folder)


def extend_checkpoint_dir(checkpoint_dir: str | Path) -> Path:
    """Return `checkpoints/DIR` if that exists and DIR does not, else the path itself. LitGPT's function."""
    path = Path(checkpoint_dir)
    extended = HOME / path
    return extended if not path.exists() and not path.is_absolute() and extended.is_dir() else path


def has_tokenizer(folder: Path) -> bool:
    """Return True if the folder holds a tokenizer."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def empty_model(config: LoRAConfig, weights: dict[str, torch.Tensor], source: str | Path) -> LoRAGPT:
    """Return a model on the meta device, for `load_base`. Raises UserError for sizes that do not fit `weights`, or any machine."""
    from litgpt.device import on_meta

    if config.n_layer > len(weights):
        raise UserError(f"{source} holds {len(weights)} tensors, too few for the {config.n_layer} blocks (n_layer) of model_config.yaml")
    try:
        with on_meta():
            return config.make_model()
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = first_line(error)
        raise UserError(f"{source} cannot be of the sizes that model_config.yaml gives (n_embd {config.n_embd} ...): {reason}") from None


def in_current_layout(weights: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    """Return the weights with the current `attn.qkv`: LitGPT before 0.5 stored the rows of q, k and v by group, as `attn.attn`."""
    import torch

    current = {}
    for name, value in weights.items():
        if ".attn.attn." in name and value.dim() and len(value) == sum(config.qkv_sizes):
            G = config.n_query_groups
            groups = value.unflatten(0, (G, -1))  # (G, (H/G + 2) h, ...)
            parts = groups.split([size // G for size in config.qkv_sizes], dim=1)
            value = torch.cat([part.flatten(0, 1) for part in parts])
        current[name.replace(".attn.attn.", ".attn.qkv.")] = value
    return current


def is_tied(weights: Mapping[str, torch.Tensor], by_value: bool = False) -> bool:
    """Return True if a checkpoint's output layer is its embedding: the same tensor, stored once, or with `by_value` equal to it.

    A trained head is never equal to the embedding by chance.
    """
    embedding, head = weights.get("transformer.wte.weight"), weights.get("lm_head.weight")
    if embedding is None or head is None:
        return embedding is not None
    return head.data_ptr() == embedding.data_ptr() or (by_value and head.dtype == embedding.dtype and head.equal(embedding))


def load_base(model: GPT, weights: dict[str, torch.Tensor], dtype: torch.dtype, source: str | Path) -> None:
    """Load base weights, cast to `dtype`, into a model on the meta device; adapters get fresh fp32 values.

    The head and the embedding share one tensor if they do in `weights`. Raises UserError that lists every missing and unknown weight,
    and every wrong shape.
    """
    from litgpt.adapters.base import renew_adapters

    weights, tied = fitting(model, weights, source)
    cast = {
        name: value.float().clone() if name.endswith(CORRECTION) else value.to(dtype)
        for name, value in weights.items()
        if not (tied and name == "lm_head.weight")
    }
    model.load_state_dict(cast, strict=False, assign=True)
    if tied:
        model.tie_head()
    renew_adapters(model)


def fitting(model: GPT, weights: dict[str, torch.Tensor], source: str | Path) -> tuple[dict[str, torch.Tensor], bool]:
    """Return the weights under the model's names, and whether the head is tied. Raises UserError if they do not fit."""
    from litgpt.adapters.base import adapter_parameters

    config = model.config
    weights = in_current_layout(weights, config)
    tied = is_tied(weights)
    if tied:
        weights = {**weights, "lm_head.weight": weights["transformer.wte.weight"]}
    adapters = adapter_parameters(model, added=True)
    expected = {name.replace(".linear.", "."): value.shape for name, value in model.state_dict().items() if name not in adapters}
    if problems := misfits(weights, expected):
        raise UserError(f"{source} does not fit model {config.name!r}: {'; '.join(problems)}")
    return weights, tied


def misfits(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> list[str]:
    """Return why weights do not match the expected names, shapes and types."""
    problems = [f"{name} is missing" for name in expected if name not in weights]
    for name, value in weights.items():
        if name not in expected:
            problems.append(f"{name} is unknown")
        elif value.shape != expected[name]:
            problems.append(f"{name} has shape {tuple(value.shape)}, not {tuple(expected[name])}")
        elif not value.is_floating_point():
            problems.append(f"{name} has {value.dtype} numbers, not floating ones")
    return problems


def open_base(config: LoRAConfig, base: Path) -> tuple[LoRAGPT, Callable[[Iterable[str]], dict[str, torch.Tensor]]]:
    """Return a model with its base weights on the meta device and fresh adapters, and a function that maps weights of the base by name."""
    from litgpt.adapters.base import renew_adapters

    file = weights_file(base, now=True)
    weights = load_weights(file.path)
    model = empty_model(config, weights, file.path)
    _, tied = fitting(model, weights, file.path)
    if tied:
        model.tie_head()
    renew_adapters(model)

    def read(names: Iterable[str]) -> dict[str, torch.Tensor]:
        sources = {name: "transformer.wte.weight" if tied and name == "lm_head.weight" else name for name in names}
        wanted = {*sources.values(), *(name.replace(".attn.qkv.", ".attn.attn.") for name in sources.values())}
        mapped = in_current_layout({name: value for name, value in load_weights(file.path).items() if name in wanted}, config)
        return {name: mapped[source] for name, source in sources.items()}  # no more of the file is held

    return model, read


def build_sharded(
    config: LoRAConfig, base: Path, dtype: torch.dtype, device: torch.device, mark: Callable[[LoRAGPT], object], offload: bool = False
) -> LoRAGPT:
    """Return the model of `build_model` sharded over all ranks, each of which reads its own rows from the file.

    `mark` marks the trained parameters, and quantises. `offload`: as in `litgpt.sharding.shard`.
    """
    import torch

    from litgpt.adapters.base import renew_sharded
    from litgpt.quantize import rows_in_8_bits
    from litgpt.sharding import shard

    random = torch.get_rng_state()
    model, read = open_base(config, base)
    mark(model)

    def load(names: Iterable[str]) -> dict[str, torch.Tensor]:
        sources = {name: re.sub(r"\.(quantised|scales)$", ".weight", name.replace(".linear.", ".")) for name in names}
        mapped, loaded = read(sources.values()), dict[str, torch.Tensor]()
        for name, source in sources.items():
            leaf = name.rpartition(".")[2]
            loaded[name] = rows_in_8_bits(mapped[source].to(dtype))[leaf] if leaf in ("quantised", "scales") else mapped[source]
        return loaded

    shard(model, device, load, dtype, offload)
    if config.lora_variant != "lora":  # it starts from the base's weights
        torch.set_rng_state(random)
        renew_sharded(model)
    weights_file(base).require_unchanged()
    return model


def build_model(config: LoRAConfig, base: Path, dtype: torch.dtype, mapped: bool = False) -> LoRAGPT:
    """Return a model on the CPU: the weights of checkpoint `base` in `dtype`, fresh adapters. Raises UserError if they do not fit.

    They are copies: others may write to the file. With `mapped`, for a caller that quantises at once, weights already in `dtype` are not.
    """
    file = weights_file(base, now=True)
    weights = load_weights(file.path)
    if not mapped and is_mappable(file.path) and any(value.dtype == dtype for value in weights.values()):
        weights = load_weights(file.path, mapped=False)  # copies of mapped tensors would take twice the memory
    model = empty_model(config, weights, file.path)
    load_base(model, weights, dtype, file.path)
    file.require_unchanged()
    return model


@dataclass(frozen=True)
class WeightsFile:
    """A weights file in the state in which this process read it."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> WeightsFile:
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns)

    def require_unchanged(self) -> None:
        if WeightsFile.of(self.path) != self:
            raise UserError(f"{self.path} was changed while it was read: wait until it is complete, then run the command again")

    @cached_property
    def sha256(self) -> str:
        value = digest(self.path)
        self.require_unchanged()
        return value


_read: dict[Path, WeightsFile] = {}


def weights_file(folder: Path, now: bool = False) -> WeightsFile:
    """Return the weights file of a checkpoint as it was when this process last loaded it, or as it is now."""
    path = folder / WEIGHTS
    if path not in _read or (now and WeightsFile.of(path) != _read[path]):
        _read[path] = WeightsFile.of(path)
    return _read[path]


def save_base(base: Path, folder: Path) -> None:
    """Write `base.json` beside an adapter of the checkpoint `base`."""
    file = weights_file(base)
    write_text(folder / BASE, json.dumps({"sha256": file.sha256, "bytes": file.size, "mtime_ns": file.mtime_ns}) + "\n")


def require_same_base(folder: Path, base: Path) -> None:
    """Raise UserError if the weights of `base` are not those that `base.json` names. An older adapter without one passes."""
    if not os.path.lexists(folder / BASE) or not (base / WEIGHTS).is_file():
        return
    facts, file = read_json(folder / BASE), weights_file(base, now=True)
    if facts.get("bytes") != file.size or (facts.get("mtime_ns") != file.mtime_ns and facts.get("sha256") != file.sha256):
        raise UserError(
            f"{folder} was trained on other weights than {base} holds now: restore {file.path}, or name the folder with the right ones in "
            f"{folder / 'hyperparameters.yaml'} (checkpoint_dir). To use these weights all the same, remove {folder / BASE}"
        )


def load_adapter(model: GPT, weights: dict[str, torch.Tensor], source: str | Path) -> None:
    """Copy an adapter's weights into the model. Raises UserError that lists all that does not fit or is not finite."""
    from litgpt.adapters.base import adapter_parameters
    from litgpt.sharding import assign

    embedding, head = (weights.get(f"{name}.weight") for name in ("transformer.wte", "lm_head"))
    if model.is_tied and embedding is not None and head is not None and not embedding.equal(head):
        model.untie_head()
    own = adapter_parameters(model)
    problems = misfits(weights, {name: parameter.shape for name, parameter in own.items()})
    problems += [f"{name} holds non-finite numbers" for name, value in weights.items() if not value.isfinite().all()]
    if problems:
        raise UserError(f"{source} does not fit the adapter settings beside it: {'; '.join(problems)}")
    for name, value in weights.items():
        assign(own[name], value)


def read_adapter_settings(folder: str | Path, base: str | Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Return the base checkpoint's folder and the adapter settings (`lora_*`, `skip2lora_*`) of an adapter folder.

    They are read from `hyperparameters.yaml`, as in LitGPT; `base` takes precedence. The blocks that "auto" chose are in
    `model_config.yaml`. Raises UserError if any is missing.
    """
    file = Path(folder) / "hyperparameters.yaml"
    values = read_yaml(file, "is missing: an adapter folder holds it")
    if not isinstance(values, dict) or not (base or isinstance(values.get("checkpoint_dir"), str)):
        raise UserError(f"{file} must hold the adapter's settings and its base's checkpoint_dir, but does not")
    base = extend_checkpoint_dir(base or values["checkpoint_dir"])  # LitGPT writes the model's name as the command had it
    if adapter_file(folder).name != ADAPTER_WEIGHTS:
        return base, {key: values[key] for key in PROMPT_SETTINGS if key in values}
    try:
        settings = model_settings(values)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if str(settings.get(CHOSEN_TAPS)).startswith("auto"):
        settings[CHOSEN_TAPS] = chosen_taps(folder)
        if not isinstance(settings[CHOSEN_TAPS], list):
            named = Path(folder) / "model_config.yaml"
            raise UserError(f"{named} must name the blocks that auto chose, in {CHOSEN_TAPS}, but does not: name them in {file}")
    return base, settings


def adapter_settings(folder: str | Path, base: str | Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Return `read_adapter_settings`. Raises UserError if the base is missing, or has other weights than it had, too."""
    base, settings = read_adapter_settings(folder, base)
    if not base.is_dir():
        file = Path(folder) / "hyperparameters.yaml"
        raise UserError(f"{file} names {base} as the adapter's base checkpoint, and there is no such folder: correct checkpoint_dir there")
    require_same_base(Path(folder), base)
    return base, settings


def is_adapter_folder(folder: str | Path) -> bool:
    """Return True if the folder holds an adapter and no complete model."""
    return os.path.lexists(adapter_file(folder)) and not (Path(folder) / WEIGHTS).is_file()


def adapter_file(folder: str | Path) -> Path:
    """Return the file with the adapter's weights in a folder; LoRA's name if there is none."""
    files = [Path(folder) / name for name in ADAPTERS]
    return next((file for file in files if os.path.lexists(file)), files[0])


def adapted_config(folder: str | Path, base: Path, settings: Mapping[str, Any]) -> LoRAConfig:
    """Return the config of `base` with the adapter of a folder, whose settings are given. A UserError names hyperparameters.yaml."""
    kind = importlib.import_module(ADAPTERS[adapter_file(folder).name]).Config
    try:
        return kind.from_checkpoint(base, **settings)
    except UserError as error:
        raise UserError(f"{Path(folder) / 'hyperparameters.yaml'}: {error}") from None


def adapted(folder: str | Path, base: str | Path | None = None) -> tuple[Path, LoRAConfig]:
    """Return the base of an adapter folder, by default the one in hyperparameters.yaml, and its config with the adapter."""
    from litgpt.lora import Config as LoRAConfig

    base, settings = adapter_settings(folder, base)
    LoRAConfig.from_checkpoint(require_checkpoint(base))  # its own faults are not blamed on the settings
    return base, adapted_config(folder, base, settings)


def has_base(folder: Path) -> bool:
    """Return True if a folder holds LoRA or Skip2-LoRA, and its base is there with the weights that it had."""
    try:
        return (folder / ADAPTER_WEIGHTS).is_file() and (adapter_settings(folder)[0] / WEIGHTS).is_file()
    except UserError:
        return False


def load_model(
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    base: str | Path | None = None,
    quantize: str | None = None,
    sharded: bool = False,
) -> GPT:
    """Load a model to run (eval mode, nothing trainable) from a base or merged checkpoint, or from an adapter folder and its base.

    A folder with both merged weights and an adapter is read as base and adapter if it `has_base` and the merged weights or `dtype` are
    below fp32, where merging rounds away part of LoRA.

    `base`: the adapter's base checkpoint (default: that of hyperparameters.yaml). `quantize`: a mode of `litgpt.quantize`. `sharded`: over
    all ranks of a run.
    """
    import torch

    from litgpt.lora import Config as LoRAConfig

    require_whole(folder, *ADAPTERS, WEIGHTS)
    adapter = is_adapter_folder(folder)
    if not adapter and has_base(Path(folder)):
        adapter = dtype.itemsize < 4 or any(value.dtype.itemsize < 4 for value in load_weights(Path(folder) / WEIGHTS).values())
    if adapter:
        base, config = adapted(folder, base)
    else:
        base = require_checkpoint(folder)
        config = LoRAConfig.from_checkpoint(base)
    if sharded:
        model = build_sharded(config, base, dtype, torch.device(device), lambda model: model.requires_grad_(False))
    else:
        model = build_model(config, base, dtype, mapped=quantize is not None)
    if adapter:
        file = adapter_file(folder)
        load_adapter(model, load_weights(file), file)
    if quantize is not None:
        from litgpt.quantize import quantise

        quantise(model, quantize)
    return model.to(device).eval().requires_grad_(False)
