"""The table of commands, and the exit code of each failure. Nothing heavy is imported until a command needs it.

Exit codes: 0, 1 a `UserError`, 2 bad arguments, 3 a non-finite loss, 4 out of memory, 129 SIGHUP, 130 Ctrl-C, 143 SIGTERM. Any other
exception is a bug and keeps its traceback.
"""

import difflib
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import partial
from types import FrameType
from typing import Any, Optional

from litgpt import __version__, aliases
from litgpt.errors import Stopped, UserError
from litgpt.streams import guard, keep_secret, lost_output, safe

LONGEST_ERROR = 2000  # characters of a message
FIRST_SECONDS = 10.0  # in which the first process of a machine reports a mistake that all processes make
TOKEN_KEY = re.compile(r"-*(?:\w+\.)*(?:(?:acc?ess?|hf|hub)[_-]?tok\w*|token)\+?(?:=(.*))?", re.IGNORECASE | re.DOTALL)  # however misspelt

COMMANDS = {  # module:function or module:dataclass of this package, in a module that imports quickly, and the help
    "finetune": ("finetune.lora:Finetune", "Tune a model; settings follow from your data."),
    "finetune_lora": ("finetune.lora:Lora", "LoRA or Skip2-LoRA, with LitGPT's defaults."),
    "sweep": ("finetune.sweep:Sweep", "Try many settings, from one activation cache."),
    "finetune_full": ("finetune.full:Full", "Tune all weights of a model."),
    "finetune_adapter": ("finetune.adapter:Adapter", "Tune a model with LLaMA-Adapter."),
    "finetune_adapter_v2": ("finetune.adapter:AdapterV2", "Tune a model with LLaMA-Adapter V2."),
    "pretrain": ("pretrain:Pretrain", "Train all weights of a model on running text."),
    "finetune_lora_legacy": ("finetune.lora:Lora", "The same as finetune_lora."),
    "generate": ("generate.base:Generate", "Answer one prompt."),
    "generate_full": ("generate.base:Full", "Answer with the weights of finetune_full."),
    "generate_sequentially": ("generate.base:Sequentially", "Answer with the blocks divided among GPUs."),
    "generate_tp": ("generate.base:TensorParallel", "Answer with each block divided among processes."),
    "generate_adapter": ("generate.base:Adapter", "Answer with a LLaMA-Adapter."),
    "generate_adapter_v2": ("generate.base:AdapterV2", "Answer with a LLaMA-Adapter V2."),
    "generate_speculatively": ("generate.base:Speculatively", "Answer faster with a small model that drafts."),
    "sample": ("generate.sample:SampleAnswers", "Draw several answers to questions; check them."),
    "chat": ("generate.chat:Chat", "Talk to a model or an adapter."),
    "data": ("examine:examine", "Look at your records before you train."),
    "prompts": ("examine:prompts", "Show the prompt styles, or a model's template."),
    "evaluate": ("evaluate:evaluate", "Measure a model on your records, or on tasks."),
    "serve": ("serve.command:Serve", "Serve a model: OpenAI's API, and a chat page."),
    "download": ("download:download_from_hub", "Get a model from the Hugging Face hub."),
    "push": ("push:push", "Upload a model or an adapter to the hub."),
    "validate": ("validate:validate", "Check a checkpoint, and estimate its memory."),
    "convert_to_litgpt": ("convert.to_litgpt:convert_to_litgpt", "Convert a GGUF file or a Hugging Face folder."),
    "convert_from_litgpt": ("convert.from_litgpt:convert_from_litgpt", "Make a folder for transformers."),
    "convert_pretrained_checkpoint": ("convert.to_litgpt:convert_pretrained_checkpoint", "Convert the step folder of a training run."),
    "convert_to_gguf": ("convert.gguf.export:convert_to_gguf", "Make a GGUF file, for llama.cpp and Ollama."),
    "convert_adapter": ("convert.adapter:convert_adapter", "Convert an adapter to PEFT or GGUF, or back."),
    "add_tokens": ("convert.add_tokens:add_tokens", "Add tokens to a checkpoint."),
    "merge_lora": ("convert.merge:merge_lora", "Fold a LoRA adapter into its base's weights."),
}
# Words that users try, and names from other versions.
OTHER_NAMES = {
    "finetune": "train tune fit sft fine-tune fine_tune",
    "generate": "run ask predict infer inference complete",
    "chat": "talk",
    "serve": "server api deploy",
    "evaluate": "eval test benchmark",
    "data": "dataset inspect examine",
    "prompts": "prompt template templates styles",
    "push": "upload publish",
    "download": "pull get",
    "validate": "check verify",
    "merge_lora": "merge fuse",
    "convert_to_litgpt": "convert import convert_hf_checkpoint",
    "convert_from_litgpt": "export convert_lit_checkpoint",
    "convert_to_gguf": "gguf quantize ollama",
    "convert_adapter": "peft",
}


# commands that download ORG/NAME
TAKING_NAMES = ["finetune", "sweep", "generate", "sample", "chat", "serve", "evaluate", "validate", "pretrain"]


def main(argv: Optional[list[str]] = None) -> int:
    """Run one command and return the exit code. The standard streams stay guarded (`litgpt.streams`)."""
    argv = sys.argv[1:] if argv is None else argv
    guard()
    for word, following in zip(argv, [*argv, ""][1:], strict=True):
        if found := TOKEN_KEY.fullmatch(word):
            keep_secret(following if found[1] is None and word.startswith("-") else found[1] or "")
    code = 0
    with _exit_on_signals() as heeded:
        try:
            work = _work_of(argv)
            if isinstance(work, int):
                code = work
            else:
                work()
        except (UserError, Stopped, KeyboardInterrupt, OSError) as error:
            is_echo = bool(argv) and _is_echo(argv[0], error)
            for number in heeded:
                signal.signal(number, signal.SIG_IGN)  # the command has ended: its message must not be lost
            with redirect_stderr(io.StringIO()) if is_echo else nullcontext():
                code = _report(error)
        except SystemExit as end:
            if end.code or not lost_output():
                raise
    if (lost := lost_output()) and not code:
        return _report(OSError(lost.errno, lost.strerror, "standard output"))
    return code


def _work_of(argv: list[str]) -> int | Callable[[], Any]:
    """Return the requested command, ready to be called, or an exit code if nothing is left to do."""
    if not argv:
        print(_table(), file=sys.stderr)
        return 2
    name, *words = argv
    if words and not os.path.exists(words[0]):  # `finetune full` and `generate base`, as in early versions of LitGPT
        joined = "generate" if [name, words[0]] == ["generate", "base"] else f"{name}_{words[0]}"
        name, words = (joined, words[1:]) if joined in COMMANDS else (name, words)
    if name in ("-h", "--help", "help"):
        if words and words[0] in COMMANDS:
            return _work_of([words[0], "--help"])
        print(_table())
        return 0
    if name == "--version":
        print(f"litgpt {__version__}")
        return 0
    if name not in COMMANDS:
        meant = next((command for command, words in OTHER_NAMES.items() if name.lower() in words.split()), None)
        near = [meant] if meant else difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.75)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        _print_error(f"there is no command {name!r}.{hint} `litgpt --help` lists them.")
        return 2
    from litgpt.cli import parse

    command = load(name)
    arguments = parse(f"litgpt {name}", command, words, _download if name.partition("_")[0] in TAKING_NAMES else lambda config: None)
    return command(**arguments).main if isinstance(command, type) else partial(command, **arguments)


def _download(settings: dict[str, Any]) -> None:
    """Download the models that a command's settings name as ORG/NAME, unless they are on this machine or this is a dry run."""
    if not settings.get("dry_run"):
        from litgpt.download import fetch_named

        for key in ("checkpoint_dir", "initial_checkpoint_dir"):
            if settings.get(key):
                fetch_named(settings[key], settings.get("access_token"))


def _is_echo(name: str, error: BaseException) -> bool:
    """Return True if this process of torchrun or srun would only repeat its machine's first: the processes have not found each other yet.

    For processes that the first has started itself this holds only for a signal, which a terminal sends to all. torchrun ends all
    processes as soon as one has failed. This one waits, so that the first can say why; if the first does not fail, this one says it.
    """
    by_torchrun, is_signal = "TORCHELASTIC_RUN_ID" in os.environ, isinstance(error, Stopped | KeyboardInterrupt)
    is_own = by_torchrun or ("LOCAL_RANK" in os.environ and is_signal)
    local = os.environ.get("LOCAL_RANK" if is_own else "SLURM_LOCALID", "0")
    launch = sys.modules.get("litgpt.train.launch")
    joins = name in COMMANDS and COMMANDS[name][0].startswith(("finetune.", "pretrain:"))
    if not joins or local == "0" or (launch and launch.Group.has_met):
        return False
    if by_torchrun and not is_signal:
        time.sleep(FIRST_SECONDS)
        return False
    return True


def _report(error: BaseException) -> int:
    """Print why a command ended and return its exit code."""
    if isinstance(error, UserError):
        _print_error(str(error))
        return error.exit_code
    if isinstance(error, Stopped):
        print(f"{signal.Signals(error.signum).name}: {error.message or 'stopped before anything was written'}.", file=sys.stderr)
        return 128 + error.signum
    if isinstance(error, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
        return 130
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):  # the latter: the reader of a pipe has gone, as with `| head`
        _print_error(f"{error.filename or 'input or output'}: {error.strerror or error}")
    return 1


def _print_error(message: str) -> None:
    """Print a message, cut to a length that a person reads."""
    text = safe(message)  # before it is cut: half a secret would be shown
    more = f" ... ({len(text) - LONGEST_ERROR:,} more characters)" if len(text) > LONGEST_ERROR else ""
    print(f"Error: {text[:LONGEST_ERROR]}{more}", file=sys.stderr)


def load(name: str) -> Callable[..., Any]:
    """Return the function or the settings class of a command."""
    return aliases.load(COMMANDS[name][0])


def _table() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    how = "`litgpt finetune MODEL --data my.jsonl` chooses the other settings itself.\n`litgpt COMMAND --help` lists those of a command."
    return "\n".join(["usage: litgpt COMMAND [--help] ...   litgpt --version", "", *rows, "", how])


@contextmanager
def _exit_on_signals() -> Iterator[list[signal.Signals]]:
    """Turn SIGTERM and SIGHUP into `SystemExit(128 + number)`, so that half-written folders are cleaned up on the way out.

    Yields these signals, except ignored ones, as with `nohup`. A closed terminal and `timeout` send them twice; they count once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield []
        return

    def leave(signum: int, frame: Optional[FrameType]) -> None:
        for number in heeded:
            signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + signum)

    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, leave) for number in heeded}
    try:
        yield heeded
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
