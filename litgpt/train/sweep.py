"""A sweep: data and model are read once, the cache is filled once, and each trial is a run of its own (`litgpt.train.run`) that trains new
adapters on the same frozen weights, in its own folder."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from litgpt import atomic
from litgpt.activations.cache import ActivationCache, filled, plan
from litgpt.args import Grid, as_config
from litgpt.checkpoint import require_checkpoint
from litgpt.convert.resolve import open_checkpoint
from litgpt.device import seed_everything, use
from litgpt.errors import Stopped, UserError
from litgpt.files import read_json
from litgpt.logs import Console
from litgpt.lora import Config, keep_taps
from litgpt.optim import make_optimizer
from litgpt.text import counted, gib, text_table
from litgpt.train.interrupts import Interrupts
from litgpt.train.launch import POLL_SECONDS, Group, Place, place_of
from litgpt.train.methods import ranges
from litgpt.train.out_dir import OutDir
from litgpt.train.parallel import alone
from litgpt.train.prepare import Job, choose_taps, prepare
from litgpt.train.rehearsal import rehearsed, require_data
from litgpt.train.resume import Saved, Stopwatch, changes, environment
from litgpt.train.run import finished_report, identity_of, require_alike, run
from litgpt.train.settings import Run
from litgpt.train.trials import BEGUN, CSV, FAILED, FINISHED, JSON, LOCKS, STOPPED, WAITING, Table, Trial, expand, foreign_files

RESUME = "the same command with --resume auto continues"


class _Quiet(Console):
    """Shows only progress bars: the lines of each run would bury the sweep's own."""

    def say(self, text: str) -> None:
        pass


def sweep(settings: Run, grid: Grid | None, samples: int | None) -> None:
    """Train every trial and print the best; with `dry_run` only list the trials, their steps and the cache's bytes.

    Each process trains, one after another, trials that no other has. Raises UserError before anything is written if no trial can
    be trained, and at the end if any failed.
    """
    use(settings.accelerator)
    place = place_of(settings.devices, settings.num_nodes)
    if place and settings.method().cache == "memory":
        raise UserError("skip2lora_cache is memory: several processes share a cache on disk. Leave it out, or give disk")
    settings.devices, settings.num_nodes = 1, 1  # of each trial
    if place is None or place.index == 0:
        _lead(settings, grid, samples, place)
    elif not settings.dry_run:
        _help(settings, grid, samples, Group(place, settings.timeout, joined=False))


def _lead(settings: Run, grid: Grid | None, samples: int | None, place: Place | None) -> None:
    """Check everything, begin the table, start the other processes, and print the result: the work of the first process."""
    clock, out_dir, group = Stopwatch(), settings.out_dir, None
    trials, candidates = _candidates(settings, grid, samples)
    if settings.dry_run:
        _rehearse(settings, trials, candidates)
        return
    resumed = settings.resume is not False
    with Interrupts(), OutDir(settings) as folder:
        before = _earlier(settings)
        begun = {row["setting"] for row in before.get("runs", ()) if row["status"] in (BEGUN, FINISHED)}
        for trial in trials:
            if trial.status == WAITING and trial.name in begun and not atomic.damages(out_dir / trial.name / "final"):
                trial.status, trial.figures = FINISHED, finished_report(out_dir / trial.name, settings.train.keep_last)
        table = Table(out_dir, trials, candidates[0].settings.train.keep_best)
        waiting = len(table.of(WAITING))
        job = _prepare(candidates, out_dir, before)
        _introduce(job, table, waiting, place, before)
        identity = identity_of(replace(job, settings=settings), varying=trials[0].values)
        if before and (different := changes(identity, before["identity"], type(settings))):
            raise UserError(f"resume: out_dir {out_dir} holds another sweep: {'; '.join(different)}. Give another --out_dir")
        spent = {"load_seconds": clock.seconds}
        facts = {"settings": as_config(vars(settings)), "identity": identity, **job.kept, "environment": environment(job.rank.device)}
        table.facts = {**before, **facts, **spent}
        if chosen := {trial.name: trial.chosen for trial in candidates if trial.chosen is not None}:
            table.facts["chosen"] = chosen
        if waiting:
            folder.make(resumed)
            if settings.overwrite:
                _remove_earlier(settings, trials)
            table.save()
            try:
                group = Group(place, settings.timeout, joined=False) if place else None
                job.shared = _fill(job, candidates, place)
                spent["cache_seconds"] = clock.seconds - spent["load_seconds"]
                size = sum(cache.layout.nbytes for cache in job.shared.values())
                table.facts |= {"cache": {"blocks": job.shared["training"].blocks, "bytes": size}, **spent}
                _train_all(candidates, job, table)
                for pid, how in group.lost.items() if group else ():
                    job.console.say(f"process {pid} {how}: the others have done its work")
            except Stopped as stop:
                if group is not None:
                    group.store.set("stopped", "")  # the others save their state and end
                    group = None
                raise Stopped(stop.signum, stop.message or f"stopped: {RESUME}") from None
            finally:
                if group is not None:
                    group.end_children()
        with table.locked():
            table.save()
    (out_dir / LOCKS).unlink(missing_ok=True)
    _conclude(settings, table, clock.seconds, spent, waiting)


def _remove_earlier(settings: Run, trials: list[Trial]) -> None:
    """Remove earlier results of the trials, which a resumed sweep would take for its own."""
    for path in (settings.out_dir / trial.name for trial in trials):
        if path.is_dir():
            with OutDir(replace(settings, out_dir=path, resume=False, overwrite=True)) as earlier:
                earlier.make(resumed=False)


def _help(settings: Run, grid: Grid | None, samples: int | None, group: Group) -> None:
    """Train trials of a sweep that the first process leads."""
    trials, candidates = _candidates(settings, grid, samples)
    with Interrupts():
        table = Table(settings.out_dir, trials, candidates[0].settings.train.keep_best)
        table.refresh()
        if not table.of(WAITING, BEGUN):
            return
        job = _prepare(candidates, settings.out_dir, table.facts, group)
        require_alike(identity_of(replace(job, settings=settings), varying=trials[0].values), table.facts["identity"])
        table.facts = {}
        job.shared = _fill(job, candidates, group.place)
        try:
            _train_all(candidates, job, table, f" on rank {group.place.index}")
        except Stopped as stop:
            raise SystemExit(stop.code) from None  # the first process says so


def _train_all(candidates: list[Trial], job: Job, table: Table, where: str = "") -> None:
    """Train the trials that no other process is training, including those of killed processes, until none is left."""
    while left := [trial for trial in candidates if trial.status in (WAITING, BEGUN)]:
        if not any(_train_if_free(trial, job, table, where) for trial in left):
            time.sleep(POLL_SECONDS)
        table.refresh()


def _train_if_free(trial: Trial, job: Job, table: Table, where: str) -> bool:
    """Train a trial and note its result; return False if another process trains or has trained it. Raises Stopped, saying how to resume."""
    console = Console()
    with table.locked(trial, wait=False) as is_own:
        if not is_own:
            return False
        table.refresh()
        if trial.status not in (WAITING, BEGUN):
            return False
        if trial.status == BEGUN:
            trial.settings = replace(trial.settings, resume="auto", overwrite=False)
        table.note(trial, BEGUN)
        console.say(f"[{len(table.trials) - len(table.of(WAITING))}/{len(table.trials)}] {trial.name}{where}")
        start = f"  {trial.name}{where}: "
        try:
            table.note(trial, FINISHED, figures=run(trial.settings, trial.method, lambda: _adapted(job, trial)))
            loss = table.loss(trial)
            result = "not validated" if loss is None else f"validation loss {loss:.4f}"
            console.say(f"{start}{result}, {trial.figures['total_seconds']:.1f} s")
        except (UserError, OSError) as error:
            table.note(trial, FAILED, str(error))
            console.say(f"{start}failed: {error}")
        except Stopped as stop:
            table.note(trial, STOPPED, stop.message)
            done = f"{len(table.of(FINISHED))} of {len(table.trials)} settings are finished"
            raise Stopped(stop.signum, f"stopped in {trial.name}, {done}: {RESUME}") from None
        return True


def _rehearse(settings: Run, trials: list[Trial], candidates: list[Trial]) -> None:
    """Check everything and print the trials, their steps and the cache's bytes. Writes nothing."""
    OutDir(settings).check()
    _earlier(settings)
    require_data(settings)
    job = _prepare(candidates, settings.out_dir, {})
    counts = {"train": len(job.splits.train), "val": _n_validated(candidates, job)}
    need = sum(plan(job.model, getattr(job.splits, name), range(count), job.cache_dtype).nbytes for name, count in counts.items())
    rows, total = [("setting", "parameters", "steps", "")], 0
    for trial in candidates:
        loop = rehearsed(_adapted(job, trial), trial.settings.train)
        total += loop.total_steps or 0
        steps = "" if loop.total_steps is None else f"{loop.total_steps:,}"
        rows.append((trial.name, f"{sum(p.numel() for p in loop.trained):,}", steps, ""))
    rows += [(trial.name, "", "", f"cannot be trained: {trial.reason}") for trial in trials if trial.status == FAILED]
    print(f"{counted(len(trials), 'setting')}, {counted(total, 'step')} in all; {gib(need)} of activations, computed once")
    print(f"{text_table(rows, left=(0, -1))}\ndry run: nothing was written")


def _earlier(settings: Run) -> dict[str, Any]:
    """Return the state of the sweep to resume, or {}. Raises UserError if out_dir holds a sweep that is not to be resumed or replaced."""
    file = settings.out_dir / JSON
    if foreign := foreign_files(settings.out_dir):
        raise UserError(
            f"out_dir {settings.out_dir} holds files named like a sweep's that no sweep wrote ({', '.join(foreign)}): move them away"
        )
    if settings.overwrite or not file.is_file():
        return {}
    if settings.resume is False:
        ways = "give another --out_dir, --resume auto to continue it, or --overwrite true to replace it"
        raise UserError(f"out_dir {file.parent} holds an earlier sweep ({file.name}): {ways}")
    return read_json(file)


def _candidates(settings: Run, grid: Grid | None, samples: int | None) -> tuple[list[Trial], list[Trial]]:
    """Return all trials, and those that can be trained; the others fail with a reason.

    Raises UserError if none can be trained, or if they do not share the frozen layers.
    """
    trials = expand(settings, grid, samples)
    base = settings.checkpoint_dir = open_checkpoint(settings.checkpoint_dir, convert=not settings.dry_run).resolve()
    require_checkpoint(base)
    for trial in trials:
        try:
            if trial.status == WAITING:
                _fit(trial, base)
        except UserError as error:
            trial.status, trial.reason = FAILED, str(error)
    candidates = [trial for trial in trials if trial.status == WAITING]
    if not candidates:
        raise UserError(f"no setting of the grid can be trained. {trials[0].name}: {trials[0].reason}")
    first = candidates[0]
    for trial in candidates:
        if trial.config.cut != first.config.cut:
            raise UserError(
                f"grid: {first.name} trains from {_layer(first.config)} on, {trial.name} from {_layer(trial.config)} on. "
                "The frozen layers before that run once for all settings, so they must be the same: run a sweep for each"
            )
    if not first.config.cut and not first.config.alora_enabled:
        raise UserError(
            "a sweep shares the outputs of frozen blocks, and here none is frozen: LoRA begins in block 0. Set skip2lora_enabled, or keep "
            "LoRA to late blocks, for example lora_block_indices last:6"
        )
    return trials, candidates


def _fit(trial: Trial, base: Path) -> None:
    """Make the method and the config of a trial. Raises UserError if the settings do not fit the model."""
    trial.settings = settings = replace(trial.settings, checkpoint_dir=base)
    trial.method = replace(settings.method(), merges=False)  # merged LoRA would spoil the next trial's weights, and fill the disk
    trial.config = trial.method.config(base)
    make_optimizer(settings.optimizer, [torch.nn.Parameter(torch.zeros(1))])
    if trial.config.cut is None:
        raise UserError("nothing would be trained: set lora_query, lora_value, ... or skip2lora_enabled to true")


def _layer(config: Config) -> str:
    cut = config.cut or 0
    return f"block {cut}" if cut < config.n_layer else "ln_f" if cut == config.n_layer else "lm_head"


def _prepare(candidates: list[Trial], out_dir: Path, before: dict[str, Any], group: Group | None = None) -> Job:
    """Read data and model once; the model has the taps of all trials. `before`: what sweep.json says, or {}."""
    widest = next((trial for trial in candidates if trial.config.taps), candidates[0])
    taps = _taps(candidates)
    tapped: dict[str, Any] = {"skip2lora_block_indices": taps} if taps else {}
    settings = replace(widest.settings, out_dir=out_dir, **tapped)
    rank = alone(settings.precision)
    if group is not None:
        rank = replace(rank, device=group.device)
    job = prepare(settings, settings.method(), Saved(out_dir, before), rank)
    if job.model.config.alora_enabled:
        for trial in candidates:
            trial.settings = replace(trial.settings, alora_invocation_tokens=job.model.config.alora_invocation_tokens)  # type: ignore[call-arg]
            trial.method = replace(trial.method, config=trial.settings.method().config)
    known = before.get("chosen")
    _choose(candidates, job, known if isinstance(known, dict) else {})
    if taps:
        keep_taps(job.model, _taps(candidates))
    return job


def _taps(candidates: list[Trial]) -> list[int]:
    """Return the tapped blocks: of a trial with `auto`, every candidate block until it has chosen."""
    return sorted({block for trial in candidates for block in trial.chosen or trial.config.taps})


def _choose(candidates: list[Trial], job: Job, known: dict[str, Any]) -> None:
    """Give each trial with `auto` the blocks that its own run would choose."""
    choices: dict[tuple[int, int, int], list[int]] = {}
    for trial in candidates:
        if count := trial.config.taps_to_choose:
            blocks = known.get(trial.name)
            if not isinstance(blocks, list) or len(blocks) != count or not all(block in trial.config.taps for block in blocks):
                key = count, trial.settings.train.micro_batch_size, trial.settings.seed
                if key not in choices:
                    choices[key] = choose_taps(replace(job, settings=trial.settings), count)
                blocks = choices[key]
            trial.chosen = blocks


def _n_validated(candidates: list[Trial], job: Job) -> int:
    """Return the number of validation samples that the trials need. Warns if it is not the same for all."""
    batches, group = candidates[0].settings.eval.max_iters, job.objective.group
    most = len(job.splits.val) // group
    counts = {one.settings.eval.validated(most, one.settings.train.micro_batch_size) for one in candidates}
    if len(counts) > 1:
        numbers = " or ".join(f"{count:,}" for count in sorted(counts))
        job.console.say(
            f"validation losses are on different samples: eval.max_iters {batches} batches of train.micro_batch_size are {numbers} "
            "samples. Raise eval.max_iters to compare them"
        )
    return max(counts) * group


def _fill(job: Job, candidates: list[Trial], place: Place | None) -> dict[str, ActivationCache]:
    """Return caches of all training samples and the validation samples that the trials need. Several processes fill caches on disk."""
    splits, settings = job.splits, job.cache_settings("disk" if place else job.method.cache)
    parts = {"training": (splits.train, len(splits.train)), "validation": (splits.val, _n_validated(candidates, job))}
    with job.rank.autocast():
        return {name: filled(job.model, *part, name, settings, job.rank.device) for name, part in parts.items()}


def _adapted(job: Job, trial: Trial) -> Job:
    """Return the job that `prepare` would give for the trial: its adapters, drawn with its seed, on the shared model."""
    seed_everything(trial.settings.seed)
    trial.method.rebuild(job.model, trial.settings.checkpoint_dir)
    job.model.to(job.rank.device)
    if trial.chosen is not None:
        keep_taps(job.model, trial.chosen)
    return replace(job, settings=trial.settings, method=trial.method, console=_Quiet(job.console.active), examples=[])


def _introduce(job: Job, table: Table, waiting: int, place: Place | None, before: dict[str, Any]) -> None:
    """Say what is trained on what. `before`: what sweep.json says, or {}."""
    config, say = job.model.config, job.console.say
    taps = f", blocks {ranges(config.taps)} tapped" if config.taps else ""
    say(f"{config.name}, {job.precision} on {job.rank.device}; the layers before {_layer(config)} run once{taps}")
    by = f", by {place.size} processes" if place else ""
    say(f"{counted(len(table.trials), 'setting')}{by}" + (f", {waiting} of them to be trained" if waiting < len(table.trials) else ""))
    names = {trial.name for trial in table.trials}
    if left_out := [row["setting"] for row in before.get("runs", ()) if row["setting"] not in names]:
        shown = ", ".join(left_out[:3]) + ", ..." * (len(left_out) > 3)
        say(f"{counted(len(left_out), 'earlier setting')} not in this grid: {shown}. The table leaves them out; their folders stay")
    for trial in table.of(FAILED):
        say(f"{trial.name} cannot be trained: {trial.reason}")


def _conclude(settings: Run, table: Table, seconds: float, spent: dict[str, float], trained: int) -> None:
    """Print the table and the best trial. Raises UserError if a trial failed."""
    parts = "nothing was left to train"
    if trained:
        each = (seconds - sum(spent.values())) / trained
        parts = f"loading {spent['load_seconds']:.1f}, filling the cache {spent['cache_seconds']:.1f}, then {each:.1f} for each setting"
    print(f"\n{counted(trained, 'setting')} trained in {seconds:.1f} s: {parts}\n{table}")
    best = table.ranked[0]
    if (loss := table.loss(best)) is not None:
        print(f"\nbest: {best.name}, validation loss {loss:.4f}\n  {settings.chat_with(table.folder(best))[0]}")
    print(f"all figures: {table.out_dir / CSV}")
    if failed := table.of(FAILED):
        reasons = "; ".join(f"{trial.name}: {trial.reason}" for trial in failed[:3])
        raise UserError(f"{len(failed)} of {len(table.trials)} settings failed. {reasons}")
