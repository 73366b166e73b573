"""The decoding loop: answers that grow together in one key/value cache, each at its own position.

They join and leave the batch between any two steps. A single answer, and a conversation, is a batch of one row.

Letters in shapes: as in `litgpt.model`; n the rows of a step.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from litgpt.errors import UserError
from litgpt.generate.sampling import Sampling, StopFilter, until_stop
from litgpt.model import GPT, KVCache, Positions, evaluating
from litgpt.rope import is_long
from litgpt.sharding import is_sharded
from litgpt.text import counted

MOST_ROWS = 32  # answers that `generate_batch` computes at a time
FIRST_ROOM = 256  # positions of a new cache
MOST_PAST = 64  # rows that have left and whose keys and values are kept
LEAST_SHARED = 8  # tokens at the beginning of two prompts that are worth a copy


@dataclass(eq=False)
class Row:
    """One answer. `tokens` are prompt and answer so far."""

    tokens: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    generator: torch.Generator | None = None
    head: Any = None  # for subclasses of Batch: what is added at the output layer

    def __post_init__(self) -> None:
        self.start = len(self.tokens)  # of the answer
        self.computed = 0  # tokens whose keys and values are in the cache
        self.reply: int | None = None  # where answer-only LoRA begins, once it is known

    def draw(self, logits: torch.Tensor) -> int:
        """Draw the next token from the logits (V,), append it to the row's and return it."""
        self.tokens.append(self.sampling.draw(logits, self.tokens, self.start, self.generator))
        return self.tokens[-1]


@dataclass
class Past:
    """Keys and values of a row that has left: (G, T, h) each, one pair a block."""

    tokens: list[int]
    values: list[tuple[torch.Tensor, torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.values)


class Batch:
    """Rows of one model. The model holds the cache during a step only, so that it can be used for other work in between.

    The first `ready` rows lack only the keys and values of their last token; the others wait for their prompts to be computed. `chunk` is
    the number of prompt tokens that a step computes besides the ready rows' tokens, so that long prompts do not halt the others; None: all.
    A prompt copies the keys and values of its beginning from a row with the same tokens, present or past; `keep_bytes` of past rows stay.
    """

    def __init__(self, model: GPT, chunk: int | None = None, keep_bytes: int = 0) -> None:
        self.model = model
        self.chunk = None if model.config.rope_kind == "longrope" else chunk  # its factors depend on the complete prompt
        self.rows: list[Row] = []
        self.ready = 0
        self.caches: list[KVCache] = []  # one a block
        self.keep_bytes = keep_bytes
        self.past: list[Past] = []  # the newest last
        self.device = next(model.parameters()).device

    def add(self, row: Row) -> None:
        """Let a row take part from the next step on."""
        self.rows.append(row)

    @torch.inference_mode()
    def remove(self, row: Row) -> None:
        """Take a row out; another takes its place in the cache."""
        hole, last = self.rows.index(row), len(self.rows) - 1
        if self.keep_bytes and row.computed:
            self._keep(row, hole)
        if hole < self.ready:
            self.ready -= 1
            self._move(self.ready, hole)
            hole = self.ready
        self._move(last, hole)
        del self.rows[last]
        if not self.rows:
            self.caches = []

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, torch.Tensor]]:
        """Run the model once over every ready row's last token and some prompts. Return the rows with logits (V,) of their next token.

        The caller draws a token for each, or removes it. A cache that `set_kv_cache` has made is not used, and stays.
        """
        blocks = self.model.blocks
        given = [block.attn.kv_cache for block in blocks]
        self._restart_long_rows()
        self._make_room(len(self.rows), max((len(row.tokens) for row in self.rows), default=0))
        rows, outputs = self.rows[: self.ready], []
        try:
            if rows:
                outputs.append(self._run(rows, 0, 1))
            left = self.chunk
            while self.ready < len(self.rows) and left != 0:
                rows, size = self._next_prompts(left)
                left = None if left is None else left - size * len(rows)
                x = self._run(rows, self.ready, size)
                if rows[0].computed == len(rows[0].tokens):
                    outputs.append(x)
                    self.ready += len(rows)
        finally:
            for block, cache in zip(blocks, given, strict=True):
                block.attn.kv_cache = cache
        if not outputs:
            return []
        rows, x = self.rows[: self.ready], torch.cat(outputs)
        if self.model.switch is not None:  # for LoRA on the output layer
            self.model.switch.mask = torch.tensor([[len(row.tokens) > self._shareable(row)] for row in rows]).to(x)
        return list(zip(rows, self.model.logits(x), strict=True))

    def hidden(self, idx: torch.Tensor, pos: Positions, rows: Sequence[Row]) -> torch.Tensor:
        """Return the output layer's input at the last of the positions: idx (n, T) -> (n, d)."""
        return self.model.last(idx, pos)

    def _next_prompts(self, left: int | None) -> tuple[list[Row], int]:
        """Return the next rows whose prompts are computed together, and the number of tokens of each; all of them at most `left` tokens.

        A row that lacks fewer tokens than others recomputes some, so that all end together; in all, no more are recomputed than are new.
        None of the rows could copy more keys from the first.
        """
        first = self.rows[self.ready]
        if first.computed == 0:
            self._reuse(self.ready)
        size = new = len(first.tokens) - first.computed
        if left is not None and size > left:
            return [first], left
        rows, shortest = [first], len(first.tokens)
        for place in range(self.ready + 1, len(self.rows)):
            row = self.rows[place]
            if common(row.tokens, first.tokens) >= first.computed + LEAST_SHARED:
                break
            computed = row.computed
            if computed == 0:
                self._reuse(place)
            new += len(row.tokens) - row.computed
            widest, shortest = max(size, len(row.tokens) - row.computed), min(shortest, len(row.tokens))
            if widest > shortest or widest * (len(rows) + 1) > (2 * new if left is None else min(2 * new, left)):
                row.computed = computed
                break
            rows.append(row)
            size = widest
        return rows, size

    def _run(self, rows: list[Row], place: int, size: int) -> torch.Tensor:
        """Run `size` tokens of the rows from a place on, up to their last ones, or the next ones of a single row: (n, d)."""
        ends = [min(row.computed + size, len(row.tokens)) for row in rows]
        idx = torch.tensor([row.tokens[end - size : end] for row, end in zip(rows, ends, strict=True)], device=self.device)
        positions = torch.tensor(ends, device=self.device)[:, None] + torch.arange(-size, 0, device=self.device)
        for block, cache in zip(self.model.blocks, self.caches, strict=True):
            block.attn.kv_cache = cache.rows(place, len(rows)) if place else cache
        switch = self.model.switch
        replies = None if switch is None else torch.tensor([[self._shareable(row)] for row in rows], device=self.device)
        with nullcontext() if switch is None else switch.reply_at(replies):
            alike = min(ends) == max(ends)  # then no mask is needed
            x = self.hidden(idx, self.model.positions(idx, positions[0] if alike else positions, max(ends)), rows)
        for row, end in zip(rows, ends, strict=True):
            row.computed = end
        return x

    def _shareable(self, row: Row) -> int:
        """Return the number of the row's first tokens whose keys do not depend on the tokens behind them: those before its reply."""
        if self.model.switch is None:
            return len(row.tokens)
        if row.reply is None:
            row.reply = self.model.switch.start_of(row.tokens[: row.start])
        return row.reply

    def _restart_long_rows(self) -> None:
        """Recompute rows where LongRoPE switches to its long factors."""
        config = self.model.config
        for i in reversed(range(self.ready)):
            row = self.rows[i]
            if is_long(config, len(row.tokens)) and not is_long(config, len(row.tokens) - 1):
                row.computed = 0
                self.ready -= 1
                self._move(self.ready, i)
                self.rows[self.ready] = row

    def _keep(self, row: Row, place: int) -> None:
        """Keep the keys and values of a row; the oldest make room."""
        tokens = row.tokens[: min(row.computed, self._shareable(row))]
        values = [(cache.k[place, :, : len(tokens)].clone(), cache.v[place, :, : len(tokens)].clone()) for cache in self.caches]
        self.past = [past for past in self.past if past.tokens != tokens[: len(past.tokens)]]  # without those that this one begins with
        self.past.append(Past(tokens, values))
        while len(self.past) > MOST_PAST or sum(past.nbytes for past in self.past) > self.keep_bytes:
            del self.past[0]

    def _reuse(self, place: int) -> None:
        """Copy the keys and values of a row's longest prefix that another row, present or past, has. The last token is always computed."""
        if self.model.config.rope_kind == "longrope":
            return  # keys depend on the length
        row = self.rows[place]
        wanted, longest, values = row.tokens[: min(len(row.tokens) - 1, self._shareable(row))], LEAST_SHARED - 1, None
        for index, other in enumerate(self.rows):
            ready = other.tokens[: min(other.computed, self._shareable(other))]
            if other is not row and (length := common(wanted, ready)) > longest:
                longest, values = length, [(cache.k[index], cache.v[index]) for cache in self.caches]
        for past in self.past:
            if (length := common(wanted, past.tokens)) > longest:
                longest, values = length, past.values
        if values is not None:
            for cache, (k, v) in zip(self.caches, values, strict=True):
                cache.k[place, :, :longest], cache.v[place, :, :longest] = k[:, :longest], v[:, :longest]
            row.computed = longest

    def _move(self, source: int, target: int) -> None:
        """Put a row, with its keys and values, in the place of another."""
        row = self.rows[source]
        self.rows[target] = row
        if source != target and row.computed:
            for cache in self.caches:
                for values in (cache.k, cache.v):
                    values[target, :, : row.computed] = values[source, :, : row.computed]

    def _make_room(self, rows: int, length: int) -> None:
        """Let the cache hold `rows` rows of `length` positions; it grows by doubling."""
        old = self.caches[0].k.shape if self.caches else (0, 0, 0, 0)
        if rows <= old[0] and length <= old[2]:
            return
        rows = old[0] if rows <= old[0] else max(rows, 2 * old[0])
        length = old[2] if length <= old[2] else min(max(length, 2 * old[2], FIRST_ROOM), self.model.max_seq_length)
        sizes = self.model.config.cache_sizes
        caches = [KVCache(sizes, rows, length, next(block.parameters()).device, self.model.dtype) for block in self.model.blocks]
        for new, before in zip(caches, self.caches, strict=False):
            new.k[: old[0], :, : old[2]], new.v[: old[0], :, : old[2]] = before.k, before.v
        self.caches = caches


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of tokens at the beginning that are the same."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def check(model: GPT, prompt: Sequence[int], max_new_tokens: int) -> None:
    """Raise UserError for a prompt, and a number of tokens to follow, that do not fit the model."""
    T, V, limit = len(prompt), model.config.V, model.max_seq_length
    if T == 0:
        raise UserError("the prompt is empty: there is nothing to continue")
    if max(prompt) >= V:
        raise UserError(f"the prompt holds token id {max(prompt)}, the model has {V}: this tokenizer belongs to another model")
    if max_new_tokens < 1:
        alone = f"the prompt alone has {counted(T, 'token')}"
        raise UserError(f"max_returned_tokens is {T + max_new_tokens}, {alone}: ask for at least 1 new token")
    if T + max_new_tokens > limit:
        raise UserError(
            f"prompt and answer are {T} + {max_new_tokens} = {T + max_new_tokens} tokens, but the model reads at most {limit}: "
            "shorten the prompt or ask for fewer new tokens"
        )


class Session:
    """Answers of one model, one after the other, that share a cache: each computes only the tokens that the previous text did not have."""

    def __init__(self, model: GPT) -> None:
        self.batch = Batch(model)
        self.row = Row([])

    def answer(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        stop_tokens: Sequence[Sequence[int]] = (),
        generator: torch.Generator | None = None,
    ) -> Generator[int, None, None]:
        """Yield the ids that follow `prompt`, up to the first stop sequence. Raises UserError at the call for lengths that do not fit."""
        row = Row(list(prompt), sampling, generator)
        check(self.batch.model, row.tokens, max_new_tokens)

        def ids() -> Generator[int, None, None]:
            self.row, row.computed = row, self._shared(row.tokens)
            self.batch.rows, self.batch.ready = [row], 0
            with evaluating(self.batch.model):
                for _ in range(max_new_tokens):
                    [(_, logits)] = self.batch.step()
                    yield row.draw(logits)

        return until_stop(ids(), stop_tokens)

    def _shared(self, prompt: list[int]) -> int:
        """Return how many tokens of the prompt have their keys and values in the cache. The last one is always computed."""
        model, old = self.batch.model, self.row.tokens
        shared = common(old[: self.row.computed], prompt[:-1])
        if model.switch is not None:
            shared = min(shared, model.switch.start_of(old))  # an earlier reply is read again, without LoRA
        return 0 if is_long(model.config, len(prompt)) != is_long(model.config, len(old)) else shared


@torch.no_grad()
def greedy(model: GPT, prompt: Sequence[int], most: int, stop_tokens: Sequence[Sequence[int]] = ()) -> list[int]:
    """Return the most probable ids that follow the prompt, at most `most`, from a sharded model, which all ranks run.

    There is no key-value cache: the weights are gathered for every token, which takes longer than reading the prompt again.
    """
    device = next(model.parameters()).device
    tokens, answer, stops = list(prompt), list[int](), StopFilter(stop_tokens)

    def logits() -> torch.Tensor:  # (V,)
        idx = torch.tensor([tokens], device=device)
        return model.logits(model.last(idx, model.positions(idx))[0])

    with evaluating(model):
        while len(tokens) < len(prompt) + most and not stops.stopped:
            tokens.append(int(model.within(logits).argmax()))
            answer += stops.push(tokens[-1])
    return answer + stops.held


def generate_batch(
    model: GPT,
    prompts: Iterable[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_tokens: Sequence[Sequence[int]] = (),
    generators: Iterator[torch.Generator | None] | None = None,
    ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Return the ids that follow each prompt, as `Session.answer` does for one, `MOST_ROWS` prompts at a time.

    `generators` has one for each prompt; `ended` returns whether an answer is complete, given its ids so far. Sums in another order may
    round differently from those of a single prompt.
    """
    rows = [Row(list(prompt), sampling, next(generators) if generators else None) for prompt in prompts]
    for row in rows:
        check(model, row.tokens, max_new_tokens)
    batch = Batch(model)
    waiting = sorted(rows, key=lambda row: -len(row.tokens))  # prompts of the same length are computed together
    answers, stops = {row: list[int]() for row in rows}, {row: StopFilter(stop_tokens) for row in rows}
    with evaluating(model):
        while waiting or batch.rows:
            while waiting and len(batch.rows) < MOST_ROWS:
                batch.add(waiting.pop())
            for row, logits in batch.step():
                answers[row] += stops[row].push(row.draw(logits))
                full = len(row.tokens) - row.start == max_new_tokens
                if full or stops[row].stopped or (ended and ended(answers[row])):
                    batch.remove(row)
    return [answers[row] + stops[row].held for row in rows]


def most_probable(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    most: int,
    stop_tokens: Sequence[Sequence[int]] = (),
    ended: Callable[[list[int]], bool] | None = None,
) -> list[list[int] | None]:
    """Return the most probable ids that follow each prompt, at most `most`; None for a prompt that fills `model.max_seq_length`.

    The longest prompt limits the length of all answers. The ranks of a sharded model run this together, and ignore `ended`.
    """
    fitting = [prompt for prompt in prompts if len(prompt) < model.max_seq_length]
    most = min([most, *(model.max_seq_length - len(prompt) for prompt in fitting)])
    if is_sharded(model):
        answers = iter([greedy(model, prompt, most, stop_tokens) for prompt in fitting])
    else:
        answers = iter(generate_batch(model, fitting, most, Sampling(temperature=0.0), stop_tokens, ended=ended))
    return [next(answers) if len(prompt) < model.max_seq_length else None for prompt in prompts]
