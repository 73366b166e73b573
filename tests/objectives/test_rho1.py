"""The tokens that carry loss are those with the largest excess loss in the global batch, chosen by hand."""

from __future__ import annotations

import math
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from litgpt.activations.cache import CacheSettings, activations
from litgpt.errors import UserError
from litgpt.objectives.named import objective_of
from litgpt.objectives.settings import ObjectiveSettings
from litgpt.sample import Sample
from litgpt.train.resume import State
from tests.helpers import tiny
from tests.helpers.cases import quick
from tests.helpers.training import CLOSE, CPU, Rank, make_loop, make_model, make_samples, record_gradients, trained
from tests.train.test_parallel import in_processes

KEEP = 0.3


def objective() -> Any:
    return objective_of(ObjectiveSettings(objective="rho1", rho1_reference=Path("unread"), rho1_keep=KEEP))


def token_losses(model: Any, sample: Sample) -> torch.Tensor:
    ids, mask = torch.tensor(sample.input_ids).long(), torch.tensor(list(sample.loss_mask), dtype=torch.bool)
    return F.cross_entropy(model(ids[None, :-1])[0].float(), ids[1:], reduction="none")[mask[1:]]


def referred(count: int, is_weighted: bool = False) -> list[Sample]:
    """Samples with the losses of another model, and perhaps weights."""
    samples, other = make_samples(count), tiny.tiny(seed=5)
    for i, sample in enumerate(samples):
        with torch.no_grad():
            sample.reference = array("f", token_losses(other, sample).tolist())
        if is_weighted:
            sample.weights = array("f", [(1 + i % 3) * mask for mask in sample.loss_mask])
    return samples


def expected(model: Any, samples: list[Sample]) -> torch.Tensor:
    """The mean over the kept tokens of a batch of all samples, by their weights."""
    losses = torch.cat([token_losses(model, sample) for sample in samples])
    reference = torch.tensor([value for sample in samples for value in sample.reference or ()])
    weights = torch.cat([torch.full((s.n_targets,), 1.0 if s.weights is None else max(s.weights)) for s in samples])
    least = sorted((losses - reference).tolist(), reverse=True)[math.ceil(KEEP * len(losses)) - 1]
    kept = weights * (losses - reference >= least)
    return (losses * kept).sum() / kept.sum()


@pytest.mark.parametrize("is_weighted", quick([False, True], True))
@pytest.mark.parametrize("method", quick(["LoRA", "lm_head", "block", "full"], "lm_head", "full"))
def test_a_step_is_that_of_the_kept_tokens(method: str, is_weighted: bool) -> None:
    samples, model, other = referred(8, is_weighted), make_model(method), make_model(method)
    loop = make_loop(model, samples, objective=objective(), global_batch_size=8, micro_batch_size=2)
    if method == "lm_head":
        cache = CacheSettings("memory", Path(), torch.float32)
        loop.loop.activations = activations(model, samples, loop.batches.owned(0), "", cache, CPU)
    seen = record_gradients(loop)
    metrics = loop.loop.step(State(), next(loop.batches.after(0)))
    loss = expected(other, samples)
    assert_close(metrics["train_loss"], loss.item(), **CLOSE)
    assert_close(seen[0], list(torch.autograd.grad(loss, list(trained(other).values()))), rtol=1e-3, atol=1e-5)


def test_processes_choose_from_their_common_batch() -> None:
    samples = referred(7)

    def work(rank: Rank) -> float:
        loop = make_loop(make_model(), samples, rank=rank, objective=objective(), global_batch_size=8, micro_batch_size=1)
        return loop.loop.step(State(), next(loop.batches.after(0)))["train_loss"]

    losses = [work(Rank()), *in_processes(2, work), *in_processes(3, work)]
    assert_close(losses, [expected(make_model(), samples).item()] * 6, **CLOSE)


def test_validation_is_over_all_tokens() -> None:
    model, samples = make_model(), referred(5)
    plain, selective = make_loop(model, samples), make_loop(model, samples, objective=objective())
    losses = [loop.loop.validate(loop.val_activations, loop.val_batches, lambda: False) for loop in (plain, selective)]
    assert losses[0] == losses[1] and selective.loop.measured == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "rho1_reference is missing"),
        ({"rho1_reference": Path("r"), "rho1_keep": 0}, "rho1_keep is 0"),
        ({"rho1_reference": Path("r"), "rho1_keep": 1.5}, "rho1_keep is 1.5"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ObjectiveSettings(objective="rho1", **settings)
