"""Sampling of tokens, the decoding loop with its key/value cache, and stop sequences.

T prompt tokens, V `padded_vocab_size`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing

import torch

from litgpt.errors import UserError
from litgpt.model import GPT
from litgpt.rope import is_long


def sample(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Sample one token id (1,) from the last row of logits (..., V).

    p = softmax(logits / temperature) over the `top_k` most probable tokens, restricted to the smallest set of the most probable ones whose
    p sum to at least `top_p` (nucleus sampling, arXiv 1904.09751). `temperature` 0 returns the most probable token.
    """
    scores = logits.reshape(-1, logits.size(-1))[-1].float()  # (V,)
    if temperature == 0:
        return scores.argmax(dim=-1, keepdim=True)
    ids = None
    if top_k is not None and top_k < scores.numel():
        scores, ids = scores.topk(top_k)  # sorted
    elif top_p < 1:
        scores, ids = scores.sort(descending=True)
    p = ((scores - scores.max()) / temperature).softmax(dim=-1)  # the difference stays finite however small the temperature
    if top_p < 1:
        before = p.cumsum(dim=-1) - p
        before[0] = -1.0  # always keep the most probable token
        p = p.masked_fill(before >= top_p, 0.0)
    token = torch.multinomial(p, 1, generator=generator)
    return token if ids is None else ids[token]


def generate(
    model: GPT,
    prompt: torch.Tensor,
    max_returned_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_tokens: Sequence[Sequence[int]] = (),
    generator: torch.Generator | None = None,
) -> Generator[int, None, None]:
    """Yield the ids that follow `prompt` (T,), until prompt and answer have `max_returned_tokens` tokens or a stop sequence appears.

    The answer excludes the stop sequence. `generator` makes the answer repeatable. Until the last id the model is in eval mode and holds a
    key/value cache, so it serves one answer at a time. Raises UserError at the call for settings and lengths that do not fit.
    """
    check(model, prompt, max_returned_tokens, temperature, top_k, top_p)

    def draw(logits: torch.Tensor) -> torch.Tensor:
        return sample(logits, temperature, top_k, top_p, generator)

    def answer() -> Generator[int, None, None]:
        with closing(decode(model, prompt.view(1, -1), max_returned_tokens, draw)) as ids:
            yield from until_stop(map(int, ids), stop_tokens)

    return answer()


def check(model: GPT, prompt: torch.Tensor, length: int, temperature: float, top_k: int | None, top_p: float) -> None:
    """Raise UserError for settings and lengths of an answer that do not fit the model."""
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature is {temperature}: 0 (always the most probable token) or a positive number is needed")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}: at least 1 token must remain (null for all)")
    if not 0 <= top_p <= 1:
        raise UserError(f"top_p is {top_p}: a probability from 0 to 1 is needed")
    T, V, limit = prompt.numel(), model.config.V, model.max_seq_length
    if T == 0:
        raise UserError("the prompt is empty: there is nothing to continue")
    if int(prompt.max()) >= V:
        raise UserError(f"the prompt holds token id {int(prompt.max())}, the model knows {V}: this tokenizer belongs to another model")
    if length <= T:
        raise UserError(f"max_returned_tokens is {length}, the prompt alone has {T} tokens: ask for at least 1 new token")
    if length > limit:
        raise UserError(
            f"prompt and answer are {T} + {length - T} = {length} tokens, the model reads at most {limit}: "
            "shorten the prompt or ask for fewer new tokens"
        )


@torch.inference_mode()
def decode(
    model: GPT, prompts: torch.Tensor, length: int, draw: Callable[[torch.Tensor], torch.Tensor]
) -> Generator[torch.Tensor, None, None]:
    """Yield ids (B, 1) that follow prompts (B, T), until each prompt and its answer have `length` tokens.

    `draw` takes logits (B, V) and returns B ids. Each pass computes the logits of its last position only. Where LongRoPE begins to take its
    long factors, the keys of all tokens are computed again.
    """
    first, was_training = model.blocks[0].attn, model.training
    idx = prompts.to(next(model.parameters()).device)
    model.eval()
    model.set_kv_cache(len(idx), length - 1)  # the last id is not fed back
    own = first.kv_cache
    try:
        tokens = [idx]
        for end in range(prompts.size(1), length):
            if is_long(model.config, end) and not is_long(model.config, end - 1):
                idx = torch.cat(tokens, dim=1)
            if first.kv_cache is not own:
                raise UserError("another answer was started on this model before this one was complete: generate one after the other")
            pos = model.positions(idx, torch.arange(end - idx.size(1), end, device=idx.device), end)
            x, taps = model.prefix(idx, pos)
            idx = draw(model.logits(model.tail(x, taps, pos)[:, -1])).view(-1, 1)
            tokens.append(idx)
            yield idx
    finally:
        if first.kv_cache is own:
            model.clear_kv_cache()
        model.train(was_training)


def until_stop(ids: Iterable[int], stop_tokens: Sequence[Sequence[int]]) -> Iterator[int]:
    """Yield the ids before the first stop sequence. Ids that may begin a stop sequence are held back until that is decided."""
    stops = [list(stop) for stop in stop_tokens if len(stop)]
    held: list[int] = []
    for token in ids:
        held.append(token)
        ended = max((len(stop) for stop in stops if held[-len(stop) :] == stop), default=0)
        if ended:
            yield from held[:-ended]
            return
        partial = max((n for stop in stops for n in range(1, len(stop)) if held[-n:] == stop[:n]), default=0)
        ready = len(held) - partial
        yield from held[:ready]
        del held[:ready]
    yield from held
