"""Rotary settings of a config.json: `rope_theta` and `rope_scaling` of transformers 4, or `rope_parameters` of transformers 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from litgpt.families._architecture import Aspect, Fields, Hf

LLAMA_3 = ("factor", "low_freq_factor", "high_freq_factor")


def rope(
    theta: float = 10000.0,
    partial: float | None = None,
    theta_key: str = "rope_theta",
    partial_key: str = "partial_rotary_factor",
    original: int | None = None,
) -> Aspect:
    """Return the aspect of `rope_base`, `rotary_percentage` and the scaling, read in either form, written in the older one.

    `theta` and `original` are transformers' defaults of an architecture; `partial` is None if it rotates all dimensions of a head.
    """

    def read(hf: Hf) -> Fields:
        parameters = settings(hf)
        if any(isinstance(value, dict) for value in parameters.values()):
            raise ValueError("rope_parameters for each type of layer are not supported for this model_type")
        base = first(parameters.get("rope_theta"), hf.get(theta_key), theta)
        share = first(parameters.get("partial_rotary_factor"), hf.get(partial_key, partial), 1.0)
        if partial is None and share != 1:
            raise ValueError(f"{partial_key} {share!r} is not supported for this model_type, only 1.0 is")
        length = first(hf.get("original_max_position_embeddings"), original, parameters.get("original_max_position_embeddings"))
        return {"rope_base": whole(base), "rotary_percentage": share, **read_scaling(parameters, length, hf)}

    def write(fields: Fields) -> dict[str, Any]:
        hf = {theta_key: float(fields["rope_base"]), **write_scaling(fields)}
        return hf if partial is None else {**hf, partial_key: fields["rotary_percentage"]}

    return Aspect(read, write)


def read_two_bases(hf: Hf, base: float, local_base: float) -> Fields:
    """Read the rotary bases, with their defaults: local blocks have their own, without scaling."""
    parameters = hf.get("rope_parameters") or {}
    if parameters and not {"full_attention", "sliding_attention"} & set(parameters):
        raise ValueError("rope_parameters lacks full_attention and sliding_attention, which each have their own for this model_type")
    # transformers fills in `rope_type`, and then `type` counts for nothing
    far = {**(parameters.get("full_attention") or {"rope_type": "default"}), **(hf.get("rope_scaling") or {})}
    near = parameters.get("sliding_attention") or {}
    if (kind := near.get("rope_type", near.get("type", "default"))) != "default":
        raise ValueError(f"rotary scaling {kind!r} of sliding_attention is not supported, only of full_attention")
    for part in (far, near, hf):
        if part.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(f"partial_rotary_factor {part['partial_rotary_factor']!r} is not supported for this model_type, only 1.0 is")
    scaling = read_scaling(far, far.get("original_max_position_embeddings"), hf)
    if condense := scaling.pop("rope_condense_ratio", None):
        scaling = {"rope_adjustments": {"factor": float(condense)}}
    return {
        "rope_base": whole(first(far.get("rope_theta"), hf.get("rope_theta"), base)),
        "rope_local_base_freq": whole(first(near.get("rope_theta"), hf.get("rope_local_base_freq"), local_base)),
        **scaling,
    }


def scaling_kind(adjustments: Mapping[str, Any] | None) -> str | None:
    """Return the kind of scaling of `rope_adjustments`: its `rope_type`, else by its keys."""
    if adjustments is None:
        return None
    return adjustments.get("rope_type") or ("linear" if set(adjustments) <= {"factor"} else "llama3")


def settings(hf: Hf) -> Fields:
    """Return `rope_scaling` or, without it, `rope_parameters`; as in transformers, the former replaces all of the latter."""
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(value := hf.get(key) or {}, Mapping):
            raise ValueError(f"{key} is {value!r}: an object is needed")
    return dict(hf.get("rope_scaling") or hf.get("rope_parameters") or {})


def first(*values: Any) -> Any:
    """Return the first value that is not None, or None."""
    return next((value for value in values if value is not None), None)


def whole(value: Any) -> Any:
    """Return a number as LitGPT writes it: 500000 for 500000.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(parameters: Hf, key: str) -> Any:
    value = parameters[key]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{key} of the rotary scaling is {value!r}: a number is needed")
    return value


def read_scaling(parameters: Hf, length: int | None, hf: Hf) -> Fields:
    """Return `rope_condense_ratio` or `rope_adjustments`; `length` is the original context, if the file names it."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind in ("default", "dynamic"):  # dynamic: another base for each position behind the context, which ends here
        return {}
    if kind == "linear":
        return {"rope_condense_ratio": whole(_number(parameters, "factor"))}
    if kind not in ("llama3", "yarn", "longrope", "su"):
        raise ValueError(f"rotary scaling {kind!r} is not supported, only default, dynamic, linear, llama3, yarn, longrope are")
    length = _number({"original_max_position_embeddings": length or hf["max_position_embeddings"]}, "original_max_position_embeddings")
    if kind == "llama3":
        return {"rope_adjustments": {**{key: float(_number(parameters, key)) for key in LLAMA_3}, "original_max_seq_len": length}}
    factor = parameters.get("factor")
    factor = hf["max_position_embeddings"] / length if factor is None else _number(parameters, "factor")
    if kind == "yarn":
        return {"rope_adjustments": _read_yarn(parameters, factor, length)}
    lists = {key: parameters[key] for key in ("short_factor", "long_factor")}
    attention = parameters.get("attention_factor") or long_attention_factor(factor, length)
    return {"rope_adjustments": {"rope_type": "longrope", **lists, "original_max_seq_len": length, "attention_factor": attention}}


def long_attention_factor(factor: float, length: int) -> float:
    """Return sqrt(1 + ln s / ln L), for a context s times as long as the original L (LongRoPE, arXiv 2402.13753)."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))


def _read_yarn(parameters: Hf, factor: float, length: int) -> Fields:
    """Read YaRN, arXiv 2309.00071: attention's factor is 0.1 m ln s + 1 at scaling s, or the quotient for mscale and mscale_all_dim."""
    m, m_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    scale = parameters.get("attention_factor")
    if scale is None:
        scale = _stretch(factor, m) / _stretch(factor, m_all) if m and m_all else _stretch(factor, 1.0)
    fields = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_seq_len": length,
        "beta_fast": parameters.get("beta_fast") or 32,
        "beta_slow": parameters.get("beta_slow") or 1,
        "attention_factor": scale,
    }
    return fields if parameters.get("truncate", True) else {**fields, "truncate": False}


def from_litgpt(adjustments: Any) -> tuple[Any, float]:
    """Return `rope_adjustments`, LitGPT's YaRN (`beta_fast` without a `rope_type`) in the form used here, and m: LitGPT multiplies the
    scores by m^2, for its `mscale_all_dim`.
    """
    if not isinstance(adjustments, dict) or "rope_type" in adjustments or "beta_fast" not in adjustments:
        return adjustments, 1.0
    adjustments = {"rope_type": "yarn", **adjustments}
    m, m_all, factor = adjustments.pop("mscale", None), adjustments.pop("mscale_all_dim", None), adjustments.get("factor")
    if not all(isinstance(value, int | float) for value in (factor, m or 0, m_all or 0)):
        return adjustments, 1.0
    stretch = _stretch(factor, m_all) if m_all else 1.0
    adjustments["attention_factor"] = _stretch(factor, m) / stretch if m else stretch
    return adjustments, stretch


def _stretch(factor: float, m: float) -> float:
    """Return 0.1 m ln s + 1 for scaling by s."""
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


def write_scaling(fields: Fields) -> dict[str, Any]:
    """Return `rope_scaling`, and `original_max_position_embeddings` for LongRoPE."""
    adjustments, condense = fields["rope_adjustments"], fields["rope_condense_ratio"]
    if adjustments is None:
        return {"rope_scaling": None if condense == 1 else {"rope_type": "linear", "factor": float(condense)}}
    if condense != 1:
        raise ValueError(f"rope_condense_ratio {condense} beside rope_adjustments")
    kind = scaling_kind(adjustments)
    settings = {key: value for key, value in adjustments.items() if key not in ("rope_type", "original_max_seq_len")}
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", **settings}}
    length = adjustments["original_max_seq_len"]
    if kind != "longrope":
        return {"rope_scaling": {"rope_type": kind, **settings, "original_max_position_embeddings": length}}
    if math.isclose(settings["attention_factor"], long_attention_factor(fields["block_size"] / length, length)):
        del settings["attention_factor"]  # follows from the lengths; transformers 4 allows the two lists only
    return {"original_max_position_embeddings": length, "rope_scaling": {"type": "longrope", **settings}}
