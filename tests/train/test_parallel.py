"""Several processes, as threads whose sums meet at a barrier, train like one."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from litgpt.args import EvalArgs
from litgpt.convert.litgpt import require_finite
from litgpt.errors import Stopped, UserError
from litgpt.train.launch import Failure
from litgpt.train.parallel import Rank, ends_together
from tests.helpers.cases import quick
from tests.helpers.training import by_hand, column, make_loop, make_model, make_samples, train_by_hand, trained


def in_processes(size: int, work: Callable[[Rank], Any]) -> list[Any]:
    """Run `work` for each rank in a thread of its own; their sums meet at a barrier as in all-reduce."""
    barrier, parts, results = threading.Barrier(size, timeout=60), [torch.empty(0)] * size, [None] * size

    def add(rank: int, tensor: torch.Tensor) -> torch.Tensor:
        parts[rank] = tensor.detach().clone()
        barrier.wait()
        total = torch.stack(parts).sum(0)
        barrier.wait()
        return total

    def one(rank: int) -> None:
        try:
            results[rank] = work(Rank(rank, size, sum=lambda tensor: add(rank, tensor)))
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(
    ("size", "count"), [pytest.param(2, 15, marks=pytest.mark.slow), (3, 7), pytest.param(3, 2, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(("method", "max_norm"), quick([("lm_head", None), ("block", 0.5), ("full", None)], ("block", 0.5)))
def test_several_processes_train_like_one_on_their_common_batches(method: str, max_norm: float | None, size: int, count: int) -> None:
    samples, val = make_samples(count), make_samples(5, seed=9)
    evaluate = EvalArgs(interval=1, final_validation=True)

    def plain_steps(parameters: list[Any]) -> Any:
        return torch.optim.SGD(parameters, lr=0.01)  # unlike AdamW's its steps show a wrong factor

    def work(rank: Rank) -> tuple[Any, Any, list[float], list[float]]:
        settings = {"epochs": 2, "global_batch_size": 2 * size, "micro_batch_size": 1, "max_norm": max_norm}
        loop = make_loop(make_model(method), samples, val, eval=evaluate, rank=rank, optimizer=plain_steps, **settings)
        loop.run()
        return loop.model, loop.batches, column(loop, "train_loss"), column(loop, "val_loss")

    ranks = in_processes(size, work)
    assert not [result for result in ranks if isinstance(result, BaseException)]
    at_once = [zip(*(rank[1].epoch(epoch) for rank in ranks), strict=True) for epoch in range(2)]
    batches = [[i for rows, *_ in parts for i in rows] for steps in at_once for parts in steps]
    other = make_model(method)
    optimizer = plain_steps(list(trained(other).values()))
    step = optimizer.step

    def clipped_step() -> None:
        torch.nn.utils.clip_grad_norm_(list(trained(other).values()), max_norm or torch.inf)
        step()

    optimizer.step = clipped_step
    losses = train_by_hand(other, samples, batches, optimizer)
    with torch.no_grad():
        final = by_hand(other.eval(), val, range(5)).item()
    for model, _, train_losses, val_losses in ranks:
        assert_close(train_losses, losses, rtol=1e-4, atol=1e-5)
        assert_close(trained(model), trained(other), rtol=1e-2, atol=1e-3)
        assert val_losses[-1] == pytest.approx(final, rel=1e-3)
        assert all(torch.equal(value, trained(ranks[0][0])[name]) for name, value in trained(model).items())


def test_all_processes_stop_when_the_time_of_one_is_up() -> None:
    def work(rank: Rank) -> int:
        loop = make_loop(make_model(), make_samples(8), rank=rank, epochs=None, max_time=1e9 if rank.index else 0.2)
        return loop.run().step

    began = time.perf_counter()
    steps = in_processes(2, work)
    assert steps[0] == steps[1] >= 1
    assert time.perf_counter() - began < 30


def test_a_number_that_is_not_finite_in_one_part_of_a_model_is_told_by_all_processes() -> None:
    def work(rank: Rank) -> str:
        parts = {"sound": torch.ones(2), "broken": torch.tensor([1.0, torch.inf if rank.index else 1.0]), "empty": torch.empty(0)}
        with pytest.raises(UserError) as caught:
            require_finite(parts, Path("base/lit_model.pth"), lambda flags: rank.gather(flags).any(0))
        return str(caught.value)

    for message in in_processes(2, work):
        assert message.startswith("base/lit_model.pth: broken holds non-finite numbers")


def test_a_process_that_a_signal_ends_before_its_first_step_names_the_signal() -> None:
    told: list[Failure] = []
    group: Any = SimpleNamespace(
        ended=False, speaker=0, failures=lambda *_: [], tell=told.append, leave=lambda: None, end_children=lambda: None
    )
    with pytest.raises(SystemExit) as ended, ends_together(Rank(1, 2, group=group)):
        raise Stopped(signal.SIGTERM)
    assert ended.value.code == 143 and told == [Failure(1, 143, "ended by SIGTERM")]
