"""`litgpt chat`: a conversation in the terminal, or with the lines of a pipe."""

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from litgpt.args import Quantization
from litgpt.errors import UserError
from litgpt.generate.base import Metered, open_model
from litgpt.streams import show
from litgpt.text import as_utf8

if TYPE_CHECKING:
    from litgpt.api import LLM
    from litgpt.prompts import Message

SUBMIT = "!submit"


def main(
    checkpoint_dir: Path,
    *,
    max_new_tokens: int = 50,
    top_k: Optional[int] = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    precision: Optional[str] = None,
    quantize: Optional[Quantization] = None,
    multiline: bool = False,
    seed: int = 1234,
) -> None:
    """Talk to a model. An empty line or Ctrl-D ends the conversation, Ctrl-C stops an answer.

    Args:
        checkpoint_dir: Folder of a base model, a merged model or an adapter (LoRA or Skip2-LoRA). A Hugging Face folder or a GGUF file
            is converted on first use.
        max_new_tokens: Longest answer in tokens.
        top_k: Draw among this many of the most probable tokens. null: among all.
        top_p: Draw among the most probable tokens that hold this much probability together.
        temperature: Below 1 sharper, above 1 flatter probabilities; 0 always takes the most probable token.
        precision: Number format: bf16-true, 32-true or 16-true. Default: bf16-true where the processor has it, else 32-true.
        quantize: Keep the linear layers in 4 bits (bnb.nf4 and the like, by bitsandbytes) or 8 (int8, faster than bf16 on a CPU).
        multiline: Let a message have several lines; the line !submit sends it.
        seed: Random seed. The same seed and messages give the same answers.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}: at least 1 is needed")
    llm = open_model(checkpoint_dir, precision, quantize)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": llm.generator(seed)}
    conversation = Conversation(llm, max_new_tokens, sampling)
    if conversation.render is None:
        _note(f"prompt style {llm.prompt_style.name!r} has no turns: each message is answered on its own")
    if sys.stdin.isatty():
        import readline  # noqa: F401  (editing and history for input())

        end = f"a line {SUBMIT} sends, an empty message ends" if multiline else "an empty line ends"
        print(f"Talk to {llm.config.name}; {end}, Ctrl-C stops an answer.")
    while message := _read(multiline):
        conversation.answer(message)


class Conversation:
    """The turns so far. The oldest are dropped when they no longer fit the model's context."""

    def __init__(self, llm: "LLM", max_new_tokens: int, sampling: Any) -> None:
        self.llm = llm
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.turns: list[Message] = []
        self.render: Any = getattr(llm.prompt_style, "render", None)

    def answer(self, message: str) -> None:
        """Stream the answer to a message, and remember both."""
        turns = [*self.turns, {"role": "user", "content": message}]
        text, room, forgotten = self._fit(turns)
        limit = self.llm.model.max_seq_length
        if room < 1:
            _note(f"this message has no room in the model's {limit} tokens: nothing was sent")
            return
        if forgotten:
            _note(f"the conversation is longer than the model's {limit} tokens: the first {forgotten} messages and answers are forgotten")
        if sys.stdin.isatty():
            print(">> Reply: ", end="", flush=True)
        reply = ""
        with closing(self.llm.complete(text, min(self.max_new_tokens, room), **self.sampling)) as tokens:
            ids = Metered(tokens)
            try:
                for piece in self.llm.tokenizer.decode_stream(ids):
                    show(piece)
                    reply += piece
            except KeyboardInterrupt:
                _note("stopped")
        show("\n")
        _note(str(ids))
        if self.render is not None and reply.strip():
            self.turns = [*turns[2 * forgotten :], {"role": "assistant", "content": reply.strip()}]

    def _fit(self, turns: "list[Message]") -> "tuple[str, int, int]":
        """Return the prompt, the tokens left for its answer, and the number of exchanges dropped to leave a quarter of the context."""
        limit = self.llm.model.max_seq_length
        wanted = min(self.max_new_tokens, limit // 4)
        for start in range(0, len(turns), 2):
            if self.render is None:
                text: str = self.llm.prompt_style.apply(turns[-1]["content"])
            else:
                text = self.render(turns[start:], add_generation_prompt=True)
            room = limit - len(self.llm.tokenizer.ids(text, bos=self.llm.prompt_style.bos))
            if room >= wanted:
                break
        return text, room, start // 2


def _read(multiline: bool) -> str:
    """Return the next message; empty at the end of the input."""
    prompt = ">> Prompt: " if sys.stdin.isatty() else ""
    lines: list[str] = []
    while True:
        try:
            line = as_utf8(input("" if lines else prompt))
        except EOFError:
            break
        if "\ufffd" in line:
            _note("this line is not UTF-8 text: U+FFFD stands for what cannot be read")
        if not multiline:
            return line.strip()
        if line.strip() == SUBMIT:
            break
        lines.append(line)
    return "\n".join(lines).strip()


def _note(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)
