"""Batches without padding: a batch's samples are rows of one matrix, and the stem, the tokens that all samples begin with, occurs once.

Linear layers, norms and MLPs treat rows alike and need not know where a sample ends; attention gets the rows as (B, T). The first P tokens
are the same in every sample (the beginning of a prompt template), so causal attention gives the same result for them in every sample: they
are computed once, and their keys and values serve all samples. Loss and gradients are those of the padded batch.

    rows        P of the stem | n_1 of sample 1 | n_2 of sample 2 | ...      N = P + n_1 + ... + n_B
    attention   (1, P) over itself,  (B, T) over P + T,  T = max n_b

Letters: B samples, T own positions of the longest, N rows, C columns.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from litgpt.sample import Sample

SHORTEST_STEM = 8  # tokens that are worth a separate attention call


def sent(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return values of the CPU on a device. The CPU does not wait until CUDA has done its earlier work."""
    return values.to(device, non_blocking=device.type == "cuda")


@dataclass(frozen=True)
class Packing:
    """The places of a batch's samples among its rows."""

    stem: int  # P
    lengths: tuple[int, ...]  # own rows of each sample
    rows: torch.Tensor  # (B T,): the own row at each place of (B, T); any row where there is padding
    places: torch.Tensor  # (N - P,): the place in (B T) of each own row
    starts: torch.Tensor | None = None  # (B,): the position of each sample's first own row, if it is not P

    @classmethod
    def of(cls, lengths: Sequence[int], stem: int, device: torch.device, starts: Sequence[int] | None = None) -> Packing:
        """Return the packing of samples with `lengths` own positions behind a stem, or from the positions `starts` on."""
        sizes = torch.tensor(lengths)
        steps, begins = torch.arange(max(lengths)), sizes.cumsum(0) - sizes
        real = steps < sizes[:, None]  # (B, T)
        rows = torch.where(real, begins[:, None] + steps, 0).flatten()
        first = None if starts is None else sent(torch.tensor(starts), device)
        return cls(stem, tuple(lengths), sent(rows, device), sent(real.flatten().nonzero()[:, 0], device), first)

    @property
    def width(self) -> int:
        """T"""
        return len(self.rows) // len(self.lengths)

    @property
    def is_ragged(self) -> bool:
        """True if there is padding in (B, T)."""
        return len(self.rows) != len(self.places)

    @property
    def positions(self) -> torch.Tensor:
        """(N,): the position of each row in its sample."""
        own = self.places % self.width + (self.stem if self.starts is None else self.starts[self.places // self.width])
        return torch.cat((torch.arange(self.stem, device=own.device), own))

    def spread(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows (N, C) as (1, P, C) and (B, T, C)."""
        stem, own = x.split([self.stem, x.size(0) - self.stem])
        if self.is_ragged:
            own = own.index_select(0, self.rows)  # padding gives no gradient: no real position attends to it
        return stem[None], own.unflatten(0, (len(self.lengths), self.width))

    def gather(self, stem: torch.Tensor | None, own: torch.Tensor) -> torch.Tensor:
        """Return (1, P, C), None if P = 0, and (B, T, C) as rows (N, C)."""
        flat = own.flatten(0, 1)
        if self.is_ragged:
            flat = flat.index_select(0, self.places)
        return flat if stem is None else torch.cat((stem[0], flat))


@dataclass(frozen=True)
class Batch:
    """The packed inputs of samples: T - 1 of a sample of T tokens."""

    ids: torch.Tensor  # (N,)
    at: torch.Tensor  # (n,): rows whose next token carries loss, sample by sample; a row of the stem may occur for several samples
    targets: torch.Tensor  # (n,): those next tokens
    packing: Packing


def pack(samples: Sequence[Sample], device: torch.device, stem: int) -> Batch:
    """Return the inputs of samples whose first `stem` tokens are the same. A single sample shares nothing; its rows keep their order."""
    stem = stem if len(samples) > 1 else 0
    tokens = [torch.frombuffer(sample.input_ids, dtype=torch.int32) for sample in samples]
    lengths = [len(each) - 1 - stem for each in tokens]
    ids = torch.cat([tokens[0][:stem], *(each[stem:-1] for each in tokens)])
    at, start = [], stem
    for sample, length in zip(samples, lengths, strict=True):
        positions = torch.frombuffer(sample.loss_mask, dtype=torch.bool)[1:].nonzero()[:, 0]
        at.append(torch.where(positions < stem, positions, positions + (start - stem)))
        start += length
    packing = Packing.of(lengths, stem, device)
    return Batch(sent(ids.long(), device), sent(torch.cat(at), device), sent(loss_targets(samples), device), packing)


def take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return x[rows] for x (N, ...) and rows (n,). The gradients of a row that occurs several times are summed in a fixed order.

    The gradients of x[rows] on a CPU, and of `index_select` on a GPU, are summed in the order in which threads arrive.
    """
    return x.index_select(0, rows) if x.device.type == "cpu" else x[rows]


def noise_like(x: torch.Tensor, alpha: float, packing: Packing | None) -> torch.Tensor:
    """Return uniform noise of magnitude alpha / sqrt(L d) for each sequence of L positions in embeddings (..., L, d), or packed (N, d).

    NEFTune, arXiv 2310.05914. Packed samples have no stem.
    """
    lengths = torch.tensor([x.size(-2)] if packing is None else packing.lengths)
    if packing is not None:
        lengths = lengths.repeat_interleave(lengths)  # (N,)
    magnitude = alpha * (sent(lengths, x.device) * x.size(-1)).rsqrt()[:, None]
    return (torch.empty_like(x, dtype=torch.float32).uniform_(-1, 1) * magnitude).to(x.dtype)


def shared_ends(samples: Sequence[Sample]) -> tuple[int, int]:
    """Return the numbers of tokens that all prompts begin with and end with."""
    prompts = [sample.input_ids[: max(sample.loss_mask.find(1), 0)] for sample in samples]
    return _common(prompts), _common([prompt[::-1] for prompt in prompts])


def _common(sequences: Sequence[array[int]]) -> int:
    """Return the length of the prefix that all sequences share."""
    first, last = min(sequences), max(sequences)
    return next((i for i, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), min(len(first), len(last)))


def thinned(sample: Sample, share: float, ends: tuple[int, int]) -> Sample:
    """Return the sample without a random `share` of its first prompt's tokens, apart from the first and the last ones (`ends`).

    This is word dropout (Iyyer et al. 2015, ACL P15-1162). A sample whose targets are probabilities stays whole: they belong to its prompt.
    """
    first, last = ends[0], sample.loss_mask.find(1) - ends[1]
    if sample.shares is not None or last <= first:
        return sample
    stays = torch.ones(len(sample.input_ids), dtype=torch.bool)
    stays[first:last] = torch.rand(last - first) >= share
    kept = stays.nonzero().flatten().tolist()
    ids, mask = array("i", [sample.input_ids[i] for i in kept]), bytearray(sample.loss_mask[i] for i in kept)
    weights = None if sample.weights is None else array("f", [sample.weights[i] for i in kept])
    return replace(sample, input_ids=ids, loss_mask=mask, weights=weights)


def loss_targets(samples: Sequence[Sample]) -> torch.Tensor:
    """Return (n,): the tokens that carry loss, sample by sample. The first token of a sample never does."""
    pairs = ((torch.frombuffer(s.input_ids, dtype=torch.int32), torch.frombuffer(s.loss_mask, dtype=torch.bool)) for s in samples)
    return torch.cat([tokens[mask] for tokens, mask in pairs]).long()


def loss_weights(samples: Sequence[Sample]) -> torch.Tensor | None:
    """Return (n,) fp32: the weights of the tokens that carry loss, sample by sample; None if all are 1."""
    if all(sample.weights is None for sample in samples):
        return None
    masks = [torch.frombuffer(sample.loss_mask, dtype=torch.bool) for sample in samples]
    pairs = zip(samples, masks, strict=True)
    return torch.cat([m[m].float() if s.weights is None else torch.frombuffer(s.weights, dtype=torch.float32)[m] for s, m in pairs])


def shared_targets(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return (n, K) tokens and (n, K) fp32 shares in place of `loss_targets`; None if each sample has one target for a position."""
    K = next((sample.shares[0].size(1) for sample in samples if sample.shares is not None), None)
    if K is None:
        return None
    tokens, counts = loss_targets(samples)[:, None].repeat(1, K), [sample.n_targets for sample in samples]
    shares = torch.eye(1, K).repeat(len(tokens), 1)  # of others the first of K equal tokens has all
    for sample, own, share in zip(samples, tokens.split(counts), shares.split(counts), strict=True):
        if sample.shares is not None:
            own[:], share[:] = sample.shares
    return tokens, shares


def shared_stem(samples: Sequence[Sample]) -> int:
    """Return the length of the prefix that all samples share, with at least one input left in each; 0 if it is too short to pay off."""
    common = min(_common([sample.input_ids for sample in samples]), min(len(sample.input_ids) for sample in samples) - 2)
    return common if common >= SHORTEST_STEM and len(samples) > 1 else 0
