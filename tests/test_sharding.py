"""The rows of a parameter that a rank holds; one that is not sharded stays as it is. Real processes: `tests/train/test_strategy.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from litgpt import sharding
from litgpt.sharding import SpreadLinear, all_called, assign, gathered, is_sharded, part_of, rows_of, scattered, whole


class Mesh:
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.ranks = rank, size

    def size(self) -> int:
        return self.ranks

    def get_local_rank(self) -> int:
        return self.rank

    def get_group(self) -> None:
        return None


def held(value: torch.Tensor, rank: int, size: int) -> Any:
    """A parameter as rank `rank` of `size` has it after `shard`."""
    parameter: Any = nn.Parameter(torch.zeros_like(value))
    parameter.device_mesh = Mesh(rank, size)
    parameter.part = nn.Parameter(rows_of(value, parameter).clone())
    return parameter


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_ranks_rows_are_all_rows_once(rows: int, size: int) -> None:
    value = torch.arange(rows * 2.0).view(rows, 2)
    parts = [part_of(held(value, rank, size)) for rank in range(size)]
    assert torch.equal(torch.cat(list(parts)), value) and len({tuple(part.shape[1:]) for part in parts}) == 1


def test_a_value_is_copied_into_the_rows_of_a_rank() -> None:
    parameter = held(torch.zeros(5, 2), 1, 2)
    assign(parameter, torch.arange(10.0).view(5, 2))
    assert part_of(parameter).tolist() == [[6, 7], [8, 9]]


def test_an_optimizers_state_is_cut_to_the_rows_but_for_its_counters() -> None:
    sharded, plain = held(torch.zeros(4, 2), 1, 2), nn.Parameter(torch.zeros(4, 2))
    moment = torch.arange(8.0).view(4, 2)
    state = {i: {"step": torch.tensor(3.0), "exp_avg": moment} for i in range(2)}
    cut = scattered(state, [sharded, plain])
    assert torch.equal(cut[0]["exp_avg"], moment[2:]) and torch.equal(cut[1]["exp_avg"], moment)
    assert cut[0]["step"] is state[0]["step"] and state[0]["exp_avg"] is moment


def test_nothing_changes_for_a_model_of_one_process() -> None:
    parameter, value = nn.Parameter(torch.ones(3)), torch.arange(3.0)
    assert part_of(parameter) is parameter and whole(parameter) is parameter and rows_of(value, parameter) is value
    assert not is_sharded(nn.Linear(2, 2))
    state = {0: {"exp_avg": value}}
    assert gathered(state, [parameter]) == state
    assign(parameter, value)
    assert torch.equal(parameter, value)


def test_every_tensor_is_gathered_once_and_in_order() -> None:
    called: list[str] = []
    loads = {name: lambda name=name: called.append(name) or torch.zeros(1) for name in "abcd"}
    with all_called(loads):  # by a rank that writes nothing
        pass
    with pytest.raises(OSError), all_called(loads) as plan:  # by one whose disk is full
        plan["a"](), plan["b"]()
        raise OSError
    assert "".join(called) == "abcdabcd"


def test_nothing_is_gathered_after_another_rank_is_lost() -> None:
    def lost() -> torch.Tensor:
        raise ConnectionError

    with pytest.raises(ConnectionError), all_called({"a": lost, "b": lambda: pytest.fail("gathered")}) as plan:
        plan["a"]()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [4, 5, 7])
def test_a_layer_that_is_gathered_for_each_product(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain layer: the product and the input's gradient; no weight is kept for the backward pass."""
    plain, size = nn.Linear(3, rows, bias=bias).requires_grad_(False), 3
    chunks = [*plain.weight.chunk(size), plain.weight[:0]][:size]
    x, upstream = torch.randn(2, 6, 3, requires_grad=True), torch.randn(2, 6, rows)
    want = plain(x)
    (gradient,) = torch.autograd.grad(want, x, upstream)

    def gather(out: torch.Tensor, own: torch.Tensor, group: Any) -> None:
        assert out.shape[0] == size * len(own) and torch.equal(own[: len(chunks[1])], chunks[1])
        out.copy_(torch.cat([F.pad(chunk, (0, 0, 0, len(own) - len(chunk))) for chunk in chunks]))

    monkeypatch.setattr(sharding, "gather", gather)
    layer: Any = SpreadLinear(3, rows, bias=bias)
    layer.bias = plain.bias
    layer._parameters.pop("weight")
    layer.__dict__["weight"] = Rows(chunks[1], 1, size)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        got = layer(x)
    assert not kept
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, x, upstream)[0], gradient)


def test_16_bits_under_autocast_as_a_plain_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = nn.Linear(3, 4, bias=False).requires_grad_(False)
    monkeypatch.setattr(sharding, "gather", lambda out, own, group: None)
    layer: Any = SpreadLinear(3, 4, bias=False)
    layer._parameters.pop("weight")
    layer.__dict__["weight"] = Rows(plain.weight, 0, 1)
    results = []
    for each in (plain, layer):
        x = torch.ones(5, 3, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = each(x)
        y.float().square().sum().backward()
        results.append((y, x.grad))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


class Rows:
    """A weight of which a rank has these rows."""

    def __init__(self, own: torch.Tensor, rank: int, size: int) -> None:
        self.own, self.device_mesh = own, Mesh(rank, size)

    def to_local(self) -> torch.Tensor:
        return self.own
