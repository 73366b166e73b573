"""Next-token prediction asks for what the loss module computes, and leaves the model as it was."""

from __future__ import annotations

from array import array

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from litgpt.activations.cache import Recompute
from litgpt.loss import HeadLoss
from litgpt.objectives.base import Objective, View
from litgpt.objectives.preferences import log_probabilities
from tests.helpers.training import CLOSE, CPU, by_hand, make_model, make_samples


def test_losses_are_the_terms_of_the_total() -> None:
    model, samples = make_model("block", lora_dropout=0.5), make_samples(7)
    view = View(model, Recompute(model, samples, CPU), HeadLoss.of(model), 3)
    rows = [5, 0, 3, 6, 2]
    each = view.losses(rows)
    counts = [samples[i].n_targets for i in rows]
    logps, numbers = log_probabilities(view, rows, each)
    assert_close(-logps, torch.stack([by_hand(model, samples, [i]) * n for i, n in zip(rows, counts, strict=True)]), **CLOSE)
    assert numbers.tolist() == counts
    assert_close(each.sum(), view.total(rows, None), **CLOSE)
    assert_close(Objective().loss(view, rows), by_hand(model, samples, rows) * sum(counts), **CLOSE)
    model.train()
    measured = view.measured(rows)
    assert model.training and not measured.requires_grad
    assert_close(measured, each, **CLOSE)


@pytest.mark.parametrize("weighted", [False, True])
def test_several_targets_give_the_divergence_from_their_shares(weighted: bool) -> None:
    """torch's own divergence is the oracle; the other samples keep their tokens."""
    model, samples = make_model("block"), make_samples(4)
    for sample in samples[1:3]:
        logits = torch.randn(sample.n_targets, model.config.V)
        top, tokens = logits.topk(3)
        sample.shares = tokens, top.softmax(-1)
    if weighted:
        samples[2].weights = array("f", [2.5 * flag for flag in samples[2].loss_mask])
    view = View(model, Recompute(model, samples, CPU), HeadLoss.of(model), 4)
    expected = by_hand(model, samples, [0]) * samples[0].n_targets + by_hand(model, samples, [3]) * samples[3].n_targets
    for i in (1, 2):
        tokens, shares = samples[i].shares or (torch.empty(0), torch.empty(0))
        ids, mask = torch.tensor(samples[i].input_ids.tolist()), torch.tensor(list(samples[i].loss_mask), dtype=torch.bool)
        logs = model(ids[None, :-1])[0].log_softmax(-1)[mask[1:]]
        own = torch.zeros_like(logs).scatter_(1, tokens, shares)
        expected = expected + F.kl_div(logs, own, reduction="sum") * (2.5 if weighted and i == 2 else 1)
    loss = Objective().loss(view, range(4))
    assert_close(loss, expected, **CLOSE)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert_close(torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), **CLOSE)
