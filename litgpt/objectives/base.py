"""The interface between the loop and an objective, and next-token prediction, which is one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from litgpt.activations.cache import Activations
from litgpt.data.base import Unit
from litgpt.data.records import Record
from litgpt.errors import UserError
from litgpt.loss import HeadLoss, hidden_of, loss_of
from litgpt.model import GPT, evaluating
from litgpt.packing import loss_weights, sent, shared_targets, take
from litgpt.sample import Sample

ACCURACY = "val_accuracy"


@dataclass(frozen=True)
class View:
    """A model and the samples that it is trained or measured on, named by their indices."""

    model: GPT
    activations: Activations
    head_loss: HeadLoss
    micro_batch: int  # samples in a forward pass
    spare: Sequence[int] = ()  # a unit of this process, for a sharded model's passes in which only other processes have samples

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        return [self.activations.samples[i] for i in indices]

    def total(self, indices: Sequence[int], weights: torch.Tensor | None, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Return the sum of the losses at the samples' loss positions, times weights (n,); for targets (n, K), times weights (n, K)."""
        features = self.activations(indices)
        if targets is not None:
            features.targets = sent(targets, features.x.device)
        return loss_of(self.model, features, self.head_loss, weights)

    def states(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the output layer's input (n, d) and the taps (n, S, d) at the samples' loss positions, sample by sample."""
        features = self.activations(indices)
        return hidden_of(self.model, features), features.taps if features.at is None else take(features.taps, features.at)

    def losses(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the losses at the samples' loss positions, (n,) fp32, sample by sample, without the routers' auxiliary loss."""
        features = self.activations(indices)
        return self.head_loss(hidden_of(self.model, features), features.targets, is_sum=False)

    @torch.no_grad()
    def measured(self, indices: Sequence[int], agreed: Callable[[bool], bool] = bool) -> torch.Tensor:
        """Return `losses` without gradients and without dropout, a micro-batch at a time; `agreed` as in `passes`."""
        batches = [indices[i : i + self.micro_batch] for i in range(0, len(indices), self.micro_batch)]
        with evaluating(self.model):
            parts = [losses for _, losses in self.passes(batches, agreed)]
        return torch.cat(parts) if parts else torch.empty(0)

    def passes(
        self, batches: Iterable[Sequence[int]], agreed: Callable[[bool], bool] = bool
    ) -> Iterator[tuple[Sequence[int], torch.Tensor]]:
        """Yield each batch with its `losses`. `agreed` returns whether a flag is set in any process of a sharded model: all must run it."""
        remaining = iter(batches)
        while agreed(bool(batch := next(remaining, []))):
            losses = self.model.within(partial(self.losses, batch or self.spare))
            if batch:
                yield batch, losses


class Objective:
    """Next-token prediction: the mean of the losses at loss positions, by the weights of the data.

    A step's loss is the sum of `loss` over the micro-batches of the global batch, divided by the sum of `weight`.
    """

    group: ClassVar[int] = 1  # samples that stay together and count as one in the settings, such as the two answers of a pair
    of_answers: ClassVar[bool] = False  # the data need answers that are rated or compared
    referred: ClassVar[tuple[str, ...]] = ()  # the parts of the data that get their losses under a reference model
    reference: Path | None = None  # the folder of that model; None: the base
    is_token_mean: ClassVar[bool] = True  # `weight` is the sum of the samples' weights, which is known beforehand
    columns: ClassVar[tuple[str, ...]] = ()  # what `figures` returns

    def __init__(self, settings: Any = None) -> None:
        """`settings`: a `litgpt.objectives.settings.ObjectiveSettings`."""
        self.settings = settings
        self.tally = torch.zeros(2)  # of a validation: the number judged correctly, and the total

    def units(self, records: Sequence[tuple[int, Record]]) -> list[Unit]:
        """Return the conversations of each unit of `group` samples, for numbered records."""
        for number, record in records:
            if record.rejected is not None:
                raise UserError(f"record {number} holds 'chosen' and 'rejected' answers: set objective to dpo, orpo or kto")
        return [(number, [replace(record, label=None, reward=None)]) for number, record in records]

    def check(self, train: Sequence[Sample], val: Sequence[Sample], source: str) -> None:
        """Raise UserError if nothing can be learned from `train`, or measured on the validated samples `val`, which are of `source`."""

    def begin(self, view: View, indices: Sequence[int], rank: Any) -> None:
        """Look at this process's samples of a global batch, or of a validation, before their losses are computed."""

    def loss(self, view: View, indices: Sequence[int]) -> torch.Tensor:
        """Return the sum of the losses of complete units.

        Where a position has several targets the loss is the Kullback-Leibler divergence from their shares p: sum p (log p - log q).
        """
        samples = view.samples(indices)
        weights, several = loss_weights(samples), shared_targets(samples)
        if several is None:
            return view.total(indices, weights)
        tokens, shares = several
        each = shares if weights is None else shares * weights[:, None]
        return view.total(indices, each, tokens) + torch.special.xlogy(each, shares).sum()

    def weight(self, view: View, indices: Sequence[int]) -> float:
        """Return the sum of the weights of complete units."""
        return sum(sample.weight for sample in view.samples(indices))

    def figures(self, tally: torch.Tensor) -> dict[str, float]:
        """Return the figures of a validation besides the loss."""
        right, total = tally.tolist()
        return {ACCURACY: right / total} if total else {}
