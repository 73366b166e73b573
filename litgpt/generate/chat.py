"""`litgpt chat`: a conversation in the terminal, or with lines from a pipe."""

import json
import re
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from litgpt.checkpoint import load_model, read_hyperparameters
from litgpt.convert.resolve import open_checkpoint
from litgpt.errors import UserError
from litgpt.files import add_text, expand_path
from litgpt.generate.base import Checkpoint, Drawing, Metered
from litgpt.streams import safe, show, unescaped
from litgpt.text import as_utf8, counted

if TYPE_CHECKING:
    from litgpt.api import LLM
    from litgpt.generate.sampling import Sampling
    from litgpt.prompts import Message

SUBMIT = "!submit"
COMMANDS = {
    "/base": "[QUESTION]: ask the base model, too (without one: the last question)",
    "/system": "[TEXT]: set the system text; without a text, show it; - removes it",
    "/reset": "forget the conversation",
    "/save": "FILE: add the conversation to it: .jsonl to train on, others as text",
    "/quit": "end, like an empty line or Ctrl-D",
    "/help": "this list",
}


@dataclass
class Chat(Drawing, Checkpoint):
    """Talk to a model. An empty line or Ctrl-D ends the conversation, Ctrl-C stops an answer or drops a message, /help lists commands."""

    multiline: bool = False
    """Accept messages of several lines; the line !submit sends the message."""

    def main(self) -> None:
        from litgpt.generate.sampling import Sampling

        sampling = Sampling(**self.sampling)
        llm = self.opened(self.checkpoint_dir)
        talk(Conversation(llm, self.max_new_tokens, sampling, self.sys_prompt, self.checkpoint_dir, self.seed), self.multiline)


def talk(conversation: "Conversation", multiline: bool) -> None:
    """Read messages and answer them until an empty one."""
    llm = conversation.llm
    if not conversation.has_turns:
        _note(f"prompt style {llm.prompt_style.name!r} has no turns: each message is answered on its own")
    if terminal := sys.stdin.isatty():
        with suppress(ImportError):  # Windows has none
            import readline  # editing and history for input()

            readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one message

        end = f"a line {SUBMIT} sends, an empty message ends" if multiline else "an empty line ends"
        print(f"Talk to {llm.config.name}; {end}, Ctrl-C stops an answer, /help lists commands.")
    while message := _read(multiline):
        try:
            if not conversation.take(message):
                break
        except (UserError, OSError, KeyboardInterrupt) as error:  # Ctrl-C while the prompt, or the model for /base, is prepared
            if not terminal:
                raise
            _note(str(error) or "stopped")


@dataclass
class Conversation:
    """The turns so far. The oldest are dropped when they no longer fit the model's context."""

    llm: "LLM"
    max_new_tokens: int
    sampling: "Sampling"
    sys_prompt: Optional[str] = None
    folder: Optional[Path] = None  # that the model was loaded from, where its base is looked up
    seed: int = 1234
    turns: "list[Message]" = field(default_factory=list)

    def __post_init__(self) -> None:
        from litgpt.generate.engine import Session

        self.generator, self.session = self.llm.generator(self.seed), Session(self.llm.model)
        self.has_turns = hasattr(self.llm.prompt_style, "render")

    @cached_property
    def base(self) -> Any:
        """A session of a tuned model's base, opened on first use; None if the base is not known."""
        from litgpt.generate.engine import Session

        model = None if self.folder is None else _adapterless(self.llm.model) or _base_of_run(self.llm.model, self.folder)
        return Session(model) if model else None

    def take(self, message: str) -> bool:
        """Answer a message, or do what a command says. Return False at the end."""
        word = re.match(r"/[a-z]+(?=\s|$)", message)
        if not word:
            self.answer(message)
            return True
        name, rest = word[0], message[word.end() :].strip()
        if name not in COMMANDS:
            _note(f"there is no command {name}: {', '.join(COMMANDS)}")
        elif name != "/quit":
            getattr(self, f"_{name[1:]}")(rest)
        return name != "/quit"

    def answer(self, message: str) -> None:
        """Stream the answer to a message, and remember both."""
        turns = [*self.turns, {"role": "user", "content": message}]
        ids, room, forgotten = self._fit(turns)
        if room < 1:
            _note(f"this message does not fit into the model's {self.limit} tokens: nothing was sent")
            return
        if forgotten:
            oldest = counted(forgotten, "exchange")
            _note(f"the conversation is longer than the model's {self.limit} tokens, so the model no longer sees its beginning ({oldest})")
        if sys.stdin.isatty():
            print(">> Reply: ", end="", flush=True)
        reply = self._reply(self.session, ids, room, show)
        show("\n")
        _note(f"{self.meter}, stopped" if self.stopped else str(self.meter))
        if _text_of(reply):
            self.turns = [*turns[2 * forgotten :], reply]

    @property
    def limit(self) -> int:
        return self.llm.model.max_seq_length

    def _reply(self, session: Any, ids: list[int], room: int, on_piece: Callable[[str], Any]) -> "Message":
        """Return the answer to a prompt, or its beginning if Ctrl-C stops it; `on_piece` is called with each piece."""
        from litgpt.prompts import ReplyReader, reply_message

        style, tokenizer = self.llm.prompt_style, self.llm.tokenizer
        stops, reader, parts = style.stop_tokens(tokenizer), ReplyReader(style, tokenizer), ["", ""]
        with closing(session.answer(ids, min(self.max_new_tokens, room), self.sampling, stops, self.generator)) as tokens:
            self.meter, self.stopped = Metered(tokens), False

            def take(piece: str, is_last: bool = False) -> None:
                for index, text in enumerate(reader.push(piece, is_last)):
                    on_piece("\n\n" + text if index and text and parts[0] and not parts[1] else text)
                    parts[index] += text

            try:
                for piece in tokenizer.decode_stream(self.meter, skip_special_tokens=False):
                    take(piece)
                take("", is_last=True)
            except KeyboardInterrupt:
                self.stopped = True
        return reply_message(*parts)

    def _fit(self, turns: "list[Message]") -> tuple[list[int], int, int]:
        """Return the prompt, the tokens left for its answer, and the number of exchanges dropped to leave a quarter of the context."""
        wanted = min(self.max_new_tokens, self.limit // 4)
        for start in range(0, len(turns), 2):
            prompt = turns[start:] if self.has_turns else turns[-1]["content"]
            ids = self.llm.prompt_ids(self.llm.rendered(prompt, self.sys_prompt))
            if self.limit - len(ids) >= wanted or not self.has_turns:
                break
        return ids, self.limit - len(ids), start // 2

    def _help(self, _: str) -> None:
        print("\n".join(f"  {name:8} {text}" for name, text in COMMANDS.items()))

    def _reset(self, _: str) -> None:
        self.turns = []
        _note("the conversation is forgotten")

    def _system(self, text: str) -> None:
        if text:
            self.sys_prompt = None if text == "-" else text
        _note("no system text but the prompt style's own" if self.sys_prompt is None else f"system text: {self.sys_prompt}")

    def _save(self, name: str) -> None:
        if not name or not self.turns:
            _note("nothing was said yet" if name else "name a file: /save FILE")
            return
        system = [] if self.sys_prompt is None else [{"role": "system", "content": self.sys_prompt}]
        turns, file = [*system, *self.turns], expand_path(name)
        if file.suffix == ".jsonl":
            text = json.dumps({"messages": turns}, ensure_ascii=False) + "\n"
        else:
            text = "".join(f"{turn['role']}: {_text_of(turn)}\n\n" for turn in turns)
        try:
            add_text(file, text)
        except OSError as error:
            _note(f"{file}: {error.strerror or error}")
        else:
            _note(f"{len(turns)} messages added to {file}")

    def _base(self, question: str) -> None:
        """Show the answers of the base model and of the tuned model in two columns."""
        if self.base is None:
            _note(f"{self.llm.config.name} is not a tuned model with a known base: open the folder of an adapter or a run")
            return
        if question:
            self.answer(question)
        if len(self.turns) < 2 or (question and self.turns[-2]["content"] != question):
            if not question:
                _note("nothing was asked yet: /base QUESTION")
            return
        *before, asked, tuned = self.turns
        ids, room, _ = self._fit([*before, asked])
        reply = self._reply(self.base, ids, room, str)
        _show_columns({"base": _text_of(reply), "tuned": _text_of(tuned)})


def _text_of(turn: "Message") -> str:
    return f"{turn.get('reasoning_content', '')}\n\n{turn['content']}".strip()


def _adapterless(model: Any) -> Any:
    """Return a model without its LoRA that shares the base's weights. None if it has no LoRA, or tunes some of these weights."""
    from litgpt.adapters.base import adapters
    from litgpt.lora import GPT, Config
    from litgpt.packed import pack

    own = [adapter for _, adapter in adapters(model)]
    if not own or type(model) is not GPT or any(adapter.tunes_base for adapter in own):
        return None
    base = model.sharing(Config(**model.config.base_dict()))
    pack(base)
    return base


def _base_of_run(model: Any, folder: Path) -> Any:
    """Return the model of the folder that hyperparameters.yaml in `folder` names, in the number format of `model`; None without one."""
    name = read_hyperparameters(open_checkpoint(folder)).get("checkpoint_dir")
    if not isinstance(name, str) or not Path(name).is_dir():
        return None
    return load_model(open_checkpoint(name), model.dtype, next(model.parameters()).device)


def _show_columns(texts: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(*(Column(name, ratio=1) for name in texts), expand=True)
    table.add_row(*(Text(safe(text)) for text in texts.values()))
    Console(file=unescaped(sys.stdout)).print(table)


def _read(multiline: bool) -> str:
    """Return the next message; empty at the end of the input."""
    prompt = ">> Prompt: " if sys.stdin.isatty() else ""
    lines: list[str] = []
    interrupted = False
    while True:
        try:
            line = as_utf8(input("" if lines else prompt))
        except (EOFError, KeyboardInterrupt) as end:
            if prompt:
                print()
            if isinstance(end, EOFError):
                break
            if interrupted or not prompt:
                raise
            _note("nothing was sent; Ctrl-C again ends")
            interrupted, lines = True, []
            continue
        interrupted = False
        if "\ufffd" in line:
            _note("this line is not UTF-8 text: U+FFFD stands for what cannot be read")
        if not multiline or (not lines and line.strip().split(" ")[0] in COMMANDS):
            return line.strip()
        if line.strip() == SUBMIT:
            break
        lines.append(line)
    return "\n".join(lines).strip()


def _note(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)
