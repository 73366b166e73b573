"""Frozen layers in 4 and 8 bits: against the weights they stand for, and in every command that takes them. 4 bits need bitsandbytes."""

from __future__ import annotations

import importlib.util
import io
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from litgpt import LLM, lora, quantize
from litgpt.__main__ import main
from litgpt.activations.cache import fingerprint, plan
from litgpt.errors import UserError
from litgpt.optim import make_optimizer
from litgpt.quantize import Int8Linear, Linear4bit, QuantisedLinear, count, quantise
from litgpt.sample import Sample
from tests.helpers import tiny
from tests.helpers.cases import quick

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed: pip install bitsandbytes")
MODES = [pytest.param(mode, marks=needs_bitsandbytes) for mode in quantize.FOUR_BITS] + ["bnb.int8-training", "int8"]
NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928,
        -0.52507305,
        -0.39491749,
        -0.28444138,
        -0.18477343,
        -0.09105004,
        0.0,
        0.07958029,
        0.16093020,
        0.24611230,
        0.33791524,
        0.44070983,
        0.56261700,
        0.72295684,
        1.0,
    ]
)
"""Appendix E of arXiv 2305.14314"""


def layer(mode: str, bias: bool = False, dtype: torch.dtype = torch.float32, width: int = 40, out: int = 24) -> tuple[Any, torch.nn.Linear]:
    torch.manual_seed(1)
    linear = torch.nn.Linear(width, out, bias=bias, dtype=dtype).requires_grad_(False)
    return Linear4bit(linear, *quantize.FOUR_BITS[mode]) if mode in quantize.FOUR_BITS else Int8Linear(linear), linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", quick([False, True], True))
@pytest.mark.parametrize("width", [40, 128])
@pytest.mark.parametrize("mode", MODES)
def test_a_layer_multiplies_by_the_weights_that_it_stands_for(mode: str, width: int, bias: bool, dtype: torch.dtype) -> None:
    """Forward, and the gradient that LoRA in earlier layers needs; one row and many, and widths that vectors do not divide."""
    quantised, linear = layer(mode, bias, dtype, width)
    weight = quantised.dense(dtype)
    for rows in (1, 3, 50):
        x, y = (torch.randn(2, rows, width, dtype=dtype, requires_grad=True) for _ in range(2))
        y.data = x.data.clone()
        grad = torch.randn(2, rows, 24, dtype=dtype)
        quantised(x).backward(grad)
        F.linear(y, weight, linear.bias).backward(grad)
        tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
        torch.testing.assert_close(quantised(x), F.linear(y, weight, linear.bias), **tolerance)
        torch.testing.assert_close(x.grad, y.grad, **tolerance)
        if isinstance(quantised, Int8Linear) and rows == 1:  # few rows are multiplied in bf16
            tolerance = {"atol": 2e-2, "rtol": 2e-2}
        with torch.no_grad():
            torch.testing.assert_close(quantised(x), F.linear(y, weight, linear.bias), **tolerance)


def test_eight_bits_in_closed_form() -> None:
    quantised, linear = layer("int8")
    scale = linear.weight.abs().amax(1, keepdim=True) / 127
    assert torch.equal(quantised.quantised, (linear.weight / scale).round().to(torch.int8))
    torch.testing.assert_close(quantised.dense(torch.float32), (linear.weight / scale).round() * scale)
    assert (quantised.dense(torch.float32) - linear.weight).abs().max() <= scale.max() / 2 * 1.001
    empty = torch.nn.Linear(8, 4, bias=False)
    empty.weight.data.zero_()
    assert not Int8Linear(empty).dense(torch.float32).any(), "a row of zeros divides by nothing"


@needs_bitsandbytes
def test_the_rows_are_those_of_bitsandbytes() -> None:
    import bitsandbytes

    linear = torch.nn.Linear(64, 48, bias=False)
    linear.weight.data = linear.weight.data.half().float()
    rows, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(linear.weight.data.half())
    quantised = Int8Linear(linear)
    assert torch.equal(quantised.quantised, rows)
    torch.testing.assert_close(quantised.scales, largest / 127)


@needs_bitsandbytes
def test_four_bits_are_the_nearest_of_the_papers_levels() -> None:
    quantised, linear = layer("bnb.nf4", width=64, out=32)
    groups = linear.weight.detach().view(-1, 64)
    largest = groups.abs().amax(1, keepdim=True)
    nearest = NF4[(groups / largest)[..., None].sub(NF4).abs().argmin(-1)] * largest
    torch.testing.assert_close(quantised.dense(torch.float32).view(-1, 64), nearest, atol=2e-6, rtol=1e-5)
    assert sum(buffer.nbytes for buffer in quantised.buffers()) == 32 * 64 / 2 + 32 * 4 + 16 * 4
    double, _ = layer("bnb.nf4-dq", width=64, out=32)
    error = (double.dense(torch.float32) - quantised.dense(torch.float32)).norm() / nearest.norm()
    assert 0 < error < 0.05


@needs_bitsandbytes
def test_a_single_row_without_the_dense_weights() -> None:
    """What a GPU does for each token of an answer."""
    for mode in quantize.FOUR_BITS:
        quantised, linear = layer(mode, bias=True, width=128, out=64)
        x = torch.randn(1, 1, 128)
        torch.testing.assert_close(quantised.one_row(x), F.linear(x, quantised.dense(x.dtype), linear.bias), atol=1e-4, rtol=1e-4)


def test_autocast_decides_the_dtype() -> None:
    quantised, _ = layer("int8")
    x = torch.randn(3, 40, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantised(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


LLAMA: dict[str, Any] = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 48, "parallel_residual": False}
MOE = {**LLAMA, "mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2}


@pytest.mark.parametrize("settings", [{}, LLAMA, MOE], ids=["neox", "llama", "moe"])
@pytest.mark.parametrize("adapters", [{}, {"lora_r": 2, "lora_query": True, "lora_mlp": True, "lora_head": True}], ids=["base", "lora"])
def test_every_linear_layer_of_the_blocks_and_no_other(settings: dict[str, Any], adapters: dict[str, Any]) -> None:
    model = tiny.move_adapters(tiny.tiny(**settings, **adapters))
    before = {name: value.clone() for name, value in model.named_parameters() if lora.lora_filter(name)}
    numbers, logits = sum(p.numel() for p in model.parameters()), model(tiny.ids(2, 9))
    quantise(model, "int8")
    left = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert {name.replace(".linear", "").rpartition(".")[2] for name in left} == {"lm_head"} | ({"gate"} if settings is MOE else set())
    assert any(isinstance(module, QuantisedLinear) for module in model.modules()) and count(model) == numbers
    after = {name: value for name, value in model.named_parameters() if lora.lora_filter(name)}
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    near = model(tiny.ids(2, 9))
    assert not torch.equal(near, logits) and (settings is MOE or (near - logits).norm() / logits.norm() < 0.1)


@pytest.mark.parametrize("mode", quick(MODES, "int8", "bnb.int8-training"))
def test_lora_learns_as_on_the_dense_weights(mode: str) -> None:
    """The gradients of every adapter, through quantised layers, equal those of a model that has W' in plain layers."""
    settings = {**LLAMA, "lora_r": 3, "lora_query": True, "lora_value": True, "lora_mlp": True}
    model, dense = (tiny.move_adapters(tiny.tiny(**settings)) for _ in range(2))
    quantise(model, mode)
    for name, module in model.named_modules():
        if isinstance(module, QuantisedLinear):
            dense.get_submodule(name).weight.data = module.dense(torch.float32)
    for one in (model, dense):
        lora.mark_only_lora_as_trainable(one)
        one(tiny.ids(2, 12)).float().square().mean().backward()
    got, want = ({name: p.grad for name, p in one.named_parameters() if p.requires_grad} for one in (model, dense))
    assert got.keys() == want.keys() and all(value is not None and value.any() for value in want.values())
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-4)


def test_nothing_of_a_block_is_kept_dense() -> None:
    """Autograd keeps no W': memory is what the quantised numbers take."""
    quantised, _ = layer("int8", width=256, out=256)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda tensor: tensor):
        quantised(torch.randn(2, 256, requires_grad=True))
    assert sum(tensor.numel() for tensor in kept) < 256 * 256
    assert sum(buffer.nbytes for buffer in quantised.buffers()) == 256 * 256 + 256 * 4


def test_a_cache_belongs_to_one_quantisation() -> None:
    samples = [Sample(array("i", tiny.ids(1, 12)[0].tolist()), bytearray([0] * 6 + [1] * 6))]
    settings = {**LLAMA, "lora_r": 2, "skip2lora_enabled": True, "skip2lora_block_indices": [1]}
    found = []
    for mode in (None, "int8", *(quantize.FOUR_BITS if HAS_BITSANDBYTES else ())):
        model = tiny.tiny(**settings)
        if mode:
            quantise(model, mode)
        found.append(fingerprint(model, samples, plan(model, samples, [0], torch.float32), torch.device("cpu")))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("mode", quick(MODES, "int8"))
def test_generate_and_chat(mode: str, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A cached token by token answer is the one of the whole sequence."""
    words = ["--quantize", mode, "--max_new_tokens", "4", "--temperature", "0", "--precision", "32-true"]
    assert main(["generate", str(base), *words]) == 0
    out, err = capsys.readouterr()
    assert f"float32, {mode} on cpu" in err
    llm = LLM.load(base, precision="32-true", quantize=mode)
    ids = llm.tokenizer.encode(llm.prompt_style.apply("What food do llamas eat?"))
    for _ in range(4):
        ids = torch.cat((ids, llm.model(ids[None])[0, -1].argmax()[None]))
    assert llm.tokenizer.decode(ids) + "\n" == out
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert main(["chat", str(base), *words]) == 0


def test_wrong_modes(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(base), "--quantize", "bnb.nf5"]) == 2
    assert "bnb.nf4" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"quantize is 'nf4': choose one of bnb\.nf4"):
        LLM.load(base, quantize="nf4")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (None, r'not installed \(bitsandbytes\): pip install "litgpt\[quantize\]"'),
        ("raise OSError('no library')", "cannot be used: no library"),
    ],
)
def test_without_bitsandbytes(fault: str | None, reason: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    if fault is None:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    else:
        (tmp_path / "bitsandbytes.py").write_text(fault)
        monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"^quantize.*{reason}.*int8"):
        LLM.load(base, quantize="bnb.nf4")
    with pytest.raises(UserError, match=f"^optimizer.*{reason}.*AdamW"):
        make_optimizer("bitsandbytes.optim.AdamW8bit", [torch.nn.Parameter(torch.zeros(1))])


def test_its_import_fetches_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes asks the package `kernels`, if there is one, for compiled code from a hub."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("bitsandbytes", "kernels")]:
        monkeypatch.delitem(sys.modules, name)
    log = tmp_path / "asked.json"
    (tmp_path / "kernels.py").write_text(f"def get_kernel(*args, **kwargs):\n    open({str(log)!r}, 'w').write('asked')\n")
    text = "try:\n    from kernels import get_kernel\n    get_kernel('x')\nexcept ImportError:\n    pass\n"
    (tmp_path / "bitsandbytes.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    quantize.bitsandbytes()
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    assert not log.exists() and "kernels" not in sys.modules
    import kernels  # type: ignore[import-not-found]

    kernels.get_kernel()
    assert log.read_text() == "asked", "it is there for others"
    monkeypatch.delitem(sys.modules, "kernels")
