"""Drafted and checked tokens have the target's distribution, and are its own where nothing is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.__main__ import main
from litgpt.errors import UserError
from litgpt.generate import engine
from litgpt.generate.sampling import Sampling, sample
from litgpt.generate.speculative import generate, verify
from tests.helpers import tiny
from tests.helpers.family_configs import ours


@pytest.mark.parametrize("k", [1, 3, 7])
def test_greedy_text_is_the_targets_own(k: int) -> None:
    target, prompt = tiny.tiny(1), tiny.ids(1, 9)[0]
    expected = list(engine.generate(target, prompt, 39, temperature=0.0))
    for draft, least in ((tiny.tiny(2, n_layer=1), 0.0), (tiny.tiny(1), 1.0)):
        kept: list[int] = []
        assert list(generate(draft, target, prompt.tolist(), 39, Sampling(temperature=0.0), k, kept=kept)) == expected
        assert sum(kept) >= least * (30 - 2 * len(kept)) and target.blocks[0].attn.kv_cache is None


def test_sliding_windows_and_learned_positions() -> None:
    for family in ("mistral", "gpt2"):
        target, prompt = ours(family), tiny.ids(1, 9)[0]
        expected = list(engine.generate(target, prompt, 39, temperature=0.0))
        assert list(generate(tiny.tiny(3), target, prompt.tolist(), 39, Sampling(temperature=0.0))) == expected, family


def test_the_distribution_is_the_targets() -> None:
    """Chi-square of the first token, and of the second where the first was kept: q does not show."""
    generator, N, V = torch.Generator().manual_seed(0), 5_000, 6
    p = (2 * torch.randn(2, V, generator=generator)).softmax(-1)
    q = (2 * torch.randn(V, generator=generator)).softmax(-1)
    first, second = torch.zeros(V), torch.zeros(V)
    for token in torch.multinomial(q, N, replacement=True, generator=generator).tolist():
        new = verify(p, [q], [token], generator)
        first[new[0]] += 1
        if len(new) == 2:
            second[new[1]] += 1
    for counts, expected in ((first, p[0]), (second, p[1])):
        chi = ((counts - counts.sum() * expected) ** 2 / (counts.sum() * expected)).sum()
        assert chi < 20.5  # 5 degrees of freedom: p = 0.001
    assert abs(second.sum() / N - torch.minimum(p[0], q).sum()) < 0.03  # as often as the paper says


def test_probabilities_are_those_of_sample() -> None:
    logits, settings = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.0, 1.9]), {"temperature": 0.7, "top_k": 4, "top_p": 0.8, "min_p": 0.1}
    generator, N = torch.Generator().manual_seed(0), 4000
    p = Sampling(**settings).probabilities(torch.stack((logits, logits.flip(0))))  # type: ignore[arg-type]
    assert torch.equal(p[0], p[1].flip(0)) and torch.isclose(p.sum(-1), torch.ones(2)).all()
    drawn = torch.tensor([int(sample(logits, **settings, generator=generator)) for _ in range(N)])  # type: ignore[arg-type]
    assert torch.allclose(drawn.bincount(minlength=6) / N, p[0], atol=0.035) and (p[0] > 0).sum() < 4
    assert Sampling(temperature=0.0).probabilities(logits[None]).tolist() == [[0, 1, 0, 0, 0, 0]]


def test_command(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]) -> None:
    small = tiny.write_base(tmp_path / "small", write_tiny_tokenizer, n_layer=1)
    large = tiny.write_base(tmp_path / "large", write_tiny_tokenizer)
    words = ["--prompt", "why?", "--max_new_tokens", "20", "--temperature", "0", "--precision", "32-true"]
    assert main(["generate_speculatively", str(small), str(large), *words]) == 0
    shown = capsys.readouterr()
    assert main(["generate", str(large), *words]) == 0
    assert shown.out == capsys.readouterr().out and "% of the drafted tokens kept" in shown.err


def test_refusals() -> None:
    prompt: Any = [1, 2, 3]
    with pytest.raises(UserError, match="choose models of one family"):
        next(generate(tiny.tiny(vocab_size=90, padded_vocab_size=90), tiny.tiny(), prompt, 9, Sampling()))
    with pytest.raises(UserError, match="LongRoPE"):
        next(generate(ours("phi3 longrope"), tiny.tiny(), prompt, 9, Sampling()))
