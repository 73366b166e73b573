"""Activations that many runs share: filled once, and read by models that tap some of the blocks."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from litgpt import lora
from litgpt.activations.cache import CacheSettings, Recompute
from litgpt.activations.shared import SharedActivations
from litgpt.errors import UserError
from litgpt.sample import Sample
from tests.helpers import tiny

CPU = torch.device("cpu")
MEMORY = CacheSettings("memory", Path(), torch.float32)


def samples(count: int, seed: int) -> list[Sample]:
    rows = [tiny.ids(1, 8 + i, seed=seed + i)[0].tolist() for i in range(count)]
    return [Sample(array("i", row), bytearray([0, *[1] * (len(row) - 1)])) for row in rows]


def model(taps: Any, output_layer: str) -> Any:
    built = tiny.tiny(skip2lora_enabled=True, lora_r=2, skip2lora_block_indices=taps, skip2lora_output_layer=output_layer)
    lora.mark_only_lora_as_trainable(built)
    return built


@pytest.mark.parametrize("output_layer", ["lm_head", "transformer.h.3"])
@pytest.mark.parametrize("taps", [[0, 1, 2], [1], [0, 2]], ids=str)
def test_a_view_gives_what_the_model_alone_would_compute(taps: list[int], output_layer: str) -> None:
    splits = {"training": samples(5, 1), "validation": samples(4, 50)}
    shared = SharedActivations.fill(model([0, 1, 2], output_layer), splits, {"training": 5, "validation": 2}, MEMORY, CPU)
    assert shared.blocks == (0, 1, 2) and shared.caches["validation"].plan.indices == [0, 1]
    one = model(taps, output_layer)
    for name, indices in (("training", [3, 0, 4]), ("validation", [1])):
        got, want = shared.view(name, taps)(indices), Recompute(one, splits[name], CPU)(indices)
        assert torch.equal(got.targets, want.targets)
        torch.testing.assert_close(got.x, want.x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.taps, want.taps, rtol=1e-5, atol=1e-5)


def test_the_taps_of_other_blocks_are_not_read_and_nothing_is_copied() -> None:
    shared = SharedActivations.fill(model([0, 2, 4], "lm_head"), {"training": samples(3, 1)}, {"training": 3}, MEMORY, CPU)
    view = shared.view("training", [2])
    assert view.store is shared.caches["training"].store and view([0]).taps.size(-2) == 1
    assert shared.view("training", [0, 2, 4]) is shared.caches["training"]


def test_no_room_is_an_error_with_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10}))
    with pytest.raises(UserError, match="no room for the activations.*skip2lora_cache_dir"):
        SharedActivations.fill(model("all", "lm_head"), {"training": samples(3, 1)}, {"training": 3}, MEMORY, CPU)
