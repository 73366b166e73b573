"""Draws against their closed-form distribution; stop sequences by brute force."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from litgpt.generate.sampling import Sampling, sample, until_stop, until_stop_text


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
        pytest.param(0.5, None, 1.0, marks=pytest.mark.slow),
        pytest.param(1.0, 3, 1.0, marks=pytest.mark.slow),
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
    generator, tensor, N = torch.Generator().manual_seed(0), torch.tensor(logits), 2000
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
