"""Frozen linear layers in 4 or 8 bits, under LoRA and Skip2-LoRA, and for inference.

W (out, in) is stored as small integers with scales. A pass over x computes W' in the compute dtype for one layer at a time:

    y = x W'^T + b        dx = dy W'        no gradient for W', which is never trained

    bnb.nf4, bnb.fp4      16 levels (normal-float of QLoRA, arXiv 2305.14314, or float), a scale for 64 neighbours: 4.5 bits a parameter
    bnb.nf4-dq, -fp4-dq   the scales in 8 bits too ("double quantisation"): 4.13 bits
    bnb.int8, -training   W'_ij = q_ij s_i, q_i = round(127 W_i / max |W_i|), s_i = max |W_i| / 127, row by row as in LLM.int8()
    int8                  the same (arXiv 2208.07339); x is bf16 where it has few rows, and has 15 bits if the layer is packed for inference
                          (`litgpt.packed`); bitsandbytes quantises it too

The linear layers of the blocks are quantised. The embedding, the head (in many models the same tensor; bitsandbytes skips it too), norms
and routers stay in the compute dtype. bitsandbytes is needed for 4 bits only, on the CPU and on CUDA.
"""

import importlib
import logging
import sys
from typing import Any

import torch
from torch import nn

from litgpt.errors import UserError, missing_package
from litgpt.fused import multiply
from litgpt.model import GPT

# mode -> the 16 levels, and True if the scales are quantised
FOUR_BITS = {"bnb.nf4": ("nf4", False), "bnb.nf4-dq": ("nf4", True), "bnb.fp4": ("fp4", False), "bnb.fp4-dq": ("fp4", True)}
EIGHT_BITS = ("bnb.int8-training", "bnb.int8", "int8")
GROUP = 64  # weights that share a scale
FEW_ROWS = 4  # of x, up to which a CPU multiplies faster with 8-bit weights than with bf16 (benchmarks/quantized.py)


class QuantisedLinear(nn.Module):
    """y = x W'^T + b. A subclass stores W in buffers, which move and are digested with the model, and computes W' from them."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def __init__(self, linear: "nn.Linear | QuantisedLinear") -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return W' (out, in)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)"""
        return multiply(x, self)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int8Linear(QuantisedLinear):
    """8-bit rows."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        for name, value in rows_in_8_bits(linear.weight.detach()).items():
            if value.is_meta:  # FSDP2 shards parameters alone
                self.register_parameter(name, nn.Parameter(value, requires_grad=False))
            else:
                self.register_buffer(name, value)

    quantised: torch.Tensor
    scales: torch.Tensor

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.quantised.to(dtype) * self.scales.to(dtype)[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._is_short(x):
            rows = x.reshape(-1, self.in_features).bfloat16()  # fp32 takes ten times as long: torch has no vectorised code for it
            y = torch._weight_int8pack_mm(rows, self.quantised, self.scales.bfloat16()).to(x.dtype).unflatten(0, x.shape[:-1])
            return y if self.bias is None else y + self.bias
        return super().forward(x)

    def _is_short(self, x: torch.Tensor) -> bool:
        """Return True if torch's own 8-bit product can take x and is faster. It does not check the width: 40 in bf16 is a segmentation
        fault (torch 2.13)."""
        fits = (
            x.is_cpu and x.dtype in (torch.float32, torch.bfloat16) and self.in_features % 64 == 0 and not torch.is_autocast_enabled("cpu")
        )
        return fits and x.numel() <= FEW_ROWS * self.in_features and not (torch.is_grad_enabled() and x.requires_grad)


def rows_in_8_bits(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return q (out, in) and s (out,) of a weight (out, in) under the names of `Int8Linear`."""
    weight = weight.float()
    largest = weight.abs().amax(dim=1, keepdim=True)  # (out, 1)
    return {"quantised": (weight * (127 / largest.clamp(min=1e-30))).round().to(torch.int8), "scales": largest[:, 0] / 127}


class Linear4bit(QuantisedLinear):
    """16 levels, packed and unpacked by bitsandbytes."""

    def __init__(self, linear: nn.Linear, levels: str, double: bool) -> None:
        super().__init__(linear)
        functional, weight = bitsandbytes().functional, linear.weight.detach().contiguous()
        packed, state = functional.quantize_4bit(weight, blocksize=GROUP, quant_type=levels, compress_statistics=double)
        stored = {"packed": packed, "scales": state.absmax, "code": state.code}
        if double:
            stored |= {"offset": state.offset.reshape(1), "inner_scales": state.state2.absmax, "inner_code": state.state2.code}
        for name, value in stored.items():
            self.register_buffer(name, value)
        self._state = state

    def state(self) -> Any:
        """Return the state that bitsandbytes needs in addition to the packed weights, with the buffers as they are now."""
        state, buffers = self._state, dict(self.named_buffers())
        state.absmax, state.code = buffers["scales"], buffers["code"]
        if state.nested:
            state.offset, state.state2.absmax, state.state2.code = buffers["offset"][0], buffers["inner_scales"], buffers["inner_code"]
        return state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda and not torch.is_grad_enabled() and x.numel() == self.in_features:
            return self.one_row(x)
        return super().forward(x)

    def one_row(self, x: torch.Tensor) -> torch.Tensor:
        """Return y for a single row x (..., in), without computing W'."""
        return bitsandbytes().matmul_4bit(x, self.get_buffer("packed").t(), self.state(), bias=self.bias)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        return bitsandbytes().functional.dequantize_4bit(self.get_buffer("packed"), self.state()).to(dtype)


def quantise(model: GPT, mode: str) -> None:
    """Replace the linear layers of the model's blocks, in place. Adapters around them stay.

    Raises UserError for an unknown mode, and for 4 bits without bitsandbytes.
    """
    if mode not in (*FOUR_BITS, *EIGHT_BITS):
        raise UserError(f"quantize is {mode!r}: choose one of {', '.join((*FOUR_BITS, *EIGHT_BITS))}")
    if mode in FOUR_BITS:
        bitsandbytes()
    for parent, name, linear in frozen_linears(model):
        new = Linear4bit(linear, *FOUR_BITS[mode]) if mode in FOUR_BITS else Int8Linear(linear)
        setattr(parent, name, new.train(linear.training))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # the others may be mapped from the base's file


def frozen_linears(model: GPT) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Return the layers to quantise, each with its parent module and its name there."""
    layers = []
    for block in model.blocks:
        for name, linear in block.named_modules():
            if isinstance(linear, nn.Linear) and not any(part.endswith("gate") for part in name.split(".")):
                layers.append((block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], linear))
    return layers


def is_quantised(model: nn.Module) -> bool:
    """Return True if a layer of the model is quantised."""
    return any(isinstance(module, QuantisedLinear) for module in model.modules())


def count(model: nn.Module) -> int:
    """Return the number of the model's parameters, with those stored quantised."""
    layers = [module for module in model.modules() if isinstance(module, QuantisedLinear)]
    stored = {id(p) for layer in layers for p in layer.parameters() if p is not layer.bias}
    quantised = sum(layer.in_features * layer.out_features for layer in layers)
    return quantised + sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in stored)


def bitsandbytes(setting: str = "quantize", other: str = "int8") -> Any:
    """Return the library. Raises UserError if it is missing or does not support this machine; `other` is a value that does without.

    On some CPUs its import uses the package `kernels` to fetch compiled code from a hub, which is prevented here.
    """
    if library := sys.modules.get("bitsandbytes"):
        return library
    kernels, disabled = sys.modules.pop("kernels", None), logging.root.manager.disable
    sys.modules["kernels"] = None  # type: ignore[assignment]
    logging.disable(logging.WARNING)
    try:
        return importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        reason = f"{setting}: the package bitsandbytes cannot be used: {error}"
        if isinstance(error, ModuleNotFoundError):
            reason = str(missing_package(setting, error.name, "quantize"))
        raise UserError(f"{reason}. --{setting} {other} does without") from None
    finally:
        logging.disable(disabled)
        sys.modules.pop("kernels", None)
        if kernels:
            sys.modules["kernels"] = kernels
