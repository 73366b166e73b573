"""The answers that a run shows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from litgpt import Tokenizer
from litgpt.args import EvalArgs
from litgpt.data.records import read_record
from litgpt.errors import UserError
from litgpt.generate.engine import most_probable
from litgpt.prompts import resolve_prompt_style
from litgpt.train.examples import DRAFTED, Example, answer, examples_of
from tests.helpers import tiny

PROMPT = [5, 9, 2, 31, 7, 7, 12]
MOST = 2 * DRAFTED
ADAPTED = {"lora_r": 3, **tiny.ALL_LORA}
RECORDS = [read_record({"instruction": f"add {i} and 1", "output": f"{i + 1}"}) for i in range(3)]


def never() -> bool:
    return False


@pytest.mark.parametrize("kind", ["plain", "lora", "answer-only"])
def test_the_answer_is_the_most_probable_one_whatever_the_reply_was_meant_to_be(kind: str) -> None:
    model = tiny.move_adapters(tiny.tiny(**ADAPTED)) if kind != "plain" else tiny.tiny()
    if kind == "answer-only":
        model = tiny.move_adapters(tiny.tiny(**ADAPTED, alora_enabled=True, alora_invocation_tokens=PROMPT[-2:]))
        assert model.switch is not None
    model.train()
    [expected] = most_probable(model, [PROMPT], MOST)
    assert expected is not None and len(set(expected)) > 3
    wrong = expected[: DRAFTED // 2] + [(token + 1) % 50 for token in expected[DRAFTED // 2 :]]
    for reply in (expected, wrong, wrong[::-1], [], [*expected[:5], 3, *expected[5:]]):
        assert answer(model, Example("", PROMPT, [*PROMPT, *reply]), MOST, (), never) == expected
    assert model.training


def test_a_reply_that_is_known_takes_a_few_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = tiny.tiny(), list[int]()
    [expected] = most_probable(model, [PROMPT], MOST)
    assert expected is not None
    prefix = model.prefix
    monkeypatch.setattr(model, "prefix", lambda idx, *given: passes.append(idx.size(1)) or prefix(idx, *given))
    assert answer(model, Example("", PROMPT, [*PROMPT, *expected]), MOST, (), never) == expected
    assert len(passes) <= 1 + MOST // DRAFTED


def test_stop_tokens_room_and_signals() -> None:
    model = tiny.tiny()
    [free] = most_probable(model, [PROMPT], MOST)
    assert free is not None
    example, stop = Example("", PROMPT, [*PROMPT, *free]), free[4]
    assert answer(model, example, MOST, [[stop]], never) == free[: free.index(stop)]
    left = iter([False, False, True])
    assert answer(model, example, MOST, (), lambda: next(left)) == free[:2]
    model.max_seq_length = len(PROMPT) + 3
    assert answer(model, example, MOST, (), never) == free[:3]
    model.max_seq_length = len(PROMPT)
    assert answer(model, example, MOST, (), never) is None


def test_the_runs_random_numbers_stay_as_they_are() -> None:
    model, before = tiny.tiny(), torch.get_rng_state()
    answer(model, Example("", PROMPT, []), MOST, (), never)
    assert torch.equal(torch.get_rng_state(), before)


def test_which_records_are_asked(base: Path) -> None:
    tokenizer = Tokenizer(base)
    style = resolve_prompt_style(None, base, tokenizer)

    def asked(which: object, seed: int = 1) -> list[str]:
        return [example.question for example in examples_of(EvalArgs(evaluate_example=which), seed, RECORDS, style, tokenizer)]  # type: ignore[arg-type]

    assert asked("first") == ["add 0 and 1"] and asked(1) == ["add 1 and 1"] and asked([2, 0]) == ["add 2 and 1", "add 0 and 1"]
    assert asked("random") == asked("random") and {asked("random", seed)[0] for seed in range(20)} == {
        record.question for record in RECORDS
    }
    with pytest.raises(UserError, match="eval.evaluate_example is 3: the validation set has 3 samples"):
        asked(3)
    [example] = examples_of(EvalArgs(evaluate_example=1), 1, RECORDS, style, tokenizer)
    assert example.text[: len(example.prompt)] == example.prompt
    assert tokenizer.decode(example.text[len(example.prompt) :]).strip() == "2"


def test_of_a_conversation_the_question_is_shown_without_the_templates_marks(base: Path) -> None:
    tokenizer = Tokenizer(base)
    style = resolve_prompt_style("chatml", base, tokenizer)
    turns = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant", "user", "assistant")]
    records = [read_record({"messages": turns[:count]}) for count in (3, 5)] + [read_record({"text": "a text of its own"})]
    examples = examples_of(EvalArgs(evaluate_example=[0, 1, 2]), 1, records, style, tokenizer)  # type: ignore[arg-type]
    assert [example.question for example in examples] == ["USER", "USER", tokenizer.decode(examples[2].prompt)]
    assert "SYSTEM" in tokenizer.decode(examples[1].prompt)
