"""The training loop. There is one, for every method, with or without a cache."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from litgpt.activations.cache import Activations
from litgpt.args import EvalArgs, TrainArgs
from litgpt.errors import NonFiniteError, UserError
from litgpt.logs import Console, MetricLoggers, peak_memory_gb
from litgpt.lora import GPT
from litgpt.loss import HeadLoss, loss_of
from litgpt.optim import learning_rate
from litgpt.sample import Sample
from litgpt.train.interrupts import Signals
from litgpt.train.resume import Phase, State, random_states

SORTED_BATCHES = 50
"""with `train.group_by_length`, among so many samples are sorted: more make batches more alike, and less random"""


@dataclass(frozen=True)
class World:
    """This process among all: its rank, their number, and how they add up tensors."""

    rank: int
    size: int
    sum: Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Batches:
    """Which samples make which global batch.

    Rank k owns the samples k, k + size, ...; every epoch it goes through its own in a new order, so that its cache serves all epochs. The
    order depends on (seed, epoch, rank) alone.
    """

    samples: Sequence[Sample]
    per_rank: int
    """samples of one rank in a global batch"""
    world: World
    seed: int
    by_length: bool = False
    """whether a batch has samples of like length"""

    def owned(self, rank: int) -> list[int]:
        return list(range(rank, len(self.samples), self.world.size))

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch; the last batch of an epoch may be smaller."""
        return math.ceil(len(self.owned(0)) / self.per_rank)

    def epoch(self, epoch: int) -> Iterator[tuple[list[int], int, int]]:
        """For each step: this rank's samples, and the loss tokens and input tokens of the whole global batch."""
        orders = []
        for rank in range(self.world.size):
            own = self.owned(rank)
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch + 7_919 * rank)
            order = [own[i] for i in torch.randperm(len(own), generator=generator)]
            orders.append(self._alike(order, generator) if self.by_length else order)
        for start in range(0, self.per_epoch * self.per_rank, self.per_rank):
            everyone = [i for order in orders for i in order[start : start + self.per_rank]]
            loss_tokens = sum(self.samples[i].n_targets for i in everyone)
            tokens = sum(self.samples[i].n_inputs for i in everyone)
            yield orders[self.world.rank][start : start + self.per_rank], loss_tokens, tokens

    def _alike(self, order: list[int], generator: torch.Generator) -> list[int]:
        """The order with samples sorted by length in every `SORTED_BATCHES` batches, these shuffled; what is over stays last."""
        size = self.per_rank
        whole = len(order) // size * size
        batches = []
        for start in range(0, whole, SORTED_BATCHES * size):
            part = sorted(order[start : min(start + SORTED_BATCHES * size, whole)], key=lambda i: len(self.samples[i].input_ids))
            batches += [part[k : k + size] for k in range(0, len(part), size)]
        return [i for k in torch.randperm(len(batches), generator=generator) for i in batches[k]] + order[whole:]


def samples_per_rank(train: TrainArgs, processes: int) -> int:
    """Samples of one process in a global batch. Raises UserError if they cannot be shared out."""
    if train.global_batch_size % processes:
        raise UserError(f"train.global_batch_size {train.global_batch_size} is not a multiple of the {processes} devices")
    return train.global_batch_size // processes


class Saves(Protocol):
    """What the loop asks of `litgpt.train.saver.Checkpoints`."""

    def step(self, state: State, optimizer: torch.optim.Optimizer, device: torch.device, kept: bool) -> object: ...

    def best(self, state: State) -> None: ...


@dataclass
class Loop:
    """Everything that training needs, put together by `litgpt.train.run`."""

    model: GPT
    optimizer: torch.optim.Optimizer
    train: TrainArgs
    eval: EvalArgs
    batches: Batches
    activations: Activations
    val_batches: list[list[int]]
    val_activations: Activations
    world: World
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    log: MetricLoggers | None
    console: Console
    checkpoints: Saves
    signals: Signals
    answer: Callable[[], None]
    """shows what the model answers to the example"""

    def __post_init__(self) -> None:
        self.head_loss = HeadLoss.of(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.total_steps = self._total_steps()
        self.saved_at = time.perf_counter()
        warmup = self.train.lr_warmup_steps or 0
        if self.train.lr_warmup_fraction is not None and self.total_steps:
            warmup = round(self.train.lr_warmup_fraction * self.total_steps)
        self.warmup = min(warmup, self.total_steps) if self.total_steps else warmup

    def _total_steps(self) -> int | None:
        """The number of steps as far as it is known: None if only the clock ends the run."""
        train, known = self.train, []
        if train.epochs is not None:
            known.append(train.epochs * self.batches.per_epoch)
        if train.max_steps is not None:
            known.append(train.max_steps)
        if train.max_tokens is not None:
            an_epoch = sum(sample.n_inputs for sample in self.batches.samples)
            known.append(math.ceil(train.max_tokens * self.batches.per_epoch / an_epoch))
        return min(known) if known else None

    def run(self, state: State | None = None, title: str = "training") -> State:
        """Train until the first limit is reached, going on from `state`; the limits count from where its phase began.

        Raises Stopped, between two steps, if a signal came; NonFiniteError before a step that cannot be taken.
        """
        state = state or State()
        phase = state.phase = state.phase or Phase(state.step, state.tokens)
        with self.signals.held(), self.console.progress(title, state.step - phase.step) as progress:
            if state.pending is not None:
                self._finish_step(state, state.pending, validate=True)
            elif self.eval.initial_validation and not state.losses:
                self._log(state, self._validate(state))
            batches = self._batches(state.step - phase.step)
            over = state.step > phase.step and (self._is_over(state) or self._is_out_of_patience(state))
            while not over:
                over = self._advance(state, next(batches), progress)
            self._stop_if_asked()
        state.phase = None
        return state

    def _batches(self, done: int) -> Iterator[tuple[list[int], int, int]]:
        """The batches of epoch after epoch, without end, after the first `done`."""
        first, done = divmod(done, self.batches.per_epoch)
        for epoch in itertools.count(first):
            yield from itertools.islice(self.batches.epoch(epoch), done if epoch == first else 0, None)

    def _advance(self, state: State, batch: tuple[list[int], int, int], progress: Callable[..., None]) -> bool:
        """One step and what follows it; whether it was the last."""
        rows, loss_tokens, tokens = batch
        phase = state.phase
        assert phase is not None
        start = time.perf_counter()
        rate = self._set_learning_rate(state.step - phase.step)
        state.random = random_states(self.device)
        loss = self.step(state, rows, loss_tokens)
        state.random = None
        elapsed = time.perf_counter() - start
        state.seconds += elapsed
        state.tokens += tokens
        row = {
            "train_loss": loss,
            "learning_rate": rate,
            "step_time": elapsed,
            "tokens_per_second": tokens / elapsed,
            "peak_memory_gb": peak_memory_gb(self.device),
        }
        progress(state.step - phase.step, self.total_steps, f"epoch {self._epoch(state.step):.2f}  loss {loss:.3f}")
        over = self._is_over(state)
        self._finish_step(state, row, state.step % self.eval.interval == 0 or (over and self.eval.final_validation))
        return over or self._is_out_of_patience(state)

    def _is_over(self, state: State) -> bool:
        """Whether a limit is reached."""
        train, phase = self.train, state.phase
        assert phase is not None
        steps, tokens = state.step - phase.step, state.tokens - phase.tokens
        out_of_epochs = train.epochs is not None and steps >= train.epochs * self.batches.per_epoch
        out_of_steps = train.max_steps is not None and steps >= train.max_steps
        out_of_tokens = train.max_tokens is not None and tokens >= train.max_tokens
        out_of_time = train.max_time is not None and self._any(phase.clock.seconds >= train.max_time)
        return out_of_epochs or out_of_steps or out_of_tokens or out_of_time

    def _is_out_of_patience(self, state: State) -> bool:
        """Whether the last validations of this phase, `eval.patience` of them, did not lower the loss."""
        if self.eval.patience is None or state.best is None or state.phase is None:
            return False
        since = max(state.best[0], state.phase.step)
        in_vain = sum(step > since for step, _ in state.losses)
        if in_vain >= self.eval.patience:
            self.console.say(
                f"step {state.step}: no better validation loss than {state.best[1]:.4f} in {in_vain} validations: training ends"
            )
        return in_vain >= self.eval.patience

    def _any(self, flag: bool) -> bool:
        """Whether any process says so: all must do the same at the same step."""
        if self.world.size == 1:
            return flag
        return bool(self.world.sum(torch.tensor(float(flag), device=self.device)).item())

    def _set_learning_rate(self, step: int) -> float:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            if self.total_steps is None:
                group["lr"] = peak * min(1.0, (step + 1) / max(1, self.warmup))
            else:
                group["lr"] = learning_rate(step, peak, self.warmup, self.total_steps, self.train.min_lr)
        return self.optimizer.param_groups[0]["lr"]

    def step(self, state: State, rows: list[int], loss_tokens: int) -> float:
        """One optimizer step over the samples `rows`; the mean loss per token of the global batch.

        Each micro-batch's sum of losses is divided by the loss tokens of the whole global batch, so accumulation, and several processes,
        give the gradient of one large batch. A step whose loss or gradient is no number is not taken.
        """
        self.model.train()
        total = torch.zeros((), device=self.device)
        for start in range(0, len(rows), self.train.micro_batch_size):
            loss = self._loss(self.activations, rows[start : start + self.train.micro_batch_size]) / loss_tokens
            loss.backward()
            total += loss.detach()
        mean = self.world.sum(total).item()
        self._share_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        if self._is_finite(state, rows, {"loss": mean, "gradient's norm": norm.item()}):
            if self.train.max_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.trained, self.train.max_norm, norm)
            state.consistent = False
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.consistent = True
        return mean

    def _is_finite(self, state: State, rows: list[int], values: dict[str, float]) -> bool:
        """Whether the step can be taken. If not, NonFiniteError, or with `train.skip_nonfinite` a line and a count."""
        wrong = [f"the {name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if not wrong:
            return True
        at = f"step {state.step + 1}: {wrong[0]} in a batch with samples {rows[:8]}"
        if not self.train.skip_nonfinite:
            remedy = (
                "lower the learning rate, set train.max_norm, or use another precision; train.skip_nonfinite true leaves such steps out"
            )
            raise NonFiniteError(f"{at}: {remedy}. The weights were not changed by this step", self._culprits(rows) or rows)
        state.skipped += 1
        self.console.say(f"{at}: the step is left out")
        return False

    @torch.no_grad()
    def _culprits(self, rows: list[int]) -> list[int]:
        """The samples whose loss alone is no number."""
        self.model.eval()
        return [i for i in rows if not math.isfinite(self._loss(self.activations, [i]).item())]

    def _loss(self, activations: Activations, rows: Sequence[int]) -> torch.Tensor:
        with self.autocast():
            return loss_of(self.model, activations(rows), self.head_loss)

    def _share_gradients(self) -> None:
        """Add the gradients of all processes."""
        if self.world.size == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        flat = self.world.sum(torch.cat([g.flatten() for g in grads]))
        for p, part in zip(self.trained, flat.split([g.numel() for g in grads]), strict=True):
            p.grad = part.view_as(p)

    def _finish_step(self, state: State, row: dict[str, float], validate: bool) -> None:
        """What follows the step that gave the metrics `row`: validate, log, save. Raises Stopped if a signal came."""
        if validate:
            state.pending = row
            row = {**row, **self._validate(state)}
            state.pending = None
        if validate or state.step % self.train.log_interval == 0:
            self._log(state, row)
        minutes = self.train.save_every_minutes
        late = minutes is not None and time.perf_counter() - self.saved_at >= 60 * minutes
        if self.train.save_interval and state.step % self.train.save_interval == 0:
            self.checkpoints.step(state, self.optimizer, self.device, kept=True)
            self.saved_at = time.perf_counter()
        elif self._any(late):
            self._save_by_the_clock(state)
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Raises Stopped if a signal came to any process."""
        if self._any(self.signals.asked is not None):
            self.signals.stop()

    def _save_by_the_clock(self, state: State) -> None:
        """A checkpoint besides those asked for: the run goes on without it if the disk is full."""
        self.saved_at = time.perf_counter()
        try:
            self.checkpoints.step(state, self.optimizer, self.device, kept=False)
        except UserError as error:
            self.console.say(f"step {state.step}: {error}")

    def _epoch(self, step: int) -> float:
        return round(step / self.batches.per_epoch, 4)

    def _log(self, state: State, row: dict[str, float]) -> None:
        if self.log:
            self.log(state.step, {"step": state.step, "epoch": self._epoch(state.step), **row})

    def _validate(self, state: State) -> dict[str, float]:
        """Mean loss per token over the validation samples, and its perplexity. Raises Stopped if a signal comes."""
        self.model.eval()
        sums = torch.zeros(2, device=self.device)
        with torch.no_grad():
            for rows in self.val_batches:
                if self.signals.asked is not None:
                    break
                sums[0] += self._loss(self.val_activations, rows)
                sums[1] += sum(self.val_samples[i].n_targets for i in rows)
        self._stop_if_asked()
        loss, count = self.world.sum(sums).tolist()
        loss /= count
        state.losses = [*(earlier for earlier in state.losses if earlier[0] != state.step), (state.step, loss)]
        if state.improves(loss):
            state.best = (state.step, loss)
            self.checkpoints.best(state)
        result = {"val_loss": loss, "val_ppl": math.exp(min(loss, 700.0))}
        self.console.say(f"step {state.step}: validation loss {loss:.4f}, perplexity {result['val_ppl']:.2f}")
        self.answer()
        return result

    @property
    def val_samples(self) -> Sequence[Sample]:
        return self.val_activations.samples
