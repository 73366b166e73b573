"""A fine-tuning job from its settings to its final folder: everything around the loop."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from litgpt import checkpoint
from litgpt.activation_cache import Activations, CacheSettings, activations
from litgpt.args import EvalArgs, LogArgs, TrainArgs, as_config
from litgpt.config import Config
from litgpt.data.base import DataModule, Record, Sample, Splits, render
from litgpt.errors import UserError
from litgpt.fabric import backbone_dtype, default_device, default_precision, make_fabric
from litgpt.finetune.loop import Batches, Loop, State, World
from litgpt.finetune.method import Method, describe
from litgpt.logs import Console, MetricLoggers, peak_memory_gb, summary
from litgpt.optim import make_optimizer
from litgpt.prompts import PromptStyle, resolve_prompt_style, save_prompt_style
from litgpt.tokenizer import Tokenizer


@dataclass
class Job:
    """The settings that all methods share. `hyperparameters` is the whole command, as it is saved beside the weights."""

    checkpoint_dir: Path
    out_dir: Path
    precision: str | None
    devices: int | str
    num_nodes: int
    data: DataModule
    train: TrainArgs
    eval: EvalArgs
    log: LogArgs
    optimizer: str | dict[str, Any]
    logger_name: str
    seed: int
    overwrite: bool
    hyperparameters: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """names of the LoRA flags that are set, for the line that says where they apply"""
    cache_mode: str = "off"
    cache_dir: Path | None = None
    cache_dtype: str | None = None

    @classmethod
    def of(cls, arguments: dict[str, Any], **extra: Any) -> Job:
        """The job that a command's arguments describe."""
        own = {f.name: arguments[f.name] for f in fields(cls) if f.name in arguments}
        return cls(**own, **extra, hyperparameters=as_config(arguments))


def run(job: Job, method: Method) -> dict[str, Any]:
    """Do the job; the figures of its report. Raises UserError before anything is written if a setting, file or checkpoint is wrong."""
    started = time.perf_counter()
    base = checkpoint.require_checkpoint(job.checkpoint_dir)
    _require_fresh(job.out_dir, job.overwrite)
    precision = job.precision or default_precision(default_device())
    dtype = backbone_dtype(precision)
    fabric = make_fabric(precision, job.devices, job.num_nodes)
    fabric.launch()
    fabric.seed_everything(job.seed, verbose=False)
    console = Console(fabric.global_rank == 0)
    world = World(fabric.global_rank, fabric.world_size, lambda tensor: _sum(fabric, tensor))

    tokenizer = Tokenizer(base)
    style = resolve_prompt_style(job.data.prompt_style, base, tokenizer)
    splits = _splits(job, fabric, tokenizer, style, base)
    console.say(f"data: {splits.report}")
    model = method.build(base, dtype)
    model.to(fabric.device)
    model.max_seq_length = _max_seq_length(job, model.config)
    for line in (f"{model.config.name}, {precision} on {fabric.device}", *describe(model, job.notes)):
        console.say(line)
    optimizer = make_optimizer(job.optimizer, [p for p in model.parameters() if p.requires_grad])

    batches = Batches(splits.train, _per_rank(job.train, world.size), world, job.seed)
    own_val = list(range(world.rank, len(splits.val), world.size))
    val_batches = _chunks(own_val, job.train.micro_batch_size)[: job.eval.max_iters]
    answer = _answerer(job, model, tokenizer, style, splits.examples, console)
    if fabric.global_rank == 0 and job.overwrite:
        _clear(job.out_dir)
    log = MetricLoggers(job.out_dir, job.logger_name, job.log, job.hyperparameters) if fabric.global_rank == 0 else None
    keep = _keeper(job, model, fabric.device, console, fabric.autocast)
    train_rows, val_rows = batches.owned(world.rank), [i for batch in val_batches for i in batch]
    repeats = job.train.epochs != 1 and (job.train.max_steps is None or job.train.max_steps > batches.per_epoch)
    loop = Loop(
        model=model,
        optimizer=optimizer,
        train=job.train,
        eval=job.eval,
        batches=batches,
        activations=keep(splits.train, train_rows, "training", repeats),
        val_batches=val_batches,
        val_activations=keep(splits.val, val_rows, "validation", True),
        world=world,
        device=fabric.device,
        autocast=fabric.autocast,
        log=log,
        console=console,
        save=lambda step: _save(job, method, model, base, style, job.out_dir / f"step-{step:06d}", fabric),
        answer=answer,
    )
    state = loop.run()
    model.eval()
    report = _report(state, loop, model, time.perf_counter() - started, fabric.device)
    _save(job, method, model, base, style, job.out_dir / "final", fabric, final=True)
    if log is not None:
        log.close()
        checkpoint.write_text(job.out_dir / "report.json", json.dumps(report, indent=2) + "\n")
    console.say(summary(f"\nfinished: {job.out_dir / 'final'}", _readable(report)))
    return report


def _require_fresh(out_dir: Path, overwrite: bool) -> None:
    if out_dir.exists() and not out_dir.is_dir():
        raise UserError(f"out_dir {out_dir} is a file: name a folder")
    earlier = _earlier(out_dir)
    if earlier and not overwrite:
        names = ", ".join(path.name for path in earlier)
        raise UserError(f"out_dir {out_dir} holds an earlier run ({names}): give another --out_dir, or --overwrite true to replace it")


def _earlier(out_dir: Path) -> list[Path]:
    """What a run left in the folder."""
    return sorted(path for pattern in ("step-*", "final", "logs", "report.json") for path in out_dir.glob(pattern))


def _clear(out_dir: Path) -> None:
    for path in _earlier(out_dir):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sum(fabric: Any, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor added up over all processes."""
    return fabric.all_reduce(tensor, reduce_op="sum") if fabric.world_size > 1 else tensor


def _splits(job: Job, fabric: Any, tokenizer: Tokenizer, style: PromptStyle, base: Path) -> Splits:
    with fabric.rank_zero_first():
        job.data.prepare_data()
    return job.data.splits(tokenizer, style, _max_seq_length(job, Config.from_checkpoint(base)))


def _max_seq_length(job: Job, config: Config) -> int:
    """What a sample is cut to: the smaller of what is asked for and what the model can read."""
    return min(job.train.max_seq_length or config.block_size, config.block_size)


def _per_rank(train: TrainArgs, processes: int) -> int:
    if train.global_batch_size % processes:
        raise UserError(f"train.global_batch_size {train.global_batch_size} is not a multiple of the {processes} devices")
    return train.global_batch_size // processes


def _chunks(rows: list[int], size: int) -> list[list[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _keeper(job: Job, model: Any, device: torch.device, console: Console, autocast: Callable[[], Any]) -> Callable[..., Activations]:
    """Makes the source of activations for a set of samples: a cache if they are needed more than once, and it is not switched off."""
    folder = job.cache_dir or job.out_dir.parent / "activation_cache"
    dtype = _cache_dtype(job.cache_dtype, next(model.parameters()).dtype)

    def keep(samples: list[Sample], rows: list[int], name: str, repeats: bool) -> Activations:
        mode = "off" if job.cache_mode == "auto" and not repeats else job.cache_mode
        settings = CacheSettings(mode, folder, dtype, console.say)
        with console.progress(f"{name} cache") as progress, autocast():
            return activations(model, samples, rows, name, settings, device, progress)

    return keep


def _cache_dtype(name: str | None, backbone: torch.dtype) -> torch.dtype:
    """The dtype asked for; the backbone's, which loses nothing, if none is."""
    known = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
    if name is not None and name not in known:
        raise UserError(f"skip2lora_cache_dtype is {name!r}: choose one of {', '.join(known)}")
    return known[name] if name else backbone


def _answerer(
    job: Job, model: Any, tokenizer: Tokenizer, style: PromptStyle, examples: list[Record], console: Console
) -> Callable[[], None]:
    """Shows the answer to the validation record that `eval.evaluate_example` names, if `eval.max_new_tokens` asks for one."""
    which, length = job.eval.evaluate_example, job.eval.max_new_tokens
    if which == "random":
        which = int(torch.randint(len(examples), (), generator=torch.Generator().manual_seed(job.seed)))
    number = 0 if which == "first" else int(which)
    if number >= len(examples):
        raise UserError(f"eval.evaluate_example is {number}: the validation set has {len(examples)} samples, counted from 0")
    record = examples[number]
    rendered = render(record, style, tokenizer)
    prompt = rendered.text[: rendered.spans[0][0]]

    def answer() -> None:
        if not length or not console.active:
            return
        from litgpt.generate.engine import generate

        ids = torch.tensor(tokenizer.ids(prompt), device=model.lm_head.weight.device)
        room = min(len(ids) + length, model.max_seq_length)
        if room > len(ids):
            tokens = list(generate(model, ids, room, temperature=0.0, stop_tokens=style.stop_tokens(tokenizer)))
            model.clear_kv_cache()
            console.say(f"  asked: {record.get('instruction') or prompt}\n  answered: {tokenizer.decode(tokens).strip()}")

    return answer


def _save(job: Job, method: Method, model: Any, base: Path, style: PromptStyle, folder: Path, fabric: Any, final: bool = False) -> None:
    """Write a checkpoint folder, whole or not at all."""
    if fabric.global_rank == 0:
        with checkpoint.new_folder(folder) as temporary:
            method.save(model, temporary)
            checkpoint.save_config(model.config, temporary)
            checkpoint.write_text(temporary / "hyperparameters.yaml", yaml.safe_dump(job.hyperparameters, sort_keys=False))
            checkpoint.copy_tokenizer_files(base, temporary)
            save_prompt_style(style, temporary)
            if final:
                method.finish(model, temporary)
    fabric.barrier()


def _report(state: State, loop: Loop, model: Any, seconds: float, device: torch.device) -> dict[str, Any]:
    losses = state.losses
    return {
        "steps": state.step,
        "epochs": round(state.step / loop.batches.per_epoch, 4),
        "initial_val_loss": losses[0][1] if losses and losses[0][0] == 0 else None,
        "final_val_loss": losses[-1][1] if losses and losses[-1][0] == state.step else None,
        "trainable_parameters": sum(p.numel() for p in loop.trained),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "train_seconds": state.seconds,
        "total_seconds": seconds,
        "tokens_per_second": state.tokens / state.seconds if state.seconds else 0.0,
        "peak_memory_gb": peak_memory_gb(device),
    }


def _readable(report: dict[str, Any]) -> dict[str, str]:
    def loss(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.4f} (perplexity {math.exp(min(value, 700)):.2f})"

    trained, total = report["trainable_parameters"], report["total_parameters"]
    return {
        "validation loss before": loss(report["initial_val_loss"]),
        "validation loss after": loss(report["final_val_loss"]),
        "trainable parameters": f"{trained:,} of {total:,} ({100 * trained / total:.3f} %)",
        "steps": f"{report['steps']:,} ({report['epochs']:g} epochs)",
        "time": f"{report['total_seconds']:.1f} s, {report['train_seconds']:.1f} s of it in training steps",
        "speed": f"{report['tokens_per_second']:,.0f} tokens/s in training steps",
        "peak memory": f"{report['peak_memory_gb']:.2f} GiB",
    }
