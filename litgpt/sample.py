"""A training sample: token ids and a mask of those that carry loss."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Sample:
    """One training sequence of T tokens. Its first T - 1 tokens are the model's inputs."""

    input_ids: array[int]  # array('i') of T ids
    loss_mask: bytearray  # T bytes: 1 for a target that carries loss, never the first token, which nothing predicts
    weights: array[float] | None = None  # array('f') of T weights in the loss, 0 where the mask is 0; None: 1 for each target
    reference: array[float] | None = None  # array('f') of the targets' losses under the reference model
    label: bool = True  # False: the answer is a bad one
    reward: float | None = None  # of the answer
    shares: tuple[torch.Tensor, torch.Tensor] | None = None  # K tokens and their probabilities (n, K), which replace each target

    @property
    def n_inputs(self) -> int:
        """T - 1"""
        return len(self.input_ids) - 1

    @property
    def n_targets(self) -> int:
        """The number of tokens that carry loss."""
        return sum(self.loss_mask)

    @property
    def weight(self) -> float:
        """The sum of the targets' weights."""
        return self.n_targets if self.weights is None else sum(self.weights)
