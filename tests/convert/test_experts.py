"""All experts in one tensor, there and back, and MXFP4 as transformers dequantises it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from litgpt.checkpoint import load_weights
from litgpt.convert.experts import from_mxfp4, interleaved, separated
from litgpt.convert.names import Stored
from litgpt.convert.to_litgpt import convert_to_litgpt
from litgpt.convert.write import Pending
from litgpt.errors import UserError
from tests.helpers import family_configs as configs

NAME = "model.layers.0.mlp.experts"


def stored(tensor: torch.Tensor) -> Stored:
    return Stored(tuple(tensor.shape), lambda: tensor)


def test_gates_before_ups() -> None:
    fused = torch.arange(2 * 6 * 4.0).view(2, 6, 4)
    separate = separated({f"{NAME}.gate_up_proj": stored(fused)})
    assert {key: stored.shape for key, stored in separate.items()} == {
        f"{NAME}.{expert}.{part}.weight": (3, 4) for expert in range(2) for part in ("gate_proj", "up_proj")
    }
    assert torch.equal(separate[f"{NAME}.1.up_proj.weight"].load(), fused[1, 3:])


def test_interleaved_there_and_back() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_up_proj": (2, 4, 6), "gate_up_proj_bias": (2, 6), "down_proj": (2, 3, 4), "down_proj_bias": (2, 4)}
    tensors = {f"{NAME}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    separate = separated({name: stored(tensor) for name, tensor in tensors.items()}, interleaved=True)
    assert torch.equal(separate[f"{NAME}.1.up_proj.weight"].load(), tensors[f"{NAME}.gate_up_proj"][1, :, 1::2].T)
    assert torch.equal(separate[f"{NAME}.0.gate_proj.bias"].load(), tensors[f"{NAME}.gate_up_proj_bias"][0, ::2])
    assert all(each.load().shape == each.shape for each in separate.values())
    pending = {
        name: Pending(each.shape, torch.float32, each.load) for name, each in sorted(separate.items(), key=lambda item: item[0][::-1])
    }
    again = interleaved(pending)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].shape == tensor.shape and torch.equal(again[name].load(), tensor)


def mxfp4(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random blocks and scales of (E, out, in)."""
    generator = torch.Generator().manual_seed(seed)
    *rows, width = shape
    blocks = torch.randint(256, (*rows, width // 32, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(110, 132, (*rows, width // 32), generator=generator, dtype=torch.uint8)


def test_mxfp4_against_transformers() -> None:
    blocks, scales = mxfp4(3, 8, 96)
    want = convert_moe_packed_tensors(blocks, scales).transpose(1, 2)  # transformers' is (E, in, out)
    assert want.shape == (3, 8, 96)
    for expert in range(3):
        assert torch.equal(from_mxfp4(blocks[expert], scales[expert]), want[expert])


def test_a_mxfp4_checkpoint_is_converted(tmp_path: Path, write_tiny_tokenizer: Any) -> None:
    """Its model is that of the file with the numbers that transformers makes of it."""
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    hf = configs.hf_model("gpt_oss", hidden_size=32, intermediate_size=64).bfloat16()
    hf.save_pretrained(packed)
    write_tiny_tokenizer(packed)
    tensors, file = {}, packed / "model.safetensors"
    for number, (name, tensor) in enumerate(load_file(file).items()):
        if name.endswith(("gate_up_proj", "down_proj")):
            E, width, out = tensor.shape
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(E, out, width, seed=number)
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    settings = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "mxfp4"}}))
    plain.mkdir()
    (plain / "config.json").write_text(json.dumps(settings))
    dense = {name: tensor for name, tensor in tensors.items() if not name.endswith(("_blocks", "_scales"))}
    for name in [name for name in tensors if name.endswith("_blocks")]:
        name = name.removesuffix("_blocks")
        dense[name] = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"]).contiguous()
    save_file(dense, plain / "model.safetensors", metadata={"format": "pt"})
    write_tiny_tokenizer(plain)
    for folder in (plain, packed):
        convert_to_litgpt(folder, tmp_path / f"lit {folder.name}")
    one, other = (load_weights(tmp_path / f"lit {name}" / "lit_model.pth") for name in ("plain", "packed"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert one["transformer.h.2.mlp.experts.3.fc_1.weight"].dtype == torch.bfloat16


def test_mxfp4_without_its_scales_is_refused() -> None:
    blocks, scales = (stored(tensor) for tensor in mxfp4(2, 4, 32))
    with pytest.raises(UserError, match="not MXFP4 with its gate_up_proj_scales: download the model again"):
        separated({f"{NAME}.gate_up_proj_blocks": blocks})
    with pytest.raises(UserError, match="not MXFP4"):
        separated({f"{NAME}.down_proj_blocks": blocks, f"{NAME}.down_proj_scales": scales._replace(shape=(2, 4, 9))})
