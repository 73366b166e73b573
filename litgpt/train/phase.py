"""A phase of a run, warm-up or training: its loop, and validation, logs and checkpoints after steps."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from litgpt.activations.cache import Activations
from litgpt.args import EvalArgs
from litgpt.errors import NonFiniteError, Stopped, UserError
from litgpt.logs import Console, MetricLoggers
from litgpt.text import counted, sparkline
from litgpt.train.interrupts import Interrupts
from litgpt.train.loop import REMEDY, Loop
from litgpt.train.out_dir import Checkpoints
from litgpt.train.resume import PhaseStart, State

SHOWN = {"val_ppl": "perplexity {:.2f}", "val_accuracy": "accuracy {:.1%}"}
COURSES = 256  # a sparkline reads all losses, so it is redrawn only after every 1/256 of the steps so far


@dataclass
class Phase:
    """Everything around the steps of a loop."""

    title: str
    loop: Loop
    eval: EvalArgs
    val_batches: list[list[int]]
    val_activations: Activations
    log: MetricLoggers | None
    console: Console
    checkpoints: Checkpoints
    interrupts: Interrupts
    answer: Callable[[], None]  # shows the model's answer to the example
    losses: list[float] = field(default_factory=list)  # of this session's steps
    _course: str = ""
    saved_at: float = field(default_factory=lambda: time.perf_counter())

    def run(self, state: State) -> None:
        """Train until a limit is reached or validations end it; validate first if that is due. Signals wait for the end of a step."""
        phase = state.phase = state.phase or PhaseStart(state.step, state.tokens)
        phase.clock.began = time.perf_counter()  # reading data and filling caches is not training, nor is it in a resumed session
        with self.interrupts.held(), self.console.progress(self.title, state.step - phase.step) as self._progress:
            if state.pending is not None:
                self._finish_step(state, state.pending, validate=True)
            elif self.eval.initial_validation and not state.losses:
                self._progress(0, self.loop.total_steps, "validation before training")
                self._log(state, self._validate(state))
            batches = self.loop.batches.after(state.step - phase.step)
            over = self.is_done(state) or (state.step > phase.step and self.loop.is_over(state))
            while not over:
                metrics = self.loop.step(state, next(batches))
                over = self.on_step(state, metrics, self.loop.is_over(state))
            self._stop_if_asked()

    def on_step(self, state: State, metrics: dict[str, float], is_last: bool) -> bool:
        """Validate, log and save after a step, whichever is due. Returns True to end training. Raises Stopped if a signal arrived."""
        assert state.phase is not None
        if self.loop.is_sound(state, metrics["train_loss"]):
            self.checkpoints.prove()
        self.losses.append(metrics["train_loss"])
        if len(self.losses) % (1 + len(self.losses) // COURSES) == 0:
            self._course = sparkline(self.losses)
        note = f"epoch {self._epoch(state.step):.2f}  loss {metrics['train_loss']:.3f} {self._course}"
        self._progress(state.step - state.phase.step, self.loop.total_steps, note)
        self._finish_step(state, metrics, state.step % self.eval.interval == 0 or (is_last and self.eval.final_validation))
        over = is_last or self.is_done(state)
        if over:
            self.loop.require_finite(state)
        return over

    def _finish_step(self, state: State, metrics: dict[str, float], validate: bool) -> None:
        train = self.loop.train
        if validate:
            state.pending = metrics
            metrics = {**metrics, **self._validate(state)}
            state.pending, state.saved = None, False
        if validate or state.step % train.log_interval == 0:
            self._log(state, metrics)
        minutes = train.save_every_minutes
        late = minutes is not None and time.perf_counter() - self.saved_at >= 60 * minutes
        kept = train.save_interval is not None and state.step % train.save_interval == 0
        if kept or self.loop.rank.any(late):
            self.loop.require_finite(state)
            try:
                self.checkpoints.step(state, self.loop, kept)
            except UserError as error:
                if kept:
                    raise
                self.console.say(f"step {state.step}: {error}")  # nobody requested this checkpoint: the run continues without it
            self.saved_at = time.perf_counter()
        self._stop_if_asked()

    def _validate(self, state: State) -> dict[str, float]:
        """Return the validation loss and its perplexity; show a sample answer. Raises Stopped if a signal arrives."""
        rank = self.loop.rank
        loss = self.loop.validate(self.val_activations, self.val_batches, lambda: rank.agreed(self.interrupts.asked is not None))
        self._stop_if_asked()
        if not math.isfinite(loss):
            state.consistent = False
            raise NonFiniteError(f"step {state.step}: the validation loss is {loss}: {REMEDY}")
        self.loop.require_finite(state)
        if state.add_loss(loss) and self.loop.train.keep_best:
            self.checkpoints.folder("best", {"step": state.step, "val_loss": loss})
        own = self.loop.measured or {"val_ppl": math.exp(min(loss, 700.0))}  # perplexity is defined for a mean over tokens
        shown = [SHOWN[name].format(value) for name, value in own.items()]
        self.console.say(f"step {state.step}: {', '.join([f'validation loss {loss:.4f}', *shown])}")
        self.answer()
        return {"val_loss": loss, **own}

    def is_done(self, state: State) -> bool:
        """Return whether validation ends this phase: the last `eval.patience` did not improve, or the last reached `eval.target_loss`."""
        assert state.phase is not None
        begin, patience, target = state.phase.step, self.eval.patience, self.eval.target_loss
        if patience is not None and state.best is not None:
            since = max(state.best[0], begin)
            in_vain = sum(step > since for step, _ in state.losses)
            if in_vain >= patience:
                best = f"no better validation loss than {state.best[1]:.4f} in {counted(in_vain, 'validation')}"
                self.console.say(f"step {state.step}: {best}: training ends")
                return True
        step, loss = state.losses[-1] if state.losses else (begin, math.inf)
        if target is None or step <= begin or loss > target:
            return False
        if step == state.step:
            self.console.say(f"step {step}: the validation loss is at most eval.target_loss, {target:g}: training ends")
        return True

    def _stop_if_asked(self) -> None:
        """Raise Stopped if a signal arrived in any process, with the same signal in all."""
        rank = self.loop.rank
        if signalled := rank.which(self.interrupts.asked is not None):
            number = int(rank.gather(torch.tensor([self.interrupts.asked or 0])).max())
            raise Stopped(number, f"rank {', '.join(map(str, signalled))} " if len(signalled) < rank.size else "")

    def _epoch(self, step: int) -> float:
        return round(step / self.loop.batches.per_epoch, 4)

    def _log(self, state: State, metrics: dict[str, float]) -> None:
        if self.log:
            self.log(state.step, {"step": state.step, "epoch": self._epoch(state.step), **metrics})
