"""How far a run is, and the training state in a checkpoint: all that a resumed run needs to go on as if it had never been stopped.

`training_state.json` says how far, with what settings, data and base; `training_state.safetensors` holds the optimizer's tensors and the
random generators' states. Neither can run code when it is read. The weights stand beside them, as in every checkpoint.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from litgpt import __version__, atomic, checkpoint
from litgpt.errors import UserError
from litgpt.files import read_json
from litgpt.sample import Sample

FORMAT = 1
FACTS, TENSORS = "training_state.json", "training_state.safetensors"
MAY_CHANGE = {
    *("checkpoint_dir", "out_dir", "data", "log", "logger_name", "access_token", "resume", "overwrite", "dry_run"),
    *("precision", "devices", "num_nodes", "skip2lora_cache", "skip2lora_cache_dir"),
    *("train.save_interval", "train.save_every_minutes", "train.keep_last", "train.keep_best", "train.log_interval"),
    *("train.max_time", "train.skip_nonfinite", "eval.patience", "eval.max_new_tokens", "eval.evaluate_example"),
}
"""Settings that a resumed run may have otherwise: the steps that both take are the same. For the files, the data, the precision and the
devices, what they amount to is compared instead. epochs and max_steps are not among them: the learning rate's decay spans the run."""
ELSEWHERE = "Name another step with --resume, or start anew in another --out_dir"
SPOTS, SPOT = 64, 2**20
"""of a weights file that are read to tell it from another one, and their bytes"""


@dataclass
class Stopwatch:
    """Seconds, with those of earlier sessions."""

    earlier: float = 0.0
    began: float = field(default_factory=lambda: time.perf_counter())

    @property
    def seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.began


@dataclass
class Phase:
    """The loop that is at work; its limits count from these."""

    step: int
    tokens: int
    clock: Stopwatch = field(default_factory=Stopwatch)


@dataclass
class State:
    """How far the run is."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """spent in training steps"""
    losses: list[tuple[int, float]] = field(default_factory=list)
    """(step, validation loss)"""
    best: tuple[int, float] | None = None
    """the lowest of them after a step"""
    skipped: int = 0
    """steps left out because their loss or gradient was no number"""
    clock: Stopwatch = field(default_factory=Stopwatch)
    phase: Phase | None = None
    pending: dict[str, float] | None = None
    """the metrics of the last step while its validation is not done"""
    random: dict[str, torch.Tensor] | None = None
    """the random generators before the step that is under way"""
    consistent: bool = True
    """False while the optimizer writes: weights and optimizer are not those of `step`"""

    def improves(self, loss: float) -> bool:
        return self.step > 0 and not math.isnan(loss) and (self.best is None or loss < self.best[1])

    def facts(self) -> dict[str, Any]:
        """As plain values; the seconds are those up to now."""
        phase = self.phase and {"step": self.phase.step, "tokens": self.phase.tokens, "seconds": self.phase.clock.seconds}
        own = {name: getattr(self, name) for name in ("step", "tokens", "seconds", "losses", "best", "skipped", "pending")}
        return {**own, "total_seconds": self.clock.seconds, "phase": phase}

    @classmethod
    def of(cls, facts: dict[str, Any]) -> State:
        """The state that `facts` gave, its clocks running again."""
        phase = facts["phase"] and Phase(facts["phase"]["step"], facts["phase"]["tokens"], Stopwatch(facts["phase"]["seconds"]))
        return cls(
            step=facts["step"],
            tokens=facts["tokens"],
            seconds=facts["seconds"],
            losses=[(step, loss) for step, loss in facts["losses"]],
            best=facts["best"] and (facts["best"][0], facts["best"][1]),
            skipped=facts["skipped"],
            clock=Stopwatch(facts["total_seconds"]),
            phase=phase,
            pending=facts["pending"],
        )


def random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators, which dropout draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


@dataclass(frozen=True)
class Identity:
    """What must be the same for a resumed run to be the same run."""

    settings: dict[str, Any]
    """flat, without those of `MAY_CHANGE`"""
    base: str
    train: tuple[int, str]
    """number of samples and digest"""
    val: tuple[int, str]

    def facts(self) -> dict[str, Any]:
        return json.loads(json.dumps({"settings": self.settings, "base": self.base, "train": self.train, "val": self.val}))

    def changes(self, before: dict[str, Any]) -> list[str]:
        """What differs from the `facts` of an earlier run, in words."""
        now = self.facts()
        found = [
            f"{key} was {before['settings'][key]!r} and is {value!r}"
            for key, value in now["settings"].items()
            if key in before["settings"] and before["settings"][key] != value
        ]
        if now["base"] != before["base"]:
            found.append("the base model is another one (its weights or its config)")
        for key, name in (("train", "training"), ("val", "validation")):
            if now[key] != before[key]:
                found.append(f"the {name} data are other ones ({before[key][0]:,} samples then, {now[key][0]:,} now)")
        return found


def identity(
    hyperparameters: dict[str, Any],
    resolved: dict[str, Any],
    base: Path,
    config: dict[str, Any],
    train: Sequence[Sample],
    val: Sequence[Sample],
) -> Identity:
    """The identity of a run: its settings, those that were `resolved` beside them, and digests of base and data."""
    flat: dict[str, Any] = {}
    for key, value in hyperparameters.items():
        flat.update({f"{key}.{name}": item for name, item in value.items()} if key in ("train", "eval") else {key: value})
    settings = {key: value for key, value in flat.items() if key not in MAY_CHANGE}
    whole = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    status = (base / checkpoint.WEIGHTS).stat()
    whole.update(_weights_digest(base / checkpoint.WEIGHTS, status.st_size, status.st_mtime_ns).encode())
    return Identity({**settings, **resolved}, whole.hexdigest(), _samples_digest(train), _samples_digest(val))


@functools.lru_cache(maxsize=1)
def _weights_digest(file: Path, size: int, changed: int) -> str:
    """Tells a weights file from another one by its size and its content at `SPOTS` places, which is quick however large it is.

    `changed`: when it was, for a file that was looked at before not to be read again.
    """
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as handle:
        for start in (*range(0, size, max(SPOT, size // SPOTS)), max(0, size - SPOT)):
            handle.seek(start)
            found.update(handle.read(SPOT))
    return found.hexdigest()


def _samples_digest(samples: Sequence[Sample]) -> tuple[int, str]:
    found = hashlib.sha256()
    for sample in samples:
        found.update(len(sample.input_ids).to_bytes(8, "little"))
        found.update(sample.input_ids)
        found.update(sample.loss_mask)
    return len(samples), found.hexdigest()


def environment(device: torch.device) -> dict[str, Any]:
    """What the last digits of a run depend on, besides its settings."""
    processor = torch.backends.cpu.get_cpu_capability()
    return {
        "litgpt": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": processor,
        "device": device.type,
    }


def write(
    folder: Path,
    state: State,
    optimizer: torch.optim.Optimizer | None,
    random: dict[str, torch.Tensor],
    facts: dict[str, Any],
) -> None:
    """Write the training state into a checkpoint folder. `random`: generator states by "kind.rank". Raises SafetensorError, OSError."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    packed = _pack(optimizer.state_dict()["state"] if optimizer else {}, tensors)
    tensors.update({f"random.{name}": value for name, value in random.items()})
    save_file(tensors, folder / TENSORS)
    content = {"format": FORMAT, **facts, "progress": state.facts(), "optimizer": packed}
    atomic.write_text(folder / FACTS, json.dumps(content) + "\n")


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """A nested value as JSON, its tensors put into `tensors` and named in their places."""
    if isinstance(value, torch.Tensor):
        name = f"optimizer.{len(tensors)}"
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(
        f"optimizer: it keeps a {type(value).__name__}, which cannot be saved to resume from: choose another, for example AdamW"
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


@dataclass
class Saved:
    """The training state of a checkpoint folder."""

    folder: Path
    facts: dict[str, Any]

    @property
    def state(self) -> State:
        return State.of(self.facts["progress"])

    def restore(self, optimizer: torch.optim.Optimizer, rank: int, device: torch.device) -> None:
        """Give the optimizer and the random generators what they had."""
        tensors = self._tensors()
        state = _unpack(self.facts["optimizer"], tensors)
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.restore_random(rank, device)

    def restore_random(self, rank: int, device: torch.device) -> None:
        tensors = self._tensors()
        setters: dict[str, Callable[[torch.Tensor], None]] = {"cpu": torch.set_rng_state}
        if device.type == "cuda":
            setters["cuda"] = lambda value: torch.cuda.set_rng_state(value, device)
        for kind, give in setters.items():
            if (found := tensors.get(f"random.{kind}.{rank}")) is not None:
                give(found)

    def _tensors(self) -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.folder / TENSORS)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.folder / TENSORS} is not a readable safetensors file: {error}. {ELSEWHERE}") from None


def read(folder: Path) -> Saved:
    """The training state of a whole checkpoint folder. Raises UserError if it has none that this version can read."""
    facts = read_json(folder / FACTS, f"is missing: there is no training state to go on from. {ELSEWHERE}")
    if facts.get("format") != FORMAT:
        raise UserError(
            f"{folder / FACTS} was written by another version of litgpt: go on with that one, or start anew in another --out_dir"
        )
    saved = Saved(folder, facts)
    try:
        _ = saved.state, [facts[key] for key in ("identity", "environment", "cached", "optimizer")]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise UserError(f"{folder / FACTS} is not as litgpt wrote it. {ELSEWHERE}") from None
    return saved
