"""Prompt styles: the text around a question, and the token that ends the reply.

The built-in styles are rows of data in `litgpt.families`, of two forms: `PlainStyle`, one text with holes, and `TurnStyle`, a text for each
role, which can hold a conversation. `ChatTemplate` renders the checkpoint's own jinja template in a sandbox.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from litgpt import families
from litgpt.atomic import write_text
from litgpt.errors import UserError
from litgpt.files import decode_text, dump_yaml, parse_yaml, read_own, read_yaml
from litgpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

    from litgpt.config import Config

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant" | "tool", "content": ...}
Tools = list[Any] | None
Marked = tuple[str, list[int]]  # a text, and where each message starts in it
PROMPT_STYLE_FILE = "prompt_style.yaml"
CHAT = ("chat", "chat_template")  # names of the checkpoint's own template
MAX_TEMPLATE = 100_000  # characters of a chat template
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning; the first that has a value counts
OWN_TEMPLATE = 'choose data.prompt_style "chat", the checkpoint\'s own template'


class PromptStyle:
    """Base class of the prompt styles. A style of your own overrides `apply`; it may set `gap` and `end_of_turn`."""

    name: ClassVar[str] = ""
    bos: ClassVar[bool | None] = None  # BOS before a text: as the tokenizer does by default; not before a template, which writes its own
    gap: ClassVar[str] = ""  # Text between prompt and reply. The model learns to write it, so it is not part of the prompt.
    end_of_turn: ClassVar[str] = ""  # Token that ends a reply, "" for the tokenizer's EOS.
    marker: ClassVar[str] = ""  # Another token that the style needs.

    def apply(self, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        """Return the text up to where the reply starts. `sys_prompt` replaces the style's system text; `input` follows the prompt."""
        raise NotImplementedError

    def stop_tokens(self, tokenizer: Tokenizer) -> tuple[list[int], ...]:
        """Return the id sequences that end generation: the tokenizer's stop ids and the style's own end of turn."""
        ids = set(tokenizer.stop_ids)
        if self.end_of_turn and (marker := tokenizer.token_to_id(self.end_of_turn)) is not None:
            ids.add(marker)
        return tuple([i] for i in sorted(ids))

    @classmethod
    def from_name(cls, name: str) -> PromptStyle:
        """Return the style of a name ("alpaca") or class ("Alpaca", "litgpt.prompts.Alpaca"). Raise UserError with the nearest name."""
        return _find(name)()

    @classmethod
    def from_config(cls, config: Config) -> PromptStyle:
        """Return the style that the model of this name was trained with; `Default` for base models."""
        return model_name_to_prompt_style(config.name)


def with_input(prompt: str, text: str | None) -> str:
    """Return the question, followed by the input if there is one."""
    return f"{prompt}\n\n{text}" if text else prompt


class PlainStyle(PromptStyle):
    """One text with the holes {system}, {prompt} and, in `text_with_input`, {input}."""

    text: ClassVar[str] = "{prompt}"
    text_with_input: ClassVar[str] = ""
    system: ClassVar[str] = ""
    system_with_input: ClassVar[str] = ""

    def apply(self, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        text, system = self.text, self.system
        if self.text_with_input and kwargs.get("input"):
            text, system = self.text_with_input, self.system_with_input
        elif not self.text_with_input:
            prompt = with_input(prompt, kwargs.get("input"))
        values = {"system": system if sys_prompt is None else sys_prompt, "prompt": prompt, "input": kwargs.get("input", "")}
        return re.sub(r"\{(system|prompt|input)\}", lambda hole: values[hole[1]], text)


class ChatStyle(PromptStyle):
    """A style that renders conversations."""

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools = None) -> str:
        """Return the conversation as text, with the head of the assistant's next turn if `add_generation_prompt` is set."""
        return self.render_marked(messages, add_generation_prompt, tools)[0]

    def render_marked(self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools = None) -> Marked:
        """Return the conversation as text, and where each message starts in it; -1 or no list where that is unknown."""
        raise NotImplementedError

    def apply(self, prompt: str | list[Message], *, sys_prompt: str | None = None, **kwargs: str) -> str:
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": with_input(prompt, kwargs.get("input"))}]
        if sys_prompt is not None:
            messages = [{"role": "system", "content": sys_prompt}, *messages]
        return self.render(messages, add_generation_prompt=True)


class TurnStyle(ChatStyle):
    """A text for each role: start + system turn + user turn + reply + between + user turn + ...

    Without a system message the style's `system` is used; an empty message leaves the system text out.
    """

    start: ClassVar[str] = ""
    system: str = ""
    system_turn: ClassVar[str] = ""
    system_in_user: ClassVar[bool] = False  # the system text begins the first user message
    user_turn: ClassVar[str] = ""
    reply_head: ClassVar[str] = ""  # precedes a reply
    between: ClassVar[str] = ""  # between a reply's end of turn and the next turn

    def __init__(self, system_message: str | None = None) -> None:
        if system_message is not None:
            self.system = system_message

    def render_marked(self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools = None) -> Marked:
        turns, system, starts = list(messages), self.system, list[int]()
        if turns and turns[0]["role"] == "system":
            system = turns.pop(0)["content"]
            starts.append(0)
        system_text = self.system_turn.replace("{}", system) if system else ""
        head, before = (system_text, "") if self.system_in_user else ("", system_text)
        parts, between = [self.start + before], ""
        for turn in turns:
            if turn["role"] == "user":
                parts.append(between + self.user_turn.replace("{}", head + turn["content"]))
                head = between = ""
            elif turn["role"] == "assistant":
                parts.append(between + self.reply_head + self.gap + turn["content"] + self.end_of_turn)
                between = self.between
            elif turn["role"] == "system":
                raise UserError(f"prompt style {self.name}: a conversation holds at most one system message, at its start")
            else:
                raise UserError(f"the prompt style {self.name!r} has no form for the role {turn['role']!r}: {OWN_TEMPLATE}")
        starts += list(accumulate(map(len, parts)))[:-1]
        if add_generation_prompt:
            parts.append(between + self.reply_head)
        return "".join(parts), starts


# --- The styles ---

STYLES: dict[str, type[PromptStyle]] = {}  # by name
_CLASSES: dict[str, type[PromptStyle]] = {"PlainStyle": PlainStyle, "TurnStyle": TurnStyle}  # by class name, with the two forms
for _class, _row in families.STYLES.items():
    _CLASSES[_class] = STYLES[_row.name] = type(_class, (_CLASSES[_row.form],), {"__module__": __name__, "name": _row.name, **_row.pieces})


prompt_styles = STYLES  # LitGPT's name


def __getattr__(name: str) -> type[PromptStyle]:
    """Return a style by its class name, such as `litgpt.prompts.Alpaca`."""
    if name in families.STYLES:
        return _CLASSES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# --- The checkpoint's own template ---


class ChatTemplate(ChatStyle):
    """A checkpoint's own chat template (jinja2), in a sandbox.

    Args:
        template: The jinja source.
        bos_token, eos_token, special: The values of these variables in the template.
        tool_template: Another template for conversations with tools.
        source: The file or folder of the template, for messages.
    """

    name = "chat"
    bos = False

    def __init__(
        self, template: str, bos_token: str = "", eos_token: str = "", source: str = "", tool_template: str | None = None, **special: str
    ) -> None:
        self.template, self.tool_template = template, tool_template
        self.special_tokens = {"bos_token": bos_token, "eos_token": eos_token, **special}
        self.source = source or "the chat template"
        if (size := max(len(template), len(tool_template or ""))) > MAX_TEMPLATE:
            raise UserError(f"{self.source}: the chat template has {size:,} characters, at most {MAX_TEMPLATE:,} are read")
        self.now = datetime.now()  # fixed: a run that crosses midnight must not change its prompts
        self._compiled: dict[str, Template] = {}

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, source: str = "") -> ChatTemplate | None:
        """Return the template in the tokenizer's files, or None."""
        if tokenizer.chat_template is None:
            return None
        style = cls(tokenizer.chat_template, source=source, tool_template=tokenizer.tool_template)
        style.special_tokens |= tokenizer.special_tokens  # a model's own may have any name
        return style

    def reads(self, key: str) -> bool:
        """Return True if the template names the key of a message, or a key that `_with_reasoning` gives the same value, or a variable."""
        names = "|".join(map(re.escape, {key, *REASONING[:2]} if key in REASONING else {key}))
        return re.search(rf"\b({names})\b", f"{self.template} {self.tool_template}") is not None

    @cached_property
    def reply_marks(self) -> tuple[str, str, str]:
        """The texts before a reply's reasoning, between this and the content, and before a content without reasoning; "" for none."""
        asked, why, content = {"role": "user", "content": "?"}, "0b2d5a7c", "7c5a2d0b"
        reply = {"role": "assistant", "content": content}
        with suppress(UserError):
            head = self.render([asked], add_generation_prompt=True)
            plain, reasoned = (self.render([asked, message]) for message in (reply, {**reply, "reasoning_content": why}))
            alone = plain[len(head) :].partition(content)[0] if plain.startswith(head) else ""
            before, _, rest = reasoned[len(head) :].partition(why) if reasoned.startswith(head) else ("", "", "")
            between = rest.partition(content)[0].strip()
            return before.strip() if between else "", between, alone.strip()
        return "", "", ""

    def render_marked(self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools = None) -> Marked:
        """Return the conversation as text and its starts. Raise UserError if the template refuses it, is broken, or exceeds the bounds.

        Arguments of tool calls are given to it as objects, or as JSON text, OpenAI's form, if it takes no objects.
        """
        messages = [_with_reasoning(message) for message in messages]
        objects, texts = ([_with_arguments(message, kind) for message in messages] for kind in (dict, str))
        if objects != texts:
            with suppress(UserError):
                return self._render(objects, add_generation_prompt, tools)
        return self._render(texts, add_generation_prompt, tools)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Tools) -> Marked:
        pieces = []
        try:
            from litgpt.templates import MAX_SIZE, Sandbox

            template = self.tool_template if tools is not None and self.tool_template is not None else self.template
            if template not in self._compiled:
                self._compiled[template] = Sandbox(self.now).from_string(template)
            sandbox: Any = self._compiled[template].environment
            sandbox.start()
            variables = {**self.special_tokens, "messages": messages, "add_generation_prompt": add_generation_prompt}
            for piece in self._compiled[template].generate(variables, tools=tools, documents=None):
                pieces.append(piece)
                sandbox.written += len(piece)
                if sandbox.written > MAX_SIZE:
                    raise ValueError(f"it makes more than {MAX_SIZE:,} characters")
        except Exception as error:  # a template is foreign code and may raise anything
            line = f" (line {error.lineno})" if hasattr(error, "lineno") else ""
            reason = str(error).rstrip(".") or type(error).__name__
            raise UserError(
                f"{self.source}: the chat template failed{line}: {reason[:300]}. Choose another prompt style, for example chatml"
            ) from None
        return "".join(pieces), [sandbox.marks.get(id(message), -1) for message in messages]


def _with_reasoning(message: Message) -> Message:
    """Return a message whose reasoning has both names that templates read, as transformers 5 gives it to them."""
    reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _with_arguments(message: Message, kind: type) -> Message:
    """Return a message with the arguments of its tool calls as objects (`dict`) or as the JSON text of objects (`str`)."""
    if not message.get("tool_calls"):
        return message
    calls = copy.deepcopy(message["tool_calls"])
    for call in calls if isinstance(calls, list) else ():
        called = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(called, dict):
            continue
        arguments = called.get("arguments")
        with suppress(ValueError, RecursionError):
            if kind is str and isinstance(arguments, dict):
                called["arguments"] = json.dumps(arguments, ensure_ascii=False)
            elif kind is dict and isinstance(arguments, str) and isinstance(parsed := json.loads(arguments), dict):
                called["arguments"] = parsed
    return {**message, "tool_calls": calls}


# --- The style of a name, a model, a folder ---

WITH_MARKERS = ("chatml", "llama3", "gemma", "phi-3", "r1-base", "llama2")  # styles whose end of turn tells tokenizers apart


def _find(name: str) -> type[PromptStyle]:
    by_class = {style.__name__: style for style in STYLES.values()}
    wanted = name.removeprefix("litgpt.prompts.")
    if style := STYLES.get(wanted) or by_class.get(wanted):
        return style
    lower = {key.lower(): key for key in [*by_class, *STYLES, *CHAT]}
    near = difflib.get_close_matches(wanted.lower(), lower, n=1, cutoff=0.4)
    hint = f"did you mean {lower[near[0]]!r}? " if near else ""
    raise UserError(f"no prompt style is named {name!r}: {hint}There are {', '.join([CHAT[0], *sorted(STYLES)])}")


def resolve_prompt_style(
    name: str | PromptStyle | None, checkpoint_dir: str | Path, tokenizer: Tokenizer | None = None, fallback: str = "alpaca"
) -> PromptStyle:
    """Return the requested style, else the one that the checkpoint was trained with.

    Order: `name`; the folder's prompt_style.yaml; its chat template; the model's name in model_config.yaml; `fallback` ("alpaca" to
    tune a base model on instructions, "default" to let it continue a text). "chat" names the checkpoint's own template.
    """
    if isinstance(name, PromptStyle):
        return name
    folder = Path(checkpoint_dir)
    if name in CHAT:
        return _require_own_template(folder, tokenizer)
    if name is not None:
        return PromptStyle.from_name(name)
    if has_prompt_style(folder):
        return load_prompt_style(folder, tokenizer)
    if template := ChatTemplate.from_tokenizer(tokenizer or Tokenizer(folder), str(folder)):
        return template
    config = read_yaml(folder / "model_config.yaml") if (folder / "model_config.yaml").exists() else None
    style = families.prompt_style(str(config.get("name", ""))) if isinstance(config, dict) else None
    return PromptStyle.from_name(style or fallback)


def _require_own_template(folder: Path, tokenizer: Tokenizer | None) -> ChatTemplate:
    template = ChatTemplate.from_tokenizer(tokenizer or Tokenizer(folder), str(folder))
    if template is None:
        raise UserError(f"{folder} has no chat template (tokenizer_config.json or chat_template.jinja): choose a prompt style by name")
    return template


def misfit(style: PromptStyle, tokenizer: Tokenizer) -> str:
    """Return a remark if the tokenizer lacks the token that ends the style's replies, with a style that fits; "" if it fits."""
    marker = style.end_of_turn or style.marker
    if isinstance(style, ChatTemplate):
        try:
            text = style.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
        except UserError:
            return ""
        end = re.fullmatch(r"\s*(<[^<>\s]+>)\s*", text.rpartition("Hello")[2])
        marker = end[1] if end else ""
    if not marker or tokenizer.token_to_id(marker) is not None:
        return ""
    own = tokenizer.chat_template is not None and not isinstance(style, ChatTemplate)
    fits = CHAT[0] if own else fitting_style(tokenizer)
    return f"warning: the prompt style {style.name!r} needs {marker}, which is not a token of this tokenizer: {fits!r} fits it"


def fitting_style(tokenizer: Tokenizer) -> str:
    """Return the name of a built-in style whose marker the tokenizer has as a token; "alpaca" if there is none."""
    return next((name for name in WITH_MARKERS if tokenizer.token_to_id(STYLES[name].end_of_turn) is not None), "alpaca")


def reply_header(style: PromptStyle) -> str:
    """Return the text that the style writes between a prompt and its reply."""
    if isinstance(style, ChatTemplate):
        asked = [{"role": "user", "content": "?"}]
        before, after = style.render(asked), style.render(asked, add_generation_prompt=True)
        return after[len(before) :] if after.startswith(before) else ""
    marker = "0b2d5a7c"
    return style.apply(marker).rpartition(marker)[2]


class ReplyReader:
    """Divides a generated reply, whose text arrives in pieces, into reasoning and content.

    What the model's template writes around them is not part of them, nor are special tokens and white space at their ends. Pieces have
    the special tokens, which templates use as marks.
    """

    def __init__(self, style: PromptStyle, tokenizer: Tokenizer) -> None:
        self.before, self.between, self.alone = style.reply_marks if isinstance(style, ChatTemplate) else ("", "", "")
        self.has_marks = bool(self.between or self.alone)
        self.special = tokenizer.special_pattern
        self.part = "start" if self.has_marks else "content"
        self.held = ""  # may be the beginning of a mark
        self.space: str | None = None  # at the end of what was returned of a part; None: nothing was

    def push(self, piece: str, is_last: bool = False) -> tuple[str, str]:
        """Return the reasoning and the content that are complete with the next piece."""
        self.held += piece
        reasoning = ""
        if self.part == "start":
            text = self.held.lstrip()
            if self.between and text.startswith(self.before):
                self.part, self.held = "reasoning", text.removeprefix(self.before)
            elif not is_last and any(mark != text and mark.startswith(text) for mark in (self.before, self.alone)):
                return "", ""
            else:
                self.part, self.held = "content", text.removeprefix(self.alone)
        if self.part == "reasoning":
            text, found, rest = self.held.partition(self.between)
            if not found:  # its end may be the beginning of the mark
                nearest = max(0, len(text) - len(self.between))
                cut = next(n for n in range(nearest, len(text) + 1) if self.between.startswith(text[n:]))
                self.held = text[cut:]
                return self._text(text[:cut]), ""
            reasoning, self.held = self._text(text), rest
            self.part, self.space = "content", None
        content, self.held = self._text(self.held), ""
        return reasoning, content

    def _text(self, text: str) -> str:
        """Return more of a part, without special tokens; white space at its end waits."""
        text = (self.space or "") + self.special.sub("", text)
        text = text.lstrip() if self.space is None else text
        shown = text.rstrip()
        if shown or self.space is not None:
            self.space = text[len(shown) :]
        return shown


def read_reply(text: str, style: PromptStyle, tokenizer: Tokenizer) -> Message:
    """Return a generated reply, with its special tokens, as a message (`ReplyReader`)."""
    return reply_message(*ReplyReader(style, tokenizer).push(text, is_last=True))


def reply_message(reasoning: str, content: str) -> Message:
    return {"role": "assistant", **({"reasoning_content": reasoning} if reasoning else {}), "content": content}


def model_name_to_prompt_style(model_name: str) -> PromptStyle:
    """Return the style that a named model was trained with; `Default` for base models."""
    return STYLES[families.prompt_style(model_name) or "default"]()


def has_prompt_style(checkpoint_dir: str | Path) -> bool:
    """Return True if the folder has a prompt_style.yaml."""
    return os.path.lexists(Path(checkpoint_dir) / PROMPT_STYLE_FILE)


def save_prompt_style(style: PromptStyle | str, checkpoint_dir: str | Path) -> None:
    """Write prompt_style.yaml, but not for the checkpoint's own template: tokenizer files hold that, and LitGPT has no such style."""
    style = PromptStyle.from_name(style) if isinstance(style, str) else style
    kind = type(style)
    if kind is ChatTemplate:
        return
    if kind.__module__ != __name__:
        raise UserError(f"prompt style {kind.__module__}.{kind.__qualname__} cannot be saved: only those of litgpt.prompts can")
    content: dict[str, Any] = {"class_path": f"litgpt.prompts.{kind.__name__}"}
    if isinstance(style, TurnStyle) and style.system != type(style).system:
        content["init_args"] = {"system_message": style.system}
    write_text(Path(checkpoint_dir) / PROMPT_STYLE_FILE, dump_yaml(content, allow_unicode=True))


def copy_prompt_style(source: Path, folder: Path) -> None:
    """Copy prompt_style.yaml if there is one. Raises UserError if it is a link out of its folder, or names no style."""
    file = source / PROMPT_STYLE_FILE
    if (raw := read_own(source, PROMPT_STYLE_FILE)) is not None:
        style = _require_class_path(parse_yaml(decode_text(raw, file), str(file)), file)
        kept = {key: style[key] for key in ("class_path", "init_args") if key in style}
        write_text(folder / PROMPT_STYLE_FILE, dump_yaml(kept, allow_unicode=True))


def _require_class_path(content: Any, file: Path) -> dict[str, Any]:
    if not isinstance(content, dict) or not isinstance(content.get("class_path"), str):
        raise UserError(f"{file}: expected `class_path: litgpt.prompts.NAME`")
    return content


def load_prompt_style(checkpoint_dir: str | Path, tokenizer: Tokenizer | None = None) -> PromptStyle:
    """Load prompt_style.yaml: `class_path: litgpt.prompts.X` and optionally `init_args`. No other module is looked up."""
    file = Path(checkpoint_dir) / PROMPT_STYLE_FILE
    content = _require_class_path(read_yaml(file, "does not exist: name a prompt style"), file)
    class_path, arguments = content["class_path"], content.get("init_args") or {}
    if class_path == "litgpt.prompts.ChatTemplate":
        return _require_own_template(Path(checkpoint_dir), tokenizer)
    try:
        style = _find(class_path)(**arguments)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except TypeError as error:
        raise UserError(f"{file}: init_args {str(arguments)[:100]} do not fit {class_path}: {error}") from None
    if not all(isinstance(value, str) for value in arguments.values()):
        raise UserError(f"{file}: init_args are {str(arguments)[:100]}, strings are needed, such as `system_message: Be brief.`")
    return style
