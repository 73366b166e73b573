"""Adapters learn right answers, with tokens weighted by how they changed the value; the value head also learns from wrong answers.

Rewards R, values v_t, lambda-returns G_t and the values' loss are the critic's (`litgpt.objectives.critic`). With the temporal differences
d_t = v_{t+1} - v_t, where R stands behind the last value, token t has the advantage and the weight

    A_t = G_t - v_t = d_t + lambda d_{t+1} + lambda^2 d_{t+2} + ...
    w_t = R clip(1 + beta A_t, 0, cap)

without gradient. A wrong answer has R = 0 and is not imitated; beta = 0 is the next token's loss on right answers. For the data's weights
u, the next token's loss l, and n multi-token heads, whose token k behind t has the weight w_{t+k}, the loss of a global batch is

    (sum of u w l + mtp_weight / n * sum over heads of u w l) / sum of u R  +  sum of u * the values' loss / sum of u

The values' loss reaches the value head alone. The validation loss is the mean of l with the weights u R.
"""

from collections.abc import Sequence
from typing import Any

import torch

from litgpt.errors import UserError
from litgpt.loss import loss_at
from litgpt.objectives.base import View
from litgpt.objectives.critic import Rated
from litgpt.objectives.multi_token import heads_loss
from litgpt.packing import loss_targets, loss_weights
from litgpt.sample import Sample


class Verifiable(Rated):
    """Trains adapters, the value head, and any multi-token heads."""

    scale = 1.0  # sum of u / sum of u R of the global batch: the loop divides by the former

    def check(self, train: Sequence[Sample], val: Sequence[Sample], source: str) -> None:
        super().check(train, val, source)
        if not any(sample.reward for sample in val):
            raise UserError(
                f"{source}: none of the {len(val):,} validation answers that are measured is right, so there is no validation loss: hold "
                "out more with data.val_split_fraction, give right ones, or raise eval.max_iters"
            )

    def begin(self, view: View, indices: Sequence[int], rank: Any) -> None:
        samples = view.samples(indices)
        own = [sum(s.weight for s in samples), sum(s.weight * float(s.reward or 0) for s in samples)]
        total, right = rank.sum(torch.tensor(own, dtype=torch.float64).to(rank.device)).tolist()
        self.scale = total / right if view.model.training and right else 1.0

    def loss(self, view: View, indices: Sequence[int]) -> torch.Tensor:
        model: Any = view.model
        samples, (hidden, taps) = view.samples(indices), view.states(indices)  # (n, d), (n, S, d)
        targets, weights = loss_targets(samples).to(hidden.device), rewarded(samples).to(hidden.device)
        values_loss, advantages = self.judged(view, samples, hidden.detach())
        if not model.training:
            return loss_at(model, hidden, targets, view.head_loss, weights)
        weights = weights * (1 + self.settings.verifiable_beta * advantages).clamp(0, self.settings.verifiable_cap)
        tokens_loss = loss_at(model, hidden, targets, view.head_loss, weights)
        if len(model.mtp_heads):
            factor = self.settings.mtp_weight / len(model.mtp_heads)
            tokens_loss = tokens_loss + factor * heads_loss(view, samples, (hidden, taps), targets, weights)
        return self.scale * tokens_loss + values_loss

    def weight(self, view: View, indices: Sequence[int]) -> float:
        return rewarded(view.samples(indices)).sum().item()  # of a validation


def rewarded(samples: Sequence[Sample]) -> torch.Tensor:
    """Return the data's weight of each loss position, times its answer's reward, (n,)."""
    counts = torch.tensor([sample.n_targets for sample in samples])
    rewards = torch.tensor([float(sample.reward or 0) for sample in samples]).repeat_interleave(counts)
    weights = loss_weights(samples)
    return rewards if weights is None else rewards * weights
