"""Next-token prediction asks for what the loss module computes, and leaves the model as it was."""

from __future__ import annotations

import torch
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
