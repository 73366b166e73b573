"""Rho-1, selective language modelling (arXiv 2404.07965): the tokens with the largest excess loss carry the loss.

    excess = loss under the model - loss under the reference,    both at the same position

Of the N tokens with loss in a global batch, the ceil(keep N) with the largest excess are kept; the loss is their weighted mean. The
model's losses come from a forward pass without dropout before the step. The validation loss is the mean over all tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from litgpt.objectives.base import Objective, View
from litgpt.packing import loss_weights


class Rho1(Objective):
    """Next-token prediction of selected tokens."""

    referred = ("training",)
    is_token_mean = False

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.reference = getattr(settings, "rho1_reference", None)
        self.kept: dict[int, torch.Tensor] = {}  # sample -> (n,): 1 for the tokens of this batch that are kept

    def begin(self, view: View, indices: Sequence[int], rank: Any) -> None:
        self.kept = {}
        if not view.model.training:
            return
        losses = view.measured(indices, rank.agreed)
        counts = [sample.n_targets for sample in view.samples(indices)]
        reference = torch.tensor([value for sample in view.samples(indices) for value in sample.reference or ()])
        excess, start = rank.join((losses - reference.to(losses)).to(rank.device))
        best = excess.topk(math.ceil(self.settings.rho1_keep * len(excess))).indices
        kept = torch.zeros_like(excess).index_fill_(0, best, 1.0)[start : start + len(losses)]
        self.kept = dict(zip(indices, kept.split(counts), strict=True))

    def loss(self, view: View, indices: Sequence[int]) -> torch.Tensor:
        return view.total(indices, self._weights(view, indices))

    def weight(self, view: View, indices: Sequence[int]) -> float:
        weights = self._weights(view, indices)
        return super().weight(view, indices) if weights is None else weights.sum().item()

    def _weights(self, view: View, indices: Sequence[int]) -> torch.Tensor | None:
        weights = loss_weights(view.samples(indices))
        if not view.model.training or not indices or not self.kept:
            return weights
        kept = torch.cat([self.kept[i] for i in indices])
        return kept if weights is None else kept * weights.to(kept)
