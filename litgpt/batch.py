"""Samples to packed batches (`litgpt.packing`).

Letters: B samples, N rows, P shared tokens, n positions with loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from litgpt.data.base import Sample
from litgpt.packing import Packing

SHORTEST_HEAD = 8
"""shared tokens that are worth an attention call of their own"""


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
