"""The device and the precision of a model."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from litgpt.errors import UserError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

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


RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # set by launchers of several processes


def process_rank() -> int:
    """Return the index of this process among those that a launcher started; 0 if it was started alone."""
    return next((int(value) for name in RANK_VARIABLES if (value := os.environ.get(name, "")).isdecimal()), 0)


@dataclass(frozen=True)
class OneProcess:
    """What a run uses of a Fabric, for one process on one device: importing Lightning would take seconds."""

    device: torch.device
    mixed: torch.dtype | None
    """autocast to this dtype"""
    global_rank: int = 0
    world_size: int = 1

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.mixed) if self.mixed else nullcontext()

    def seed_everything(self, seed: int, verbose: bool = False) -> None:
        import numpy

        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)

    def rank_zero_first(self) -> AbstractContextManager[None]:
        return nullcontext()

    def launch(self) -> None: ...

    def broadcast(self, value: Any) -> Any:
        return value


def make_fabric(precision: str, devices: int | str, num_nodes: int) -> Fabric | OneProcess:
    """Return what launches the processes of a run and lets them talk. It casts no weights.

    Fabric's "bf16-true" would cast the adapters too, which stay fp32. The backbone is cast when it is loaded; only the "-mixed" precisions
    need autocast. One device needs no Fabric.
    """
    backbone_dtype(precision)
    if num_nodes < 1:
        raise UserError(f"num_nodes is {num_nodes}: at least 1 is needed")
    if str(devices) == "1" and num_nodes == 1 and not any(name in os.environ for name in RANK_VARIABLES):
        return OneProcess(default_device(), MIXED.get(precision))
    from lightning.fabric import Fabric
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        return Fabric(
            accelerator="auto",
            devices=devices,
            num_nodes=num_nodes,
            precision=precision if precision in MIXED else "32-true",  # type: ignore[arg-type]
        )
    except (ValueError, RuntimeError, TypeError, MisconfigurationException) as error:
        settings = f"devices {devices!r}, num_nodes {num_nodes}, precision {precision!r}"
        raise UserError(f'{settings} do not fit this machine: {error} Give devices a number from 1, or "auto"') from None
