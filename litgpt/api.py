"""`litgpt.LLM`: load a checkpoint and generate text from Python."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Literal, overload

import torch

from litgpt import checkpoint
from litgpt.args import require_seed
from litgpt.config import Config
from litgpt.convert.resolve import open_checkpoint
from litgpt.device import backbone_dtype, default_precision, find_device
from litgpt.errors import UserError
from litgpt.generate import engine
from litgpt.model import GPT
from litgpt.prompts import PROMPT_STYLE_FILE, ChatStyle, Message, PromptStyle, resolve_prompt_style
from litgpt.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool", "developer")


class LLM:
    """A model with its tokenizer and prompt style.

    llm = LLM.load("out/finetune/skip2lora/final")
    print(llm.generate("What does math.sqrt do?"))
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, prompt_style: PromptStyle) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.prompt_style = prompt_style

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        precision: str | None = None,
        device: torch.device | str | None = None,
        quantize: str | None = None,
    ) -> LLM:
        """Load a base model, a merged model, or an adapter (LoRA or Skip2-LoRA) with its base. Hugging Face folders and GGUF files are
        converted on first use (`litgpt.convert.resolve`).

        The default `precision` is bf16-true where the device computes it natively, else 32-true; the default `device` is the first GPU, or
        the CPU. `quantize` is a mode of `litgpt.quantize`. Raises UserError for a folder that cannot be loaded.
        """
        folder = open_checkpoint(model)
        target = find_device(device)
        gpt = checkpoint.load_model(folder, inference_dtype(precision or default_precision(target)), target, quantize=quantize)
        tokenizer_dir = folder
        if checkpoint.is_adapter_folder(folder) and not (folder / "tokenizer.json").is_file():
            tokenizer_dir, _ = checkpoint.adapter_settings(folder)
        tokenizer = Tokenizer(tokenizer_dir)
        style_dir = folder if (folder / PROMPT_STYLE_FILE).is_file() else tokenizer_dir
        return cls(gpt, tokenizer, resolve_prompt_style(None, style_dir, tokenizer, fallback="default"))

    @property
    def config(self) -> Config:
        return self.model.config

    @overload
    def generate(
        self,
        prompt: str | list[Message],
        sys_prompt: str | None = ...,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float = ...,
        return_as_token_ids: Literal[False] = ...,
        stream: Literal[False] = ...,
        seed: int | None = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: str | list[Message] | list[str] | list[list[Message]],
        sys_prompt: str | None = ...,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float = ...,
        return_as_token_ids: bool = ...,
        stream: bool = ...,
        seed: int | None = ...,
    ) -> str | torch.Tensor | Iterator[str] | Iterator[int] | list[Any]: ...

    def generate(
        self,
        prompt: str | list[Message] | list[str] | list[list[Message]],
        sys_prompt: str | None = None,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        return_as_token_ids: bool = False,
        stream: bool = False,
        seed: int | None = None,
    ) -> str | torch.Tensor | Iterator[str] | Iterator[int] | list[Any]:
        """Return the answer to `prompt` in the checkpoint's prompt style, without the prompt.

        `prompt` is a question, or a conversation: a list of messages with `role` and `content`. A list of either is answered one by one,
        each as if it were alone, and the answers are a list.
        The answer is text, or ids (N,) with `return_as_token_ids`; with `stream` an iterator of pieces of text, or of ids. `sys_prompt`
        replaces the style's system text. `temperature` 0 is greedy decoding; `engine.sample` explains `top_k` and `top_p`. The same `seed`
        gives the same answer.
        """
        prompts: Any = prompt
        if isinstance(prompts, list | tuple) and not (prompts and isinstance(prompts[0], dict)):
            if stream:
                raise UserError(f"stream answers one prompt at a time, and the list has {len(prompts)}: call generate for each")
            settings = (sys_prompt, max_new_tokens, temperature, top_k, top_p, return_as_token_ids)
            return [self.generate(one, *settings, seed=seed) for one in prompts]
        text = self._rendered(prompt, sys_prompt)
        ids = self.complete(text, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, generator=self.generator(seed))
        if stream:
            return ids if return_as_token_ids else self.tokenizer.decode_stream(ids)
        answer = list(ids)
        return torch.tensor(answer, dtype=torch.long) if return_as_token_ids else self.tokenizer.decode(answer)

    def _rendered(self, prompt: Any, sys_prompt: str | None) -> str:
        """Return a question or a conversation in the prompt style. Raises UserError if it is neither."""
        if isinstance(prompt, str):
            return self.prompt_style.apply(prompt, sys_prompt=sys_prompt)
        for message in prompt if isinstance(prompt, list) else [prompt]:
            if not isinstance(message, dict) or message.get("role") not in ROLES or not isinstance(message.get("content"), str):
                forms = "a text, or a list of messages such as {'role': 'user', 'content': 'Hello'}"
                raise UserError(f"prompt: {repr(message)[:200]} is not understood: give {forms} (roles: {', '.join(ROLES)})")
        if not isinstance(self.prompt_style, ChatStyle):
            raise UserError(
                f"prompt style {self.prompt_style.name!r} has no turns, and a conversation is given: give the question as a text"
            )
        system = [] if sys_prompt is None else [{"role": "system", "content": sys_prompt}]
        turns = prompt[1:] if system and prompt[0]["role"] == "system" else prompt
        return self.prompt_style.render([*system, *turns], add_generation_prompt=True)

    def complete(
        self,
        text: str,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Generator[int, None, None]:
        """Yield the ids that follow `text`, which is in the prompt style already, until a stop token of the style or the tokenizer."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}: at least 1 is needed")
        ids = self.tokenizer.encode(text, bos=self.prompt_style.bos)
        return engine.generate(
            self.model,
            ids,
            len(ids) + max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=self.prompt_style.stop_tokens(self.tokenizer),
            generator=generator,
        )

    def generator(self, seed: int | None) -> torch.Generator | None:
        """Return a seeded random generator on the model's device, or None for torch's own."""
        if seed is None:
            return None
        require_seed(seed)
        return torch.Generator(next(self.model.parameters()).device).manual_seed(seed)


def inference_dtype(precision: str) -> torch.dtype:
    """Return the dtype of inference. "-mixed" precisions keep fp32 weights for the optimizer only, so theirs is the half precision.

    Raises UserError for an unknown precision.
    """
    backbone_dtype(precision)
    return {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32}[precision.partition("-")[0]]
