"""Drawing tokens from logits, and stop sequences. V `padded_vocab_size`."""

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsFloat, SupportsIndex

import torch
import torch.nn.functional as F

from litgpt.args import SHARE, TEMPERATURE, TOP_K, Range, require_ranges, setting
from litgpt.errors import UserError

COLDEST = 1e-30  # a lower temperature is 0, which fp32 cannot tell apart


def sample(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    min_p: float = 0.0,
) -> torch.Tensor:
    """Sample one token id (1,) from the last row of logits (..., V).

    p = softmax(logits / temperature) over the `top_k` most probable tokens, restricted to the smallest set of the most probable ones whose
    p sum to at least `top_p` (nucleus sampling, arXiv 1904.09751), and to those with at least `min_p` times the largest p (arXiv
    2407.01082). `temperature` 0 returns the most probable token.
    """
    scores = logits.reshape(-1, logits.size(-1))[-1].float()  # (V,)
    if temperature < COLDEST:
        return scores.argmax(dim=-1, keepdim=True)
    p, ids = allowed(scores, temperature, top_k, top_p, min_p)
    token = torch.multinomial(p, 1, generator=generator)
    return token if ids is None else ids[token]


def allowed(
    scores: torch.Tensor, temperature: float, top_k: int | None, top_p: float, min_p: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return what `sample` draws from, for scores (..., V): weights (..., K) of tokens, and their ids; None for all V in their order."""
    ids = None
    if top_k is not None and top_k < scores.size(-1):
        scores, ids = scores.topk(top_k)  # sorted
    elif top_p < 1:
        scores, ids = scores.sort(descending=True)
    largest = scores.amax(-1, keepdim=True)
    p = ((scores - largest) / temperature).softmax(-1)  # the difference stays finite however small the temperature
    if top_p < 1:
        before = p.cumsum(-1) - p
        before[..., 0] = -1.0  # always keep the most probable token
        p = p.masked_fill(before >= top_p, 0.0)
    if min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0.0)
    return p, ids


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are drawn. Raises UserError for values out of range.

    The logits l are penalised first: a token that prompt or answer has gets l / `repetition_penalty`, or l * `repetition_penalty` where l
    is negative (arXiv 1909.05858); one that the answer has n times loses `presence_penalty` + n `frequency_penalty` (OpenAI's API); and
    `logit_bias` is added. `sample` explains the others.
    """

    temperature: float = setting(1.0, TEMPERATURE)
    top_k: int | None = setting(None, TOP_K)
    top_p: float = setting(1.0, SHARE)
    min_p: float = setting(0.0, SHARE)
    repetition_penalty: float = setting(1.0, Range(0, above=True, hint="(1 changes nothing)"))
    presence_penalty: float = setting(0.0, Range())
    frequency_penalty: float = setting(0.0, Range())
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_ranges(self)
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, Mapping) else [(None, 0)]
        if not all(
            isinstance(token, SupportsIndex) and isinstance(bias, SupportsFloat) and float(bias) < math.inf for token, bias in pairs
        ):
            raise UserError(f"logit_bias is {str(self.logit_bias)[:100]}: a mapping of token ids, such as {{42: -100.0}}, is needed")

    def draw(self, logits: torch.Tensor, tokens: Sequence[int], start: int, generator: torch.Generator | None = None) -> int:
        """Return the token that follows `tokens`, prompt and answer, which begins at `start`, by the logits (V,) of that place."""
        scores = self.penalised(logits, tokens, start)
        _require_finite(scores)
        return int(sample(scores, self.temperature, self.top_k, self.top_p, generator, self.min_p))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the distributions (n, V) from which `sample` draws for logits (n, V). Penalties are not applied."""
        scores = logits.float()
        _require_finite(scores)
        if self.temperature < COLDEST:
            return F.one_hot(scores.argmax(-1), scores.size(-1)).float()
        p, ids = allowed(scores, self.temperature, self.top_k, self.top_p, self.min_p)
        p = p / p.sum(-1, keepdim=True)
        return p if ids is None else torch.zeros_like(scores).scatter(-1, ids, p)

    def penalised(self, logits: torch.Tensor, tokens: Sequence[int], start: int) -> torch.Tensor:
        """Return the logits (V,) after the penalties, as they are without any."""
        if self.repetition_penalty == 1 and not (self.presence_penalty or self.frequency_penalty or self.logit_bias):
            return logits
        scores = logits.float().clone()
        if self.repetition_penalty != 1:
            seen = torch.tensor(sorted(set(tokens)), device=scores.device)
            old = scores[seen]
            scores[seen] = torch.where(old > 0, old / self.repetition_penalty, old * self.repetition_penalty)
        if len(tokens) > start and (self.presence_penalty or self.frequency_penalty):
            ids, counts = torch.tensor(tokens[start:], device=scores.device).unique(return_counts=True)
            scores[ids] -= self.presence_penalty + self.frequency_penalty * counts
        for token, bias in self.logit_bias.items():
            if not 0 <= token < len(scores):
                raise UserError(f"logit_bias names the token {token}: the model has the tokens 0 to {len(scores) - 1:,}")
            scores[token] += bias
        return scores


def _require_finite(scores: torch.Tensor) -> None:
    """Raise UserError for scores (..., V) that hold NaN or infinity."""
    if not scores.amax(-1).isfinite().all():
        raise UserError("the model's output is not finite: `litgpt validate` names such weights; float16 may overflow where bfloat16 fits")


class StopFilter:
    """Pass on items, ids or characters, up to the first stop sequence. Those that may begin one are held back until that is decided."""

    def __init__(self, stops: Iterable[Sequence[Any]]) -> None:
        self.stops = [list(stop) for stop in stops if len(stop)]
        self.held: list[Any] = []
        self.stopped: list[Any] = []  # the stop sequence, once it has come

    def push(self, item: Any) -> list[Any]:
        """Return the items that are free now. The stop sequence is dropped."""
        self.held.append(item)
        self.stopped = max((stop for stop in self.stops if self.held[-len(stop) :] == stop), key=len, default=[])
        partial = max((n for stop in self.stops for n in range(1, len(stop)) if self.held[-n:] == stop[:n]), default=0)
        ready = len(self.held) - (len(self.stopped) or partial)
        free, self.held = self.held[:ready], [] if self.stopped else self.held[ready:]
        return free

    def free(self, items: Iterable[Any]) -> Iterator[Any]:
        """Push the items, one by one, and yield those that are free, up to the stop sequence."""
        for item in () if self.stopped else items:
            yield from self.push(item)
            if self.stopped:
                return


def until_stop(ids: Iterable[int], stop_tokens: Sequence[Sequence[int]]) -> Generator[int, None, None]:
    """Yield the ids before the first stop sequence. Ids that may begin a stop sequence are held back until that is decided."""
    stops = StopFilter(stop_tokens)
    yield from stops.free(ids)
    yield from stops.held


def until_stop_text(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Yield the pieces of a text before the first of the stop strings."""
    chars = StopFilter(stops)
    for piece in pieces:
        if free := "".join(chars.free(piece)):
            yield free
        if chars.stopped:
            return
    if chars.held:
        yield "".join(chars.held)
