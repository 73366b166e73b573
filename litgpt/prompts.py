"""Prompt styles: how a question becomes the text that a model reads, and at which token its reply ends.

Two kinds of built-in style, both plain data: `PlainStyle` is one text with holes; `TurnStyle` is a text for each role and can hold a
conversation. `ChatTemplate` is the third: the checkpoint's own jinja template, rendered in a sandbox with bounds.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from litgpt.atomic import write_text
from litgpt.errors import UserError
from litgpt.files import read_yaml

if TYPE_CHECKING:
    from jinja2 import Template

    from litgpt.config import Config
    from litgpt.tokenizer import Tokenizer

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": ...}`"""

PROMPT_STYLE_FILE = "prompt_style.yaml"
CHAT = ("chat", "chat_template")
"""The names that mean the checkpoint's own template."""

MAX_TEMPLATE = 100_000
"""Characters of a chat template."""


class PromptStyle:
    """Turns a question into prompt text. A style of your own overrides `apply`; it may set `gap` and `end_of_turn`."""

    name: ClassVar[str] = ""
    gap: ClassVar[str] = ""
    """Stands between prompt and reply; the model learns to write it, so it is not part of the prompt."""
    end_of_turn: ClassVar[str] = ""
    """The token that ends a reply, "" for the tokenizer's EOS."""

    def apply(self, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        """The prompt text up to where the reply starts. `sys_prompt` replaces the style's system text; `input` joins the prompt."""
        raise NotImplementedError

    def stop_tokens(self, tokenizer: Tokenizer) -> tuple[list[int], ...]:
        """Sequences of ids at which generation ends: the tokenizer's stop ids and the style's own end of turn."""
        ids = set(tokenizer.stop_ids)
        if self.end_of_turn:
            marker = tokenizer.token_to_id(self.end_of_turn)
            if marker is not None:
                ids.add(marker)
        return tuple([i] for i in sorted(ids))

    @classmethod
    def from_name(cls, name: str) -> PromptStyle:
        """The style of that name ("alpaca") or class ("Alpaca", "litgpt.prompts.Alpaca"); UserError with the nearest name."""
        return _find(name)()

    @classmethod
    def from_config(cls, config: Config) -> PromptStyle:
        """The style that a model of that name was trained with; `Default` for base models."""
        style = _by_model_name(config.name)
        return style() if style else Default()


def _with_input(prompt: str, extra: dict[str, str]) -> str:
    return f"{prompt}\n\n{extra['input']}" if extra.get("input") else prompt


class PlainStyle(PromptStyle):
    """One text with the holes {system}, {prompt} and, where `text_with_input` is given, {input}."""

    text: ClassVar[str] = "{prompt}"
    text_with_input: ClassVar[str] = ""
    system: ClassVar[str] = ""
    system_with_input: ClassVar[str] = ""

    def apply(self, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        text, system = self.text, self.system
        if self.text_with_input and kwargs.get("input"):
            text, system = self.text_with_input, self.system_with_input
        elif not self.text_with_input:
            prompt = _with_input(prompt, kwargs)
        values = {"system": system if sys_prompt is None else sys_prompt, "prompt": prompt, "input": kwargs.get("input", "")}
        return re.sub(r"\{(system|prompt|input)\}", lambda hole: values[hole[1]], text)


class TurnStyle(PromptStyle):
    """A text for each role; conversations are the turns in a row.

    text = start + turn + turn + ...       the system text is a turn of its own, or the head of the first user's content
    """

    start: ClassVar[str] = ""
    system: str = ""
    system_turn: ClassVar[str] = ""
    user_turn: ClassVar[str] = ""
    reply_head: ClassVar[str] = ""
    """What the prompt ends with when the model is to speak."""
    between: ClassVar[str] = ""
    """Stands between a reply's end of turn and the next turn."""
    system_in_user: ClassVar[bool] = False
    default_system: ClassVar[str] = ""

    def __init__(self) -> None:
        self.system = self.default_system

    def apply(self, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        messages = [{"role": "user", "content": _with_input(prompt, kwargs)}]
        if sys_prompt is not None:
            messages.insert(0, {"role": "system", "content": sys_prompt})
        return self.render(messages, add_generation_prompt=True)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as text; without a system message the style's own is used, an empty one leaves it out."""
        turns, system = list(messages), self.system
        if turns and turns[0]["role"] == "system":
            system = turns.pop(0)["content"]
        system_text = self.system_turn.replace("{}", system) if system else ""
        parts = [self.start] if self.system_in_user else [self.start, system_text]
        head = system_text if self.system_in_user else ""
        between = ""
        for turn in turns:
            parts.append(between)
            between = ""
            if turn["role"] == "user":
                parts.append(self.user_turn.replace("{}", head + turn["content"]))
                head = ""
            elif turn["role"] == "assistant":
                parts += (self.reply_head, self.gap, turn["content"], self.end_of_turn)
                between = self.between
            else:
                raise UserError(f"prompt style {self.name}: a conversation holds at most one system message, at its start")
        if add_generation_prompt:
            parts += (between, self.reply_head)
        return "".join(parts)


# --- The styles. Sources: the model cards and reference code of the models; Alpaca: Stanford Alpaca's two texts. ---

_TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_TASK_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


class Default(PlainStyle):
    """The prompt and nothing else: for base models (Pythia, Llama and so on) that continue a text."""

    name = "default"


class Alpaca(PlainStyle):
    name = "alpaca"
    system = _TASK
    system_with_input = _TASK_WITH_INPUT
    text = "{system}\n\n### Instruction:\n{prompt}\n\n### Response:\n"
    text_with_input = "{system}\n\n### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:\n"


class FLAN(PlainStyle):
    name = "flan"
    system = _TASK
    text = "{system}\n\n### Instruction:\n{prompt}\n\n### Response:\n"


class Longform(PlainStyle):
    name = "longform"
    system = _TASK_WITH_INPUT
    text = "{system}\n\n### Instruction:\n{prompt}\n\n### Response:\n"


class TogetherComputerChat(PlainStyle):
    name = "togethercomputer-chat"
    text = "<human>: {prompt}\n<bot>:"
    gap = " "


class TogetherComputerInstruct(PlainStyle):
    name = "togethercomputer-instruct"
    text = "Q: {prompt}\nA:"
    gap = " "


class Vicuna(PlainStyle):
    name = "vicuna"
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    text = "{system} USER: {prompt} ASSISTANT:"
    gap = " "


class Platypus(PlainStyle):
    name = "platypus"
    text = "### Instruction:\n\n{prompt}\n\n### Response:\n"


class NousResearch(PlainStyle):
    name = "nous-research"
    text = "### Instruction:\n{prompt}\n\n### Response:\n"


class H2Oai(PlainStyle):
    name = "h2oai"
    text = "<|prompt|>{prompt}</s><|answer|>"


class Phi1(PlainStyle):
    name = "phi-1"
    text = "{prompt}\n\nAnswer:"
    gap = " "


class Phi2(PlainStyle):
    name = "phi-2"
    text = "Instruct: {prompt}\nOutput:"
    gap = " "


class Llama2(TurnStyle):
    name = "llama2"
    default_system = (
        "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your answers "
        "should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure that your "
        "responses are socially unbiased and positive in nature.\n\nIf a question does not make any sense, or is not factually coherent, "
        "explain why instead of answering something not correct. If you don't know the answer to a question, please don't share false "
        "information."
    )
    system_turn = "<<SYS>>\n{}\n<</SYS>>\n\n"
    system_in_user = True
    user_turn = "[INST] {} [/INST]"
    gap = " "
    end_of_turn = "</s>"
    between = "<s>"


class CodeLlama(Llama2):
    name = "codellama"
    default_system = ""


class Mistral(TurnStyle):
    name = "mistral"
    start = "<s>"
    system_turn = "{}\n\n"
    system_in_user = True
    user_turn = "[INST] {} [/INST]"
    gap = " "
    end_of_turn = "</s>"


class Llama3(TurnStyle):
    name = "llama3"
    default_system = "You are a helpful assistant."
    start = "<|begin_of_text|>"
    system_turn = "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>"
    user_turn = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    reply_head = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    end_of_turn = "<|eot_id|>"


class TinyLlama(TurnStyle):
    name = "tinyllama"
    default_system = "You are a friendly chatbot who always gives helpful, detailed, and polite answers."
    system_turn = "<|system|>\n{}</s>\n"
    user_turn = "<|user|>\n{}</s>\n"
    reply_head = "<|assistant|>\n"
    end_of_turn = "</s>"
    between = "\n"


class StableLMAlpha(TurnStyle):
    name = "stablelm-alpha"
    default_system = (
        "# StableLM Tuned (Alpha version)\n"
        "- StableLM is a helpful and harmless open-source AI language model developed by StabilityAI.\n"
        "- StableLM is excited to be able to help the user, but will refuse to do anything that could be considered harmful to the user.\n"
        "- StableLM is more than just an information source, StableLM is also able to write poetry, short stories, and make jokes.\n"
        "- StableLM will refuse to participate in anything that could harm a human.\n"
    )
    system_turn = "<|SYSTEM|>{}"
    user_turn = "<|USER|>{}"
    reply_head = "<|ASSISTANT|>"


class StableLMZephyr(TurnStyle):
    name = "stablelm-zephyr"
    system_turn = "<|system|>\n{}<|endoftext|>\n"
    user_turn = "<|user|>\n{}<|endoftext|>\n"
    reply_head = "<|assistant|>\n"
    end_of_turn = "<|endoftext|>"
    between = "\n"


class Phi3(TurnStyle):
    name = "phi-3"
    default_system = "You are a helpful assistant."
    system_turn = "<|system|>\n{}<|end|>\n"
    user_turn = "<|user|>\n{}<|end|>\n"
    reply_head = "<|assistant|>\n"
    end_of_turn = "<|end|>"
    between = "\n"


class Gemma(TurnStyle):
    name = "gemma"
    system_turn = "{}\n\n"
    system_in_user = True
    user_turn = "<start_of_turn>user\n{}<end_of_turn>\n"
    reply_head = "<start_of_turn>model\n"
    end_of_turn = "<end_of_turn>"
    between = "\n"


class OLMo(TurnStyle):
    name = "olmo"
    start = "<|endoftext|>"
    system_turn = "<|system|>\n{}\n"
    user_turn = "<|user|>\n{}\n"
    reply_head = "<|assistant|>\n"
    end_of_turn = "<|endoftext|>"
    between = "\n"


class R1Base(TurnStyle):
    name = "r1-base"
    start = "<｜begin▁of▁sentence｜>"
    system_turn = "{}"
    user_turn = "<｜User｜>{}"
    reply_head = "<｜Assistant｜>"
    end_of_turn = "<｜end▁of▁sentence｜>"


class ChatML(TurnStyle):
    name = "chatml"
    system_turn = "<|im_start|>system\n{}<|im_end|>\n"
    user_turn = "<|im_start|>user\n{}<|im_end|>\n"
    reply_head = "<|im_start|>assistant\n"
    end_of_turn = "<|im_end|>"
    between = "\n"

    def __init__(self, system_message: str | None = None) -> None:
        self.system = self.default_system if system_message is None else system_message


class SmolLM2(ChatML):
    name = "smollm2"
    default_system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class Qwen2_5(ChatML):
    name = "qwen2.5"
    default_system = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


class Qwen2_5_Math(ChatML):
    name = "qwen2.5-math"
    default_system = "Please reason step by step, and put your final answer within \\boxed{}."


class QwQ(ChatML):
    name = "qwq"
    default_system = "You are a helpful and harmless assistant. You are Qwen developed by Alibaba. You should think step-by-step."


class Qwen3(ChatML):
    name = "qwen3"


# --- The checkpoint's own template ---


class ChatTemplate(PromptStyle):
    """A checkpoint's own chat template (jinja2), in a sandbox.

    Args:
        template: the jinja source.
        bos_token, eos_token: what the template may print under these names.
        source: where it came from, for messages.
    """

    name = "chat"

    def __init__(self, template: str, bos_token: str = "", eos_token: str = "", source: str = "") -> None:
        self.template, self.bos_token, self.eos_token = template, bos_token, eos_token
        self.source = source or "the chat template"
        if len(template) > MAX_TEMPLATE:
            raise UserError(f"{self.source}: the chat template has {len(template):,} characters, at most {MAX_TEMPLATE:,} are read")
        # One date for the life of the object: a run that crosses midnight must not change its prompts.
        self._now = datetime.now()
        self._compiled: Template | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, source: str = "") -> ChatTemplate | None:
        """The template that the tokenizer's files carry, None if there is none."""
        if tokenizer.chat_template is None:
            return None
        tokens = tokenizer.special_tokens
        return cls(tokenizer.chat_template, tokens.get("bos_token", ""), tokens.get("eos_token", ""), source)

    def apply(self, prompt: str, *, sys_prompt: str | None = None, **kwargs: str) -> str:
        messages = [{"role": "user", "content": _with_input(prompt, kwargs)}]
        if sys_prompt is not None:
            messages.insert(0, {"role": "system", "content": sys_prompt})
        return self.render(messages, add_generation_prompt=True)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as text. UserError if the template refuses it, is broken, or exceeds the bounds."""
        pieces, length = [], 0
        try:
            from litgpt.templates import MAX_SIZE, Sandbox

            if self._compiled is None:
                self._compiled = Sandbox(self._now).from_string(self.template)
            self._compiled.environment.start()  # type: ignore[attr-defined]
            for piece in self._compiled.generate(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                tools=None,
                documents=None,
            ):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_SIZE:
                    raise ValueError(f"it makes more than {MAX_SIZE:,} characters")
        except Exception as error:  # a template is foreign code: whatever it raises is its problem
            line = f" (line {error.lineno})" if hasattr(error, "lineno") else ""
            reason = str(error).rstrip(".") or type(error).__name__
            raise UserError(
                f"{self.source}: the chat template failed{line}: {reason[:300]}. Choose another prompt style, for example chatml"
            ) from None
        return "".join(pieces)


# --- Which style ---


def _styles(kind: type[PromptStyle] = PromptStyle) -> Iterator[type[PromptStyle]]:
    for style in kind.__subclasses__():
        if style.__module__ == __name__:
            if style.name and style is not ChatTemplate:
                yield style
            yield from _styles(style)


def _find(name: str) -> type[PromptStyle]:
    by_name = {style.name: style for style in _styles()}
    by_class = {style.__name__: style for style in by_name.values()}
    wanted = name.removeprefix("litgpt.prompts.")
    style = by_name.get(wanted) or by_class.get(wanted)
    if style:
        return style
    lower = {key.lower(): key for key in [*by_class, *by_name, *CHAT]}
    near = difflib.get_close_matches(wanted.lower(), lower, n=1, cutoff=0.4)
    hint = f"did you mean {lower[near[0]]!r}? " if near else ""
    raise UserError(f"no prompt style is named {name!r}: {hint}There are {', '.join([CHAT[0], *sorted(by_name)])}")


_MODEL_NAMES: tuple[tuple[str, type[PromptStyle]], ...] = (
    (r"smollm2.*instruct", SmolLM2),
    (r"tiny-?llama.*chat", TinyLlama),
    (r"code-?llama.*instruct", CodeLlama),
    (r"llama-?3.*instruct", Llama3),
    (r"llama-?2.*chat", Llama2),
    (r"mi[sx]tral.*instruct", Mistral),
    (r"stablelm-(tuned|alpha).*alpha", StableLMAlpha),
    (r"stablelm.*zephyr|stable-code.*instruct", StableLMZephyr),
    (r"redpajama.*chat", TogetherComputerChat),
    (r"redpajama.*instruct", TogetherComputerInstruct),
    (r"vicuna|longchat", Vicuna),
    (r"platypus", Platypus),
    (r"nous-hermes", NousResearch),
    (r"danube.*chat", H2Oai),
    (r"phi-1", Phi1),
    (r"phi-2", Phi2),
    (r"phi-3", Phi3),
    (r"gemma.*-it", Gemma),
    (r"olmo.*instruct", OLMo),
    (r"r1-distill", R1Base),
    (r"qwen2\.5-math.*instruct", Qwen2_5_Math),
    (r"qwen2\.5.*instruct", Qwen2_5),
    (r"qwq", QwQ),
    (r"qwen3(?!.*base)", Qwen3),
)


def _by_model_name(name: str) -> type[PromptStyle] | None:
    return next((style for pattern, style in _MODEL_NAMES if re.search(pattern, name, re.IGNORECASE)), None)


def resolve_prompt_style(
    name: str | None, checkpoint_dir: str | Path, tokenizer: Tokenizer | None = None, fallback: str = "alpaca"
) -> PromptStyle:
    """The style that is asked for, else the one the checkpoint was made for.

    Order: `name`; the folder's prompt_style.yaml; its chat template; the model's name in model_config.yaml; `fallback` ("alpaca" to
    tune a base model on instructions, "default" to let it continue a text). "chat" names the checkpoint's own template.
    """
    folder = Path(checkpoint_dir)
    if name in CHAT:
        return _require_own_template(folder, tokenizer)
    if name is not None:
        return PromptStyle.from_name(name)
    if (folder / PROMPT_STYLE_FILE).exists():
        return load_prompt_style(folder, tokenizer)
    template = _own_template(folder, tokenizer)
    if template is not None:
        return template
    style = None
    if (folder / "model_config.yaml").exists():
        config = read_yaml(folder / "model_config.yaml")
        if isinstance(config, dict):
            style = _by_model_name(str(config.get("name", "")))
    return style() if style else PromptStyle.from_name(fallback)


def _own_template(folder: Path, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    from litgpt.tokenizer import Tokenizer

    return ChatTemplate.from_tokenizer(tokenizer or Tokenizer(folder), source=str(folder))


def _require_own_template(folder: Path, tokenizer: Tokenizer | None) -> ChatTemplate:
    template = _own_template(folder, tokenizer)
    if template is None:
        raise UserError(f"{folder} has no chat template (tokenizer_config.json or chat_template.jinja): choose a prompt style by name")
    return template


def save_prompt_style(style: PromptStyle, folder: str | Path) -> None:
    """Write prompt_style.yaml. A chat template is not copied into it: it is read again from the folder's tokenizer files."""
    kind = type(style)
    if kind.__module__ != __name__:
        raise UserError(f"prompt style {kind.__module__}.{kind.__qualname__} cannot be saved: only those of litgpt.prompts can")
    content: dict[str, Any] = {"class_path": f"litgpt.prompts.{kind.__name__}"}
    if isinstance(style, ChatML) and style.system != style.default_system:
        content["init_args"] = {"system_message": style.system}
    write_text(Path(folder) / PROMPT_STYLE_FILE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def load_prompt_style(folder: str | Path, tokenizer: Tokenizer | None = None) -> PromptStyle:
    """The style in prompt_style.yaml: `class_path: litgpt.prompts.X` and perhaps `init_args`. Nothing but litgpt.prompts is looked up."""
    file = Path(folder) / PROMPT_STYLE_FILE
    content = read_yaml(file, "does not exist: name a prompt style")
    if not isinstance(content, dict) or not isinstance(content.get("class_path"), str):
        raise UserError(f"{file}: expected `class_path: litgpt.prompts.NAME`")
    class_path, arguments = content["class_path"], content.get("init_args") or {}
    if class_path == "litgpt.prompts.ChatTemplate":
        return _require_own_template(Path(folder), tokenizer)
    try:
        style = _find(class_path)(**arguments)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except TypeError as error:
        raise UserError(f"{file}: init_args {str(arguments)[:100]} do not fit {class_path}: {error}") from None
    if not all(isinstance(value, str) for value in arguments.values()):
        raise UserError(f"{file}: init_args are {str(arguments)[:100]}, texts are needed, such as `system_message: Be brief.`")
    return style
