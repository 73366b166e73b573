"""Run `litgpt` and the benchmarks' own modules in separate processes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECRET = "--access_token"


def environment() -> dict[str, str]:
    """Return this process's environment with the repository's root first on Python's path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def in_worker(module: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run `python -m MODULE --worker JOB` and return the JSON object that it prints last, or {"error": ...} if it fails.

    Each job gets its own process, so that a peak of memory belongs to that job alone.
    """
    return printed_by([sys.executable, "-m", module, "--worker", json.dumps(job)])


def printed_by(words: list[str]) -> dict[str, Any]:
    """Return the JSON object that a process prints last, or {"error": ...} if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, env=environment())
    if done.returncode < 0:
        return {"error": f"killed by signal {-done.returncode}, perhaps for want of memory"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def run_litgpt(words: list[str], on_line: Callable[[str], None] | None = None) -> tuple[int, str]:
    """Run `litgpt WORDS`, showing its output as it comes, and return its exit code and last lines.

    `on_line` is called with each line of output.
    """
    last_lines: deque[str] = deque(maxlen=40)
    with subprocess.Popen(
        [sys.executable, "-m", "litgpt", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment(),
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            print(f"  {line}", end="", flush=True)
            last_lines.append(line)
            if on_line is not None:
                on_line(line)
    return child.returncode, "".join(last_lines)


def error_line(output: str) -> str:
    """Return the last line of `output` that begins with "Error:", or else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("Error:")]
    return (errors or lines or ["no output"])[-1]


def redacted(words: list[str]) -> str:
    """Return the command line `litgpt WORDS` without the access token, to show and to store."""
    safe = [f"{SECRET}=***" if word.startswith(f"{SECRET}=") else word for word in words]
    return "litgpt " + shlex.join("***" if before == SECRET else word for before, word in zip(["", *safe], safe, strict=False))
