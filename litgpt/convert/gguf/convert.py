"""GGUF files into checkpoint folders."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from litgpt import families
from litgpt.atomic import new_folder
from litgpt.checkpoint import WEIGHTS, save_config
from litgpt.config import Config
from litgpt.convert.compare import INPUT_AND_TRAINING, named_or_described
from litgpt.convert.gguf.config import TOLERANCE, has_offset, read_architecture, read_config, unquantised
from litgpt.convert.gguf.reader import Reader, open_gguf
from litgpt.convert.gguf.rope import FACTORS
from litgpt.convert.gguf.tokenizer import write_tokenizer
from litgpt.convert.names import Stored, fit
from litgpt.convert.write import write_pth
from litgpt.errors import UserError

# Some files do not state the window, but the model's name does.
NOT_COMPARED = (*INPUT_AND_TRAINING, "sliding_window_size", "sliding_window_indices")


def convert_gguf(source: Path, target: Path, model_name: str | None = None, dtype: torch.dtype | None = None) -> Config:
    """Convert the file `source` into the checkpoint folder `target`, one tensor at a time.

    By default fp32 and fp16 files keep their dtype, and quantised weights become bf16, which has about their precision. Raises UserError
    for broken files and for whatever is not supported.
    """
    reader = open_gguf(source)
    _, row = read_architecture(reader)
    require_readable(reader)
    config = choose_config(reader, model_name)
    tied = "output.weight" not in reader.tensors
    kinds = {tensor.kind.name for tensor in reader.tensors.values() if len(tensor.shape) > 1}  # a router may be fp32 among fp16
    dtype = dtype or (torch.float32 if kinds == {"F32"} else torch.float16 if kinds <= {"F32", "F16"} else torch.bfloat16)
    names = row.names(config.base_dict(), joined="blk.0.attn_qkv.weight" in reader.tensors)
    with new_folder(target) as folder:
        write_tokenizer(reader, config, folder)
        save_config(config, folder)
        write_pth(fit(dict(stored(reader, config, dtype)), names, config, str(source), tied, dtype), folder / WEIGHTS)
    return config


def require_readable(reader: Reader) -> None:
    """Raise UserError for tensor types without a dequantiser."""
    from gguf import GGML_QUANT_SIZES, dequantize

    for kind in sorted({tensor.kind for tensor in reader.tensors.values()}):
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise UserError(
                f"{reader.path} has tensors of the type {kind.name}, which cannot be read: use a file with a common type, Q8_0 or Q4_K"
            ) from None


def choose_config(reader: Reader, model_name: str | None) -> Config:
    """Return the named model's config (by `model_name`, the file's name or general.name) if the file fits it, else the file's own."""
    described = read_config(reader)
    by_lower = {name.lower(): name for name in families.names()}
    names = [by_lower.get(name.lower(), name) for name in (unquantised(reader.path), described.name)]
    return named_or_described(model_name, names, described, reader.path, NOT_COMPARED, TOLERANCE)


def stored(reader: Reader, config: Config, dtype: torch.dtype) -> Iterator[tuple[str, Stored]]:
    """Yield every weight under the names of `Gguf.names`, with its shape and a function that loads it in LitGPT's form."""
    for name, tensor in reader.tensors.items():
        if name in FACTORS:
            continue
        module, _, parameter = name.rpartition(".")
        if not module.endswith("_exps") or len(tensor.shape) != 3 or tensor.shape[0] != config.n_expert:
            yield name, Stored(tensor.shape, partial(_load, reader, config, name, dtype))
            continue
        for expert in range(config.n_expert):
            load = partial(reader.load, name, dtype, expert)
            yield f"{module}.{expert}.{parameter}", Stored(tensor.shape[1:], load)


def _load(reader: Reader, config: Config, name: str, dtype: torch.dtype) -> torch.Tensor:
    module = name.rpartition(".")[0]
    if has_offset(config, module):
        return (reader.load(name) - 1).to(dtype)
    weight = reader.load(name, dtype)
    if read_architecture(reader)[1].is_paired(module):
        heads = weight.view(-1, config.head_size // 2, 2, *weight.shape[1:])  # (H, h/2, 2, ...)
        weight = heads.transpose(1, 2).reshape(weight.shape)  # (H, 2, h/2, ...)
    return weight
