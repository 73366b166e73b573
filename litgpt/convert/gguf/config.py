"""A GGUF file's metadata and the `litgpt.Config` that it describes, both ways.

`read_config` turns keys into fields, `plan` turns fields into keys. Who writes a file reads the plan of it first: if that gives a config
that computes something else (`differences`), GGUF has no words for the model, and nothing is lost in silence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt import families as catalog
from litgpt.config import Config
from litgpt.convert.gguf.names import ARCHITECTURES, Architecture
from litgpt.convert.gguf.reader import Settings, Source
from litgpt.errors import UserError
from litgpt.families._rope import long_attention_factor

if TYPE_CHECKING:
    import numpy as np

QUANTISATION = re.compile(r"[-._](i?q\d\w*|tq\d\w*|b?f16|f32|fp16|fp32|mxfp4\w*)$", re.IGNORECASE)
"""The end of a file's name that says how it is quantised."""
PADDING = re.compile(r"\[PAD\d+\]")
"""Entries of the vocabulary that fill it up to the rows of the embedding."""

SIZES = {
    "context_length": "block_size",
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "n_head",
    "attention.head_count_kv": "n_query_groups",
    "attention.key_length": "head_size",
    "attention.sliding_window": "sliding_window_size",
    "expert_count": "n_expert",
    "expert_used_count": "n_expert_per_token",
    "expert_feed_forward_length": "moe_intermediate_size",
}
REALS = {
    "rope.freq_base": "rope_base",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attention_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
NORM_EPS = {"RMSNorm": "attention.layer_norm_rms_epsilon", "LayerNorm": "attention.layer_norm_epsilon"}
REQUIRED = ("context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count")
SHARED = (*REQUIRED, "attention.head_count_kv", "attention.key_length", "rope.freq_base")
"""The keys of SIZES and REALS that every architecture has; the others belong to those that name them."""
NEUTRAL: dict[str, Any] = {
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.causal": True,
    "expert_shared_count": 0,
    "expert_gating_func": 1,
    "expert_weights_scale": 1,
    "leading_dense_block_count": 0,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
}
"""Keys that may say one thing only, for anything else is not built."""
LLAMA_3 = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))
"""factor, low_freq_factor, high_freq_factor, original_max_seq_len of Llama 3.1 and 3.2"""
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
GELU = "litgpt.gelu_approximate"
"""Our own key, for architectures whose models differ in it: llama.cpp knows only "tanh", and takes it for the other too."""
UNSAID = ("block_size", "router_aux_loss_coef")
"""What bounds the input instead of changing the result, and what only training uses."""


@dataclass
class Plan:
    """What a file to be written holds besides weights."""

    path: Path
    architecture: str
    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    """of all tensors"""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """the rotary tables among them"""

    def array(self, name: str) -> np.ndarray:
        return self.arrays[name]


def read_architecture(source: Source) -> tuple[str, Architecture]:
    """`general.architecture`, and what is known of it. Raises UserError for unknown ones."""
    name = Settings(source).get("general.architecture", str)
    if name not in ARCHITECTURES:
        raise UserError(f"{source.path} has the architecture {name!r}, supported are {', '.join(ARCHITECTURES)}")
    return name, ARCHITECTURES[name]


def read_config(source: Source) -> Config:
    """The model that metadata and tensors describe. Raises UserError for what is missing, impossible or not supported."""
    settings = Settings(source)
    name, architecture = read_architecture(source)
    for key, neutral in NEUTRAL.items():
        if (found := settings.values.get(f"{name}.{key}", neutral)) != neutral:
            raise UserError(f"{source.path}: {name}.{key} is {found}, supported is only {neutral}")
    fields: dict[str, Any] = dict(architecture.fields)
    for key, target in SIZES.items():
        given = settings.values.get(f"{name}.{key}", None if key in REQUIRED else 0)
        if key in (*SHARED, *architecture.keys) and not (isinstance(given, int) and given == 0 and key not in REQUIRED):
            fields[target] = settings.size(f"{name}.{key}")
    for key, target in REALS.items():
        if key in (*SHARED, *architecture.keys) and f"{name}.{key}" in settings.values:
            fields[target] = whole(settings.real(f"{name}.{key}"))
    fields["norm_eps"] = settings.real(f"{name}.{NORM_EPS[fields['norm_class_name']]}")
    if "use_parallel_residual" in architecture.keys:
        fields["parallel_residual"] = settings.get(f"{name}.use_parallel_residual", bool, True)
    if "attention.scale" in architecture.keys and f"{name}.attention.scale" in settings.values:
        fields["attention_scores_scalar"] = whole(settings.real(f"{name}.attention.scale") ** -2)
    if GELU in settings.values and "gelu_approximate" not in fields:
        fields["gelu_approximate"] = settings.get(GELU, str)
    fields |= read_vocabulary(source)
    fields = {**read_tensors(source, fields.get("parallel_residual", True)), **fields}
    if fields.get("n_expert"):
        fields["mlp_class_name"] = "LLaMAMoE"
    fields |= read_heads(source, name, architecture, fields)
    fields |= read_blocks(source, name, architecture, fields)
    try:
        if not architecture.fields.get("learned_positions"):
            fields |= read_scaling(source, name, Config(**fields))
        return Config(**fields)
    except UserError as error:
        raise UserError(f"{source.path}: {error}" if str(source.path) not in str(error) else str(error)) from None


def whole(value: float) -> Any:
    """The number as an int if it is one: configs hold 10000, not 10000.0."""
    return int(value) if value.is_integer() else value


def read_vocabulary(source: Source) -> dict[str, Any]:
    """Name and sizes of the vocabulary."""
    settings = Settings(source)
    if (embedding := source.shapes.get("token_embd.weight")) is None:
        raise UserError(f"{source.path} has no tensor token_embd.weight")
    if len(tokens := settings.get("tokenizer.ggml.tokens", list)) > embedding[0]:
        raise UserError(f"{source.path}: {len(tokens)} tokens (tokenizer.ggml.tokens) for the {embedding[0]} rows of token_embd.weight")
    name = settings.get("general.name", str, QUANTISATION.sub("", source.path.stem)).strip()
    return {
        "name": re.sub(r"\s+", "-", name),
        "vocab_size": len(tokens) - padding(tokens),
        "padded_vocab_size": embedding[0],
    }


def padding(tokens: list[Any]) -> int:
    """How many of the last tokens only fill up the vocabulary."""
    count = 0
    while count < len(tokens) - 1 and PADDING.fullmatch(str(tokens[-1 - count])):
        count += 1
    return count


def read_tensors(source: Source, parallel: bool) -> dict[str, Any]:
    """What only the presence of tensors tells: biases, a norm that attention and MLP share."""
    names = source.shapes
    bias = "blk.0.attn_output.bias" in names
    return {
        "bias": bias,
        "attn_bias": not bias and ("blk.0.attn_q.bias" in names or "blk.0.attn_qkv.bias" in names),
        "lm_head_bias": "output.bias" in names,
        "shared_attention_norm": parallel and not any(f"blk.0.{norm}.weight" in names for norm in ("ffn_norm", "attn_norm_2")),
    }


def read_heads(source: Source, name: str, architecture: Architecture, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The size of a head, and how much of it is rotated."""
    settings = Settings(source)
    head_size = fields.get("head_size", fields["n_embd"] // fields["n_head"])
    if head_size < 1:
        raise UserError(f"{source.path}: {fields['n_head']} heads ({name}.attention.head_count) for an embedding of {fields['n_embd']}")
    if (found := settings.size(f"{name}.attention.value_length", head_size)) != head_size:
        raise UserError(
            f"{source.path}: {name}.attention.value_length is {found}, supported is only the size of the keys, here {head_size}"
        )
    result: dict[str, Any] = {"head_size": head_size}
    if architecture.square_heads != -1:
        square = fields["n_layer"] == architecture.square_heads
        result["attention_scores_scalar"] = fields["n_embd"] // fields["n_head"] if square else head_size
    if architecture.fields.get("learned_positions"):
        return result
    rotated = settings.size(f"{name}.rope.dimension_count", head_size)
    if rotated > head_size or rotated % 2 or (architecture.paired and rotated != head_size):
        only = "the whole head" if architecture.paired else "an even number up to the head"
        raise UserError(f"{source.path}: {name}.rope.dimension_count is {rotated}, supported is only {only}, here {head_size}")
    return {**result, "rotary_percentage": rotated / head_size}


def read_blocks(source: Source, name: str, architecture: Architecture, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Which blocks attend within a window only, and which rotate by which base."""
    import numpy as np

    settings, n_layer = Settings(source), fields["n_layer"]
    if n_layer > len(source.shapes):
        raise UserError(f"{source.path} has {n_layer} blocks ({name}.block_count), but only {len(source.shapes)} tensors")
    if architecture.rest_period:
        return {"rope_indices": [-1 if (block + 1) % architecture.rest_period == 0 else 0 for block in range(n_layer)]}
    if "sliding_window_size" not in fields:
        return {}
    pattern = f"{name}.attention.sliding_window_pattern"
    period = architecture.window_period
    if pattern in settings.values:
        period = settings.get(pattern, (int, list, np.ndarray))
    if isinstance(period, int):
        windowed = [int(period == 0 or (block + 1) % period != 0) for block in range(n_layer)]
    else:
        windowed = [int(bool(entry)) for entry in period]
    result: dict[str, Any] = {"sliding_window_indices": windowed}
    if "rope.freq_base_swa" in architecture.keys:
        result |= {"rope_indices": windowed, "rope_local_base_freq": fields.get("rope_local_base_freq", 10000)}
    return result


def read_scaling(source: Source, name: str, config: Config) -> dict[str, Any]:
    """rope_condense_ratio or rope_adjustments, from <name>.rope.scaling.* or a table of factors; empty if positions are plain."""
    settings, prefix = Settings(source), f"{name}.rope.scaling."
    kind = settings.get(f"{prefix}type", str, "none")
    length = settings.size(f"{prefix}original_context_length", config.block_size)
    attention = settings.real(f"{prefix}attn_factor", 1.0)
    if "rope_factors_short.weight" in source.shapes or "rope_factors_long.weight" in source.shapes:
        short, long = (factors(source, f"rope_factors_{kind}.weight", config) for kind in ("short", "long"))
        usual = long_attention_factor(config.block_size / length, length)
        attention = usual if math.isclose(attention, usual, rel_tol=1e-6) else attention
        adjustments: dict[str, Any] = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        return {"rope_adjustments": {**adjustments, "original_max_seq_len": length, "attention_factor": attention}}
    if "rope_freqs.weight" in source.shapes:
        found = fit_adjustments(factors(source, "rope_freqs.weight", config), config)
        if found is None:
            raise UserError(f"{source.path}: rope_freqs.weight is not Llama 3.1's rotary scaling, the only one with such a table")
        return {"rope_adjustments": found or None}
    factor = settings.real(f"{prefix}factor", settings.get(f"{name}.rope.scale_linear", float, 1.0))
    if kind == "yarn":
        betas = {key: whole(settings.real(f"{prefix}yarn_{key}", default)) for key, default in YARN.items()}
        attention *= 1 + 0.1 * math.log(max(factor, 1.0))
        length = settings.size(f"{prefix}original_context_length")
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_seq_len": length, **betas, "attention_factor": attention}
        return {"rope_adjustments": yarn}
    if kind not in ("none", "linear"):
        raise UserError(f"{source.path}: {prefix}type is {kind!r}, supported are none, linear, yarn, and tables of factors")
    if factor == 1.0 or (kind == "none" and f"{prefix}type" in settings.values):
        return {}
    return {"rope_adjustments": {"factor": factor}} if config.rope_indices else {"rope_condense_ratio": whole(factor)}


def factors(source: Source, name: str, config: Config) -> list[float]:
    """A table of numbers that divide the rotary frequencies: the shortest decimals that round to what is stored."""
    if (size := math.prod(source.shapes.get(name, ()))) != config.rope_n_elem // 2 or name not in source.shapes:
        raise UserError(f"{source.path}: {name} has {size} entries, expected {config.rope_n_elem // 2}")
    return [float(str(factor)) for factor in source.array(name).reshape(-1)]


def fit_adjustments(divisors: list[float], config: Config) -> dict[str, Any] | None:
    """Llama 3.1's parameters from the n/2 numbers that divide the rotary frequencies; {} if all are 1, None if it is another scaling.

    The known ones are tried first. Else: theta_j = base^(-2j/n), w_j = theta_j / (2 pi) turns a position, context C, kept share
    s_j = clamp((C w_j - low) / (high - low), 0, 1), and 1 / divisor_j = s_j + (1 - s_j) / factor. So factor is the largest divisor, s is
    a straight line in w where it is between 0 and 1. The line has two parameters, C, low, high are three: they are stated for low = 1.
    """
    import numpy as np

    given = np.array(divisors)
    if np.allclose(given, 1.0):
        return {}
    factor = float(given.max())
    if not np.isfinite(given).all() or given.min() <= 0 or factor <= 1:
        return None
    turns = float(config.rope_base) ** -(np.arange(len(given)) / len(given)) / (2 * math.pi)

    def fits(factor: float, low: float, high: float, context: float, tolerance: float) -> bool:
        share = np.clip((context * turns - low) / (high - low), 0, 1)
        return bool(np.allclose(1 / (share + (1 - share) / factor), given, rtol=tolerance))

    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len")
    for known in LLAMA_3:
        if fits(*known, tolerance=1e-4):
            return dict(zip(names, known, strict=True))
    share = (1 / given - 1 / factor) / (1 - 1 / factor)
    between = (share > 1e-4) & (share < 1 - 1e-4)
    if between.sum() < 2:
        return None
    slope, intercept = np.polyfit(turns[between], share[between], 1)
    if slope <= 0 or intercept >= 0:
        return None
    found = (round(factor, 3), 1.0, round(float(1 - 1 / intercept), 3), round(float(-slope / intercept)))
    return dict(zip(names, found, strict=True)) if found[2] > 1 and fits(*found, tolerance=1e-3) else None


def plan(path: Path, name: str, config: Config, shapes: Mapping[str, tuple[int, ...]], tokens: list[str]) -> Plan:
    """The file at `path` for a model of the architecture `name`, whose weights have the `shapes`."""
    architecture = ARCHITECTURES[name]
    metadata: dict[str, Any] = {"general.architecture": name, "general.name": config.name, "tokenizer.ggml.tokens": tokens}
    for table in (SIZES, REALS):
        for key, target in table.items():
            value = getattr(config, target)
            if key in (*SHARED, *architecture.keys) and value:
                metadata[f"{name}.{key}"] = value if table is SIZES else float(value)
    metadata[f"{name}.attention.value_length"] = config.head_size
    metadata[f"{name}.{NORM_EPS[config.norm_class_name]}"] = config.norm_eps
    metadata[f"{name}.vocab_size"] = config.V
    if "use_parallel_residual" in architecture.keys:
        metadata[f"{name}.use_parallel_residual"] = config.parallel_residual
    if config.mlp_class_name == "GptNeoxMLP" and "gelu_approximate" not in architecture.fields:
        metadata[GELU] = config.gelu_approximate
    if "attention.scale" in architecture.keys:
        metadata[f"{name}.attention.scale"] = float(config.attention_scores_scalar or config.head_size or 1) ** -0.5
    made = Plan(path, name, metadata, dict(shapes))
    if config.learned_positions:
        del metadata[f"{name}.rope.freq_base"]
    else:
        metadata[f"{name}.rope.dimension_count"] = config.rope_n_elem
        _plan_scaling(made, config)
    return made


def _plan_scaling(made: Plan, config: Config) -> None:
    """The keys and tables of `read_scaling`."""
    import numpy as np

    from litgpt.rope import frequencies, plain_frequencies

    kind, given = config.rope_kind, config.rope_adjustments or {}
    scaling: dict[str, Any] = {}
    if config.rope_condense_ratio != 1:
        scaling = {"type": "linear", "factor": float(config.rope_condense_ratio)}
    if kind == "linear":
        scaling = {"type": "linear", "factor": float(given["factor"])}
    if kind == "llama3":
        made.arrays["rope_freqs.weight"] = (plain_frequencies(config, config.rope_base) / frequencies(config)).numpy()
    if kind in ("yarn", "longrope"):
        scaling = {"original_context_length": given["original_max_seq_len"], "attn_factor": float(given["attention_factor"])}
    if kind == "yarn":
        scaling |= {"type": "yarn", "factor": float(given["factor"]), **{f"yarn_{key}": float(given[key]) for key in YARN}}
        scaling["attn_factor"] /= 1 + 0.1 * math.log(max(given["factor"], 1.0))
    if kind == "longrope":
        for length in ("short", "long"):
            made.arrays[f"rope_factors_{length}.weight"] = np.array(given[f"{length}_factor"], np.float32)
    made.metadata.update({f"{made.architecture}.rope.scaling.{key}": value for key, value in scaling.items()})
    made.shapes.update({name: table.shape for name, table in made.arrays.items()})


def differences(left: Config, right: Config, ignore: tuple[str, ...] = ()) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configs compute different things, with the value of each side."""
    one, other = catalog.essence(left), catalog.essence(right)
    return {key: (one[key], other[key]) for key in one if key not in (*UNSAID, *ignore) and not _alike(one[key], other[key])}


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are equal, numbers up to what fp32 holds."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) or isinstance(other, float):
        return isinstance(one, int | float) and isinstance(other, int | float) and math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)
