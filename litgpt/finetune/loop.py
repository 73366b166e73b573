"""The training loop. There is one, for every method, with or without a cache."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from litgpt.activation_cache import Activations
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data.base import Sample
from litgpt.errors import UserError
from litgpt.logs import Console, MetricLoggers, peak_memory_gb
from litgpt.lora import GPT
from litgpt.loss import HeadLoss
from litgpt.optim import learning_rate


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
            orders.append([own[i] for i in torch.randperm(len(own), generator=generator)])
        for start in range(0, self.per_epoch * self.per_rank, self.per_rank):
            everyone = [i for order in orders for i in order[start : start + self.per_rank]]
            loss_tokens = sum(sum(self.samples[i].loss_mask) for i in everyone)
            tokens = sum(len(self.samples[i].input_ids) - 1 for i in everyone)
            yield orders[self.world.rank][start : start + self.per_rank], loss_tokens, tokens


@dataclass
class State:
    """How far the run is."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """spent in training steps"""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, validation loss)"""


@dataclass
class Loop:
    """Everything that training needs, put together by `litgpt.finetune.job`."""

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
    save: Callable[[int], None]
    answer: Callable[[], None]
    """shows what the model answers to the example"""

    def __post_init__(self) -> None:
        self.start = 0
        self.head_loss = HeadLoss(self.model.lm_head)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.total_steps = self._total_steps()
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
            an_epoch = sum(len(sample.input_ids) - 1 for sample in self.batches.samples)
            known.append(math.ceil(train.max_tokens * self.batches.per_epoch / an_epoch))
        return min(known) if known else None

    def run(self, state: State | None = None, title: str = "training") -> State:
        """Train until the first limit is reached, going on from `state`; the limits count from there."""
        state = state or State()
        self.start, tokens_before, began = state.step, state.tokens, time.perf_counter()
        if self.eval.initial_validation and not state.losses:
            self._log(state, self._validate(state))
        with self.console.progress(title) as progress:
            for rows, loss_tokens, tokens in self._batches():
                start = time.perf_counter()
                rate = self._set_learning_rate(state.step - self.start)
                loss = self._step(rows, loss_tokens)
                elapsed = time.perf_counter() - start
                state.step += 1
                state.tokens += tokens
                state.seconds += elapsed
                last = self._is_over(state.step - self.start, state.tokens - tokens_before, time.perf_counter() - began)
                self._after_step(state, last, loss, rate, elapsed, tokens, progress)
                if last:
                    break
        return state

    def _batches(self) -> Iterator[tuple[list[int], int, int]]:
        """The batches of epoch after epoch, without end."""
        for epoch in itertools.count():
            yield from self.batches.epoch(epoch)

    def _is_over(self, steps: int, tokens: int, seconds: float) -> bool:
        """Whether a limit is reached."""
        train = self.train
        out_of_epochs = train.epochs is not None and steps >= train.epochs * self.batches.per_epoch
        out_of_steps = train.max_steps is not None and steps >= train.max_steps
        out_of_tokens = train.max_tokens is not None and tokens >= train.max_tokens
        return out_of_epochs or out_of_steps or out_of_tokens or (train.max_time is not None and self._any(seconds >= train.max_time))

    def _any(self, flag: bool) -> bool:
        """Whether any process says so: all must stop at the same step."""
        return bool(self.world.sum(torch.tensor(float(flag), device=self.device)).item())

    def _set_learning_rate(self, step: int) -> float:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            if self.total_steps is None:
                group["lr"] = peak * min(1.0, (step + 1) / max(1, self.warmup))
            else:
                group["lr"] = learning_rate(step, peak, self.warmup, self.total_steps, self.train.min_lr)
        return self.optimizer.param_groups[0]["lr"]

    def _step(self, rows: list[int], loss_tokens: int) -> float:
        """One optimizer step over the samples `rows`; the mean loss per token of the global batch.

        Each micro-batch's sum of losses is divided by the loss tokens of the whole global batch, so accumulation, and several processes,
        give the gradient of one large batch.
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
        for name, value in (("loss", mean), ("gradient's norm", norm.item())):
            if not math.isfinite(value):
                raise UserError(
                    f"the {name} is {value} in a batch with samples {rows[:8]}: lower the learning rate, set train.max_norm, or use "
                    "another precision. The weights were not changed by this step"
                )
        if self.train.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.train.max_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return mean

    def _loss(self, activations: Activations, rows: Sequence[int]) -> torch.Tensor:
        """Sum of the losses at the loss positions of these samples."""
        with self.autocast():
            features = activations(rows)
            hidden = self.model.tail(features.x, features.taps)  # (N, d) or (B, T, d)
            if features.at is not None:
                hidden = hidden[features.at]  # (N, d)
            return self.head_loss(hidden, features.targets)

    def _share_gradients(self) -> None:
        """Add the gradients of all processes."""
        if self.world.size == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.trained]
        flat = self.world.sum(torch.cat([g.flatten() for g in grads]))
        for p, part in zip(self.trained, flat.split([g.numel() for g in grads]), strict=True):
            p.grad = part.view_as(p)

    def _after_step(
        self, state: State, last: bool, loss: float, rate: float, elapsed: float, tokens: int, progress: Callable[..., None]
    ) -> None:
        step = state.step
        row = {
            "train_loss": loss,
            "learning_rate": rate,
            "step_time": elapsed,
            "tokens_per_second": tokens / elapsed,
            "peak_memory_gb": peak_memory_gb(self.device),
        }
        progress(step - self.start, self.total_steps, f"epoch {self._epoch(step):.2f}  loss {loss:.3f}")
        validate = step % self.eval.interval == 0 or (last and self.eval.final_validation)
        if validate:
            row.update(self._validate(state))
        if validate or step % self.train.log_interval == 0:
            self._log(state, row)
        if self.train.save_interval and step % self.train.save_interval == 0:
            self.save(step)

    def _epoch(self, step: int) -> float:
        return round(step / self.batches.per_epoch, 4)

    def _log(self, state: State, row: dict[str, float]) -> None:
        if self.log:
            self.log(state.step, {"step": state.step, "epoch": self._epoch(state.step), **row})

    def _validate(self, state: State) -> dict[str, float]:
        """Mean loss per token over the validation samples, and its perplexity."""
        self.model.eval()
        sums = torch.zeros(2, device=self.device)
        with torch.no_grad():
            for rows in self.val_batches:
                sums[0] += self._loss(self.val_activations, rows)
                sums[1] += sum(sum(self.val_samples[i].loss_mask) for i in rows)
        loss, count = self.world.sum(sums).tolist()
        loss /= count
        state.losses.append((state.step, loss))
        result = {"val_loss": loss, "val_ppl": math.exp(min(loss, 700.0))}
        self.console.say(f"step {state.step}: validation loss {loss:.4f}, perplexity {result['val_ppl']:.2f}")
        self.answer()
        return result

    @property
    def val_samples(self) -> Sequence[Sample]:
        return self.val_activations.samples
