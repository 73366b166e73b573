"""A critic: the value head learns to predict an answer's reward, on a frozen trunk.

An answer has the reward R, from 0 to 1, and loss positions 1 ... T; v_t is the value there, after the tokens before position t's own. Its
target is the lambda-return without discount,

    G_T = R,    G_t = (1 - lambda) v_{t+1} + lambda G_{t+1}

with v from the current head, without gradient; for lambda = 1, Monte Carlo, G_t = R. The loss is the weighted mean over positions of the
cross-entropy -G_t log v_t - (1 - G_t) log(1 - v_t): v_t estimates the probability that the answer is right.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from litgpt.data.base import Unit
from litgpt.data.records import Record
from litgpt.errors import UserError
from litgpt.objectives.base import ACCURACY, Objective, View
from litgpt.packing import loss_weights
from litgpt.sample import Sample

READ = ("reward", "correct")
BINS = 10


class Rated(Objective):
    """A value head learns from answers with rewards."""

    of_answers = True
    columns = (ACCURACY,)

    def units(self, records: Sequence[tuple[int, Record]]) -> list[Unit]:
        """Each record with its reward."""
        for number, record in records:
            if record.reward is None:
                raise UserError(f"objective {self.settings.objective}: record {number} has no 'correct' (true or false) and no 'reward'")
            if not 0 <= record.reward <= 1:
                raise UserError(
                    f"objective {self.settings.objective}: record {number} has the reward {record.reward:g}: numbers from 0 to 1 are needed"
                )
        return [
            (number, [replace(record, unread=tuple(key for key in record.unread if key not in READ), label=None, rejected=None)])
            for number, record in records
        ]

    def check(self, train: Sequence[Sample], val: Sequence[Sample], source: str) -> None:
        rewards = {float(sample.reward or 0) for sample in train}
        if len(rewards) == 1:
            (reward,) = rewards
            named = f"reward {reward:g}" + (f" ('correct' {reward == 1})".lower() if reward in (0, 1) else "")
            raise UserError(
                f"{source}: each of the {len(train):,} training answers has the {named}, so a critic has nothing to learn: it needs good "
                "and bad answers, such as `litgpt sample` writes"
            )

    def judged(self, view: View, samples: Sequence[Sample], hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the values' losses, and the advantages G_t - v_t, (n,), for the output layer's input (n, d)."""
        logits = view.model.value_head(hidden)  # (n,)
        values = logits.detach().sigmoid()
        rewards = [float(sample.reward or 0) for sample in samples]
        parts = list(zip(values.split([sample.n_targets for sample in samples]), rewards, strict=True))
        targets = torch.cat([returns(v, reward, self.settings.critic_lambda) for v, reward in parts])
        if not view.model.training:
            right = sum((v[-1].item() > 0.5) == (reward > 0.5) for v, reward in parts)
            self.tally += torch.tensor([right, len(samples)]).to(self.tally)
        weights = loss_weights(samples)
        weights = torch.ones_like(logits) if weights is None else weights.to(logits)
        return (weights * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")).sum(), targets - values


class Critic(Rated):
    """Only the value head is trained."""

    def loss(self, view: View, indices: Sequence[int]) -> torch.Tensor:
        return self.judged(view, view.samples(indices), view.states(indices)[0])[0]


def returns(values: torch.Tensor, reward: float, decay: float) -> torch.Tensor:
    """Return the lambda-returns G (T,) of an answer with the values v (T,)."""
    targets = torch.full_like(values, reward)
    for t in range(len(values) - 2, -1, -1) if decay < 1 else ():
        targets[t] = (1 - decay) * values[t + 1] + decay * targets[t + 1]
    return targets


def last_values(head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, samples: Sequence[Sample]) -> list[float]:
    """Return the value at the end of each rewarded sample's answer, from the output layer's input at the loss positions, (n, d)."""
    values = head(hidden).sigmoid().split([sample.n_targets for sample in samples])
    return [float(v[-1]) for v, sample in zip(values, samples, strict=True) if sample.reward is not None]


def quality(values: Sequence[float], rewards: Sequence[float]) -> dict[str, float]:
    """Return how well values predict rewards.

    `auc`: the probability that a random right answer (reward above 1/2) has a higher value than a random wrong one, with ties counting
    half; left out if all are of one kind. `brier`: the mean squared error. `calibration_error`: over ten equal bins of
    values, by their sizes, the mean distance between a bin's mean value and its mean reward (ECE, arXiv 1706.04599).
    """
    v, r = torch.tensor(values, dtype=torch.float64), torch.tensor(rewards, dtype=torch.float64)
    bins = (v * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, v - r)
    figures = {"brier": (v - r).square().mean().item(), "calibration_error": (gaps.abs().sum() / len(v)).item()}
    right = r > 0.5
    n, m = int(right.sum()), int((~right).sum())
    if not n or not m:
        return figures
    _, place, counts = v.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[place]  # ties get their mean
    return {"auc": ((ranks[right].sum() - n * (n + 1) / 2) / (n * m)).item(), **figures}
