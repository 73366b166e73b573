"""`litgpt generate`: answer one prompt once or several times."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

from litgpt.args import Quantization
from litgpt.errors import UserError
from litgpt.streams import show

if TYPE_CHECKING:
    from litgpt.api import LLM
    from litgpt.tokenizer import Tokenizer


def main(
    checkpoint_dir: Path,
    prompt: str = "What food do llamas eat?",
    *,
    sys_prompt: Optional[str] = None,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    top_k: Optional[int] = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    precision: Optional[str] = None,
    quantize: Optional[Quantization] = None,
    seed: int = 1234,
    speculate: Optional[Literal["prompt_lookup"]] = None,
    access_token: Optional[str] = None,
) -> None:
    """Answer a prompt. The answer is streamed to standard output, its length and speed go to standard error.

    Args:
        checkpoint_dir: Folder of a base model, a merged model or an adapter (LoRA or Skip2-LoRA). A Hugging Face folder or a GGUF file
            is converted on first use.
        prompt: The question, without the prompt style's wrapping.
        sys_prompt: System text that replaces the prompt style's own.
        num_samples: How many answers to draw.
        max_new_tokens: Longest answer in tokens.
        top_k: Draw among this many of the most probable tokens. null: among all.
        top_p: Draw among the most probable tokens that hold this much probability together.
        temperature: Below 1 sharper, above 1 flatter probabilities; 0 always takes the most probable token.
        precision: Number format: bf16-true, 32-true or 16-true. Default: bf16-true where the processor has it, else 32-true.
        quantize: Keep the linear layers in 4 bits (bnb.nf4 and the like, by bitsandbytes) or 8 (int8, faster than bf16 on a CPU).
        seed: Random seed. The same seed gives the same answers.
        speculate: prompt_lookup takes drafts from the text so far and checks several tokens in one pass: faster where an answer repeats
            its prompt or itself, with the same distribution.
        access_token: Hugging Face token, for a gated model that is downloaded by its name.
    """
    if num_samples < 1:
        raise UserError(f"num_samples is {num_samples}: at least 1 is needed")
    llm = open_model(checkpoint_dir, precision, quantize)
    answer(llm, prompt, sys_prompt, num_samples, max_new_tokens, seed, speculate, temperature=temperature, top_k=top_k, top_p=top_p)


def answer(
    llm: "LLM",
    prompt: str,
    sys_prompt: Optional[str],
    num_samples: int,
    max_new_tokens: int,
    seed: int,
    speculate: Optional[str] = None,
    **sampling: Any,
) -> None:
    """Stream answers to standard output, and their length and speed to standard error."""
    from litgpt.logs import peak_memory_gb

    generator, text, kept = llm.generator(seed), llm.prompt_style.apply(prompt, sys_prompt=sys_prompt), list[int]()
    for _ in range(num_samples):
        if speculate is None:
            tokens = llm.complete(text, max_new_tokens, generator=generator, **sampling)
        else:
            from litgpt.generate import drafts
            from litgpt.generate.sampling import Sampling, until_stop

            ids = llm.prompt_ids(text, max_new_tokens)
            draws = Sampling(**sampling), drafts.LOOKED_UP, generator, kept
            drafted = drafts.generate(None, llm.model, ids, len(ids) + max_new_tokens, *draws)
            tokens = until_stop(drafted, llm.prompt_style.stop_tokens(llm.tokenizer))
        meter = Metered(tokens)
        meter.show(llm.tokenizer)
        looked = f", {sum(kept)} tokens from {len(kept)} drafts" if speculate else ""
        print(f"{meter}{looked}, peak memory {peak_memory_gb(next(llm.model.parameters()).device):.2f} GiB", file=sys.stderr)


def open_model(
    checkpoint_dir: Path,
    precision: Optional[str],
    quantize: Optional[Quantization] = None,
    device: Optional[str] = None,
    base: Optional[Path] = None,
    tokenizer: Optional[Path] = None,
) -> "LLM":
    """Load the checkpoint, and print its name, dtype and device to standard error."""
    start = time.perf_counter()
    from litgpt.api import LLM

    llm = LLM.load(checkpoint_dir, precision=precision, quantize=quantize, device=device, base=base, tokenizer_dir=tokenizer)
    dtype, place = str(llm.model.dtype).removeprefix("torch."), next(llm.model.parameters()).device
    form = f"{dtype}, {quantize}" if quantize else dtype
    print(f"{llm.config.name}, {form} on {place}, loaded in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return llm


class Metered:
    """An iterator of ids that counts and times them."""

    def __init__(self, ids: Iterator[int]) -> None:
        self.ids = ids
        self.count = 0
        self.seconds = 0.0

    def __iter__(self) -> Iterator[int]:
        start = time.perf_counter()
        for token in self.ids:
            self.count += 1
            self.seconds = time.perf_counter() - start
            yield token

    def show(self, tokenizer: "Tokenizer") -> None:
        """Stream the ids' text to standard output."""
        for piece in tokenizer.decode_stream(self):
            show(piece)
        show("\n")

    def __str__(self) -> str:
        return f"{self.count} tokens in {self.seconds:.2f} s, {self.count / max(self.seconds, 1e-9):.1f} tokens/s"
