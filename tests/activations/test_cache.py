"""Cached activations against recomputed ones and against hooks on the bare blocks; caches on disk that are reused, foreign, broken or
that do not fit."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import resource
import shutil
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch.testing import assert_close

from litgpt.activations import cache as activation_cache
from litgpt.activations.cache import ActivationCache, CacheSettings, Recompute, activations, filled, fingerprint, is_flat, plan
from litgpt.errors import UserError
from litgpt.lora import end_warmup, lora_filter, mark_only_lora_as_trainable, start_warmup
from litgpt.loss import HeadLoss, loss_of
from litgpt.packing import SHORTEST_STEM, pack, shared_stem
from litgpt.sample import Sample
from tests.helpers import tiny
from tests.helpers.cases import first, quick
from tests.helpers.training import Heard

CPU = torch.device("cpu")
MEMORY = CacheSettings("memory", Path(), torch.float32)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}

SKIP: dict[str, Any] = {"skip2lora_enabled": True, "skip2lora_block_indices": [0, 2], "lora_r": 3, "lora_alpha": 5}
LAYERS = {"lora_query": True, "lora_value": True, "lora_mlp": True}
CUTS: dict[str, dict[str, Any]] = {
    "lm_head": SKIP,
    "lm_head, raw taps": {**SKIP, "skip2lora_norm": "none"},
    "lm_head with LoRA": {**SKIP, "lora_head": True},
    "ln_f": {**SKIP, "skip2lora_output_layer": "transformer.ln_f", "skip2lora_block_indices": [1, 4]},
    "block": {**SKIP, **LAYERS, "skip2lora_output_layer": "transformer.h.3"},
    "LoRA in late blocks": {**LAYERS, "lora_r": 3, "lora_block_indices": [2, 4]},
    "LoRA in the head": {"lora_r": 3, "lora_head": True},
}
NEOX = {
    "n_query_groups": 4,
    "rotary_percentage": 0.25,
    "parallel_residual": True,
    "bias": True,
    "norm_class_name": "LayerNorm",
    "mlp_class_name": "GptNeoxMLP",
}
WINDOW = {"sliding_window_size": 5, "sliding_window_indices": [1, 0, 1, 1, 0]}
LENGTHS = (11, 21, 12, 30, 13, 21, 10)


def make_samples(lengths: tuple[int, ...] = LENGTHS, stem: int = 0, seed: int = 0, V: int = 101) -> list[Sample]:
    """Random samples that begin with the same `stem` tokens and part at the next; about half of the positions carry loss, one at least."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randint(V, (stem,), generator=generator).tolist()
    samples = []
    for number, length in enumerate(lengths):
        tail = torch.randint(V, (length - stem,), generator=generator)
        tail[0] = number
        mask = torch.randint(2, (length,), generator=generator)
        mask[0], mask[length // 2] = 0, 1
        samples.append(Sample(array("i", common + tail.tolist()), bytearray(mask.tolist())))
    return samples


def make_model(cut: str = "lm_head", **settings: Any) -> Any:
    """A tiny model whose adapters do something, ready to train."""
    model = tiny.move_adapters(tiny.tiny(**{**CUTS[cut], **settings}))
    mark_only_lora_as_trainable(model)
    return model


def keep(
    model: Any,
    samples: list[Sample],
    folder: Path = Path("unused"),
    mode: str = "memory",
    rows: list[int] | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Any, Heard]:
    """Activations of samples, and what was said on the way."""
    said = Heard(progress)
    indices = list(range(len(samples))) if rows is None else rows
    return activations(model, samples, indices, "training", CacheSettings(mode, folder, dtype, said), CPU), said


def values(cache: ActivationCache) -> torch.Tensor:
    """All rows, in their order."""
    return torch.cat([cache.store[rows] for rows in (cache.stem, *cache.slices.values())])


def outcome(model: Any, source: Any, rows: list[int]) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
    """Features, loss and gradients of a batch, the way the loop takes them."""
    features = source(rows)
    hidden = model.tail(features.x, features.taps, features.pos)
    hidden = hidden if features.at is None else hidden[features.at]
    loss = HeadLoss(model.lm_head)(hidden, features.targets) / 7
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return features, loss.detach(), dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def assert_same(one: Any, other: Any) -> None:
    (a, loss_a, gradients_a), (b, loss_b, gradients_b) = one, other
    assert_close(a.x, b.x, **CLOSE)
    assert_close(a.taps, b.taps, **CLOSE)
    assert torch.equal(a.targets, b.targets)
    assert (a.at is None) == (b.at is None) and (a.at is None or torch.equal(a.at, b.at))
    assert_close(loss_a, loss_b, **CLOSE)
    assert_close(gradients_a, gradients_b, **CLOSE)


# --- what is cached ---


@pytest.mark.parametrize("mode", ["memory", "disk"])
@pytest.mark.parametrize("stem", quick([0, 8], 8))
@pytest.mark.parametrize("cut", CUTS)
def test_cached_features_losses_and_gradients_are_the_recomputed_ones(cut: str, stem: int, mode: str, tmp_path: Path) -> None:
    model, samples = make_model(cut), make_samples(stem=stem)
    assert shared_stem(samples) == stem
    cache, _ = keep(model, samples, tmp_path, mode)
    assert isinstance(cache, ActivationCache)
    model.train()
    recompute = Recompute(model, samples, CPU)
    for rows in ([0], [5, 1, 3], list(range(len(samples)))):
        assert_same(outcome(model, cache, rows), outcome(model, recompute, rows))


@pytest.mark.parametrize("weighted", quick([False, True], True))
@pytest.mark.parametrize("cached", quick([True, False], True))
@pytest.mark.parametrize("cut", ["lm_head", "ln_f", "block", "LoRA in the head"])
def test_a_stem_that_is_learned_costs_the_logits_of_one_sample(cut: str, cached: bool, weighted: bool) -> None:
    """The last row of the stem has another target in each sample. Loss and gradients are those of every position by itself."""
    model, samples, heard = make_model(cut), make_samples(stem=8), list[int]()
    for sample in samples:
        sample.loss_mask[1:] = bytes([1] * sample.n_inputs)
    source = keep(model, samples)[0] if cached else Recompute(model, samples, CPU)
    own = sum(length - 1 - 8 for length in LENGTHS)
    if cached:
        assert source.layout.shape[0] == 8 + own
    rows = list(range(len(samples)))
    features = source(rows)
    weights = torch.rand(len(features.targets), generator=torch.Generator().manual_seed(1)) if weighted else None
    hidden = model.tail(features.x, features.taps, features.pos)[features.at]
    each = F.cross_entropy(model.lm_head(hidden), features.targets, reduction="none")
    expected = (each if weights is None else each * weights).sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected, trained)

    class Counted(HeadLoss):
        def __call__(self, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
            heard.append(len(hidden))
            return super().__call__(hidden, targets, weights)

    loss = loss_of(model, source(rows), Counted(model.lm_head), weights)
    assert heard == [7 + len(LENGTHS) + own] and len(features.targets) == 8 * len(LENGTHS) + own
    assert_close(loss, expected, **CLOSE)
    assert_close(torch.autograd.grad(loss, trained), gradients, **CLOSE)


@pytest.mark.parametrize("shape", first([NEOX, {**NEOX, "shared_attention_norm": True}, WINDOW, {"n_query_groups": 4}], 2))
@pytest.mark.parametrize("cut", ["lm_head", "block", "LoRA in late blocks"])
def test_the_same_for_other_architectures(cut: str, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(activation_cache.FILL_TOKENS, "cpu", 50)
    model, samples = make_model(cut, **shape), make_samples(stem=8)
    cache, _ = keep(model, samples)
    rows = [5, 1, 3]
    assert_same(outcome(model, cache, rows), outcome(model, Recompute(model, samples, CPU), rows))


@pytest.mark.parametrize("tokens", [1, 20, 45, 10_000])
@pytest.mark.parametrize("stem", [0, 8])
def test_the_size_of_the_filling_batches_changes_nothing(stem: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(activation_cache.FILL_TOKENS, "cpu", tokens)
    monkeypatch.setattr(activation_cache, "STEM_SHARE", 0)
    model, samples = make_model("block"), make_samples(stem=stem)
    cache, said = keep(model, samples)
    rows = list(range(len(samples)))
    assert_same(outcome(model, cache, rows), outcome(model, Recompute(model, samples, CPU), rows))
    assert said.shown[-1] == (7, 7) and [done for done, _ in said.shown] == sorted({done for done, _ in said.shown})
    assert len(said.shown) == {1: 7, 10_000: 1}.get(tokens, len(said.shown))


@pytest.mark.parametrize("cached", quick([True, False], True))
@pytest.mark.parametrize("cut", CUTS)
def test_features_are_what_hooks_on_the_blocks_see(cut: str, cached: bool) -> None:
    """Each sample alone, unpadded, through the bare modules; the tap worked out by hand."""
    model, samples = make_model(cut), make_samples(stem=8)
    source = keep(model, samples)[0] if cached else Recompute(model, samples, CPU)
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda module, args, out, i=i: seen.__setitem__(i, out[0].detach()))
        for i, block in enumerate(model.blocks)
    ]
    ln_f = model.transformer["ln_f"]
    for number, sample in enumerate(samples):
        model.cut = model.config.n_layer + 1  # taps are then collected, and nothing is added before the head
        model.prefix(torch.tensor(sample.input_ids)[None, :-1])
        model.cut = model.config.cut
        layers = {**seen, model.config.n_layer: ln_f(seen[model.config.n_layer - 1]).detach()}
        keep_rows = torch.tensor(list(sample.loss_mask[1:]), dtype=torch.bool) if is_flat(model) else slice(None)
        features = source([number])
        if is_flat(model) and features.at is not None:  # rows of the stem without loss in this sample
            features = replace(features, x=features.x[features.at], taps=features.taps[features.at])
        assert_close(features.x, layers[model.cut - 1][keep_rows], **CLOSE)
        for tap, index in zip(features.taps.unbind(-2), model.config.taps, strict=True):
            expected = layers[index]
            if model.config.skip2lora_norm == "rms":
                expected = expected / (expected.square().mean(-1, keepdim=True) + model.config.norm_eps).sqrt()
            assert_close(tap, expected[keep_rows], **CLOSE)
        assert features.targets.tolist() == [t for t, on in zip(sample.input_ids, sample.loss_mask, strict=True) if on]
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("cached", quick([True, False], True))
@pytest.mark.parametrize("cut", CUTS)
def test_the_loss_is_the_whole_models_plain_cross_entropy(cut: str, cached: bool) -> None:
    model, samples = make_model(cut), make_samples()
    source = keep(model, samples)[0] if cached else Recompute(model, samples, CPU)
    rows = [5, 1, 3]
    _, loss, gradients = outcome(model, source, rows)
    total = torch.zeros(())
    for i in rows:
        tokens, mask = torch.tensor(samples[i].input_ids), torch.tensor(list(samples[i].loss_mask))
        total = total + F.cross_entropy(model(tokens[None, :-1])[0], torch.where(mask.bool(), tokens, -100)[1:].long(), reduction="sum")
    names = list(gradients)
    expected = torch.autograd.grad(total / 7, [dict(model.named_parameters())[name] for name in names])
    assert_close(loss, total.detach() / 7, **CLOSE)
    assert_close(gradients, dict(zip(names, expected, strict=True)), **CLOSE)


@pytest.mark.parametrize("cut", ["lm_head", "block"])
def test_a_bf16_cache_holds_the_rounded_values_and_serves_an_fp32_model(cut: str) -> None:
    model, samples = make_model(cut), make_samples()
    cache, _ = keep(model, samples, dtype=torch.bfloat16)
    assert values(cache).dtype == torch.bfloat16
    rows = [4, 2]
    (cached, loss, gradients), (exact, expected, right) = outcome(model, cache, rows), outcome(model, Recompute(model, samples, CPU), rows)
    assert cached.x.dtype == torch.float32
    assert_close(cached.x, exact.x.bfloat16().float(), rtol=1e-2, atol=1e-5)
    assert_close(loss, expected, rtol=1e-2, atol=0)
    assert all((gradients[name] - right[name]).norm() < 0.05 * right[name].norm() for name in right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bf16_model_trains_from_a_cache_of_either_dtype(dtype: torch.dtype) -> None:
    model, samples = make_model("block"), make_samples()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if lora_filter(name) else parameter.data.bfloat16()
    cache, _ = keep(model, samples, dtype=dtype)
    (cached, loss, _), (_, expected, _) = outcome(model, cache, [4, 2]), outcome(model, Recompute(model, samples, CPU), [4, 2])
    assert cached.x.dtype == torch.bfloat16
    assert_close(loss, expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize("cut", ["lm_head", "block"])
def test_cached_and_recomputed_agree_under_autocast(cut: str) -> None:
    model, samples = make_model(cut), make_samples(stem=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache, _ = keep(model, samples)
        (_, loss, _), (_, expected, _) = outcome(model, cache, [4, 2]), outcome(model, Recompute(model, samples, CPU), [4, 2])
    assert_close(loss, expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize("warmed_up", [False, True])
@pytest.mark.parametrize("cut", ["lm_head", "block"])
def test_dropout_leaves_the_frozen_prefix_alone(cut: str, warmed_up: bool) -> None:
    """Also where the prefix holds LoRA that was trained in a warm-up: in training mode it gives what the cache holds."""
    settings = {"lora_dropout": 0.5, **(LAYERS if warmed_up else {}), "skip2lora_warmup": warmed_up}
    model, samples = make_model(cut, **settings), make_samples()
    if warmed_up:
        start_warmup(model)
        end_warmup(model)
        assert model.blocks[0].attn.qkv.lora_A.abs().sum() > 0 and not model.blocks[0].attn.qkv.lora_A.requires_grad
    cache, _ = keep(model, samples)
    model.train()
    assert_same((cache([1, 3]), 0.0, {}), (Recompute(model, samples, CPU)([1, 3]), 0.0, {}))


def test_filling_leaves_the_model_as_it_was() -> None:
    model, samples = make_model(), make_samples(stem=8)
    for training in (True, False):
        model.train(training)
        keep(model, samples)
        assert model.training is training and all(module.training is training for module in model.modules())
        assert all(block.attn.kv_cache is None for block in model.blocks)


@pytest.mark.parametrize("mode", ["memory", "disk"])
@pytest.mark.parametrize("cut", ["lm_head", "block"])
def test_a_narrowed_cache_is_that_of_a_model_with_fewer_taps(cut: str, mode: str, tmp_path: Path) -> None:
    samples = make_samples(stem=9)
    wide, _ = keep(make_model(cut, skip2lora_block_indices=[0, 1, 2]), samples, tmp_path, mode)
    for taps in ([0, 2], [1], [0, 1, 2]):
        own, _ = keep(make_model(cut, skip2lora_block_indices=taps), samples, tmp_path, mode)
        got, want = wide.narrowed(taps)([3, 1]), own([3, 1])
        assert torch.equal(got.x, want.x) and torch.equal(got.taps, want.taps) and torch.equal(got.targets, want.targets)
        assert wide.narrowed(taps).store is wide.store
    assert wide.narrowed([])([0]).taps.size(-2) == 0 and wide([0]).taps.size(-2) == 3


@pytest.mark.parametrize("output_layer", ["lm_head", "transformer.h.3"])
@pytest.mark.parametrize("taps", [[0, 2, 4], [2], [0, 4]], ids=str)
def test_a_shared_cache_gives_what_a_model_alone_would_compute(taps: list[int], output_layer: str) -> None:
    """Taps are named by their blocks. The samples behind the first ones are not in the cache."""
    blocks, samples = [0, 1, 2] if output_layer != "lm_head" else [0, 2, 4], make_samples()
    taps = [blocks[i // 2] for i in taps]
    settings: dict[str, Any] = {"skip2lora_output_layer": output_layer}
    wide = filled(make_model(skip2lora_block_indices=blocks, **settings), samples, 3, "training", MEMORY, CPU)
    assert wide.blocks == blocks and list(wide.layout.counts) == [0, 1, 2]
    got = wide.narrowed(taps)([2, 0])
    want = Recompute(make_model(skip2lora_block_indices=taps, **settings), samples, CPU)([2, 0])
    assert torch.equal(got.targets, want.targets)
    assert_close((got.x, got.taps), (want.x, want.taps), rtol=1e-5, atol=1e-5)


def test_no_room_for_a_shared_cache_is_an_error_with_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10))
    with pytest.raises(UserError, match=r"no room for the activations.*skip2lora_cache_dir"):
        filled(make_model(), make_samples(), 3, "training", MEMORY, CPU)


def test_only_the_samples_asked_for_are_cached() -> None:
    model, samples = make_model(), make_samples()
    cache, _ = keep(model, samples, rows=[5, 0, 2])
    assert_same(outcome(model, cache, [2, 5]), outcome(model, Recompute(model, samples, CPU), [2, 5]))
    assert len(values(cache)) == sum(samples[i].n_targets for i in (5, 0, 2))
    with pytest.raises(KeyError):
        cache([1])


@pytest.mark.parametrize("mode", ["auto", "memory", "disk"])
def test_a_process_without_samples_needs_no_cache(mode: str, tmp_path: Path) -> None:
    assert isinstance(keep(make_model(), make_samples(), tmp_path, mode, rows=[])[0], Recompute)


def test_rows_stand_sample_after_sample_behind_what_they_share() -> None:
    samples = [
        Sample(array("i", [9, 8, 5, 6, 7]), bytearray([0, 1, 1, 0, 1])),
        Sample(array("i", [9, 8, 1, 2, 3, 4]), bytearray([0, 0, 1, 1, 0, 1])),
    ]
    batch = pack(samples, CPU, 2)
    assert batch.ids.tolist() == [9, 8, 5, 6, 1, 2, 3] and batch.packing.positions.tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert batch.at.tolist() == [0, 1, 3, 1, 4, 6], "a shared row with loss counts for each sample"
    assert batch.targets.tolist() == [8, 5, 7, 1, 2, 4] and batch.targets.dtype == torch.long
    alone = pack(samples[1:], CPU, 0)
    assert alone.ids.tolist() == [9, 8, 1, 2, 3] and not alone.packing.is_ragged and alone.packing.lengths == (5,)


@given(st.integers(0, 12), st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=8), min_size=1, max_size=4))
def test_shared_stem_is_the_common_prefix_that_leaves_every_sample_an_input(common: int, tails: list[list[int]]) -> None:
    rows = [[7] * common + tail for tail in tails]
    stem = shared_stem([Sample(array("i", row), bytearray(len(row))) for row in rows])
    equal = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    common = min(len(list(equal)), min(len(row) for row in rows) - 2)
    assert stem == (common if common >= SHORTEST_STEM and len(rows) > 1 else 0)


# --- size ---


@pytest.mark.parametrize("dtype", quick([torch.float32, torch.bfloat16], torch.bfloat16))
@pytest.mark.parametrize("stem", [0, 8])
@pytest.mark.parametrize(("cut", "parts"), [("lm_head", 3), ("block", 3), ("LoRA in late blocks", 1)])
def test_the_planned_bytes_are_the_real_ones(cut: str, parts: int, stem: int, dtype: torch.dtype, tmp_path: Path) -> None:
    model, samples = make_model(cut), make_samples(stem=stem)
    everything = stem + sum(length - 1 - stem for length in LENGTHS)  # what all share is kept once
    learned = [[p for p, on in enumerate(s.loss_mask[1:]) if on] for s in samples]
    once = stem + sum(p >= stem for each in learned for p in each)
    positions = min(once, sum(map(len, learned))) if is_flat(model) else everything
    layout = plan(model, samples, range(len(samples)), dtype)
    assert layout.nbytes == positions * parts * 32 * dtype.itemsize
    memory, said = keep(model, samples, dtype=dtype)
    assert values(memory).untyped_storage().nbytes() == layout.nbytes
    assert f"{positions} positions, in memory" in said
    keep(model, samples, tmp_path, "disk", dtype=dtype)
    (file,) = tmp_path.glob("*/activations.bin")
    assert file.stat().st_size == layout.nbytes


@pytest.mark.parametrize(("spare", "where"), [(0, "memory"), (-1, "disk")])
def test_auto_takes_memory_up_to_its_share(spare: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = make_model(), make_samples()
    need = plan(model, samples, range(len(samples)), torch.float32).nbytes
    free = need / activation_cache.MEMORY_SHARE + spare
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(time, "perf_counter", clock([1, 2]))
    cache, said = keep(model, samples, tmp_path, "auto")
    assert isinstance(cache, ActivationCache)
    assert ("in memory" in said) == (where == "memory") and any(tmp_path.iterdir()) == (where == "disk")


def clock(seconds: list[float]) -> Callable[[], float]:
    """A clock by which reading, then computing, takes so many seconds."""
    times = iter([0, seconds[0], 0, seconds[1]])
    return lambda: next(times)


@pytest.mark.parametrize(("reads", "computes"), [(1, 2), (2, 1)])
def test_auto_reads_from_a_disk_only_what_takes_longer_to_compute(
    reads: float, computes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = make_model("block"), make_samples(stem=8)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    monkeypatch.setattr(time, "perf_counter", clock([7 * reads, 7 * computes]))
    source, said = keep(model, samples, tmp_path, "auto")
    assert isinstance(source, ActivationCache) == (reads < computes)
    assert f"reading takes {reads}000.00 ms a sample, computing {computes}000.00 ms" in said
    assert ("computed again for every batch" in said) == (reads > computes)
    outcome(model, source, [1, 3])
    source, said = keep(model, samples, tmp_path, "disk")
    assert isinstance(source, ActivationCache) and "reading takes" not in said, "whoever asks for a disk gets it"


def test_memory_that_does_not_suffice_is_said_and_not_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = make_model(), make_samples()
    need = plan(model, samples, range(len(samples)), torch.float32).nbytes
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=need - 1))
    source, said = keep(model, samples, mode="memory")
    assert isinstance(source, Recompute) and "not enough memory" in said


@pytest.mark.parametrize(("cut", "mode"), [({}, "disk"), ({"lora_r": 3, "lora_query": True}, "memory"), (SKIP, "off")])
def test_no_cache_where_nothing_runs_frozen_or_it_is_off(cut: dict[str, Any], mode: str, tmp_path: Path) -> None:
    source, _ = keep(tiny.tiny(**cut), make_samples(), tmp_path, mode)
    assert isinstance(source, Recompute) and not any(tmp_path.iterdir())


# --- on disk ---


def count_prefix_calls(model: Any) -> list[int]:
    calls, original = [], model.prefix

    def counting(*args: Any) -> Any:
        calls.append(1)
        return original(*args)

    model.prefix = counting
    return calls


def test_a_cache_on_disk_serves_a_later_run_without_the_prefix(tmp_path: Path) -> None:
    samples = make_samples()
    first, said = keep(make_model("block"), samples, tmp_path, "disk")
    assert "is reused" not in said
    later = make_model("block", lora_r=4, lora_alpha=1)  # another rank, other adapters
    calls = count_prefix_calls(later)
    second, said = keep(later, make_samples(), tmp_path, "disk")
    assert not calls and "is reused" in said
    assert torch.equal(values(first), values(second))
    assert len(list(tmp_path.iterdir())) == 1


def with_weight(name: str) -> Callable[[Any, list[Sample]], None]:
    def change(model: Any, samples: list[Sample]) -> None:
        dict(model.named_parameters())[name].data.view(-1)[3] += 1e-3

    return change


def with_token(model: Any, samples: list[Sample]) -> None:
    samples[2].input_ids[5] += 1


def with_mask(model: Any, samples: list[Sample]) -> None:
    row = samples[3].loss_mask
    i = next(i for i in range(1, len(row) - 1) if row[i] != row[i + 1])
    row[i], row[i + 1] = row[i + 1], row[i]  # as many as before


def with_order(model: Any, samples: list[Sample]) -> None:
    samples[0], samples[1] = samples[1], samples[0]


@pytest.mark.parametrize(
    "change",
    [
        with_weight("transformer.wte.weight"),
        with_weight("transformer.h.0.attn.qkv.weight"),
        with_weight("transformer.h.2.norm_2.weight"),
        with_token,
        with_mask,
        with_order,
    ],
)
def test_other_weights_tokens_and_masks_are_other_caches(change: Callable[[Any, list[Sample]], None], tmp_path: Path) -> None:
    model, samples = make_model("block"), make_samples()
    keep(model, samples, tmp_path, "disk")
    change(model, samples)
    cache, said = keep(model, samples, tmp_path, "disk")
    assert "is reused" not in said and len(list(tmp_path.iterdir())) == 2
    assert_same(outcome(model, cache, [1, 3]), outcome(model, Recompute(model, samples, CPU), [1, 3]))


def key(cut: str = "block", dtype: torch.dtype = torch.float32, rows: range | None = None, **settings: Any) -> str:
    model, samples = make_model(cut, **settings), make_samples()
    return fingerprint(model, samples, plan(model, samples, rows or range(len(samples)), dtype), CPU)


def test_every_setting_that_changes_the_values_changes_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {
        "as it is": key(),
        "taps": key(skip2lora_block_indices=[0, 1]),
        "cut": key(skip2lora_output_layer="transformer.h.4"),
        "no norm": key(skip2lora_norm="none"),
        "eps": key(norm_eps=1e-6),
        "dtype": key(dtype=torch.bfloat16),
        "fewer samples": key(rows=range(6)),
        "rope": key(rope_base=20000),
        "seed of the base": key(seed=2),
        "lm_head": key("lm_head"),
        "ln_f": key("ln_f", skip2lora_block_indices=[0, 2]),
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        keys["autocast"] = key()
    monkeypatch.setattr(activation_cache, "FORMAT", activation_cache.FORMAT + 1)
    keys["format"] = key()
    assert len(set(keys.values())) == len(keys)


def test_what_does_not_change_the_values_does_not_change_the_fingerprint() -> None:
    model, samples = make_model("block"), make_samples()
    layout = plan(model, samples, range(len(samples)), torch.float32)
    before = fingerprint(model, samples, layout, CPU)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if lora_filter(name) or name.startswith(("transformer.h.3", "transformer.h.4", "lm_head")):
                parameter.add_(1)
    assert fingerprint(model, samples, layout, CPU) == before
    assert key(lora_r=7, lora_alpha=1, lora_dropout=0.3) == key()


def truncate(folder: Path) -> None:
    os.truncate(folder / "activations.bin", (folder / "activations.bin").stat().st_size // 2)


def flip_a_bit(folder: Path) -> None:
    with (folder / "activations.bin").open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 4]))


def no_index(folder: Path) -> None:
    (folder / "index.bin").unlink()


def garbled_index(folder: Path) -> None:
    (folder / "index.bin").write_text("{" * 64)


def short_index(folder: Path) -> None:
    os.truncate(folder / "index.bin", 20)


def no_data(folder: Path) -> None:
    (folder / "activations.bin").unlink()


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (truncate, " of 7 samples are damaged and are filled again"),
        (flip_a_bit, "1 of 7 samples are damaged and are filled again"),
        (garbled_index, "7 of 7 samples are damaged and are filled again"),
        (short_index, " has 1 of 7 samples, the others are added"),
        (no_index, ""),
        (no_data, ""),
    ],
)
def test_a_damaged_cache_is_made_again_and_that_is_said(damage: Callable[[Path], None], what: str, tmp_path: Path) -> None:
    model, samples = make_model(), make_samples()
    first, _ = keep(model, samples, tmp_path, "disk")
    right = values(first)
    del first
    (folder,) = tmp_path.iterdir()
    damage(folder)
    calls = count_prefix_calls(model)
    cache, said = keep(model, samples, tmp_path, "disk")
    assert calls and what in said and "is reused" not in said
    assert torch.equal(values(cache), right)
    assert list(tmp_path.iterdir()) == [folder]
    assert "is reused" in keep(model, samples, tmp_path, "disk")[1]


@pytest.mark.parametrize("damage", [truncate, lambda folder: os.truncate(folder / "activations.bin", 0), flip_a_bit])
def test_rows_that_change_under_a_run_are_an_error_and_the_next_run_fills_them(damage: Callable[[Path], None], tmp_path: Path) -> None:
    model, samples = make_model(), make_samples()
    cache, _ = keep(model, samples, tmp_path, "disk")
    right = values(cache)
    (folder,) = tmp_path.iterdir()
    damage(folder)
    with pytest.raises(OSError, match="not what was written") as caught:
        values(cache)
    assert caught.value.filename == str(folder / "activations.bin")
    cache, said = keep(model, samples, tmp_path, "disk")
    assert "damaged" in said and torch.equal(values(cache), right)


def test_a_cache_is_private_and_only_read_when_it_is_used(tmp_path: Path) -> None:
    model, samples = make_model(), make_samples()
    for _ in ("filled", "reused"):
        cache, _ = keep(model, samples, tmp_path, "disk")
        assert fcntl.fcntl(cache.store.descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    (folder,) = tmp_path.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700


# --- what others put into a shared folder ---


def link_for_the_rows(folder: Path, victim: Path) -> None:
    folder.mkdir()
    (folder / "activations.bin").symlink_to(victim)


def second_name_for_the_rows(folder: Path, victim: Path) -> None:
    folder.mkdir()
    (folder / "activations.bin").hardlink_to(victim)


def link_for_an_index(folder: Path, victim: Path) -> None:
    folder.mkdir()
    (folder / "index.bin").symlink_to(victim)


def second_name_for_an_index(folder: Path, victim: Path) -> None:
    folder.mkdir()
    (folder / "index.bin").hardlink_to(victim)


def pipes(folder: Path, victim: Path) -> None:
    folder.mkdir()
    for name in ("activations.bin", "index.bin"):
        os.mkfifo(folder / name)


def link_to_nowhere(folder: Path, victim: Path) -> None:
    folder.symlink_to(folder.with_name("nowhere"))


def link_to_a_folder(folder: Path, victim: Path) -> None:
    folder.symlink_to(victim.parent)


def folder_of_another_user(folder: Path, victim: Path) -> None:
    folder.parent.chmod(0o777)
    folder.mkdir()
    os.chown(folder, 12345, 12345)


REFUSED = {
    link_for_the_rows: "it is a link",
    second_name_for_the_rows: "is a link to another file",
    link_for_an_index: "it is a link",
    second_name_for_an_index: "is a link to another file",
    pipes: "it is a pipe",
    link_to_nowhere: "is not a folder: remove it",
    link_to_a_folder: "is not a folder: remove it",
    folder_of_another_user: "belongs to another user: remove it",
}


@pytest.mark.parametrize("plant", REFUSED)
def test_planted_links_and_pipes_are_said_and_not_followed(plant: Callable[[Path, Path], None], tmp_path: Path) -> None:
    if plant is folder_of_another_user and os.geteuid():
        pytest.skip("needs root")
    model, samples = make_model(), make_samples()
    victim = tmp_path / "home/thesis"
    victim.parent.mkdir()
    victim.write_text("precious")
    keep(model, samples, tmp_path / "a", "disk")
    (cached,) = (tmp_path / "a").iterdir()
    (tmp_path / "b").mkdir()
    plant(tmp_path / "b" / cached.name, victim)
    source, said = keep(model, samples, tmp_path / "b", "disk")
    assert_falls_back(source, said, model, samples, REFUSED[plant])
    assert victim.read_text() == "precious" and list(victim.parent.iterdir()) == [victim]


# --- a disk that cannot hold it ---


def assert_falls_back(source: Any, said: Heard, model: Any, samples: list[Sample], reason: str) -> None:
    assert isinstance(source, Recompute)
    assert reason in said and "activations are computed again for every batch" in said
    outcome(model, source, [1, 3])


def test_a_full_disk_is_said_and_not_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    model, samples = make_model(), make_samples()
    assert_falls_back(*keep(model, samples, tmp_path, "disk"), model, samples, "No space left on device")
    assert not any(tmp_path.iterdir())


def test_a_disk_with_too_little_space_is_not_begun_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = make_model(), make_samples()
    need = plan(model, samples, range(len(samples)), torch.float32).nbytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need - 1))
    assert_falls_back(*keep(model, samples, tmp_path, "disk"), model, samples, "GiB are needed and")
    assert not any(tmp_path.iterdir())


def test_a_limit_on_the_size_of_files_is_said_and_not_fatal(tmp_path: Path) -> None:
    model, samples = make_model("block"), make_samples((60,) * 40)
    need = plan(model, samples, range(40), torch.float32).nbytes
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (need // 2, hard))
    try:
        found = keep(model, samples, tmp_path, "disk")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_falls_back(*found, model, samples, "File too large")
    assert not any(tmp_path.iterdir())


def test_a_cache_folder_that_is_a_file_is_said_and_not_fatal(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    model, samples = make_model(), make_samples()
    for folder in (file, file / "below"):
        assert_falls_back(*keep(model, samples, folder, "disk"), model, samples, str(folder))
    assert file.read_text() == "mine"


def test_a_folder_that_nobody_can_write_to_is_said_and_not_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc/self is such a folder even for root; the user's own read-only folder fails at the same call."""
    if sys.platform != "linux":
        pytest.skip("needs Linux")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
    model, samples = make_model(), make_samples()
    assert_falls_back(*keep(model, samples, Path("/proc/self"), "disk"), model, samples, "/proc/self")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_said_and_not_fatal(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    model, samples = make_model(), make_samples()
    try:
        assert_falls_back(*keep(model, samples, tmp_path, "disk"), model, samples, "Permission denied")
        assert_falls_back(*keep(model, samples, tmp_path / "below", "disk"), model, samples, "Permission denied")
    finally:
        tmp_path.chmod(0o700)


def test_a_permission_error_is_said_and_not_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    model, samples = make_model(), make_samples()
    assert_falls_back(*keep(model, samples, tmp_path, "disk"), model, samples, "Permission denied")


# --- a filling that was broken off ---


def broken_off(model: Any, samples: list[Sample], folder: Path, monkeypatch: pytest.MonkeyPatch, error: Any = KeyboardInterrupt) -> Path:
    """What is left of a filling, a batch for each sample, that ended after three."""
    monkeypatch.setitem(activation_cache.FILL_TOKENS, "cpu", 1)
    monkeypatch.setattr(activation_cache, "STEM_SHARE", 0)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise error

    with pytest.raises(error):
        keep(model, samples, folder, "disk", progress=stop)
    (begun,) = folder.iterdir()
    return begun


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("cut", ["lm_head", "block"])
def test_a_filling_that_was_broken_off_is_gone_on_with(
    cut: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = make_model(cut), make_samples(stem=8)
    begun = broken_off(model, samples, tmp_path, monkeypatch, error)
    calls = count_prefix_calls(model)
    cache, said = keep(model, samples, tmp_path, "disk")
    assert f"{begun} has 3 of 7 samples" in said
    assert said.shown == [(4, 7), (5, 7), (6, 7), (7, 7)] and len(calls) == 4
    assert torch.equal(values(cache), values(keep(model, samples)[0]))
    assert list(tmp_path.iterdir()) == [begun]
    assert "is reused" in keep(model, samples, tmp_path, "disk")[1]


def cut_off(begun: Path) -> None:
    os.truncate(begun / "activations.bin", 100)


def flip_a_filled_bit(begun: Path) -> None:
    data = (begun / "activations.bin").read_bytes()
    at = next(i for i, byte in enumerate(data) if byte)
    (begun / "activations.bin").write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])


@pytest.mark.parametrize(("damage", "shown"), [(cut_off, range(1, 8)), (flip_a_filled_bit, range(3, 8)), (no_index, range(1, 8))])
def test_damaged_samples_of_a_filling_are_computed_again(
    damage: Callable[[Path], None], shown: range, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, samples = make_model(), make_samples()
    damage(broken_off(model, samples, tmp_path, monkeypatch))
    cache, said = keep(model, samples, tmp_path, "disk")
    assert [done for done, _ in said.shown] == list(shown) and ("damaged" in said) == (damage is not no_index)
    assert torch.equal(values(cache), values(keep(model, samples)[0]))


def test_a_file_has_room_for_the_samples_of_other_processes_and_of_later_runs(tmp_path: Path) -> None:
    """Rows are found by sample: two processes fill their shares, another number of them finds all."""
    model, samples = make_model("block"), make_samples(stem=8)
    for rows in ([0, 2, 4, 6], [1, 3, 5]):
        cache, said = keep(model, samples, tmp_path, "disk", rows=rows)
        assert sorted(cache.slices) == rows and "is reused" not in said
        assert_same(outcome(model, cache, rows), outcome(model, Recompute(model, samples, CPU), rows))
    calls = count_prefix_calls(model)
    cache, said = keep(model, samples, tmp_path, "disk")
    assert "is reused" in said and not calls and len(list(tmp_path.iterdir())) == 1
    assert_same(outcome(model, cache, [1, 2, 3]), outcome(model, Recompute(model, samples, CPU), [1, 2, 3]))
