"""Answers that share a key/value cache are those of complete passes, and compute the new tokens only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from litgpt.generate.engine import Session
from litgpt.generate.sampling import Sampling
from tests.helpers import tiny
from tests.helpers.cases import quick

GREEDY = Sampling(temperature=0.0)
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 3.5, 6.0],
    "original_max_seq_len": 22,
}
LONGROPE["attention_factor"] = 1.2
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "longrope": {"rope_adjustments": LONGROPE},
    "window": {"sliding_window_size": 6, "sliding_window_indices": [1, 0, 1, 0, 1]},
    "lora": {"lora_r": 4, "lora_query": True, "lora_projection": True},
    "skip2lora": {"lora_r": 4, "skip2lora_enabled": True, "skip2lora_block_indices": [0, 2]},
}


def whole(model: Any, prompt: list[int], count: int) -> list[int]:
    return list(tiny.generate(model, torch.tensor(prompt), len(prompt) + count, temperature=0.0))


@pytest.mark.parametrize("kind", quick(KINDS, "longrope", "window", "skip2lora"))
def test_answers_are_those_of_complete_passes(kind: str) -> None:
    model = tiny.move_adapters(tiny.tiny(**KINDS[kind]))
    session, passed = Session(model), list[int]()
    model.transformer.wte.register_forward_hook(lambda module, given, out: passed.append(given[0].numel()))
    text = tiny.ids(1, 7)[0].tolist()
    for turn in range(4):
        passed.clear()
        answer = list(session.answer(text, 5, GREEDY))
        if kind != "longrope":  # where its factors change, all is computed again
            assert passed == [7 if turn == 0 else 4, 1, 1, 1, 1]  # the last answer's last token and three new ones; 4 are fed back
        assert answer == whole(model, text, 5)
        text = [*text, *answer, *tiny.ids(1, 3, seed=turn)[0].tolist()]
        assert model.blocks[0].attn.kv_cache is None
    for shorter in (text[:3], [*text[:9], 1, 2], [5], text):  # what differs is computed again
        assert list(session.answer(shorter, 4, GREEDY)) == whole(model, shorter, 4)


def test_the_logits_are_those_of_a_complete_pass() -> None:
    model = tiny.tiny()
    session, text = Session(model), tiny.ids(1, 20)[0].tolist()
    for end in (5, 6, 13, 20):
        list(session.answer(text[:end], 1, GREEDY))
    k = torch.cat([session.batch.caches[4].k[:, :, :20], session.batch.caches[4].v[:, :, :20]])
    fresh = Session(model)
    list(fresh.answer(text, 1, GREEDY))
    torch.testing.assert_close(k, torch.cat([fresh.batch.caches[4].k[:, :, :20], fresh.batch.caches[4].v[:, :, :20]]))


def test_an_answer_that_is_stopped_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.tiny()
    session, text = Session(model), tiny.ids(1, 7)[0].tolist()
    answer = session.answer(text, 20, GREEDY)
    begun = [next(answer), next(answer)]
    answer.close()
    assert model.blocks[0].attn.kv_cache is None and begun == whole(model, text, 2)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "tail", None)
        with pytest.raises(TypeError):
            list(session.answer([*text, 1, 2], 3, GREEDY))
    assert list(session.answer([*text, *begun, 3], 5, GREEDY)) == whole(model, [*text, *begun, 3], 5)


def test_stop_sequences_and_wrong_settings() -> None:
    session, text = Session(tiny.tiny()), tiny.ids(1, 7)[0].tolist()
    full = list(session.answer(text, 6, GREEDY))
    assert list(session.answer(text, 6, GREEDY, [[full[3]]])) == full[: full.index(full[3])]
    with pytest.raises(ValueError, match="at most 64"):
        session.answer(text, 60, GREEDY)
