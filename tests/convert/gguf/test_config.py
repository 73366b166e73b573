"""Metadata and configs: a planned file is read as the config that it was planned for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from litgpt.config import Config
from litgpt.convert.compare import INPUT_AND_TRAINING, differences
from litgpt.convert.gguf.config import Plan, padding, plan, read_config
from litgpt.convert.names import shapes, slots, stored_shape
from litgpt.errors import UserError
from litgpt.families import GGUF


def planned(architecture: str, config: Config) -> Plan:
    keys, row = shapes(config, "the test"), GGUF[architecture]
    names = slots(row.names(config.base_dict(), row.joined), config, keys)
    tensors = {name: stored_shape(slot, config, keys) for name, slot in names.items()}
    return plan(Path("x.gguf"), architecture, config, tensors, ["x"] * config.vocab_size)


@pytest.mark.parametrize(
    ("architecture", "model", "changes"),
    [
        ("llama", "Llama-2-7b-hf", {}),
        ("llama", "Llama-2-7b-hf", {"bias": True}),
        ("llama", "Llama-2-7b-hf", {"attn_bias": True}),
        ("gptneox", "pythia-14m", {}),
        ("gptneox", "pythia-14m", {"parallel_residual": False}),
        ("stablelm", "stablelm-2-1_6b", {}),
        ("stablelm", "stablelm-3b-4e1t", {"parallel_residual": True, "shared_attention_norm": True}),
        ("falcon", "falcon-7b", {}),
        ("falcon", "falcon-40b", {}),
        ("phi2", "phi-2", {}),
        ("granite", "granite-3.0-2b-base", {}),
    ],
)
def test_a_plan_is_read_as_its_config(architecture: str, model: str, changes: dict[str, Any]) -> None:
    config = Config.from_name(model, n_layer=2, **changes)
    assert not differences(config, read_config(planned(architecture, config)), INPUT_AND_TRAINING, 1e-6)


def test_a_model_that_an_architecture_lacks_the_keys_for_is_read_differently() -> None:
    config = replace(Config.from_name("Llama-2-7b-hf", n_layer=2), logits_scaling=2.0)
    assert differences(config, read_config(planned("llama", config))).keys() == {"logits_scaling"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.causal", False, "llama.attention.causal is False, but only True is supported"),
        ("block_count", 10**6, "1000000 blocks"),
        ("rope.dimension_count", 64, "but only the whole head, here 128, is supported"),
    ],
)
def test_what_is_not_supported_is_named(key: str, value: Any, message: str) -> None:
    file = planned("llama", Config.from_name("Llama-2-7b-hf", n_layer=2))
    file.metadata[f"llama.{key}"] = value
    with pytest.raises(UserError, match=message):
        read_config(file)


def test_padding_is_counted_from_the_end() -> None:
    assert padding(["a", "[PAD1]", "b", "[PAD3]", "[PAD4]"]) == 2 and padding(["[PAD0]"]) == 0
