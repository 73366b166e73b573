"""Hugging Face -> litgpt -> Hugging Face, for every family: every tensor comes back bit for bit, and transformers computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from litgpt.checkpoint import load_weights
from litgpt.convert.from_litgpt import convert_from_litgpt
from litgpt.convert.to_litgpt import convert_to_litgpt
from tests.helpers import family_configs as configs

FIRST = {kind: name for name, (kind, _) in reversed(configs.FAMILIES.items())}.values()  # one entry of each class of transformers
IDS = torch.randint(3, configs.SIZES["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(5))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    unequal = [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]
    assert not unequal


def load(folder: Path, how: str) -> Any:
    """Load the folder in transformers, with every tensor used and none missing."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=how, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize(
    ("family", "keep_config"),
    [
        *(pytest.param(name, True, marks=() if name in configs.DISTINCT else pytest.mark.slow) for name in configs.FAMILIES),
        *(pytest.param(name, False, marks=() if name in ("llama", "gpt2") else pytest.mark.slow) for name in FIRST),
    ],
)
@torch.inference_mode()
def test_hf_to_litgpt_to_hf(family: str, keep_config: bool, tmp_path: Path, write_tiny_tokenizer: Any) -> None:
    source, lit, again = tmp_path / "hf", tmp_path / "lit", tmp_path / "again"
    hf = configs.pair(family)[0]
    hf.save_pretrained(source)
    write_tiny_tokenizer(source)
    convert_to_litgpt(source, lit)
    if not keep_config:
        (lit / "config.json").unlink()
    convert_from_litgpt(lit, again)
    settings = json.loads((again / "config.json").read_text())
    if settings["model_type"] == hf.config.model_type or keep_config:  # without the name Phi 3 cannot be told from Llama or Mistral
        assert_equal(tensors(source), tensors(again))
    assert settings["tie_word_embeddings"] == hf.config.tie_word_embeddings
    how = hf.config._attn_implementation
    torch.testing.assert_close(load(again, how)(IDS).logits, hf(IDS).logits, atol=0 if keep_config else 1e-5, rtol=0)
    if keep_config:
        convert_to_litgpt(again, tmp_path / "lit again")
        assert_equal(*(load_weights(folder / "lit_model.pth") for folder in (lit, tmp_path / "lit again")))
