"""Ollama's Modelfile for a GGUF file: the prompt style as a Go template, stop sequences and sampling, from the checkpoint's files.

A style is reduced to the texts around a system message, a question and a reply, which are found in a rendered conversation:

    {{ if .System }}HEAD{{ .System }}SYSTEM_END{{ end }}USER_HEAD{{ .Prompt }}REPLY_HEAD{{ .Response }}REPLY_END
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from litgpt.atomic import write_bytes
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.files import json_if_there
from litgpt.prompts import ChatStyle, Message, PromptStyle, resolve_prompt_style
from litgpt.tokenizer import Tokenizer

MOST_CONTEXT = 8192  # tokens that Ollama reserves memory for, unless a user asks for more
SAMPLING = {**{name: name for name in ("temperature", "top_k", "top_p", "min_p")}, "repetition_penalty": "repeat_penalty"}  # here, Ollama's
PLACES = ("\ue000Aa", "\ue001Bb", "\ue002Cc", "\ue003Dd")  # stand for a system text, a question, a reply and another question
SYSTEM, *TURNS = ({"role": role, "content": text} for role, text in zip(("system", "user", "assistant", "user"), PLACES, strict=True))


class Form(NamedTuple):
    """A prompt style as the texts around a system text, a question and a reply."""

    system_head: str
    system_end: str
    user_head: str
    reply_head: str
    reply_end: str = ""
    system: str = ""  # the style's own
    in_user: bool = False  # the system text stands between user_head and the question

    def template(self) -> str:
        """Return the Go template, which Ollama runs for each question, with the system text for the first."""
        head, end, user, reply, reply_end = (text.replace("{{", '{{ "{{" }}') for text in self[:5])
        block = f"{{{{ if .System }}}}{head}{{{{ .System }}}}{end}{{{{ end }}}}" if head or end else ""
        start = user + block if self.in_user else block + user
        return f"{start}{{{{ .Prompt }}}}{reply}{{{{ .Response }}}}{reply_end}"

    def render(self, turns: Sequence[Message]) -> str:
        """Return what the template makes of a conversation that ends with a question."""
        texts: list[str] = []
        block = f"{self.system_head}{self.system}{self.system_end}" if self.system else ""
        for turn in turns:
            if turn["role"] == "system":
                block = f"{self.system_head}{turn['content']}{self.system_end}"
            elif turn["role"] == "user":
                head = f"{self.user_head}{block}" if self.in_user else f"{block}{self.user_head}"
                texts += (head, turn["content"], self.reply_head)
                block = ""
            else:
                texts += (turn["content"], self.reply_end)
        return "".join(texts)


def write_modelfile(source: Path, gguf_file: Path, overwrite: bool) -> Path | None:
    """Write `Modelfile` next to a GGUF file of the checkpoint folder `source`, or `NAME.Modelfile` if another one is there.

    With `overwrite`, a Modelfile of the same GGUF file is replaced. Returns None if both exist.
    """
    origin = f"FROM ./{gguf_file.name}\n"
    tokenizer = Tokenizer(source)
    style = resolve_prompt_style(None, source, tokenizer, fallback="default")
    lines = [origin]
    form = form_of(style, tokenizer)
    if form and '"""' not in form.template() + form.system:
        lines.append(f'TEMPLATE """{form.template()}"""\n')
        if form.system:
            lines.append(f'SYSTEM """{form.system}"""\n')
    else:
        lines.append("# This prompt style cannot be written as a template for Ollama, which uses the one in the GGUF file.\n")
    for ids in style.stop_tokens(tokenizer):
        if (text := tokenizer.decode(ids, skip_special_tokens=False)) and not re.search(r'["\n]', text):
            lines.append(f'PARAMETER stop "{text}"\n')
    stated = json_if_there(source / "generation_config.json")
    if stated.get("do_sample") is False:
        stated = {"temperature": 0}
    for key, name in SAMPLING.items():
        if isinstance(value := stated.get(key), (int, float)):
            lines.append(f"PARAMETER {name} {value:g}\n")
    lines.append(f"PARAMETER num_ctx {min(Config.from_checkpoint(source).block_size, MOST_CONTEXT)}\n")
    content = "".join(lines).encode()
    for file in (gguf_file.parent / "Modelfile", gguf_file.with_suffix(".Modelfile")):
        known = file.read_bytes() if file.is_file() else None
        if known == content or not os.path.lexists(file) or (overwrite and known and known.startswith(origin.encode())):
            write_bytes(file, content)
            return file
    return None


def form_of(style: PromptStyle, tokenizer: Tokenizer) -> Form | None:
    """Return a style's form; None if it has none: its texts depend on more than their places."""
    bos = tokenizer.decode([tokenizer.bos_id], False) if tokenizer.use_bos and tokenizer.bos_id is not None else ""  # Ollama adds it

    def rendered(turns: Sequence[Message]) -> str:
        return cast("ChatStyle", style).render(turns, add_generation_prompt=True).removeprefix(bos)

    try:
        if not hasattr(style, "render"):
            before, after = style.apply(PLACES[1]).removeprefix(bos).split(PLACES[1])
            return Form("", "", before, after)
        form = _of_conversation(rendered)
        cases = [TURNS[:1], TURNS]
        if form.system_head or form.system_end:
            cases += [[SYSTEM, *turns] for turns in cases]
        return form if all(form.render(turns) == rendered(turns) for turns in cases) else None
    except (UserError, ValueError):
        return None


def _of_conversation(rendered: Callable[[Sequence[Message]], str]) -> Form:
    plain, reply_head, between, _ = _split(rendered(TURNS), *PLACES[1:])
    user_head = os.path.commonprefix([plain[::-1], between[::-1]])[::-1]  # noqa: RUF071 - of texts, not paths
    if plain != user_head and (end := re.match(r"\s*<[^<>\s]+>\s*", user_head)):
        user_head = user_head[end.end() :]  # what ends a turn belongs to the turn before
    reply_end, own = between.removesuffix(user_head), plain.removesuffix(user_head)
    try:
        start, rest, *_ = _split(rendered([SYSTEM, *TURNS]), *PLACES)
    except (UserError, ValueError):  # no place for a system text
        return Form("", "", plain, reply_head, reply_end)
    if start.startswith(user_head) and not rest.endswith(user_head):
        return Form(start.removeprefix(user_head), rest, user_head, reply_head, reply_end, in_user=True)
    head, end_of_system = start, rest.removesuffix(user_head)
    return Form(head, end_of_system, user_head, reply_head, reply_end, own[len(head) : len(own) - len(end_of_system)] if own else "")


def _split(text: str, *places: str) -> list[str]:
    """Return the pieces between the places. Raise ValueError if one is missing, repeated or out of order."""
    pieces = []
    for place in places:
        piece, text = text.split(place)
        pieces.append(piece)
    return [*pieces, text]
