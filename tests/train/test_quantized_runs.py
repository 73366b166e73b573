"""Fine-tuning on a quantised backbone, from the command line to its folder. 4 bits need bitsandbytes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from litgpt import LLM, checkpoint
from tests.helpers import runs as finetune_runs

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install bitsandbytes"
)
SKIP = {"skip2lora_enabled": True, "skip2lora_block_indices": "[0, 1]"}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "skip2lora": SKIP,
    "tail": {**SKIP, "skip2lora_output_layer": "transformer.h.2"},
    "warm-up": {**SKIP, "skip2lora_warmup_steps": 2},
}


@pytest.mark.parametrize(
    ("mode", "method"),
    [
        pytest.param("bnb.nf4", "lora", marks=needs_bitsandbytes),
        pytest.param("bnb.nf4", "skip2lora", marks=[needs_bitsandbytes, pytest.mark.slow]),
        pytest.param("bnb.nf4", "tail", marks=[needs_bitsandbytes, pytest.mark.slow]),
        pytest.param("bnb.nf4", "warm-up", marks=[needs_bitsandbytes, pytest.mark.slow]),
        pytest.param("int8", "lora", marks=pytest.mark.slow),
        pytest.param("int8", "skip2lora"),
        pytest.param("int8", "tail", marks=pytest.mark.slow),
        pytest.param("int8", "warm-up", marks=pytest.mark.slow),
    ],
)
def test_fine_tuning(mode: str, method: str, base: Path, data: Path, tmp_path: Path) -> None:
    """It learns; the adapter is an ordinary one; with and without cache the same comes out; answers come in all number formats."""
    run = finetune_runs.finetune("finetune_lora", base, data, tmp_path / "out", quantize=mode, lora_dropout=0.0, **METHODS[method])
    assert run.code == 0, run.err
    losses = run.column("val_loss")
    assert losses[-1] < losses[0]
    weights = finetune_runs.load(run.final / "lit_model.pth.lora")["model"]
    assert all(value.dtype == torch.float32 and value.any() for value in weights.values())
    assert yaml.safe_load((run.final / "hyperparameters.yaml").read_text())["quantize"] == mode
    total = sum(value.numel() for value in checkpoint.load_weights(base / "lit_model.pth").values())
    assert run.report["total_parameters"] == total + sum(value.numel() for value in weights.values())
    if method != "lora":
        plain = finetune_runs.finetune(
            "finetune_lora", base, data, tmp_path / "plain", quantize=mode, lora_dropout=0.0, skip2lora_cache="off", **METHODS[method]
        )
        torch.testing.assert_close(torch.tensor(plain.column("val_loss")), torch.tensor(losses), atol=2e-4, rtol=2e-4)
    else:
        merged = checkpoint.load_weights(run.final / "lit_model.pth")
        whole = checkpoint.load_model(base, torch.float32).state_dict()
        untouched = [name for name in whole if "attn.qkv" not in name]
        assert all(torch.equal(merged[name], whole[name]) for name in untouched), "folded into the base as it was given"
    for quantised in (None, mode):
        answer = LLM.load(run.final, precision="32-true", quantize=quantised).generate("add 1 and 2", max_new_tokens=3, temperature=0.0)
        assert isinstance(answer, str)
