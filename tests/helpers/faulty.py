"""`litgpt` with a fault in one of its processes: `faulty.py FAULT RANK ARGUMENT...`. The others are started with it too.

Two processes wait in their first steps for each other, by files in the folder that MEETING names, if it is set.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

FAULT, RANK = sys.argv[1], sys.argv[2]


def meet() -> None:
    folder = Path(os.environ["MEETING"])
    (folder / os.environ.get("LOCAL_RANK", "0")).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.05)


def faulty(loop: Any, state: Any, *args: Any) -> Any:
    if "MEETING" in os.environ:
        meet()
    if state.step == 2 and os.environ.get("LOCAL_RANK", "0") == RANK:
        if FAULT == "memory":
            raise MemoryError
        if FAULT == "bug":
            raise KeyError("a bug")
        if FAULT == "loss":
            loop.loss = lambda activations, indices: loss(loop, activations, indices) * float("nan")
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
            if number.name == FAULT:
                os.kill(os.getpid(), number)
    if FAULT == "slow":
        time.sleep(0.2)
    return step(loop, state, *args)


if __name__ == "__main__":
    from litgpt.__main__ import main
    from litgpt.train.loop import Loop

    step, loss = Loop.step, Loop.loss
    Loop.step = faulty  # type: ignore[method-assign]
    sys.exit(main(sys.argv[3:]))
