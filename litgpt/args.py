"""The groups of settings that all training commands share, `train.*`, `eval.*` and `log.*`, and tools for dataclasses of settings.

The string below each field is its help text on the command line. A value out of range raises a `UserError` that names the key.
`setting` marks a field: its value may vary between the trials of a sweep, or may change when a run is resumed.
"""

import copy
import dataclasses
import math
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional, TypeGuard, Union

from litgpt.errors import UserError

DEFAULT_WARMUP_STEPS = 100
LAST_SEED = 2**32 - 1
SECRET = "access_token"  # the key whose value is never printed or saved
# keys that a published text leaves out, with all below them; `lora_key` is not a secret
SECRET_KEY = re.compile(r"(^|[_.])(token|api_key|access_key|secret_key|secret|password)(\.|$)|(^|\.)key(\.|$)")

Quantization = Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8-training", "bnb.int8", "int8"]  # see `litgpt.quantize`
Accelerator = Literal["auto", "cpu", "gpu", "cuda", "xpu", "mps"]  # gpu and cuda are the same
Grid = dict[str, list[Any]]  # values to try for other keys, in all combinations
ALLOWED_CLASSES = ("litgpt.", "torch.optim.", "bitsandbytes.optim.")  # packages of the classes that settings may name


class Range(NamedTuple):
    """The range of numbers that a setting accepts."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False  # `least` itself is out of range
    below: bool = False  # `most` itself is out of range
    whole: bool = False
    hint: str = ""

    def holds(self, value: Any) -> bool:
        """Return True for a finite number in the range."""
        return (
            is_number(value)
            and (not self.whole or isinstance(value, int))
            and (self.least < value if self.above else self.least <= value)
            and (value < self.most if self.below else value <= self.most)
        )

    def __str__(self) -> str:
        text = "a whole number" if self.whole else "a number"
        if self.most < math.inf:
            text += f" {'above' if self.above else 'from'} {self.least:g} {'to below' if self.below else 'to'} {self.most:g}"
        elif self.least > -math.inf:
            text += f" {'above' if self.above else 'of at least'} {self.least:g}"
        return f"{text} {self.hint}".rstrip()


FROM_0, ABOVE_0, SHARE = Range(0), Range(0, above=True), Range(0, 1)
COUNT, POSITIVE = Range(0, whole=True), Range(1, whole=True)
TEMPERATURE = Range(0, hint="(0: always the most probable token)")
TOP_K = Range(1, whole=True, hint="(null: among all tokens)")


def setting(
    default: Any, numbers: Range | None = None, *, varies: bool = False, may_change: bool = False, older_names: tuple[str, ...] = ()
) -> Any:
    """Return a dataclass field with this default.

    Args:
        numbers: The range that `require_ranges` checks.
        varies: The trials of one sweep may have different values: the value changes neither the data nor the frozen layers' outputs.
        may_change: A resumed run may have another value: the steps that both runs take are the same.
        older_names: Names of the key in earlier versions, which configurations may still use.
    """
    metadata = {"numbers": numbers, "varies": varies, "may_change": may_change, "older_names": older_names}
    if dataclasses.is_dataclass(default):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def function_of(settings: type, *names: str) -> Callable[..., None]:
    """Return LitGPT's function for the command of a settings class; `names` are the fields that it takes by position."""

    def run(*args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(names[: len(args)], args, strict=True)), **kwargs}
        paths = {key: Path(value) for key, value in given.items() if key.endswith(("_dir", "_path")) and isinstance(value, str)}
        settings(**{**given, **paths}).main()

    run.__doc__ = f"Run the command with these settings, the fields of `{settings.__name__}`."
    return run


def marked(settings: type, mark: Literal["varies", "may_change"], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a settings dataclass that carry the mark, those of its groups as `train.epochs`."""
    hints = typing.get_type_hints(settings)
    for item in dataclasses.fields(settings):
        if item.metadata.get(mark):
            yield prefix + item.name
        elif hints[item.name] in (TrainArgs, EvalArgs):
            yield from marked(hints[item.name], mark, f"{item.name}.")


def older_names(settings: type) -> dict[str, str]:
    """Return the older names of keys, each with its current name."""
    return {older: item.name for item in dataclasses.fields(settings) for older in item.metadata.get("older_names", ())}


def require_ranges(settings: Any, group: str = "") -> None:
    """Raise UserError for a number of a settings dataclass that is out of its range; `group` precedes the key in the message."""
    for item in dataclasses.fields(settings):
        numbers, value = item.metadata.get("numbers"), getattr(settings, item.name)
        may_be_missing = value is None and type(None) in typing.get_args(item.type)
        if numbers is not None and not may_be_missing and not numbers.holds(value):
            raise UserError(f"{group}{item.name} is {repr(value)[:60]}: {numbers} is needed")


@dataclass
class TrainArgs:
    """How long to train, in what batches, and how the learning rate moves."""

    save_interval: Optional[int] = setting(1000, POSITIVE, may_change=True)
    """Optimizer steps between permanent checkpoints. null: only the final one."""
    save_every_minutes: Optional[float] = setting(30, ABOVE_0, may_change=True)
    """Minutes between checkpoints to resume from, besides save_interval's. Each is removed when the next checkpoint is complete."""
    keep_last: Optional[int] = setting(None, POSITIVE, may_change=True)
    """Keep only this many of save_interval's checkpoints, the newest. null keeps all."""
    keep_best: bool = setting(True, may_change=True)
    """Keep the checkpoint with the lowest validation loss, in best/."""
    log_interval: int = setting(1, POSITIVE, may_change=True)
    """Optimizer steps between lines in the log."""
    global_batch_size: int = setting(16, POSITIVE, varies=True)
    """Samples per optimizer step, over all devices."""
    micro_batch_size: int = setting(4, POSITIVE, varies=True)
    """Samples per forward pass on one device. The rest of the global batch is accumulated."""
    lr_warmup_steps: Optional[int] = setting(DEFAULT_WARMUP_STEPS, COUNT, varies=True)
    """Optimizer steps in which the learning rate rises from 0. null: see lr_warmup_fraction, or no warm-up."""
    lr_warmup_fraction: Optional[float] = setting(None, SHARE, varies=True)
    """Warm-up as a share (0 to 1) of all steps. Give this or lr_warmup_steps, not both."""
    epochs: Optional[int] = setting(5, POSITIVE, varies=True)
    """Passes over the training samples."""
    max_tokens: Optional[int] = setting(None, POSITIVE, varies=True)
    """Stop after this many tokens, over all devices."""
    max_steps: Optional[int] = setting(None, POSITIVE, varies=True)
    """Stop after this many optimizer steps."""
    max_time: Optional[float] = setting(None, ABOVE_0, varies=True, may_change=True)
    """Stop after this many seconds of training."""
    max_seq_length: Optional[int] = setting(None, POSITIVE)
    """Cut samples to this many tokens. null: the model's context length."""
    group_by_length: bool = setting(False, varies=True)
    """Put samples of similar length in a batch, which takes less memory. The order of the batches stays random."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the blocks that gradients cross, and run each block again in the backward pass: less memory, more time."""
    neftune_noise_alpha: Optional[float] = setting(None, ABOVE_0)
    """Add uniform noise to the embeddings in training (NEFTune), 5 for example. Nothing is cached then. null: no noise."""
    tie_embeddings: Optional[bool] = None
    """Share one weight between the token embedding and the output head. null: as the checkpoint has it."""
    replay: int = setting(0, COUNT)
    """Also train on this many general questions (24 at most), with the base model's own answers, so that the model forgets less."""
    follow_ups: float = setting(0.0, SHARE)
    """Also train this share (0 to 1) of the questions as the second one of a conversation, so that the model answers it there, too."""
    word_dropout: float = setting(0.0, SHARE)
    """Leave out this share (0 to 1) of the tokens of questions, others in each step, so that answers are found by other words too.
    Nothing is cached then."""
    max_norm: Optional[float] = setting(None, ABOVE_0, varies=True)
    """Clip gradients to this norm. null: no clipping."""
    min_lr: float = setting(6e-5, FROM_0, varies=True)
    """Learning rate at the end of the cosine decay."""
    skip_nonfinite: bool = setting(False, varies=True, may_change=True)
    """Skip a step whose loss or gradient is not finite. Otherwise the run saves its state and stops (exit code 3)."""

    def __post_init__(self) -> None:
        require_ranges(self, "train.")
        if self.global_batch_size % self.micro_batch_size:
            raise UserError(
                f"train.global_batch_size ({self.global_batch_size}) must be a multiple of train.micro_batch_size"
                f" ({self.micro_batch_size}): change one of them"
            )
        is_timed = self.epochs is None and self.max_tokens is None and self.max_steps is None
        if is_timed and self.max_time is None:
            raise UserError("training would never end: set one of train.epochs, train.max_steps, train.max_tokens, train.max_time")
        if is_timed and self.lr_warmup_fraction:
            raise UserError(
                f"train.lr_warmup_fraction is {self.lr_warmup_fraction}, a share of all steps, but train.max_time alone does not give "
                "their number: give train.lr_warmup_steps instead, or set train.epochs, train.max_steps or train.max_tokens too"
            )
        if self.lr_warmup_fraction is not None:
            if self.lr_warmup_steps not in (None, 0, DEFAULT_WARMUP_STEPS):
                raise UserError(
                    f"train.lr_warmup_steps ({self.lr_warmup_steps}) and train.lr_warmup_fraction ({self.lr_warmup_fraction}) are both "
                    "given: leave one out; --train.lr_warmup_steps 0 overrides a YAML file"
                )
            self.lr_warmup_steps = None

    def batch_size(self, devices: int, num_nodes: int = 1) -> int:
        """Return the samples per optimizer step of one device."""
        return max(self.global_batch_size // (devices * num_nodes), 1)

    def gradient_accumulation_iters(self, devices: int, num_nodes: int = 1) -> int:
        """Return the forward passes per optimizer step of one device."""
        return max(self.batch_size(devices, num_nodes) // self.micro_batch_size, 1)

    def warmup_iters(self, devices: int, num_nodes: int, max_iters: int, train_dataloader: Sized) -> int:
        """Return the forward passes of the warm-up, `max_iters` at most; a fraction is one of the loader's batches."""
        if self.lr_warmup_fraction:
            return min(max_iters, math.ceil(self.lr_warmup_fraction * len(train_dataloader)))
        return min(max_iters, (self.lr_warmup_steps or 0) * self.gradient_accumulation_iters(devices, num_nodes))


@dataclass
class EvalArgs:
    """When to validate, and on how many batches."""

    interval: int = setting(600, POSITIVE)
    """Optimizer steps between validations."""
    max_new_tokens: Optional[int] = setting(None, COUNT, may_change=True)
    """Length of the sample answer that is generated at each validation. null: none is generated."""
    max_iters: int = setting(100, POSITIVE)
    """Maximum number of batches per validation."""
    initial_validation: bool = False
    """Validate before the first step."""
    final_validation: bool = True
    """Validate after the last step."""
    evaluate_example: Union[int, list[int], str] = setting("first", may_change=True)
    """The validation sample to answer: "first", "random" or its number, counted from 0; or a list of numbers."""
    target_loss: Optional[float] = setting(None, ABOVE_0, varies=True, may_change=True)
    """Stop as soon as the validation loss is this low. null: never."""
    patience: Optional[int] = setting(None, POSITIVE, varies=True, may_change=True)
    """Stop after this many validations in a row without a lower loss. null: never."""

    def validated(self, units: int, micro_batch_size: int) -> int:
        """Return how many of the validation set's `units` are measured."""
        return min(units, self.max_iters * micro_batch_size)

    def __post_init__(self) -> None:
        require_ranges(self, "eval.")
        examples = self.evaluate_example if isinstance(self.evaluate_example, list) else [self.evaluate_example]
        for example in examples:
            if example not in ("first", "random") and (isinstance(example, str) or example < 0):
                raise UserError(f'eval.evaluate_example must be "first", "random", a number from 0 or a list of them, but is {example!r}')


@dataclass
class LogArgs:
    """Names and extras for the loggers that have them (wandb, mlflow, litlogger)."""

    project: Optional[str] = None
    """Project to log to."""
    run: Optional[str] = None
    """Name of this run."""
    group: Optional[str] = None
    """Name of a group of runs."""
    teamspace: Optional[str] = None
    """Teamspace of the run (litlogger)."""
    metadata: Optional[dict[str, Any]] = None
    """Anything to store with the run."""
    log_model: bool = False
    """Store the checkpoints with the run (litlogger)."""
    save_logs: bool = True
    """Store the terminal output with the run (litlogger)."""
    checkpoint_name: Optional[str] = None
    """Name of the stored checkpoints (litlogger)."""


def is_number(value: Any) -> TypeGuard[float]:
    """Return True for a finite number; true and false do not count."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def require_seed(seed: Any, place: str = "seed") -> None:
    """Raise UserError, which names the setting, if `seed` is not a seed of every random generator."""
    if type(seed) is not int or not 0 <= seed <= LAST_SEED:
        raise UserError(f"{place} is {seed!r}: a number from 0 to {LAST_SEED} is needed")


def flat(mapping: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `("grid.optimizer.lr", [1])` for `{"optimizer": {"lr": [1]}}` above which `grid.` stands."""
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def defaults(settings: type) -> dict[str, Any]:
    """Return the defaults of a settings dataclass, without its required fields."""
    result = {}
    for item in dataclasses.fields(settings):
        if item.default_factory is not dataclasses.MISSING:
            result[item.name] = item.default_factory()
        elif item.default is not dataclasses.MISSING:
            result[item.name] = item.default
    return result


def require_allowed_class(class_path: Any, place: str) -> None:
    """Raise UserError if the class that the setting at `place` names may not be imported. Call this before importing it."""
    named = isinstance(class_path, str) and all(part.isidentifier() for part in class_path.split("."))
    if not named or not class_path.startswith(ALLOWED_CLASSES):
        raise UserError(f"{place}: the class {class_path!r} is not allowed, only those of {', '.join(ALLOWED_CLASSES)}")


def as_config(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a command as YAML values that `--config` reads back, without the access token."""
    return {name: _plain(value) for name, value in arguments.items() if name != SECRET}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init and f.name != SECRET}
        if isinstance(value, (TrainArgs, EvalArgs, LogArgs)):
            return fields
        return {"class_path": f"{type(value).__module__}.{type(value).__qualname__}", "init_args": fields}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, int, float, type(None))):
        return value
    return str(value) if isinstance(value, Path) else f"{type(value).__module__}.{type(value).__qualname__}"
