"""Weights in the layout of oneDNN, for answering in fp32 on an x86 processor.

The product of a few rows by a plain weight reads the weight once for each row or two; oneDNN's blocks of it are read once for all rows. It
is the same sum in another order. There are no gradients.
"""

import platform

import torch
from torch import nn

from litgpt.model import GPT
from litgpt.quantize import QuantisedLinear, frozen_linears

ROWS = 8  # that the layout is chosen for


class PackedLinear(QuantisedLinear):
    """y = x W^T + b, with W in blocks alone."""

    packed: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.register_buffer("packed", _blocks(linear.weight), persistent=False)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.packed.to_dense().to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _product(x, self.packed, self.bias)


class PackedHead(nn.Linear):
    """An output layer with W in blocks beside the plain weight, which losses read, and the embedding if the two are tied."""

    packed: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _product(x, self.packed, self.bias)


def pack(model: GPT) -> None:
    """Pack the blocks' linear layers and the output layer, in place, where it pays: in fp32 on an x86 processor. Adapters stay."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.mkldnn.is_available()
    if not is_x86 or model.dtype != torch.float32 or not model.head.weight.is_cpu:
        return
    for parent, name, linear in frozen_linears(model):
        if type(linear) is nn.Linear:
            setattr(parent, name, PackedLinear(linear).train(linear.training))
    head = model.head
    if type(head) is nn.Linear:
        if not hasattr(head, "packed"):  # an adapted copy shares the base's
            head.register_buffer("packed", _blocks(head.weight), persistent=False)
        head.__class__ = PackedHead


def _blocks(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def _product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
