"""Frozen fp32 weights kept in fp16, for products on an x86 processor.

Few rows are multiplied as fast as the weight is read: half the bytes take half the time. FBGEMM multiplies fp32 rows by weights in fp16,
with sums in fp32, and is no slower than MKL at many rows. The weights of a bf16 checkpoint are the same numbers in fp16, but for the
tiniest; others are packed only if rounding them to fp16 changes them by less than fp32's own precision.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from litgpt.model import GPT
from litgpt.quantize import QuantisedLinear, frozen_linears

PRECISION = 2.0**-24  # of fp32
BLOCK = 512  # inputs of a block, of which FBGEMM allocates whole ones


class Packed:
    """W (out, in) in fp16: x W^T for x (..., in), and with gradients dx = dy W. Copies of a model share it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, backward: bool = False) -> None:
        """Raise ValueError if fp16 is too coarse for the weight. `backward`: it will be asked for gradients."""
        weight = weight.detach()
        rounded = weight.half().float()
        if not torch.linalg.vector_norm(weight - rounded) <= PRECISION * torch.linalg.vector_norm(weight):
            raise ValueError("these weights are no fp16 numbers")
        self.others = (weight != rounded).nonzero(as_tuple=True)
        self.values = weight[self.others]
        self.blocks = _blocks(weight, bias)
        self.transposed = _blocks(weight.t()) if backward else None

    def __deepcopy__(self, memo: Any) -> Packed:
        return self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", _Product.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else self.times(x))

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b, (..., in) -> (..., out), without a graph."""
        return cast("torch.Tensor", torch.ops.quantized.linear_dynamic_fp16(x, self.blocks))

    def back(self, grad: torch.Tensor) -> torch.Tensor:
        """Return dy W, (..., out) -> (..., in)."""
        if self.transposed is None:
            self.transposed = _blocks(self.dense().t())
        return cast("torch.Tensor", torch.ops.quantized.linear_dynamic_fp16(grad, self.transposed))

    def dense(self) -> torch.Tensor:
        """Return W, fp32, bit for bit."""
        weight, _ = torch.ops.quantized.linear_unpack_fp16(self.blocks)
        return cast("torch.Tensor", weight.index_put_(self.others, self.values))


def packed_bytes(linear: nn.Linear, backward: bool) -> int:
    """Return the memory of a packed layer. `backward`: gradients are asked for."""
    shapes = [(linear.out_features, linear.in_features), (linear.in_features, linear.out_features)]
    return sum(2 * rows * -(-columns // BLOCK) * BLOCK for rows, columns in shapes[: 1 + backward])


def _blocks(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    return torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)


class _Product(torch.autograd.Function):
    """y = x W^T + b       dx = dy W"""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, packed: Packed) -> torch.Tensor:
        ctx.packed = packed
        return packed.times(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.packed.back(grad), None


class PackedLinear(QuantisedLinear):
    """y = x W^T + b, with W in fp16 alone. In a state dict it is in fp32."""

    def __init__(self, linear: nn.Linear, packed: Packed) -> None:
        super().__init__(linear)
        self.packed = packed

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.packed.dense().to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed(x)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dense(torch.float32)


class PackedHead(nn.Linear):
    """An output layer with W in fp16 beside the plain weight, which is the embedding's if the two are tied."""

    packed: Packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed(x)


def pack(model: GPT, backward: bool = False) -> None:
    """Pack the frozen linear layers of the blocks and the output layer, in place, where it pays. Adapters stay.

    `backward`: for training too. Layers that gradients reach are made ready for them, and those with DoRA, which reads W, stay plain.
    """
    head, device = model.head, next(model.parameters()).device
    if "fbgemm" not in torch.backends.quantized.supported_engines or device.type != "cpu" or model.dtype != torch.float32:
        return
    behind = behind_cut(model)

    def replace(place: tuple[nn.Module, str]) -> None:
        parent, name = place
        linear = getattr(parent, name)
        if (packed := _packed(linear, backward and id(linear) in behind)) is not None:
            setattr(parent, name, PackedLinear(linear, packed).train(linear.training))

    places = [(parent, name) for parent, name, linear in frozen_linears(model) if type(linear) is nn.Linear]
    if backward:
        places = [place for place in places if not hasattr(place[0], "lora_magnitude")]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        of_head = pool.submit(_packed, head, False)
        transposed = pool.submit(_blocks, head.weight.detach().t()) if backward and _is_frozen(head) else None  # the largest: by itself
        for _ in pool.map(replace, places):
            pass
    if type(head) is nn.Linear and (packed := of_head.result()) is not None:
        if transposed is not None:
            packed.transposed = transposed.result()
        head.__class__, head.packed = PackedHead, packed  # type: ignore[assignment]


def behind_cut(model: GPT) -> set[int]:
    """Return the ids of the blocks' modules that gradients reach."""
    return {id(module) for block in model.blocks[model.cut or 0 :] for module in block.modules()}


def unpack(model: GPT) -> None:
    """Give the layers that `pack` packed their plain weights again, in place."""

    def restore(place: tuple[nn.Module, str, PackedLinear]) -> None:
        parent, name, layer = place
        with torch.device("meta"):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight, linear.bias = nn.Parameter(layer.dense(torch.float32), requires_grad=False), layer.bias
        setattr(parent, name, linear.train(layer.training))

    modules = list(model.modules())
    places = [(parent, name, layer) for parent in modules for name, layer in parent.named_children() if isinstance(layer, PackedLinear)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(restore, places):
            pass
    if isinstance(head := model.head, PackedHead):
        head.__class__ = nn.Linear  # type: ignore[assignment]
        del head.packed


def _packed(linear: Any, backward: bool) -> Packed | None:
    """Return the packed weight of a layer. None if the layer is trained, or its weight cannot be packed."""
    if isinstance(packed := getattr(linear, "packed", None), Packed):
        return packed
    if not _is_frozen(linear):
        return None
    try:
        return Packed(linear.weight, linear.bias, backward)
    except ValueError:
        return None


def _is_frozen(linear: Any) -> bool:
    return type(linear) is nn.Linear and not any(parameter.requires_grad for parameter in linear.parameters())
