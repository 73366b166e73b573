"""Compiled passes against plain ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from litgpt.compiled import compile_steps, compile_training
from litgpt.errors import UserError
from litgpt.packed import PackedLinear, is_supported, pack
from tests.generate.test_engine import greedy
from tests.helpers import tiny


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the list of the graphs that are compiled from now on, which run as they are."""
    graphs: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    return graphs


@pytest.mark.slow
def test_compiled_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits and gradients, from one graph for all blocks and lengths. Passes without gradients are not compiled."""
    plain, model = tiny.tiny(), tiny.tiny()
    graphs = counted(monkeypatch)
    compile_training(model)
    for length in (5, 8, 13):
        idx = tiny.ids(2, length)
        for each in (plain, model):
            each.zero_grad()
            each(idx).square().sum().backward()
        assert torch.equal(model(idx), plain(idx))
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        assert all(torch.equal(own.grad, other.grad) for own, other in pairs if other.grad is not None)
    assert 1 <= len(graphs) <= 2  # the first block's input has no gradient if the embedding is frozen
    with torch.no_grad():
        model(tiny.ids(2, 21))
    assert len(graphs) <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapters", [{}, {"skip2lora_enabled": True, "skip2lora_block_indices": [0, 1], "lora_r": 3}], ids=["plain", "taps"]
)
def test_compiled_steps(adapters: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers, from one graph for all lengths, by packed weights where the processor has them."""
    model = tiny.move_adapters(tiny.tiny(**adapters))
    for linear in (module for module in model.modules() if type(module) is torch.nn.Linear):
        linear.requires_grad_(False).weight.copy_(linear.weight.half())  # so that fp16 holds them
    pack(model)
    assert any(isinstance(module, PackedLinear) for module in model.modules()) == is_supported(torch.float32)
    prompt = tiny.ids(1, 5)[0]
    want = [greedy(model, prompt[:length], length + 20) for length in (3, 5)]
    graphs = counted(monkeypatch)
    compile_steps(model)
    assert [greedy(model, prompt[:length], length + 20) for length in (3, 5)] == want
    assert len(graphs) == 1


@pytest.mark.slow
def test_without_a_compiler() -> None:
    from torch._inductor import config

    model = tiny.tiny()
    torch.compiler.reset()
    compile_steps(model)
    without = config.patch({"cpp.cxx": ("/nonexistent",), "force_disable_caches": True})
    with without, pytest.raises(UserError, match=r"compile: .*C\+\+ compiler.* Leave the option out"):
        greedy(model, tiny.ids(1, 5)[0], 9)
