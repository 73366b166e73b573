"""The rank of this process in a run, and how all processes end when one of them fails."""

from __future__ import annotations

import re
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from litgpt.device import MIXED, default_device
from litgpt.errors import NonFiniteError, Stopped, UserError
from litgpt.sharding import part_of
from litgpt.train.launch import Failure, Group, Place, place_of

# errors caused by another process of the run that has ended or does not answer
LOST_PROCESS = re.compile(r"gloo|Connection (closed|reset) by peer|NCCL|Broken pipe", re.IGNORECASE)


@dataclass(frozen=True)
class Rank:
    """This process: its index among `size` processes, its device, and how the processes add up tensors."""

    index: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    sum: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    mixed: torch.dtype | None = None  # autocast to this dtype
    group: Group | None = None  # the joined processes; None for one
    sharded: bool = False  # each process holds a part of the model, and all run it at the same time

    @classmethod
    def start(cls, precision: str, devices: int | str, num_nodes: int, timeout: float, shards: bool = False) -> Rank:
        """Return the rank of this process, after starting the others of the run if no launcher has.

        They wait for each other for `timeout` seconds. `shards`: a single process forms a group, too.
        """
        mixed, place = MIXED.get(precision), place_of(devices, num_nodes)
        if place is None and shards:
            place = Place(0, 1, 0, 1, "127.0.0.1", 0)
        if place is None:
            return cls(device=default_device(), mixed=mixed)
        group = Group.current or Group(place, timeout)

        def add(tensor: torch.Tensor) -> torch.Tensor:
            torch.distributed.all_reduce(tensor)
            return tensor

        return cls(place.index, place.size, group.device, add, mixed, group)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.group is not None:
            torch.distributed.barrier()

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.mixed) if self.mixed else nullcontext()

    def which(self, flag: bool) -> list[int]:
        """Return, in every process, the ranks in which the flag is set: all must do the same at the same step."""
        if self.size == 1:
            return [0] if flag else []
        return self.gather(torch.tensor([flag]))[:, 0].nonzero()[:, 0].tolist()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        return bool(self.which(flag))

    def agreed(self, flag: bool) -> bool:
        """Return whether the flag is set in any process of a sharded model; with a copy of the model, in this process."""
        return self.any(flag) if self.sharded else flag

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """(n,) flags or integers below 2^31 of this process -> (processes, n) of all, in their dtype."""
        table = torch.zeros(self.size, len(own), dtype=torch.int32, device=self.device)
        table[self.index] = own.to(self.device)
        return self.sum(table).to(own.dtype)

    def join(self, own: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Return the concatenated vectors (n,) of all processes, and the offset of this process's vector."""
        sizes = self.gather(torch.tensor([len(own)])).flatten().tolist()
        start = sum(sizes[: self.index])
        joined = own.new_zeros(sum(sizes))
        joined[start : start + len(own)] = own
        return self.sum(joined), start

    def broadcast(self, value: Any) -> Any:
        """Return the value of the first process."""
        if self.size == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, device=self.device)
        return values[0]

    def share_gradients(self, parameters: list[torch.nn.Parameter], used: list[bool]) -> None:
        """Sum the parameters' gradients over all processes. Those of a sharded parameter are summed already: its rows move to its part.

        `used`: the parameters that this process has used in the step. As in a single process, a parameter that no process has used gets
        no gradient, so that the optimizer skips it; with a gradient of zero, AdamW would move it by its momentum.
        """
        for parameter in parameters:
            if (part := part_of(parameter)) is not parameter:
                grad: Any = parameter.grad
                part.grad, parameter.grad = None if grad is None else grad.to_local(), None
        if self.size == 1 and not self.sharded:
            return
        copied = [p for p in parameters if part_of(p) is p]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in copied]
        flags = torch.tensor(used, dtype=grads[0].dtype if grads else torch.float32, device=self.device)
        flat = self.sum(torch.cat([flags, *(grad.flatten() for grad in grads)]))
        flags, *parts = flat.split([len(used), *(grad.numel() for grad in grads)])
        for p, part in zip(copied, parts, strict=True):
            p.grad = part.view_as(p)
        for p, is_used in zip(parameters, flags.tolist(), strict=True):
            if not is_used:
                part_of(p).grad = None

    def gradient_norm(self, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        """Return the norm of all gradients after `share_gradients`."""
        copied = torch.nn.utils.get_total_norm([p.grad for p in parameters if part_of(p) is p and p.grad is not None])
        if not self.sharded:
            return copied
        parts = [part_of(p).grad for p in parameters if part_of(p) is not p]
        own = torch.nn.utils.get_total_norm([grad for grad in parts if grad is not None])
        return (self.sum(own.square().to(self.device)) + copied.square().to(self.device)).sqrt()


def alone(precision: str | None) -> Rank:
    """Return the rank of a process that works alone, whatever number of devices the settings name."""
    return Rank(device=default_device(), mixed=MIXED.get(precision or ""))


@contextmanager
def ends_together(rank: Rank, saved: Callable[[], str] = lambda: "") -> Iterator[None]:
    """End all processes when one of them fails, with one message, from the first process if it is alive.

    The message names the process that failed, unless all failed with it. `saved` says what was saved if another process was lost.
    """
    try:
        yield
    except BaseException as error:
        group = rank.group
        if group is None or group.ended:
            raise
        lost = isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and bool(LOST_PROCESS.search(str(error))))
        others = group.failures(3.0 if lost else 0.0) if lost or isinstance(error, Stopped) else []
        if isinstance(error, Stopped):  # torchrun stops a process after another has failed
            others = [failure for failure in others if failure.code != error.code]
        group.ended = True
        if others or (lost and group.elsewhere):
            raise _of_another(group, others, saved) from None
        if (end := _own(rank, group, error, saved)) is error:
            raise
        raise end from None


def _of_another(group: Group, failures: list[Failure], saved: Callable[[], str]) -> BaseException:
    """Return the exception that ends this process after others have failed."""
    code = failures[0].code if failures else 1
    has_spoken = any(group.told_by(k) for k in range(group.place.index))  # and may have ended since
    is_speaker = group.speaker == group.place.index and not has_spoken
    text = (
        "; ".join(f"rank {failure.index}: {failure.message}" for failure in failures)
        or f"rank {', '.join(map(str, group.elsewhere))}, on another machine, cannot be reached"
    )
    group.tell(*(failures or [Failure(group.place.index, code, text)]))
    if not is_speaker:
        group.leave()
        return SystemExit(code)
    group.dismiss()
    group.end_children()
    error = UserError(text if "is complete" in text else f"{text.rstrip('.')}. {saved()}".rstrip())
    error.exit_code = code
    return error


def _own(rank: Rank, group: Group, error: BaseException, saved: Callable[[], str]) -> BaseException:
    """Return the exception that ends this process after its own failure: the error itself if this process reports it."""
    is_shared = isinstance(error, NonFiniteError | Stopped)  # all processes raise it at once
    code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
    text = getattr(error, "message", "") or str(error)
    if isinstance(error, SystemExit) and text == str(code):
        text = f"ended by {signal.Signals(error.signum).name}" if isinstance(error, Stopped) else f"ended with exit code {code}"
    if not isinstance(error, UserError | SystemExit):
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {text}"
    group.tell(Failure(rank.index, code if isinstance(code, int) else 1, text))
    is_speaker = group.speaker == rank.index
    if not rank.is_first:
        group.leave()
    elif len(group.failures(1.0, rank.size - 1)) == rank.size - 1:
        is_shared = True
    else:
        group.dismiss()
    group.end_children()
    if not is_speaker:
        return SystemExit(code)
    if is_shared or isinstance(error, SystemExit):
        return error
    named = error if isinstance(error, UserError) else UserError(f"{text}. {saved()}".rstrip())
    named.args = (f"rank {rank.index}: {named}",)
    return named
