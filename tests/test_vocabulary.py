"""A spread embedding and output layer, by ranks that are threads, against a layer of one process. Real processes: `tests/train`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litgpt import vocabulary
from litgpt.vocabulary import IGNORED, SpreadEmbedding, SpreadHead

V, D, RANKS = 7, 4, 3  # the ranks hold 3, 3 and 1 rows


class Threads:
    """Ranks that are threads, and the three collectives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.own, self.barrier, self.sent = threading.local(), threading.Barrier(RANKS), dict[int, Any]()
        monkeypatch.setattr(torch.distributed, "all_to_all_single", self.all_to_all)
        monkeypatch.setattr(torch.distributed, "reduce", self.reduce)
        monkeypatch.setattr(vocabulary, "gather", self.gather)
        monkeypatch.setattr(vocabulary, "as_sharded", self.in_place)

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        def started(rank: int) -> Any:
            self.own.rank = rank
            return work(rank)

        with ThreadPoolExecutor(RANKS) as pool:
            return list(pool.map(started, range(RANKS), timeout=20))

    def exchange(self, value: Any) -> list[Any]:
        self.sent[self.own.rank] = value
        self.barrier.wait(10)
        values = [self.sent[rank] for rank in range(RANKS)]
        self.barrier.wait(10)
        return values

    def all_to_all(self, out: torch.Tensor, values: torch.Tensor, received: list[int], sizes: list[int], group: Any) -> None:
        parts = [parts[self.own.rank] for parts in self.exchange(values.split(sizes))]
        assert [len(part) for part in parts] == received
        out.copy_(torch.cat(parts))

    def gather(self, out: torch.Tensor, own: torch.Tensor, group: Any) -> None:
        out.copy_(torch.cat(self.exchange(own)))

    def reduce(self, rows: torch.Tensor, group: Any, group_dst: int, async_op: bool) -> Any:
        total = sum(self.exchange(rows.clone()))
        rows.copy_(total if group_dst == self.own.rank else torch.full_like(rows, torch.nan))
        return SimpleNamespace(wait=lambda: None)

    def in_place(self, own: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        before = 3 * self.get_local_rank()
        return F.pad(own, (0, 0, before, V - before - len(own)))

    # as a mesh

    def size(self) -> int:
        return RANKS

    def get_local_rank(self) -> int:
        return int(self.own.rank)

    def get_group(self) -> None:
        return None


def spread(kind: Any, plain: Any, mesh: Threads) -> Any:
    """A layer as one rank has it. Of its weight, which autograd sees whole, only the rank's rows are read."""
    layer, weight = kind.__new__(kind), nn.Parameter(torch.full_like(plain.weight, torch.nan), plain.weight.requires_grad)
    rows: Any = plain.weight.detach()
    weight.device_mesh, weight.to_local = mesh, lambda: rows.chunk(RANKS)[mesh.get_local_rank()]  # type: ignore[attr-defined]
    layer.__dict__.update(plain.__dict__ | {"_parameters": {**plain._parameters, "weight": weight}})
    return layer


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Threads:
    torch.manual_seed(0)
    return Threads(monkeypatch)


def test_each_rank_looks_up_its_own_ids(ranks: Threads) -> None:
    plain = nn.Embedding(V, D)
    ids = [torch.tensor([[6, 0], [3, 3]]), torch.empty(0, dtype=torch.int64), torch.tensor([3])]

    def lookup(rank: int) -> Any:
        layer = spread(SpreadEmbedding, plain, ranks)
        found = layer(ids[rank])
        return found.detach(), torch.autograd.grad((found * (1.0 + rank)).sum(), layer.weight)[0]

    found, gradients = zip(*ranks.run(lookup), strict=True)
    assert all(torch.equal(one, plain(own)) for own, one in zip(ids, found, strict=True))
    assert sum(gradients)[:, 0].tolist() == [1, 0, 0, 2 + 3, 0, 0, 1]


@pytest.mark.parametrize(("piece", "block"), [(1, 1), (10**6, 10**6)])
@pytest.mark.parametrize(("divisor", "cap", "bias"), [(1.0, None, True), (2.0, 3.0, False)])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_logits_losses_and_gradients_are_those_of_one_process(
    piece: int,
    block: int,
    divisor: float,
    cap: float | None,
    bias: bool,
    several: bool,
    trained: bool,
    ranks: Threads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vocabulary, "CPU_PIECE_BYTES", piece)
    monkeypatch.setattr(vocabulary, "BLOCK_BYTES", block)
    plain = nn.Linear(D, V, bias=bias, dtype=torch.float64).requires_grad_(False)
    plain.weight.requires_grad_(trained)
    counts = (5, 0, 2)  # a rank may have no position
    hidden = [torch.randn(n, D, dtype=torch.float64, requires_grad=True) for n in counts]
    targets = [torch.tensor([0, 6, IGNORED, 3, 5])[:n] for n in counts]
    weights = [torch.tensor([1, 0.5, 1, 2, 1])[:n] for n in counts]
    if several:  # two for each position
        targets = [torch.stack((own.clamp(min=0), torch.full_like(own, 3)), dim=1) for own in targets]
        weights = [torch.stack((own, 2 * own.flip(0)), dim=1) for own in weights]

    def losses(rank: int) -> Any:
        layer = spread(SpreadHead, plain, ranks)
        found = layer.losses(hidden[rank], targets[rank], weights[rank] if rank or several else None, divisor, cap)
        found.sum().backward()
        return found, hidden[rank].grad, layer(hidden[rank]), layer.weight.grad

    results = ranks.run(losses)
    for rank, (found, gradient, logits, _) in enumerate(results):
        z = plain(hidden[rank])
        y = z / divisor if cap is None else cap * torch.tanh(z / divisor / cap)
        if several:
            parts = zip(targets[rank].unbind(1), weights[rank].unbind(1), strict=True)
            expected = sum((F.cross_entropy(y, own, reduction="none") * weight for own, weight in parts), torch.zeros(()))
        else:
            expected = F.cross_entropy(y, targets[rank], reduction="none", ignore_index=IGNORED) * (weights[rank] if rank else 1)
        assert torch.allclose(found, expected) and torch.allclose(logits, z)
        hidden[rank].grad = None
        expected.sum().backward()
        assert torch.allclose(gradient, hidden[rank].grad)
    if trained:
        assert torch.allclose(sum(of_weight for *_, of_weight in results), plain.weight.grad)
