"""The training loop. There is one, for every method, with or without a cache."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import or_
from typing import NamedTuple

import torch

from litgpt.activations.cache import Activations
from litgpt.args import TrainArgs
from litgpt.device import is_finite
from litgpt.errors import NonFiniteError
from litgpt.logs import peak_memory_gb
from litgpt.lora import GPT
from litgpt.loss import HeadLoss
from litgpt.objectives.base import Objective, View
from litgpt.optim import learning_rate
from litgpt.sample import Sample
from litgpt.sharding import part_of, take_used
from litgpt.train.parallel import Rank
from litgpt.train.resume import State, random_states

SORTED_BATCHES = 50  # batches among which `train.group_by_length` sorts samples: with more, lengths are closer and batches less random
SCALE_STEPS = 2000  # steps after which the loss scale is doubled
NAMED = 8  # samples in a message
DIVERGED = 2.0  # times the loss of a uniform guess, or the first loss if it was higher
REMEDY = "lower the learning rate, set train.max_norm, or use another precision"


class Batch(NamedTuple):
    """This rank's samples of a step, and the counts of the whole global batch."""

    indices: list[int]
    weight: float  # sum of the loss tokens' weights: their number, unless the data have weights
    tokens: int  # input tokens
    most: int  # samples of the rank that has the most


@dataclass
class Batches:
    """Divides samples into global batches. The division depends only on (seed, epoch), not on the number of ranks.

    The ranks share a batch evenly. With `by_owner`, rank k takes the samples k, k + ranks, ... in every epoch, so that its cache holds
    all that it needs.
    """

    samples: Sequence[Sample]
    size: int  # samples of a global batch
    rank: Rank
    seed: int
    by_length: bool = False  # group samples of similar length
    by_owner: bool = False
    group: int = 1  # samples that stay together, a unit (`litgpt.objectives.base`); `size` is a multiple

    def owned(self, rank: int) -> list[int]:
        """Return the samples that a rank takes with `by_owner`; all of them without."""
        units = len(self.samples) // self.group
        return samples_of(range(rank, units, self.rank.size) if self.by_owner else range(units), self.group)

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch; the last batch of an epoch may be smaller."""
        return math.ceil(len(self.samples) / self.size)

    @property
    def tokens_per_epoch(self) -> int:
        return sum(sample.n_inputs for sample in self.samples)

    def cache_mode(self, mode: str, train: TrainArgs) -> str:
        """Return the mode of the samples' cache: "auto" is "off" if no sample is needed twice, as far as is known beforehand."""
        limits = ((train.epochs, 1), (train.max_steps, self.per_epoch), (train.max_tokens, self.tokens_per_epoch))
        repeats = all(limit is None or limit > epoch for limit, epoch in limits)
        return "off" if mode == "auto" and not repeats else mode

    def after(self, steps: int) -> Iterator[Batch]:
        """Yield the batches of one epoch after another, endlessly, skipping the first `steps`."""
        first, skipped = divmod(steps, self.per_epoch)
        for epoch in itertools.count(first):
            yield from itertools.islice(self.epoch(epoch), skipped if epoch == first else 0, None)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        order: list[int] = torch.randperm(len(self.samples) // self.group, generator=generator).tolist()
        if self.by_length:
            order = self._grouped(order, generator)
        ranks, size = self.rank.size, self.size // self.group
        for start in range(0, len(order), size):
            units = order[start : start + size]
            parts = [[unit for unit in units if unit % ranks == k] if self.by_owner else units[k::ranks] for k in range(ranks)]
            own = samples_of(parts[self.rank.index], self.group)
            yield self.batch(own, samples_of(units, self.group), self.group * max(map(len, parts)))

    def batch(self, own: list[int], everyone: list[int], most: int) -> Batch:
        """Return this rank's samples `own` of the global batch `everyone`; `most`: samples of the rank that has the most."""
        samples = [self.samples[i] for i in everyone]
        return Batch(own, sum(sample.weight for sample in samples), sum(sample.n_inputs for sample in samples), most)

    def _grouped(self, order: list[int], generator: torch.Generator) -> list[int]:
        """Return units sorted by length within `SORTED_BATCHES` batches, with these batches shuffled; an incomplete batch stays last."""
        size, lengths = self.size // self.group, [len(sample.input_ids) for sample in self.samples]
        complete = len(order) // size * size
        batches = []
        for start in range(0, complete, SORTED_BATCHES * size):
            part = sorted(
                order[start : min(start + SORTED_BATCHES * size, complete)],
                key=lambda unit: max(lengths[i] for i in samples_of((unit,), self.group)),
            )
            batches += [part[k : k + size] for k in range(0, len(part), size)]
        return [i for k in torch.randperm(len(batches), generator=generator) for i in batches[k]] + order[complete:]


def samples_of(units: Iterable[int], group: int) -> list[int]:
    """Return the sample indices of units of `group` samples each."""
    return [group * unit + k for unit in units for k in range(group)]


@dataclass
class Loop:
    """One phase of training: the model, what it is trained on, and for how long."""

    model: GPT
    optimizer: torch.optim.Optimizer
    train: TrainArgs
    batches: Batches
    activations: Activations
    rank: Rank
    objective: Objective = field(default_factory=Objective)
    say: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        self.head_loss = HeadLoss.of(self.model)
        self.micro_batch = self.train.micro_batch_size * self.objective.group
        self.measured: dict[str, float] = {}  # the last validation's figures besides the loss
        places = {id(p): k for k, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"])}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.weights = sorted(trained, key=lambda p: places.get(id(part_of(p)), 0))  # in the optimizer's order
        self.trained = [part_of(p) for p in self.weights]
        self.spare = self.batches.owned(self.rank.index)[: self.objective.group] if self.rank.sharded else []
        self.is_half = torch.float16 in (self.model.dtype, self.rank.mixed)  # small gradients would vanish (arXiv 1710.03740)
        self.highest_sound = DIVERGED * math.log(self.model.config.V)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        train, per_epoch = self.train, self.batches.per_epoch
        limits = [steps for steps in (train.epochs and train.epochs * per_epoch, train.max_steps) if steps is not None]
        self.most_steps = min(limits, default=None)
        if train.max_tokens is not None:
            limits.append(math.ceil(train.max_tokens * per_epoch / self.batches.tokens_per_epoch))
        self.total_steps = min(limits, default=None)  # None if only the clock ends training
        warmup = train.lr_warmup_steps or 0
        if train.lr_warmup_fraction is not None and self.total_steps:
            warmup = round(train.lr_warmup_fraction * self.total_steps)
        self.warmup = min(warmup, self.total_steps) if self.total_steps else warmup

    def step(self, state: State, batch: Batch) -> dict[str, float]:
        """Take one optimizer step and return its metrics: the mean loss of the global batch, learning rate, time, memory.

        Each micro-batch's sum of losses is divided by the weight of the whole global batch, so accumulation, and several processes,
        give the gradient of one large batch. A step with a non-finite loss or gradient is not taken: NonFiniteError is raised, unless
        `train.skip_nonfinite` is set. In fp16 the loss is scaled.
        """
        start = time.perf_counter()
        step = state.step - (state.phase.step if state.phase else 0)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = learning_rate(step, peak, self.warmup, self.total_steps, self.train.min_lr)
        state.random = random_states(self.rank.device)
        self.model.train()
        total = torch.zeros((), device=self.rank.device)
        divisor, scale = self._begin(batch), state.loss_scale if self.is_half else 1.0
        used = take_used(self.weights)  # none yet
        for first in range(0, batch.most if self.rank.sharded else len(batch.indices), self.micro_batch):
            if micro_batch := batch.indices[first : first + self.micro_batch]:
                loss = self.loss(self.activations, micro_batch) / divisor
            else:  # a sharded model runs in all processes at the same time
                loss = self.loss(self.activations, batch.indices[: self.objective.group] or self.spare) * 0.0
            (loss * scale).backward()
            total += loss.detach()
            if micro_batch:
                used = [*map(or_, used, take_used(self.weights))]
        total = self.rank.sum(total)
        self.rank.share_gradients(self.weights, used)
        if scale != 1:
            torch._foreach_div_([p.grad for p in self.trained if p.grad is not None], scale)
        norm = self.rank.gradient_norm(self.weights)
        mean, size = torch.stack((total, norm.to(total))).tolist()  # a GPU is waited for once
        if self._is_finite(state, batch.indices, {"loss": mean, "gradient norm": size}):
            if self.train.max_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.trained, self.train.max_norm, norm)
            state.consistent = False
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        elapsed = time.perf_counter() - start
        state.advance(batch.tokens, elapsed)
        return {
            "train_loss": mean,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "step_time": elapsed,
            "tokens_per_second": batch.tokens / elapsed,
            "peak_memory_gb": peak_memory_gb(self.rank.device),
        }

    def loss(self, activations: Activations, indices: Sequence[int]) -> torch.Tensor:
        """Return the sum of the objective's losses of these samples."""
        with self.rank.autocast():
            return self.model.within(lambda: self.objective.loss(self.view(activations), indices))

    def view(self, activations: Activations, spare: Sequence[int] = ()) -> View:
        """Return the objective's view of the model and its samples."""
        return View(self.model, activations, self.head_loss, self.micro_batch, spare)

    def _begin(self, batch: Batch) -> float:
        """Return the weight of the global batch."""
        view = self.view(self.activations, self.spare)
        with self.rank.autocast():
            self.objective.begin(view, batch.indices, self.rank)
        if self.objective.is_token_mean:
            return batch.weight
        weight = self.objective.weight(view, batch.indices) if batch.indices else 0  # other processes may have more samples
        own = torch.tensor(float(weight), device=self.rank.device)
        return self.rank.sum(own).item()

    @torch.no_grad()
    def validate(self, activations: Activations, batches: Sequence[list[int]], is_stopped: Callable[[], bool]) -> float:
        """Return the mean loss over the batches of all processes; a partial mean if `is_stopped` becomes true."""
        self.model.eval()
        objective = self.objective
        spare = (batches[0] if batches else [])[: objective.group] or list(range(objective.group))
        view = self.view(activations, spare)
        with self.rank.autocast():
            objective.begin(view, [i for indices in batches for i in indices], self.rank)
        sums = torch.zeros(2 + len(objective.tally), device=self.rank.device)
        objective.tally.zero_()
        for indices in batches:
            if is_stopped():
                break
            if not indices:  # others have more samples of a sharded model
                self.loss(activations, spare)
                continue
            sums[0] += self.loss(activations, indices)
            sums[1] += objective.weight(view, indices)
            sums[2:] = objective.tally
        (loss, count), tally = self.rank.sum(sums).split([2, len(objective.tally)])
        self.measured = objective.figures(tally)
        loss, count = loss.item(), count.item()
        return loss / count if count else math.nan

    def is_over(self, state: State) -> bool:
        """Return whether a limit is reached. Limits count from the start of the state's phase."""
        train, phase = self.train, state.phase
        assert phase is not None
        steps, tokens = state.step - phase.step, state.tokens - phase.tokens
        out_of_steps = self.most_steps is not None and steps >= self.most_steps
        out_of_tokens = train.max_tokens is not None and tokens >= train.max_tokens
        out_of_time = train.max_time is not None and self.rank.any(phase.clock.seconds >= train.max_time)
        return out_of_steps or out_of_tokens or out_of_time

    def _is_finite(self, state: State, indices: list[int], values: dict[str, float]) -> bool:
        """Return whether the step can be taken. If not, raise NonFiniteError, or with `train.skip_nonfinite` report and count it."""
        wrong = [f"the {name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if not wrong:
            grows = self.is_half and (state.step + 1) % SCALE_STEPS == 0
            state.loss_scale *= 2 if grows else 1
            return True
        if self.is_half and state.loss_scale > 1 and math.isfinite(values["loss"]):
            state.loss_scale /= 2
            self.say(f"step {state.step + 1}: the gradients overflow in 16 bits: the step is skipped, and the loss scale is lowered")
            return False
        if self.train.skip_nonfinite:
            state.skipped += 1
            self.say(f"step {state.step + 1}: {wrong[0]} in a batch with samples {indices[:NAMED]}: the step is skipped")
            return False
        culprits = self._culprits(indices)
        others = [i for i in self.batches.owned(self.rank.index) if i not in indices][: 4 * self.objective.group]
        # Weights that give every sample a non-finite or huge loss diverged in an earlier step: they must not replace sound ones.
        spared = len(culprits) < len(indices) or len(self._culprits(others)) < max(1, len(others))
        is_huge = math.isfinite(values["loss"]) and not self.is_sound(state, values["loss"])
        state.consistent = self.rank.any(spared) and not is_huge
        where, samples = "", culprits or indices
        if self.rank.size > 1:
            guilty = self.rank.which(bool(culprits)) or list(range(self.rank.size))
            where = f" on rank {', '.join(map(str, guilty))}"
            padded = torch.tensor([*samples, *[-1] * NAMED])[:NAMED]
            samples = [i for k in guilty for i in self.rank.gather(padded)[k].tolist() if i >= 0]
        raise NonFiniteError(
            f"step {state.step + 1}: {wrong[0]}{where} in a batch with samples {(samples if where else indices)[:NAMED]}: {REMEDY}; "
            "train.skip_nonfinite true skips such steps. The weights were not changed by this step",
            samples,
        )

    def is_sound(self, state: State, loss: float) -> bool:
        """Return False if weights with this training loss have diverged."""
        if state.step == 1 and math.isfinite(loss):
            self.highest_sound = max(self.highest_sound, DIVERGED * loss)
        return loss <= self.highest_sound

    def require_finite(self, state: State) -> None:
        """Raise NonFiniteError if a trained weight is not finite."""
        is_sound = all(is_finite(part_of(p)) for p in self.trained)
        if self.rank.agreed(not is_sound):
            state.consistent = False
            raise NonFiniteError(f"step {state.step}: the trained weights are not finite: {REMEDY}")

    @torch.no_grad()
    def _culprits(self, indices: list[int]) -> list[int]:
        """Return the samples that have a non-finite loss on their own; none for a sharded model, which one process cannot run."""
        if self.rank.sharded:
            return []
        self.model.eval()
        group = self.objective.group
        units = [list(indices[k : k + group]) for k in range(0, len(indices), group)]
        return [i for unit in units if not math.isfinite(self.loss(self.activations, unit).item()) for i in unit]
