"""LitGPT's functions that continue a prompt, compared with a loop over the model without a cache."""

from __future__ import annotations

import pytest
import torch

from litgpt.generate.base import generate, generate_fn, next_token
from litgpt.model import GPT
from tests.helpers import tiny

PROMPT = torch.tensor([3, 1, 4, 1, 5])


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(1)
    return tiny.tiny().eval()


def greedy(model: GPT, count: int) -> list[int]:
    ids = PROMPT.tolist()
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids


def test_generate(model: GPT) -> None:
    expected = greedy(model, 6)
    assert generate(model, PROMPT, len(expected), temperature=0.0).tolist() == expected
    assert generate(model, PROMPT, len(expected), top_k=1, include_prompt=False).tolist() == expected[5:]
    end = next(i for i in range(5, len(expected)) if expected[i] == expected[7])
    assert generate(model, PROMPT, len(expected), top_k=1, eos_id=expected[7]).tolist() == expected[: end + 1]


def test_generate_fn_stops(model: GPT) -> None:
    expected = greedy(model, 6)
    stop = ([expected[7], expected[8]],)
    end = next(i for i in range(5, len(expected)) if expected[i : i + 2] == expected[7:9])
    parts = list(generate_fn(model, PROMPT, len(expected), top_k=1, stop_tokens=stop, include_prompt=True, include_eos=True))
    assert torch.cat(parts).tolist() == expected[: end + 2] and parts[0] is PROMPT
    assert [int(part) for part in generate_fn(model, PROMPT, len(expected), top_k=1, stop_tokens=stop)] == expected[5:end]


def test_next_token(model: GPT) -> None:
    expected = greedy(model, 2)
    model.set_kv_cache(1)
    first = next_token(model, torch.arange(5), PROMPT[None], top_k=1)
    assert first.tolist() == expected[5:6]
    assert next_token(model, torch.tensor([5]), first[None], temperature=0.0).tolist() == expected[6:7]


def test_a_cache_stays_and_can_be_emptied(model: GPT) -> None:
    """As LitGPT's examples do: set the caches, generate, empty the caches."""
    model.set_kv_cache(1)
    caches = [block.attn.kv_cache for block in model.blocks]
    assert generate(model, PROMPT, 8, top_k=1).tolist() == greedy(model, 3)
    assert [block.attn.kv_cache for block in model.blocks] == caches
    expected = model(PROMPT[None], torch.arange(5))
    for block in model.transformer.h:
        assert block.attn.kv_cache.k.any()
        block.attn.kv_cache.reset_parameters()
        assert not block.attn.kv_cache.k.any() and not block.attn.kv_cache.v.any()
    torch.testing.assert_close(model(PROMPT[None], torch.arange(5)), expected)


def test_chunks_of_the_output_layer(model: GPT) -> None:
    parts = model(PROMPT[None], lm_head_chunk_size=2)
    assert [part.size(1) for part in parts] == [2, 2, 1]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(PROMPT[None]))
