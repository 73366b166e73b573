"""A fine-tuning job: its settings, and all that is read and checked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from litgpt import atomic, checkpoint
from litgpt.activations.choose import choose
from litgpt.activations.shared import SharedActivations
from litgpt.args import EvalArgs, LogArgs, TrainArgs, as_config
from litgpt.config import Config
from litgpt.data.base import DataModule, Record, Splits
from litgpt.device import backbone_dtype, default_device, default_precision, make_fabric
from litgpt.errors import UserError
from litgpt.files import read_json
from litgpt.logs import Console
from litgpt.lora import GPT, keep_taps
from litgpt.optim import make_optimizer
from litgpt.prompts import PromptStyle, resolve_prompt_style
from litgpt.tokenizer import Tokenizer
from litgpt.train.faults import ends_together, is_out_of_memory, out_of_memory
from litgpt.train.interrupts import Signals
from litgpt.train.loop import samples_per_rank
from litgpt.train.methods import Method, describe, describe_choice
from litgpt.train.out_dir import Place, Resume
from litgpt.train.report import REPORT, as_json
from litgpt.train.resume import Stopwatch, read
from litgpt.train.session import Session

if TYPE_CHECKING:
    from lightning.fabric import Fabric


CACHE_DTYPES = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


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
    resume: Resume
    hyperparameters: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    """names of the LoRA flags that are set, for the line that says where they apply"""
    cache_mode: str = "off"
    cache_dir: Path | None = None
    cache_dtype: str | None = None

    @classmethod
    def of(cls, arguments: dict[str, Any], **extra: Any) -> Job:
        """The job that a command's arguments describe. What is saved of them starts the same run anew, wherever nothing stands."""
        own = {f.name: arguments[f.name] for f in fields(cls) if f.name in arguments}
        return cls(**own, **extra, hyperparameters=as_config({**arguments, "resume": False, "overwrite": False}))


@dataclass
class Prepared:
    """A job whose settings, data and checkpoint are right, and what was read of them."""

    job: Job
    method: Method
    base: Path
    precision: str
    fabric: Fabric
    console: Console
    tokenizer: Tokenizer
    style: PromptStyle
    splits: Splits
    model: GPT
    example: Record
    """the validation record to answer"""
    cache_dtype: torch.dtype
    chosen: list[int] | None = None
    """the tapped blocks, if `auto` chose them"""
    shared: SharedActivations | None = None
    """activations that are there already; None: the run makes its own"""

    def tell(self) -> None:
        """Say what is trained on what."""
        for line in (
            f"{self.model.config.name}, {self.precision} on {self.fabric.device}",
            *describe(self.model, self.job.notes, self.method.warmup),
        ):
            self.console.say(line)


def run(job: Job, method: Method, ready: Callable[[], Prepared] | None = None) -> dict[str, Any]:
    """Do the job; the figures of its report. Raises UserError before anything is written if a setting, file or checkpoint is wrong.

    `ready`: what reads data and model, if it is not `prepare`.
    """
    from lightning.fabric.utilities.rank_zero import rank_zero_only  # set when it is imported, from the launcher's variables

    clock, is_first = Stopwatch(), not getattr(rank_zero_only, "rank", 0)
    base = checkpoint.require_checkpoint(job.checkpoint_dir)
    with Signals() as signals, Place(job.out_dir, job.resume, job.overwrite, base, is_first) as place:
        if place.is_finished:
            Console(is_first).say(f"{job.out_dir / 'final'} is there: this run is finished, nothing is left to do")
            return finished_report(job.out_dir, is_first)
        point = place.resume_point(Console(is_first).say)
        prepared = ready() if ready else prepare(job, method, point)
        prepared.tell()
        return Session(prepared, place, signals, clock, read(point) if point else None).run()


def finished_report(out_dir: Path, is_first: bool = True) -> dict[str, Any]:
    """The report of the run that has ended there."""
    report = read_json(out_dir / "final" / REPORT)
    if is_first and not (out_dir / REPORT).is_file():  # it was killed between the two
        atomic.write_text(out_dir / REPORT, as_json(report))
    return report


def prepare(job: Job, method: Method, point: Path | None = None) -> Prepared:
    """Read data and model and check every setting. Writes nothing. Raises UserError if a setting, file or checkpoint is wrong.

    `point`: the checkpoint that the run goes on from, if it does, with the blocks that were chosen for it.
    """
    base = checkpoint.require_checkpoint(job.checkpoint_dir)
    precision = job.precision or default_precision(default_device())
    dtype = backbone_dtype(precision)
    cache_dtype = _cache_dtype(job.cache_dtype, dtype)
    fabric = make_fabric(precision, job.devices, job.num_nodes)
    samples_per_rank(job.train, fabric.world_size)
    fabric.launch()
    fabric.seed_everything(job.seed, verbose=False)
    console = Console(fabric.global_rank == 0)
    with ends_together(fabric), _memory_explained(fabric.device, "while data and model were read"):
        tokenizer = Tokenizer(base)
        style = resolve_prompt_style(job.data.prompt_style, base, tokenizer)
        splits = _splits(job, fabric, tokenizer, style, base)
        console.say(f"data: {splits.report}")
        model = method.build(base, dtype)
        model.to(fabric.device)
    _require_known_ids(splits, model.config, base)
    model.activation_checkpointing = job.train.activation_checkpointing
    model.max_seq_length = _max_seq_length(job, model.config)
    model.reach = max(sample.n_inputs for sample in (*splits.train, *splits.val))
    make_optimizer(job.optimizer, model.parameters())  # wrong settings show before anything is computed or written
    example = _example(job, splits.examples)
    chosen = None
    if count := model.config.taps_to_choose:
        with ends_together(fabric):
            chosen = checkpoint.chosen_taps(point) if point else choose_taps(job, model, count, splits, fabric, console)
        if chosen:
            keep_taps(model, chosen)
    return Prepared(job, method, base, precision, fabric, console, tokenizer, style, splits, model, example, cache_dtype, chosen)


def choose_taps(job: Job, model: GPT, count: int, splits: Splits, fabric: Fabric, console: Console) -> list[int]:
    """The `count` of the tapped blocks that the first process chooses for all, and a line that says why."""
    candidates = model.config.taps
    blocks = list(candidates)
    if fabric.global_rank == 0 and count < len(candidates):
        clock = Stopwatch()
        with (
            _memory_explained(fabric.device, "while blocks were chosen"),
            console.progress("choosing blocks") as progress,
            fabric.autocast(),
        ):
            choice = choose(model, splits.train, count, job.train.micro_batch_size, job.seed, progress)
        console.say(describe_choice(choice, candidates, clock.seconds))
        blocks = list(choice.blocks)
    return fabric.broadcast(blocks)


@contextmanager
def _memory_explained(device: torch.device, where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        remedies = ["A smaller model, or --precision bf16-true, needs less"]
        raise out_of_memory(error, where, device, remedies) from None


def _splits(job: Job, fabric: Fabric, tokenizer: Tokenizer, style: PromptStyle, base: Path) -> Splits:
    with fabric.rank_zero_first():
        job.data.prepare_data()
    return job.data.splits(tokenizer, style, _max_seq_length(job, Config.from_checkpoint(base)))


def _require_known_ids(splits: Splits, config: Config, base: Path) -> None:
    largest = max(max(sample.input_ids) for sample in (*splits.train, *splits.val))
    if largest >= config.V:
        raise UserError(
            f"{base / 'tokenizer.json'} gives the token id {largest}, the model knows {config.V}: it is another model's, copy it again"
        )


def _max_seq_length(job: Job, config: Config) -> int:
    """What a sample is cut to: the smaller of what is asked for and what the model can read."""
    return min(job.train.max_seq_length or config.block_size, config.block_size)


def _cache_dtype(name: str | None, backbone: torch.dtype) -> torch.dtype:
    """The dtype asked for; the backbone's, which loses nothing, if none is."""
    if name is not None and name not in CACHE_DTYPES:
        raise UserError(f"skip2lora_cache_dtype is {name!r}: choose one of {', '.join(CACHE_DTYPES)}")
    return CACHE_DTYPES[name] if name else backbone


def _example(job: Job, examples: list[Record]) -> Record:
    """The validation record that `eval.evaluate_example` names."""
    which = job.eval.evaluate_example
    if which == "random":
        which = int(torch.randint(len(examples), (), generator=torch.Generator().manual_seed(job.seed)))
    number = 0 if which == "first" else int(which)
    if number >= len(examples):
        raise UserError(f"eval.evaluate_example is {number}: the validation set has {len(examples)} samples, counted from 0")
    return examples[number]
