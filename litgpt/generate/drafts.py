"""Drafted tokens: a small model drafts some, and a large one checks several in one pass (arXiv 2211.17192).

The draft draws k tokens d_i from its distributions q_i; one pass of the target gives p_0 ... p_k. d_i is kept with probability
min(1, p_i(d_i) / q_i(d_i)); the first one that is not kept is replaced by a draw from max(0, p_i - q_i), normalised, and ends the round. If
all are kept, another token is drawn from p_k. The tokens have exactly the target's distribution, whatever the draft is.

A model's own multi-token heads (`litgpt.adapters.heads`) draft too, all tokens in one pass of the output layer, each independently.

Drafts may also be looked up in the text so far (prompt lookup, `litgpt generate --speculate prompt_lookup`): the tokens that
followed an earlier occurrence of the last ones. Such a draft is certain, q_i(d_i) = 1.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch

from litgpt.errors import UserError
from litgpt.generate.engine import check
from litgpt.generate.sampling import Sampling
from litgpt.model import GPT


def generate(
    draft: GPT | Literal["heads", "prompt_lookup"],
    target: GPT,
    prompt: Sequence[int],
    max_returned_tokens: int,
    sampling: Sampling,
    k: int = 3,
    generator: torch.Generator | None = None,
    kept: list[int] | None = None,
    text: Sequence[int] = (),
) -> Generator[int, None, None]:
    """Yield the ids that follow `prompt`, up to `max_returned_tokens` in all. `kept` gets the number of drafted tokens kept in each round.

    `draft`: the model that drafts; "heads", the target's own; or "prompt_lookup", the text so far, and `text` before it, such as the
    prompt with a likely answer. Raises UserError for models and lengths that do not fit.
    """
    for model in (target,) if isinstance(draft, str) else (draft, target):
        check(model, prompt, max_returned_tokens - len(prompt))
        if model.config.rope_kind == "longrope":
            raise UserError(f"{model.config.name} has LongRoPE, whose keys change with the length: it cannot draft or check drafts")
        if model.config.V != target.config.V:
            raise UserError(
                f"the draft has {model.config.V} tokens in its vocabulary, the target {target.config.V}: choose models of one family"
            )
    tokens, large = list(prompt), _Cached(target, prompt, max_returned_tokens)
    drafter: Any
    if draft == "prompt_lookup":
        drafter = Lookup(target.config.V, next(target.parameters()).device, text)
    elif draft == "heads":
        drafter = partial(by_heads, large, sampling, generator)
    else:
        drafter = partial(by_model, _Cached(draft, prompt, max_returned_tokens), sampling, generator)
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
        if not isinstance(draft, str):
            draft.clear_kv_cache()


def by_model(
    cached: _Cached, sampling: Sampling, generator: torch.Generator | None, tokens: list[int], most: int
) -> tuple[list[int], list[torch.Tensor]]:
    """Return up to `most` tokens that a model draws, and the distributions (V,) that they were drawn from."""
    drafted, q = list[int](), list[torch.Tensor]()
    cached.computed = min(cached.computed, len(tokens) - 1)
    for _ in range(most):
        q.append(sampling.probabilities(cached.logits([*tokens, *drafted], 1))[0])
        drafted.append(int(torch.multinomial(q[-1], 1, generator=generator)))
    return drafted, q


@torch.inference_mode()
def by_heads(
    target: _Cached, sampling: Sampling, generator: torch.Generator | None, tokens: list[int], most: int
) -> tuple[list[int], list[torch.Tensor]]:
    """Return up to `most` tokens that the target's multi-token heads draw behind its last token, and their distributions (V,)."""
    model, states = target.model, target.states
    heads = list(model.mtp_heads)[:most]
    if states is None or not heads:
        return [], []
    h, taps = (part[len(tokens) - 2 - target.computed_from] for part in states)  # (d,), of which the last token was drawn; (S, d)
    e = model.transformer["wte"](torch.tensor(tokens[-1], device=h.device))
    if model.switch is not None:  # for LoRA on the output layer: drafts stand in the reply
        model.switch.mask = None
    q = sampling.probabilities(model.logits(torch.stack([head(h, e, taps) for head in heads])))
    return torch.multinomial(q, 1, generator=generator)[:, 0].tolist(), list(q)


class Lookup:
    """Drafts from the text itself, and one before it: what followed the last tokens, four of them or fewer, where they stood last."""

    SIZES = (4, 3, 2)

    def __init__(self, V: int, device: torch.device, before: Sequence[int] = ()) -> None:
        self.V, self.device, self.read, self.before = V, device, 0, list(before)
        self.followed: dict[tuple[int, ...], int] = {}  # tokens -> where the text went on

    def __call__(self, tokens: list[int], most: int) -> tuple[list[int], list[torch.Tensor]]:
        """Return up to `most` tokens that may follow, and their distributions (V,), each of which is certain."""
        text = [*self.before, *tokens]
        for end in range(self.read, len(text)):
            self.followed.update((tuple(text[end - n : end]), end) for n in self.SIZES if n <= end)
        self.read = len(text)
        place = next((place for n in self.SIZES if (place := self.followed.get(tuple(text[-n:])))), len(text))
        if self.before[: len(tokens)] == tokens:  # the text before goes on from here
            place = len(tokens)
        drafted = text[place : place + most]
        q = torch.zeros(len(drafted), self.V, device=self.device)
        q[range(len(drafted)), drafted] = 1.0
        return drafted, list(q)


def verify(p: torch.Tensor, q: Sequence[torch.Tensor], drafted: Sequence[int], generator: torch.Generator | None = None) -> list[int]:
    """Return the drafted tokens that are kept, and one more, for the target's distributions p (k + 1, V) and the draft's q, k of (V,)."""
    for i, token in enumerate(drafted):
        if float(torch.rand((), device=p.device, generator=generator)) * q[i][token] >= p[i, token]:
            rest = (p[i] - q[i]).clamp(min=0)
            rest = rest if rest.sum() > 0 else p[i]  # equal but for rounding
            return [*drafted[:i], int(torch.multinomial(rest, 1, generator=generator))]
    return [*drafted, int(torch.multinomial(p[len(drafted)], 1, generator=generator))]


class _Cached:
    """A model with the keys and values of the first `computed` tokens of a text. Later positions are overwritten."""

    def __init__(self, model: GPT, prompt: Sequence[int], length: int) -> None:
        self.model: Any = model.eval()
        self.start = None if model.switch is None else model.switch.start_of(prompt)
        self.computed = 0
        # (count, d), (count, S, d): the output layer's input and the taps of the last pass, if logits were requested
        self.states: tuple[torch.Tensor, torch.Tensor] | None = None
        self.computed_from = 0  # the position of the first of them
        model.set_kv_cache(1, length)

    def logits(self, tokens: list[int], count: int) -> torch.Tensor:
        """Return logits (count, V) of the tokens that follow the last `count` of these."""
        with torch.inference_mode():
            device = next(self.model.parameters()).device
            idx = torch.tensor([tokens[self.computed :]], device=device)
            pos = self.model.positions(idx, torch.arange(self.computed, len(tokens), device=device), len(tokens))
            with nullcontext() if self.start is None else self.model.switch.reply_at(self.start):
                x, taps = self.model.prefix(idx, pos)
            self.computed, self.computed_from = len(tokens), len(tokens) - count
            self.states = self.model.tail(x, taps, pos)[0, -count:], taps[0, -count:]
            if self.model.switch is not None:  # for LoRA on the output layer
                self.model.switch.mask = self.model.switch.mask[0, -count:]
            return self.model.logits(self.states[0])
