"""PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775): LoRA that starts from directions of the weight instead of 0.

    W' = W + s (B A - B_0 A_0),    B = B_0 and A = A_0 at the start

PiSSA: s B_0 A_0 is the best approximation of rank r of W, with singular values shared evenly by the factors. OLoRA: for W = Q R, B_0 is the
first r columns of Q, A_0 the first r rows of R. At the start the layer's output is the base's. q, k and v each have their own factors.
"""

from collections.abc import Mapping

import torch
from torch import nn

from litgpt.adapters.layers import LoRALinear

ITERATIONS = 8  # of the randomised singular value decomposition, which takes a few more directions than r


class PiSSA(LoRALinear):
    """A mixin that precedes LoRA's layers. `lora_A0` and `lora_B0` are saved with the adapter and not trained."""

    lora_A0: nn.Parameter
    lora_B0: nn.Parameter
    constant = ("lora_A0", "lora_B0")

    def make_parameters(self) -> None:
        super().make_parameters()
        self.lora_A0, self.lora_B0 = (nn.Parameter(torch.empty_like(p), requires_grad=False) for p in (self.lora_A, self.lora_B))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.lora_A.is_meta or not self.scaling or (weight := self.weight()).is_meta:
            return
        rows, ranks = self.part_sizes(), [self.r] * len(self.part_sizes())
        parts = zip(weight[self.adapted_rows()].split(rows), self.lora_A.split(ranks), self.lora_B.split(rows), strict=True)
        for part, a, b in parts:  # if the rank exceeds the weight's, the rest keeps LoRA's values
            a_0, b_0 = self.start(part.float())
            a[: len(a_0)], b[:, : len(a_0)] = a_0, b_0
        self.lora_A0.copy_(self.lora_A)
        self.lora_B0.copy_(self.lora_B)

    def start(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A_0 (r, in) and B_0 (out, r) for a weight (out, in)."""
        directions = min(2 * self.r + 8, *weight.shape)
        U, S, V = torch.svd_lowrank(weight, directions, ITERATIONS)
        root = (S[: self.r] / self.scaling).sqrt()
        return root[:, None] * V[:, : self.r].T, U[:, : self.r] * root

    def update(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        change = super().update(x) - self.product(x, self.lora_A0, self.lora_B0)
        return change if y is None else y + change

    def merged(self) -> torch.Tensor:
        return super().merged() - self.up(self.lora_B0) @ self.lora_A0


class OLoRA(PiSSA):
    """The same with the factors of W = Q R."""

    def start(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        Q, R = torch.linalg.qr(weight)
        return R[: self.r], Q[:, : self.r]


def as_lora(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return an adapter's weights as those of ordinary LoRA of twice the rank: A stacked on A_0, and B next to -B_0."""
    result = {name: value for name, value in weights.items() if not name.endswith(PiSSA.constant)}
    for module in (name.removesuffix(".lora_A0") for name in weights if name.endswith(".lora_A0")):
        a, b, a_0, b_0 = (weights[f"{module}.{name}"] for name in ("lora_A", "lora_B", *PiSSA.constant))
        r = b.size(1)
        result[f"{module}.lora_A"] = torch.cat((a.unflatten(0, (-1, r)), a_0.unflatten(0, (-1, r))), dim=1).flatten(0, 1)
        result[f"{module}.lora_B"] = torch.cat((b, -b_0), dim=1)
    return result
