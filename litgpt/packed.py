"""Frozen weights in the layout with which a library multiplies fastest, on an x86 processor.

fp32 weights are kept in fp16. With few rows a product is memory-bound: half the bytes take half the time. FBGEMM multiplies fp32 rows by
weights in fp16, with sums in fp32, and is no slower than MKL for many rows. The weights of a bf16 checkpoint are exact in fp16, except
for the tiniest; others are packed only if rounding them to fp16 changes them by less than fp32's own precision.

bf16 weights are kept in oneDNN's blocks if the processor multiplies bf16. oneDNN would make the blocks of a plain weight for each product.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from litgpt.model import GPT
from litgpt.quantize import QuantisedLinear, frozen_linears

PRECISION = 2.0**-24  # of fp32
BLOCK = 512  # inputs per block; FBGEMM allocates whole blocks
LARGE = 2**27  # numbers in a bf16 output layer, above which training packs it for the gradient alone: a copy takes 256 MiB


class Packed:
    """W (out, in) in another layout: x W^T for x (..., in), and with gradients dx = dy W. Copies of a model share it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, backward: bool = False, forward: bool = True) -> None:
        """Raise ValueError if fp16 is too coarse for an fp32 weight. `backward`: with gradients. Without `forward`, x W^T is plain."""
        weight = weight.detach()
        self.lost = lost_in_fp16(weight) if weight.dtype == torch.float32 else None
        self.blocks = _layout(weight, bias) if forward else Layout(lambda x: F.linear(x, weight, bias), lambda: weight)
        self.transposed = _layout(weight.t()) if backward else None

    def __deepcopy__(self, memo: Any) -> Packed:
        return self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else self.times(x)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Return x W^T + b, (..., in) -> (..., out), without a graph."""
        return self.blocks.times(x)

    def back(self, grad: torch.Tensor) -> torch.Tensor:
        """Return dy W, (..., out) -> (..., in)."""
        if self.transposed is None:
            self.transposed = _layout(self.dense().t())
        return self.transposed.times(grad)

    def dense(self) -> torch.Tensor:
        """Return W in its own dtype, bit for bit."""
        weight = self.blocks.dense()
        return weight if self.lost is None else weight.index_put_(*self.lost)


class Layout(NamedTuple):
    """W in a library's own layout."""

    times: Callable[[torch.Tensor], torch.Tensor]
    """x W^T + b"""
    dense: Callable[[], torch.Tensor]
    """W"""


def _layout(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Layout:
    """Lay fp32 weights out in fp16, for FBGEMM, or bf16 weights in blocks, for oneDNN."""
    fbgemm, onednn = torch.ops.quantized, torch.ops.mkldnn
    if weight.dtype == torch.float32:
        half = fbgemm.linear_prepack_fp16(weight.contiguous(), bias)
        return Layout(lambda x: fbgemm.linear_dynamic_fp16(x, half), lambda: fbgemm.linear_unpack_fp16(half)[0])
    blocks = onednn._reorder_linear_weight(weight.contiguous())
    return Layout(lambda x: onednn._linear_pointwise(x, blocks, bias, "none", [], ""), blocks.to_dense)


def lost_in_fp16(weight: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return the places and values of the few numbers that fp16 cannot hold. Raise ValueError if they matter."""
    rounded = weight.half().float()
    if not torch.linalg.vector_norm(weight - rounded) <= PRECISION * torch.linalg.vector_norm(weight):
        raise ValueError("these weights are not exact in fp16")
    places = (weight != rounded).nonzero(as_tuple=True)
    return places, weight[places]


def packed_bytes(linear: nn.Linear, backward: bool) -> int:
    """Return the memory of a packed fp32 layer. `backward`: gradients are needed."""
    shapes = [(linear.out_features, linear.in_features), (linear.in_features, linear.out_features)]
    return sum(2 * rows * -(-columns // BLOCK) * BLOCK for rows, columns in shapes[: 1 + backward])


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
    """y = x W^T + b, with W only in packed form. In a state dict it is plain."""

    def __init__(self, linear: nn.Linear, packed: Packed) -> None:
        super().__init__(linear)
        self.packed = packed

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.packed.dense().to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed(x)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.packed.dense()


class PackedHead(nn.Linear):
    """An output layer with W packed in addition to the plain weight, which is the embedding's if the two are tied."""

    packed: Packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed(x)


def pack(model: GPT, backward: bool = False) -> None:
    """Pack the frozen linear layers of the blocks and the output layer, in place, where it pays. Adapters stay.

    `backward`: also for training. Layers that gradients reach are prepared for them; those in bf16 stay plain, because a second layout
    would double their memory to save a few percent of time, and so do layers with DoRA, which reads W. A large output layer in bf16 is
    packed for its gradient alone, which gains most.
    """
    head, device = model.head, next(model.parameters()).device
    if device.type != "cpu" or not is_supported(model.dtype):
        return
    behind = behind_cut(model)

    def replace(place: tuple[nn.Module, str]) -> None:
        parent, name = place
        linear = getattr(parent, name)
        learns = backward and id(linear) in behind
        if learns and (model.dtype == torch.bfloat16 or hasattr(parent, "lora_magnitude")):
            return
        if (packed := _packed(linear, learns)) is not None:
            setattr(parent, name, PackedLinear(linear, packed).train(linear.training))

    places = [(parent, name) for parent, name, linear in frozen_linears(model) if type(linear) is nn.Linear]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        of_head = pool.submit(_packed, head, False, not (backward and model.dtype == torch.bfloat16 and is_large(head)))
        transposed = pool.submit(_layout, head.weight.detach().t()) if backward and _is_frozen(head) else None  # the largest: by itself
        list(pool.map(replace, places))
    if type(head) is nn.Linear and (packed := of_head.result()) is not None:
        if transposed is not None:
            packed.transposed = transposed.result()
        head.__class__, head.packed = PackedHead, packed  # type: ignore[assignment]


def is_supported(dtype: torch.dtype) -> bool:
    """Return True if this processor multiplies faster with packed weights of that dtype."""
    is_x86 = "fbgemm" in torch.backends.quantized.supported_engines
    return is_x86 and (dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def behind_cut(model: GPT) -> set[int]:
    """Return the ids of the blocks' modules that gradients reach."""
    return {id(module) for block in model.blocks[model.cut or 0 :] for module in block.modules()}


def compilable(model: GPT) -> None:
    """Let torch.compile see each packed product as one operator, in place: it cannot look into FBGEMM's weights."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear | PackedHead)]

    @torch.library.custom_op(f"litgpt::packed_{id(model)}", mutates_args=())
    def product(x: torch.Tensor, index: int, out: int) -> torch.Tensor:
        return layers[index].packed.times(x)

    @product.register_fake
    def _(x: torch.Tensor, index: int, out: int) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], out)

    for index, layer in enumerate(layers):
        layer.forward = partial(product, index=index, out=layer.out_features)  # type: ignore[method-assign]


def unpack(model: GPT) -> None:
    """Give the layers that `pack` packed their plain weights again, in place."""

    def restore(place: tuple[nn.Module, str, PackedLinear]) -> None:
        parent, name, layer = place
        with torch.device("meta"):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight, linear.bias = nn.Parameter(layer.packed.dense(), requires_grad=False), layer.bias
        setattr(parent, name, linear.train(layer.training))

    modules = list(model.modules())
    places = [(parent, name, layer) for parent in modules for name, layer in parent.named_children() if isinstance(layer, PackedLinear)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(restore, places))
    if isinstance(head := model.head, PackedHead):
        head.__class__ = nn.Linear  # type: ignore[assignment]
        del head.packed


def is_large(head: Any) -> bool:
    """Return True for an output layer of which training in bf16 keeps one packed copy, not two."""
    return bool(head.weight.numel() > LARGE)


def _packed(linear: Any, backward: bool, forward: bool = True) -> Packed | None:
    """Return the packed weight of a layer. None if the layer is trained, or its weight cannot be packed."""
    if isinstance(packed := getattr(linear, "packed", None), Packed):
        return packed
    if not _is_frozen(linear):
        return None
    try:
        return Packed(linear.weight, linear.bias, backward, forward)
    except ValueError:
        return None


def _is_frozen(linear: Any) -> bool:
    return type(linear) is nn.Linear and not any(parameter.requires_grad for parameter in linear.parameters())
