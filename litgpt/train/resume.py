"""The state of a run, and the training state in a checkpoint: everything that a resumed run needs to continue as if never interrupted.

`training_state.json` holds the progress and the digests of settings, data and base; `training_state.safetensors` holds the optimizer's
tensors and the states of the random generators. Reading them cannot run code. The weights are in a file beside them.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from litgpt import __version__, checkpoint
from litgpt.args import as_config, defaults, marked
from litgpt.atomic import write_text
from litgpt.convert.write import Pending, write_safetensors
from litgpt.errors import UserError
from litgpt.files import read_json
from litgpt.logs import COLUMNS
from litgpt.sample import Sample
from litgpt.sharding import all_called, loads, scattered
from litgpt.text import first_line

FORMAT = 1
FACTS, TENSORS = "training_state.json", "training_state.safetensors"
IDENTITY = "identity.json"  # in final: identifies the run that ended there
ELSEWHERE = "Name another step with --resume, or start anew in another --out_dir"
SCALARS, FACTORS = ("step", "eta", "mu", "mu_product"), ("row_var", "col_var")  # names in torch.optim: scalars; Adafactor's factors
STATE = ("step", "tokens", "seconds", "losses", "best", "skipped", "loss_scale", "pending")  # fields of `State`, written unchanged


@dataclass
class Stopwatch:
    """Seconds, including those of earlier sessions."""

    earlier: float = 0.0
    began: float = field(default_factory=lambda: time.perf_counter())

    @property
    def seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.began


@dataclass
class PhaseStart:
    """The start of the current phase (warm-up or training); its limits count from here."""

    step: int
    tokens: int
    clock: Stopwatch = field(default_factory=Stopwatch)


@dataclass
class State:
    """The progress of a run."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent in training steps
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, validation loss)
    best: tuple[int, float] | None = None  # the lowest of them after a step
    skipped: int = 0  # steps that were skipped because of a non-finite loss or gradient
    loss_scale: float = 2.0**16  # factor of the loss in fp16
    clock: Stopwatch = field(default_factory=Stopwatch)
    phase: PhaseStart | None = None
    pending: dict[str, float] | None = None  # metrics of the last step, until it is validated
    random: dict[str, torch.Tensor] | None = None  # states of the random generators before the step under way
    consistent: bool = True  # False while the optimizer writes: weights and optimizer state do not match `step`
    saved: bool = True  # the newest checkpoint holds this state

    def advance(self, tokens: int, seconds: float) -> None:
        """Count a completed step."""
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self.random, self.consistent, self.saved = None, True, False

    def add_loss(self, loss: float) -> bool:
        """Record the validation loss of this step; return whether it is the lowest so far."""
        self.losses = [*(earlier for earlier in self.losses if earlier[0] != self.step), (self.step, loss)]
        is_best = self.step > 0 and not math.isnan(loss) and (self.best is None or loss < self.best[1])
        if is_best:
            self.best = (self.step, loss)
        return is_best

    def facts(self) -> dict[str, Any]:
        """Return the state as plain values, with the seconds up to now."""
        phase = self.phase and {"step": self.phase.step, "tokens": self.phase.tokens, "seconds": self.phase.clock.seconds}
        return {**{name: getattr(self, name) for name in STATE}, "total_seconds": self.clock.seconds, "phase": phase}

    @classmethod
    def of(cls, facts: dict[str, Any]) -> State:
        """Return the state that `facts` describes, with its clocks running again."""
        phase = facts["phase"] and PhaseStart(facts["phase"]["step"], facts["phase"]["tokens"], Stopwatch(facts["phase"]["seconds"]))
        own = {name: facts[name] for name in STATE if name in facts or name != "loss_scale"}  # which earlier versions did not write
        own["losses"], own["best"] = [(step, loss) for step, loss in own["losses"]], own["best"] and (own["best"][0], own["best"][1])
        return cls(**own, clock=Stopwatch(facts["total_seconds"]), phase=phase)


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of torch's generators, which dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def identity(
    settings: dict[str, Any], base: Path, config: dict[str, Any], train: Sequence[Sample], val: Sequence[Sample]
) -> dict[str, Any]:
    """Return what must be equal for a resumed run to be the same run: flat settings, and digests of base and data, as JSON gives them."""
    config_digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()
    base_facts = {"config": config_digest, "weights": checkpoint.weights_file(base).sha256}
    facts = {"settings": settings, **base_facts, "train": _samples_digest(train), "val": _samples_digest(val)}
    return json.loads(json.dumps(facts))


def changes(now: dict[str, Any], before: dict[str, Any], command: type | None = None, where: str = "before") -> list[str]:
    """Describe each difference of an `identity` from another run's: an earlier one's, or one `where` else.

    A setting of `command` that the version of the earlier run did not have counts as its default.
    """
    unknown = compared_settings(as_config(defaults(command)), command) if command else {}
    earlier = {**now["settings"], **unknown, **before["settings"]}
    different = [f"{key} is {value!r}, {where} {earlier[key]!r}" for key, value in now["settings"].items() if earlier[key] != value]
    if any(now[key] != before.get(key, now[key]) for key in ("config", "weights")):  # which earlier versions did not write
        different.append("the base model is another one (its weights or its config)")
    for key, name in (("train", "training"), ("val", "validation")):
        if now[key] != before[key]:
            different.append(f"the {name} data are different ({now[key][0]:,} samples, {where} {before[key][0]:,})")
    return different


def compared_settings(hyperparameters: dict[str, Any], command: type) -> dict[str, Any]:
    """Return the settings of a command that a resumed run must share, `train.epochs` and the like by their full names."""
    may_change = set(marked(command, "may_change"))
    flat: dict[str, Any] = {}
    for key, value in hyperparameters.items():
        flat.update({f"{key}.{name}": item for name, item in value.items()} if key in ("train", "eval") else {key: value})
    return {key: value for key, value in flat.items() if key not in may_change}


def _samples_digest(samples: Sequence[Sample]) -> tuple[int, str]:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample.input_ids).to_bytes(8, "little"))
        digest.update(sample.input_ids)
        digest.update(sample.loss_mask)
        digest.update(sample.weights or b"")
        digest.update(b"" if sample.label else b"bad")
        digest.update(b"" if sample.reward is None else repr(float(sample.reward)).encode())
    return len(samples), digest.hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """Return the facts other than settings that affect the last digits of a run's figures."""
    return {
        "litgpt": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "device": device.type,
    }


def write(
    folder: Path | None, state: State, optimizer: dict[int, dict[str, Any]], random: dict[str, torch.Tensor], facts: dict[str, Any]
) -> None:
    """Write the training state into a checkpoint folder; without one, only take part in gathering the optimizer's tensors.

    `optimizer`: its state, tensors of all ranks included. `random`: generator states by "kind.rank". Raises OSError.
    """
    tensors: dict[str, torch.Tensor] = {}
    packed = _pack(optimizer, tensors)
    tensors.update({f"random.{name}": value for name, value in random.items()})
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))  # as they are written
    with all_called({name: load for names, load in loads(ordered).items() for name in names}) as plan:
        if folder is None:
            return
        pending = {name: Pending(tuple(tensor.shape), tensor.dtype, plan[name]) for name, tensor in ordered.items()}
        write_safetensors(pending, folder / TENSORS)
    content = {"format": FORMAT, **facts, "progress": state.facts(), "optimizer": packed}
    write_text(folder / FACTS, json.dumps(content) + "\n")


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a nested value as JSON, with its tensors moved to `tensors` and replaced by their names."""
    if isinstance(value, torch.Tensor):
        name = f"optimizer.{len(tensors)}"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(
        f"optimizer: its state holds a {type(value).__name__}, which cannot be saved: choose another optimizer, for example AdamW"
    )


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in content}
    items = [_unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _misfit(state: dict[int, dict[str, Any]], optimizer: torch.optim.Optimizer) -> str:
    """Return what is wrong with a state for this optimizer, whose kernels read its tensors without checking shapes and dtypes."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if type(optimizer).__module__.startswith("bitsandbytes"):  # its 8-bit states have shapes of their own
        return ""
    for i, values in state.items():
        if not isinstance(i, int) or not 0 <= i < len(trained) or not all(isinstance(name, str) for name in values):
            return f"it has no parameter {i!r}"
        shape = trained[i].shape
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                factors = ((*shape[:-1], 1), (*shape[:-2], 1, *shape[-1:])) if name in FACTORS else ()
                wanted = ((), (1,)) if name in SCALARS else (tuple(shape), *factors)
                dtype = torch.float32 if name in SCALARS else trained[i].dtype
                if tuple(value.shape) not in wanted or value.dtype != dtype:
                    return f"{name} of parameter {i} is {value.dtype} {tuple(value.shape)}, not {dtype} {wanted[0]}"
                if not value.isfinite().all():
                    return f"{name} of parameter {i} is not finite"
    return ""


def _require_facts(facts: dict[str, Any]) -> None:
    """Raise KeyError, TypeError or ValueError unless the values have the types that `write` gives them."""
    progress, identity = facts["progress"], facts["identity"]
    phase, pending = progress["phase"] or {"step": 0, "tokens": 0, "seconds": 0}, progress["pending"] or {}
    losses = [(step, loss) for step, loss in (*progress["losses"], *([progress["best"]] if progress["best"] else []))]
    counts = [*(progress[name] for name in ("step", "tokens", "skipped")), phase["step"], phase["tokens"], *(step for step, _ in losses)]
    numbers = [progress["seconds"], progress["total_seconds"], phase["seconds"], progress.get("loss_scale", 1.0)]
    numbers += [*(loss for _, loss in losses), *pending.values()]
    samples = [(int(count), str(digest)) for count, digest in (identity["train"], identity["val"])]
    is_sound = (
        all(type(count) is int and 0 <= count < 2**53 for count in (*counts, *(count for count, _ in samples)))
        and all(type(number) in (int, float) for number in numbers)
        and all(isinstance(mapping, dict) for mapping in (identity["settings"], facts["environment"], facts["cached"]))
        and all(isinstance(answer, str) for answer in facts.get("general_answers") or ())
        and all(type(step) is int and isinstance(text, str) for _, given in facts.get("answers", ()) for step, text in given)
        and pending.keys() <= set(COLUMNS)
    )
    _ = facts["optimizer"], datetime.fromisoformat(facts.get("date", "2026-01-01"))
    if not is_sound:
        raise ValueError("a value of another type")


@dataclass
class Saved:
    """The training state of a checkpoint folder."""

    folder: Path
    facts: dict[str, Any]

    @property
    def state(self) -> State:
        return State.of(self.facts["progress"])

    def restore(self, optimizer: torch.optim.Optimizer, parameters: Sequence[torch.nn.Parameter] = ()) -> None:
        """Restore the optimizer of `parameters`; of a sharded model this rank holds only some rows."""
        try:
            state = scattered(_unpack(self.facts["optimizer"], self._tensors()), parameters)
            problem = _misfit(state, optimizer)
        except (KeyError, TypeError, ValueError, AttributeError):
            problem = "it is not as litgpt wrote it"
        if problem:
            raise UserError(f"{self.folder / TENSORS} does not fit the optimizer: {problem}. {ELSEWHERE}")
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

    def restore_random(self, rank: int, device: torch.device) -> None:
        """Restore the random generators."""
        tensors = self._tensors()
        try:
            if (saved := tensors.get(f"random.cpu.{rank}")) is not None:
                torch.set_rng_state(saved)
            if device.type == "cuda" and (saved := tensors.get(f"random.cuda.{rank}")) is not None:
                torch.cuda.set_rng_state(saved, device)
        except (RuntimeError, TypeError) as error:
            reason = first_line(error)
            raise UserError(f"{self.folder / TENSORS} holds no state of a random generator: {reason}. {ELSEWHERE}") from None

    def _tensors(self) -> dict[str, torch.Tensor]:
        try:
            return load_file(self.folder / TENSORS)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.folder / TENSORS} is not a readable safetensors file: {error}. {ELSEWHERE}") from None


def read(folder: Path) -> Saved:
    """Read the training state of a complete checkpoint folder. Raises UserError if it has none that this version can read."""
    facts = read_json(folder / FACTS, f"is missing: there is no training state to resume. {ELSEWHERE}")
    if facts.get("format") != FORMAT:
        raise UserError(
            f"{folder / FACTS} was written by another version of litgpt: resume with that version, or start anew in another --out_dir"
        )
    try:
        _require_facts(facts)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise UserError(f"{folder / FACTS} is not as litgpt wrote it. {ELSEWHERE}") from None
    return Saved(folder, facts)
