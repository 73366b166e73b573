"""`litgpt generate_speculatively`: a small model drafts tokens, and a large one checks several in one pass (`litgpt.generate.drafts`)."""

import sys
from pathlib import Path
from typing import Optional

from litgpt.args import Quantization
from litgpt.errors import UserError
from litgpt.generate.base import Metered, open_model


def main(
    draft_model_checkpoint_dir: Path,
    target_model_checkpoint_dir: Path,
    prompt: str = "What food do llamas eat?",
    *,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    speculative_k: int = 3,
    top_k: Optional[int] = 50,
    top_p: float = 1.0,
    temperature: float = 0.8,
    precision: Optional[str] = None,
    quantize: Optional[Quantization] = None,
    seed: int = 1234,
) -> None:
    """Answer a prompt with a large model, faster by a small model of the same vocabulary that drafts its tokens.

    Args:
        draft_model_checkpoint_dir: Folder of the small model.
        target_model_checkpoint_dir: Folder of the large model, whose answers these are.
        prompt: The question, without the prompt style's wrapping.
        num_samples: How many answers to draw.
        max_new_tokens: Longest answer in tokens.
        speculative_k: Tokens that the small model drafts at a time.
        top_k: Draw among this many of the most probable tokens. null: among all.
        top_p: Draw among the most probable tokens that hold this much probability together.
        temperature: Below 1 sharper, above 1 flatter probabilities; 0 always takes the most probable token.
        precision: Number format: bf16-true, 32-true or 16-true. Default: bf16-true where the processor has it, else 32-true.
        quantize: Keep the linear layers of both models in 4 bits (bnb.nf4 and the like, by bitsandbytes) or 8 (int8).
        seed: Random seed. The same seed gives the same answers.
    """
    for name, value in {"num_samples": num_samples, "max_new_tokens": max_new_tokens, "speculative_k": speculative_k}.items():
        if value < 1:
            raise UserError(f"{name} is {value}: at least 1 is needed")
    from litgpt.generate.drafts import generate
    from litgpt.generate.sampling import Sampling, until_stop

    draft, target = (open_model(folder, precision, quantize) for folder in (draft_model_checkpoint_dir, target_model_checkpoint_dir))
    sampling, generator = Sampling(temperature, top_k, top_p), target.generator(seed)
    ids = target.prompt_ids(target.prompt_style.apply(prompt), max_new_tokens)
    stops = target.prompt_style.stop_tokens(target.tokenizer)
    for _ in range(num_samples):
        kept: list[int] = []
        tokens = generate(draft.model, target.model, ids, len(ids) + max_new_tokens, sampling, speculative_k, generator, kept)
        meter = Metered(until_stop(tokens, stops))
        meter.show(target.tokenizer)
        share = sum(kept) / max(1, speculative_k * len(kept))
        print(f"{meter}, {share:.0%} of the drafted tokens kept", file=sys.stderr)
