"""The optimizer and the learning rate."""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch

from litgpt.args import is_number, require_allowed_class
from litgpt.errors import UserError
from litgpt.packing import sent
from litgpt.quantize import bitsandbytes

SHORTENED = {torch.bfloat16: 16, torch.float16: 13}  # dtype -> number of fraction bits that it lacks compared to fp32
ROUNDED = 1 << 18  # numbers that are rounded at a time, which fit a CPU's cache
UNUSABLE = ("LBFGS", "SparseAdam")  # the first evaluates the loss itself, the second takes sparse gradients only


class MasterWeights(torch.optim.Optimizer):
    """An optimizer of bf16 or fp16 parameters that keeps and updates fp32 copies of them, and rounds the copies after each step.

    A step of 1e-5 is below the resolution of most bf16 weights: without the copies it would be lost (arXiv 1710.03740, section 3.1). The
    copies are rounded up or down at random, so that the weights equal the copies in expectation (arXiv 1502.02551): rounded to nearest,
    most weights would not change for hundreds of steps. The random draws depend only on the number of steps.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> None:
        self.parameters = parameters
        self.steps = 0
        self.masters = [torch.nn.Parameter(p.detach().float()) for p in parameters]
        self.drawn = min(ROUNDED, max(master.numel() for master in self.masters))  # random numbers of a step
        self.inner = make(self.masters)
        self.param_groups, self.defaults = self.inner.param_groups, self.inner.defaults

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for p, master in zip(self.parameters, self.masters, strict=True):
            master.grad, p.grad = None if p.grad is None else p.grad.float(), None
        self.inner.step()
        self.inner.zero_grad(set_to_none=True)
        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps)
        noise = sent(torch.randint(1 << 16, (self.drawn,), generator=generator, dtype=torch.int32), self.masters[0].device)
        for p, master in zip(self.parameters, self.masters, strict=True):
            _round(master, p, noise)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.parameters:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        saved = self.inner.state_dict()
        state = {i: {**saved["state"].get(i, {}), "master": master.detach()} for i, master in enumerate(self.masters)}
        state[0]["roundings"] = self.steps
        return {**saved, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state with or without the copies; without them the copies are the parameters' current values."""
        state = {}
        for i, values in state_dict["state"].items():
            state[i] = {name: value for name, value in values.items() if name not in ("master", "roundings")}
            self.steps = values.get("roundings", self.steps)
            if "master" in values:
                self.masters[i].data.copy_(values["master"])
        self.inner.load_state_dict({**state_dict, "state": {i: values for i, values in state.items() if values}})
        self.param_groups = self.inner.param_groups


def _round(exact: torch.Tensor, rounded: torch.Tensor, noise: torch.Tensor) -> None:
    """Round fp32 values stochastically, without bias, into a tensor of a shorter dtype. `noise`: 16 random bits."""
    if rounded.dtype not in SHORTENED:
        rounded.copy_(exact)
        return
    bits = SHORTENED[rounded.dtype]
    for part, target in zip(exact.view(-1).split(ROUNDED), rounded.view(-1).split(ROUNDED), strict=True):
        sums = (noise[: len(part)] >> (16 - bits)).add_(part.view(torch.int32))
        target.copy_(sums.bitwise_and_(-1 << bits).view(torch.float32))


def make_optimizer(spec: str | dict[str, Any], parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return an optimizer from a name of `torch.optim` or `{"class_path": ..., "init_args": {...}}`; the fused form if there is one.

    Parameters below fp32 get `MasterWeights`. Raises UserError for an unknown or forbidden class, and for arguments that do not fit.
    """
    if isinstance(spec, str):
        spec = {"class_path": spec}
    path, settings = str(spec.get("class_path", "")), dict(spec.get("init_args") or {})
    if "." not in path:
        path = f"torch.optim.{path}"
    require_allowed_class(path, "optimizer")
    module, _, name = path.rpartition(".")
    if module.startswith("bitsandbytes."):
        bitsandbytes("optimizer", "AdamW")
    try:
        optimizer = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"optimizer: {path} cannot be imported: {error}") from None
    if not (inspect.isclass(optimizer) and issubclass(optimizer, torch.optim.Optimizer)):
        names = [key for key, value in vars(torch.optim).items() if inspect.isclass(value)]
        near = difflib.get_close_matches(name, names, n=1)
        raise UserError(f"optimizer: {path} is not an optimizer" + (f"; do you mean {near[0]}?" if near else ""))
    if optimizer.__name__ in UNUSABLE:
        raise UserError(f"optimizer: {optimizer.__name__} does not work with this training loop: choose another, for example AdamW")
    accepted = inspect.signature(optimizer).parameters
    if unknown := [key for key in settings if key not in accepted]:
        raise UserError(f"optimizer: {name} has no argument {', '.join(unknown)}; it has {', '.join(k for k in accepted if k != 'params')}")
    for key, value in settings.items():
        _require_kind(f"optimizer: {name} refuses its arguments: {key}", value, accepted[key].default)
    if "fused" in accepted and "fused" not in settings and not {"foreach", "differentiable"} & settings.keys():
        settings["fused"] = True
    if isinstance(settings.get("betas"), list):
        settings["betas"] = tuple(settings["betas"])
    trained = list(parameters)
    optimizer = without_dynamo(optimizer)  # type: ignore[arg-type]
    try:
        if any(p.dtype.itemsize < 4 for p in trained):
            return MasterWeights(trained, lambda masters: optimizer(masters, **settings))
        return optimizer(trained, **settings)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"optimizer: {name} refuses its arguments: {error}") from None


def multiply_rates(optimizer: torch.optim.Optimizer, ratios: Mapping[int, float]) -> None:
    """Give parameters of a single-group optimizer, by `id`, multiples of its learning rate, as LoRA+ does (arXiv 2402.12354)."""
    (group,) = optimizer.param_groups
    parts: dict[float, list[torch.nn.Parameter]] = {1.0: []}
    for parameter in group["params"]:
        parts.setdefault(ratios.get(id(parameter), 1.0), []).append(parameter)
    group["params"] = parts.pop(1.0)
    for ratio, own in parts.items():
        optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * ratio})
    optimizer.param_groups[:] = [each for each in optimizer.param_groups if each["params"]]


@cache
def without_dynamo(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Return a class of torch.optim without its hooks for torch.compile. They import torch._dynamo, which takes as long as torch."""
    if not kind.__module__.startswith("torch.optim"):
        return kind
    names = ("add_param_group", "zero_grad", "step", "state_dict", "load_state_dict")
    methods: dict[str, Any] = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {**methods, "step": torch.no_grad()(methods["step"]), "__module__": kind.__module__})


def _require_kind(what: str, value: Any, default: Any) -> None:
    """Raise UserError unless `value` is of the kind of `default`: a finite number, a flag, or a list of the same number of numbers."""
    if isinstance(default, bool):
        fits, needed = isinstance(value, bool), "true or false"
    elif isinstance(default, (int, float)):
        fits, needed = is_number(value), "a finite number"
    elif isinstance(default, tuple):
        fits = isinstance(value, (list, tuple)) and len(value) == len(default)
        fits = fits and all(is_number(item) or (item is None and number is None) for item, number in zip(value, default, strict=True))
        needed = f"a list of {len(default)} finite numbers"
    else:
        return
    if not fits:
        raise UserError(f"{what} is {value!r}, {needed} is needed, such as {default}")


def learning_rate(step: int, peak: float, warmup: int, total: int | None, minimum: float) -> float:
    """Return the rate of a step from 0 to total-1: a linear rise to `peak` over `warmup` steps, then half a cosine down to `minimum`.

    It stays at `peak` where the number of steps is not known.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if total is None:
        return peak
    floor = min(minimum, peak)
    share = (step - warmup) / max(1, total - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
