"""Do two configs compute the same function?"""

import math
from collections.abc import Iterable
from typing import Any

from litgpt import families
from litgpt.config import Config
from litgpt.errors import UserError

INPUT_AND_TRAINING = ("block_size", "router_aux_loss_coef")  # do not change what a model computes


def differences(expected: Config, actual: Config, ignore: tuple[str, ...] = (), tolerance: float = 1e-12) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two configs compute different things, with both values. `tolerance` is relative, for floats."""
    left, right = essence(expected), essence(actual)
    return {key: (left[key], right[key]) for key in left if key not in ignore and not _equal(left[key], right[key], tolerance)}


def named_or_described(
    model_name: str | None, names: Iterable[str], described: Config, source: object, ignore: tuple[str, ...], tolerance: float = 1e-12
) -> Config:
    """Return the config of `model_name`, by default of the first of `names` that computes the same as `described`, else `described`.

    Raise UserError if `source`, the file that `described` was read from, is not of the model `model_name`.
    """
    if model_name is not None:
        named = Config.from_name(model_name)
        if different := differences(named, described, ignore, tolerance):
            listed = ", ".join(f"{key} is {actual}, expected {expected}" for key, (expected, actual) in different.items())
            raise UserError(f"{source} is not of the model {model_name}: {listed}. Without --model_name it is converted as it is")
        return named
    known = [Config.from_name(name) for name in names if families.find(name)]
    return next((named for named in known if not differences(named, described, ignore, tolerance)), described)


def _equal(left: Any, right: Any, tolerance: float) -> bool:
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key], tolerance) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(_equal(*pair, tolerance) for pair in zip(left, right, strict=True))
    if isinstance(left, float) or isinstance(right, float):
        return isinstance(left, int | float) and isinstance(right, int | float) and math.isclose(left, right, rel_tol=tolerance)
    return bool(left == right)


def essence(config: Config) -> dict[str, Any]:
    """Return the fields that decide what a model computes, with unused ones set to one value: equal for configs that compute the same."""
    f = config.base_dict()
    for key in ("name", "hf_config", "vocab_size", "padding_multiple"):
        del f[key]
    f["rotary_percentage"] = config.rope_n_elem
    f["attention_scores_scalar"] = f["attention_scores_scalar"] or config.head_size
    f["attn_bias"] = config.attn_bias or config.bias
    if config.norm_class_name == "RMSNorm" or not config.norm_affine:
        f["norm_bias"] = None
    if not config.norm_qk:
        f["norm_qk_type"] = None
    if config.sliding_window_size is None or not any(config.sliding_window_indices or ()):
        f["sliding_window_size"] = f["sliding_window_indices"] = None
    if config.rope_indices is None or not any(config.rope_indices):
        f["rope_indices"] = None
    if 1 not in (config.rope_indices or ()):
        f["rope_local_base_freq"] = None
        if config.rope_adjustments and config.rope_kind == "linear":
            f["rope_condense_ratio"], f["rope_adjustments"] = f["rope_condense_ratio"] * config.rope_adjustments["factor"], None
    if not config.rotates:
        for key in [key for key in f if key.startswith(("rope_", "rotary_"))]:
            f[key] = None
    experts = config.mlp_class_name == "LLaMAMoE"
    f["moe_intermediate_size"] = config.expert_size if experts else None
    f["intermediate_size"] = None if experts and not config.first_k_dense_replace else config.intermediate_size
    f["n_shared_expert"], f["first_k_dense_replace"] = config.n_shared_expert or 0, config.first_k_dense_replace or 0
    for key in () if experts else ("n_expert", "n_expert_per_token", "norm_topk_prob", "router_aux_loss_coef", "routed_scaling_factor"):
        f[key] = None
    if config.swiglu_limit is None:
        f["swiglu_alpha"] = None
    if config.mlp_class_name in ("LLaMAMLP", "LLaMAMoE"):
        f["gelu_approximate"] = None
    return f
