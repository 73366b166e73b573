"""A tiny base with Skip2-LoRA and LoRA adapters, served by a process on loopback."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import tiny

KEY = "a secret key"
SKIP: dict[str, Any] = {"lora_r": 3, "skip2lora_enabled": True}
ADAPTERS: dict[str, dict[str, Any]] = {
    "skip": {**SKIP, "skip2lora_block_indices": [0, 1, 2]},
    "other": {**SKIP, "lora_r": 5, "skip2lora_block_indices": [2, 4], "skip2lora_norm": "none"},
    "norm": {**SKIP, "skip2lora_block_indices": [3], "skip2lora_output_layer": "transformer.ln_f"},
    "tail": {**SKIP, "skip2lora_block_indices": [0, 1], "skip2lora_output_layer": "transformer.h.3"},
    "lora": {"lora_r": 3, **tiny.ALL_LORA},
}


@dataclass
class Folders:
    base: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> Folders:
    root = tmp_path_factory.mktemp("served")
    base = tiny.write_base(root / "base", write_tiny_tokenizer)
    made = {}
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        model = tiny.move_adapters(tiny.tiny(**{**tiny.SPEAKING, **settings}), seed=seed)
        made[name] = tiny.write_adapter(root / name, base, model, **settings)
    return Folders(base, made)


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    log: Path

    @property
    def messages(self) -> str:
        return self.log.read_text()


def start(base: Path, *options: str, log: Path) -> Server:
    """Start `litgpt serve` and wait until it listens."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LIT_SERVER_API_KEY": KEY}
    command = [sys.executable, "-m", "litgpt", "serve", str(base), "--port", "0", "--precision", "32-true", *options]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"Listening at (http://\S+):", line):
            break
    else:
        raise AssertionError("".join(lines))
    return Server(process, found[1], log)


@pytest.fixture(scope="session")
def server(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One process for all tests of a worker."""
    named = [f"{name}={folder}" for name, folder in folders.adapters.items()]
    running = start(
        folders.base,
        "--adapters",
        *named,
        "--max_queue",
        "8",
        "--adapter_dir",
        str(folders.base.parent),
        log=tmp_path_factory.mktemp("log") / "out",
    )
    yield running
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(20) == 143
