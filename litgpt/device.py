"""The device and the precision of a model."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from litgpt.errors import UserError

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
    """Make modules whose parameters have no storage. Nothing is drawn for them: torch would import torch._dynamo for that, for seconds."""
    with torch.device("meta"), _Uninitialised():
        yield


def default_device() -> torch.device:
    """Return the first CUDA device if there is one, else Apple's GPU, else the CPU. Apple's GPU was never tried."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def find_device(device: torch.device | str | int | None) -> torch.device:
    """Return the device of that name, the default one for None. Raise UserError if this machine does not have it."""
    try:
        found = default_device() if device is None else torch.device(device)
        torch.empty(1, device=found).cpu()  # a device may have a name and be absent
    except (RuntimeError, AssertionError, ImportError, AttributeError, TypeError, ValueError):
        known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *(["mps"] if torch.backends.mps.is_available() else [])]
        raise UserError(f"device {str(device)!r} does not exist on this machine: choose one of {', '.join(known)}") from None
    return found


def default_precision(device: torch.device) -> str:
    """Return bf16-true if the device multiplies bf16 matrices natively (Ampere and later, AVX512-BF16, AMX), else 32-true."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        native = False
    else:
        capabilities = torch.cpu.get_capabilities()
        native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bf16-true" if native else "32-true"


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
    import numpy

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
