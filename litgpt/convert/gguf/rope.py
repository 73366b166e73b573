"""Rotary scaling in GGUF files: keys under `<architecture>.rope.scaling`, and tensors with a factor for each rotated pair."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from litgpt.config import Config
from litgpt.convert.gguf.reader import Source
from litgpt.errors import UserError
from litgpt.families._rope import long_attention_factor, whole
from litgpt.rope import frequencies, plain_frequencies

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # tensors of the rotary settings
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}  # in all models with llama.cpp's table
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}


def read_scaling(source: Source, name: str, config: Config) -> dict[str, Any]:
    """Return rope_condense_ratio or rope_adjustments, from keys or a tensor of factors; nothing if there is no scaling."""
    prefix = f"{name}.rope.scaling."
    kind = source.get(f"{prefix}type", str, "none")
    length = source.size(f"{prefix}original_context_length", config.block_size)
    attention = source.real(f"{prefix}attn_factor", 1.0)
    if "rope_factors_short.weight" in source.shapes or "rope_factors_long.weight" in source.shapes:
        short, long = (factors(source, f"rope_factors_{kind}.weight", config) for kind in ("short", "long"))
        usual = long_attention_factor(config.block_size / length, length)
        attention = usual if math.isclose(attention, usual, rel_tol=1e-6) else attention
        adjustments: dict[str, Any] = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        return {"rope_adjustments": {**adjustments, "original_max_seq_len": length, "attention_factor": attention}}
    if "rope_freqs.weight" in source.shapes:
        fitted = fit_adjustments(factors(source, "rope_freqs.weight", config), config)
        if fitted is None:
            raise UserError(f"{source.path}: rope_freqs.weight is not Llama 3.1's rotary scaling, the only one with such a table")
        return {"rope_adjustments": fitted or None}
    factor = source.real(f"{prefix}factor", source.get(f"{name}.rope.scale_linear", float, 1.0))
    if kind == "yarn":
        betas = {key: whole(source.real(f"{prefix}yarn_{key}", default)) for key, default in YARN.items()}
        attention *= 1 + 0.1 * math.log(max(factor, 1.0))
        length = source.size(f"{prefix}original_context_length")
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_seq_len": length, **betas, "attention_factor": attention}
        return {"rope_adjustments": yarn}
    if kind not in ("none", "linear"):
        raise UserError(f"{source.path}: {prefix}type is {kind!r}, but only none, linear, yarn and tables of factors are supported")
    if factor == 1.0 or (kind == "none" and f"{prefix}type" in source.metadata):
        return {}
    return {"rope_adjustments": {"factor": factor}} if config.rope_indices else {"rope_condense_ratio": whole(factor)}


def factors(source: Source, name: str, config: Config) -> list[float]:
    """Return the divisors of the rotary frequencies in a tensor: the shortest decimals that round to its values."""
    if (size := math.prod(source.shapes.get(name, ()))) != config.rope_n_elem // 2 or name not in source.shapes:
        raise UserError(f"{source.path}: {name} has {size} entries, expected {config.rope_n_elem // 2}")
    return [float(str(factor)) for factor in source.array(name).reshape(-1)]


def fit_adjustments(divisors: list[float], config: Config) -> dict[str, Any] | None:
    """Return Llama 3.1's parameters from the n/2 divisors of the rotary frequencies, with the factor of the slowest; {} if all are 1, None
    if it is another scaling.
    """
    stored = torch.tensor(divisors)
    if torch.allclose(stored, torch.ones(())):
        return {}
    if not stored.isfinite().all() or stored.min() <= 0:
        return None
    adjustments = {"factor": round(max(divisors), 3), **LLAMA_3}
    known = plain_frequencies(config, config.rope_base) / frequencies(replace(config, rope_adjustments=adjustments))
    return adjustments if torch.allclose(known, stored, rtol=1e-4) else None


def write_scaling(name: str, config: Config) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the keys and tensors from which `read_scaling` reads the config's scaling, for the architecture `name`."""
    kind, adjustments = config.rope_kind, config.rope_adjustments or {}
    scaling: dict[str, Any] = {}
    tensors: dict[str, np.ndarray] = {}
    if config.rope_condense_ratio != 1:
        scaling = {"type": "linear", "factor": float(config.rope_condense_ratio)}
    if kind == "linear":
        scaling = {"type": "linear", "factor": float(adjustments["factor"])}
    if kind == "llama3":
        tensors["rope_freqs.weight"] = (plain_frequencies(config, config.rope_base) / frequencies(config)).numpy()
    if kind in ("yarn", "longrope"):
        scaling = {"original_context_length": adjustments["original_max_seq_len"], "attn_factor": float(adjustments["attention_factor"])}
    if kind == "yarn":
        scaling |= {"type": "yarn", "factor": float(adjustments["factor"]), **{f"yarn_{key}": float(adjustments[key]) for key in YARN}}
        scaling["attn_factor"] /= 1 + 0.1 * math.log(max(adjustments["factor"], 1.0))
    if kind == "longrope":
        for length in ("short", "long"):
            tensors[f"rope_factors_{length}.weight"] = np.array(adjustments[f"{length}_factor"], np.float32)
    return {f"{name}.rope.scaling.{key}": value for key, value in scaling.items()}, tensors
