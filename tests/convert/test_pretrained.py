"""`litgpt convert_pretrained_checkpoint` on LitGPT's envelope with a compiled model's names; `tests/test_pretrain.py` has our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from litgpt import checkpoint
from litgpt.__main__ import main
from tests.helpers import tiny


def test_litgpts_envelope(write_tiny_tokenizer: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    weights = checkpoint.load_weights(base / "lit_model.pth", mapped=False)
    torch.save({"model": {f"_orig_mod.{name}": value for name, value in weights.items()}, "iter_num": 3}, base / "lit_model.pth")
    assert main(["convert_pretrained_checkpoint", str(base), str(tmp_path / "new")]) == 0
    made = checkpoint.load_weights(tmp_path / "new/lit_model.pth")
    assert made.keys() == weights.keys() and all(torch.equal(made[name], weights[name]) for name in weights)
    checkpoint.load_model(tmp_path / "new", torch.float32)
    assert main(["convert_pretrained_checkpoint", str(base), str(tmp_path / "new")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["convert_pretrained_checkpoint", str(tmp_path), str(tmp_path / "x")]) == 1
