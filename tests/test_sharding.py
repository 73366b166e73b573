"""The rows of a parameter that a rank holds; one that is not sharded stays as it is. Real processes: `tests/train/test_strategy.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from litgpt.sharding import assign, gathered, is_sharded, part_of, rows_of, scattered, whole


class Mesh:
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.ranks = rank, size

    def size(self) -> int:
        return self.ranks

    def get_local_rank(self) -> int:
        return self.rank


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
    state = {"state": {0: {"exp_avg": value}}, "param_groups": []}
    assert gathered(state, [parameter]) == state
    assign(parameter, value)
    assert torch.equal(parameter, value)
