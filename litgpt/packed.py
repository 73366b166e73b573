"""Frozen weights in the layout with which a library multiplies fastest, on an x86 processor.

fp32 weights are kept in fp16. With few rows a product is memory-bound: half the bytes take half the time. FBGEMM multiplies fp32 rows by
weights in fp16, with sums in fp32, and is no slower than MKL for many rows. The weights of a bf16 checkpoint are exact in fp16, except
for the tiniest; others are packed only if rounding them to fp16 changes them by less than fp32's own precision.

bf16 weights are kept in oneDNN's blocks if the processor multiplies bf16. oneDNN would make the blocks of a plain weight for each product.

Weights in 8 bits are kept in oneDNN's blocks too, and x is written as a sum of two integers of 8 bits with a scale for each row:

    x = t (a + b / 254)      a, b from -127 to 127, t = max |x| / 127        y = t (a q^T + b q^T / 254) s

Products and sums of integers are exact, so y has an error of 3e-5, as x has 15 bits, and q is read once for both. To compute W first takes
up to four times as long for 1 to 64 rows, and as long for more. Small layers gain nothing.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import skip_init

from litgpt.model import GPT
from litgpt.quantize import Int8Linear, QuantisedLinear, frozen_linears

PRECISION = 2.0**-24  # of fp32
BLOCK = 512  # inputs per block; FBGEMM allocates whole blocks
INTEGER = 127  # the largest of 8 bits
FINE = 254  # b's step is this fraction of a's
LARGE8 = 2**22  # numbers in a layer of 8 bits, from which packing pays
ROWS = 512  # of x that are multiplied at once by 8 bits: their sums are fp32
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

    def stored(self) -> dict[str, torch.Tensor]:
        """Return what a state dict has of the layer, by name."""
        return {"weight": self.dense()}


class Packed8(Packed):
    """W of an `Int8Linear`, W_ij = q_ij s_i."""

    def __init__(self, layer: Int8Linear) -> None:
        self.scales, self.bias = layer.scales, 0.0 if layer.bias is None else layer.bias
        self.zeros = torch.zeros(len(layer.scales), dtype=torch.int64)
        self.blocks8 = torch.ops.onednn.qlinear_prepack(layer.quantised.contiguous(), None)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.size(-1))
        y = x.new_empty(len(rows), len(self.scales))
        for part, out in zip(rows.split(ROWS), y.split(ROWS), strict=True):
            part = part.float()
            t = part.abs().amax(1, keepdim=True).clamp_(min=1e-30) / INTEGER
            value = part / t
            a = value.round()
            both = torch.cat([a, value.sub_(a).mul_(FINE).round_()]).add_(INTEGER + 1).to(torch.uint8)  # without a sign
            high, low = torch.ops.onednn.qlinear_pointwise(
                both, 1.0, INTEGER + 1, self.blocks8, self.scales, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
            ).chunk(2)
            out.copy_(high.add_(low, alpha=1 / FINE).mul_(t).add_(self.bias))
        return y.unflatten(0, x.shape[:-1])

    def back(self, grad: torch.Tensor) -> torch.Tensor:
        return grad @ self.dense().to(grad.dtype)

    @property
    def q(self) -> torch.Tensor:
        """(out, in)"""
        return self.blocks8.to_dense().t()

    def dense(self) -> torch.Tensor:
        return self.q * self.scales[:, None]

    def stored(self) -> dict[str, torch.Tensor]:
        return {"quantised": self.q, "scales": self.scales}


@cache
def multiplies_8_bits() -> bool:
    """Return True if this processor adds products of 8 bits in 32 (VNNI, AMX); others saturate at 16."""
    layer = Int8Linear(skip_init(nn.Linear, 64, 64, bias=False))
    layer.quantised.fill_(INTEGER)
    layer.scales.fill_(1.0)
    try:
        return bool((Packed8(layer).times(torch.ones(1, 64)) == 64 * INTEGER).all())
    except (AttributeError, RuntimeError):  # a build without oneDNN
        return False


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

    def __init__(self, linear: nn.Linear | Int8Linear, packed: Packed) -> None:
        super().__init__(linear)
        self.packed = packed

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.packed.dense().to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed(x)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: value for name, value in self.packed.stored().items()})


class PackedHead(nn.Linear):
    """An output layer with W packed in addition to the plain weight, which is the embedding's if the two are tied."""

    packed: Packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed(x)


def pack(model: GPT, backward: bool = False) -> None:
    """Pack the frozen linear layers of the blocks and the output layer, in place, where it pays. Adapters stay.

    Large layers in 8 bits are packed for inference alone. `backward`: also for training. Layers that gradients reach are prepared for them;
    those in bf16 stay plain, because a second layout would double their memory to save a few percent of time, and so do layers with DoRA,
    which reads W. A large output layer in bf16 is packed for its gradient alone, which gains most.
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
    if not backward and multiplies_8_bits():
        large = [(parent, name) for parent in model.modules() for name, child in parent.named_children() if is_large8(child)]
        for place in large:
            setattr(*place, packed8(getattr(*place)))
            trim()
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
    """Give the layers that `pack` packed their plain weights again, in place, except those in 8 bits."""

    def restore(place: tuple[nn.Module, str, PackedLinear]) -> None:
        parent, name, layer = place
        with torch.device("meta"):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight = nn.Parameter(layer.packed.dense(), requires_grad=False)
        linear.register_parameter("bias", layer.bias)
        setattr(parent, name, linear.train(layer.training))

    modules = list(model.modules())
    layers = [(parent, name, layer) for parent in modules for name, layer in parent.named_children() if isinstance(layer, PackedLinear)]
    places = [place for place in layers if not isinstance(place[-1].packed, Packed8)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(restore, places))
    if isinstance(head := model.head, PackedHead):
        head.__class__ = nn.Linear  # type: ignore[assignment]
        del head.packed


def packed8(layer: Int8Linear) -> PackedLinear:
    """Return a layer of 8 bits in packed form."""
    return PackedLinear(layer, Packed8(layer)).train(layer.training)


def trim() -> None:
    """Return freed memory to the system. glibc keeps it, and aligned blocks of the same size do not fit in."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)


def is_large8(layer: nn.Module) -> bool:
    """Return True for a layer of 8 bits that is packed."""
    return isinstance(layer, Int8Linear) and layer.in_features * layer.out_features >= LARGE8


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
