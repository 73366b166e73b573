"""The loop against steps written out by hand, and against itself: accumulated, cached, repeated."""

from __future__ import annotations

import itertools
import math
from array import array
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from litgpt.activations.cache import ActivationCache, CacheSettings, Recompute, activations
from litgpt.args import EvalArgs, TrainArgs
from litgpt.errors import NonFiniteError
from litgpt.lora import Config, lora_filter, mark_only_lora_as_trainable
from litgpt.sample import Sample
from litgpt.train import loop as loop_module
from litgpt.train.loop import Batches
from litgpt.train.methods import Method
from litgpt.train.parallel import Rank
from litgpt.train.resume import State
from tests.helpers import tiny
from tests.helpers.cases import first, quick
from tests.helpers.training import (
    ALONE,
    CLOSE,
    CPU,
    CUTS,
    METHODS,
    RATE,
    Saved,
    Training,
    by_hand,
    column,
    logged,
    make_loop,
    make_model,
    make_samples,
    record_gradients,
    snapshot,
    train_by_hand,
    trained,
)

# --- batches ---


@pytest.mark.parametrize("by_owner", [False, True])
@pytest.mark.parametrize(("count", "batch", "size"), [(10, 4, 1), (12, 4, 1), (11, 4, 2), (3, 4, 2), (7, 3, 3), (2, 12, 3), (40, 8, 4)])
def test_an_epoch_shows_every_sample_once_and_any_number_of_processes_the_same_batches(
    count: int, batch: int, size: int, by_owner: bool
) -> None:
    samples = make_samples(count)
    ranks = [Batches(samples, batch, Rank(rank, size), seed=3, by_owner=by_owner) for rank in range(size)]
    for epoch in range(3):
        steps = [list(batches.epoch(epoch)) for batches in ranks]
        alone = [set(rows) for rows, *_ in Batches(samples, batch, ALONE, seed=3).epoch(epoch)]
        assert sorted(i for rows in alone for i in rows) == list(range(count))
        assert {len(one) for one in steps} == {ranks[0].per_epoch} == {len(alone)}
        for at_once, rows_alone in zip(zip(*steps, strict=True), alone, strict=True):
            everyone = [i for rows, *_ in at_once for i in rows]
            assert set(everyone) == rows_alone and len(everyone) == len(rows_alone) <= batch
            assert {loss_tokens for _, loss_tokens, *_ in at_once} == {sum(samples[i].n_targets for i in everyone)}
            assert {tokens for _, _, tokens, _ in at_once} == {sum(samples[i].n_inputs for i in everyone)}
            sizes = [len(rows) for rows, *_ in at_once]
            assert {most for *_, most in at_once} == {max(sizes)}
            assert by_owner or max(sizes) - min(sizes) <= 1
        for rank, one in enumerate(steps):
            assert {i for rows, *_ in one for i in rows} <= set(ranks[0].owned(rank))


@pytest.mark.parametrize(
    ("mode", "train", "expected"),
    [
        ("auto", TrainArgs(epochs=2), "auto"),
        ("auto", TrainArgs(epochs=1), "off"),
        ("auto", TrainArgs(epochs=None, max_steps=3), "off"),
        ("auto", TrainArgs(epochs=None, max_steps=4), "auto"),
        ("auto", TrainArgs(max_tokens=500), "off"),
        ("auto", TrainArgs(max_tokens=501), "auto"),
        ("disk", TrainArgs(epochs=1), "disk"),
    ],
)
def test_auto_caches_only_what_is_needed_twice(mode: str, train: TrainArgs, expected: str) -> None:
    """An epoch has 3 steps and 500 input tokens."""
    samples = [Sample(array("i", [1] * length), bytearray([1] * length)) for length in (168, 168, 167)]
    assert Batches(samples, 1, ALONE, seed=1).cache_mode(mode, train) == expected


def test_the_order_depends_on_epoch_and_seed_alone() -> None:
    samples = make_samples(16)

    def order(seed: int, epoch: int) -> list[int]:
        return [i for rows, *_ in Batches(samples, 4, ALONE, seed).epoch(epoch) for i in rows]

    torch.manual_seed(0)
    first = order(1, 0)
    torch.manual_seed(1)
    assert order(1, 0) == first
    assert len({tuple(order(seed, epoch)) for seed, epoch in itertools.product((1, 2), (0, 1, 2))}) == 6


@pytest.mark.parametrize(("count", "per_rank", "size"), [(100, 4, 1), (103, 4, 1), (90, 3, 2), (3, 4, 1)])
def test_batches_of_like_length_hold_every_sample_once_in_a_random_order(count: int, per_rank: int, size: int) -> None:
    samples = [tiny_sample(10 + 7 * i % 61) for i in range(count)]

    def spread(by_length: bool, epoch: int) -> tuple[list[int], float]:
        order, widths = [], []
        for rank in range(size):
            for rows, *_ in Batches(samples, per_rank * size, Rank(rank, size), 3, by_length).epoch(epoch):
                order += rows
                lengths = [len(samples[i].input_ids) for i in rows]
                widths += [max(lengths) - min(lengths)] if len(rows) == per_rank else []
        return order, sum(widths)

    (first, width), (second, _), (_, random_width) = spread(True, 0), spread(True, 1), spread(False, 0)
    assert sorted(first) == sorted(second) == list(range(count))
    if count > 3:
        assert first != second and width < 0.2 * random_width
        lengths = [len(samples[i].input_ids) for i in first]
        assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)


def tiny_sample(length: int) -> Sample:
    return Sample(array("i", range(length)), bytearray([0] + [1] * (length - 1)))


@pytest.mark.parametrize("count", [7, 8, 3])
def test_a_loop_that_goes_on_takes_the_batches_that_were_left(count: int) -> None:
    loop = make_loop(make_model(), make_samples(count))
    every = list(itertools.islice(loop.batches.after(0), 9))
    for done in range(9):
        assert list(itertools.islice(loop.batches.after(done), 9 - done)) == every[done:]


# --- a step ---


@pytest.mark.parametrize(
    ("method", "micro"),
    quick(itertools.product(METHODS, (1, 2, 4, 8)), ("block", 4), ("full", 2)),
)
def test_accumulation_equals_one_large_batch_done_by_hand(method: str, micro: int) -> None:
    samples, model, other = make_samples(20), make_model(method), make_model(method)
    adamw = partial(torch.optim.AdamW, lr=RATE, eps=1e-4)  # the usual 1e-8 makes full steps of rounding errors
    loop = make_loop(model, samples, optimizer=adamw, global_batch_size=8, micro_batch_size=micro)
    gradients = record_gradients(loop)
    batches = [rows for rows, *_ in loop.batches.epoch(0)]
    assert [len(rows) for rows in batches] == [8, 8, 4]
    first = by_hand(other, samples, batches[0])
    assert_close(gradients_of(first, other), by_name(model, run(loop, gradients)[0]), **CLOSE)
    losses = train_by_hand(other, samples, batches, adamw([p for p in other.parameters() if p.requires_grad]))
    assert_close(column(loop, "train_loss"), losses, **CLOSE)
    assert_close(trained(model), trained(other), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", quick(METHODS, "LoRA", "block"))
def test_weights_multiply_losses_and_the_mean_is_over_their_sum(method: str) -> None:
    """The oracle repeats a sample as often as its weight says; micro-batches and processes are parts of the same batch."""
    weights, plain = [1, 3, 2, 1, 2, 1, 3, 1], make_samples(8)
    samples = [weighted(sample, weight) for sample, weight in zip(plain, weights, strict=True)]
    other, repeated = make_model(method), [i for i, weight in enumerate(weights) for _ in range(weight)]
    expected = by_hand(other, plain, repeated)
    gradients = gradients_of(expected, other)
    shares = []
    for rank in (Rank(0, 1), Rank(0, 2), Rank(1, 2)):
        model = make_model(method)
        loop = make_loop(model, samples, rank=rank, global_batch_size=8, micro_batch_size=2)
        if method == "lm_head":
            loop.loop.activations = activations(
                model, samples, loop.batches.owned(rank.index), "", CacheSettings("memory", Path(), torch.float32), CPU
            )
        seen = record_gradients(loop)
        shares.append((loop.loop.step(State(), next(loop.batches.after(0)))["train_loss"], by_name(model, seen[0])))
    assert_close(shares[0], (expected.item(), gradients), **CLOSE)
    assert_close(shares[1][0] + shares[2][0], expected.item(), **CLOSE)
    assert_close({name: shares[1][1][name] + shares[2][1][name] for name in gradients}, gradients, **CLOSE)
    validated = make_loop(other, samples).loop.validate(Recompute(other, samples, CPU), [[0, 1, 2], [3, 4, 5, 6, 7]], lambda: False)
    assert_close(validated, expected.item(), **CLOSE)


def weighted(sample: Sample, weight: float) -> Sample:
    return Sample(sample.input_ids, sample.loss_mask, array("f", [weight * mask for mask in sample.loss_mask]))


@pytest.mark.parametrize("method", first(["lm_head", "LoRA"]))
def test_weights_of_1_change_nothing_but_the_last_bit(method: str) -> None:
    samples, curves = make_samples(12), []
    for each in (samples, [weighted(sample, 1) for sample in samples], [weighted(sample, 7) for sample in samples]):
        loop = make_loop(make_model(method), each)
        loop.run()
        curves.append(column(loop, "train_loss"))
    assert_close(curves[1], curves[0], rtol=1e-6, atol=0)
    assert_close(curves[2], curves[0], rtol=1e-5, atol=0)


def gradients_of(loss: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    names = trained(model)
    return dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))


def by_name(model: Any, gradients: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(trained(model), gradients, strict=True))


def run(loop: Training, result: Any) -> Any:
    loop.run()
    return result


def in_fp16(model: Any) -> Any:
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.half()
    return model


def test_small_gradients_survive_fp16() -> None:
    """The gradients of a model whose output hardly depends on its blocks, with and without a scaled loss, against fp32."""
    moved = []
    for half, scale in ((False, 1.0), (True, 1.0), (True, State.loss_scale)):
        model = make_model("block")
        model.transformer.ln_f.weight.data *= 1e-3
        loop = make_loop(in_fp16(model) if half else model, make_samples(8), optimizer=lambda p: torch.optim.SGD(p, lr=1.0), max_steps=1)
        before = torch.cat([p.detach().flatten() for p in loop.trained])
        loop.run(State(loss_scale=scale))
        moved.append(before - torch.cat([p.detach().flatten() for p in loop.trained]))
    exact, plain, scaled = moved
    assert (plain - exact).norm() > 0.02 * exact.norm() > 5 * (scaled - exact).norm()


@pytest.mark.slow
def test_a_loss_scale_that_is_too_large_is_halved_until_the_gradients_are_finite() -> None:
    model, samples = in_fp16(make_model("block")), make_samples(8)
    loop = make_loop(model, samples, epochs=20)
    start = snapshot(model)
    state = loop.run(State(loss_scale=2.0**30))
    assert 1 < state.loss_scale < 2.0**30 and state.skipped == 0 and state.step == 40
    assert any(not torch.equal(start[name], value) for name, value in snapshot(model).items())
    assert State.of(state.facts()).loss_scale == state.loss_scale


def test_clipping_scales_the_gradients_to_the_norm() -> None:
    samples, model, other = make_samples(8), make_model("block"), make_model("block")
    loop = make_loop(model, samples, max_norm=0.01, max_steps=1)
    exact = gradients_of(by_hand(other, samples, next(loop.batches.epoch(0))[0]), other)
    norm = torch.stack([g.norm() for g in exact.values()]).norm()
    assert norm > 0.1
    (seen,) = run(loop, record_gradients(loop))
    assert_close(by_name(model, seen), {name: g * 0.01 / norm for name, g in exact.items()}, rtol=1e-3, atol=1e-7)


def test_gradients_below_the_norm_stay_as_they_are() -> None:
    samples = make_samples(8)
    plain, clipped = (make_loop(make_model(), samples, max_norm=norm, max_steps=1) for norm in (None, 1e6))
    assert_close(run(plain, record_gradients(plain)), run(clipped, record_gradients(clipped)), rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_the_weights_move(value: float) -> None:
    samples, model = make_samples(8), make_model()
    before = {}

    def spoil(step: int) -> None:
        if step == 1:
            before.update(snapshot(model))
            model.lm_head.weight.data[7, 3] = value

    loop = make_loop(model, samples, saved=Saved(spoil), save_interval=1, epochs=3)
    with pytest.raises(NonFiniteError, match="the loss is (nan|inf) in a batch with samples .*lower the learning rate"):
        loop.run()
    assert len(logged(loop)) == 1
    assert before and all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if lora_filter(name))


def test_a_gradient_that_is_no_number_stops_before_the_weights_move() -> None:
    """The loss is finite, what comes back is not."""
    samples, model = make_samples(8), make_model()
    before = snapshot(model)
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda gradient: gradient + math.inf)
    loop = make_loop(model, samples, epochs=1)
    with pytest.raises(NonFiniteError, match="the gradient norm is (nan|inf) in a batch"):
        loop.run()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- what moves ---


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_adapters_move_all_of_them_and_nothing_else(method: str) -> None:
    model = tiny.tiny(**METHODS[method])  # B is 0: the first step moves B, the second A too
    mark_only_lora_as_trainable(model)
    before = snapshot(model)
    make_loop(model, make_samples(16), max_steps=3, epochs=1).run()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if lora_filter(name)} and moved


@pytest.mark.parametrize("tied", [True, False])
def test_full_fine_tuning_moves_everything_and_keeps_a_tied_head_tied(tied: bool) -> None:
    model = make_model("full")
    Method(Config.from_checkpoint, trains_base=True, tie_embeddings=tied).prepare(model)
    before = snapshot(model)
    make_loop(model, make_samples(16), max_steps=2).run()
    after = model.state_dict()
    assert all(not torch.equal(value, before[name]) for name, value in after.items())
    same = torch.equal(after["lm_head.weight"], after["transformer.wte.weight"])
    assert same == tied and (model.lm_head.weight is model.transformer["wte"].weight) == tied


def test_a_tied_head_gets_the_gradient_of_both_its_uses() -> None:
    samples, model, other = make_samples(8), make_model("full"), make_model("full")
    for one in (model, other):
        Method(Config.from_checkpoint, trains_base=True, tie_embeddings=True).prepare(one)
    loop = make_loop(model, samples, max_steps=1)
    exact = gradients_of(by_hand(other, samples, next(loop.batches.epoch(0))[0]), other)
    assert_close(by_name(model, run(loop, record_gradients(loop))[0]), exact, **CLOSE)


# --- whole runs ---


def curve(method: str = "block", seed: int = 1, source: Any = None, **settings: Any) -> tuple[list[float], list[float], Any]:
    """Training losses, validation losses and final weights of a short run."""
    samples, dropout = make_samples(14), settings.pop("lora_dropout", 0.0)
    torch.manual_seed(seed)
    model = make_model(method, lora_dropout=dropout) if method != "full" else make_model(method)
    evaluate = EvalArgs(interval=2, initial_validation=True)
    loop = make_loop(
        model, samples, make_samples(5, seed=9), eval=evaluate, seed=seed, source=source and source(model, samples), **settings
    )
    loop.run()
    return column(loop, "train_loss"), column(loop, "val_loss"), trained(model)


@pytest.mark.parametrize("method", quick(["block", "full"], "block"))
def test_a_run_repeated_is_the_same_bit_for_bit_and_another_seed_is_another_run(method: str) -> None:
    dropout = {} if method == "full" else {"lora_dropout": 0.2}
    first, again, other = (curve(method, seed, epochs=2, **dropout) for seed in (1, 1, 2))
    assert len(first[0]) == 8 and len(first[1]) == 5
    assert first[:2] == again[:2] and all(torch.equal(first[2][name], again[2][name]) for name in first[2])
    assert first[0] != other[0]


@pytest.mark.parametrize(
    ("method", "mode"),
    quick(itertools.product(CUTS, ("memory", "disk")), ("lm_head", "memory"), ("block", "disk")),
)
def test_cached_and_recomputed_runs_have_the_same_curve(method: str, mode: str, tmp_path: Path) -> None:
    def cache(model: Any, samples: list[Sample]) -> ActivationCache:
        settings = CacheSettings(mode, tmp_path, torch.float32)
        source = activations(model, samples, range(len(samples)), "training", settings, CPU)
        assert isinstance(source, ActivationCache)
        return source

    cached, plain = curve(method, source=cache, epochs=3), curve(method, epochs=3)
    assert len(plain[0]) == 12 and plain[0][-1] < plain[0][0]
    assert_close(cached[:2], plain[:2], rtol=1e-4, atol=1e-5)
    assert_close(cached[2], plain[2], rtol=1e-2, atol=1e-3)


def test_losses_do_not_depend_on_the_size_of_the_micro_batch() -> None:
    assert_close(curve(epochs=2, micro_batch_size=1)[:2], curve(epochs=2, micro_batch_size=4)[:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"epochs": 2}, 8),
        ({"epochs": 2, "max_steps": 3}, 3),
        ({"epochs": 1, "max_steps": 9}, 4),
        ({"epochs": None, "max_steps": 9}, 9),
        ({"epochs": 3, "max_time": 1e-9}, 1),
        ({"epochs": 1, "max_time": 1e9}, 4),
    ],
)
def test_the_first_limit_ends_the_run(limits: dict[str, Any], steps: int) -> None:
    loop = make_loop(make_model(), make_samples(14), **limits)
    state = loop.run()
    assert state.step == steps == len(logged(loop))
    assert [row["step"] for row in logged(loop)] == list(range(1, steps + 1))


@pytest.mark.parametrize("epochs", [1, None])
def test_max_tokens_ends_the_run_with_the_step_that_reaches_it(epochs: int | None) -> None:
    samples = make_samples(14)
    sizes = [tokens for epoch in range(4) for _, _, tokens, _ in Batches(samples, 4, ALONE, 1).epoch(epoch)]
    for limit in (1, sizes[0], sizes[0] + 1, sum(sizes[:3])):
        state = make_loop(make_model(), samples, epochs=epochs, max_tokens=limit).run()
        assert state.tokens == sum(sizes[: state.step])
        assert state.tokens >= limit > state.tokens - sizes[state.step - 1]
    if epochs is None:
        assert make_loop(make_model(), samples, epochs=None, max_tokens=sum(sizes[:9])).run().step == 9
    else:
        assert make_loop(make_model(), samples, epochs=1, max_tokens=10**9).run().step == 4


def test_max_time_counts_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: next(clock))
    loop = make_loop(make_model(), make_samples(14), epochs=None, max_time=20.0)
    state = loop.run()
    assert 4 <= state.step <= 10  # two or three looks at the clock per step
    assert state.seconds == state.step


def test_a_second_loop_goes_on_from_the_first_ones_state_with_limits_and_schedule_of_its_own() -> None:
    samples = make_samples(14)
    evaluate = EvalArgs(interval=100, initial_validation=True)
    settings: dict[str, Any] = {"eval": evaluate, "lr_warmup_steps": 2, "epochs": 9, "min_lr": 0.01}
    first, second = make_loop(make_model(), samples, max_steps=3, **settings), make_loop(make_model(), samples, max_tokens=1, **settings)
    third = make_loop(make_model(), samples, **{**settings, "epochs": 1})
    state = first.run()
    tokens = state.tokens
    assert second.run(state) is state and state.step == 4 and state.tokens > tokens
    third.run(state)
    assert [row["step"] for loop in (first, second, third) for row in logged(loop)] == [0, *range(1, 9)]
    assert [step for step, _ in state.losses] == [0, 3, 4, 8]
    assert column(third, "learning_rate")[:2] == pytest.approx([RATE / 2, RATE]) == column(first, "learning_rate")[:2]


# --- the learning rate of a run ---


def rates(**train: Any) -> list[float]:
    loop = make_loop(make_model(), make_samples(16), **{"min_lr": 0.01, **train})
    loop.run()
    return column(loop, "learning_rate")


def test_warmup_and_cosine_span_the_run() -> None:
    seen = rates(epochs=2, lr_warmup_steps=3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], RATE), 5, eta_min=0.01)
    expected = []
    for _ in range(5):
        expected.append(cosine.get_last_lr()[0])
        cosine.optimizer.step()
        cosine.step()
    assert seen == pytest.approx([RATE / 3, 2 * RATE / 3, RATE, *expected])


def test_a_warmup_longer_than_the_run_ends_at_the_peak() -> None:
    assert rates(max_steps=4, lr_warmup_steps=100) == pytest.approx([RATE * n / 4 for n in (1, 2, 3, 4)])


def test_warmup_as_a_share_of_the_run() -> None:
    assert rates(epochs=2, lr_warmup_steps=None, lr_warmup_fraction=0.5)[:5] == pytest.approx([RATE * n / 4 for n in (1, 2, 3, 4, 4)])


def test_without_a_known_end_the_rate_stays_at_its_peak() -> None:
    seen = rates(epochs=None, max_time=0.05, lr_warmup_steps=2)
    assert seen[:1] == pytest.approx([RATE / 2]) and all(rate == pytest.approx(RATE) for rate in seen[1:])


def test_every_group_keeps_its_own_peak() -> None:
    def groups(parameters: list[Any]) -> Any:
        return torch.optim.SGD([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.02}], lr=1.0)

    loop = make_loop(make_model(), make_samples(4), optimizer=groups, lr_warmup_steps=2, epochs=2)
    seen = []
    step = loop.optimizer.step
    loop.optimizer.step = lambda: (seen.append([g["lr"] for g in loop.optimizer.param_groups]), step())  # type: ignore[method-assign]
    loop.run()
    assert seen == [pytest.approx([0.05, 0.01]), pytest.approx([0.1, 0.02])]
