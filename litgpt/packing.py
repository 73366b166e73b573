"""Batches without padding: the samples of a batch as the rows of one matrix, and the tokens that all of them begin with only once.

Linear layers, norms and MLPs treat rows alike and need not know where a sample ends; attention does, and has the rows laid out as
(B, T) for it. The first P tokens are the same in every sample (the head of a prompt template), so causal attention makes the same of them
in every sample: they are computed once, and their keys and values serve all. Loss and gradients are those of the padded batch.

    rows        P shared | n_1 of sample 1 | n_2 of sample 2 | ...      N = P + n_1 + ... + n_B
    attention   (1, P) over itself,  (B, T) over P + T,  T = max n_b

Letters: B samples, T own positions of the longest, N rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from litgpt.sample import Sample

SHORTEST_HEAD = 8
"""shared tokens that are worth an attention call of their own"""


@dataclass(frozen=True)
class Packing:
    """Where the samples of a batch stand in its rows."""

    head: int
    """P"""
    lengths: tuple[int, ...]
    """own rows of each sample"""
    rows: torch.Tensor
    """(B T,): which of the own rows stands at each place of (B, T); for padding any"""
    places: torch.Tensor
    """(N - P,): the place in (B T) of each own row"""

    @classmethod
    def of(cls, lengths: Sequence[int], head: int, device: torch.device) -> Packing:
        """For samples of so many own positions behind `head` shared ones."""
        sizes = torch.tensor(lengths)
        steps, starts = torch.arange(max(lengths)), sizes.cumsum(0) - sizes
        real = steps < sizes[:, None]  # (B, T)
        rows = torch.where(real, starts[:, None] + steps, 0).flatten()
        return cls(head, tuple(lengths), rows.to(device), real.flatten().nonzero()[:, 0].to(device))

    @property
    def width(self) -> int:
        """T"""
        return len(self.rows) // len(self.lengths)

    @property
    def is_ragged(self) -> bool:
        """Whether there is padding in (B, T)."""
        return len(self.rows) != len(self.places)

    @property
    def positions(self) -> torch.Tensor:
        """(N,): the place of each row in its sample."""
        own = self.head + self.places % self.width
        return torch.cat((torch.arange(self.head, device=own.device), own))

    def spread(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows (N, C) as (1, P, C) and (B, T, C)."""
        head, own = x.split([self.head, x.size(0) - self.head])
        if self.is_ragged:
            own = own.index_select(0, self.rows)  # no gradient comes from padding: no real position attends to it
        return head[None], own.unflatten(0, (len(self.lengths), self.width))

    def gather(self, head: torch.Tensor | None, own: torch.Tensor) -> torch.Tensor:
        """(1, P, C), None if P = 0, and (B, T, C) as rows (N, C)."""
        flat = own.flatten(0, 1)
        if self.is_ragged:
            flat = flat.index_select(0, self.places)
        return flat if head is None else torch.cat((head[0], flat))


@dataclass(frozen=True)
class Batch:
    """The inputs of samples, packed: a sample of n tokens has n - 1."""

    ids: torch.Tensor
    """(N,)"""
    at: torch.Tensor
    """(n,): rows whose next token carries loss, sample after sample; a shared row may be there for several of them"""
    targets: torch.Tensor
    """(n,): those next tokens"""
    packing: Packing


def pack(samples: Sequence[Sample], device: torch.device, head: int) -> Batch:
    """The samples' inputs, whose first `head` tokens are the same. One sample alone shares nothing: its rows are in the same order."""
    head = head if len(samples) > 1 else 0
    tokens = [torch.frombuffer(sample.input_ids, dtype=torch.int32) for sample in samples]
    lengths = [len(each) - 1 - head for each in tokens]
    ids = torch.cat([tokens[0][:head], *(each[head:-1] for each in tokens)])
    at, start = [], head
    for sample, length in zip(samples, lengths, strict=True):
        positions = torch.frombuffer(sample.loss_mask, dtype=torch.bool)[1:].nonzero()[:, 0]
        at.append(torch.where(positions < head, positions, positions + (start - head)))
        start += length
    packing = Packing.of(lengths, head, device)
    return Batch(ids.long().to(device), torch.cat(at).to(device), loss_targets(samples).to(device), packing)


def loss_targets(samples: Sequence[Sample]) -> torch.Tensor:
    """(n,): the tokens that carry loss, sample after sample. The first token never does."""
    pairs = ((torch.frombuffer(s.input_ids, dtype=torch.int32), torch.frombuffer(s.loss_mask, dtype=torch.bool)) for s in samples)
    return torch.cat([tokens[mask] for tokens, mask in pairs]).long()


def shared_head(samples: Sequence[Sample]) -> int:
    """How many first tokens all samples have in common, each keeping at least one input after them; 0 if too few to be worth it."""
    first, last = min(s.input_ids for s in samples), max(s.input_ids for s in samples)
    limit = min(len(s.input_ids) for s in samples) - 2
    common = 0
    while common < limit and first[common] == last[common]:
        common += 1
    return common if common >= SHORTEST_HEAD and len(samples) > 1 else 0
