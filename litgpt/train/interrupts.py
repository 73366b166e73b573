"""SIGINT, SIGTERM and SIGHUP while a run is under way: the step at hand is finished first."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

from litgpt.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """What to do when a signal comes.

    Within `held` it is noted in `asked`, for the work there to come to a good end and call `stop`. Elsewhere `Stopped` is raised where the
    program is. A second signal ends the process at once, by the kernel, even where Python is not at work.
    Signals reach the main thread only; in another one nothing is changed. One that was ignored, as `nohup` has it, still is.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._held = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._arrived) for number in heeded}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        if not self._held:
            raise Stopped(number)
        self.asked = number
        name = signal.Signals(number).name
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{name}: stopping after this step; a second signal ends the run at once\n".encode())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait until the block looks at `asked`."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def stop(self) -> NoReturn:
        """Raises `Stopped` for the signal that has come, here or to another process of the run."""
        raise Stopped(self.asked or signal.SIGTERM)
