"""Upstream LitGPT in an environment of its own: its import name is this project's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from litgpt.errors import UserError

LITGPT = "0.5.13"


def make(out: Path) -> None:
    """Make out/upstream-venv, once: this Python, this environment's torch, LitGPT's release and the packages its checkpoints need.

    Raise UserError with pip's last line.
    """
    folder = out / "upstream-venv"
    stamp = folder / "installed"
    if stamp.is_file() and stamp.read_text() == LITGPT:
        return
    print(f"installing litgpt {LITGPT} of PyPI into {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    torch = f"torch=={version('torch').partition('+')[0]}"
    run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, torch])  # first and alone, so that nothing asks for another one, or for torchvision
    (folder / "constraints.txt").write_text(torch + "\n")
    run([*pip, "--constraint", str(folder / "constraints.txt"), f"litgpt=={LITGPT}", "requests"])  # jsonargparse's own need there
    stamp.write_text(LITGPT)


def convert(out: Path, folder: Path) -> None:
    """Write LitGPT's files beside the Hugging Face model in `folder`, once, with LitGPT's own converter."""
    if not (folder / "lit_model.pth").is_file():
        run([str(out / "upstream-venv" / "bin" / "litgpt"), "convert_to_litgpt", str(folder)])


def run(words: list[str]) -> None:
    """Run the words outside this project, whose import name is the same. Raise UserError with the last line if they fail."""
    away = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, env=away)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise UserError(f"{' '.join(words)} ended with {done.returncode}: {said[-1] if said else 'no message'}")
