"""The device and the precision of a model."""

import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy
import torch
from torch.overrides import TorchFunctionMode

from litgpt.errors import UserError
from litgpt.streams import safe
from litgpt.text import first_line

PRECISIONS = {
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
}
MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class _Uninitialised(TorchFunctionMode):
    """Skips the functions of torch.nn.init."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def on_meta() -> Iterator[None]:
    """Create modules whose parameters have no storage and no initial values: for these torch would spend seconds on torch._dynamo."""
    with torch.device("meta"), _Uninitialised():
        yield


def is_finite(values: torch.Tensor) -> bool:
    """Return True if no number is infinite or NaN. Taking the extremes, which propagate NaN, is faster than checking every number."""
    return not values.numel() or all(bool(extreme.isfinite()) for extreme in values.detach().aminmax())


_used: torch.device | None = None  # the device that `use` was called with


def use(accelerator: str) -> torch.device:
    """Let `default_device` return the device of that name in this process. Raise UserError if this machine does not have it.

    "auto" takes the request back.
    """
    global _used
    _used = None if accelerator == "auto" else find_device(accelerator)
    return default_device()


def default_device() -> torch.device:
    """Return the device that is in `use`, else the first CUDA device if there is one, Intel's or Apple's GPU if it works, or the CPU."""
    if _used is not None:
        return _used
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    return next((torch.device(kind) for kind in _others() if _works(kind)), torch.device("cpu"))


def _others() -> list[str]:
    """Return the kinds of GPU besides CUDA that this machine has."""
    return [kind for kind, module in (("xpu", torch.xpu), ("mps", torch.backends.mps)) if module.is_available()]


@cache
def _works(kind: str) -> bool:
    """Return whether the device works; say so once if it does not."""
    try:
        return bool((torch.ones(2, device=kind) * 2).sum().item() == 4)
    except (RuntimeError, AssertionError) as error:
        print(f"device {kind} does not work ({safe(first_line(error))}): the CPU is used", file=sys.stderr)
        return False


def find_device(device: torch.device | str | int | None) -> torch.device:
    """Return the device of that name, the default one for None and "auto". Raise UserError if this machine does not have it."""
    try:
        found = default_device() if device in (None, "auto") else torch.device("cuda" if device == "gpu" else device)
        torch.empty(1, device=found).cpu()  # a device may have a valid name but be absent
    except (RuntimeError, AssertionError, ImportError, AttributeError, TypeError, ValueError):
        known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *_others()]
        raise UserError(f"device {str(device)!r} does not exist on this machine: choose one of {', '.join(known)}") from None
    return found


def cpu_capabilities() -> dict[str, Any]:
    """Return the processor's instruction sets by torch's names."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    return {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()}  # torch 2.10


def default_precision(device: torch.device) -> str:
    """Return bf16-true if the device multiplies bf16 matrices natively (Ampere and later, macOS 14, AVX512-BF16, AMX).

    Else 16-true on Intel's and Apple's GPUs, 32-true elsewhere.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "xpu":
        native = torch.xpu.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        native = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        native = any(cpu_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16-true" if native else "16-true" if device.type in ("xpu", "mps") else "32-true"


def backbone_dtype(precision: str) -> torch.dtype:
    """Return the dtype of the backbone's weights. Raise UserError for an unknown precision."""
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is unknown: choose one of {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


RANK_VARIABLES = ("RANK", "SLURM_PROCID", "NODE_RANK")  # set by launchers of several processes, or by hand


def process_rank() -> int:
    """Return the index of this process among those that a launcher started, or of its machine; 0 if it was started alone."""
    return next((int(value) for name in RANK_VARIABLES if (value := os.environ.get(name, "")).isdecimal()), 0)


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
