"""litgpt/fused.py: gradients against finite differences, values, rounding and losses against autograd, dropout's distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from litgpt import attention, fused, lora, mlp
from litgpt.adapters import layers
from litgpt.lora import LoRALinear, LoRAQKVLinear
from litgpt.optim import make_optimizer
from litgpt.quantize import Int8Linear
from tests.helpers import tiny
from tests.helpers.cases import first


def plain_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None and weight.dtype == wide.dtype:
        return (unit * weight).to(x.dtype)
    return unit.to(x.dtype) if weight is None else unit.to(x.dtype) * weight


def plain_gated(gate: torch.Tensor, up: torch.Tensor, approximate: Any = None) -> torch.Tensor:
    return (F.silu(gate) if approximate is None else F.gelu(gate, approximate=approximate)) * up


def dropped(x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """With the same dropout in every call, which makes it a smooth function."""
    torch.manual_seed(3)
    return fused.thin(x, A, 0.4)


def plain_dropped(x: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(3)
    kept = fused.drop(torch.ones_like(x), fused.draw(x, 0.4), 0.4)
    return F.linear(x * kept, A)


# name -> function, the same by autograd, the shapes of its inputs
FUNCTIONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor], list[tuple[int, ...]]]] = {
    "rms_norm": (lambda x, w: fused.rms_norm(x, w, 1e-3), lambda x, w: plain_norm(x, w, 1e-3), [(2, 3, 6), (6,)]),
    "rms_norm without a weight": (lambda x: fused.rms_norm(x, None, 1e-3), lambda x: plain_norm(x, None, 1e-3), [(5, 6)]),
    "silu": (fused.gated, plain_gated, [(2, 3, 5)] * 2),
    "gelu": (lambda g, u: fused.gated(g, u, "none"), lambda g, u: plain_gated(g, u, "none"), [(7, 5)] * 2),
    "gelu, tanh": (lambda g, u: fused.gated(g, u, "tanh"), lambda g, u: plain_gated(g, u, "tanh"), [(7, 5)] * 2),
    "thin": (fused.thin, F.linear, [(7, 6), (2, 6)]),
    "thin, dropout": (dropped, plain_dropped, [(7, 6), (2, 6)]),
}
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def draws(shapes: list[tuple[int, ...]], device: str = "cpu", scale: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*(scale * size for size in shape), dtype=torch.float64, generator=generator).to(device) for shape in shapes]


@on_each_device
@each_function
def test_gradients(name: str, device: str) -> None:
    """In fp64, against finite differences and autograd, with each input frozen and trained."""
    function, plain, shapes = FUNCTIONS[name]
    for trained in range(1, 2 ** len(shapes)):
        inputs = [value.requires_grad_(bool(trained >> i & 1)) for i, value in enumerate(draws(shapes, device))]
        assert torch.autograd.gradcheck(function, inputs)
        assert_close(function(*inputs), plain(*inputs))


@on_each_device
@each_function
def test_bf16_is_no_less_exact_than_autograd(name: str, device: str) -> None:
    """The root mean square distance of values and gradients from those in fp64."""
    function, plain, shapes = FUNCTIONS[name]
    exact = [value.bfloat16() for value in draws(shapes, device, scale=8)]

    def results(run: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [value.to(dtype, copy=True).requires_grad_() for value in exact]
        y = run(*inputs)
        y.backward(draws([tuple(y.shape)], device)[0].bfloat16().to(dtype))
        return [y.detach().double(), *(value.grad.double() for value in inputs if value.grad is not None)]

    cases = ((plain, torch.float64), (function, torch.bfloat16), (plain, torch.bfloat16))
    for want, ours, theirs in zip(*(results(*case) for case in cases), strict=True):
        assert (ours - want).norm() <= 1.02 * (theirs - want).norm() + 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_is_computed_in_fp32(dtype: torch.dtype) -> None:
    """But for a few values on the edge of rounding. A weight in fp32 multiplies before the quotient is rounded."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 64, generator=generator).to(dtype), torch.randn(64, generator=generator)
    unit = F.rms_norm(x.float(), (64,), None, 1e-5)
    for weight, want in ((w.to(dtype), unit.to(dtype) * w.to(dtype)), (w, (unit * w).to(dtype))):
        assert (fused.rms_norm(x, weight, 1e-5) != want).float().mean() < 0.01


@pytest.mark.parametrize("p", [0.02, 0.5, 0.9])
def test_dropout_keeps_each_element_with_its_probability(p: float) -> None:
    """Rates overall, of the first and last elements, and of neighbours dropped together: independent draws."""
    torch.manual_seed(0)
    ones = torch.ones(40, 50)
    runs = torch.stack([fused.drop(ones, fused.draw(ones, p), p) == 0 for _ in range(400)]).double().flatten(1)

    def near(share: torch.Tensor, rate: float, count: int) -> bool:
        return abs(share.item() - rate) < 5 * (rate * (1 - rate) / count) ** 0.5 + 1e-9

    assert near(runs.mean(), p, runs.numel())
    assert all(near(runs[:, part].mean(), p, 400 * 10) for part in (slice(10), slice(-10, None)))
    assert near((runs[:, 1:] * runs[:, :-1]).mean(), p * p, runs.numel() // 2)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 9)])
def test_dropout_by_places_and_by_a_mask(shape: tuple[int, ...]) -> None:
    """The same values; a GPU draws a mask. The places may be none."""
    torch.manual_seed(0)
    x = torch.rand(*shape) + 1
    for _ in range(5):
        drawn = fused.draw(x, 0.25)
        got = fused.drop(x, drawn, 0.25)
        assert_close(got, torch.where(got == 0, 0, x / 0.75))
        assert_close(fused.drop(x, got != 0, 0.25), got)


def test_frozen_a_keeps_no_input() -> None:
    """LoRA-FA: the places of the dropout, a byte or so for an element, and not x."""
    kept: list[torch.Tensor] = []
    x, A = torch.randn(100, 64, requires_grad=True), torch.randn(4, 64)
    for trained in (True, False):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
            fused.thin(x, A.requires_grad_(trained), 0.05)
        assert any(tensor.shape == x.shape for tensor in kept) == trained


@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6), (6,)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "bias", "qkv", "int8"])
def test_lora_layers(kind: str, shape: tuple[int, ...]) -> None:
    """y = W x + s B A x and its gradients, over rows, sequences and a single row; the frozen layer's own output is not overwritten."""
    torch.manual_seed(0)
    layer = LoRALinear(6, 5, 2, 3.0, bias=kind == "bias")
    if kind == "qkv":
        layer = LoRAQKVLinear(6, 16, 2, 4, 2, 2, 3.0, 0.0, (True, False, True))
    layer.linear = Int8Linear(layer.linear) if kind == "int8" else layer.linear
    layer = layer.double().requires_grad_(False)
    weights = [torch.nn.init.normal_(parameter).requires_grad_() for parameter in (layer.lora_A, layer.lora_B)]
    outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    layer.linear.register_forward_hook(lambda *call: outputs.append((call[-1], call[-1].clone())))
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    want = F.linear(x, layer.weight().double() + layer.up() @ layer.lora_A, layer.linear.bias)
    assert_close(y, want, rtol=1e-6, atol=1e-6)
    direction = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(result, (x, *weights), direction) for result in (y, want))
    assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(output, copy) for output, copy in outputs)


@pytest.mark.parametrize("full", first([False, True]), ids=["lora", "full"])
def test_losses_are_those_of_autograd(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 steps of AdamW in fp32, without dropout: equal to 1e-6."""

    def losses() -> torch.Tensor:
        torch.manual_seed(0)
        gpt = tiny.tiny(n_layer=2, lora_r=0 if full else 3, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", **tiny.ALL_LORA)
        if not full:
            lora.mark_only_lora_as_trainable(tiny.move_adapters(gpt))
        optimizer = make_optimizer({"class_path": "AdamW", "init_args": {"lr": 1e-3}}, [p for p in gpt.parameters() if p.requires_grad])
        found = []
        for step in range(30):
            idx = tiny.ids(2, 17, seed=step % 3)
            loss = F.cross_entropy(gpt(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return torch.stack(found)

    ours = losses()
    for module, name, plain in (
        (mlp, "gated", plain_gated),
        (attention, "rms_norm", plain_norm),
        (layers, "thin", lambda x, A, p: F.linear(x, A)),
    ):
        monkeypatch.setattr(module, name, plain)
    assert_close(ours, losses(), rtol=1e-6, atol=0)
    assert ours[-1] < ours[0]
