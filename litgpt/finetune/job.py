"""A fine-tuning job from its settings to its final folder: everything around the loop."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from litgpt.lora import GPT, end_warmup, start_warmup
from litgpt.optim import make_optimizer
from litgpt.prompts import PromptStyle, resolve_prompt_style, save_prompt_style
from litgpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lightning.fabric import Fabric


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
    _require_place(job.out_dir, job.overwrite, base)
    precision = job.precision or default_precision(default_device())
    dtype = backbone_dtype(precision)
    _cache_dtype(job.cache_dtype, dtype)
    fabric = make_fabric(precision, job.devices, job.num_nodes)
    _per_rank(job.train, fabric.world_size)
    fabric.launch()
    fabric.seed_everything(job.seed, verbose=False)
    console = Console(fabric.global_rank == 0)
    tokenizer = Tokenizer(base)
    style = resolve_prompt_style(job.data.prompt_style, base, tokenizer)
    splits = _splits(job, fabric, tokenizer, style, base)
    console.say(f"data: {splits.report}")
    model = method.build(base, dtype)
    model.to(fabric.device)
    model.max_seq_length = _max_seq_length(job, model.config)
    for line in (f"{model.config.name}, {precision} on {fabric.device}", *describe(model, job.notes)):
        console.say(line)
    make_optimizer(job.optimizer, model.parameters())  # wrong settings show before anything is written
    answer = _answerer(job, model, tokenizer, style, splits.examples, console)
    log = MetricLoggers(job.out_dir, job.logger_name, job.log, job.hyperparameters) if fabric.global_rank == 0 else None
    if fabric.global_rank == 0 and job.overwrite:
        _clear(job.out_dir)

    def save(name: str, finish: bool = False) -> None:
        _save(job, method, model, base, style, job.out_dir / name, fabric, finish)

    stage = _Stage(job, model, splits, fabric, log, console, lambda step: save(f"step-{step:06d}"), answer)
    state, warmup = State(), model.config.skip2lora_warmup_steps
    if warmup:
        start_warmup(model)
        train = replace(job.train, max_steps=warmup, epochs=None, max_tokens=None, max_time=None)
        stage.loop(train, "off").run(state, "warm-up")
        end_warmup(model)
    loop = stage.loop(job.train, job.cache_mode)
    loop.run(state)
    model.eval()
    report = _report(state, loop, model, time.perf_counter() - started, fabric.device)
    save("final", finish=True)
    if log is not None:
        log.close()
        checkpoint.write_text(job.out_dir / "report.json", json.dumps(report, indent=2) + "\n")
    console.say(summary(f"\nfinished: {job.out_dir / 'final'}", _readable(report)))
    return report


@dataclass
class _Stage:
    """What all loops of a job share."""

    job: Job
    model: GPT
    splits: Splits
    fabric: Fabric
    log: MetricLoggers | None
    console: Console
    save: Callable[[int], None]
    answer: Callable[[], None]

    def loop(self, train: TrainArgs, cache_mode: str) -> Loop:
        """A loop over what is trainable in the model now, its activations cached if they are needed more than once."""
        fabric = self.fabric
        world = World(fabric.global_rank, fabric.world_size, lambda tensor: _sum(fabric, tensor))
        batches = Batches(self.splits.train, _per_rank(train, world.size), world, self.job.seed)
        own_val = list(range(world.rank, len(self.splits.val), world.size))
        val_batches = _chunks(own_val, train.micro_batch_size)[: self.job.eval.max_iters]
        repeats = train.epochs != 1 and (train.max_steps is None or train.max_steps > batches.per_epoch)
        train_mode = "off" if cache_mode == "auto" and not repeats else cache_mode
        return Loop(
            model=self.model,
            optimizer=make_optimizer(self.job.optimizer, [p for p in self.model.parameters() if p.requires_grad]),
            train=train,
            eval=self.job.eval,
            batches=batches,
            activations=self._activations(self.splits.train, batches.owned(world.rank), "training", train_mode),
            val_batches=val_batches,
            val_activations=self._activations(self.splits.val, [i for rows in val_batches for i in rows], "validation", cache_mode),
            world=world,
            device=fabric.device,
            autocast=fabric.autocast,
            log=self.log,
            console=self.console,
            save=self.save,
            answer=self.answer,
        )

    def _activations(self, samples: list[Sample], rows: list[int], name: str, mode: str) -> Activations:
        folder = self.job.cache_dir or self.job.out_dir.parent / "activation_cache"
        dtype = _cache_dtype(self.job.cache_dtype, self.model.dtype)
        settings = CacheSettings(mode, folder, dtype, self.console.say)
        with self.console.progress(f"{name} cache") as progress, self.fabric.autocast():
            return activations(self.model, samples, rows, name, settings, self.fabric.device, progress)


def _require_place(out_dir: Path, overwrite: bool, base: Path) -> None:
    """UserError unless the run can be written to `out_dir`, and `base` stays."""
    nearest = next(path for path in (out_dir, *out_dir.absolute().parents) if os.path.exists(path))
    if not nearest.is_dir():
        raise UserError(f"out_dir {out_dir} is no place for a folder: {nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"out_dir {out_dir} cannot be written to: you may not write to {nearest}")
    earlier = _earlier(out_dir)
    if earlier and not overwrite:
        names = ", ".join(path.name for path in earlier)
        raise UserError(f"out_dir {out_dir} holds an earlier run ({names}): give another --out_dir, or --overwrite true to replace it")
    if any(base.resolve().is_relative_to(path.resolve()) for path in earlier):
        raise UserError(f"checkpoint_dir {base} is part of the run that --overwrite true would replace: give another --out_dir")


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

        ids = torch.tensor(tokenizer.ids(prompt))
        room = min(len(ids) + length, model.max_seq_length)
        if room > len(ids):
            tokens = list(generate(model, ids, room, temperature=0.0, stop_tokens=style.stop_tokens(tokenizer)))
            model.clear_kv_cache()
            console.say(f"  asked: {record.get('instruction') or prompt}\n  answered: {tokenizer.decode(tokens).strip()}")

    return answer


def _save(job: Job, method: Method, model: Any, base: Path, style: PromptStyle, folder: Path, fabric: Any, final: bool = False) -> None:
    """Write a checkpoint folder, whole or not at all. Raises UserError if the disk is full."""
    try:
        if fabric.global_rank == 0:
            with checkpoint.new_folder(folder) as temporary:
                method.save(model, temporary)
                checkpoint.save_config(model.config, temporary)
                checkpoint.write_text(temporary / "hyperparameters.yaml", yaml.safe_dump(job.hyperparameters, sort_keys=False))
                checkpoint.copy_tokenizer_files(base, temporary)
                save_prompt_style(style, temporary)
                if final:
                    method.finish(model, temporary)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides the one behind the other
        if isinstance(cause, OSError):
            raise UserError(f"{folder} cannot be written: {cause.strerror}") from None
        raise
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
