"""The command line: which function a command runs, and how its failures end. Nothing heavy is imported until a command needs it.

Exit codes: 0, 1 a `UserError`, 2 bad arguments, 130 Ctrl-C, 143 SIGTERM. Any other exception is a bug and keeps its traceback.
"""

import difflib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NamedTuple, Optional

from litgpt import __version__
from litgpt.errors import UserError


class Command(NamedTuple):
    target: str
    """module:function. The module must import quickly: heavy imports belong inside the function."""
    help: str


COMMANDS = {
    "finetune": Command("litgpt.finetune.lora:setup", "Tune a model with LoRA or Skip2-LoRA."),
    "finetune_lora": Command("litgpt.finetune.lora:setup", "The same."),
    "finetune_full": Command("litgpt.finetune.full:setup", "Tune all weights of a model."),
    "generate": Command("litgpt.generate.base:main", "Answer one prompt with a checkpoint or an adapter."),
    "chat": Command("litgpt.generate.chat:main", "Talk to a checkpoint or an adapter."),
    "convert_to_litgpt": Command(
        "litgpt.convert.to_litgpt:convert_to_litgpt", "Make a checkpoint from a GGUF file or a Hugging Face folder."
    ),
    "merge_lora": Command("litgpt.finetune.merge:merge_lora", "Fold a LoRA adapter into the weights of its base."),
}


def main(argv: Optional[list[str]] = None) -> int:
    """Run one command and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        print(_table(), file=sys.stderr)
        return 2
    name, rest = argv[0], argv[1:]
    if name in ("-h", "--help"):
        print(_table())
        return 0
    if name == "--version":
        print(f"litgpt {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        print(f"Error: there is no command {name!r}.{hint} `litgpt --help` lists them.", file=sys.stderr)
        return 2
    with _exit_on_sigterm():
        return _run(name, rest)


def _run(name: str, argv: list[str]) -> int:
    from litgpt.command_line import UsageError, parse

    try:
        function = load(name)
        function(**parse(f"litgpt {name}", function, argv))
    except UsageError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe has gone, as `| head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (nothing is flushed into the broken pipe at exit)
        return 1
    except OSError as error:
        print(f"Error: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    return 0


def load(name: str) -> Callable[..., object]:
    """The function behind a command."""
    module, function = COMMANDS[name].target.split(":")
    command: Callable[..., object] = getattr(importlib.import_module(module), function)
    return command


def _table() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: litgpt COMMAND [--help] ...", "", *rows, "", "  litgpt --version"])


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into `SystemExit(143)`, so that half-written folders are cleaned up on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: Optional[FrameType]) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
