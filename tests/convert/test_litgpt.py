from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.__main__ import main
from litgpt.checkpoint import load_model, load_weights, save_config, save_weights
from litgpt.config import Config
from litgpt.convert.litgpt import convert_own
from litgpt.convert.to_litgpt import convert_to_litgpt
from litgpt.errors import UserError
from tests.helpers import tiny
from tests.helpers.cases import quick

H, G, h = 4, 2, 8


def before_0_5(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the state dict in the old layout: for each key/value head its query heads, the key, the value."""
    old = {}
    for name, tensor in weights.items():
        if ".attn.qkv." in name:
            q, k, v = tensor.split([H * h, G * h, G * h])
            parts = []
            for group in range(G):
                parts += [q[group * 2 * h : (group + 1) * 2 * h], k[group * h : (group + 1) * h], v[group * h : (group + 1) * h]]
            name, tensor = name.replace(".attn.qkv.", ".attn.attn."), torch.cat(parts)
        old[name] = tensor
    return old


@pytest.fixture
def base(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    return tiny.write_base(tmp_path / "base", write_tiny_tokenizer, bias=True)


def assert_equal(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    found = load_weights(folder / "lit_model.pth")
    assert found.keys() == weights.keys()
    assert all(found[name].dtype == weights[name].dtype and torch.equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("envelope", quick([False, True], True), ids=["plain", "in an envelope"])
@pytest.mark.parametrize("layout", ["now", "before 0.5"])
def test_pth_to_ours_to_pth(layout: str, envelope: bool, base: Path, tmp_path: Path) -> None:
    weights = load_weights(base / "lit_model.pth")
    stored: Any = before_0_5(weights) if layout == "before 0.5" else weights
    (tmp_path / "given").mkdir()
    save_config(Config.from_checkpoint(base), tmp_path / "given")
    torch.save({"model": stored, "step": 3} if envelope else stored, tmp_path / "given" / "pretrained.pth")
    convert_to_litgpt(tmp_path / "given" / "pretrained.pth", tmp_path / "lit")
    assert_equal(tmp_path / "lit", weights)
    convert_to_litgpt(tmp_path / "lit", tmp_path / "again")
    assert_equal(tmp_path / "again", weights)
    assert (tmp_path / "again" / "tokenizer.json").exists() is (tmp_path / "lit" / "tokenizer.json").exists()


def test_an_older_checkpoint_runs_as_it_is(base: Path) -> None:
    expected = load_model(base, torch.float32)(tiny.ids(1, 9))
    save_weights(
        before_0_5({name: tensor.clone() for name, tensor in load_weights(base / "lit_model.pth").items()}), base / "lit_model.pth"
    )
    (base / "manifest.json").unlink(missing_ok=True)
    assert torch.equal(load_model(base, torch.float32)(tiny.ids(1, 9)), expected)


def test_dtype_and_tied_head(base: Path, tmp_path: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in load_weights(base / "lit_model.pth").items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone()  # LitGPT stores it twice
    torch.save(weights, base / "lit_model.pth")
    convert_own(base, tmp_path / "lit", dtype=torch.bfloat16)
    found = load_weights(tmp_path / "lit" / "lit_model.pth")
    assert found["lm_head.weight"].data_ptr() == found["transformer.wte.weight"].data_ptr()
    assert all(torch.equal(found[name], weights[name].bfloat16()) for name in weights)


def test_what_is_wrong_is_said_at_once(base: Path, tmp_path: Path) -> None:
    weights = before_0_5(load_weights(base / "lit_model.pth"))
    del weights["transformer.h.1.attn.attn.weight"], weights["transformer.h.2.attn.attn.weight"]
    weights["extra"] = torch.zeros(2)
    weights["transformer.ln_f.weight"] = torch.zeros(3)
    torch.save(weights, tmp_path / "x.pth")
    with pytest.raises(UserError, match="x.pth says nothing about its model: give --model_name"):
        convert_to_litgpt(tmp_path / "x.pth", tmp_path / "lit")
    save_config(Config.from_checkpoint(base), tmp_path)
    with pytest.raises(UserError) as caught:
        convert_to_litgpt(tmp_path / "x.pth", tmp_path / "lit")
    for part in ("missing: transformer.h.{1,2}.attn.attn.weight", "unknown: extra", "shape (3,) where (32,) is expected: transformer.ln_f"):
        assert part in str(caught.value)
    assert not (tmp_path / "lit").exists()


OUT_OF_OURS: dict[str, list[str]] = {
    "convert_from_litgpt": ["new"],
    "convert_to_gguf": ["new.gguf"],
    "convert_pretrained_checkpoint": ["new"],
    "add_tokens": ["new", "--tokens", '["<x>"]'],
    "convert_to_litgpt": ["--checkpoint_dir", "new"],
}


@pytest.mark.parametrize("command", OUT_OF_OURS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=str)
def test_numbers_that_are_not_finite_are_not_handed_on(
    value: float, command: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = load_weights(base / "lit_model.pth", mapped=False)
    weights["transformer.h.2.mlp.proj.weight"][3, 5] = value
    save_weights(weights, base / "lit_model.pth")
    assert main([command, "base", *OUT_OF_OURS[command]]) == 1
    error = capsys.readouterr().err
    assert "transformer.h.2.mlp.proj.weight holds non-finite numbers" in error and "litgpt validate" in error
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("command", ["convert_from_litgpt", "convert_to_litgpt"])
def test_numbers_that_a_format_cannot_hold(
    command: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = load_weights(base / "lit_model.pth", mapped=False)
    weights["transformer.h.0.attn.qkv.weight"][0, 0] = 70_000.0  # above 65504, the largest of fp16
    save_weights(weights, base / "lit_model.pth")
    assert main([command, "base", *OUT_OF_OURS[command], "--dtype", "float16"]) == 1
    assert "float16 cannot hold: choose bfloat16 or float32" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert main([command, "base", *OUT_OF_OURS[command], "--dtype", "bfloat16"]) == 0
