"""`litgpt generate_speculatively`: a small model drafts tokens, and a large one checks several in one pass (arXiv 2211.17192).

The draft draws k tokens d_i from its distributions q_i; one pass of the target gives p_0 ... p_k. d_i is kept with probability
min(1, p_i(d_i) / q_i(d_i)); the first one that is not kept is replaced by a draw from max(0, p_i - q_i), normalised, and ends the round. If
all are kept, another token is drawn from p_k. The tokens have exactly the target's distribution, whatever the draft is.

Drafts may also be looked up in the text so far (prompt lookup, `litgpt generate --speculate prompt_lookup`): what followed its last tokens
where they stood before. Such a draft is certain, q_i(d_i) = 1.
"""

import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from litgpt.args import Quantization
from litgpt.errors import UserError
from litgpt.generate.base import Metered, open_model

if TYPE_CHECKING:
    import torch

    from litgpt.generate.sampling import Sampling
    from litgpt.model import GPT

LOOKED_UP = 10  # tokens of a draft from the text


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


def generate(
    draft: "Optional[GPT]",
    target: "GPT",
    prompt: Sequence[int],
    max_returned_tokens: int,
    sampling: "Sampling",
    k: int = 3,
    generator: "Optional[torch.Generator]" = None,
    kept: Optional[list[int]] = None,
) -> Generator[int, None, None]:
    """Yield the ids that follow `prompt`, up to `max_returned_tokens` in all. `kept` gets the number of drafted tokens kept in each round.

    `draft` None looks drafts up in the text. Raises UserError for models and lengths that do not fit.
    """
    from litgpt.generate.engine import check

    for model in (target,) if draft is None else (draft, target):
        check(model, prompt, max_returned_tokens - len(prompt))
        if model.config.rope_kind == "longrope":
            raise UserError(f"{model.config.name} has LongRoPE, whose keys change with the length: it cannot draft or check drafts")
        if model.config.V != target.config.V:
            raise UserError(
                f"the draft has {model.config.V} tokens in its vocabulary, the target {target.config.V}: choose models of one family"
            )
    tokens, large = list(prompt), _Cached(target, prompt, max_returned_tokens)
    drafter = (
        Lookup(target.config.V, next(target.parameters()).device)
        if draft is None
        else Draft(draft, prompt, max_returned_tokens, sampling, generator)
    )
    try:
        while len(tokens) < max_returned_tokens:
            drafted, q = drafter(tokens, min(k, max_returned_tokens - len(tokens) - 1))
            p = sampling.probabilities(large.logits([*tokens, *drafted], len(drafted) + 1))
            new = verify(p, q, drafted, generator)
            if kept is not None and drafted:
                kept.append(len(new) - 1)
            tokens += new
            large.computed = min(large.computed, len(tokens) - 1)
            yield from new
    finally:
        target.clear_kv_cache()
        if draft is not None:
            draft.clear_kv_cache()


class Draft:
    """Drafts of a model."""

    def __init__(
        self, model: "GPT", prompt: Sequence[int], length: int, sampling: "Sampling", generator: "Optional[torch.Generator]"
    ) -> None:
        self.cached, self.sampling, self.generator = _Cached(model, prompt, length), sampling, generator

    def __call__(self, tokens: list[int], most: int) -> "tuple[list[int], list[torch.Tensor]]":
        """Return up to `most` tokens that may follow, and the distributions (V,) that they were drawn from."""
        import torch

        drafted, q = list[int](), list[torch.Tensor]()
        self.cached.computed = min(self.cached.computed, len(tokens) - 1)
        for _ in range(most):
            q.append(self.sampling.probabilities(self.cached.logits([*tokens, *drafted], 1))[0])
            drafted.append(int(torch.multinomial(q[-1], 1, generator=self.generator)))
        return drafted, q


class Lookup:
    """Drafts from the text itself: what followed its last tokens, four of them or fewer, where they stood last."""

    SIZES = (4, 3, 2)

    def __init__(self, V: int, device: "torch.device") -> None:
        self.V, self.device, self.read = V, device, 0
        self.followed: dict[tuple[int, ...], int] = {}  # tokens -> where the text went on

    def __call__(self, tokens: list[int], most: int) -> "tuple[list[int], list[torch.Tensor]]":
        """Return up to `most` tokens that may follow, and their distributions (V,), each of which is certain."""
        import torch

        for end in range(self.read, len(tokens)):
            self.followed.update((tuple(tokens[end - n : end]), end) for n in self.SIZES if n <= end)
        self.read = len(tokens)
        place = next((place for n in self.SIZES if (place := self.followed.get(tuple(tokens[-n:])))), len(tokens))
        drafted = tokens[place : place + most]
        q = torch.zeros(len(drafted), self.V, device=self.device)
        q[range(len(drafted)), drafted] = 1.0
        return drafted, list(q)


def verify(
    p: "torch.Tensor", q: "Sequence[torch.Tensor]", drafted: Sequence[int], generator: "Optional[torch.Generator]" = None
) -> list[int]:
    """Return the drafted tokens that are kept, and one more, for the target's distributions p (k + 1, V) and the draft's q, k of (V,)."""
    import torch

    for i, token in enumerate(drafted):
        if float(torch.rand((), device=p.device, generator=generator)) * q[i][token] >= p[i, token]:
            rest = (p[i] - q[i]).clamp(min=0)
            rest = rest if rest.sum() > 0 else p[i]  # equal but for rounding
            return [*drafted[:i], int(torch.multinomial(rest, 1, generator=generator))]
    return [*drafted, int(torch.multinomial(p[len(drafted)], 1, generator=generator))]


class _Cached:
    """A model with the keys and values of the first `computed` tokens of a text. Later places are written again."""

    def __init__(self, model: "GPT", prompt: Sequence[int], length: int) -> None:
        self.model: Any = model.eval()
        self.start = None if model.switch is None else model.switch.start_of(prompt)
        self.computed = 0
        model.set_kv_cache(1, length)

    def logits(self, tokens: list[int], count: int) -> "torch.Tensor":
        """Return logits (count, V) of the tokens that follow the last `count` of these."""
        import torch

        with torch.inference_mode():
            device = next(self.model.parameters()).device
            idx = torch.tensor([tokens[self.computed :]], device=device)
            pos = self.model.positions(idx, torch.arange(self.computed, len(tokens), device=device), len(tokens))
            if self.start is not None:
                self.model.switch.start = self.start
            try:
                x, taps = self.model.prefix(idx, pos)
            finally:
                if self.start is not None:
                    self.model.switch.start = None
            self.computed = len(tokens)
            return self.model.logits(self.model.tail(x, taps, pos)[0, -count:])
