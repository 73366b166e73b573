"""A job at work, from its first step or from a checkpoint to its final folder, or to the fault or signal that ends it earlier."""

from __future__ import annotations

import gc
import shutil
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from litgpt import atomic, checkpoint
from litgpt.activations.cache import ActivationCache, Activations, CacheSettings, activations
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data.base import render
from litgpt.errors import NonFiniteError, OutOfMemory, Stopped, UserError
from litgpt.logs import MetricLoggers
from litgpt.lora import end_warmup, start_warmup
from litgpt.optim import make_optimizer
from litgpt.prompts import save_prompt_style
from litgpt.sample import Sample
from litgpt.text import text_table
from litgpt.train import out_dir as place
from litgpt.train.faults import ends_together, is_out_of_memory, out_of_memory
from litgpt.train.interrupts import Signals
from litgpt.train.loop import Batches, Loop, World, samples_per_rank
from litgpt.train.report import readable, report
from litgpt.train.resume import Identity, Saved, State, Stopwatch, environment, identity
from litgpt.train.saver import Checkpoints, best_on_disk

if TYPE_CHECKING:
    from litgpt.train.run import Job, Prepared


class Session:
    """One session of a run. What is known of the weights is saved before a signal or a fault ends it."""

    def __init__(self, ready: Prepared, folder: place.Place, signals: Signals, clock: Stopwatch, saved: Saved | None) -> None:
        """Raises UserError if the run that was `saved` is another one. Nothing is written before that is clear."""
        self.ready, self.job, self.signals, self.saved = ready, ready.job, signals, saved
        self.model, self.console, self.fabric, self.device = ready.model, ready.console, ready.fabric, ready.fabric.device
        fabric = self.fabric
        self.world = World(fabric.global_rank, fabric.world_size, lambda tensor: _sum(fabric, tensor))
        self.state, self.cached = State(clock=clock), dict[str, bool]()
        self.loop: Loop | None = None
        self.is_filling = False
        whose = self._identity()
        if saved is not None:
            self._go_on_from(saved, whose, clock)
        resumed_at = self.state.step - (self.state.pending is not None) if saved else None
        self.log = None
        if self.world.rank == 0:
            self.log = MetricLoggers(self.job.out_dir, self.job.logger_name, self.job.log, self.job.hyperparameters, resumed_at)
        folder.make(resumed=saved is not None)
        self._warn_of_space()
        self.checkpoints = Checkpoints(
            out_dir=self.job.out_dir,
            write=self._write,
            facts={"identity": whose.facts(), "environment": environment(self.device), "cached": self.cached},
            keep_last=self.job.train.keep_last,
            keep_best=self.job.train.keep_best,
            gather=self._gather,
            barrier=fabric.barrier,
            log=self.log,
            newest=saved.folder if saved else None,
            newest_of=(self.state.step, self.state.pending is not None) if saved else None,
        )

    def run(self) -> dict[str, Any]:
        """Train and save; the report. Raises Stopped, NonFiniteError, OutOfMemory or UserError, each saying what can be gone on from."""
        with ends_together(self.fabric, lambda: self._rescue("Stopped", together=False)):
            try:
                loop = self._train()
                with self.signals.held():
                    return self._finish(loop)
            except Stopped as stop:
                raise Stopped(stop.signum, self._rescue(f"stopped after step {self.state.step}")) from None
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}. {self._quote(error.samples)}{self._rescue('Stopped')}", error.samples) from None
            except Exception as error:
                if is_out_of_memory(error):
                    raise OutOfMemory(f"{self._out_of_memory(error)}. {self._rescue('Stopped', together=False)}") from None
                if isinstance(error, OSError):
                    told = f"{error.filename or 'input or output'}: {error.strerror or error}"
                    raise UserError(f"{told}. {self._rescue('Stopped', together=False)}") from None
                raise

    def _identity(self) -> Identity:
        """What a later session must have in common with this one."""
        resolved = {"precision": self.ready.precision, "processes": self.world.size, "skip2lora_cache": self.job.cache_mode != "off"}
        splits, config = self.ready.splits, self.model.config.base_dict()
        return identity(self.job.hyperparameters, resolved, self.ready.base, config, splits.train, splits.val)

    def _go_on_from(self, saved: Saved, whose: Identity, clock: Stopwatch) -> None:
        if changes := whose.changes(saved.facts["identity"]):
            raise UserError(
                f"resume: {saved.folder} belongs to another run: {'; '.join(changes)}. Resume with what it was begun with, or start anew "
                "in another --out_dir"
            )
        self.ready.method.load(self.model, saved.folder)
        self.state = saved.state
        self.state.clock.began = clock.began
        self.console.say(f"resumed from {saved.folder}")
        before, now = saved.facts["environment"], environment(self.device)
        others = [f"{name} {before.get(name)} then, {value} now" for name, value in now.items() if before.get(name) != value]
        if others:
            self.console.say(f"the figures may differ in their last digits from an uninterrupted run's: {'; '.join(others)}")
        if self.job.train.keep_best:
            best = best_on_disk(self.job.out_dir)
            if best is None and self.state.best is not None:
                self.console.say(f"{self.job.out_dir / 'best'} is not whole: the next validation writes it anew")
            self.state.best = best

    def _warn_of_space(self) -> None:
        """A line if the disk has no room for what the final folder will hold."""
        merged = not self.model.config.skip2lora_enabled
        need = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad or merged)
        if self.log is not None and (free := shutil.disk_usage(self.job.out_dir).free) < need:
            sizes = f"{free / 2**30:.2f} GiB are free, final alone needs {need / 2**30:.2f}"
            self.console.say(f"the disk of out_dir {self.job.out_dir} is too full: {sizes}. Make room before the run ends")

    def _train(self) -> Loop:
        """The phases: LoRA's warm-up if there is one, then training."""
        state, phase = self.state, self.ready.method.warmup
        warmup = phase.warmup_steps(self._batches(self.job.train).per_epoch)
        if state.step < warmup or (state.step == warmup and state.pending is not None):
            start_warmup(self.model)
            train = replace(self.job.train, max_steps=warmup, epochs=None, max_tokens=None, max_time=None)
            self._make_loop(train, replace(self.job.eval, patience=None), "off", phase.skip2lora_warmup_lr).run(state, "warm-up")
        if warmup:
            end_warmup(self.model)
            self.loop = None
            if state.step == warmup:
                state.phase = None
                if self.job.train.save_interval:
                    self.checkpoints.rescue(state, None, self.device)
        loop = self._make_loop(self.job.train, self.job.eval, self.job.cache_mode)
        loop.run(state)
        return loop

    def _batches(self, train: TrainArgs) -> Batches:
        rows = samples_per_rank(train, self.world.size)
        return Batches(self.ready.splits.train, rows, self.world, self.job.seed, train.group_by_length)

    def _make_loop(self, train: TrainArgs, evaluation: EvalArgs, cache_mode: str, lr: float | None = None) -> Loop:
        """A loop over what is trainable in the model now, its activations cached if they are needed more than once.

        `lr`: the peak learning rate, if it is not the optimizer's own.
        """
        splits, world, batches = self.ready.splits, self.world, self._batches(train)
        own_val = list(range(world.rank, len(splits.val), world.size))
        val_batches = _chunks(own_val, train.micro_batch_size)[: evaluation.max_iters]
        train_mode = training_cache(cache_mode, train, batches)
        optimizer = make_optimizer(self.job.optimizer, [p for p in self.model.parameters() if p.requires_grad])
        for group in optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        self.is_filling = True
        loop = Loop(
            model=self.model,
            optimizer=optimizer,
            train=train,
            eval=evaluation,
            batches=batches,
            activations=self._activations(splits.train, batches.owned(world.rank), "training", train_mode),
            val_batches=val_batches,
            val_activations=self._activations(splits.val, [i for rows in val_batches for i in rows], "validation", cache_mode),
            world=world,
            device=self.device,
            autocast=self.fabric.autocast,
            log=self.log,
            console=self.console,
            checkpoints=self.checkpoints,
            signals=self.signals,
            answer=self._answerer(),
        )
        self.is_filling = False
        self._restore(loop)
        return loop

    def _restore(self, loop: Loop) -> None:
        """Give the first loop of a resumed session what the checkpoint has for it."""
        self.loop = loop
        if self.saved is None:
            return
        if self.state.phase is not None:
            self.saved.restore(loop.optimizer, self.world.rank, self.device)
        else:
            self.saved.restore_random(self.world.rank, self.device)
        for name, cached in self.saved.facts["cached"].items():
            if self.cached.get(name, cached) != cached:
                now = "kept" if self.cached[name] else "computed for every batch"
                self.console.say(f"{name} activations are {now}, unlike before: the figures may differ in their last digits")
        self.saved = None

    def _activations(self, samples: list[Sample], rows: list[int], name: str, mode: str) -> Activations:
        if self.ready.shared is not None:
            made: Activations = self.ready.shared.view(name, self.model.config.taps)
        else:
            made = fill_or_recompute(self.ready, samples, rows, name, mode)
        self.cached[name] = isinstance(made, ActivationCache)
        return made

    def _answerer(self) -> Callable[[], None]:
        """Shows the answer to the example, if `eval.max_new_tokens` asks for one."""
        job, model, tokenizer, style, console = self.job, self.model, self.ready.tokenizer, self.ready.style, self.console
        rendered = render(self.ready.example, style, tokenizer)
        prompt = rendered.text[: rendered.spans[0][0]]

        def answer() -> None:
            if not job.eval.max_new_tokens or not console.active:
                return
            from litgpt.generate.engine import generate

            ids = torch.tensor(tokenizer.ids(prompt))
            room = min(len(ids) + job.eval.max_new_tokens, model.max_seq_length)
            if room <= len(ids):
                return
            tokens = []
            for token in generate(model, ids, room, temperature=0.0, stop_tokens=style.stop_tokens(tokenizer)):
                tokens.append(token)
                if self.signals.asked is not None:
                    break
            model.clear_kv_cache()
            console.say(f"  asked: {self.ready.example.get('instruction') or prompt}\n  answered: {tokenizer.decode(tokens).strip()}")

        return answer

    def _finish(self, loop: Loop) -> dict[str, Any]:
        """Write the final folder. Adapters, which are small, are saved to go on from before they are merged into the model."""
        if len(loop.trained) < sum(1 for _ in self.model.parameters()):
            self.checkpoints.rescue(self.state, loop.optimizer, self.device)

        def finish(folder: Path) -> None:
            self.state.consistent = False
            self.ready.method.finish(self.model, folder)

        self.model.eval()
        figures = report(self.state, loop, self.device)
        self.checkpoints.final(figures, finish)
        if self.log is not None:
            self.log.close()
        best = self.job.out_dir / "best"
        self.console.say(f"\nfinished: {self.job.out_dir / 'final'}\n{text_table(list(readable(figures, best).items()), left=(0, 1))}")
        return figures

    def _write(self, folder: Path) -> None:
        """What every checkpoint holds."""
        self.ready.method.save(self.model, folder)
        checkpoint.save_config(self.model.config, folder, self.ready.chosen)
        atomic.write_text(folder / "hyperparameters.yaml", yaml.safe_dump(self.job.hyperparameters, sort_keys=False))
        checkpoint.copy_tokenizer_files(self.ready.base, folder)
        save_prompt_style(self.ready.style, folder)

    def _gather(self, own: torch.Tensor) -> torch.Tensor:
        """(n,) bytes of this process -> (processes, n) of all."""
        table = torch.zeros(self.world.size, len(own), dtype=torch.int32, device=own.device)
        table[self.world.rank] = own
        return self.world.sum(table).to(torch.uint8)

    def _rescue(self, what: str, together: bool = True) -> str:
        """Save what is not saved yet, and say where the run can be gone on from. `together`: all processes are here."""
        if self.world.size > 1 and (self.is_filling or not together):
            folder = self.checkpoints.newest
        else:
            with self.signals.held():
                try:
                    folder = self.checkpoints.rescue(self.state, self.loop.optimizer if self.loop else None, self.device)
                except UserError as error:
                    return f"{what}, and that could not be saved: {error}"
        if folder is None:
            return f"{what}: nothing is lost, run the same command again"
        return f"{what}: {folder} is whole, {place.RESUME}"

    def _quote(self, samples: list[int]) -> str:
        if not samples:
            return ""
        train = self.ready.splits.train
        texts = [f"{i}: {self.ready.tokenizer.decode(list(train[i].input_ids[:40]))!r}" for i in samples[:2]]
        return f"The training samples (counted from 0) begin {', '.join(texts)}. "

    def _out_of_memory(self, error: Exception) -> OutOfMemory:
        """The error with figures and remedies. What the failed step held is given back first, for the checkpoint to fit."""
        train, job = self.job.train, self.job
        longest = max(len(sample.input_ids) for sample in self.ready.splits.train)
        remedies = [f"Batches have {train.micro_batch_size} samples of up to {longest} tokens"]
        if train.micro_batch_size > 1:
            remedies.append(f"set train.micro_batch_size below {train.micro_batch_size} (global_batch_size may stay)")
        remedies.append(f"set train.max_seq_length below {longest}")
        if any(self.cached.values()) and job.cache_mode in ("auto", "memory"):
            remedies.append("set skip2lora_cache disk")
        if not self.model.config.skip2lora_enabled:
            remedies.append("use skip2lora_enabled, which keeps no activations of frozen blocks")
        where = "while the activation cache was filled" if self.is_filling else f"after step {self.state.step}"
        told = out_of_memory(error, where, self.device, remedies)
        traceback.clear_frames(error.__traceback__)
        if self.loop is not None:
            self.loop.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return told


def training_cache(mode: str, train: TrainArgs, batches: Batches) -> str:
    """Where the training samples' activations are kept: "auto" keeps them only if they are needed more than once."""
    repeats = train.epochs != 1 and (train.max_steps is None or train.max_steps > batches.per_epoch)
    return "off" if mode == "auto" and not repeats else mode


def fill_or_recompute(ready: Prepared, samples: list[Sample], rows: list[int], name: str, mode: str) -> Activations:
    """`litgpt.activations.cache.activations` for what is ready, its progress shown."""
    with ready.fabric.autocast():
        return activations(ready.model, samples, rows, name, cache_settings(ready, mode), ready.fabric.device)


def cache_settings(ready: Prepared, mode: str) -> CacheSettings:
    """Return where activations are kept; the console shows the progress of filling them."""
    return CacheSettings(mode, cache_folder(ready.job), ready.cache_dtype, ready.console.say, ready.console.progress)


def cache_folder(job: Job) -> Path:
    """The folder for caches on disk."""
    return job.cache_dir or job.out_dir.parent / "activation_cache"


def _sum(fabric: Any, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor added up over all processes."""
    return fabric.all_reduce(tensor, reduce_op="sum") if fabric.world_size > 1 else tensor


def _chunks(rows: list[int], size: int) -> list[list[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
