"""Loops over random samples and a tiny model, and the same steps written out by hand."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from litgpt.activations.cache import Recompute
from litgpt.args import EvalArgs, TrainArgs
from litgpt.logs import Console
from litgpt.lora import mark_only_lora_as_trainable
from litgpt.objectives.base import Objective
from litgpt.sample import Sample
from litgpt.train.interrupts import Interrupts
from litgpt.train.loop import Batches, Loop, samples_of
from litgpt.train.parallel import Rank
from litgpt.train.phase import Phase
from litgpt.train.resume import State
from tests.helpers import tiny

CPU = torch.device("cpu")
ALONE = Rank()
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}
RATE = 0.05

SKIP: dict[str, Any] = {"skip2lora_enabled": True, "skip2lora_block_indices": [0, 2], "lora_r": 3, "lora_alpha": 5}
LAYERS = {"lora_query": True, "lora_value": True, "lora_mlp": True}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {**tiny.ALL_LORA, "lora_r": 3},
    "late LoRA": {**LAYERS, "lora_r": 3, "lora_block_indices": [3, 4]},
    "lm_head": SKIP,
    "ln_f": {**SKIP, "skip2lora_output_layer": "transformer.ln_f"},
    "block": {**SKIP, **LAYERS, "skip2lora_output_layer": "transformer.h.3"},
    "full": {},
}
CUTS = [name for name in METHODS if name not in ("LoRA", "full")]


class Heard(Console):
    """Keeps what was said and shown; `in` looks for a part of a line."""

    def __init__(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        super().__init__(active=False, verbose=True)
        self.lines: list[str] = []
        self.shown: list[tuple[int, int]] = []
        self.on_progress = progress

    def say(self, text: str) -> None:
        self.lines.append(text)

    @contextmanager
    def progress(self, title: str, begun: int = 0) -> Iterator[Callable[..., None]]:
        def show(done: int, total: int, note: str = "") -> None:
            self.shown.append((done, total))
            self.on_progress(done, total)

        yield show

    def __contains__(self, part: str) -> bool:
        return any(part in line for line in self.lines)


def make_samples(count: int, seed: int = 0) -> list[Sample]:
    """Samples of 4 to 20 tokens with 1 to all of them carrying loss."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(4, 21, (), generator=generator))
        learned = int(torch.randint(1, length, (), generator=generator))
        ids = torch.randint(101, (length,), generator=generator).tolist()
        samples.append(Sample(array("i", ids), bytearray([0] * (length - learned) + [1] * learned)))
    return samples


def make_model(method: str = "lm_head", **settings: Any) -> Any:
    model = tiny.tiny(**{**METHODS[method], **settings})
    if method != "full":
        mark_only_lora_as_trainable(tiny.move_adapters(model, size=0.1))
    return model


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


class Log:
    """The rows that the loop logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def __call__(self, step: int, row: dict[str, float]) -> None:
        assert row["step"] == step
        self.rows.append(row)


class Saved:
    """The checkpoints that the loop asks for: (step, kept), and "best" with its step; `act` is called with each step."""

    def __init__(self, act: Callable[[int], None] = lambda step: None) -> None:
        self.asked: list[tuple[int, bool]] = []
        self.bests: list[tuple[int, float]] = []
        self.act = act

    def step(self, state: State, loop: Any, kept: bool) -> None:
        self.asked.append((state.step, kept))
        self.act(state.step)

    def prove(self) -> None:
        pass

    def folder(self, name: str, measured: dict[str, Any]) -> None:
        assert name == "best"
        self.bests.append((measured["step"], measured["val_loss"]))


class Training(Phase):
    """A phase and its loop in one."""

    def run(self, state: State | None = None) -> State:  # type: ignore[override]
        state = state or State()
        super().run(state)
        state.phase = None
        return state

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loop, name)


def column(loop: Training, name: str) -> list[float]:
    return [row[name] for row in logged(loop) if name in row]


def logged(loop: Training) -> list[dict[str, float]]:
    log: Any = loop.log
    return log.rows


def make_loop(
    model: Any,
    samples: Sequence[Sample],
    val: Sequence[Sample] = (),
    *,
    eval: EvalArgs | None = None,
    optimizer: Callable[[list[Any]], Any] = lambda parameters: torch.optim.AdamW(parameters, lr=RATE),
    rank: Rank = ALONE,
    seed: int = 1,
    source: Any = None,
    saved: Saved | None = None,
    interrupts: Interrupts | None = None,
    answer: Callable[[], None] = lambda: None,
    objective: Objective | None = None,
    **train: Any,
) -> Training:
    """A loop over the samples; the same samples for validation unless others are given. Constant learning rate unless said otherwise."""
    settings = {"global_batch_size": 4, "micro_batch_size": 2, "lr_warmup_steps": 0, "min_lr": RATE, "epochs": 1, "save_interval": None}
    arguments = TrainArgs(**{**settings, **train})
    objective = objective or Objective()
    group = objective.group
    own_val = samples_of(range(rank.index, len(val or samples) // group, rank.size), group)
    loop = Loop(
        model=model,
        optimizer=optimizer([p for p in model.parameters() if p.requires_grad]),
        train=arguments,
        batches=Batches(samples, arguments.global_batch_size * group, rank, seed, group=group),
        activations=source or Recompute(model, samples, CPU),
        rank=rank,
        objective=objective,
    )
    return Training(
        title="training",
        loop=loop,
        eval=eval or EvalArgs(interval=10_000, final_validation=False),
        val_batches=[own_val[i : i + 3 * group] for i in range(0, len(own_val), 3 * group)],
        val_activations=Recompute(model, val or samples, CPU),
        log=Log(),  # type: ignore[arg-type]
        console=Console(active=False),
        checkpoints=saved or Saved(),  # type: ignore[arg-type]
        interrupts=interrupts or Interrupts(),
        answer=answer,
    )


def by_hand(model: Any, samples: Sequence[Sample], rows: Sequence[int]) -> torch.Tensor:
    """Mean loss per token of a batch: each sample alone through the whole model, targets that carry no loss ignored."""
    total, count = torch.zeros(()), 0
    for i in rows:
        ids, mask = torch.tensor(samples[i].input_ids), torch.tensor(list(samples[i].loss_mask), dtype=torch.bool)
        targets = torch.where(mask, ids, -100)[1:].long()
        total = total + F.cross_entropy(model(ids[None, :-1])[0], targets, ignore_index=-100, reduction="sum")
        count += int(mask.sum())
    return total / count


def train_by_hand(model: Any, samples: Sequence[Sample], batches: Sequence[Sequence[int]], optimizer: Any) -> list[float]:
    model.train()
    losses = []
    for rows in batches:
        loss = by_hand(model, samples, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def record_gradients(loop: Training) -> list[list[torch.Tensor]]:
    """The gradients that each optimizer step sees."""
    seen: list[list[torch.Tensor]] = []
    step = loop.optimizer.step

    def recording(*args: Any) -> Any:
        seen.append([p.grad.clone() for p in loop.trained])
        return step(*args)

    loop.optimizer.step = recording  # type: ignore[method-assign,assignment]
    return seen
