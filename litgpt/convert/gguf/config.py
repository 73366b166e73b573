"""A GGUF file's metadata and the `litgpt.Config` that it describes, both ways.

`read_config` turns keys into fields, `plan` turns fields into keys. A writer reads its plan before it writes the file: if that gives a
config that computes something else (`differences`), GGUF cannot express the model, and nothing is lost silently.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from litgpt import families
from litgpt.config import Config
from litgpt.convert.gguf import stem
from litgpt.convert.gguf.reader import Source
from litgpt.convert.gguf.rope import read_scaling, write_scaling
from litgpt.errors import UserError
from litgpt.families._gguf import INTEGERS, NEUTRAL, NORM_EPS, REALS, REQUIRED, SHARED, Gguf
from litgpt.families._rope import whole

QUANTISATION = re.compile(r"[-._](i?q\d\w*|tq\d\w*|b?f16|f32|fp16|fp32|mxfp4\w*)$", re.IGNORECASE)  # at the end of a file's name
PADDING = re.compile(r"\[PAD\d+\]")  # entries that fill the vocabulary up to the rows of the embedding
# Our own key, for architectures whose models differ in it: llama.cpp knows only "tanh", and takes it for the other too.
GELU = "litgpt.gelu_approximate"
TOLERANCE = 1e-6  # of fp32


@dataclass
class Plan(Source):
    """The content of a file to be written, without weights."""

    path: Path
    architecture: str
    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]  # of all tensors
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # the rotary tables among them

    def array(self, name: str) -> np.ndarray:
        return self.arrays[name]


def read_architecture(source: Source) -> tuple[str, Gguf]:
    """Return `general.architecture` and its row. Raise UserError for unknown ones, and for files that hold no model."""
    kind, name = (source.get(f"general.{key}", str, default) for key, default in (("type", "model"), ("architecture", None)))
    if kind != "model":
        raise UserError(
            f"{source.path} is not a model: its general.type is {kind!r}. Name a model file; for an adapter, convert its PEFT folder with "
            "`litgpt convert_adapter`"
        )
    if name not in families.GGUF:
        raise UserError(f"{source.path} has the unsupported architecture {name!r}; supported are {', '.join(sorted(families.GGUF))}")
    return name, families.GGUF[name]


def read_config(source: Source) -> Config:
    """Return the model that metadata and tensors describe. Raise UserError for what is missing, impossible or not supported."""
    name, row = read_architecture(source)
    for key, neutral in NEUTRAL.items():
        if (value := source.metadata.get(f"{name}.{key}", neutral)) != neutral:
            raise UserError(f"{source.path}: {name}.{key} is {value}, but only {neutral} is supported")
    fields = {"bias": False, "attn_bias": False, **row.fields, **read_keys(source, name, row), **read_vocabulary(source)}
    fields |= read_tensors(source, row, fields)
    if fields.get("n_expert"):
        fields["mlp_class_name"] = "LLaMAMoE"
    fields |= read_heads(source, name, row, fields)
    fields |= read_blocks(source, name, row, fields)
    try:
        if not row.fields.get("learned_positions"):
            fields |= read_scaling(source, name, Config(**fields))
        return Config(**fields)
    except UserError as error:
        raise UserError(f"{source.path}: {error}" if str(source.path) not in str(error) else str(error)) from None


def read_keys(source: Source, name: str, row: Gguf) -> dict[str, Any]:
    """Return the fields that keys of the metadata state."""
    fields: dict[str, Any] = {}
    for key, target in INTEGERS.items():
        value = source.metadata.get(f"{name}.{key}", None if key in REQUIRED else 0)
        if key in (*SHARED, *row.keys) and not (isinstance(value, int) and value == 0 and key not in REQUIRED):
            fields[target] = source.size(f"{name}.{key}")
    for key, target in REALS.items():
        if key in (*SHARED, *row.keys) and f"{name}.{key}" in source.metadata:
            fields[target] = whole(source.real(f"{name}.{key}"))
    fields["norm_eps"] = source.real(f"{name}.{NORM_EPS[row.fields.get('norm_class_name', 'LayerNorm')]}")
    if "use_parallel_residual" in row.keys:
        fields["parallel_residual"] = source.get(f"{name}.use_parallel_residual", bool, True)
    if "attention.scale" in row.keys and f"{name}.attention.scale" in source.metadata:
        fields["attention_scores_scalar"] = whole(source.real(f"{name}.attention.scale") ** -2)
    if GELU in source.metadata and "gelu_approximate" not in row.fields:
        fields["gelu_approximate"] = source.get(GELU, str)
    return fields


def read_vocabulary(source: Source) -> dict[str, Any]:
    """Return the model's name and the sizes of the vocabulary."""
    if (embedding := source.shapes.get("token_embd.weight")) is None:
        raise UserError(f"{source.path} has no tensor token_embd.weight")
    if len(tokens := source.get("tokenizer.ggml.tokens", list)) > embedding[0]:
        raise UserError(f"{source.path}: {len(tokens)} tokens (tokenizer.ggml.tokens) for the {embedding[0]} rows of token_embd.weight")
    name = source.get("general.name", str, unquantised(source.path)).strip()
    return {
        "name": re.sub(r"\s+", "-", name),
        "vocab_size": len(tokens) - padding(tokens),
        "padded_vocab_size": embedding[0],
    }


def unquantised(file: Path) -> str:
    """Return the name of a file without its ending, the number of a part, and the quantisation."""
    return QUANTISATION.sub("", stem(file))


def padding(tokens: list[Any]) -> int:
    """Return the number of padding tokens at the end of the vocabulary."""
    return len(list(takewhile(PADDING.fullmatch, map(str, tokens[:0:-1]))))


def read_tensors(source: Source, row: Gguf, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that only the presence of tensors determines: biases, a norm that attention and MLP share."""
    names = source.shapes
    bias = "blk.0.attn_output.bias" in names
    attn_bias = not bias and ("blk.0.attn_q.bias" in names or "blk.0.attn_qkv.bias" in names)
    shared = fields.get("parallel_residual", True) and not any(f"blk.0.{norm}.weight" in names for norm in ("ffn_norm", "attn_norm_2"))
    return {
        "shared_attention_norm": row.fields.get("shared_attention_norm", shared),
        **{key: value for key, value in (("bias", bias), ("attn_bias", attn_bias)) if key in row.by_tensors},
    }


def read_heads(source: Source, name: str, row: Gguf, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the size of a head, and the rotated share of it."""
    head_size = fields.get("head_size", fields["n_embd"] // fields["n_head"])
    if head_size < 1:
        raise UserError(f"{source.path}: {fields['n_head']} heads ({name}.attention.head_count) for an embedding of {fields['n_embd']}")
    if (size := source.size(f"{name}.attention.value_length", head_size)) != head_size:
        raise UserError(f"{source.path}: {name}.attention.value_length is {size}, but only the size of the keys, {head_size}, is supported")
    result: dict[str, Any] = {"head_size": head_size}
    if row.square_heads != -1:
        square = fields["n_layer"] == row.square_heads
        result["attention_scores_scalar"] = fields["n_embd"] // fields["n_head"] if square else head_size
    if row.fields.get("learned_positions"):
        return result
    rotated = source.size(f"{name}.rope.dimension_count", head_size)
    if rotated > head_size or rotated % 2 or (row.paired and rotated != head_size):
        only = "the whole head" if row.paired else "an even number up to the head size"
        raise UserError(f"{source.path}: {name}.rope.dimension_count is {rotated}, but only {only}, here {head_size}, is supported")
    return {**result, "rotary_percentage": rotated / head_size}


def read_blocks(source: Source, name: str, row: Gguf, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the blocks with a sliding window, and the rotary base of each."""
    n_layer = fields["n_layer"]
    if n_layer > len(source.shapes):
        raise UserError(f"{source.path} has {n_layer} blocks ({name}.block_count), but only {len(source.shapes)} tensors")
    if row.rest_period:
        return {"rope_indices": [-1 if (block + 1) % row.rest_period == 0 else 0 for block in range(n_layer)]}
    if "sliding_window_size" not in fields:
        return {}
    pattern = f"{name}.attention.sliding_window_pattern"
    period = row.window_period
    if pattern in source.metadata:
        period = source.get(pattern, (int, list, np.ndarray))
    if isinstance(period, int):
        windowed = [int(period == 0 or (block + 1) % period != 0) for block in range(n_layer)]
    else:
        windowed = [int(bool(entry)) for entry in period]
    result: dict[str, Any] = {"sliding_window_indices": windowed}
    if "rope.freq_base_swa" in row.keys:
        result |= {"rope_indices": windowed, "rope_local_base_freq": fields.get("rope_local_base_freq", 10000)}
    return result


def plan(path: Path, name: str, config: Config, shapes: Mapping[str, tuple[int, ...]], tokens: list[str]) -> Plan:
    """Return the file at `path` for a model of the architecture `name`, whose weights have the `shapes`."""
    row = families.GGUF[name]
    metadata: dict[str, Any] = {"general.architecture": name, "general.name": config.name, "tokenizer.ggml.tokens": tokens}
    for table in (INTEGERS, REALS):
        for key, target in table.items():
            value = getattr(config, target)
            if key in (*SHARED, *row.keys) and value:
                metadata[f"{name}.{key}"] = value if table is INTEGERS else float(value)
    metadata[f"{name}.attention.value_length"] = config.head_size
    metadata[f"{name}.{NORM_EPS[config.norm_class_name]}"] = float(config.norm_eps)
    metadata[f"{name}.vocab_size"] = config.V
    if "use_parallel_residual" in row.keys:
        metadata[f"{name}.use_parallel_residual"] = config.parallel_residual
    if config.mlp_class_name == "GptNeoxMLP" and "gelu_approximate" not in row.fields:
        metadata[GELU] = config.gelu_approximate
    if "attention.scale" in row.keys:
        metadata[f"{name}.attention.scale"] = float(config.attention_scores_scalar or config.head_size) ** -0.5
    if config.learned_positions:
        del metadata[f"{name}.rope.freq_base"]
        return Plan(path, name, metadata, dict(shapes))
    scaling, tables = write_scaling(name, config)
    metadata |= {f"{name}.rope.dimension_count": config.rope_n_elem, **scaling}
    return Plan(path, name, metadata, {**shapes, **{tensor: array.shape for tensor, array in tables.items()}}, tables)


def has_offset(config: Config, module: str) -> bool:
    """Return True if a tensor is stored with 1 added."""
    return config.unit_offset and module.endswith("_norm")
