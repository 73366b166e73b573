"""Drafted and checked tokens have the target's distribution, and are its own where nothing is drawn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.__main__ import main
from litgpt.errors import UserError
from litgpt.generate import drafts, engine
from litgpt.generate.drafts import Lookup, generate, verify
from litgpt.generate.sampling import Sampling, sample
from tests.helpers import tiny
from tests.helpers.cases import first, quick
from tests.helpers.family_configs import ours
from tests.helpers.runs import greedy_words


@pytest.mark.parametrize("k", quick([1, 3, 7], 3))
def test_greedy_text_is_the_targets_own(k: int) -> None:
    target, prompt = tiny.tiny(1), tiny.ids(1, 9)[0]
    expected = list(tiny.generate(target, prompt, 39, temperature=0.0))
    for draft, least in ((tiny.tiny(2, n_layer=1), 0.0), (tiny.tiny(1), 1.0)):
        kept: list[int] = []
        assert list(generate(draft, target, prompt.tolist(), 39, Sampling(temperature=0.0), k, kept=kept)) == expected
        assert sum(kept) >= least * (30 - 2 * len(kept)) and target.blocks[0].attn.kv_cache is None


def test_sliding_windows_and_learned_positions() -> None:
    for family in ("mistral", "gpt2"):
        target, prompt = ours(family), tiny.ids(1, 9)[0]
        expected = list(tiny.generate(target, prompt, 24, temperature=0.0))
        assert list(generate(tiny.tiny(3), target, prompt.tolist(), 24, Sampling(temperature=0.0))) == expected, family


def repetitive(count: int = 30) -> list[int]:
    return (tiny.ids(1, 7)[0].tolist() * count)[:count]


@pytest.mark.parametrize(
    "settings",
    quick(
        [{}, {"skip2lora_enabled": True, "lora_r": 2}, {"lora_r": 2, "lora_query": True, "alora_enabled": True}],
        {"lora_r": 2, "lora_query": True, "alora_enabled": True},
    ),
)
def test_looked_up_drafts(settings: dict[str, Any]) -> None:
    """The target's own greedy text, in fewer passes; also where LoRA acts on the reply alone."""
    if settings.get("alora_enabled"):
        settings["alora_invocation_tokens"] = repetitive()[5:7]
    target = tiny.move_adapters(tiny.tiny(**settings))
    prompt = repetitive()
    expected = list(tiny.generate(target, torch.tensor(prompt), 60, temperature=0.0))
    kept: list[int] = []
    assert list(generate("prompt_lookup", target, prompt, 60, Sampling(temperature=0.0), 10, kept=kept)) == expected
    assert kept and target.blocks[0].attn.kv_cache is None and (target.switch is None or target.switch.start is None)


def test_what_is_looked_up() -> None:
    """What followed the longest end of the text that stood before, where it stood last."""
    look = Lookup(50, torch.device("cpu"))
    assert look([1, 2, 3], 4)[0] == []
    assert look([1, 2, 3, 4, 9, 2, 3], 4)[0] == [4, 9, 2, 3]
    assert look([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 2)[0] == [4, 9]  # three tokens count more than the later two
    drafted, q = look([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3, 7, 2, 3], 1)
    assert drafted == [7] and torch.equal(q[0], torch.nn.functional.one_hot(torch.tensor(7), 50).float())


def test_the_distribution_with_certain_drafts() -> None:
    """Chi-square of the first token: a certain draft is kept with its probability under the target."""
    generator, N, V = torch.Generator().manual_seed(0), 5_000, 6
    p = (2 * torch.randn(2, V, generator=generator)).softmax(-1)
    q = torch.zeros(V)
    q[int(p[0].argmax())] = 1.0
    counts = torch.zeros(V)
    for _ in range(N):
        counts[verify(p, [q], [int(q.argmax())], generator)[0]] += 1
    assert ((counts - N * p[0]) ** 2 / (N * p[0])).sum() < 20.5  # 5 degrees of freedom: p = 0.001


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


def with_heads(**settings: Any) -> Any:
    """A model with random heads, which draft badly."""
    model = tiny.tiny(mtp_heads=3, **settings)
    for head in model.mtp_heads:
        torch.nn.init.normal_(head.down, std=0.1)
    return model


HEADED = [
    {"lora_r": 2, "skip2lora_enabled": True, "mtp_taps": True},
    {"lora_r": 4, "lora_query": True},
    {"lora_r": 2, "skip2lora_enabled": True},
    {},
]


@pytest.mark.parametrize("settings", first(HEADED))
def test_greedy_text_with_heads_is_the_models_own(settings: dict[str, Any]) -> None:
    target, kept = tiny.move_adapters(with_heads(**settings)), list[int]()
    prompt = tiny.ids(1, 9)[0]
    expected = list(tiny.generate(target, prompt, 60, temperature=0.0))
    assert list(generate("heads", target, prompt.tolist(), 60, Sampling(temperature=0.0), 3, kept=kept)) == expected
    assert min(kept) == 0 and target.blocks[0].attn.kv_cache is None


@pytest.mark.parametrize("reads_taps", [False, True])
def test_heads_draft_what_they_predict_behind_the_last_token(reads_taps: bool) -> None:
    """Head k's own definition, on the model's states: the drafts at the second pass, and that all of them are kept if they are right."""
    model, prompt = with_heads(mtp_taps=reads_taps), tiny.ids(1, 9)[0].tolist()
    cached = drafts._Cached(model, prompt, 60)
    drafter = partial(drafts.by_heads, cached, Sampling(temperature=0.0), None)
    assert drafter(prompt, 3) == ([], [])
    first = int(cached.logits(prompt, 1).argmax())
    drafted, q = drafter([*prompt, first], 3)
    model.clear_kv_cache()
    with torch.no_grad():
        x, taps = model.prefix(torch.tensor([prompt]))
        h = model.tail(x, taps)[0, -1]
        for token, p, head in zip(drafted, q, model.mtp_heads, strict=True):
            assert token == int(p.argmax()) == int(model.logits(head(h, model.transformer["wte"].weight[first], taps[0, -1])).argmax())


@pytest.mark.slow
@torch.no_grad()
def test_the_distribution_with_heads_is_the_models() -> None:
    """Chi-square of the two tokens that heads drafted, against the exact probabilities of the model behind a given token."""
    V, N, prompt, generator = 4, 1500, [1, 2, 3, 0], torch.Generator().manual_seed(0)
    model = with_heads(vocab_size=V, padded_vocab_size=V, n_layer=1)
    cached, counts = drafts._Cached(model, prompt, 8), torch.zeros(V, V)
    cached.logits(prompt[:-1], 1)
    drafter = partial(drafts.by_heads, cached, Sampling(), generator)
    after = model(torch.tensor([[*prompt, b, 0] for b in range(V)])).softmax(-1)  # (b, T, V)
    first, second = after[0, 3], after[:, 4]
    for _ in range(N):
        drafted, q = drafter(prompt, 2)
        new = verify(torch.stack((first, second[drafted[0]], first)), q, drafted, generator)
        last = new[1] if len(new) > 1 else int(torch.multinomial(second[new[0]], 1, generator=generator))
        counts[new[0], last] += 1
    expected = N * first[:, None] * second
    assert expected.min() > 3 and (q[0] - first).abs().max() > 0.1
    assert ((counts - expected) ** 2 / expected).sum() < 37.7  # 15 degrees of freedom: p = 0.001


def test_probabilities_are_those_of_sample() -> None:
    logits, settings = torch.tensor([0.3, 2.0, -1.0, 1.1, 0.0, 1.9]), {"temperature": 0.7, "top_k": 4, "top_p": 0.8, "min_p": 0.1}
    generator, N = torch.Generator().manual_seed(0), 4000
    p = Sampling(**settings).probabilities(torch.stack((logits, logits.flip(0))))  # type: ignore[arg-type]
    assert torch.equal(p[0], p[1].flip(0)) and torch.isclose(p.sum(-1), torch.ones(2)).all()
    drawn = torch.tensor([int(sample(logits, **settings, generator=generator)) for _ in range(N)])  # type: ignore[arg-type]
    assert torch.allclose(drawn.bincount(minlength=6) / N, p[0], atol=0.035) and (p[0] > 0).sum() < 4
    assert Sampling(temperature=0.0).probabilities(logits[None]).tolist() == [[0, 1, 0, 0, 0, 0]]


def test_refusals() -> None:
    prompt: Any = [1, 2, 3]
    with pytest.raises(UserError, match="choose models of one family"):
        next(generate(tiny.tiny(vocab_size=90, padded_vocab_size=90), tiny.tiny(), prompt, 9, Sampling()))
    with pytest.raises(UserError, match="LongRoPE"):
        next(generate(ours("phi3 longrope"), tiny.tiny(), prompt, 9, Sampling()))


def test_generate_with_looked_up_drafts(
    tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    words = greedy_words(base, "why why why why?", 20)
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert main([*words, "--speculate", "prompt_lookup"]) == 0
    shown = capsys.readouterr()
    assert shown.out == plain and " drafts" in shown.err and "compile" not in shown.err
    assert main([*words, "--speculate", "prompt_lookup", "--compile", "true"]) == 0
    shown = capsys.readouterr()
    assert shown.out == plain and "compile: drafts are checked several tokens at a time, which is not compiled" in shown.err


def test_generate_speculatively(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The command answers as the large model does."""
    small = tiny.write_base(tmp_path / "small", write_tiny_tokenizer, n_layer=1)
    large = tiny.write_base(tmp_path / "large", write_tiny_tokenizer)
    words = ["--prompt", "why?", "--max_new_tokens", "20", "--temperature", "0", "--precision", "32-true"]
    assert main(["generate_speculatively", str(small), str(large), *words]) == 0
    shown = capsys.readouterr()
    assert main(["generate", str(large), *words]) == 0
    assert shown.out == capsys.readouterr().out and " tokens from " in shown.err and " drafts, peak memory" in shown.err


@pytest.mark.parametrize("draft", ["heads", "prompt_lookup"])
@pytest.mark.parametrize("invoked", [True, False])
def test_answer_only_lora_on_the_output_layer(draft: Any, invoked: bool) -> None:
    prompt = [5, 9, 5, 9, 7, 12]
    settings = {"lora_r": 3, **tiny.ALL_LORA, "alora_enabled": True, "alora_invocation_tokens": prompt[-2:] if invoked else [60, 61]}
    model = tiny.move_adapters(tiny.tiny(**settings, mtp_heads=2))
    [expected] = engine.most_probable(model, [prompt], 20)
    assert list(generate(draft, model, prompt, len(prompt) + 20, Sampling(temperature=0.0), 2)) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", ["draft", "target"])
def test_output_that_is_not_finite(broken: str, temperature: float) -> None:
    models = {"draft": tiny.tiny(seed=2), "target": tiny.tiny()}
    models[broken].head.weight.data[7] = torch.nan
    with pytest.raises(UserError, match="the model's output is not finite"):
        list(generate(models["draft"], models["target"], [1, 2, 3], 12, Sampling(temperature)))
