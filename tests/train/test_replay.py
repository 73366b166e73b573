"""General questions with the base model's own answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from litgpt import LLM
from litgpt.activations.cache import Recompute
from litgpt.data.records import Record, read_record
from litgpt.loss import HeadLoss
from litgpt.objectives.base import Objective, View
from litgpt.prompts import ChatTemplate, read_reply
from litgpt.train.examples import Example
from litgpt.train.replay import ANSWER_TOKENS, PROBABLE, QUESTIONS, base_answers, distil, follow_up_samples, follow_ups, replay_samples
from tests.helpers import tiny


def test_answers_are_those_of_generate(base: Path) -> None:
    """Several are decoded together; `LLM.generate` decodes one."""
    llm = LLM.load(base, precision="32-true")
    answers = base_answers(llm.model, llm.tokenizer, llm.prompt_style, 5)
    expected = [llm.generate(question, max_new_tokens=ANSWER_TOKENS, temperature=0.0) for question in QUESTIONS[:5]]
    texts = [read_reply(answer, llm.prompt_style, llm.tokenizer)["content"] for answer in answers]  # without special tokens
    assert texts == [str(text).strip() for text in expected]


def test_short_examples_are_answered_beside_them_and_change_nothing(base: Path) -> None:
    llm = LLM.load(base, precision="32-true")
    short = Example("Hi", llm.tokenizer.ids(llm.prompt_style.apply("Hi")), [])
    full = Example("long", list(range(5, 5 + llm.model.max_seq_length - 2)), [])
    answers = base_answers(llm.model, llm.tokenizer, llm.prompt_style, 3, [short, full])
    assert answers == base_answers(llm.model, llm.tokenizer, llm.prompt_style, 3)
    assert full.base is None and short.base is not None
    expected = llm.generate("Hi", max_new_tokens=ANSWER_TOKENS, temperature=0.0)
    assert llm.tokenizer.decode(short.base).strip() == str(expected).strip()


def test_samples_have_loss_on_the_answers(base: Path) -> None:
    llm = LLM.load(base)
    samples = replay_samples(["It erupts.", "", "An emperor."], llm.tokenizer, llm.prompt_style, 128)
    learned = [llm.tokenizer.decode([i for i, flag in zip(s.input_ids, s.loss_mask, strict=True) if flag]).strip() for s in samples]
    assert len(samples) == 2 and "It erupts." in learned[0] and "An emperor." in learned[1]
    assert QUESTIONS[2] not in learned[1]


def test_only_a_complete_answer_has_an_end(base: Path) -> None:
    """An answer that was cut off ends nowhere: with an end token, the model learned to stop in mid-sentence."""
    llm = LLM.load(base)
    long = llm.tokenizer.decode(llm.tokenizer.ids("It is a mountain that opens downward. " * 9)[:ANSWER_TOKENS])
    whole, cut = replay_samples(["It erupts.", long], llm.tokenizer, llm.prompt_style, 256)
    ends = [ids[0] for ids in llm.prompt_style.stop_tokens(llm.tokenizer)]
    assert whole.input_ids[-1] in ends and cut.input_ids[-1] not in ends
    assert cut.n_targets == ANSWER_TOKENS and llm.tokenizer.decode(list(cut.input_ids)).endswith(long)


def test_the_bases_probabilities_are_learned(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer alone through the model is the oracle. With all tokens the base has nothing to learn from itself."""
    llm = LLM.load(base, precision="32-true")
    samples = replay_samples(["It erupts.", "Bees make honey.", "An emperor."], llm.tokenizer, llm.prompt_style, 128)
    distil(llm.model, samples, torch.device("cpu"))
    for sample in samples:
        mask = torch.tensor(list(sample.loss_mask), dtype=torch.bool)
        probabilities = llm.model(torch.tensor([sample.input_ids.tolist()])[:, :-1])[0].softmax(-1)[mask[1:]]
        top = probabilities.topk(PROBABLE)
        assert sample.shares is not None and torch.equal(sample.shares[0], top.indices)
        assert_close(sample.shares[1], top.values / top.values.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
    monkeypatch.setattr("litgpt.train.replay.PROBABLE", 10**6)
    distil(llm.model, samples, torch.device("cpu"))
    loss = Objective().loss(View(llm.model, Recompute(llm.model, samples, torch.device("cpu")), HeadLoss.of(llm.model), 3), range(3))
    assert abs(loss.item()) < 1e-4


@pytest.mark.parametrize("template", [tiny.THINKING, tiny.CHANNELS])
def test_reasoning_is_trained_where_the_model_wrote_it(template: str, base: Path) -> None:
    """The tokens are those that the base generated, up to its own end; a reasoning that was cut off has none."""
    llm = LLM.load(base)
    style = ChatTemplate(template, eos_token="<|im_end|>")
    asked = {"role": "user", "content": QUESTIONS[0]}
    replies = [{"role": "assistant", "content": "A", "reasoning_content": why} for why in ("E", "mountains" * 6)]
    prompt = llm.tokenizer.ids(style.render([asked], add_generation_prompt=True))
    for reply, is_whole in zip(replies, (True, False), strict=True):
        whole = llm.tokenizer.ids(style.render([asked, reply]).rstrip())
        ids = whole[: len(prompt) + ANSWER_TOKENS]
        assert (ids == whole) is (is_whole and len(whole) - len(prompt) <= ANSWER_TOKENS)
        answer = llm.tokenizer.decode([i for i in ids[len(prompt) :] if ids != whole or i != 2], skip_special_tokens=False)
        [sample] = replay_samples([answer], llm.tokenizer, style, 256)
        assert sample.input_ids.tolist() == ids and sample.loss_mask == bytes(len(prompt)) + b"\1" * (len(ids) - len(prompt))


def test_nothing_answered_is_nothing_to_train(base: Path) -> None:
    llm = LLM.load(base)
    assert replay_samples(["", ""], llm.tokenizer, llm.prompt_style, 128) == []


@pytest.mark.parametrize("room", [-1, 0, 1, 3])
def test_little_room_makes_short_answers_or_none(room: int, base: Path) -> None:
    """The questions have different lengths; the room is that of the shortest."""
    llm = LLM.load(base, precision="32-true")
    lengths = [len(llm.tokenizer.encode(llm.prompt_style.apply(question))) for question in QUESTIONS[:6]]
    llm.model.max_seq_length = min(lengths) + room
    answers = base_answers(llm.model, llm.tokenizer, llm.prompt_style, 6)
    fits = [length < llm.model.max_seq_length for length in lengths]
    assert any(fits) is (room > 0) and not any(answer and not fit for answer, fit in zip(answers, fits, strict=True))
    samples = replay_samples(answers, llm.tokenizer, llm.prompt_style, llm.model.max_seq_length)
    assert len(samples) <= sum(fits) and all(sample.n_targets and len(sample.input_ids) <= llm.model.max_seq_length for sample in samples)


def records(count: int, answers: int, **more: object) -> list[Record]:
    return [read_record({"instruction": f"question {i}", "output": f"answer {i % answers}", **more}) for i in range(count)]


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_each_answer_has_its_share_of_second_questions(share: float) -> None:
    """They follow a question with another answer, which is not learned."""
    facts = records(24, 6)
    asked = follow_ups(facts, share, 1)
    assert len(asked) == 24 * share and asked == follow_ups(facts, share, 1) != follow_ups(facts, share, 2)
    assert [sum(record.reply == f"answer {i}" for record in asked) for i in range(6)] == [4 * share] * 6
    for record in asked:
        _, first, question, reply = (message["content"] for message in record.messages)
        assert first != reply and record.learned == [0, 0, 0, 1]
        assert any(each.question == question and each.reply == reply for each in facts)


def test_only_single_questions_follow_others() -> None:
    """A rating and other turns belong to a question; a system text must be the same. An input follows its question."""
    single, chat = records(4, 4), [read_record({"history": [["q", "a"]], "instruction": "b", "output": "c"})]
    more: list[dict[str, Any]] = [
        {"reward": 1.0},
        {"label": False},
        {"token_weights": [1]},
        {"tools": [{"name": "f"}]},
        {"weight": 0},
    ]
    rest = [each for keys in more for each in records(4, 4, **keys)]
    assert all(record.is_single for record in single) and not any(record.is_single for record in rest + chat)
    assert len(follow_ups(rest + chat + single, 1.0, 0)) == 4 and not follow_ups(single, 0.0, 0) and not follow_ups([], 1.0, 0)
    assert not follow_ups(records(4, 1), 1.0, 0) and not follow_ups(single[:1], 1.0, 0)
    brief, long = records(4, 4, system="Be brief."), records(4, 4, system="Be long.")
    mixed = follow_ups(brief + long, 1.0, 0)
    assert len(mixed) == 8 and all(len(record.messages) == 5 and record.learned == [0, 0, 0, 0, 1] for record in mixed)
    assert not follow_ups([brief[0], single[1]], 1.0, 0)
    assert [record.learned for record in follow_ups(records(4, 4, weight=0.5), 1.0, 0)] == [[0, 0, 0, 0.5]] * 4
    asked = follow_ups(records(4, 4, input="x"), 1.0, 0)
    assert all(record.messages[i]["content"].endswith("\n\nx") for record in asked for i in (0, 2)) and not any(r.input for r in asked)


def test_second_questions_have_loss_on_the_last_reply(base: Path) -> None:
    llm = LLM.load(base)
    samples = follow_up_samples(records(4, 4, weight=0.5), 1.0, 0, llm.tokenizer, llm.prompt_style, 512)
    learned = [llm.tokenizer.decode([i for i, flag in zip(s.input_ids, s.loss_mask, strict=True) if flag]).strip() for s in samples]
    assert sorted(learned) == [f"answer {i}" for i in range(4)]
    assert all(llm.tokenizer.decode(list(sample.input_ids)).count("question ") == 2 for sample in samples)
    assert all(set(sample.weights or []) == {0, 0.5} for sample in samples)
