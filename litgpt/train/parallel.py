"""This process among those of a run, and how all of them end when one of them fails."""

from __future__ import annotations

import atexit
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from litgpt.device import OneProcess
from litgpt.errors import NonFiniteError, Stopped, UserError

if TYPE_CHECKING:
    from lightning.fabric import Fabric

LOST_PROCESS = re.compile(r"gloo|Connection (closed|reset) by peer|NCCL|Broken pipe", re.IGNORECASE)


@dataclass(frozen=True)
class Rank:
    """This process: its index among `size` processes, its device, and how the processes add up tensors."""

    index: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    sum: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    barrier: Callable[[], None] = lambda: None

    @classmethod
    def of(cls, fabric: Fabric | OneProcess) -> Rank:
        if isinstance(fabric, OneProcess):
            return cls(device=fabric.device)

        def add(tensor: torch.Tensor) -> torch.Tensor:
            total: Any = fabric.all_reduce(tensor, reduce_op="sum")
            return total

        return cls(fabric.global_rank, fabric.world_size, fabric.device, add, fabric.barrier)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process: all must do the same at the same step."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """(n,) bytes of this process -> (processes, n) of all."""
        table = torch.zeros(self.size, len(own), dtype=torch.int32, device=self.device)
        table[self.index] = own.to(self.device)
        return self.sum(table).to(torch.uint8)

    def share_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Add up the parameters' gradients over all processes."""
        if self.size == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.sum(torch.cat([grad.flatten() for grad in grads]))
        for p, part in zip(parameters, flat.split([grad.numel() for grad in grads]), strict=True):
            p.grad = part.view_as(p)


def _is_lost_process(error: BaseException) -> bool:
    """Return whether the error says that another process of the run has ended."""
    distributed = isinstance(error, torch.distributed.DistError) if torch.distributed.is_available() else False
    return distributed or (isinstance(error, RuntimeError) and LOST_PROCESS.search(str(error)) is not None)


@contextmanager
def ends_together(fabric: Fabric | OneProcess, saved: Callable[[], str] = lambda: "") -> Iterator[None]:
    """End all processes when one of them fails; the first process alone reports an error that all of them raise.

    `saved` says what is left if another process is lost.
    """
    try:
        yield
    except BaseException as error:
        if fabric.global_rank and isinstance(error, Stopped | NonFiniteError):
            raise SystemExit(0) from None  # Lightning would kill the first process before it has reported the error
        if fabric.world_size > 1:
            atexit.register(_end_children, fabric)
            if _is_lost_process(error):
                message = "another process of this run ended before its time; its own message says why"
                raise UserError(f"{message}. {saved()}".rstrip()) from None
        raise


def _end_children(fabric: Any) -> None:
    """Kill the processes that this one has launched."""
    for process in getattr(getattr(fabric.strategy, "launcher", None), "procs", None) or ():
        process.kill()
