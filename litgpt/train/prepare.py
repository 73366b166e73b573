"""Everything that is read and checked before a run writes anything: settings, data, checkpoint, model."""

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from litgpt.activations import choose as choosing
from litgpt.activations.cache import ActivationCache, CacheSettings
from litgpt.activations.prompts import replies
from litgpt.adapters.blocks import auto_count
from litgpt.args import TrainArgs
from litgpt.checkpoint import WEIGHTS, chosen_taps, tokenizer_contents
from litgpt.compiled import compile_training
from litgpt.config import Config
from litgpt.convert.litgpt import require_finite
from litgpt.data.base import Splits
from litgpt.data.text_files import Text
from litgpt.device import backbone_dtype, default_device, default_precision, process_rank, seed_everything
from litgpt.errors import UserError
from litgpt.logs import Console, require_logger
from litgpt.lora import GPT, LoRALayer, keep_taps
from litgpt.objectives.base import Objective
from litgpt.objectives.named import objective_of
from litgpt.objectives.reference import require_reference
from litgpt.optim import make_optimizer
from litgpt.packed import pack
from litgpt.prompts import ChatTemplate, PromptStyle, reply_header, resolve_prompt_style
from litgpt.sharding import part_of
from litgpt.text import counted
from litgpt.tokenizer import Tokenizer
from litgpt.train.examples import Example, examples_of
from litgpt.train.interrupts import memory_explained
from litgpt.train.launch import place_of
from litgpt.train.loop import Batches
from litgpt.train.methods import Method, describe, describe_choice
from litgpt.train.parallel import Rank, ends_together
from litgpt.train.replay import ANSWER_TOKENS, base_answers, distil, follow_up_samples, replay_samples
from litgpt.train.resume import Saved, Stopwatch
from litgpt.train.settings import Run
from litgpt.train.strategy import choose, require_shardable

CACHE_DTYPES = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass
class Job:
    """A run whose settings, data and checkpoint are valid, and what was read from them."""

    settings: Run
    method: Method
    precision: str
    rank: Rank
    console: Console
    tokenizer: Tokenizer
    tokenizer_contents: dict[str, bytes]  # its files as they were read, for the checkpoints
    style: PromptStyle
    splits: Splits
    model: GPT
    examples: list[Example]  # the validation records to answer; none in a sweep
    cache_dtype: torch.dtype
    date: datetime  # the date that the chat template sees; a resumed run keeps it
    general_answers: list[str] | None = None  # the base model's, which `train.replay` trains; a resumed run keeps them
    shared: dict[str, ActivationCache] | None = None  # filled caches that several runs share; None: the run makes its own

    @property
    def kept(self) -> dict[str, Any]:
        """The values that a resumed run takes over, as plain types."""
        return {"date": self.date.isoformat(), "general_answers": self.general_answers}

    @property
    def chosen(self) -> list[int] | None:
        """The tapped blocks, if `auto` chose them."""
        config, settings = self.model.config, vars(self.settings)
        was_auto = config.skip2lora_enabled and auto_count(settings["skip2lora_block_indices"], config.n_layer)
        return list(config.taps) if was_auto else None

    @property
    def objective(self) -> Objective:
        """The objective that a step minimises; a new object for each loop."""
        return objective_of(self.settings)

    def batches(self, train: TrainArgs) -> Batches:
        """Return the batches of the training samples."""
        group, seed = self.objective.group, self.settings.seed
        return Batches(self.splits.train, train.global_batch_size * group, self.rank, seed, train.group_by_length, group=group)

    @property
    def cache_folder(self) -> Path:
        """The folder for caches on disk."""
        return self.method.cache_dir or self.settings.out_dir.parent / "activation_cache"

    def cache_settings(self, mode: str) -> CacheSettings:
        """Return where activations are kept; the console shows the progress of filling them."""
        return CacheSettings(mode, self.cache_folder, self.cache_dtype, self.console, self.rank.agreed)

    def say_what_is_trained(self) -> None:
        rank = self.rank
        share = f", {rank.size} processes, each with a {'part' if rank.sharded else 'copy'} of the model" if rank.size > 1 else ""
        form = ", ".join(filter(None, (self.precision, self.method.quantize)))
        self.console.say(f"{self.model.config.name}, {form} on {rank.device}{share}")
        for line in describe(self.model, self.method.warmup):
            self.console.detail(line)


def prepare(settings: Run, method: Method, saved: Saved | None = None, rank: Rank | None = None) -> Job:
    """Read data and model and check every setting. Writes nothing. Raises UserError if a setting, file or checkpoint is wrong.

    `saved`: the checkpoint to resume. `rank`: this process; by default the number of processes that the settings name is started here.
    """
    precision = settings.precision or default_precision(default_device())
    dtype = backbone_dtype(precision)
    _cache_dtype(method.cache_dtype, dtype)
    require_shardable(settings, method)
    require_logger(settings.logger_name)
    optimizer = make_optimizer(settings.optimizer, [torch.nn.Parameter(torch.zeros(1))])  # raises for wrong settings
    if rank is None:
        place, batch_size = place_of(settings.devices, settings.num_nodes), settings.train.global_batch_size
        if place and batch_size % place.size:  # before other processes are started
            raise UserError(f"train.global_batch_size {batch_size} is not a multiple of the {place.size} devices")
        rank = Rank.start(precision, settings.devices, settings.num_nodes, settings.timeout, settings.wants_shards)
    with ends_together(rank), memory_explained(rank.device, "while data and model were read"):
        seed_everything(settings.seed)
        job = _read(settings, method, precision, rank, saved)
        if not optimizer.param_groups[0]["lr"]:
            job.console.say("warning: nothing is trained, as the optimizer's learning rate (lr) is 0")
        scalings = [module.scaling for module in job.model.modules() if isinstance(module, LoRALayer) and module.r]
        if scalings and not any(scalings):
            job.console.say("warning: nothing is trained, as the adapters' alpha (lora_alpha, skip2lora_alpha) is 0")
        if count := job.model.config.taps_to_choose:
            blocks = chosen_taps(saved.folder) if saved else choose_taps(job, count)
            if blocks:
                keep_taps(job.model, blocks)
    if rank.index:
        torch.manual_seed(settings.seed + rank.index)  # dropout differs between ranks
    return job


def _read(settings: Run, method: Method, precision: str, rank: Rank, saved: Saved | None) -> Job:
    """Return the run with its data and its model."""
    base, kept = settings.checkpoint_dir, saved.facts if saved else {}
    date = rank.broadcast(datetime.fromisoformat(kept["date"]) if "date" in kept else datetime.now())
    console = Console(rank.is_first and process_rank() == 0, settings.verbose or settings.dry_run)
    dtype = backbone_dtype(precision)
    tokenizer = Tokenizer(base)
    contents = tokenizer_contents(base)
    assert settings.data is not None
    style = resolve_prompt_style(settings.data.prompt_style, base, tokenizer, settings.data.fallback_style)
    if isinstance(style, ChatTemplate):
        style.now = date
    if not rank.is_first:  # the first process alone prepares the data
        rank.barrier()
    settings.data.prepare_data()
    if rank.is_first:
        rank.barrier()
    objective = objective_of(settings)
    _require_fitting(settings, objective)
    splits = settings.data.splits(tokenizer, style, _max_seq_length(settings, Config.from_checkpoint(base)), objective.units)
    validated = settings.eval.validated(len(splits.val) // objective.group, settings.train.micro_batch_size)
    objective.check(splits.train, splits.val[: validated * objective.group], settings.data.source)
    if objective.reference is not None:
        require_reference(objective.reference, base, max(len(sample.input_ids) for sample in splits.train), convert=not settings.dry_run)
    console.say(f"data: {splits.report}")
    if rank.group is not None:
        is_sharded, why = choose(settings, method, rank, splits.train, dtype)
        rank = replace(rank, sharded=is_sharded)
        console.say(why)
    model = method.build(base, dtype, rank.device if rank.sharded else None, settings.cpu_offload)
    parts = {name: part_of(parameter) for name, parameter in model.named_parameters()}
    require_finite(parts, base / WEIGHTS, lambda flags: rank.gather(flags).any(0))
    if not rank.sharded:
        model.to(rank.device)
        if not precision.endswith("-mixed"):
            pack(model, backward=True)
    if getattr(settings, "compile", False) and not settings.dry_run:
        compile_training(model)
    model.max_seq_length = _max_seq_length(settings, model.config)
    examples = examples_of(settings.eval, settings.seed, splits.examples, style, tokenizer)
    cache_dtype = _cache_dtype(method.cache_dtype, dtype)
    job = Job(settings, method, precision, rank, console, tokenizer, contents, style, splits, model, examples, cache_dtype, date)
    job.general_answers = kept.get("general_answers")
    _add_samples(job)
    largest = max(max(sample.input_ids) for sample in (*splits.train, *splits.val))
    if largest >= model.config.V:
        file = base / "tokenizer.json"
        raise UserError(
            f"{file} gives the token id {largest}, the model knows {model.config.V}: it belongs to another model, copy it again"
        )
    if model.config.alora_enabled:
        console.detail(_switch_on_replies(job))
    model.activation_checkpointing = settings.train.activation_checkpointing
    model.neftune_alpha, model.word_dropout = settings.train.neftune_noise_alpha or 0.0, settings.train.word_dropout
    return job


def _add_samples(job: Job) -> None:
    """Add second questions and general ones to the training samples, as the settings say."""
    train, splits, how = job.settings.train, job.splits, (job.tokenizer, job.style, job.model.max_seq_length)
    if train.replay and job.general_answers is None:
        job.general_answers = _general_answers(job)
    splits.train += follow_up_samples(splits.records, train.follow_ups, job.settings.seed, *how)
    general = replay_samples(job.general_answers or [], *how)
    with job.rank.autocast():
        distil(job.model, general, job.rank.device)
    splits.train += general
    splits.records = []  # may be many


def _require_fitting(settings: Run, objective: Objective) -> None:
    """Raise UserError if the objective rates or compares answers, or questions are to follow others, and the data or settings cannot."""
    name, data = getattr(settings, "objective", ""), settings.data
    assert data is not None
    kind = "gives tokens" if data.gives_tokens else "is running text" if isinstance(data, Text) else ""
    if kind and objective.of_answers:
        raise UserError(f"objective {name} rates or compares answers, and {type(data).__name__} {kind}: give data with answers")
    for key, what in (("follow_ups", "puts questions after others"), ("word_dropout", "leaves out words of questions")):
        if kind and getattr(settings.train, key):
            raise UserError(f"train.{key} {what}, and {type(data).__name__} {kind}: leave it out")
    adds = "adds answers that have no counterpart and no reward"
    for key, what in (("replay", adds), ("follow_ups", adds), ("word_dropout", "changes the questions for each answer")):
        if objective.of_answers and getattr(settings.train, key):
            raise UserError(f"train.{key} {what}: leave it out with objective {name}")


def _switch_on_replies(job: Job) -> str:
    """Set the tokens that switch answer-only LoRA on, if they are not given. Return a line about its positions.

    They are the tokens that the prompt style writes between a prompt and its reply in every sample. Raises UserError if there are none, or
    if a reply does not follow them.
    """
    settings, model, splits, style, tokenizer = job.settings, job.model, job.splits, job.style, job.tokenizer
    samples = (*splits.train, *splits.val)
    given = getattr(settings, "alora_invocation_tokens", None)
    invocation = list(given or tokenizer.ids(reply_header(style), bos=False))
    if not given:
        for sample in samples:
            begin = max(sample.loss_mask.find(1), 0)
            before = list(sample.input_ids[max(0, begin - len(invocation)) : begin])
            while invocation and invocation != before[len(before) - len(invocation) :]:
                invocation = invocation[1:]
        if not invocation:
            is_masked = getattr(settings.data, "mask_prompt", True)
            marks = "Use a style that marks replies, such as chatml, or give alora_invocation_tokens"
            remedy = marks if is_masked else "Set data.mask_prompt true: replies begin where loss does"
            named = style.name or type(style).__name__
            raise UserError(f"alora_enabled: nothing opens a reply in every sample with the prompt style {named!r}. {remedy}")
    settings.alora_invocation_tokens = model.config.alora_invocation_tokens = invocation  # type: ignore[attr-defined]
    if model.switch is not None:
        model.switch.invocation = invocation
    spans = [replies(sample, invocation) for sample in samples]
    own = sum(stop - start for found in spans[: len(splits.train)] for start, stop in found)
    total = sum(sample.n_inputs for sample in splits.train)
    return (
        f"answer-only LoRA: acts on replies, from {tokenizer.decode(invocation, skip_special_tokens=False)!r} on: {own:,} of an epoch's "
        f"{total:,} tokens"
    )


def choose_taps(job: Job, count: int) -> list[int]:
    """Return the `count` tapped blocks that the first process chooses for all, and say why. A sharded model runs in all processes."""
    candidates, rank, console = job.model.config.taps, job.rank, job.console
    blocks = list(candidates)
    if (rank.is_first or rank.sharded) and count < len(candidates):
        clock = Stopwatch()
        memory = memory_explained(rank.device, "while blocks were chosen")
        with memory, console.progress("choosing blocks") as progress, rank.autocast():
            choice = choosing.choose(job.model, job.splits.train, count, job.settings.train.micro_batch_size, job.settings.seed, progress)
        console.say(describe_choice(choice, candidates, clock.seconds))
        blocks = list(choice.blocks)
    return list(rank.broadcast(blocks))


def _general_answers(job: Job) -> list[str]:
    """Return the model's answers to general questions, from the first process for all. The adapters have no effect yet.

    Examples with the same number of answer tokens are answered in the same batch, which takes hardly longer.
    """
    rank, count, answers = job.rank, job.settings.train.replay, list[str]()
    if rank.is_first or rank.sharded:
        job.console.say(f"The base model answers {counted(count, 'general question')}")
        with rank.autocast():
            others = job.examples if job.settings.eval.max_new_tokens == ANSWER_TOKENS else []
            answers = base_answers(job.model, job.tokenizer, job.style, count, others)
    return list(rank.broadcast(answers))


def _max_seq_length(settings: Run, config: Config) -> int:
    """Return the length that samples are cut to: the smaller of the setting and what the model can read."""
    return min(settings.train.max_seq_length or config.block_size, config.block_size)


def _cache_dtype(name: str | None, backbone: torch.dtype) -> torch.dtype:
    """Return the dtype of the setting; by default the backbone's, which is lossless."""
    if name is not None and name not in CACHE_DTYPES:
        raise UserError(f"skip2lora_cache_dtype is {name!r}: choose one of {', '.join(CACHE_DTYPES)}")
    return CACHE_DTYPES[name] if name else backbone
