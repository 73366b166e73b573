"""Several processes that stay, and run `litgpt` commands together: `python -m tests.helpers.ranks FOLDER` in each of them.

The commands are in FOLDER/0.json, 1.json, ..., each a list of lists of words, which appear one after the other; null ends the processes.
The first process says by FOLDER/0.done, ... that it has finished. The first command starts the other processes.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class Ranks:
    """The processes as a test sees them: starting them takes seconds, a command less than one."""

    def __init__(self, environ: dict[str, str], cwd: Path) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.commands = itertools.count()
        words = [sys.executable, "-m", "tests.helpers.ranks", str(self.folder)]
        with (self.folder / "stderr").open("w") as stderr:
            self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=stderr, cwd=cwd, env=environ)

    def run(self, commands: list[list[str]], timeout: float) -> str:
        """Run the commands in all processes and return what they wrote to stderr."""
        before = len(self._stderr())
        number = self._send(commands)
        end = time.monotonic() + timeout
        while not (self.folder / f"{number}.done").exists():
            assert self.process.poll() is None and time.monotonic() < end, self._stderr()[-3000:]
            time.sleep(0.02)
        return self._stderr()[before:]

    def close(self) -> None:
        if self.process.poll() is None:
            self._send(None)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()

    def _stderr(self) -> str:
        return (self.folder / "stderr").read_text()

    def _send(self, commands: list[list[str]] | None) -> int:
        number = next(self.commands)
        (self.folder / "new").write_text(json.dumps(commands))
        (self.folder / "new").rename(self.folder / f"{number}.json")
        return number


def main(folder: Path) -> int:
    from litgpt.__main__ import main as litgpt

    for number in itertools.count():
        while not (folder / f"{number}.json").exists():
            if os.getppid() == 1:
                return 1  # the test has ended
            time.sleep(0.02)
        if (commands := json.loads((folder / f"{number}.json").read_text())) is None:
            return 0
        for words in commands:
            if code := litgpt(words):
                print(f"failed: {words}", file=sys.stderr)
                return code
        if "LOCAL_RANK" not in os.environ:
            (folder / f"{number}.done").touch()
    raise AssertionError


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
