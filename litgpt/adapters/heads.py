"""Heads next to the output layer: adapters on its input h, which need no extra pass through the blocks.

    value head           v = s(w . a + b), the expected reward of an answer so far;  a = N(h), or silu(U N(h) + c) with "mlp"
    multi-token head k   z = h + D silu(U [N(h), N(e)]),  e the embedding of the next token;  lm_head(z) predicts the token k behind it
      with mtp_taps      z = h + D silu(U [N(h), N(e), N(t_1), N(t_2), N(t_3)]),  t low, middle and high taps, as EAGLE-3 reads them

N divides by the root mean square, s is the logistic function; parameters are fp32. At the start v is 1/2 and z = h. A multi-token head is
an MLP, not a decoder block (arXiv 2404.19737): it needs no keys and values of its own, learns from cached states of the reply alone, and
all heads draft in one pass of the output layer. It reads the next token, which is known when it drafts, as DeepSeek-V3's modules do.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from litgpt.adapters.base import Adapter
from litgpt.adapters.settings import ValueHeadKind
from litgpt.fused import rms_norm

EPS = 1e-5
READ = 3  # taps: the first, the middle and the last


class Head(Adapter):
    """A head on h (..., d)."""

    skips_cut = True


class ValueHead(Head):
    """A scalar for each position: the logit of its value."""

    up: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(self, d: int, kind: ValueHeadKind) -> None:
        super().__init__()
        self.up, self.shift = (nn.Parameter(torch.empty(d, d)), nn.Parameter(torch.empty(d))) if kind == "mlp" else (None, None)
        self.weight, self.bias = nn.Parameter(torch.empty(d)), nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.up is not None and self.shift is not None:
            nn.init.kaiming_uniform_(self.up, a=math.sqrt(5))
            nn.init.zeros_(self.shift)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (...), fp32"""
        with torch.autocast(h.device.type, enabled=False):
            a = rms_norm(h.float(), None, EPS)
            if self.up is not None:
                a = F.silu(F.linear(a, self.up, self.shift))
            return a @ self.weight + self.bias


class Tap(nn.Module):
    """Marks a block whose output is read by adapters or heads."""

    norm_eps: float | None = EPS

    def tap(self, x: torch.Tensor) -> torch.Tensor:
        """Return t = x / rms(x), as magnitudes vary widely between blocks, or x if `norm_eps` is None: (..., d), in x's dtype."""
        return x if self.norm_eps is None else rms_norm(x, None, self.norm_eps)


class MultiTokenHead(Head):
    """Predicts a token further ahead from the output layer's input, and with `reads_taps` from taps (arXiv 2503.01840)."""

    def __init__(self, d: int, reads_taps: bool = False) -> None:
        super().__init__()
        self.reads_taps = reads_taps
        self.up, self.down = nn.Parameter(torch.empty(d, (2 + READ * reads_taps) * d)), nn.Parameter(torch.empty(d, d))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.up, a=math.sqrt(5))
        nn.init.zeros_(self.down)

    def forward(self, h: torch.Tensor, e: torch.Tensor, taps: torch.Tensor | None = None) -> torch.Tensor:
        """(..., d) each, and taps (..., S, d) -> (..., d), in h's dtype"""
        read = [taps[..., i, :] for i in (0, taps.size(-2) // 2, -1)] if self.reads_taps and taps is not None else []
        with torch.autocast(h.device.type, enabled=False):
            a = torch.cat([rms_norm(x.float(), None, EPS) for x in (h, e, *read)], dim=-1)
            return (h.float() + F.linear(F.silu(F.linear(a, self.up)), self.down)).to(h.dtype)
