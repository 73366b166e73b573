"""A training run, from its settings to its final folder, or to the fault or signal that ends it earlier."""

import gc
import math
import shutil
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from litgpt import atomic, checkpoint
from litgpt.activations.cache import ActivationCache, Activations, Recompute, activations, is_cacheable, shared
from litgpt.adapters.settings import readable_by_litgpt
from litgpt.args import EvalArgs, TrainArgs
from litgpt.convert.resolve import open_checkpoint
from litgpt.device import process_rank, use
from litgpt.errors import NonFiniteError, OutOfMemory, Stopped, UserError
from litgpt.files import dump_yaml, nearest, read_json
from litgpt.logs import Console, MetricLoggers, peak_memory_gb, read_metrics
from litgpt.lora import end_warmup, start_warmup
from litgpt.loss import HeadLoss
from litgpt.model import GPT
from litgpt.objectives.base import View
from litgpt.objectives.reference import exchange, refer, reference_model
from litgpt.optim import make_optimizer, multiply_rates
from litgpt.prompts import save_prompt_style
from litgpt.quantize import count
from litgpt.sample import Sample
from litgpt.sharding import part_of
from litgpt.text import counted, one_line, size as shown, text_table
from litgpt.train.examples import answer
from litgpt.train.interrupts import Interrupts, is_out_of_memory, memory_explained, out_of_memory
from litgpt.train.loop import Batches, Loop, samples_of
from litgpt.train.methods import Method
from litgpt.train.out_dir import RESUME, Checkpoints, OutDir, best_on_disk, conclude
from litgpt.train.page import Answers
from litgpt.train.parallel import alone, ends_together
from litgpt.train.phase import Phase
from litgpt.train.prepare import Job, prepare
from litgpt.train.rehearsal import rehearse
from litgpt.train.report import PAGE, REPORT, as_json, figures, next_steps, page_of, summary_rows
from litgpt.train.resume import IDENTITY, Saved, State, Stopwatch, changes, compared_settings, environment, identity, read
from litgpt.train.settings import Run

FIRST = "in the first process"
SHARED = "All machines need the same command, base and data, and to resume a run a folder out_dir that they share"
QUESTION = 100  # characters of a question on the screen; the report has all of it


def run(settings: Run, method: Method, job_of: Callable[[], Job] | None = None) -> dict[str, Any]:
    """Train as the settings say and return the figures of the report; with `dry_run` only say what training would do.

    Raises UserError before anything is written if a setting, file or checkpoint is wrong. `job_of` reads data and model in place of
    `prepare`, for a run of this process alone.
    """
    use(settings.accelerator)
    clock, is_first = Stopwatch(), job_of is not None or process_rank() == 0
    settings.checkpoint_dir = open_checkpoint(settings.checkpoint_dir, convert=not settings.dry_run).resolve()
    checkpoint.require_checkpoint(settings.checkpoint_dir)
    if settings.dry_run:
        if is_first:
            rehearse(settings, method)
        return {}
    with Interrupts() as interrupts, OutDir(settings, is_first) as out_dir:
        if out_dir.is_finished:
            final = settings.out_dir / "final"
            if (final / IDENTITY).is_file():  # an earlier version wrote none
                before = Saved(final, read_json(final / IDENTITY))
                ended = prepare(settings, method, before, alone(settings.precision))
                require_same(final, identity_of(ended), before.facts, type(settings))
            Console(is_first).say(f"{final} exists: this run is finished, nothing is left to do")
            return finished_report(settings.out_dir, settings.train.keep_last, is_first)
        point = out_dir.resume_point(Console(is_first).say)
        saved = read(point) if point else None
        job = job_of() if job_of else prepare(settings, method, saved)
        with ends_together(job.rank):
            job.say_what_is_trained()
            session = Session(job, out_dir, interrupts, clock, saved)
            with session.ended_well():
                for phase in session.phases():
                    phase.run(session.state)
                return session.finish(phase)


def identity_of(job: Job, varying: Collection[str] = ()) -> dict[str, Any]:
    """Return what a resumed run must have in common with this one; for a sweep, without the settings that vary between its trials."""
    resolved = {"precision": job.precision, "skip2lora_cache": job.method.cache != "off"}
    settings = {**compared_settings(job.settings.hyperparameters(), type(job.settings)), **resolved}
    shared = {key: value for key, value in settings.items() if key not in varying}
    return identity(shared, job.settings.checkpoint_dir, job.model.config.base_dict(), job.splits.train, job.splits.val)


def require_same(folder: Path, now: dict[str, Any], before: dict[str, Any], command: type) -> None:
    """Raise UserError, naming every difference, if another run wrote the folder."""
    if different := changes(now, before, command):
        raise UserError(
            f"resume: {folder} belongs to another run: {'; '.join(different)}. Resume with the settings of the run, or start anew "
            "in another --out_dir"
        )


def require_alike(own: dict[str, Any], first: dict[str, Any], step: int = 0, first_step: int = 0) -> None:
    """Raise UserError if this process would not train what the first does, whose `identity` and step are given."""
    differences = changes(own, first, where=FIRST)
    if step != first_step:
        differences.append(f"it continues after step {step}, {FIRST} {first_step}")
    if differences:
        raise UserError(f"this process would train something else: {'; '.join(differences)}. {SHARED}")


def finished_report(out_dir: Path, keep_last: int | None, is_first: bool = True) -> dict[str, Any]:
    """Return the report of the finished run in this folder."""
    report = read_json(out_dir / "final" / REPORT)
    if is_first and not (out_dir / REPORT).is_file():  # it was killed between the two
        conclude(out_dir, report, keep_last)
    return report


class Session:
    """One session of a run: validation, logs and checkpoints after steps, and the rescue of the state when it ends early."""

    def __init__(self, job: Job, out_dir: OutDir, interrupts: Interrupts, clock: Stopwatch, saved: Saved | None) -> None:
        """Raises UserError if `saved` belongs to another run, before anything is written."""
        self.job, self.settings, self.interrupts, self.saved = job, job.settings, interrupts, saved
        self.model, self.console, self.rank = job.model, job.console, job.rank
        self.hyperparameters = job.settings.hyperparameters()
        self.state, self.cached = State(clock=clock), dict[str, bool]()
        self.loop: Loop | None = None  # None while its activations are computed
        self.identity = identity_of(job)
        if saved is not None:
            require_same(saved.folder, self.identity, saved.facts["identity"], type(self.settings))
        step = saved.state.step if saved else 0
        theirs, first_step = self.rank.broadcast((self.identity, step))
        require_alike(self.identity, theirs, step, first_step)
        self.rank.barrier()
        self.objective = job.objective
        self.sources: tuple[Batches, Activations, Activations, list[list[int]]] | None = None
        if self.objective.referred:
            with memory_explained(self.rank.device, "while the reference was computed"):
                self._refer()
        if saved is not None:
            self._resume(saved, clock)
        resumed_at = self.state.step - (self.state.pending is not None) if saved else None
        path = self.settings.out_dir
        self.log = None
        if self.rank.is_first:
            columns = self.objective.columns
            self.log = MetricLoggers(path, self.settings.logger_name, self.settings.log, self.hyperparameters, resumed_at, columns)
        self._require_space()
        out_dir.make(resumed=saved is not None)
        answers = [[example.question, example.answers] for example in job.examples]  # as they are when a checkpoint is written
        facts: dict[str, Any] = {"identity": self.identity, **job.kept, "cached": self.cached, "answers": answers}
        facts["environment"] = environment(self.rank.device)
        self.checkpoints = Checkpoints(path, self._write_contents, facts, self.settings.train.keep_last, self.rank, self.log)
        if saved is not None:
            self.checkpoints.newest = saved.folder
            self.checkpoints.unproven.append(saved.folder)

    def _refer(self) -> None:
        """Give the samples their losses under the reference model: another model, or this one before training."""
        job, settings, other = self.job, self.settings, self.objective.reference
        is_warm = job.method.warmup.has_warmup  # a warm-up changes the frozen blocks' outputs
        self.sources = self._sources(settings.train, settings.eval, "off" if is_warm else job.method.cache)
        batches, own, val, val_batches = self.sources
        model: GPT = self.model
        facts = [checkpoint.weights_file(settings.checkpoint_dir).sha256, job.precision, str(job.method.quantize), str(job.cache_dtype)]
        if other is not None:
            model, facts = reference_model(other, self.model.dtype, self.rank.device, self.rank.sharded)
            own = Recompute(model, job.splits.train, self.rank.device)
        share = samples_of(range(self.rank.index, len(job.splits.train) // batches.group, self.rank.size), batches.group)
        cache = job.cache_settings("disk")
        val_indices = [i for batch in val_batches for i in batch] or list(range(batches.group * self.rank.sharded))
        parts = {"training": (own, share), "validation": (val, val_indices)}
        for name in self.objective.referred:
            source, indices = parts[name]
            spare = indices[: batches.group]
            view = View(model, source, HeadLoss.of(model), settings.train.micro_batch_size * batches.group, spare)
            with self.rank.autocast():
                refer(view, indices, facts, name, cache, self.rank.device)
        if self.rank.size > 1 and not batches.by_owner:
            exchange(job.splits.train, self.rank.sum, self.rank.device)
        if is_warm:
            self.sources = None

    def _resume(self, saved: Saved, clock: Stopwatch) -> None:
        self.job.method.load(self.model, saved.folder)
        self.state = saved.state
        self.state.clock.began = clock.began
        self.console.say(f"resumed from {saved.folder}")
        earlier = dict(saved.facts.get("answers", ()))
        for example in self.job.examples:
            example.answers = [(step, text) for step, text in earlier.get(example.question, ())]
        before, now = saved.facts["environment"], environment(self.rank.device)
        others = [f"{name} {before.get(name)} then, {value} now" for name, value in now.items() if before.get(name) != value]
        if others:
            self.console.say(f"the figures may differ in their last digits from an uninterrupted run's: {'; '.join(others)}")
        if self.settings.train.keep_best:
            best = best_on_disk(self.settings.out_dir)
            if best is None and self.state.best is not None:
                self.console.say(f"{self.settings.out_dir / 'best'} is incomplete: the next validation writes it anew")
            self.state.best = best

    def _require_space(self) -> None:
        """Raise UserError if the disk has no room for the final folder; warn if it has none for everything that a run keeps at once."""
        if self.log is None:
            return
        place = nearest(self.settings.out_dir)
        trained = sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        everything = sum(p.nbytes for p in self.model.parameters())
        is_merged = trained < everything and self.model.config.is_mergeable
        final, disk = trained + is_merged * everything, shutil.disk_usage(place)
        if not disk.total:  # not a disk, such as /proc
            return
        free = disk.free
        total = final + trained * self.settings.train.keep_best + 3 * trained  # a checkpoint has the optimizer's state too
        where = f"the disk of out_dir {self.settings.out_dir} is too full: {shown(free)} are free"
        if free < final:
            raise UserError(f"{where}, final alone needs {shown(final)}. Make room, or name another out_dir")
        if free < total:
            self.console.say(f"{where}, final, best and a checkpoint to resume from need {shown(total)}. Make room before the run ends")

    def phases(self) -> Iterator[Phase]:
        """Yield the phases that are left: LoRA's warm-up if there is one, then training."""
        state, settings, first = self.state, self.settings, self.job.method.warmup
        warmup = first.warmup_steps(self.job.batches(settings.train).per_epoch)
        if state.step < warmup or (state.step == warmup and state.pending is not None):
            start_warmup(self.model)
            train = replace(settings.train, max_steps=warmup, epochs=None, max_tokens=None, max_time=None)
            yield self._phase("warm-up", train, replace(settings.eval, patience=None, target_loss=None), "off", first.skip2lora_warmup_lr)
        if warmup:
            end_warmup(self.model)
            self.loop = None
            if state.step == warmup:
                state.phase = None
                if settings.train.save_interval:
                    self.checkpoints.rescue(state, None)
        yield self._phase("training", settings.train, settings.eval, self.job.method.cache)

    def _sources(self, train: TrainArgs, evaluation: EvalArgs, cache: str) -> tuple[Batches, Activations, Activations, list[list[int]]]:
        """Return batches and activations for training, activations and batches for validation; cached if they are needed more than once."""
        splits, rank, group, size = self.job.splits, self.rank, self.objective.group, train.micro_batch_size
        batches = self.job.batches(train)
        mode = batches.cache_mode(cache, train)
        batches.by_owner = mode != "off" and is_cacheable(self.model)
        n_val = evaluation.validated(len(splits.val) // group, size)
        own_val = range(n_val)[rank.index :: rank.size]
        val_batches = [samples_of(own_val[i : i + size], group) for i in range(0, len(own_val), size)]
        own = self._activations(splits.train, batches.owned(rank.index), "training", mode)
        val_indices = [i for batch in val_batches for i in batch] or list(range(group * rank.sharded))
        val_batches += [[]] * (math.ceil(n_val / rank.size / size) - len(val_batches)) * rank.sharded
        held = None if rank.sharded else shared(own, splits.val, val_indices)
        val = held or self._activations(splits.val, val_indices, "validation", cache)
        return batches, own, val, val_batches

    def _phase(self, title: str, train: TrainArgs, evaluation: EvalArgs, cache: str, lr: float | None = None) -> Phase:
        """Return a phase that trains the parameters that are trainable now.

        `lr`: the peak learning rate, if it is not the optimizer's own.
        """
        optimizer = make_optimizer(self.settings.optimizer, [part_of(p) for p in self.model.parameters() if p.requires_grad])
        for group in optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        multiply_rates(optimizer, self._ratios())
        self.loop = None
        batches, own, val, val_batches = self.sources or self._sources(train, evaluation, cache)
        self.loop = Loop(self.model, optimizer, train, batches, own, self.rank, self.objective, self.console.say)
        if (most := self.loop.total_steps) and self.loop.warmup > max(1, most / 2):
            wanted = f"give --train.lr_warmup_steps {max(1, most // 10)}, or more epochs"
            self.console.say(f"the learning rate rises for {self.loop.warmup} of the {title}'s {counted(most, 'step')}: {wanted}")
        self._restore(self.loop)
        return Phase(
            title, self.loop, evaluation, val_batches, val, self.log, self.console, self.checkpoints, self.interrupts, self._answer
        )

    def _activations(self, samples: list[Sample], indices: list[int], name: str, mode: str) -> Activations:
        if self.job.shared is not None:
            result: Activations = self.job.shared[name].narrowed(self.model.config.taps)
        else:
            with self.rank.autocast():
                result = activations(self.model, samples, indices, name, self.job.cache_settings(mode), self.rank.device)
        self.cached[name] = isinstance(result, ActivationCache)
        return result

    def _ratios(self) -> dict[int, float]:
        """Return the trained parameters' learning rates as multiples of the optimizer's, by `id`. A tied weight has two names."""
        ratios: dict[int, float] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                key, ratio = id(part_of(parameter)), self.job.method.lr_ratio_of(name)
                other = ratios.get(key, 1)
                if ratio != 1 and other not in (1, ratio):
                    raise UserError(f"lr_ratios: {name} shares its weight with another layer, which has the ratio {other:g}")
                ratios[key] = other if ratio == 1 else ratio
        return ratios

    def _restore(self, loop: Loop) -> None:
        """Restore optimizer and random generators for the first loop of a resumed session."""
        if self.saved is None:
            return
        if self.state.phase is not None:
            self.saved.restore(loop.optimizer, loop.weights)
        self.saved.restore_random(self.rank.index, self.rank.device)
        for name, cached in self.saved.facts["cached"].items():
            if self.cached.get(name, cached) != cached:
                now = "cached" if self.cached[name] else "computed for every batch"
                self.console.say(f"{name} activations are {now}, unlike before: the figures may differ in their last digits")
        self.saved = None

    def _answer(self) -> None:
        """Show the model's answers to the examples, if `eval.max_new_tokens` is set, and keep them for the report."""
        if not self.settings.eval.max_new_tokens or not (self.console.active or self.rank.sharded):
            return
        if self.rank.sharded and self.model.switch is not None:  # answer-only LoRA needs a key-value cache
            return
        job, asked, most = self.job, self.interrupts, self.settings.eval.max_new_tokens
        stops = job.style.stop_tokens(job.tokenizer)
        for example in job.examples:
            ids = example.base if not self.state.step else None
            if ids is None:
                ids = answer(self.model, example, most + 1, stops, lambda: asked.asked is not None)
            if asked.asked is not None and not self.rank.sharded:
                return
            if ids is not None:
                is_cut = len(ids) >= most + (ids is not example.base)  # the base's answers have no token more
                text = job.tokenizer.decode(ids[:most]).strip()
                text = text.rstrip("\ufffd") + " ..." if is_cut else text  # without half a character
                example.answers.append((self.state.step, text))
                given, made = ("text", "continued") if example.is_text else ("asked", "answered")
                self.console.say(f"  {given}: {one_line(example.question, QUESTION)}\n  {made}: {text}")

    @property
    def answers(self) -> Answers:
        """The examples that were answered, and their answers."""
        return [(example.question, example.answers) for example in self.job.examples if example.answers]

    def _write_contents(self, folder: Path | None) -> None:
        """Write the contents of every checkpoint into a folder; without one, only take part in gathering the weights."""
        self.job.method.save(self.model, folder)
        if folder is None:
            return
        checkpoint.save_config(self.model.config, folder, self.job.chosen)
        atomic.write_text(folder / "hyperparameters.yaml", dump_yaml(readable_by_litgpt(self.hyperparameters)))
        if checkpoint.is_adapter_folder(folder):
            checkpoint.save_base(self.settings.checkpoint_dir, folder)
        checkpoint.write_tokenizer(self.job.tokenizer_contents, folder)
        save_prompt_style(self.job.style, folder)

    def finish(self, phase: Phase) -> dict[str, Any]:
        """Write the final folder after the last phase and return the report. Adapters are small: they are saved before they are merged."""
        loop, state, out_dir = phase.loop, self.state, self.settings.out_dir
        with self.interrupts.held():
            if len(loop.trained) < sum(1 for _ in self.model.parameters()):
                self.checkpoints.rescue(state, loop)
            self.model.eval()
            trainable = sum(p.numel() for p in loop.weights)
            report = figures(state, loop.batches.per_epoch, trainable, count(self.model), peak_memory_gb(self.rank.device))
            report |= loop.measured

            def finish(folder: Path) -> None:
                state.consistent = False  # merging changes the weights
                atomic.write_text(folder / IDENTITY, as_json({**self.job.kept, **self.identity}))
                if self.job.method.finish(self.model, folder) and report["final_val_loss"] is not None and self.rank.size == 1:
                    report["merged_val_loss"] = replace(loop).validate(phase.val_activations, phase.val_batches, lambda: False)
                about = page_of(self.model.config.name, report, read_metrics(out_dir), self.answers, self.hyperparameters, out_dir / "best")
                atomic.write_text(out_dir / PAGE, about)  # before `final`, which marks the run as finished

            self.checkpoints.folder("final", report, finish)
            if self.log is not None:
                conclude(out_dir, report, self.settings.train.keep_last)
                self.log.close()
                self._conclude(report)
        return report

    def _conclude(self, report: dict[str, Any]) -> None:
        """Print the results and the next steps."""
        out_dir, say = self.settings.out_dir, self.console.say
        rows = summary_rows(report, out_dir / "best", self.settings.eval.target_loss)
        say(f"\nfinished: {out_dir / 'final'}\n{text_table(list(rows.items()), left=(0, 1))}")
        for question, answers in self.answers:
            before = f"\n  before:  {answers[0][1]}" if len(answers) > 1 else ""
            say(f"\n  {one_line(question, QUESTION)}{before}\n  now:     {answers[-1][1]}")
        is_whole = (out_dir / "final" / checkpoint.WEIGHTS).is_file()
        data = self.settings.data
        has_held_out = data is not None and data.mask_prompt and data.held_out_share() > 0
        steps = next_steps(out_dir, self.model.config, self.settings.chat_with(out_dir), is_whole, has_held_out)
        say(f"\nnext:\n{text_table(steps, left=(0, 1))}")

    @contextmanager
    def ended_well(self) -> Iterator[None]:
        """Save the state if the block fails. The error that is raised names the checkpoint to resume."""
        with ends_together(self.rank, lambda: self._rescue("Stopped", together=False)):
            try:
                with self.interrupts.ending():
                    yield
            except Stopped as stop:
                raise Stopped(stop.signum, stop.message + self._rescue(f"stopped after step {self.state.step}")) from None
            except NonFiniteError as error:
                if not self.state.consistent:
                    self.checkpoints.discard_unproven()
                raise NonFiniteError(f"{error}. {self._quote(error.samples)}{self._rescue('Stopped')}", error.samples) from None
            except Exception as error:
                if is_out_of_memory(error):
                    raise OutOfMemory(f"{self._out_of_memory(error)}. {self._rescue('Stopped', together=False)}") from None
                if isinstance(error, OSError):
                    reason = f"{error.filename or 'input or output'}: {error.strerror or error}"
                    raise UserError(f"{reason}. {self._rescue('Stopped', together=False)}") from None
                raise

    def _rescue(self, what: str, together: bool = True) -> str:
        """Save the state if it is not saved yet, and say how to resume. `together`: all processes take part."""
        if self.rank.size > 1 and (self.loop is None or not together):
            folder = self.checkpoints.newest
        else:
            with self.interrupts.held():
                try:
                    folder = self.checkpoints.rescue(self.state, self.loop)
                except UserError as error:
                    return f"{what}, and the state could not be saved: {error}"
        if folder is None:
            return f"{what}: nothing is lost, run the same command again"
        return f"{what}: {folder} is complete, {RESUME}"

    def _quote(self, samples: list[int]) -> str:
        if not samples:
            return ""
        train = self.job.splits.train
        texts = [f"{i}: {self.job.tokenizer.decode(list(train[i].input_ids[:40]))!r}" for i in samples[:2]]
        return f"The training samples (counted from 0) begin {', '.join(texts)}. "

    def _out_of_memory(self, error: Exception) -> OutOfMemory:
        """Return the error with figures and remedies. The memory of the failed step is freed first, to leave room for the checkpoint."""
        train, cache = self.settings.train, self.job.method.cache
        longest = max(len(sample.input_ids) for sample in self.job.splits.train)
        remedies = [f"Batches have {counted(train.micro_batch_size, 'sample')} of up to {longest} tokens"]
        if train.micro_batch_size > 1:
            remedies.append(f"set train.micro_batch_size below {train.micro_batch_size} (global_batch_size may stay)")
        remedies.append(f"set train.max_seq_length below {longest}")
        if any(self.cached.values()) and cache in ("auto", "memory"):
            remedies.append("set skip2lora_cache disk")
        if not self.model.config.skip2lora_enabled:
            remedies.append("use skip2lora_enabled, which keeps no activations of frozen blocks")
        where = f"after step {self.state.step}" if self.loop else "while the activation cache was filled"
        explained = out_of_memory(error, where, self.rank.device, remedies)
        traceback.clear_frames(error.__traceback__)
        if self.loop is not None:
            self.loop.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if self.rank.device.type == "cuda":
            torch.cuda.empty_cache()
        return explained
