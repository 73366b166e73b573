"""`--dry_run true`: what a run would do and need, from its real data and model and a few measured steps. Writes nothing."""

import shutil
import sys
import time
from array import array
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import psutil

from litgpt.activations.cache import CacheSettings, Recompute, activations, is_cacheable, plan, stem_length
from litgpt.adapters.base import adapter_parameters
from litgpt.args import TrainArgs
from litgpt.errors import UserError
from litgpt.files import nearest
from litgpt.logs import peak_memory_gb
from litgpt.lora import end_warmup, start_warmup
from litgpt.memory import PROCESS
from litgpt.optim import make_optimizer
from litgpt.prompts import reply_header
from litgpt.quantize import count
from litgpt.sample import Sample
from litgpt.streams import safe, unescaped
from litgpt.text import counted, duration, gib, text_table
from litgpt.tokenizer import Tokenizer
from litgpt.train.launch import place_of
from litgpt.train.loop import Batch, Loop
from litgpt.train.methods import Method
from litgpt.train.out_dir import OutDir
from litgpt.train.parallel import alone
from litgpt.train.prepare import Job, prepare
from litgpt.train.resume import State
from litgpt.train.settings import Run
from litgpt.train.strategy import estimate_of

MEASURED_STEPS = 2
LONG_STEP = 20.0  # seconds; a longer step is not measured as a whole
LONGEST_SAMPLE, LONGEST_PART = 4000, 1200  # characters shown of the sample, and of each stretch that is read or learned


def rehearse(settings: Run, method: Method) -> None:
    """Check the settings as a run would, then print a sample, the steps, and the memory, disk and time they need.

    One device is used, whatever `devices` says. Raises UserError as the run would.
    """
    OutDir(settings).check(refuse_earlier=False)
    require_data(settings)
    job = prepare(settings, method, rank=alone(settings.precision))
    job.say_what_is_trained()
    show_sample(job.splits.train[0], job.tokenizer)
    model, lines = job.model, {}
    warmup = method.warmup.warmup_steps(job.batches(settings.train).per_epoch)
    if warmup:
        start_warmup(model)
        loop = rehearsed(job, replace(settings.train, max_steps=warmup, epochs=None))
        seconds, _ = _time(loop)
        lines["warm-up"] = f"{counted(warmup, 'step')} of about {seconds:.2f} s: {duration(warmup * seconds)}"
        end_warmup(model)
    lines.update(_costs(job))
    lines.update(products(job))
    lines["memory"] = _memory(job)
    lines["memory measured here"] = f"{peak_memory_gb(job.rank.device):.2f} GiB at most, in these few steps"
    print("what the run would take", text_table(list(lines.items()), left=(0, 1)), sep="\n")
    print("dry run: nothing was written")


def require_data(settings: Run) -> None:
    """Raise UserError if the data would have to be downloaded."""
    assert settings.data is not None
    if not settings.data.is_ready():
        raise UserError(f"data: {settings.data.source} would be downloaded, but a dry run writes nothing: run without it once")


def show_sample(sample: Sample, tokenizer: Tokenizer) -> None:
    """Print a sample as the model reads it; the tokens that carry loss stand between » and «, in colour on a terminal."""
    from rich.console import Console
    from rich.text import Text

    text = Text("first training sample (the model learns the text between » and «):\n\n")
    for learns, group in groupby(zip(sample.loss_mask, sample.input_ids, strict=True), key=lambda pair: pair[0]):
        part = safe(tokenizer.decode([token for _, token in group], skip_special_tokens=False))
        if len(part) > LONGEST_PART:
            half = LONGEST_PART // 2
            part = f"{part[:half]} [... {len(part) - 2 * half:,} characters ...] {part[-half:]}"
        text.append(f"»{part}«" if learns else part, style="bold green" if learns else "dim")
    text.truncate(LONGEST_SAMPLE, overflow="ellipsis")
    Console(file=unescaped(sys.stdout), highlight=False, soft_wrap=True).print(text)


def rehearsed(job: Job, train: TrainArgs) -> Loop:
    """Return the loop that a run would have, on this one device, recomputing every activation."""
    model = job.model
    optimizer = make_optimizer(job.settings.optimizer, [p for p in model.parameters() if p.requires_grad])
    own = Recompute(model, job.splits.train, job.rank.device)
    for sample in job.splits.train if job.objective.referred else ():
        sample.reference = array("f", bytes(4 * sample.n_targets))  # its values do not affect the time
    return Loop(model, optimizer, train, job.batches(train), own, job.rank, job.objective, job.console.say)


def _time(loop: Loop, batches: list[Batch] | None = None) -> tuple[float, list[Batch]]:
    """Return the mean seconds per step, and the batches that were measured; by default the first ones, after a micro-batch to warm up.

    Of a step that would take long, only the micro-batch is measured.
    """
    if batches is None:
        batches = list(islice(loop.batches.epoch(0), MEASURED_STEPS))
        first = batches[0].indices[: loop.micro_batch]
        part = loop.batches.batch(first, first, len(first))
        if loop.step(State(), part)["step_time"] * batches[0].tokens / part.tokens > LONG_STEP:
            batches = [part]
    seconds, tokens = sum(loop.step(State(), batch)["step_time"] for batch in batches), sum(batch.tokens for batch in batches)
    return seconds / tokens * loop.batches.tokens_per_epoch / loop.batches.per_epoch, batches


def _costs(job: Job) -> dict[str, str]:
    """Return steps, seconds with and without a cache, and the size of the cache next to the free space."""
    train, splits, model = job.settings.train, job.splits, job.model
    loop = rehearsed(job, train)
    plain, batches = _time(loop)
    per_epoch, total = loop.batches.per_epoch, loop.total_steps
    epochs = "" if total is None else counted(round(total / per_epoch, 3), "epoch")
    steps = f"{per_epoch:,} an epoch" if total is None else f"{total:,} ({epochs} of {per_epoch:,})"
    lines = {"steps": f"{steps}, each of {counted(train.global_batch_size, 'sample')}", "a step": f"about {plain:.2f} s"}
    seconds = None if total is None else total * plain
    if loop.batches.cache_mode(job.method.cache, train) != "off" and is_cacheable(model):
        need = sum(plan(model, part, range(len(part)), job.cache_dtype).nbytes for part in (splits.train, splits.val))
        folder = job.cache_folder
        disk = shutil.disk_usage(nearest(folder)).free
        free = psutil.virtual_memory().available
        lines["activation cache"] = f"{gib(need)}; free: {gib(free)} of memory, {gib(disk)} on disk ({folder})"
        indices = [i for batch in batches for i in batch.indices]
        start = time.perf_counter()
        with job.rank.autocast():
            settings = CacheSettings("memory", Path(), job.cache_dtype)
            loop.activations = activations(model, splits.train, indices, "training", settings, job.rank.device)
        fill = (time.perf_counter() - start) / sum(splits.train[i].n_inputs for i in indices) * loop.batches.tokens_per_epoch
        cached, _ = _time(loop, batches)
        lines["a step from the cache"] = f"about {cached:.2f} s, after {duration(fill)} of filling it"
        seconds = None if total is None else fill + total * cached
    if seconds is not None:
        lines["training"] = f"about {duration(seconds)}, validation not counted"
    return lines


def products(job: Job) -> dict[str, str]:
    """Return the FLOP of an epoch's products with the weights of blocks and head, for LoRA and answer-only LoRA; {} without that choice.

    2 N per position forward, and as much for the input's gradient, with N weights in the blocks from the first with LoRA on. Positions are
    those of replies, or all. Attention's scores and the adapters are left out.
    """
    config, samples = job.model.config, job.splits.train
    spans = sum(bytes(sample.loss_mask).count(b"\0\1") for sample in samples)
    rows, targets = sum(sample.n_inputs for sample in samples), sum(sample.n_targets for sample in samples)
    header = config.alora_invocation_tokens or job.tokenizer.ids(reply_header(job.style), bos=False)
    own = targets + spans * (len(header) - 1)
    if not config.lora_blocks or config.skip2lora_enabled or config.lora_variant != "lora" or config.n_expert or not targets < own < rows:
        return {}
    weights = [count(block) - sum(p.numel() for p in adapter_parameters(block).values()) for block in job.model.blocks]
    behind, head = sum(weights[config.lora_blocks[0] :]), 4 * config.n_embd * config.V * targets
    plain, answers = ((4 * behind * positions + head) / 1e12 for positions in (rows, own))
    once = 2 * sum(weights) * rows / 1e12
    return {
        "products of an epoch": f"LoRA {plain:.3g} TFLOP; answer-only LoRA {answers:.3g}, and {once:.3g} once for the prompts: "
        f"{own:,} of {rows:,} positions are replies"
    }


def _memory(job: Job) -> str:
    """Return `litgpt.memory`'s estimate for this job: in the warm-up, if there is one, LoRA reaches every block."""
    model: Any = job.model
    config, settings, samples = model.config, job.settings, job.splits.train
    if config.skip2lora_warmup:
        config = replace(config, skip2lora_enabled=False, skip2lora_warmup=False)
    stem = stem_length(model, samples)
    estimated, tokens = estimate_of(settings, job.method, config, samples, model.dtype, model.is_tied, stem)
    processes = place.size if settings.wants_shards and (place := place_of(settings.devices, settings.num_nodes)) else 1
    part = f"; with fsdp each of {processes} processes about {gib(estimated.part(processes) + PROCESS)}" if processes > 1 else ""
    reference = f"the reference model {gib(estimated.reference)}, or after it is freed " if estimated.reference else ""
    return (
        f"about {gib(estimated.total + PROCESS)} without the cache: weights {gib(estimated.weights)}, {reference}trained parameters "
        f"{gib(estimated.training)}, activations {gib(estimated.activations)} for {tokens:,} tokens in a micro-batch, "
        f"the program {gib(PROCESS)}{part}"
    )
