"""A process that has imported everything and forks a `litgpt` command for every line of its standard input, so that each starts at once.

A line is `{"argv": [...], "signal": 9, "at": [N, ...]}`: the command's process sends itself the signal at these of its events, before and
after each of the calls in `watch`; `["fsync", N]` in place of N means the N-th of that name. `"limit"` is the largest file it may write;
`"powerless"`: files' permissions hold for it even if it runs as root.
It answers with `{"status": exit code or -signal, "err": ..., "events": how many there were}`.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any


class Events:
    """Counts the moments before and after the calls that matter, in memory that the parent shares."""

    def __init__(self, number: int, at: list[Any], counter: Any) -> None:
        self.number, self.at, self.counter = number, at, counter
        self.count: Counter[str] = Counter()

    def happen(self, name: str) -> None:
        self.count.update(("", name))
        os.pwrite(self.counter, struct.pack("i", self.count[""]), 0)
        if self.count[""] in self.at or [name, self.count[name]] in self.at:
            os.kill(os.getpid(), self.number)

    def watch(self, owner: Any, name: str) -> None:
        """Make the function happen between two events."""
        original = getattr(owner, name)

        def between(*args: Any, **kwargs: Any) -> Any:
            self.happen(name)
            result = original(*args, **kwargs)
            self.happen(name)
            return result

        setattr(owner, name, between)


def watch(events: Events) -> None:
    """Every step, micro-batch, batch of the cache's filling, and every call that makes something last on the disk."""
    import torch

    from litgpt import atomic, logs
    from litgpt.activations import cache as activation_cache
    from litgpt.train.loop import Loop

    for owner, name in (
        (os, "fsync"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "unlink"),
        (shutil, "rmtree"),
        (shutil, "copyfile"),
        (torch, "save"),
        (Loop, "loss"),
        (Loop, "step"),
        (Loop, "validate"),
        (activation_cache, "_rows"),
        (activation_cache.Rows, "__setitem__"),
        (atomic, "write_manifest"),
        (logs.MetricLoggers, "__call__"),
    ):
        events.watch(owner, name)


def give_up_powers() -> None:
    """Drop all capabilities (capset(2)), root's right to read and write everything among them."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    none = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None).capset(header, none):
        raise OSError("capset")


def child(request: dict[str, Any], out: int, counter: int) -> None:
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    code = 70
    try:
        from litgpt.__main__ import main

        if limit := request.get("limit"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if request.get("powerless"):
            give_up_powers()
        watch(Events(request.get("signal", signal.SIGKILL), request.get("at", []), counter))
        code = main(request["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 71
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(line: str) -> dict[str, Any]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as counter:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line), out.fileno(), counter.fileno())
        _, status = os.waitpid(pid, 0)
        out.seek(0)
        events = counter.read(4)
        code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        return {"status": code, "err": out.read().decode(), "events": struct.unpack("i", events)[0] if events else 0}


def main() -> None:
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it,
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and one of nohup this
    for name in ("finetune.lora", "finetune.full", "train.run", "generate.engine", "cli", "convert.resolve", "convert.merge"):
        importlib.import_module(f"litgpt.{name}")
    for name in ("torch.utils.tensorboard", "safetensors.torch", "tokenizers", "jinja2"):
        importlib.import_module(name)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(line)), flush=True)


if __name__ == "__main__":
    main()
