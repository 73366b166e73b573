"""`litgpt generate` and the other commands of LitGPT that answer one prompt, once or several times."""

import contextlib
import importlib
import io
import random
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

from litgpt.args import POSITIVE, SHARE, TEMPERATURE, TOP_K, Accelerator, Quantization, function_of, require_ranges, setting
from litgpt.errors import UserError
from litgpt.files import require_file
from litgpt.streams import safe, show
from litgpt.text import counted

if TYPE_CHECKING:
    from litgpt.api import LLM
    from litgpt.model import GPT
    from litgpt.tokenizer import Tokenizer

Speculation = Literal["heads", "prompt_lookup"]
LOOKED_UP = 10  # tokens of a draft from the text


@dataclass
class Checkpoint:
    """The model that answers."""

    checkpoint_dir: Path
    """Folder of a base model, a merged model, an adapter or a run. A Hugging Face folder or a GGUF file is converted on first use."""


@dataclass
class Drawing:
    """How answers are sampled, and the model's number format."""

    sys_prompt: Optional[str] = None
    """System text that replaces the prompt style's own."""
    max_new_tokens: int = setting(50, POSITIVE)
    """Longest answer in tokens."""
    top_k: Optional[int] = setting(50, TOP_K)
    """Sample from this many of the most probable tokens. null: from all."""
    top_p: float = setting(1.0, SHARE)
    """Sample from the smallest set of most probable tokens whose probabilities sum to at least this."""
    temperature: float = setting(0.8, TEMPERATURE)
    """Below 1 sharpens, above 1 flattens the probabilities; 0 always takes the most probable token."""
    precision: Optional[str] = None
    """Number format: bf16-true, 32-true or 16-true. Default: bf16-true where the processor has it, else 32-true."""
    quantize: Optional[Quantization] = None
    """Keep the linear layers in 4 bits (bnb.nf4 and the like, by bitsandbytes) or 8 (int8, faster than bf16 on a CPU)."""
    compile: bool = False
    """Compile the pass of a token (torch.compile). Takes up to a minute before the first answer; not with generate_tp or drafts."""
    accelerator: Accelerator = "auto"
    """Device to compute on. auto: the first GPU that works, else the CPU."""
    seed: int = 1234
    """Random seed. The same seed gives the same answers."""
    access_token: Optional[str] = None
    """Hugging Face token, for a gated model that is downloaded by its name."""

    def __post_init__(self) -> None:
        require_ranges(self)

    def opened(self, checkpoint_dir: Path, **how: Any) -> "LLM":
        """Return the model of a folder. `how`: arguments of `LLM.load`; with a `device`, the model is not packed: it can be divided."""
        is_packed = "device" not in how
        llm = open_model(checkpoint_dir, is_packed, precision=self.precision, quantize=self.quantize, **{"device": self.accelerator, **how})
        if self.compile:
            from litgpt.compiled import compile_steps

            compile_steps(llm.model)
        return llm

    def drawn(self, llm: "LLM", texts: list[str], n: int, first: int = 0) -> list[list[int]]:
        """Return the ids of n answers to each of the texts, which are in the prompt style.

        Each answer has its own random numbers, which depend on the seed, the number of its text, counted from `first`, and its own number.
        """
        import torch

        from litgpt.generate.engine import generate_batch
        from litgpt.generate.sampling import Sampling

        prompts = [llm.prompt_ids(text) for text in texts for _ in range(n)]
        seeds = (random.Random(f"{self.seed} {place} {k}").getrandbits(32) for place in range(first, first + len(texts)) for k in range(n))
        generators = (torch.Generator(llm.device).manual_seed(seed) for seed in seeds)
        stops = llm.prompt_style.stop_tokens(llm.tokenizer)
        return generate_batch(llm.model, prompts, self.max_new_tokens, Sampling(**self.sampling), stops, generators)

    @property
    def sampling(self) -> dict[str, Any]:
        """Settings of `litgpt.generate.sampling.Sampling`."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


@dataclass
class Answers(Drawing):
    """Answers to one question."""

    prompt: str = "What food do llamas eat?"
    """The question, without the prompt style's wrapping."""
    num_samples: int = setting(1, POSITIVE)
    """Number of answers to draw."""

    def show(
        self, llm: "LLM", drafted: int = 0, draft: "Union[GPT, Speculation]" = "prompt_lookup", with_prompt: bool = True, **style: str
    ) -> None:
        """Stream the prompt, unless `with_prompt` is False, and answers to standard output; their length and speed to standard error.

        `drafted` tokens are drafted at a time by `draft` (`litgpt.generate.drafts`). `style` goes to the prompt style.
        """
        from litgpt.generate import drafts
        from litgpt.generate.sampling import Sampling, until_stop
        from litgpt.logs import peak_memory_gb

        if drafted and self.compile:
            print("compile: drafts are checked several tokens at a time, which is not compiled", file=sys.stderr)
        generator, kept = llm.generator(self.seed), list[int]()
        text = llm.prompt_style.apply(self.prompt, sys_prompt=self.sys_prompt, **style)
        ids = llm.prompt_ids(text, self.max_new_tokens)
        for _ in range(self.num_samples):
            if drafted:
                length, draws = len(ids) + self.max_new_tokens, Sampling(**self.sampling)
                tokens = drafts.generate(draft, llm.model, ids, length, draws, drafted, generator, kept)
                meter = Metered(until_stop(tokens, llm.prompt_style.stop_tokens(llm.tokenizer)))
            else:
                meter = Metered(llm.complete(text, self.max_new_tokens, generator=generator, **self.sampling))
            meter.show(llm.tokenizer, ids if with_prompt else [])
            note = f", {counted(sum(kept), 'token')} from {counted(len(kept), 'draft')}" if drafted else ""
            print(f"{meter}{note}, peak memory {peak_memory_gb(llm.device):.2f} GiB", file=sys.stderr)


@dataclass
class Generate(Answers, Checkpoint):
    """Answer a prompt. Prompt and answer are streamed to standard output, length and speed of the answer go to standard error."""

    speculate: Optional[Speculation] = None
    """Check several drafted tokens in one pass, with the same distribution. heads takes drafts from the model's own multi-token heads
    (`litgpt finetune --mtp_heads 3`); prompt_lookup takes them from the text so far, where an answer repeats its prompt or itself."""
    best_of: int = setting(1, POSITIVE)
    """Draw this many answers and show the best of them, by `by`."""
    by: Literal["value"] = "value"
    """value takes the answer that the model's value head rates highest (`litgpt finetune --objective critic`)."""

    def main(self) -> None:
        if self.best_of > 1 and (self.speculate or self.num_samples > 1):
            raise UserError(f"best_of draws its answers in one batch: leave out {'speculate' if self.speculate else 'num_samples'}")
        llm = self.opened(self.checkpoint_dir)
        if self.best_of > 1:
            self._show_best(llm)
        else:
            config: Any = llm.config
            drafted = config.mtp_heads if self.speculate == "heads" else LOOKED_UP if self.speculate else 0
            if self.speculate == "heads" and not drafted:
                raise UserError(f"speculate: {self.checkpoint_dir} has no multi-token heads: train some with --mtp_heads 3")
            self.show(llm, drafted, self.speculate or "prompt_lookup")

    def _show_best(self, llm: "LLM") -> None:
        text = llm.prompt_style.apply(self.prompt, sys_prompt=self.sys_prompt)
        prompt = llm.prompt_ids(text)
        llm.values([prompt])  # an error if there is no value head
        answers = self.drawn(llm, [text], self.best_of)
        values = llm.values([[*prompt, *answer] for answer in answers])
        show(f"{llm.tokenizer.decode([*prompt, *answers[values.index(max(values))]])}\n")
        print(f"value {max(values):.3f}, the highest of {self.best_of} answers (lowest {min(values):.3f})", file=sys.stderr)


@dataclass
class Models:
    """The model that answers and the one that drafts."""

    draft_model_checkpoint_dir: Path
    """Folder of the small model."""
    target_model_checkpoint_dir: Path
    """Folder of the large model, which gives the answers."""


@dataclass
class Speculatively(Answers, Models):
    """Answer a prompt with a large model, sped up by a small model of the same vocabulary that drafts its tokens."""

    speculative_k: int = setting(3, POSITIVE)
    """Tokens that the small model drafts at a time."""

    def main(self) -> None:
        draft, target = (self.opened(folder) for folder in (self.draft_model_checkpoint_dir, self.target_model_checkpoint_dir))
        self.show(target, self.speculative_k, draft.model)


@dataclass
class Tuned(Answers, Checkpoint):
    """Answer with a base model and the file that fine-tuning wrote, as LitGPT has it. `litgpt generate FOLDER` reads these files too."""

    input: str = ""
    """Additional input to the question, which some prompt styles have a place for."""
    max_new_tokens: int = setting(100, POSITIVE)

    def answer(self, key: str, **how: Any) -> None:
        """Answer with the file that the setting `key` names; `how`: arguments of `LLM.load`."""
        file: Path = getattr(self, key)
        require_file(file, f"does not exist: name the file with the weights that fine-tuning wrote ({key})")
        self.show(self.opened(file.parent, **how), with_prompt=False, input=self.input)


@dataclass
class Adapter(Tuned):
    """Answer a prompt with a base model and a LLaMA-Adapter."""

    adapter_path: Path = Path("out/finetune/adapter/final/lit_model.pth.adapter")
    """The file with the adapter's weights, in the folder that fine-tuning wrote."""

    def main(self) -> None:
        self.answer("adapter_path", base=self.checkpoint_dir)


@dataclass
class AdapterV2(Adapter):
    """Answer a prompt with a base model and a LLaMA-Adapter V2."""

    adapter_path: Path = Path("out/finetune/adapter-v2/final/lit_model.pth.adapter_v2")


@dataclass
class Full(Tuned):
    """Answer a prompt with the weights of finetune_full. The tokenizer is the base model's."""

    finetuned_path: Path = Path("out/finetune/full/final/lit_model.pth")
    """The file with the weights, in the folder that fine-tuning wrote."""

    def main(self) -> None:
        self.answer("finetuned_path", tokenizer_dir=self.checkpoint_dir)


@dataclass
class Several(Answers, Checkpoint):
    """Answers by several devices."""

    devices: Union[int, str] = "auto"
    """Number of devices. auto: all GPUs, or the CPU."""


@dataclass
class Sequentially(Several):
    """Answer a prompt with a model whose blocks are divided among GPUs."""

    def main(self) -> None:
        from litgpt.device import find_device
        from litgpt.generate.divide import places, spread

        devices = places(find_device(self.accelerator), self.devices)
        llm = self.opened(self.checkpoint_dir, device="cpu")
        spread(llm.model, devices)
        self.show(llm)


@dataclass
class TensorParallel(Several):
    """Answer a prompt with a model each of whose blocks is divided among processes, started by --devices or torchrun."""

    def main(self) -> None:
        from litgpt.device import default_precision, find_device
        from litgpt.generate.divide import processes, shard
        from litgpt.train.parallel import ends_together

        device = find_device(self.accelerator)
        precision = self.precision or default_precision(device)
        rank = processes(device, self.devices, precision, self.quantize)
        with ends_together(rank), contextlib.ExitStack() as streams:
            if not rank.is_first:
                streams.enter_context(contextlib.redirect_stdout(io.StringIO()))
                streams.enter_context(contextlib.redirect_stderr(io.StringIO()))
            llm = open_model(self.checkpoint_dir, packed=False, precision=precision, device="cpu")
            shard(llm.model, rank.index, rank.size, rank.sum)
            llm.model.to(rank.device)
            if self.compile:
                print("compile: the parts of a model are not compiled by generate_tp", file=sys.stderr)
            self.show(llm)


main = function_of(Generate, "checkpoint_dir", "prompt")


def open_model(checkpoint_dir: Path, packed: bool = True, **how: Any) -> "LLM":
    """Load a checkpoint, and print its folder, the model's name, dtype and device to standard error.

    `packed`: pack the model with `litgpt.packed`, after which it cannot be divided. `how`: arguments of `LLM.load`.
    """
    start = time.perf_counter()
    from litgpt.api import LLM
    from litgpt.packed import pack

    llm = LLM.load(checkpoint_dir, **how)
    if packed:
        pack(llm.model)
    say_loaded(f"{llm.checkpoint_dir}: {llm.config.name},", llm, how.get("quantize"), start)
    return llm


def say_loaded(name: str, llm: "LLM", quantize: Optional[str], start: float) -> None:
    """Print a model's name, dtype, device, and the seconds since `start`, to standard error."""
    form = str(llm.model.dtype).removeprefix("torch.") + (f", {quantize}" if quantize else "")
    print(safe(f"{name} {form} on {llm.device}, loaded in {time.perf_counter() - start:.1f} s"), file=sys.stderr)


@dataclass
class Metered:
    """An iterator of ids that keeps and times them."""

    ids: Iterator[int]
    drawn: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def __iter__(self) -> Iterator[int]:
        start = time.perf_counter()
        for token in self.ids:
            self.drawn.append(token)
            self.seconds = time.perf_counter() - start
            yield token

    def show(self, tokenizer: "Tokenizer", prompt: Iterable[int]) -> None:
        """Stream the text of the prompt and of the ids to standard output; nothing if the first id is an error."""
        ids = iter(self)
        first = list(islice(ids, 1))
        for piece in tokenizer.decode_stream(chain(prompt, first, ids)):
            show(piece)
        show("\n")

    def __str__(self) -> str:
        count = len(self.drawn)
        return f"{counted(count, 'token')} in {self.seconds:.2f} s, {count / max(self.seconds, 1e-9):.1f} tokens/s"


def __getattr__(name: str) -> Any:
    if name in ("generate", "generate_fn", "next_token", "sample"):  # they load torch
        return getattr(importlib.import_module("litgpt.generate.functions"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
