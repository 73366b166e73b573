"""Linear layers with LoRA (arXiv 2106.09685).

    y = W x + s B A dropout(x),  s = alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)

Letters in shapes: as in `litgpt.model`, and r the rank of an adapter.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from litgpt.adapters.base import Adapter, Wrapper, is_transposed
from litgpt.adapters.patterns import PARTS
from litgpt.adapters.settings import scaling
from litgpt.adapters.switch import Switch
from litgpt.fused import draw, drop, thin
from litgpt.sharding import whole


class Dropout(nn.Dropout):
    """Zero with probability p, else x / (1 - p), by `litgpt.fused`."""

    @property
    def now(self) -> float:
        """p in training, else 0."""
        return self.p if self.training else 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return drop(x, draw(x, self.p), self.p) if self.now else x


class LoRALayer(Adapter):
    """A low-rank adapter: A (r, in) Kaiming-uniform, B (out, r) zero, dropout on its input, and a factor.

    A and B are fp32 whatever the backbone's dtype.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    switch: Switch | None = None

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, rslora: bool = False) -> None:
        super().__init__()
        if r < 0:
            raise ValueError(f"a rank of {r} is invalid")
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = Dropout(lora_dropout)
        self.scaling = scaling(r, lora_alpha, rslora) if r else 0.0

    def make(self, a: tuple[int, int], b: tuple[int, int]) -> None:
        self.lora_A = nn.Parameter(torch.empty(a, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(b, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """A uniform up to 1 / sqrt(in) as `nn.Linear` has it, B zero: the adapter adds nothing until it is trained.

        Without torch.nn.init, which Lightning's `init_module(empty_init=True)` skips: no checkpoint of a base has an adapter's values.
        """
        if not self.lora_A.is_meta:
            bound = 1 / math.sqrt(self.lora_A.size(1))
            self.lora_A.data.uniform_(-bound, bound)
            self.lora_B.data.zero_()


class LoRALinear(LoRALayer, Wrapper):
    """A linear layer with LoRA: y = linear(x) + s B A dropout(x), A (r, in), B (out, r).

    `linear` is the layer to adapt, quantised or not; without it a new one is created. A state dict's `weight` and `bias` go to `linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        linear: nn.Module | None = None,
        rslora: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(r, lora_alpha, lora_dropout, rslora)
        self.in_features, self.out_features = in_features, out_features
        self.linear: Any = linear if linear is not None else nn.Linear(in_features, out_features, **kwargs)
        if r:
            self.make_parameters()
            self.reset_parameters()

    def make_parameters(self) -> None:
        """Register the adapter's parameters, without values."""
        self.make((self.r, self.in_features), (self.out_features, self.r))

    def units(self, name: str) -> list[str]:
        """Return the adapted units (`litgpt.adapters.patterns`) of this layer, named `name`."""
        return [name]

    def part_sizes(self) -> list[int]:
        """Return the rows of B that each have an A of their own."""
        return [len(self.lora_B)]

    def up(self, b: torch.Tensor | None = None) -> torch.Tensor:
        """Return (out, columns of A x): B, or another factor of its shape, scaled, with zeros in the rows that are not adapted."""
        b = self.lora_B if b is None else b
        return b if self.scaling == 1 else b * self.scaling

    def adapted_rows(self) -> torch.Tensor:
        """Return (out,) bool: the rows of the weight that B has, in its order."""
        return torch.ones(self.out_features, dtype=torch.bool, device=self.lora_B.device)

    def product(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, p: float = 0.0, y: torch.Tensor | None = None) -> torch.Tensor:
        """Return s b a dropout(x), plus y if given, with factors of the shapes of A and B and dropout p."""
        low = thin(x.reshape(-1, x.size(-1)), a.to(x.dtype), p)  # (N, r)
        up = self.up(b).to(low.dtype).t()  # (r, out); a copy in this order would take longer than the product
        rows = low @ up if y is None else torch.addmm(y.reshape(-1, y.size(-1)), low, up)
        return rows.view(*x.shape[:-1], rows.size(-1))

    def update(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        """Return the update applied to x, plus y if given: (..., in) -> (..., out)."""
        return self.product(x, self.lora_A, self.lora_B, self.lora_dropout.now, y)

    def weight(self) -> torch.Tensor:
        """Return the weight of `linear`, (out, in), fp32."""
        dense = getattr(self.linear, "dense", None)  # of a quantised layer
        weight = whole(self.linear.weight).float() if dense is None else dense(torch.float32)
        return weight.T if is_transposed(self.linear) else weight

    def merged(self) -> torch.Tensor:
        """Return the weight with the update in it, (out, in), fp32."""
        return self.weight() + self.up() @ self.lora_A

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)"""
        y, switch = self.linear(x), self.switch
        if not self.r or (switch is not None and switch.is_off):
            return y
        return self.update(x, y) if switch is None or switch.mask is None else y + switch.masked(self.update(x))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """Return the plain layer with the update in its weight, added in fp32."""
        if self.r:
            weight, merged = self.linear.weight, self.merged()
            merged = merged.T.contiguous() if is_transposed(self.linear) else merged
            self.linear.weight = nn.Parameter(merged.to(weight.dtype), requires_grad=weight.requires_grad)
            self.r = 0  # the model may hold this layer in another place, too
        return self.linear


class LoRAQKVLinear(LoRALinear):
    """The joined projection with LoRA on any of q, k and v, each with its own A and B.

    With e parts enabled A is (e r, d), one below the other; B (rows of the enabled parts, r), LitGPT's layout. `sizes`: ranks and alphas
    of the parts. B has as many columns as the highest rank; a part of lower rank leaves the rest at zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        head_size: int,
        n_head: int,
        n_query_groups: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: bool | tuple[bool, bool, bool] = False,
        linear: nn.Module | None = None,
        rslora: bool = False,
        sizes: Sequence[tuple[int, float]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.enable_lora = enabled = (enable_lora,) * 3 if isinstance(enable_lora, bool) else enable_lora
        self.parts = list(zip((head_size * n_head, head_size * n_query_groups, head_size * n_query_groups), enabled, strict=True))
        own = [size for size, on in zip(sizes or ((r, lora_alpha),) * 3, enabled, strict=True) if on and size[0]]
        self.ranks = [rank for rank, _ in own]
        self.scalings = [scaling(rank, alpha, rslora) for rank, alpha in own]
        r, lora_alpha = max(self.ranks, default=0), own[0][1] if own else lora_alpha
        super().__init__(in_features, out_features, r, lora_alpha, lora_dropout, linear, rslora, **kwargs)

    def units(self, name: str) -> list[str]:
        return [f"{name}:{part}" for part, on in zip(PARTS, self.enable_lora, strict=True) if on]

    def part_sizes(self) -> list[int]:
        return [size for size, on in self.parts if on]

    def make_parameters(self) -> None:
        self.make((sum(self.ranks), self.in_features), (sum(self.part_sizes()), self.r))

    def up(self, b: torch.Tensor | None = None) -> torch.Tensor:
        """Return (q + k + v rows, columns of A): s B, block-diagonal over the enabled parts, with zero rows for the others."""
        parts = (self.lora_B if b is None else b).split(self.part_sizes())
        scaled = (part[:, :rank] * s for part, rank, s in zip(parts, self.ranks, self.scalings, strict=True))
        return torch.block_diag(*(next(scaled) if on else self.lora_B.new_zeros(size, 0) for size, on in self.parts))

    def adapted_rows(self) -> torch.Tensor:
        return torch.cat([torch.full((size,), on, device=self.lora_B.device) for size, on in self.parts])
