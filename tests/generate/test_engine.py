"""Decoding against transformers and the full pass; draws against their closed-form distribution; stop sequences by brute force."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from litgpt.errors import UserError
from litgpt.generate.engine import Sampling, generate, sample, until_stop, until_stop_text
from tests.helpers import tiny


def greedy(model: Any, prompt: torch.Tensor, length: int, **settings: Any) -> list[int]:
    return list(generate(model, prompt, length, temperature=0.0, **settings))


@pytest.mark.parametrize("family", ["llama", "mistral", "neox"])
def test_greedy_text_of_transformers(family: str) -> None:
    changes = {"eos_token_id": None, "bos_token_id": None}
    hf = {"llama": tiny.hf_llama, "mistral": lambda **kw: tiny.hf_mistral(sliding_window=7, **kw), "neox": tiny.hf_neox}[family](**changes)
    prompt = tiny.ids(1, 9)
    want = hf.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False, pad_token_id=0)[0, 9:].tolist()
    assert len(want) == 30 and len(set(want)) > 2
    model = tiny.from_hf(hf)
    assert greedy(model, prompt[0], 39) == want
    stop = want[17]
    assert greedy(model, prompt[0], 39, stop_tokens=([stop],)) == want[: want.index(stop)]
    pair = want[20:22]
    first = next(i for i in range(29) if want[i : i + 2] == pair)
    assert greedy(model, prompt[0], 39, stop_tokens=(pair,)) == want[:first]


@pytest.mark.parametrize("output", ["lm_head", "transformer.ln_f", "transformer.h.2"])
def test_skip2lora_decodes_as_the_full_pass_says(output: str) -> None:
    settings = {
        "skip2lora_enabled": True,
        "lora_r": 3,
        "skip2lora_output_layer": output,
        "skip2lora_block_indices": [0, 1],
        **tiny.ALL_LORA,
    }
    model = tiny.move_adapters(tiny.tiny(**settings))
    ids = tiny.ids(1, 6)[0]
    got = greedy(model, ids, 30)
    with torch.no_grad():
        for token in got:
            assert int(model(ids[None])[0, -1].argmax()) == token
            ids = torch.cat((ids, torch.tensor([token])))
    assert got != greedy(tiny.tiny(), tiny.ids(1, 6)[0], 30)


def expected(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> dict[int, float]:
    """The distribution, from its definition."""
    weights = {i: torch.tensor(x / temperature, dtype=torch.float64).exp().item() for i, x in enumerate(logits)}
    best = sorted(weights, key=lambda i: -weights[i])[:top_k]
    total = sum(weights[i] for i in best)
    kept: list[int] = []
    while not kept or (sum(weights[i] for i in kept) / total < top_p and len(kept) < len(best)):
        kept.append(best[len(kept)])
    return {i: weights[i] / sum(weights[j] for j in kept) for i in kept}


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [
        (0.5, None, 1.0),
        (1.0, 3, 1.0),
        (1.0, None, 0.7),
        (0.7, 4, 0.8),
        pytest.param(1.0, None, 1.0, marks=pytest.mark.slow),
        pytest.param(2.0, None, 1.0, marks=pytest.mark.slow),
        pytest.param(1.0, 99, 1.0, marks=pytest.mark.slow),
        pytest.param(1.0, None, 0.0, marks=pytest.mark.slow),
    ],
)
def test_draws_follow_their_distribution(temperature: float, top_k: int | None, top_p: float) -> None:
    logits = [0.3, 2.0, -1.0, 1.1, 0.0, 1.9]
    want = expected(logits, temperature, top_k, top_p)
    generator, tensor, N = torch.Generator().manual_seed(0), torch.tensor(logits), 6000
    drawn = [int(sample(tensor, temperature, top_k, top_p, generator)) for _ in range(N)]
    assert set(drawn) == set(want)
    for token, p in want.items():
        assert abs(drawn.count(token) / N - p) <= 4.5 * (p * (1 - p) / N) ** 0.5


def test_sample_reads_the_last_row() -> None:
    logits = torch.randn(1, 3, 7, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits, temperature=0.0)
    assert drawn.shape == (1,) and int(drawn) == int(logits[0, -1].argmax())
    assert int(sample(logits, temperature=1e-30)) == int(sample(logits, temperature=1e-300)) == int(drawn)  # no overflow
    assert int(sample(logits, top_k=1)) == int(drawn)


def test_a_seed_repeats_the_draws() -> None:
    model, prompt = tiny.tiny(), tiny.ids(1, 5)[0]

    def run(seed: int) -> list[int]:
        return list(generate(model, prompt, 40, top_k=20, generator=torch.Generator().manual_seed(seed)))

    assert run(1) == run(1) != run(2)


def test_min_p_keeps_what_is_near_the_most_probable() -> None:
    logits, generator = torch.tensor([2.0, 1.0, 0.0, -3.0]), torch.Generator().manual_seed(0)
    p = logits.softmax(0)
    drawn = {int(sample(logits, generator=generator, min_p=0.2)) for _ in range(300)}
    assert drawn == {i for i in range(4) if p[i] >= 0.2 * p[0]} == {0, 1}
    assert {int(sample(logits, generator=generator, min_p=1.0)) for _ in range(50)} == {0}


def test_penalties_from_their_definitions() -> None:
    logits = torch.tensor([1.0, -1.0, 2.0, 0.5])
    tokens, start = [0, 1, 2, 2, 0], 2  # the answer is 2, 2, 0
    scores = Sampling(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, logit_bias={3: 4.0})
    expected = [1.0 / 2 - 0.25 - 0.5, -1.0 * 2, 2.0 / 2 - 0.25 - 2 * 0.5, 0.5 + 4.0]
    assert scores.penalised(logits, tokens, start).tolist() == expected
    assert logits.tolist() == [1.0, -1.0, 2.0, 0.5]
    assert Sampling().penalised(logits, tokens, start) is logits


def test_repetition_penalty_of_transformers() -> None:
    hf = tiny.hf_llama(eos_token_id=None, bos_token_id=None)
    prompt, settings = tiny.ids(1, 9), {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    want = hf.generate(prompt, attention_mask=torch.ones_like(prompt), repetition_penalty=1.7, **settings)[0, 9:].tolist()
    model = tiny.from_hf(hf)
    assert greedy(model, prompt[0], 39, repetition_penalty=1.7) == want != greedy(model, prompt[0], 39)


def test_text_before_a_stop_string() -> None:
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice("ab\n") for _ in range(12))
        stops = ["".join(rng.choice("ab\n") for _ in range(rng.randrange(1, 4))) for _ in range(2)]
        cuts = sorted(rng.sample(range(13), 4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
        ends = sorted((text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text)
        want = text[: sum(ends[0])] if ends else text
        assert "".join(until_stop_text(pieces, stops)) == want, (pieces, stops)


def reference(ids: list[int], stops: list[list[int]]) -> list[int]:
    for end in range(1, len(ids) + 1):
        ended = [stop for stop in stops if stop and ids[:end][-len(stop) :] == stop]
        if ended:
            return ids[: end - max(map(len, ended))]
    return ids


def test_stop_sequences_against_brute_force() -> None:
    rng = random.Random(0)
    stopped = 0
    for _ in range(2000):
        stops = [[rng.randrange(3) for _ in range(rng.randrange(0, 5))] for _ in range(rng.randrange(4))]
        ids = [rng.randrange(3) for _ in range(rng.randrange(15))]
        got = list(until_stop(iter(ids), stops))
        assert got == reference(ids, stops), (ids, stops)
        stopped += len(got) < len(ids)
    assert stopped > 500


def test_half_a_stop_sequence_is_held_back() -> None:
    """Nothing of [7, 8, 9] leaves before it is clear that it is not one; everything else leaves at once."""
    read: list[int] = []

    def source() -> Any:
        for token in (1, 7, 8, 7, 8, 9, 4):
            read.append(token)
            yield token

    out = until_stop(source(), ([7, 8, 9],))
    assert (next(out), list(read)) == (1, [1])
    assert (next(out), list(read)) == (7, [1, 7, 8, 7])  # 7 8 7: the first two are free now
    assert list(out) == [8] and read == [1, 7, 8, 7, 8, 9]
    assert list(until_stop(iter([1, 7, 8]), ([7, 8, 9],))) == [1, 7, 8]  # the end came, it was none


def test_cache_is_as_long_as_needed_and_goes() -> None:
    model = tiny.tiny()
    ids = generate(model, tiny.ids(1, 9)[0], 15, temperature=0.0)
    next(ids)
    assert model.blocks[0].attn.kv_cache.k.shape == (1, 2, 14, 8)
    assert len(list(ids)) == 5
    assert model.blocks[0].attn.kv_cache is None
    ids = generate(model, tiny.ids(1, 9)[0], 15, temperature=0.0)
    next(ids)
    ids.close()
    assert model.blocks[-1].attn.kv_cache is None


def test_prompt_computes_one_row_of_logits() -> None:
    model, seen = tiny.tiny(), []
    model.lm_head.register_forward_hook(lambda module, given, out: seen.append((tuple(out.shape), out.is_inference())))
    for _ in generate(model, tiny.ids(1, 20)[0], 23, temperature=0.0):
        assert not torch.is_inference_mode_enabled()  # the caller's code is not drawn in
    assert seen == [((1, 101), True)] * 3


def test_mode_is_restored_and_training_goes_on() -> None:
    model = tiny.move_adapters(tiny.tiny(lora_r=2, lora_dropout=0.5, **tiny.ALL_LORA))
    prompt = tiny.ids(1, 9)[0]
    want = greedy(model, prompt, 30)
    assert greedy(model.train(), prompt, 30) == want  # no dropout meanwhile
    assert model.training
    model(prompt[None]).sum().backward()
    assert model.transformer.h[0].attn.qkv.lora_A.grad.abs().sum() > 0


def test_two_answers_at_once_are_refused() -> None:
    model, prompt = tiny.tiny(), tiny.ids(1, 9)[0]
    first = generate(model, prompt, 20, temperature=0.0)
    next(first)
    second = generate(model, prompt, 20, temperature=0.0)
    tokens = [next(second)]
    with pytest.raises(UserError, match="one after the other"):
        next(first)
    assert tokens + list(second) == greedy(model, prompt, 20)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 65}, ["9 + 56 = 65 tokens", "at most 64"]),
        ({"length": 9}, ["max_returned_tokens is 9", "9 tokens"]),
        ({"prompt": torch.tensor([], dtype=torch.long)}, ["empty"]),
        ({"prompt": torch.tensor([3, 101])}, ["id 101", "knows 101"]),
        ({"temperature": -0.5}, ["temperature is -0.5"]),
        ({"temperature": float("nan")}, ["temperature is nan"]),
        ({"top_k": 0}, ["top_k is 0"]),
        ({"top_p": 1.5}, ["top_p is 1.5"]),
        ({"top_p": -0.1}, ["top_p is -0.1"]),
        ({"min_p": 2.0}, ["min_p is 2.0"]),
        ({"repetition_penalty": 0.0}, ["repetition_penalty is 0.0"]),
        ({"presence_penalty": float("inf")}, ["presence_penalty is inf"]),
    ],
    ids=str,
)
def test_what_is_refused_before_anything_runs(settings: dict[str, Any], words: list[str]) -> None:
    arguments: dict[str, Any] = {"prompt": tiny.ids(1, 9)[0], "length": 20, **settings}
    with pytest.raises(UserError) as caught:
        generate(tiny.tiny(n_layer=1), arguments.pop("prompt"), arguments.pop("length"), **arguments)  # not even iterated
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_whole_context_can_be_used() -> None:
    model = tiny.tiny(n_layer=1)
    assert len(greedy(model, tiny.ids(1, 9)[0], 64)) == 55
    model.max_seq_length = 32
    with pytest.raises(UserError, match="at most 32"):
        generate(model, tiny.ids(1, 9)[0], 33)
