"""benchmarks/step.py: a real loss, and limits that are the model's own work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import step
from litgpt.activations.cache import Recompute


def test_the_loss_is_the_next_tokens(settings: step.Settings) -> None:
    """Against logits of the whole model and cross-entropy at the last quarter of the positions."""
    adapter = {"lora_r": 2, "lora_query": True}
    found = step.measure(replace(settings, iterations=1, warmup=0), adapter, cached=False)
    model = step.build(settings, adapter)
    samples = step.random_samples(settings, 320)[:2]
    ids = torch.tensor([list(sample.input_ids) for sample in samples])
    with torch.no_grad():
        logits = model(ids[:, :-1])[:, -2:]
    assert found["first_loss"] == pytest.approx(F.cross_entropy(logits.flatten(0, 1), ids[:, -2:].flatten()).item(), rel=1e-5)


def test_the_limits_are_the_models_own_work(settings: step.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two products have the shapes of a cached step, all rows of it; the bare pass sees every sample once."""
    model = step.build(settings, {"lora_r": 2, "skip2lora_enabled": True})
    products = []
    multiply = torch.mm
    monkeypatch.setattr(step, "CHUNK_BYTES", 3 * 320 * 4)  # chunks of 3 rows
    with monkeypatch.context() as patched:
        patched.setattr(torch, "mm", lambda a, b, out: products.append((tuple(a.shape), tuple(b.shape))) or multiply(a, b, out=out))
        step.head_products(model, settings)()
    assert products == [((3, 32), (32, 320)), ((3, 320), (320, 32)), ((1, 32), (32, 320)), ((1, 320), (320, 32))]
    samples, seen = step.random_samples(settings, 320), []
    model.transformer["ln_f"].register_forward_hook(lambda module, inputs, output: seen.append(output))
    step.bare_forward(model, samples, settings)
    bare = torch.cat(seen)
    at = torch.tensor([list(sample.loss_mask[1:]) for sample in samples]).bool()
    assert bare.shape[:2] == at.shape
    torch.testing.assert_close(bare[at], Recompute(model, samples, torch.device("cpu"))(range(len(samples))).x)
