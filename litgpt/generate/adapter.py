"""`litgpt generate_full`, `generate_adapter` and `generate_adapter_v2`, as LitGPT has them. `litgpt generate FOLDER` reads them too."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from litgpt.args import Quantization
from litgpt.errors import UserError
from litgpt.generate.base import Metered, open_model

if TYPE_CHECKING:
    from litgpt.api import LLM


def _command(method: str, file: Path) -> Callable[..., None]:
    """Return the command for a method, with its default for the adapter's file."""

    def main(
        checkpoint_dir: Path,
        prompt: str = "What food do llamas eat?",
        input: str = "",
        sys_prompt: Optional[str] = None,
        adapter_path: Path = file,
        quantize: Optional[Quantization] = None,
        max_new_tokens: int = 100,
        top_k: Optional[int] = 50,
        top_p: float = 1.0,
        temperature: float = 0.8,
        precision: Optional[str] = None,
        seed: int = 1234,
    ) -> None:
        """Answer a prompt with a base model and a LLaMA-Adapter.

        Args:
            checkpoint_dir: Folder of the base model.
            prompt: The question, without the prompt style's wrapping.
            input: Text that belongs to the question, for which some prompt styles have a place.
            sys_prompt: System text that replaces the prompt style's own.
            adapter_path: The file with the adapter's weights, in the folder that fine-tuning left.
            quantize: Keep the linear layers in 4 bits (bnb.nf4 and the like, by bitsandbytes) or 8 (int8).
            max_new_tokens: Longest answer in tokens.
            top_k: Draw among this many of the most probable tokens. null: among all.
            top_p: Draw among the most probable tokens that hold this much probability together.
            temperature: Below 1 sharper, above 1 flatter probabilities; 0 always takes the most probable token.
            precision: Number format: bf16-true, 32-true or 16-true. Default: bf16-true where the processor has it, else 32-true.
            seed: Random seed. The same seed gives the same answer.
        """
        if not adapter_path.is_file():
            raise UserError(f"adapter_path: {adapter_path} does not exist: name the file with the adapter's weights")
        llm = open_model(adapter_path.parent, precision, quantize, base=checkpoint_dir)
        _answer(llm, prompt, sys_prompt, input, max_new_tokens, seed, temperature=temperature, top_k=top_k, top_p=top_p)

    main.__doc__ = str(main.__doc__).replace("a LLaMA-Adapter", f"a {method}")
    return main


def main_full(
    checkpoint_dir: Path,
    prompt: str = "What food do llamas eat?",
    input: str = "",
    sys_prompt: Optional[str] = None,
    finetuned_path: Path = Path("out/finetune/full/final/lit_model.pth"),
    quantize: Optional[Quantization] = None,
    max_new_tokens: int = 100,
    top_k: Optional[int] = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    precision: Optional[str] = None,
    seed: int = 1234,
) -> None:
    """Answer a prompt with the weights of finetune_full.

    Args:
        checkpoint_dir: Folder of the base model, which gives the tokenizer.
        prompt: The question, without the prompt style's wrapping.
        input: Text that belongs to the question, for which some prompt styles have a place.
        sys_prompt: System text that replaces the prompt style's own.
        finetuned_path: The file with the weights, in the folder that fine-tuning left.
        quantize: Keep the linear layers in 4 bits (bnb.nf4 and the like, by bitsandbytes) or 8 (int8).
        max_new_tokens: Longest answer in tokens.
        top_k: Draw among this many of the most probable tokens. null: among all.
        top_p: Draw among the most probable tokens that hold this much probability together.
        temperature: Below 1 sharper, above 1 flatter probabilities; 0 always takes the most probable token.
        precision: Number format: bf16-true, 32-true or 16-true. Default: bf16-true where the processor has it, else 32-true.
        seed: Random seed. The same seed gives the same answer.
    """
    if not finetuned_path.is_file():
        raise UserError(f"finetuned_path: {finetuned_path} does not exist: name the file with the weights that finetune_full left")
    llm = open_model(finetuned_path.parent, precision, quantize, tokenizer=checkpoint_dir)
    _answer(llm, prompt, sys_prompt, input, max_new_tokens, seed, temperature=temperature, top_k=top_k, top_p=top_p)


def _answer(llm: "LLM", prompt: str, sys_prompt: Optional[str], input: str, max_new_tokens: int, seed: int, **sampling: Any) -> None:
    text = llm.prompt_style.apply(prompt, sys_prompt=sys_prompt, input=input)
    ids = Metered(llm.complete(text, max_new_tokens, generator=llm.generator(seed), **sampling))
    ids.show(llm.tokenizer)
    print(ids, file=sys.stderr)


main = _command("LLaMA-Adapter", Path("out/finetune/adapter/final/lit_model.pth.adapter"))
main_v2 = _command("LLaMA-Adapter V2", Path("out/finetune/adapter-v2/final/lit_model.pth.adapter_v2"))
