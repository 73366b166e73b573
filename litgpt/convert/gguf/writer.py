"""Convert checkpoint folders into GGUF files."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from litgpt import checkpoint, families
from litgpt.atomic import new_file
from litgpt.config import Config
from litgpt.convert.compare import INPUT_AND_TRAINING, differences
from litgpt.convert.gguf.config import TOLERANCE, Plan, has_offset, plan, read_config
from litgpt.convert.gguf.reader import CHUNK
from litgpt.convert.gguf.vocabulary import vocabulary
from litgpt.convert.hf import hf_settings
from litgpt.convert.litgpt import open_own
from litgpt.convert.names import Load, Slot, shapes, slots, stored_form, stored_shape, summary
from litgpt.errors import UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # formats in blocks of 32 numbers, which the gguf library writes
FINER = ("token_embd.weight", "output.weight")  # Q8_0 where others have fewer bits; llama.cpp takes Q6_K for them
# As llama.cpp has it; vectors are fp32 too.
ALWAYS_F32 = re.compile(r".*_norm(_2)?\.weight|.*\.ffn_gate_inp\.weight|position_embd\.weight|.*\.bias")


class Group(NamedTuple):
    """The LitGPT tensors that one GGUF tensor holds: one, or the stacked experts of a block."""

    slots: list[Slot]
    shape: tuple[int, ...]


def write_gguf(source: Path, target: Path, dtype: str | None = None, overwrite: bool = True) -> str:
    """Write the checkpoint folder `source` to the file `target`, one tensor at a time, under another name until it is complete.

    `dtype` ("f32", "q8_0" ...) defaults to the weights' own. Returns the architecture. Raises UserError for a model or a tokenizer that
    GGUF cannot describe.
    """
    config, file = Config.from_checkpoint(source), source / checkpoint.WEIGHTS
    loads = {key: load for keys, load in open_own(file, config).items() for key in keys}
    own = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
    kind = (dtype or own.get(checkpoint.load_weights(file)["transformer.wte.weight"].dtype, "f32")).upper()
    made, groups = describe(source, target)
    with new_file(target, overwrite) as new:
        _write(Path(new.name), made, groups, config, loads, kind)
    return made.architecture


def describe(source: Path, target: Path) -> tuple[Plan, dict[str, Group]]:
    """Return the file `target` for the checkpoint folder `source`, and its tensors. Raises UserError for what GGUF cannot describe."""
    config = Config.from_checkpoint(source)
    try:
        model_type = hf_settings(config, source)["model_type"]
    except UserError:  # transformers has no such model
        model_type = ""
    tied = checkpoint.is_tied(checkpoint.load_weights(source / checkpoint.WEIGHTS), by_value=True)
    return choose(config, vocabulary(source, config.V), target, tied, model_type)


def has_gguf(config: Config) -> bool:
    """Return True if a GGUF file can hold the model; its tokenizer is not checked."""
    plain = Config(**config.base_dict())
    try:
        choose(plain, {"tokenizer.ggml.tokens": [""] * plain.vocab_size}, Path("model.gguf"), False, "")
    except UserError:
        return False
    return True


def choose(config: Config, words: Mapping[str, Any], target: Path, tied: bool, model_type: str) -> tuple[Plan, dict[str, Group]]:
    """Return the first architecture that computes what `config` computes, those of the hub's `model_type` first, and its tensors.

    `words` is the tokenizer's metadata. Raises UserError that states how the nearest architecture differs.
    """
    ordered = sorted(families.GGUF, key=lambda name: name != model_type and model_type not in families.GGUF[name].hub)
    keys = shapes(config, config.name)
    problems: dict[str, list[str]] = {}
    for name in ordered:
        groups = group(name, config, keys, tied)
        made = plan(target, name, config, {tensor: entry.shape for tensor, entry in groups.items()}, words["tokenizer.ggml.tokens"])
        made.metadata.update(words)
        lacking = keys.keys() - {key for entry in groups.values() for slot in entry.slots for key in slot.keys} - {"lm_head.weight"}
        lacking |= {tensor for tensor in (*groups, *made.arrays) if not has_tensor(name, tensor)}
        problems[name] = [f"no place for {summary(sorted(lacking))}"] if lacking else []
        try:
            differing = differences(config, read_config(made), INPUT_AND_TRAINING, TOLERANCE)
            problems[name] += [f"{key} {stated!r} instead of {wanted!r}" for key, (wanted, stated) in differing.items()]
        except UserError as error:
            problems[name].append(str(error).removeprefix(f"{target}: ").removeprefix(f"{target} has "))
        if not problems[name]:
            return made, groups
    nearest = min(problems, key=lambda name: len(problems[name]))
    raise UserError(f"no architecture of GGUF expresses this model; the nearest, {nearest}, has {', '.join(problems[nearest])}")


def unwindowed(architecture: str, source: Path) -> int | None:
    """Return the size of a model's sliding window if it is shorter than the context and llama.cpp does not apply it."""
    config = Config.from_checkpoint(source)
    window = config.sliding_window_size if any(config.sliding_window_indices or ()) else None
    return window if window is not None and window < config.block_size and not families.GGUF[architecture].window_period else None


def has_tensor(architecture: str, name: str) -> bool:
    """Return True if llama.cpp knows such a tensor for the architecture."""
    from gguf.constants import MODEL_ARCH_NAMES, MODEL_TENSORS, TENSOR_NAMES

    kind = next(kind for kind, text in MODEL_ARCH_NAMES.items() if text == architecture)
    module = re.sub(r"^blk\.\d+\.", "blk.{bid}.", name.rpartition(".")[0])
    return any(TENSOR_NAMES[tensor] == module for tensor in MODEL_TENSORS[kind])


def group(architecture: str, config: Config, keys: Mapping[str, tuple[int, ...]], tied: bool) -> dict[str, Group]:
    """Return the content of each tensor of the file. A tied head is not stored."""
    by_name: dict[str, list[Slot]] = {}
    row = families.GGUF[architecture]
    for name, slot in slots(row.names(config.base_dict(), row.joined), config, keys).items():
        if not (tied and slot.key == "lm_head.weight"):
            by_name.setdefault(re.sub(r"_exps\.\d+", "_exps", name), []).append(slot)
    return {
        name: Group(entry, (*((len(entry),) if "_exps." in name else ()), *stored_shape(entry[0], config, keys)))
        for name, entry in by_name.items()
    }


def _write(path: Path, made: Plan, groups: Mapping[str, Group], config: Config, loads: Mapping[str, Load], wanted: str) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType

    with closing(GGUFWriter(path, made.architecture)) as writer:
        writer.add_file_type(LlamaFileType["ALL_F32" if wanted == "F32" else f"MOSTLY_{wanted}"])
        if wanted in BLOCKS:
            writer.add_quantization_version(2)
        add: dict[type, Callable[[str, Any], None]] = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add |= {str: writer.add_string, list: writer.add_array}
        for key, value in made.metadata.items():
            if key != "general.architecture":
                add[type(value)](key, value)
        kinds = {name: GGMLQuantizationType[kind_of(name, entry.shape, wanted)] for name, entry in groups.items()}
        for name, factors in made.arrays.items():
            writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
        for name, entry in groups.items():
            block, size = GGML_QUANT_SIZES[kinds[name]]
            in_bytes = (*entry.shape[:-1], entry.shape[-1] // block * size)
            writer.add_tensor_info(name, in_bytes, np.dtype(np.uint8), math.prod(in_bytes), raw_dtype=kinds[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for factors in made.arrays.values():
            writer.write_tensor_data(factors)
        for name, entry in groups.items():
            writer.write_tensor_data(encoded(stored(name, entry, made.architecture, config, loads), kinds[name], f"{made.path}: {name}"))


def kind_of(name: str, shape: tuple[int, ...], wanted: str) -> str:
    """Return the number format of a tensor. Blocks need rows of a multiple of 32 numbers; tensors without are F16, as in llama.cpp."""
    if len(shape) == 1 or ALWAYS_F32.fullmatch(name):
        return "F32"
    if wanted not in BLOCKS:
        return wanted
    return "F16" if shape[-1] % 32 else "Q8_0" if name in FINER else wanted


def stored(name: str, entry: Group, architecture: str, config: Config, loads: Mapping[str, Load]) -> torch.Tensor:
    """Return a tensor in the file's form: the reverse of `gguf.convert.stored`."""
    module = name.rpartition(".")[0]
    parts = [stored_form(slot, config, loads) for slot in entry.slots]
    weight = parts[0] if len(parts) == 1 else torch.stack(parts)
    if has_offset(config, module):
        return weight.float() + 1
    if families.GGUF[architecture].is_paired(module):
        heads = weight.view(-1, 2, config.head_size // 2, *weight.shape[1:])  # (H, 2, h/2, ...)
        return heads.transpose(1, 2).reshape(weight.shape)  # (H, h/2, 2, ...)
    return weight.view(entry.shape)


def encoded(weight: torch.Tensor, kind: GGMLQuantizationType, where: str) -> np.ndarray:
    """Return the bytes of a tensor in a file's format. Raises UserError, `where`, for a finite number that F16 cannot hold."""
    from gguf import quantize

    if kind.name in BLOCKS:
        rows = weight.reshape(-1, weight.shape[-1])
        return np.concatenate([quantize(part.float().numpy(), kind) for part in rows.split(max(1, CHUNK // rows.shape[1]))])
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind.name]
    cast = weight.to(dtype).contiguous()
    if kind.name == "F16" and not torch.equal(cast.isfinite(), weight.isfinite()):
        raise UserError(f"{where} holds numbers above 65504, the largest of F16: write the file with --dtype bf16 or f32")
    numbers: np.ndarray = cast.view(torch.uint8).numpy()
    return numbers
