"""General questions with the base model's own answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from litgpt import LLM
from litgpt.train.examples import Example
from litgpt.train.replay import ANSWER_TOKENS, QUESTIONS, base_answers, replay_samples


def test_answers_are_those_of_generate(base: Path) -> None:
    """Several are decoded together; `LLM.generate` decodes one."""
    llm = LLM.load(base, precision="32-true")
    answers = base_answers(llm.model, llm.tokenizer, llm.prompt_style, 5)
    expected = [llm.generate(question, max_new_tokens=ANSWER_TOKENS, temperature=0.0) for question in QUESTIONS[:5]]
    assert answers == [str(text).strip() for text in expected]


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
