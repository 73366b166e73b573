"""The reference's losses are those of a plain forward pass, computed once and read from then on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.testing import assert_close

from litgpt.activations.cache import CacheSettings, Recompute
from litgpt.loss import HeadLoss
from litgpt.objectives.base import View
from litgpt.objectives.reference import refer
from litgpt.sample import Sample
from tests.helpers.training import CLOSE, CPU, Heard, by_hand, make_model, make_samples


class Counting(Recompute):
    """Counts the samples that are computed."""

    def __init__(self, model: Any, samples: list[Sample]) -> None:
        super().__init__(model, samples, CPU)
        self.computed: list[int] = []

    def __call__(self, indices: Any) -> Any:
        self.computed += indices
        return super().__call__(indices)


def referred(folder: Path, model: Any, name: str = "m", rows: range = range(1, 9, 2)) -> tuple[Counting, list[str]]:
    said = Heard()
    source = Counting(model, make_samples(9))
    settings = CacheSettings("disk", folder, torch.float32, said)
    refer(View(model, source, HeadLoss.of(model), 2), rows, [name], "training", settings, CPU)
    return source, said.lines


def test_losses_are_those_of_the_model_in_eval_mode_and_kept(tmp_path: Path) -> None:
    model = make_model("block", lora_dropout=0.5)
    with torch.no_grad():
        means = [by_hand(model, make_samples(9), [i]).item() for i in range(9)]
    model.train()
    first, _ = referred(tmp_path, model)
    assert model.training and sorted(first.computed) == [1, 3, 5, 7]
    for i, sample in enumerate(first.samples):
        if i % 2 and i < 8:
            assert sample.reference is not None and len(sample.reference) == sample.n_targets
            assert_close(sum(sample.reference) / sample.n_targets, means[i], **CLOSE)
        else:
            assert sample.reference is None
    again, said = referred(tmp_path, model)
    assert again.computed == [] and "is reused" in said[-1]
    assert [s.reference for s in again.samples] == [s.reference for s in first.samples]
    another, _ = referred(tmp_path, model, "another")
    assert sorted(another.computed) == [1, 3, 5, 7]


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    model = make_model()
    referred(tmp_path, model)
    (file,) = tmp_path.glob("*/activations.bin")
    content = bytearray(file.read_bytes())
    content[next(k for k, byte in enumerate(content) if byte)] ^= 64
    file.write_bytes(content)
    again, said = referred(tmp_path, model)
    assert sorted(again.computed) == [1, 3, 5, 7] and "damaged" in said[0]


def test_a_disk_without_room(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source, said = referred(tmp_path / "file" / "folder", make_model())
    assert sorted(source.computed) == [1, 3, 5, 7] and "kept in memory" in said[-1]
    assert source.samples[1].reference is not None


def test_samples_that_have_it_are_left_alone(tmp_path: Path) -> None:
    source, _ = referred(tmp_path, make_model())
    source.computed.clear()
    refer(
        View(source.model, source, HeadLoss.of(source.model), 2),
        range(1, 9, 2),
        ["n"],
        "",
        CacheSettings("disk", tmp_path, torch.float32),
        CPU,
    )
    assert source.computed == []
