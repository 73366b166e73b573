"""What can go wrong in the middle of a run, told so that the user can mend it: memory that does not suffice, processes that are lost."""

from __future__ import annotations

import atexit
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import torch

from litgpt.errors import NonFiniteError, OutOfMemory, Stopped, UserError
from litgpt.logs import peak_memory_gb

if TYPE_CHECKING:
    from lightning.fabric import Fabric

NO_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory|out of memory", re.IGNORECASE)
LOST_PROCESS = re.compile(r"gloo|Connection (closed|reset) by peer|NCCL|Broken pipe", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, or Python, asked for memory and got none."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError | OSError) and NO_MEMORY.search(str(error)) is not None)


def out_of_memory(error: BaseException, where: str, device: torch.device, remedies: list[str]) -> OutOfMemory:
    """The same with the figures and what to change."""
    asked = re.search(r"allocate (\d+) bytes", str(error))
    wanted = f" for {int(asked[1]) / 2**30:.2f} GiB more" if asked else ""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    held = f"at most {peak_memory_gb(device):.2f} GiB were held so far, {free / 2**30:.2f} of {total / 2**30:.2f} GiB are free now"
    return OutOfMemory(f"out of memory{wanted} {where}: {held}. {'; '.join(remedies)}")


def _is_lost_process(error: BaseException) -> bool:
    """Whether another process of the run has gone, so that no tensors can be exchanged with it."""
    distributed = isinstance(error, torch.distributed.DistError) if torch.distributed.is_available() else False
    return distributed or (isinstance(error, RuntimeError) and LOST_PROCESS.search(str(error)) is not None)


@contextmanager
def ends_together(fabric: Fabric, saved: Callable[[], str] = lambda: "") -> Iterator[None]:
    """If one of several processes fails the others do not wait for it for ever, and what all know is told by the first alone.

    `saved` says what is left if another process is lost.
    """
    try:
        yield
    except BaseException as error:
        if fabric.global_rank and isinstance(error, Stopped | NonFiniteError):
            raise SystemExit(0) from None  # Lightning would kill the first process, which may not have told yet
        if fabric.world_size > 1:
            atexit.register(_end_children, fabric)
            if _is_lost_process(error):
                told = "another process of this run ended before its time, and what it said tells why"
                raise UserError(f"{told}. {saved()}".rstrip()) from None
        raise


def _end_children(fabric: Fabric) -> None:
    """End the processes that this one has launched."""
    for process in getattr(getattr(fabric.strategy, "launcher", None), "procs", None) or ():
        process.kill()
