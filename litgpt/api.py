"""`litgpt.LLM`: load a checkpoint and generate text from Python; a torch module that can be trained and saved, as LitGPT has it."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, SupportsIndex, overload

import torch
from torch import nn

from litgpt import checkpoint
from litgpt.adapters.base import adapter_parameters
from litgpt.args import require_seed
from litgpt.atomic import new_folder, read_manifest
from litgpt.config import Config
from litgpt.convert.resolve import open_checkpoint
from litgpt.device import MIXED, backbone_dtype, default_precision, find_device
from litgpt.download import fetch_named
from litgpt.errors import UserError
from litgpt.files import expand_path, json_if_there
from litgpt.generate import divide
from litgpt.generate.engine import Session, generate_batch
from litgpt.generate.sampling import Sampling, until_stop_text
from litgpt.logs import peak_memory_gb
from litgpt.lora import Config as LoRAConfig
from litgpt.loss import chunked_cross_entropy
from litgpt.model import GPT
from litgpt.pretrain import fresh
from litgpt.prompts import ChatStyle, Message, PromptStyle, has_prompt_style, resolve_prompt_style, save_prompt_style
from litgpt.quantize import is_quantised
from litgpt.sharding import on_cpu
from litgpt.text import first_line
from litgpt.tokenizer import Tokenizer
from litgpt.values import checked

Strategy = Literal["sequential", "tensor_parallel"]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 1.0}  # defaults, as in `litgpt chat`, where the checkpoint has none
MORE = ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
IGNORED = {  # settings of generation_config.json that transformers follows and we do not, with the values that have no effect
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "exponential_decay_length_penalty")),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "stop_strings"), None),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens", "epsilon_cutoff", "eta_cutoff"), 0),
    **dict.fromkeys(("num_beams", "typical_p"), 1),
}
ROLES = ("system", "user", "assistant", "tool", "developer")


class Preprocessor(NamedTuple):
    """A tokenizer whose tensors are on the model's device."""

    tokenizer: Tokenizer
    device: torch.device

    def encode(self, text: str) -> torch.Tensor:
        return self.tokenizer.encode(text, device=self.device)

    def decode(self, token_ids: torch.Tensor) -> str:
        return self.tokenizer.decode(token_ids)


class LLM(nn.Module):
    """A model with its tokenizer and prompt style, as a module whose weights are the model's own.

    llm = LLM.load("out/finetune/skip2lora/final")
    print(llm.generate("What does math.sqrt do?"))
    """

    generate_strategy: Strategy | None = None  # how the model is divided among several devices

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        prompt_style: PromptStyle,
        sampling: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        base: Path | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.sampling = {**SAMPLING, **(sampling or {})}  # the defaults of `generate`
        self.tokenizer = tokenizer
        self.prompt_style = prompt_style
        self.checkpoint_dir = folder  # of the checkpoint or adapter; None: random weights
        self.base = base  # an adapter's base, if not the one that its folder names

    @classmethod
    @checked
    def load(
        cls,
        model: str | Path,
        init: Literal["pretrained", "random"] | None = "pretrained",
        tokenizer_dir: str | Path | None = None,
        access_token: str | None = None,
        distribute: Literal["auto"] | None = "auto",
        *,
        precision: str | None = None,
        device: torch.device | str | None = None,
        quantize: str | None = None,
        base: str | Path | None = None,
    ) -> LLM:
        """Load a base model, a merged model, or an adapter (LoRA or Skip2-LoRA) with its base. Hugging Face folders and GGUF files are
        converted on first use (`litgpt.convert.resolve`), and a name on the hub that is not on this machine is downloaded.

        `init` "random" makes fresh weights of a named model, with the tokenizer of `tokenizer_dir`. `distribute` None leaves the model on
        the CPU, for `distribute` or `trainer_setup` to move.

        The default `precision` is bf16-true where the device computes it natively, else 32-true; the default `device` is the first GPU, or
        the CPU. `quantize` is a mode of `litgpt.quantize`; `base` an adapter's base, if not the one that its folder names. Raises
        UserError for a folder that cannot be loaded.
        """
        target = find_device("cpu" if distribute is None else device)
        if init == "random":
            if tokenizer_dir is None:
                raise UserError("tokenizer_dir is missing: name a folder with tokenizer.json")
            tokenizer, config = Tokenizer(open_checkpoint(tokenizer_dir)), LoRAConfig.from_name(str(model))
            random = fresh(config, torch.initial_seed() % 2**32).to(inference_dtype(precision or default_precision(target)))
            return cls(random.to(target).eval(), tokenizer, PromptStyle.from_config(config))
        fetch_named(model, access_token)
        folder, base = open_checkpoint(model), base and open_checkpoint(base)
        gpt = checkpoint.load_model(folder, inference_dtype(precision or default_precision(target)), target, base, quantize)
        llm = cls.around(gpt, folder, base or None)
        if tokenizer_dir is not None:
            llm.tokenizer = Tokenizer(open_checkpoint(tokenizer_dir))
        return llm

    @classmethod
    def around(cls, model: GPT, folder: Path, base: Path | None = None) -> LLM:
        """Return an LLM of a loaded model, with tokenizer, prompt style and sampling settings of its checkpoint or adapter folder."""
        tokenizer_dir = folder
        if checkpoint.is_adapter_folder(folder) and not (folder / "tokenizer.json").is_file():
            tokenizer_dir, _ = checkpoint.adapter_settings(folder, base)
        tokenizer = Tokenizer(tokenizer_dir)
        style_dir = folder if has_prompt_style(folder) else tokenizer_dir
        style = resolve_prompt_style(None, style_dir, tokenizer, fallback="default")
        return cls(model, tokenizer, style, recommended(tokenizer_dir), folder, base)

    @property
    def config(self) -> Config:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def preprocessor(self) -> Preprocessor:
        return Preprocessor(self.tokenizer, self.device)

    def forward(
        self, input_ids: torch.Tensor, target_ids: torch.Tensor | None = None, loss_fn: Loss | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, T, V) of ids (B, T); with targets (B, T), which are shifted here, the mean loss as well."""
        logits = self.model(input_ids)
        if target_ids is None:
            return logits
        return logits, (loss_fn or chunked_cross_entropy)(logits[..., :-1, :], target_ids[..., 1:])

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's state dict, with its own names."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.model.load_state_dict(state_dict, strict=strict, assign=assign)

    @overload
    def generate(
        self,
        prompt: str | list[Message],
        sys_prompt: str | None = ...,
        max_new_tokens: int = ...,
        temperature: float | None = ...,
        top_k: int | None = ...,
        top_p: float | None = ...,
        return_as_token_ids: Literal[False] = ...,
        stream: Literal[False] = ...,
        **settings: Any,
    ) -> str: ...

    @overload
    def generate(self, prompt: str | list[Message] | list[str] | list[list[Message]], *args: Any, **settings: Any) -> Any: ...

    @checked
    def generate(
        self,
        prompt: str | list[Message] | list[str] | list[list[Message]],
        sys_prompt: str | None = None,
        max_new_tokens: int = 50,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        return_as_token_ids: bool = False,
        stream: bool = False,
        seed: SupportsIndex | None = None,
        stop: str | Sequence[str] | None = (),
        **more: Any,
    ) -> Any:
        """Return the answer to `prompt` in the checkpoint's prompt style, without the prompt.

        `prompt` is a question, or a conversation: a list of messages with `role` and `content`. A list of either is answered in one batch,
        each as if alone, and a list of answers is returned.
        The answer is text, or ids (N,) with `return_as_token_ids`; with `stream` an iterator of pieces of text, or of ids (1,).
        `sys_prompt` replaces the style's system text. `stop` is a string, or a list of strings, that ends the answer and is not part of
        it. The same `seed` gives the same answer.

        `temperature` 0 is greedy decoding; `litgpt.generate.sampling` explains `top_k` (0: all tokens) and `top_p`, and what `more`
        may be: min_p, repetition_penalty, presence_penalty, frequency_penalty. None is the checkpoint's own value (generation_config.json),
        or the default of `litgpt chat`.
        """
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, **more}
        require_known(given)
        sampling = self.sampling | {name: value for name, value in given.items() if value is not None}
        sampling["top_k"] = sampling["top_k"] or None
        ends = [stop] if isinstance(stop, str) else () if stop is None else stop
        if not isinstance(ends, list | tuple) or not all(isinstance(text, str) for text in ends):
            raise UserError(f"stop is {stop!r}: a text or a list of texts is needed")
        stops = [text for text in ends if text]  # an empty string stops nothing
        is_list = isinstance(prompt, list | tuple) and not (prompt and isinstance(prompt[0], dict))
        if stream and is_list:
            raise UserError(f"stream answers one prompt at a time, and the list has {len(prompt)}: call generate for each")
        texts = [self.rendered(one, sys_prompt) for one in (prompt if is_list else [prompt])]
        if stream:
            if stops and return_as_token_ids:
                raise UserError("stop ends a text, and ids are to be streamed: leave out return_as_token_ids")
            tokens = self.complete(texts[0], max_new_tokens, **sampling, generator=self.generator(seed))
            if return_as_token_ids:
                return (torch.tensor([token]) for token in tokens)
            return until_stop_text(self.tokenizer.decode_stream(tokens), stops)
        ids, last = [self.prompt_ids(text, max_new_tokens) for text in texts], self.prompt_style.stop_tokens(self.tokenizer)

        def ended(ids: list[int]) -> bool:
            text = self.tokenizer.decode(ids).rstrip("\ufffd")  # an incomplete character
            return any(stop in text for stop in stops)

        generators = (self.generator(seed) for _ in texts)
        generated = generate_batch(self.model, ids, max_new_tokens, Sampling(**sampling), last, generators, ended if stops else None)
        answers = [self._answer(answer, stops, return_as_token_ids) for answer in generated]
        return answers if is_list else answers[0]

    def _answer(self, answer: list[int], stops: Sequence[str], as_ids: bool) -> str | torch.Tensor:
        """Return the answer as text before the first stop string, or as the ids that begin before it."""
        text = self.tokenizer.decode(answer)
        cut = min((found for stop in stops if (found := text.find(stop)) >= 0), default=len(text))
        if not as_ids:
            return text[:cut]
        while cut < len(text) and self.tokenizer.decode(answer[:-1]).startswith(text[:cut]):
            answer.pop()
        return torch.tensor(answer, dtype=torch.long)

    def rendered(self, prompt: Any, sys_prompt: str | None) -> str:
        """Return a question or a conversation in the prompt style. Raises UserError if it is neither."""
        if isinstance(prompt, str):
            return self.prompt_style.apply(prompt, sys_prompt=sys_prompt)
        prompt = [prompt] if isinstance(prompt, dict) else prompt
        for message in prompt if isinstance(prompt, list) and prompt else [prompt]:
            if not isinstance(message, dict) or message.get("role") not in ROLES or not isinstance(message.get("content"), str):
                forms = "a text, or a list of messages such as {'role': 'user', 'content': 'Hello'}"
                raise UserError(f"prompt: {repr(message)[:200]} is not understood: give {forms} (roles: {', '.join(ROLES)})")
        if not isinstance(self.prompt_style, ChatStyle):
            raise UserError(
                f"prompt style {self.prompt_style.name!r} has no turns, and a conversation is given: give the question as a text"
            )
        system = [] if sys_prompt is None else [{"role": "system", "content": sys_prompt}]
        turns = [{**message, "role": "system"} if message["role"] == "developer" else message for message in prompt]
        turns = turns[1:] if system and turns[0]["role"] == "system" else turns
        return self.prompt_style.render([*system, *turns], add_generation_prompt=True)

    @checked
    def complete(
        self, text: str, max_new_tokens: int, *, generator: torch.Generator | None = None, **sampling: Any
    ) -> Generator[int, None, None]:
        """Yield the ids that follow `text`, which is in the prompt style already, until a stop token of the style or the tokenizer.

        `sampling` are the settings of `Sampling`.
        """
        require_known(sampling)
        if not isinstance(generator, torch.Generator | None):
            raise UserError(f"generator is {repr(generator)[:100]}: a torch.Generator is needed, `LLM.generator` makes one of a seed")
        ids, stops = self.prompt_ids(text, max_new_tokens), self.prompt_style.stop_tokens(self.tokenizer)
        return Session(self.model).answer(ids, max_new_tokens, Sampling(**sampling), stops, generator)

    @checked
    def value(self, prompt: str | list[Message], answer: str = "", sys_prompt: str | None = None) -> float:
        """Return a value head's estimate (`objective: critic` or `verifiable`) of how good an answer, or its beginning, is: from 0 to 1.

        Without an answer it is the value of the question. Raises UserError for a model without a value head.
        """
        text = self.rendered(prompt, sys_prompt) + (self.prompt_style.gap + answer if answer else "")
        return self.values([self.prompt_ids(text)])[0]

    @torch.inference_mode()
    def values(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """Return the value at the end of each sequence of ids."""
        model = self.model
        if model.value_head is None:
            raise UserError(
                f"{self.checkpoint_dir or self.config.name} has no value head: train one with `litgpt finetune --objective critic`"
            )
        values = []
        for ids in sequences:
            idx = torch.tensor([list(ids)], device=self.device)
            values.append(float(model.value_head(model.tail(*model.prefix(idx))[0, -1]).sigmoid()))
        return values

    def prompt_ids(self, text: str, max_new_tokens: int = 1) -> list[int]:
        """Return the ids of a text that is in the prompt style already."""
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens!r}: a whole number of at least 1 is needed")
        return self.tokenizer.ids(text, bos=self.prompt_style.bos)

    def generator(self, seed: Any) -> torch.Generator | None:
        """Return a seeded random generator on the model's device, or None for torch's own."""
        if seed is None:
            return None
        seed = seed.item() if getattr(seed, "shape", None) == () else seed  # of numpy
        require_seed(seed)
        return torch.Generator(self.device).manual_seed(seed)

    @checked
    def trainer_setup(self, trainer_ckpt: str | Path | None = None) -> None:
        """Prepare the model for a Trainer: fp32 weights, all trainable, from `trainer_ckpt`, a file that a Trainer saved, if given."""
        if trainer_ckpt is not None:
            try:
                state = torch.load(expand_path(trainer_ckpt), map_location="cpu", weights_only=True)["state_dict"]
                first = next(iter(state)).partition("transformer.")[0].partition("lm_head.")[0]
            except Exception as error:
                raise UserError(f"trainer_ckpt: {trainer_ckpt} is not a file that a Trainer saved: {first_line(error)[:200]}") from None
            self.model.float()
            self.load_state_dict({name.removeprefix(first): value for name, value in state.items()})
        elif self.checkpoint_dir is not None:
            self.model, self.generate_strategy = checkpoint.load_model(self.checkpoint_dir, torch.float32, base=self.base), None
        self.model.float().train().requires_grad_(True)

    @checked
    def distribute(
        self,
        accelerator: str = "auto",
        devices: int | str = "auto",
        precision: str | None = None,
        quantize: str | None = None,
        generate_strategy: Strategy | None = None,
        fixed_kv_cache_size: int | Literal["max_model_supported"] | None = None,
    ) -> None:
        """Move the model to a device (cpu, cuda, xpu, mps or auto), in this precision, and quantise it if `quantize` is given.

        Several `devices` need a `generate_strategy` (`litgpt.generate.divide`). For "tensor_parallel" this script is run once more for each
        further device, unless torchrun has started them; each process gets every answer, and its environment variable RANK numbers it.
        `fixed_kv_cache_size` is the maximum number of tokens of prompt and answer together, whose keys and values are kept.
        """
        if self.checkpoint_dir is None:
            raise UserError("distribute: the model has random weights and is on its device already")
        if generate_strategy is None and devices not in ("auto", 1):
            raise UserError(f'distribute: {devices!r} devices need a generate_strategy: "sequential" or "tensor_parallel"')
        device = find_device(accelerator)
        precision = precision or default_precision(device)
        dtype, home = inference_dtype(precision), device if generate_strategy is None else torch.device("cpu")
        homes = divide.places(device, devices) if generate_strategy == "sequential" else []
        rank = divide.processes(device, devices, precision, quantize) if generate_strategy == "tensor_parallel" else None
        model = checkpoint.load_model(self.checkpoint_dir, dtype, home, self.base, quantize)
        if isinstance(fixed_kv_cache_size, int):
            if not 1 <= fixed_kv_cache_size <= model.max_seq_length:
                raise UserError(f"fixed_kv_cache_size is {fixed_kv_cache_size}: from 1 to {model.max_seq_length} tokens are possible")
            model.max_seq_length = fixed_kv_cache_size
        if homes:
            divide.spread(model, homes)
        if rank is not None:
            divide.shard(model, rank.index, rank.size, rank.sum)
            model.to(rank.device)
        self.model, self.generate_strategy = model, generate_strategy

    @checked
    def save(self, out_dir: str | Path, prompt_style: PromptStyle | None = None) -> None:
        """Write a checkpoint folder with the current weights. It replaces an earlier folder that litgpt wrote."""
        if adapter_parameters(self.model) or is_quantised(self.model) or self.generate_strategy == "tensor_parallel":
            raise UserError("save: only a whole model without adapters, and not quantised, can be saved: `litgpt merge_lora` merges LoRA")
        target = expand_path(out_dir)
        if target.exists() and any(source and target.samefile(source) for source in (self.checkpoint_dir, self.tokenizer.folder)):
            raise UserError(f"save: {target} is the folder that the model was read from: name another one")
        with new_folder(target, overwrite=read_manifest(target) is not None) as folder:
            checkpoint.save_weights(on_cpu(self.model.state_dict(keep_vars=True)), folder / checkpoint.WEIGHTS)
            checkpoint.save_config(self.model.config, folder)
            checkpoint.copy_tokenizer_files(self.tokenizer.folder, folder)
            save_prompt_style(prompt_style or self.prompt_style, folder)

    @checked
    def benchmark(self, num_iterations: int = 1, **kwargs: Any) -> tuple[str, dict[str, list[float]]]:
        """Return the answer of the last of `num_iterations` calls of `generate`, and a list of each figure over the calls."""
        rows, text = list[dict[str, float]](), ""
        for _ in range(num_iterations):
            start, ids, first = time.perf_counter(), list[int](), 0.0
            for token in self.generate(**{**kwargs, "stream": True, "return_as_token_ids": True}):
                first = first or time.perf_counter() - start
                ids.append(token.item())
            total, text = time.perf_counter() - start, self.tokenizer.decode(ids)
            row = {
                "Seconds total": total,
                "Seconds to first token": first,
                "Tokens generated": len(ids),
                "Inference speed in tokens/sec": len(ids) / total,
                "Total GPU memory allocated in GB": peak_memory_gb(self.device) if self.device.type == "cuda" else 0.0,
            }
            rows.append(row)
        return text, {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def require_known(sampling: Mapping[str, Any]) -> None:
    """Raise UserError for a setting that `Sampling` does not have."""
    if unknown := sorted(set(sampling) - {item.name for item in fields(Sampling)}):
        raise UserError(f"generate has no argument {unknown[0]!r}: {', '.join(MORE)} can be given besides those that it names")


def recommended(folder: Path) -> dict[str, Any]:
    """Return the sampling settings of generation_config.json, and name on stderr those that transformers would follow and we do not.

    Raises UserError for invalid values.
    """
    file = folder / "generation_config.json"
    content = json_if_there(file)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    values = {name: content[name] for name in names if content.get(name) is not None}
    if content.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        Sampling(**{**values, "top_k": values.get("top_k") or None})
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}") from None
    if ignored := [name for name, neutral in IGNORED.items() if content.get(name) not in (None, [], neutral)]:
        print(f"warning: {file}: {', '.join(ignored)} would change answers in transformers and is not followed here", file=sys.stderr)
    return values


def inference_dtype(precision: str) -> torch.dtype:
    """Return the dtype of inference. "-mixed" precisions keep fp32 weights for the optimizer only, so theirs is the half precision.

    Raises UserError for an unknown precision.
    """
    return MIXED.get(precision) or backbone_dtype(precision)


def benchmark_dict_to_markdown_table(data: Mapping[str, Sequence[float]]) -> str:
    """Return means and standard deviations of the figures of `benchmark` as a table; nan for a single figure."""
    rows = [("Metric", "Mean", "Std Dev")]
    for name, figures in data.items():
        deviation = statistics.stdev(figures) if len(figures) > 1 else math.nan
        rows.append((name, f"{statistics.fmean(figures):.2f}", f"{deviation:.2f}"))
    lines = [f"| {name:<35} | {mean:<27} | {deviation:<27} |\n" for name, mean, deviation in rows]
    return "".join([lines[0], f"|{'-' * 37}|{'-' * 29}|{'-' * 29}|\n", *lines[1:]])
