"""Validation, logs, checkpoints and signals around the loop's steps; the validation loss is transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from litgpt.args import EvalArgs
from litgpt.errors import Stopped
from litgpt.lora import mark_only_lora_as_trainable
from litgpt.train.interrupts import Interrupts
from litgpt.train.parallel import Rank
from litgpt.train.resume import PhaseStart, State, Stopwatch
from tests.helpers import tiny
from tests.helpers.cases import first
from tests.helpers.training import METHODS, Saved, by_hand, column, logged, make_loop, make_model, make_samples


@pytest.mark.parametrize("cut", ["lm_head", "block", "LoRA"])
def test_validation_loss_is_transformers_mean_over_the_loss_tokens(cut: str) -> None:
    hf = tiny.hf_llama(num_hidden_layers=5)
    model = tiny.from_hf(hf, **METHODS[cut])  # B is 0: the adapters add nothing yet
    mark_only_lora_as_trainable(model)
    samples = make_samples(7, seed=4)
    total, count = 0.0, 0
    for sample in samples:
        ids = torch.tensor(sample.input_ids)[None].long()
        labels = torch.where(torch.tensor(list(sample.loss_mask)).bool(), ids[0], -100)[None]
        learned = sample.n_targets
        with torch.no_grad():
            total += hf(input_ids=ids, labels=labels).loss.item() * learned
        count += learned
    loop = make_loop(model, make_samples(4), samples, eval=EvalArgs(initial_validation=True, final_validation=False))
    loop.run()
    first = logged(loop)[0]
    assert first["step"] == 0
    assert first["val_loss"] == pytest.approx(total / count, rel=1e-5)
    assert first["val_ppl"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("evaluate", "steps"),
    first(
        [
            (EvalArgs(interval=2, final_validation=False), [2, 4, 6]),
            (EvalArgs(interval=2), [2, 4, 6, 7]),
            (EvalArgs(interval=7), [7]),
            (EvalArgs(interval=100, initial_validation=True), [0, 7]),
            (EvalArgs(interval=100, final_validation=False), []),
        ],
        2,
    ),
)
def test_validation_comes_by_interval_first_and_last_and_each_step_is_logged_once(evaluate: EvalArgs, steps: list[int]) -> None:
    answered = []
    loop = make_loop(make_model(), make_samples(28), eval=evaluate, answer=lambda: answered.append(1))
    state = loop.run()
    rows = logged(loop)
    assert [step for step, _ in state.losses] == steps == [row["step"] for row in rows if "val_loss" in row]
    assert [loss for _, loss in state.losses] == column(loop, "val_loss")
    assert [row["step"] for row in rows] == [*([0] if 0 in steps else []), 1, 2, 3, 4, 5, 6, 7]
    assert len(answered) == len(steps)


def test_rows_and_checkpoints_come_by_their_intervals() -> None:
    saved = Saved()
    loop = make_loop(
        make_model(),
        make_samples(28),
        eval=EvalArgs(interval=5, final_validation=False),
        log_interval=3,
        save_interval=2,
        saved=saved,
    )
    loop.run()
    assert saved.asked == [(2, True), (4, True), (6, True)]
    assert [row["step"] for row in logged(loop)] == [3, 5, 6]
    assert [row["epoch"] for row in logged(loop)] == [pytest.approx(n / 7, abs=1e-4) for n in (3, 5, 6)]


def test_validation_needs_no_gradients_and_drops_nothing() -> None:
    """With dropout 0.5 the validation loss is that of the whole model, and training goes on in training mode."""
    samples, model = make_samples(9), make_model(lora_dropout=0.5)
    modes = []
    hook = model.lm_head.weight  # frozen: the loop must not make it trainable
    loop = make_loop(model, samples, eval=EvalArgs(initial_validation=True), answer=lambda: modes.append(model.training))
    loop.run()
    model.eval()
    with torch.no_grad():
        exact = by_hand(model, samples, range(len(samples))).item()
    assert column(loop, "val_loss")[-1] == pytest.approx(exact, rel=1e-5)
    assert modes == [False, False] and not hook.requires_grad


@pytest.mark.parametrize(("losses", "steps", "best"), [([5, 4, 3, 2], 4, [1, 2, 3, 4]), ([5, 6, 5, 9], 3, [1])])
def test_the_best_is_kept_and_patience_ends_the_run(
    losses: list[float], steps: int, best: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a patience of 2; the loss before the first step does not count."""
    saved = Saved()
    evaluate = EvalArgs(interval=1, patience=2, initial_validation=True)
    loop = make_loop(make_model(), make_samples(16), eval=evaluate, saved=saved)
    told = iter([1.0, *losses])
    loop.loop.rank = Rank(sum=lambda tensor: torch.tensor([next(told), 1.0, 0.0, 0.0]) if tensor.numel() == 4 else tensor)
    state = loop.run()
    assert state.step == steps and [step for step, _ in saved.bests] == best


@pytest.mark.parametrize(("losses", "target", "steps"), first([([5, 2, 1, 1], 2.0, 2), ([5, 4, 3, 3], 2.0, 4), ([1, 5, 5, 5], 0.5, 4)]))
def test_a_loss_as_low_as_the_target_ends_the_run(losses: list[float], target: float, steps: int) -> None:
    """The loss before the first step does not count."""
    loop = make_loop(make_model(), make_samples(16), eval=EvalArgs(interval=1, target_loss=target, initial_validation=True))
    told = iter([0.1, *losses])
    loop.loop.rank = Rank(sum=lambda tensor: torch.tensor([next(told), 1.0, 0.0, 0.0]) if tensor.numel() == 4 else tensor)
    assert loop.run().step == steps


def test_a_signal_ends_the_run_between_two_steps() -> None:
    signals, saved = Interrupts(), Saved(lambda step: setattr(signals, "asked", 15 if step == 2 else None))
    loop = make_loop(make_model(), make_samples(16), saved=saved, save_interval=1, interrupts=signals)
    with pytest.raises(Stopped) as caught:
        loop.run(state := State())
    assert caught.value.code == 143 and state.step == 2 and state.pending is None and state.consistent


def test_a_signal_in_a_validation_leaves_it_pending_and_the_rest_of_the_step_is_done_later() -> None:
    samples, signals = make_samples(16), Interrupts()
    evaluate = EvalArgs(interval=2)
    whole = make_loop(make_model(), samples, eval=evaluate)
    whole.run()
    loop = make_loop(make_model(), samples, eval=evaluate, interrupts=signals)
    source = loop.val_activations

    def signalled(rows: Any) -> Any:
        signals.asked = 2
        return source(rows)

    signalled.samples = source.samples  # type: ignore[attr-defined]
    loop.val_activations = signalled  # type: ignore[assignment]
    with pytest.raises(Stopped):
        loop.run(state := State())
    assert state.pending is not None and state.step == 2 and len(logged(loop)) == 1 and not state.losses
    signals.asked, loop.val_activations = None, source
    loop.run(state)
    drop = ("step_time", "tokens_per_second", "peak_memory_gb")
    assert [{k: v for k, v in row.items() if k not in drop} for row in logged(loop)] == [
        {k: v for k, v in row.items() if k not in drop} for row in logged(whole)
    ]


def test_max_time_does_not_count_what_a_resumed_session_does_before_training() -> None:
    """5 s of training in an earlier session; data and cache took 1,000 s in this one."""
    clock = Stopwatch(5.0)
    clock.began -= 1000.0
    state = State(step=1, tokens=1, phase=PhaseStart(0, 0, clock))
    loop = make_loop(make_model(), make_samples(14), epochs=1, max_time=100.0)
    assert loop.run(state).step == loop.loop.total_steps > 1 and 5.0 < clock.seconds < 100.0
