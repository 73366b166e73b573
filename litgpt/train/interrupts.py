"""Events that end a run early: SIGINT, SIGTERM and SIGHUP, and memory that runs out."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psutil
import torch

from litgpt.device import process_rank
from litgpt.errors import OutOfMemory, Stopped
from litgpt.logs import peak_memory_gb
from litgpt.text import size

SAME_SECONDS = 0.1  # `timeout`, `uv run` and others send a signal to a process and to its group: it arrives twice
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NO_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory|out of memory", re.IGNORECASE)


class Interrupts:
    """Signal handlers for the duration of the block.

    Within `held` a signal is recorded in `asked`, so that the work there can finish and raise `Stopped`. Elsewhere it is raised at once.
    On a second SIGINT or SIGTERM the kernel ends the process immediately, even outside Python code. A second SIGHUP does not end it: both
    the shell and the kernel send one when a terminal closes. A repeat within `SAME_SECONDS` counts as the same signal. After an error
    within `ending` a first signal has no effect.
    Only the main thread receives signals, so other threads install no handlers. A signal that was ignored, as with `nohup`, stays ignored.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._held = self._ending = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._arrived) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        for each in self._before:
            signal.signal(each, signal.SIG_IGN)
        time.sleep(SAME_SECONDS)
        for each in self._before:
            signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else signal.SIG_DFL)
        if self._ending:
            return
        if not self._held:
            raise Stopped(number)
        self.asked = number
        name = signal.Signals(number).name
        if process_rank():  # a terminal sends it to all processes, and the first reports it
            return
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{name}: stopping after this step; a second signal ends the run at once\n".encode())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Delay signals until the block checks `asked`. They stay delayed after an error in the block."""
        self._held = True
        yield
        self._held = False

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Keep signals from replacing an error of the block: torchrun sends SIGTERM to a process whose peer has failed."""
        try:
            yield
        except BaseException:
            self._ending = True
            raise


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch or Python could not allocate memory."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError | OSError) and NO_MEMORY.search(str(error)) is not None)


def out_of_memory(error: BaseException, where: str, device: torch.device, remedies: list[str]) -> OutOfMemory:
    """Return the error with figures and remedies."""
    asked = re.search(r"allocate (\d+) bytes", str(error))
    wanted = f" for {size(int(asked[1]))} more" if asked else ""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
    held = f"at most {peak_memory_gb(device):.2f} GiB were held so far, {free / 2**30:.2f} of {total / 2**30:.2f} GiB are free now"
    return OutOfMemory(f"out of memory{wanted} {where}: {held}. {'; '.join(remedies)}")


@contextmanager
def memory_explained(device: torch.device, where: str) -> Iterator[None]:
    """Turn an allocation failure in the block into an OutOfMemory error with figures."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, where, device, ["A smaller model, or --precision bf16-true, needs less"]) from None
