"""A sweep at work: data and model are read once, the cache is filled once, and each setting is a run of its own (`litgpt.train.run`)
that trains new adapters on the same frozen weights, in its own folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from litgpt import atomic, checkpoint
from litgpt.activations.cache import plan
from litgpt.activations.shared import SharedActivations
from litgpt.args import as_config
from litgpt.errors import Stopped, UserError
from litgpt.files import read_json
from litgpt.finetune.lora import job_of
from litgpt.logs import Console
from litgpt.lora import GPT, Config, keep_taps
from litgpt.optim import make_optimizer
from litgpt.text import gib, text_table
from litgpt.train import sweep_table
from litgpt.train.grid import Variant
from litgpt.train.interrupts import Signals
from litgpt.train.methods import Method, ranges
from litgpt.train.out_dir import Place
from litgpt.train.rehearsal import rehearsed, require_data
from litgpt.train.resume import Identity, Stopwatch, environment, identity
from litgpt.train.run import Job, Prepared, choose_taps, finished_report, prepare, run
from litgpt.train.session import cache_settings
from litgpt.train.sweep_table import FAILED, FINISHED, STOPPED, WAITING, Outcome, Table

RESUME = "the same command with --resume auto goes on"


@dataclass
class Trial:
    """A setting that can be trained."""

    variant: Variant
    job: Job
    method: Method
    config: Config
    chosen: list[int] | None = None
    """the tapped blocks, if they were left to `auto`"""


class _Quiet(Console):
    """Progress bars alone: what each run says of itself would bury the sweep's own lines."""

    def say(self, text: str) -> None:
        pass


def sweep(arguments: dict[str, Any], variants: list[Variant]) -> None:
    """Train every setting and say which is best. UserError at the end if any failed, before anything is written if none can be trained."""
    clock, out_dir = Stopwatch(), Path(arguments["out_dir"])
    resumed = arguments["resume"] is not False
    trials = _trials(arguments, variants)
    with Signals(), Place(out_dir, arguments["resume"], arguments["overwrite"], arguments["checkpoint_dir"]) as place:
        before = _earlier(arguments)
        table = Table(out_dir, [_outcome(variant, resumed) for variant in variants], trials[0].job.train.keep_best)
        names = {outcome.variant.name for outcome in table.of(WAITING)}
        waiting = [trial for trial in trials if trial.variant.name in names]
        ready = _prepare(trials, out_dir, (before or {}).get("chosen"))
        _introduce(ready, table, len(waiting))
        whose = _identity(ready, arguments, list(variants[0].values))
        if before is not None and (changes := whose.changes(before["identity"])):
            raise UserError(f"resume: out_dir {out_dir} holds another sweep: {'; '.join(changes)}. Give another --out_dir")
        spent = {"load_seconds": clock.seconds}
        if waiting:
            ready.shared = _fill(ready, _validated(trials, ready))
            spent["cache_seconds"] = clock.seconds - spent["load_seconds"]
        table.facts = {**(before or {}), **_facts(ready, trials, arguments, whose), **spent}
        place.make(resumed)
        table.save()
        for number, trial in enumerate(waiting, 1):
            ready.console.say(f"[{number}/{len(waiting)}] {trial.variant.name}")
            _train(trial, ready, table)
    _conclude(table, clock.seconds, spent, len(waiting))


def dry_run(arguments: dict[str, Any], variants: list[Variant]) -> None:
    """Check everything and print the settings, their steps and the cache's bytes. Writes nothing."""
    out_dir = Path(arguments["out_dir"])
    trials = _trials(arguments, variants)
    Place(out_dir, arguments["resume"], arguments["overwrite"], arguments["checkpoint_dir"]).check()
    _earlier(arguments)
    require_data(trials[0].job)
    ready = _prepare(trials, out_dir)
    counts = {"train": len(ready.splits.train), "val": _validated(trials, ready)}
    need = sum(plan(ready.model, getattr(ready.splits, name), range(count), ready.cache_dtype).nbytes for name, count in counts.items())
    steps = {}
    rows: list[tuple[str, ...]] = [("setting", "parameters", "steps", "")]
    for trial in trials:
        loop = rehearsed(_adapted(ready, trial), trial.job.train)
        steps[trial.variant.name] = loop.total_steps
        known = "" if loop.total_steps is None else f"{loop.total_steps:,}"
        rows.append((trial.variant.name, f"{sum(p.numel() for p in loop.trained):,}", known, ""))
    rows += [(variant.name, "", "", f"cannot be trained: {variant.problem}") for variant in variants if variant.problem]
    total = sum(count or 0 for count in steps.values())
    print(f"{len(variants)} settings, {total:,} steps in all; {gib(need)} of activations, computed once\n{text_table(rows, left=(0, -1))}")
    print("dry run: nothing was written")


def _earlier(arguments: dict[str, Any]) -> dict[str, Any] | None:
    """What the sweep that is to be gone on with left in out_dir. UserError if there is one that is neither that nor to be replaced."""
    file = Path(arguments["out_dir"]) / sweep_table.JSON
    if arguments["overwrite"] or not file.is_file():
        return None
    if arguments["resume"] is False:
        ways = "give another --out_dir, --resume auto to go on with it, or --overwrite true to replace it"
        raise UserError(f"out_dir {file.parent} holds an earlier sweep ({file.name}): {ways}")
    facts = read_json(file)
    if not isinstance(facts.get("identity"), dict):
        raise UserError(f"resume: {file} is not as litgpt wrote it. Give another --out_dir, or --overwrite true without --resume")
    return facts


def _trials(arguments: dict[str, Any], variants: list[Variant]) -> list[Trial]:
    """The settings that can be trained; why the others cannot becomes their `problem`.

    Raises UserError if there is none, or if what runs frozen is not the same for all.
    """
    base = checkpoint.require_checkpoint(arguments["checkpoint_dir"])
    trials = []
    for variant in variants:
        if variant.problem:
            continue
        try:
            job, method = job_of(variant.arguments)
            config = method.config(base)
            make_optimizer(job.optimizer, [torch.nn.Parameter(torch.zeros(1))])
            if config.cut is None:
                raise UserError("nothing would be trained: set lora_query, lora_value, ... or skip2lora_enabled to true")
        except UserError as error:
            variant.problem = str(error)
            continue
        job = replace(job, eval=replace(job.eval, max_new_tokens=None))
        trials.append(Trial(variant, job, replace(method, finish=_leave), config))
    if not trials:
        raise UserError(f"no setting of the grid can be trained. {variants[0].name}: {variants[0].problem}")
    _require_one_cut(trials)
    return trials


def _leave(model: GPT, folder: Path) -> None:
    """Nothing is added to the final folder: LoRA merged into the weights would spoil them for the next setting, and fill the disk."""


def _require_one_cut(trials: list[Trial]) -> None:
    first = trials[0]
    for trial in trials:
        if trial.config.cut != first.config.cut:
            raise UserError(
                f"grid: {first.variant.name} trains from {_layer(first.config)} on, {trial.variant.name} from {_layer(trial.config)} on. "
                "What runs frozen before that is computed once for all settings, so it must be the same: make a sweep of each"
            )
    if not first.config.cut:
        raise UserError(
            "a sweep shares what frozen blocks compute, and here none is frozen: LoRA begins in block 0. Set skip2lora_enabled, or keep "
            "LoRA to late blocks, for example lora_block_indices last:6"
        )


def _layer(config: Config) -> str:
    cut = config.cut or 0
    return f"block {cut}" if cut < config.n_layer else "ln_f" if cut == config.n_layer else "lm_head"


def _prepare(trials: list[Trial], out_dir: Path, known: Any = None) -> Prepared:
    """Data and model, read once; the model has the taps of all settings. `known`: blocks chosen in an earlier session, by setting."""
    widest = next((trial for trial in trials if trial.config.taps), trials[0])
    taps = _taps(trials)
    _, method = job_of({**widest.variant.arguments, **({"skip2lora_block_indices": taps} if taps else {})})
    ready = prepare(replace(widest.job, out_dir=out_dir), method)
    _choose(trials, ready, known if isinstance(known, dict) else {})
    if taps:
        keep_taps(ready.model, _taps(trials))
    return ready


def _taps(trials: list[Trial]) -> list[int]:
    """The blocks that any of the settings taps: every candidate where `auto` has yet to choose."""
    return sorted({block for trial in trials for block in trial.chosen or trial.config.taps})


def _choose(trials: list[Trial], ready: Prepared, known: dict[str, Any]) -> None:
    """Give each setting that leaves its blocks to `auto` those that its own run would choose."""
    choices: dict[tuple[int, int, int], list[int]] = {}
    for trial in trials:
        if count := trial.config.taps_to_choose:
            blocks = known.get(trial.variant.name)
            if not isinstance(blocks, list) or len(blocks) != count or not all(block in trial.config.taps for block in blocks):
                key = count, trial.job.train.micro_batch_size, trial.job.seed
                if key not in choices:
                    choices[key] = choose_taps(trial.job, ready.model, count, ready.splits, ready.fabric, ready.console)
                blocks = choices[key]
            trial.chosen = blocks


def _fill(ready: Prepared, validated: int) -> SharedActivations:
    """Return the activations of all training samples and the first `validated` of the others."""
    samples = {"training": ready.splits.train, "validation": ready.splits.val}
    counts = {"training": len(ready.splits.train), "validation": validated}
    with ready.fabric.autocast():
        return SharedActivations.fill(ready.model, samples, counts, cache_settings(ready, ready.job.cache_mode), ready.fabric.device)


def _validated(trials: list[Trial], ready: Prepared) -> int:
    """How many validation samples the settings need. Says so if it is not the same number for all."""
    batches, most = trials[0].job.eval.max_iters, len(ready.splits.val)
    asked = {min(most, batches * trial.job.train.micro_batch_size) for trial in trials}
    if len(asked) > 1:
        told = (
            f"eval.max_iters {batches} batches of train.micro_batch_size are {' or '.join(f'{count:,}' for count in sorted(asked))} samples"
        )
        ready.console.say(f"validation losses are not of the same samples: {told}. Raise eval.max_iters to compare them")
    return max(asked)


def _adapted(ready: Prepared, trial: Trial) -> Prepared:
    """What `prepare` would give for the setting: its adapters, drawn with its seed, on the model that is there."""
    ready.fabric.seed_everything(trial.job.seed, verbose=False)
    trial.method.rebuild(ready.model, ready.base)
    ready.model.to(ready.fabric.device)
    if trial.chosen is not None:
        keep_taps(ready.model, trial.chosen)
    return replace(ready, job=trial.job, method=trial.method, console=_Quiet(), chosen=trial.chosen)


def _outcome(variant: Variant, resumed: bool) -> Outcome:
    """What is known of a setting before it is trained."""
    if variant.problem:
        return Outcome(variant, FAILED, variant.problem)
    run = variant.arguments["out_dir"]
    if resumed and not atomic.damages(run / "final"):
        return Outcome(variant, FINISHED, figures=finished_report(run))
    return Outcome(variant)


def _introduce(ready: Prepared, table: Table, waiting: int) -> None:
    """Say what is trained on what."""
    config, say = ready.model.config, ready.console.say
    taps = f", blocks {ranges(config.taps)} tapped" if config.taps else ""
    say(f"{config.name}, {ready.precision} on {ready.fabric.device}; what runs before {_layer(config)} is computed once{taps}")
    say(f"{len(table.outcomes)} settings" + (f", {waiting} of them to be trained" if waiting < len(table.outcomes) else ""))
    for outcome in table.of(FAILED):
        say(f"{outcome.variant.name} cannot be trained: {outcome.reason}")


def _identity(ready: Prepared, arguments: dict[str, Any], varying: list[str]) -> Identity:
    """What a later session of the sweep must have in common with this one: what is the same for all settings."""
    settings = as_config({key: value for key, value in arguments.items() if key not in varying})
    for group in ("train", "eval"):
        settings[group] = {name: value for name, value in settings[group].items() if f"{group}.{name}" not in varying}
    config, splits = ready.model.config.base_dict(), ready.splits
    return identity(settings, {"precision": ready.precision}, ready.base, config, splits.train, splits.val)


def _facts(ready: Prepared, trials: list[Trial], arguments: dict[str, Any], whose: Identity) -> dict[str, Any]:
    """Of sweep.json: what is the same for all settings, and the blocks that were chosen for those with `auto`."""
    facts = {"settings": as_config(arguments), "identity": whose.facts(), "environment": environment(ready.fabric.device)}
    if chosen := {trial.variant.name: trial.chosen for trial in trials if trial.chosen is not None}:
        facts["chosen"] = chosen
    if ready.shared is not None:
        facts["cache"] = {"blocks": list(ready.shared.blocks), "bytes": sum(each.store.nbytes for each in ready.shared.caches.values())}
    return facts


def _train(trial: Trial, ready: Prepared, table: Table) -> None:
    """Train one setting and note what became of it. Raises Stopped, saying how to go on."""
    outcome = next(outcome for outcome in table.outcomes if outcome.variant is trial.variant)
    try:
        outcome.figures = run(trial.job, trial.method, lambda: _adapted(ready, trial))
        outcome.status = FINISHED
        loss = table.loss(outcome)
        told = "not validated" if loss is None else f"validation loss {loss:.4f}"
        ready.console.say(f"  {told}, {outcome.figures['total_seconds']:.1f} s")
    except (UserError, OSError) as error:
        outcome.status, outcome.reason = FAILED, str(error)
        ready.console.say(f"  failed: {error}")
    except Stopped as stop:
        outcome.status, outcome.reason = STOPPED, stop.message
        done = f"{len(table.of(FINISHED))} of {len(table.outcomes)} settings are finished"
        raise Stopped(stop.signum, f"stopped in {trial.variant.name}, {done}: {RESUME}") from None
    finally:
        table.save()


def _conclude(table: Table, seconds: float, spent: dict[str, float], trained: int) -> None:
    """Print the table and the best setting. UserError if a setting failed."""
    parts = "nothing was left to train"
    if trained:
        each = (seconds - sum(spent.values())) / trained
        parts = f"loading {spent['load_seconds']:.1f}, filling the cache {spent['cache_seconds']:.1f}, then {each:.1f} for each setting"
    print(f"\n{trained} settings trained in {seconds:.1f} s: {parts}\n{table}")
    best = table.ranked[0]
    if (loss := table.loss(best)) is not None:
        print(f"\nbest: {best.variant.name}, validation loss {loss:.4f}\n  litgpt chat {shlex.quote(str(table.folder(best)))}")
    print(f"all figures: {table.out_dir / sweep_table.CSV}")
    if failed := table.of(FAILED):
        reasons = "; ".join(f"{outcome.variant.name}: {outcome.reason}" for outcome in failed[:3])
        raise UserError(f"{len(failed)} of {len(table.outcomes)} settings failed. {reasons}")
