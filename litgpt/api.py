"""`litgpt.LLM`: a checkpoint, ready to answer."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Literal, overload

import torch

from litgpt import checkpoint
from litgpt.config import Config
from litgpt.convert.resolve import open_checkpoint
from litgpt.device import backbone_dtype, default_device, default_precision
from litgpt.errors import UserError
from litgpt.generate import engine
from litgpt.model import GPT
from litgpt.prompts import PROMPT_STYLE_FILE, PromptStyle, resolve_prompt_style
from litgpt.tokenizer import Tokenizer


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
        """Open a checkpoint: a base model, a merged one, or an adapter (LoRA or Skip2-LoRA), whose base is found through it. Hugging Face
        folders and GGUF files are converted on first use (`litgpt.convert.resolve`).

        `precision`: bf16-true where the device has it, else 32-true, unless given. `device`: the first GPU, or the CPU. `quantize`: a mode
        of `litgpt.quantize`. Raises UserError for folders that cannot be opened.
        """
        folder = open_checkpoint(model)
        target = torch.device(device) if device is not None else default_device()
        loaded = checkpoint.load_model(folder, inference_dtype(precision or default_precision(target)), target, quantize=quantize)
        home = folder
        if checkpoint.is_adapter_folder(folder) and not (folder / "tokenizer.json").is_file():
            home, _ = checkpoint.adapter_settings(folder)
        tokenizer = Tokenizer(home)
        styled = folder if (folder / PROMPT_STYLE_FILE).is_file() else home
        return cls(loaded, tokenizer, resolve_prompt_style(None, styled, tokenizer, fallback="default"))

    @property
    def config(self) -> Config:
        return self.model.config

    @overload
    def generate(
        self,
        prompt: str,
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
        prompt: str,
        sys_prompt: str | None = ...,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_k: int | None = ...,
        top_p: float = ...,
        return_as_token_ids: bool = ...,
        stream: bool = ...,
        seed: int | None = ...,
    ) -> str | torch.Tensor | Iterator[str] | Iterator[int]: ...

    def generate(
        self,
        prompt: str,
        sys_prompt: str | None = None,
        max_new_tokens: int = 50,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        return_as_token_ids: bool = False,
        stream: bool = False,
        seed: int | None = None,
    ) -> str | torch.Tensor | Iterator[str] | Iterator[int]:
        """The model's answer to `prompt`, in the checkpoint's prompt style; the prompt itself is not repeated.

        Text, or ids (N,) with `return_as_token_ids`; with `stream` an iterator of the text's pieces, or of the ids. `sys_prompt` replaces
        the style's system text. `temperature` 0 is greedy; see `engine.sample` for `top_k` and `top_p`. With a `seed` the answer repeats.
        """
        text = self.prompt_style.apply(prompt, sys_prompt=sys_prompt)
        ids = self.complete(text, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, generator=self.generator(seed))
        if stream:
            return ids if return_as_token_ids else self.tokenizer.decode_stream(ids)
        answer = list(ids)
        return torch.tensor(answer, dtype=torch.long) if return_as_token_ids else self.tokenizer.decode(answer)

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
        """The ids that follow `text`, which is in the prompt style already, up to where the style or the tokenizer ends an answer."""
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}: at least 1 is needed")
        ids = self.tokenizer.encode(text)
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
        """A source of random numbers on the model's device; None, torch's own, without a seed."""
        if seed is None:
            return None
        return torch.Generator(next(self.model.parameters()).device).manual_seed(seed)


def inference_dtype(precision: str) -> torch.dtype:
    """The dtype to answer in: a "-mixed" precision keeps fp32 weights for the optimizer's sake, and there is none here.

    Raises UserError for an unknown precision.
    """
    backbone_dtype(precision)
    return {"bf16": torch.bfloat16, "16": torch.float16, "32": torch.float32}[precision.partition("-")[0]]
