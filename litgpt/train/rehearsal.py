"""`--dry_run true`: what a run would do and take, from its real data and model and a few measured steps. Writes nothing."""

from __future__ import annotations

import heapq
import os
import shutil
import time
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import psutil

from litgpt import checkpoint
from litgpt.activations.cache import Activations, CacheSettings, Recompute, activations, plan, stem_length
from litgpt.args import TrainArgs
from litgpt.errors import UserError
from litgpt.logs import peak_memory_gb
from litgpt.lora import end_warmup, start_warmup
from litgpt.memory import PROCESS, estimate
from litgpt.optim import make_optimizer
from litgpt.sample import Sample
from litgpt.text import duration, gib, printable, text_table
from litgpt.tokenizer import Tokenizer
from litgpt.train.interrupts import Signals
from litgpt.train.loop import Batches, Loop, World, samples_per_rank
from litgpt.train.methods import Method
from litgpt.train.out_dir import Place
from litgpt.train.resume import State
from litgpt.train.run import Job, Prepared, prepare
from litgpt.train.session import cache_folder, training_cache

Batch = tuple[list[int], int, int]
"""samples of a step, their loss tokens, their input tokens"""
MEASURED_STEPS = 2
LONG_STEP = 20.0
"""seconds; one that takes longer is not repeated"""
LONGEST_SAMPLE, LONGEST_PART = 4000, 1200
"""characters of the sample that are shown, and of what the model reads or learns at a stretch"""


def dry_run(job: Job, method: Method) -> None:
    """Check the job as a run would, then print a sample, the steps, and what memory, disk and time they take.

    One device does it, whatever `devices` says. Raises UserError as the run would.
    """
    base = checkpoint.require_checkpoint(job.checkpoint_dir)
    Place(job.out_dir, job.resume, job.overwrite, base).check()
    require_data(job)
    ready = prepare(replace(job, devices=1, num_nodes=1), method)
    ready.tell()
    show_sample(ready.splits.train[0], ready.tokenizer)
    model, lines = ready.model, {}
    warmup = method.warmup.warmup_steps(_batches(ready, job.train).per_epoch)
    if warmup:
        start_warmup(model)
        loop = rehearsed(ready, replace(job.train, max_steps=warmup, epochs=None))
        seconds, _ = _time(loop, _first(loop))
        lines["warm-up"] = f"{warmup:,} steps of about {seconds:.2f} s: {duration(warmup * seconds)}"
        end_warmup(model)
    lines.update(_costs(ready))
    lines["memory"] = _memory(ready)
    lines["memory measured here"] = f"{peak_memory_gb(ready.fabric.device):.2f} GiB at most, in these few steps"
    print("what the run would take", text_table(list(lines.items()), left=(0, 1)), sep="\n")
    print("dry run: nothing was written")


def require_data(job: Job) -> None:
    """UserError for data that are not there yet."""
    if not job.data.is_ready():
        raise UserError(f"data: {job.data.source} is not there and would be downloaded, but a dry run writes nothing: run without it once")


def show_sample(sample: Sample, tokenizer: Tokenizer) -> None:
    """The first training sample as the model reads it; what carries loss stands between » and «, in colour on a terminal."""
    from rich.console import Console
    from rich.text import Text

    text = Text("first training sample (the model learns what stands between » and «):\n\n")
    for learns, group in groupby(zip(sample.loss_mask, sample.input_ids, strict=True), key=lambda pair: pair[0]):
        part = _shown(tokenizer.decode([token for _, token in group], skip_special_tokens=False))
        text.append(f"»{part}«" if learns else part, style="bold green" if learns else "dim")
    text.truncate(LONGEST_SAMPLE, overflow="ellipsis")
    Console(highlight=False, soft_wrap=True).print(text)


def _shown(part: str) -> str:
    """Without control characters, and without the middle of what is long."""
    text, half = printable(part), LONGEST_PART // 2
    return text if len(text) <= LONGEST_PART else f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def rehearsed(ready: Prepared, train: TrainArgs) -> Loop:
    """The loop that a run would have, on this one device, computing every activation anew."""
    model, device, samples, batches = ready.model, ready.fabric.device, ready.splits, _batches(ready, train)
    nothing: Any = None  # is ever saved
    return Loop(
        model=model,
        optimizer=make_optimizer(ready.job.optimizer, [p for p in model.parameters() if p.requires_grad]),
        train=train,
        eval=ready.job.eval,
        batches=batches,
        activations=Recompute(model, samples.train, device),
        val_batches=[],
        val_activations=Recompute(model, samples.val, device),
        world=batches.world,
        device=device,
        autocast=ready.fabric.autocast,
        log=None,
        console=ready.console,
        checkpoints=nothing,
        signals=Signals(),
        answer=lambda: None,
    )


def _batches(ready: Prepared, train: TrainArgs) -> Batches:
    world = World(0, 1, lambda tensor: tensor)
    return Batches(ready.splits.train, samples_per_rank(train, 1), world, ready.job.seed, train.group_by_length)


def _time(loop: Loop, batches: list[Batch]) -> tuple[float, list[Batch]]:
    """Seconds of a mean step, and the batches that were needed. The first only warms up, unless it takes long."""
    seconds, tokens, used = 0.0, 0, 0
    for rows, loss_tokens, count in batches:
        start = time.perf_counter()
        loop.step(State(), rows, loss_tokens)
        elapsed = time.perf_counter() - start
        used += 1
        if used > 1 or elapsed > LONG_STEP or len(batches) == 1:
            seconds, tokens = seconds + elapsed, tokens + count
        if elapsed > LONG_STEP:
            break
    an_epoch = sum(sample.n_inputs for sample in loop.batches.samples)
    return seconds / tokens * an_epoch / loop.batches.per_epoch, batches[:used]


def _first(loop: Loop) -> list[Batch]:
    return list(islice(loop.batches.epoch(0), 1 + MEASURED_STEPS))


def _costs(ready: Prepared) -> dict[str, str]:
    """Steps, seconds with and without a cache, and the cache's bytes beside what is free."""
    job, splits, model = ready.job, ready.splits, ready.model
    loop = rehearsed(ready, job.train)
    plain, batches = _time(loop, _first(loop))
    per_epoch, total = loop.batches.per_epoch, loop.total_steps
    steps = f"{per_epoch:,} an epoch" if total is None else f"{total:,} ({total / per_epoch:.4g} epochs of {per_epoch:,})"
    lines = {"steps": f"{steps}, each of {job.train.global_batch_size} samples", "a step": f"about {plain:.2f} s"}
    seconds = None if total is None else total * plain
    if training_cache(job.cache_mode, job.train, loop.batches) != "off" and model.cut:
        need = sum(plan(model, part, range(len(part)), ready.cache_dtype).nbytes for part in (splits.train, splits.val))
        folder = cache_folder(job)
        disk = shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))).free
        free = psutil.virtual_memory().available
        lines["activation cache"] = f"{gib(need)}; free: {gib(free)} of memory, {gib(disk)} on disk ({folder})"
        rows = [i for batch in batches for i in batch[0]]
        start = time.perf_counter()
        loop.activations = _cached(ready, rows)
        fill = (time.perf_counter() - start) / _tokens(splits.train, rows) * _tokens(splits.train, range(len(splits.train)))
        cached, _ = _time(loop, batches)
        lines["a step from the cache"] = f"about {cached:.2f} s, after {duration(fill)} of filling it"
        seconds = None if total is None else fill + total * cached
    if seconds is not None:
        lines["training"] = f"about {duration(seconds)}, validation not counted"
    return lines


def _cached(ready: Prepared, rows: list[int]) -> Activations:
    settings = CacheSettings("memory", Path(), ready.cache_dtype)
    with ready.fabric.autocast():
        return activations(ready.model, ready.splits.train, rows, "training", settings, ready.fabric.device)


def _tokens(samples: list[Sample], rows: Any) -> int:
    return sum(samples[i].n_inputs for i in rows)


def _memory(ready: Prepared) -> str:
    """`litgpt.memory`'s estimate for this job: in the warm-up, if there is one, LoRA reaches every block."""
    model: Any = ready.model
    config, samples, batch = model.config, ready.splits.train, ready.job.train.micro_batch_size
    stem = stem_length(model, samples)
    tokens = stem + sum(heapq.nlargest(batch, (sample.n_inputs - stem for sample in samples)))
    loss_tokens = sum(heapq.nlargest(batch, (sample.n_targets for sample in samples)))
    if config.skip2lora_warmup:
        config = replace(config, skip2lora_enabled=False, skip2lora_warmup=False)
    found = estimate(
        config,
        tokens,
        loss_tokens,
        tied=model.is_tied,
        width=model.dtype.itemsize,
        full=model.cut is None,
        checkpointing=ready.job.train.activation_checkpointing,
        nf4=str(ready.job.hyperparameters.get("quantize")).startswith(("bnb.nf4", "bnb.fp4")),
    )
    return (
        f"about {gib(found.total + PROCESS)} without the cache: weights {gib(found.weights)}, what is trained {gib(found.training)}, "
        f"activations {gib(found.activations)} for {tokens:,} tokens in a micro-batch, the program {gib(PROCESS)}"
    )
