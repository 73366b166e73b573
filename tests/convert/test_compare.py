"""Configs are compared by what their models compute."""

from __future__ import annotations

from typing import Any

import pytest

from litgpt.config import Config
from litgpt.convert.compare import INPUT_AND_TRAINING, differences, essence

LLAMA = Config.from_name("Llama-3.2-1B", n_layer=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"gelu_approximate": "tanh"},  # SwiGLU has no GELU
        {"rope_indices": [0, 0]},
        {"attention_scores_scalar": 64},  # the size of a head
        {"n_expert": 4},  # without experts
        {"sliding_window_size": 8, "sliding_window_indices": [0, 0]},
    ],
    ids=str,
)
def test_unused_fields_do_not_count(changes: dict[str, Any]) -> None:
    other = Config(**{**LLAMA.base_dict(), **changes})
    assert other != LLAMA and essence(other) == essence(LLAMA) and not differences(LLAMA, other)


def test_differences_have_both_values() -> None:
    other = Config(**{**LLAMA.base_dict(), "rope_base": 10000, "norm_qk": True, "block_size": 64})
    assert differences(LLAMA, other, INPUT_AND_TRAINING) == {
        "rope_base": (500000, 10000),
        "norm_qk": (False, True),
        "norm_qk_type": (None, "default"),
    }
    assert differences(LLAMA, other, ("rope_base", "norm_qk", "norm_qk_type")) == {"block_size": (131072, 64)}


def test_tolerance_applies_to_floats_in_lists_and_mappings_too() -> None:
    scaling = LLAMA.rope_adjustments or {}
    near = Config(
        **{**LLAMA.base_dict(), "norm_eps": LLAMA.norm_eps * (1 + 1e-8), "rope_adjustments": {**scaling, "factor": 32.0 * (1 + 1e-8)}}
    )
    assert differences(LLAMA, near).keys() == {"norm_eps", "rope_adjustments"}
    assert not differences(LLAMA, near, tolerance=1e-6)
