"""`litgpt convert_to_litgpt` and `convert_pretrained_checkpoint`: where the checkpoint goes, by what is converted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from litgpt.__main__ import main
from litgpt.checkpoint import load_model, load_weights, require_checkpoint
from litgpt.convert.to_litgpt import convert_to_litgpt
from litgpt.errors import UserError
from tests.helpers import gguf_files, tiny


def test_a_gguf_file_goes_below_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer_dir: Path) -> None:
    path = gguf_files.write_tiny(tmp_path, gguf_files.byte_level_of(tiny_tokenizer_dir), lambda writer: None)
    monkeypatch.chdir(tmp_path)
    convert_to_litgpt(path)
    assert require_checkpoint(Path("checkpoints") / "tiny")


def test_the_folder_to_convert_in_place_may_be_named_litgpts_way(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    tiny.hf_llama().save_pretrained(tmp_path / "hf")
    write_tiny_tokenizer(tmp_path / "hf")
    convert_to_litgpt(checkpoint_dir=tmp_path / "hf")
    assert (tmp_path / "hf" / "lit_model.pth").is_file()


def test_own_weights_need_a_place(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    with pytest.raises(UserError, match="lit_model.pth is LitGPT's own file: give --checkpoint_dir"):
        convert_to_litgpt(base / "lit_model.pth")
    convert_to_litgpt(base / "lit_model.pth", tmp_path / "new", dtype="bfloat16", debug_mode=True)
    assert "\ntransformer.h.0.attn.qkv.weight (" in capsys.readouterr().out
    assert {tensor.dtype for tensor in load_weights(tmp_path / "new" / "lit_model.pth").values()} == {torch.bfloat16}


def test_nothing_to_convert() -> None:
    with pytest.raises(UserError, match="nothing to convert"):
        convert_to_litgpt()


def test_a_pretrained_step_in_litgpts_envelope(
    write_tiny_tokenizer: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a compiled model's names. `tests/test_pretrain.py` has our own steps."""
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    weights = load_weights(base / "lit_model.pth", mapped=False)
    torch.save({"model": {f"_orig_mod.{name}": value for name, value in weights.items()}, "iter_num": 3}, base / "lit_model.pth")
    assert main(["convert_pretrained_checkpoint", str(base), str(tmp_path / "new")]) == 0
    made = load_weights(tmp_path / "new/lit_model.pth")
    assert made.keys() == weights.keys() and all(torch.equal(made[name], weights[name]) for name in weights)
    load_model(tmp_path / "new", torch.float32)
    assert main(["convert_pretrained_checkpoint", str(base), str(tmp_path / "new")]) == 1
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["convert_pretrained_checkpoint", str(tmp_path / "empty"), str(tmp_path / "x")]) == 1
    assert "holds no lit_model.pth: name a step's folder of a training run" in capsys.readouterr().err
