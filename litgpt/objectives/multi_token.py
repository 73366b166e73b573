"""Multi-token prediction (arXiv 2404.19737): heads learn the tokens after the next one, through the same output layer.

Head k at a loss position predicts the token k behind the next one, if that is learned too. On a frozen trunk the loss is the mean over all
heads' tokens, by their weights. With adapters that change the model's output it is

    (sum over tokens of w * loss + mtp_weight / n * sum over heads and tokens of w * loss) / sum over tokens of w

for n heads, and the heads' gradient reaches the adapters; the validation loss is then the next token's.
"""

from collections.abc import Sequence
from typing import Any

import torch

from litgpt.loss import IGNORED, loss_at
from litgpt.objectives.base import Objective, View
from litgpt.packing import loss_targets, loss_weights
from litgpt.sample import Sample


class MultiToken(Objective):
    """Next-token prediction if the trunk is trained, plus that of the heads."""

    is_token_mean = False

    def loss(self, view: View, indices: Sequence[int]) -> torch.Tensor:
        model: Any = view.model
        samples, (hidden, taps) = view.samples(indices), view.states(indices)  # (n, d), (n, S, d)
        total, factor, targets = hidden.sum() * 0.0, 1.0, loss_targets(samples).to(hidden.device)
        if model.config.changes_text:
            total = loss_at(model, hidden, targets, view.head_loss, loss_weights(samples))
            factor = self.settings.mtp_weight / len(model.mtp_heads)
            if not model.training:
                return total
        return total + factor * heads_loss(view, samples, (hidden, taps), targets)

    def weight(self, view: View, indices: Sequence[int]) -> float:
        config: Any = view.model.config
        if config.changes_text:
            return super().weight(view, indices)
        return float(sum(ahead(view.samples(indices), k)[1].sum() for k in range(1, 1 + config.mtp_heads)))


def heads_loss(
    view: View,
    samples: Sequence[Sample],
    states: tuple[torch.Tensor, torch.Tensor],
    targets: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum of the heads' losses for the view's states and the next tokens (n,); `weights` as `given` in `ahead`."""
    model: Any = view.model
    hidden, taps = states
    total, following = hidden.sum() * 0.0, model.transformer["wte"](targets)
    for k, head in enumerate(model.mtp_heads, 1):
        labels, own = (part.to(hidden.device) for part in ahead(samples, k, weights))
        rows = (labels != IGNORED).nonzero()[:, 0]
        total = total + view.head_loss(head(hidden[rows], following[rows], taps[rows]), labels[rows], own[rows])
    return total


def ahead(samples: Sequence[Sample], k: int, given: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (n,) each, for the loss positions sample by sample: the token k behind the next one and its weight; `IGNORED` and 0 if it is
    not learned. `given`: the weights of the next tokens, (n,), instead of the data's."""
    mask = torch.cat([torch.frombuffer(sample.loss_mask, dtype=torch.bool) for sample in samples])
    ids = torch.cat([torch.frombuffer(sample.input_ids, dtype=torch.int32) for sample in samples]).long()
    owners = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(sample.input_ids) for sample in samples]))
    own = loss_weights(samples) if given is None else given.cpu()
    weights = mask.float() if own is None else mask.float().masked_scatter(mask, own)
    at = mask.nonzero()[:, 0]
    places = (at + k).clamp(max=len(mask) - 1)
    learned = mask[places] & (owners[places] == owners[at]) & (at + k == places)
    return torch.where(learned, ids[places], IGNORED), torch.where(learned, weights[places], 0.0)
