"""DoRA, weight-decomposed LoRA (arXiv 2402.09353): the update changes the direction of each row of W, and a vector m its length.

    W' = g (W + s B A)      g = m / c      c = the norms of the rows of W + s B A
    y  = W' x + b           computed as linear(x) + (g - 1) (linear(x) - b) + g s B A dropout(x)

g multiplies row by row; s is LoRA's factor. c is a constant to autograd (section 4.3 of the paper), and m starts as the norms of the rows
of W: with B = 0 the layer's output is the base's, bit for bit. Over a quantised layer m starts as the norms before quantisation.
"""

from typing import Any

import torch
from torch import nn

from litgpt.adapters.layers import LoRALinear


class DoRA(LoRALinear):
    """A mixin that precedes LoRA's layers: `class DoRAQKVLinear(DoRA, LoRAQKVLinear)`. m is `lora_magnitude` (rows of B,), fp32."""

    lora_magnitude: nn.Parameter
    kept_outputs = 2  # linear(x) - b, and the update
    _norms, _norms_of = torch.empty(0), tuple[Any, ...]()

    def make_parameters(self) -> None:
        super().make_parameters()
        self.lora_magnitude = nn.Parameter(torch.empty(len(self.lora_B)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._norms_of = ()
        if not (self.lora_magnitude.is_meta or (weight := self.weight()).is_meta):
            self.lora_magnitude.copy_(torch.linalg.vector_norm(weight, dim=1)[self.adapted_rows()])

    def norms(self) -> torch.Tensor:
        """Return c (out,). Passes without gradients, as in generation, share it until a weight changes."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.is_sharded:
            self._norms_of = ()  # a fused optimizer's step does not change versions
            with torch.no_grad():
                return torch.linalg.vector_norm(super().merged(), dim=1)
        tensors = (self.lora_A, self.lora_B, *self.linear.parameters(), *self.linear.buffers())
        versions = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        if versions != self._norms_of:
            with torch.inference_mode(False), torch.no_grad():
                self._norms, self._norms_of = torch.linalg.vector_norm(super().merged(), dim=1), versions
        return self._norms

    def gain(self) -> torch.Tensor:
        """Return g (out,); it is 1 in rows that are not adapted. A row of zeros, as of an unused token, is left unchanged."""
        c = self.norms()
        return c.masked_scatter(self.adapted_rows(), self.lora_magnitude) / c.masked_fill(c == 0, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)"""
        y = self.linear(x)
        if not self.r:
            return y
        g, bias = self.gain(), self.linear.bias
        return y + (g - 1).to(y.dtype) * (y if bias is None else y - bias) + g.to(y.dtype) * self.update(x)

    def merged(self) -> torch.Tensor:
        return self.gain()[:, None] * super().merged()
