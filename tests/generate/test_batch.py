"""Answers of a batch against those of single calls: ragged prompts, every family, rows that come and go."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from litgpt.errors import UserError
from litgpt.generate.engine import Batch, Row, generate_batch, most_probable
from litgpt.generate.sampling import Sampling
from litgpt.model import GPT
from tests.helpers import tiny
from tests.helpers.cases import quick
from tests.helpers.family_configs import FAMILIES, ours

GREEDY = Sampling(temperature=0.0)
LENGTHS = (3, 11, 6, 20, 11)  # windows have 8 positions, LongRoPE's short factors reach 16 tokens
PROMPTS = [tiny.ids(1, length, seed=i)[0].tolist() for i, length in enumerate(LENGTHS)]


def single(model: GPT, prompt: list[int], new: int, **settings: Any) -> list[int]:
    return list(tiny.generate(model, torch.tensor(prompt), len(prompt) + new, **{"temperature": 0.0, **settings}))


@pytest.mark.parametrize("family", quick(FAMILIES, "phi3 longrope", "gemma2", "deepseek_v2", "gpt2"))
def test_ragged_prompts_of_every_family(family: str) -> None:
    model = ours(family)
    assert generate_batch(model, PROMPTS, 12, GREEDY) == [single(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("family", quick(["llama", "mistral", "phi3 longrope", "gpt2", "gemma2"], "mistral", "phi3 longrope", "gpt2"))
@pytest.mark.parametrize("chunk", quick([4, None], 4))
def test_rows_come_and_go(family: str, chunk: int | None) -> None:
    """A new row joins every second step, each has its own length, prompts are computed in parts; the cache grows meanwhile."""
    model, batch = ours(family), Batch(ours(family), chunk)
    rows = [Row(list(prompt), GREEDY) for prompt in PROMPTS]
    lengths = dict(zip(rows, (9, 2, 14, 5, 11), strict=True))
    waiting, steps, widest = rows[::-1], 0, 0
    while waiting or batch.rows:
        if waiting and steps % 2 == 0:
            batch.add(waiting.pop())
        for row, logits in batch.step():
            row.draw(logits)
            if len(row.tokens) - row.start == lengths[row]:
                batch.remove(row)
        steps, widest = steps + 1, max(widest, batch.ready)
    assert [row.tokens[row.start :] for row in rows] == [single(model, p, lengths[row]) for p, row in zip(PROMPTS, rows, strict=True)]
    assert widest >= 3 and batch.caches == []
    assert model.blocks[0].attn.kv_cache is None


@pytest.mark.parametrize("output", ["lm_head", "transformer.h.2"])
def test_adapters(output: str) -> None:
    taps = {"skip2lora_enabled": True, "lora_r": 3, "skip2lora_output_layer": output, "skip2lora_block_indices": [0, 1]}
    model = tiny.move_adapters(tiny.tiny(**taps, **tiny.ALL_LORA))
    assert generate_batch(model, PROMPTS, 9, GREEDY) == [single(model, prompt, 9) for prompt in PROMPTS]


def test_seeds_stops_and_more_prompts_than_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litgpt.generate.engine.MOST_ROWS", 2)
    model, settings = tiny.tiny().train(), {"temperature": 0.9, "top_k": 7, "presence_penalty": 0.5}
    stops = ([5], [17, 3], [90], [91], [92])
    seeds = range(len(PROMPTS))
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    answers = generate_batch(model, PROMPTS, 20, Sampling(**settings), stops, generators)  # type: ignore[arg-type]
    expected = [
        single(model, prompt, 20, stop_tokens=stops, generator=torch.Generator().manual_seed(seed), **settings)
        for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert answers == expected and min(map(len, answers)) < 20 and model.training
    assert all(len(ids) == 3 for ids in generate_batch(model, PROMPTS, 20, GREEDY, ended=lambda ids: len(ids) == 3))
    assert generate_batch(model, [], 20, GREEDY) == []


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3 longrope", "gpt2"])
def test_prompts_take_their_beginning_from_others(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of running rows and of past ones; a conversation that goes on computes what is new. LongRoPE computes all."""
    model, batch, computed = ours(family), Batch(ours(family), keep_bytes=10**6), list[int]()
    hidden = batch.hidden
    monkeypatch.setattr(batch, "hidden", lambda idx, pos, rows: (computed.append(idx.numel()), hidden(idx, pos, rows))[1])

    def answer(*prompts: list[int]) -> list[list[int]]:
        rows = [Row(list(prompt), GREEDY) for prompt in prompts]
        for row in rows:
            batch.add(row)
        for _ in range(6):
            for row, logits in batch.step():
                row.draw(logits)
        for row in rows:
            batch.remove(row)
        assert [row.tokens[row.start :] for row in rows] == [single(model, row.tokens[: row.start], 6) for row in rows]
        return [row.tokens for row in rows]

    long = PROMPTS[3]
    (first,) = answer(long)
    assert computed == [20, 1, 1, 1, 1, 1]
    second = [*first, 5, 6, 7]
    computed.clear()
    answer(second, [*long[:12], 3, 3], [1, 2, 3])
    if family == "phi3 longrope":
        assert computed[:3] == [29, 14, 3] and len(batch.past) == 3
    else:
        assert computed[:2] == [2 * (29 - 25), 3]  # the last of an answer has no keys yet; the second row lacks 2, and computes as many
        assert [past.tokens[:20] == long for past in batch.past] == [True, False, False]
    computed.clear()
    answer(second)
    assert computed[0] == (29 if family == "phi3 longrope" else 1)
    batch.keep_bytes = 1
    answer([9, 9, 9])
    assert batch.past == []


ALORA = {"lora_r": 2, **tiny.ALL_LORA, "alora_enabled": True, "alora_invocation_tokens": [7, 8]}


@pytest.mark.parametrize("settings", [{}, ALORA], ids=["base", "answer-only LoRA"])
def test_prompts_with_the_same_beginning(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is computed once, and then the rest of all prompts together. Answer-only LoRA shares what stands before the last reply."""
    model = tiny.move_adapters(tiny.tiny(**settings))
    batch, shapes = Batch(model, keep_bytes=10**6), list[tuple[int, ...]]()
    hidden = batch.hidden
    monkeypatch.setattr(batch, "hidden", lambda idx, pos, rows: (shapes.append(tuple(idx.shape)), hidden(idx, pos, rows))[1])
    stem = [*PROMPTS[3][:8], 7, 8, 9]  # with an earlier reply
    rows = [Row([*stem, *own, 7, 8], GREEDY) for own in ([1, 2], [3, 4], [5, 6], [9, 2, 1], [1, 2])]
    for row in rows:
        batch.add(row)
    for _ in range(6):
        for row, logits in batch.step():
            row.draw(logits)
    assert shapes[:3] == [(1, 15), (4, 5), (5, 1)]
    for row in rows:
        assert all(
            int(model(torch.tensor([row.tokens[:end]]))[0, -1].argmax()) == row.tokens[end] for end in range(row.start, row.start + 6)
        )
    batch.remove(rows[0])
    assert batch.past[0].tokens == (rows[0].tokens[:13] if settings else rows[0].tokens[:-1])


def test_prompts_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="3 \\+ 62 = 65 tokens"):
        generate_batch(tiny.tiny(n_layer=1), PROMPTS, 62, GREEDY)


def test_most_probable_answers_of_prompts_that_may_not_fit() -> None:
    model = tiny.tiny()
    full = tiny.ids(1, model.max_seq_length, seed=9)[0].tolist()
    long = full[:-2]
    assert most_probable(model, [PROMPTS[0], full, PROMPTS[1]], 9) == [single(model, PROMPTS[0], 9), None, single(model, PROMPTS[1], 9)]
    assert most_probable(model, [PROMPTS[0], long], 9) == [single(model, PROMPTS[0], 2), single(model, long, 2)]
    assert most_probable(model, [full], 9) == [None]
    assert most_probable(model, [PROMPTS[0]], 9, ended=lambda ids: len(ids) == 4) == [single(model, PROMPTS[0], 4)]
