"""One structural predicate: what an `Adapter` holds itself is trained, saved, counted and renewed, whatever it is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from litgpt import lora
from litgpt.adapters.base import Adapter, adapter_parameters, adapter_state, adapters, renew_adapters
from litgpt.quantize import QuantisedLinear, quantise
from tests.helpers import tiny


class Scale(Adapter):
    """A gain on a wrapped layer's output: no LoRA, and no name like LoRA's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.gain = layer, nn.Parameter(torch.empty(layer.out_features))  # type: ignore[arg-type]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.gain


def scaled(**settings: Any) -> Any:
    model = tiny.tiny(lora_r=3, lora_query=True, **settings)
    for block in model.transformer.h:
        block.mlp.proj = Scale(block.mlp.proj)
    return model


def test_an_adapter_of_any_kind_is_trained_saved_and_renewed() -> None:
    model = scaled()
    names = {f"transformer.h.{i}.{name}" for i in range(5) for name in ("attn.qkv.lora_A", "attn.qkv.lora_B", "mlp.proj.gain")}
    assert adapter_parameters(model).keys() == adapter_state(model).keys() == names and len(list(adapters(model))) == 10
    lora.mark_only_lora_as_trainable(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names
    model.transformer.h[0].mlp.proj.gain.data.fill_(7)
    torch.manual_seed(5)
    renew_adapters(model)
    assert model.transformer.h[0].mlp.proj.gain.eq(1).all()
    assert all(parameter.dtype == torch.float32 for parameter in adapter_parameters(model).values())


def test_the_wrapped_layer_is_the_bases() -> None:
    model = scaled()
    quantise(model, "int8")
    assert isinstance(model.transformer.h[0].mlp.proj.layer, QuantisedLinear)
    assert len(adapter_parameters(model)) == 15


def test_in_front_of_the_cut_only_adapters_that_skip_it_are_trained() -> None:
    model = scaled(skip2lora_enabled=True, skip2lora_output_layer="transformer.h.3", skip2lora_block_indices=[0, 2], skip2lora_warmup=True)
    lora.mark_only_lora_as_trainable(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    behind = {f"transformer.h.{i}.{name}" for i in (3, 4) for name in ("attn.qkv.lora_A", "attn.qkv.lora_B", "mlp.proj.gain")}
    assert trained == behind | {f"transformer.h.{i}.skip2lora.lora_{which}" for i in (0, 2) for which in "AB"}


def test_a_model_without_adapters() -> None:
    assert not adapter_parameters(tiny.tiny()) and not adapter_state(nn.Linear(2, 2))
