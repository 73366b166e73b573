"""The choice of blocks to tap for `skip2lora_block_indices: auto`, from the outputs of all candidates on a sample of the training data.

At the base model, where B = 0, row n has the gradient g_n = dL/dx of the loss with respect to the output layer's input, and taps t_{i,n}.
Adapters move x by a linear function M of the chosen taps S. The most useful direction is -F^-1 g, Newton's step with the mean empirical
Fisher matrix F = E[g g^T] + c I as the curvature. A set of blocks is scored by how well its taps predict that step on held-out samples:

    R2(S) = 1 - sum_n (g_n + M t_{S,n})^T F^-1 (g_n + M t_{S,n}) / sum_n g_n^T F^-1 g_n

M is the ridge regression of -g on the taps over one half of the samples, and the sums go over the other half; R2 is the mean of both ways,
for the best ridge. Blocks overlap, so they are chosen one by one, each for its gain over those before.

Letters: N rows of the sample, d `n_embd`, S candidate blocks, k directions kept of each block's taps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from litgpt.activations.cache import Recompute, is_flat
from litgpt.lora import GPT
from litgpt.loss import HeadLoss, loss_of
from litgpt.model import evaluating
from litgpt.sample import Sample

SAMPLES, ROWS = 128, 2048  # of the training data at most; with twice as many, the chosen blocks predict no more (SmolLM2-135M)
DIRECTIONS = 32  # k: principal directions kept of a block's taps
DAMPING = 0.3  # c, in mean eigenvalues of E[g g^T]
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3)  # in mean squares of a tap

Part = tuple[torch.Tensor, torch.Tensor]  # taps (N, S, d) and gradients (N, d) of one half of the sample


@dataclass(frozen=True)
class Choice:
    """The chosen blocks with their R2, and that of as many blocks chosen by simple rules: the last ones, and evenly spaced ones."""

    blocks: tuple[int, ...]
    value: float  # 0 or less: the sample is inconclusive, and the last blocks are used
    rules: dict[str, float]
    samples: int
    rows: int


def choose(model: GPT, samples: Sequence[Sample], count: int, micro_batch: int, seed: int, progress: Callable[[int, int], None]) -> Choice:
    """Choose `count` of the blocks that `model`, with fresh adapters, taps now. Repeatable with the same seed."""
    sample = draw(samples, seed)
    return select(gather(model, sample, micro_batch, seed, progress), model.config.taps, count, len(sample))


def draw(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Draw the training samples to choose by."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    return [samples[i] for i in order[:SAMPLES].tolist()]


def select(parts: Sequence[Part], candidates: Sequence[int], count: int, samples: int) -> Choice:
    """Choose `count` candidates from the two halves that `gather` returned for `samples` samples. A simple rule wins a tie."""
    everything = range(len(candidates))
    spaced = everything[:: -(len(candidates) // count)][:count]
    rules = {f"last:{count}": tuple(everything[-count:]), "evenly spaced": tuple(sorted(spaced))}
    values, best, value = dict.fromkeys(rules, 0.0), rules[f"last:{count}"], 0.0
    if len(parts) == 2 and all(torch.isfinite(gradients).all() for _, gradients in parts):
        evidence = Evidence(parts)
        values = {name: evidence.explained(blocks) for name, blocks in rules.items()}
        selected = forward_selection(evidence, len(candidates), count)
        for blocks, worth in (*((rules[name], values[name]) for name in rules), (selected, evidence.explained(selected))):
            if worth > value:
                best, value = blocks, worth
    rows = sum(len(gradients) for _, gradients in parts)
    return Choice(tuple(sorted(candidates[i] for i in best)), value, values, samples, rows)


def gather(model: GPT, sample: Sequence[Sample], micro_batch: int, seed: int, progress: Callable[[int, int], None]) -> list[Part]:
    """Return taps and gradients of two halves of the sample, on the CPU, subsampled to `ROWS` rows. Batches are as in training."""
    flat = is_flat(model)
    device = next(model.parameters()).device
    source = Recompute(model, sample, device)
    head_loss = HeadLoss.of(model)
    expected = sum(each.n_targets if flat else each.n_inputs - source.stem for each in sample)
    share, generator = min(1.0, ROWS / expected), torch.Generator().manual_seed(seed)
    halves: list[list[Part]] = [[], []]
    done = 0
    for half in (0, 1):
        rows = range(half, len(sample), 2)
        for start in range(0, len(rows), micro_batch):
            batch = list(rows[start : start + micro_batch])
            with torch.no_grad(), evaluating(model):
                features = model.within(partial(source, batch))
            x = features.x.detach().requires_grad_()
            with torch.enable_grad(), evaluating(model):
                untapped = replace(features, x=x, taps=features.taps[..., :0, :])
                loss = model.within(partial(loss_of, model, untapped, head_loss))
                (gradient,) = torch.autograd.grad(loss, x)
            drawn = torch.randperm(len(x), generator=generator)[: max(1, int(share * len(x)))].to(device)
            halves[half].append((features.taps[drawn].cpu(), gradient[drawn].float().cpu()))
            done += len(batch)
            progress(done, len(sample))
    return [(torch.cat([t for t, _ in half]), torch.cat([g for _, g in half])) for half in halves if half]


class Evidence:
    """Sums over rows that give R2 of any set of blocks. Their size does not depend on N."""

    def __init__(self, parts: Sequence[Part], directions: int = DIRECTIONS) -> None:
        sizes = [len(gradients) for _, gradients in parts]
        taps, g = (torch.cat(each).float() for each in zip(*parts, strict=True))
        scale = taps.square().sum(-1).mean().sqrt().clamp(min=1e-30)
        generator = torch.Generator().manual_seed(0)
        reduced = [principal(taps[:, i] / scale, directions, generator) for i in range(taps.size(1))]
        self.k = reduced[0].size(1)
        target = -whitened(g)
        self.C, self.b, self.e = [], [], []
        for z, y in zip(torch.cat(reduced, dim=1).split(sizes), target.split(sizes), strict=True):
            self.C.append((z.T @ z).double() / len(z))  # (S k, S k)
            self.b.append((z.T @ y).double() / len(z))  # (S k, d)
            self.e.append(y.double().square().sum() / len(z))
        self.P = [[one @ other.T for other in self.b] for one in self.b]  # (S k, S k) each

    def explained(self, blocks: Sequence[int]) -> float:
        """Return R2 of a set of candidates, counted from 0."""
        at = torch.cat([torch.arange(i * self.k, (i + 1) * self.k) for i in blocks])
        total = torch.zeros(len(RIDGES), dtype=torch.float64)
        for fit, held in ((0, 1), (1, 0)):
            values, V = torch.linalg.eigh(self.C[fit][at][:, at])
            a = 1 / (values.clamp(min=0) + torch.tensor(RIDGES, dtype=torch.float64)[:, None])  # (ridges, k |S|)
            cross = (V * (self.P[fit][held][at][:, at] @ V)).sum(0)
            square = (V.T @ self.C[held][at][:, at] @ V) * (V.T @ self.P[fit][fit][at][:, at] @ V)
            total += (2 * a @ cross - ((a @ square) * a).sum(1)) / self.e[held].clamp(min=1e-30) / 2
        return total.max().item()


def principal(x: torch.Tensor, directions: int, generator: torch.Generator) -> torch.Tensor:
    """Project x (N, d) on its `directions` leading right singular vectors, up to a rotation, by subspace iteration (arXiv 0909.4061)."""
    basis = torch.randn(x.size(1), min(directions, *x.shape), generator=generator)
    for _ in range(3):
        basis = torch.linalg.qr(x.T @ (x @ basis)).Q
    return x @ basis


def whitened(g: torch.Tensor) -> torch.Tensor:
    """Return F^-1/2 g for rows g (N, d), up to a rotation."""
    F = g.T @ g / len(g)
    F.diagonal().add_(DAMPING * F.diagonal().mean().clamp(min=1e-30))
    return torch.linalg.solve_triangular(torch.linalg.cholesky(F), g.T, upper=False).T


def forward_selection(evidence: Evidence, candidates: int, count: int) -> tuple[int, ...]:
    """Choose blocks one by one, each time the one that raises R2 most, and return them in this order."""
    chosen: tuple[int, ...] = ()
    for _ in range(count):
        left = [i for i in range(candidates) if i not in chosen]
        chosen = (*chosen, max(left, key=lambda i: evidence.explained((*chosen, i))))
    return chosen
