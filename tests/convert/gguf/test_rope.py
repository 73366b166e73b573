"""Rotary scaling that a GGUF file states by a table."""

from __future__ import annotations

import math

import numpy as np
import pytest

from litgpt.config import Config
from litgpt.convert.gguf.rope import fit_adjustments
from litgpt.rope import frequencies


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-3.2-1B", "Llama-3.2-3B"])
def test_the_rope_table_of_every_llama_is_recognised(name: str) -> None:
    config = Config.from_name(name)
    plain = frequencies(Config.from_name(name, rope_adjustments=None))
    assert fit_adjustments((plain / frequencies(config)).tolist(), config) == config.rope_adjustments


def test_exaones_factor_is_read() -> None:
    adjustments = {"factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
    config = Config.from_name("Llama-3.1-8B", rope_adjustments=adjustments)
    divisors = frequencies(Config.from_name("Llama-3.1-8B", rope_adjustments=None)) / frequencies(config)
    assert fit_adjustments(divisors.tolist(), config) == adjustments


def test_other_rope_tables_are_not_taken_for_llamas() -> None:
    config = Config(n_embd=64, n_head=1, rotary_percentage=1.0)
    assert fit_adjustments([1.0] * 32, config) == {}
    for strange in (np.full(32, 4.0), np.linspace(1, 8, 32), np.zeros(32), np.full(32, math.nan), -np.ones(32), np.full(32, 0.5)):
        assert fit_adjustments(strange.tolist(), config) is None
