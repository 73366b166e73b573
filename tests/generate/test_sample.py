"""`litgpt sample`: answers drawn from a model, checked and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from litgpt.__main__ import main
from litgpt.api import LLM
from litgpt.data.base import render
from litgpt.data.records import read_record
from litgpt.errors import UserError
from litgpt.generate import sample
from litgpt.prompts import ChatTemplate
from tests.helpers import tiny

ROWS: list[dict[str, Any]] = [
    {"instruction": "add 2 and 3", "output": "5", "sum": 5},
    {"instruction": "greet", "input": "Ann", "system": "Be brief.", "output": "hello Ann", "sum": 0},
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello", "weight": 0},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "hello"},
        ],
        "sum": 1,
    },
]
CHECKS = """
import numpy as np, torch
def even(record, answer):
    return (len(answer) + record["sum"]) % 2 == 0
def length(record, answer):
    return len(answer)
def numpys(record, answer):
    return np.bool_(even(record, answer))
def torchs(record, answer):
    return torch.tensor(length(record, answer))
def nothing(record, answer):
    return None
def broken(record, answer):
    return record["missing"]
"""


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    (tmp_path / "checks.py").write_text(CHECKS)
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def sampled(base: Path, questions: Path, *words: object) -> list[dict[str, Any]]:
    out = questions.with_name("answers.jsonl")
    argv = ["sample", base, "--data", questions, "--out", out, "--max_new_tokens", 6, "--precision", "32-true", "--overwrite", *words]
    assert main([str(word) for word in argv]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_answers_repeat_by_seed_and_do_not_depend_on_their_number(base: Path, questions: Path) -> None:
    four, again, two = (sampled(base, questions, "--n", n) for n in (4, 4, 2))
    assert four == again and len(four) == 12
    assert [four[4 * question + k] for question in range(3) for k in range(2)] == two
    assert len({line["answer"] for line in four[:8]}) > 4
    assert sampled(base, questions, "--n", 4, "--seed", 5) != four


def test_answers_that_are_cut_off_are_counted(base: Path, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampled(base, questions, "--n", 2, "--temperature", 0)  # random weights do not end an answer
    assert "6 answers reached --max_new_tokens 6 and may be incomplete: raise it" in capsys.readouterr().err
    sampled(base, questions, "--n", 1, "--temperature", 0, "--max_new_tokens", 1)
    assert "3 answers reached --max_new_tokens 1 " in capsys.readouterr().err


def test_greedy_answers_are_the_models(base: Path, questions: Path) -> None:
    llm = LLM.load(base, precision="32-true", device="cpu")
    lines = sampled(base, questions, "--n", 1, "--temperature", 0)
    assert lines[0]["answer"] == llm.generate("add 2 and 3", max_new_tokens=6, temperature=0.0).strip()


def test_questions_need_no_answers_for_a_check_of_ones_own(base: Path, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Questions without answers, in every form, are asked like those with one; `exact` needs the record's own answer."""
    words = ["--n", 2, "--check", f"{questions.with_name('checks.py')}:even"]
    with_answers = sampled(base, questions, *words)
    asked, greeted, chat = (
        ROWS[0]["instruction"],
        {key: value for key, value in ROWS[1].items() if key != "output"},
        ROWS[2]["messages"][:-1],
    )
    for last in ({"messages": chat, "sum": 1}, {"prompt": chat, "sum": 1}):
        questions.write_text("".join(json.dumps(row) + "\n" for row in ({"question": asked, "sum": 5}, greeted, last)))
        assert sampled(base, questions, *words) == with_answers
    assert main(["sample", str(base), "--data", str(questions), "--out", str(questions.with_name("no.jsonl"))]) == 1
    message = capsys.readouterr().err
    assert "no key 'answer'; it has 'question', 'sum'" in message
    assert "without them, name --check FILE.py:FUNCTION" in message


def test_the_lines_are_records_with_the_same_questions(base: Path, questions: Path) -> None:
    lines = sampled(base, questions, "--n", 1)
    for row, line in zip(ROWS, lines, strict=True):
        asked, answered = read_record(row), read_record(line)
        assert answered.messages[:-1] == asked.messages[:-1] and answered.input == asked.input and answered.pair == asked.pair
        assert answered.learned[:-1] == [0.0] * (len(asked.messages) - 1) and answered.learned[-1] == 1
        assert set(line) >= {"prompt", "answer", "correct"}


def test_answers_with_reasoning(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content alone is checked, both are kept, and a template may write the reply that is asked for differently later on."""
    llm = LLM.load(base, precision="32-true")
    llm.prompt_style = style = ChatTemplate(tiny.THINKING)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "7"}, {"role": "user", "content": "thanks"}]
    rows = [{"messages": turns}, {"messages": [*turns, {"role": "assistant", "content": "8", "train": False}]}]
    rows.append({"instruction": "add", "input": "3 and 4", "output": "7"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = list[str]()

    def drawn(self: sample.SampleAnswers, llm: LLM, texts: list[str], n: int, first: int = 0) -> list[list[int]]:
        asked.extend(texts)
        return [llm.tokenizer.ids(text) for _ in texts for text in ("<think>\n\n</think>\n\n7", "<think>\nwhy 8\n</think>\n\n7")]

    monkeypatch.setattr(sample.SampleAnswers, "drawn", drawn)
    monkeypatch.setattr(sample.SampleAnswers, "opened", lambda *given: llm)
    lines = sampled(base, tmp_path / "rows.jsonl", "--n", 2)
    questions = [[turns[0]], [turns[0]], [{"role": "user", "content": "add\n\n3 and 4"}]]
    assert asked == [style.render(question, add_generation_prompt=True) for question in questions]
    assert [line["correct"] for line in lines] == [True] * 6
    for number, line in enumerate(lines):
        record, text = read_record(line), "why 8" if number % 2 else ""
        expected = style.render([*questions[number // 2], {"role": "assistant", "content": "7", "reasoning_content": text}])
        assert render(record, style, llm.tokenizer).text == expected.rstrip()


def test_a_file_that_somebody_wrote_meanwhile_is_kept(
    base: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = questions.with_name("answers.jsonl")

    def meanwhile(*args: Any) -> str:
        out.write_text("theirs")
        return line(*args)

    line = sample._line
    monkeypatch.setattr(sample, "_line", meanwhile)
    words = ["sample", str(base), "--data", str(questions), "--out", str(out), "--max_new_tokens", "2", "--n", "1"]
    assert main(words) == 0 and "answers-2.jsonl" in capsys.readouterr().err
    assert out.read_text() == "theirs" and len(out.with_name("answers-2.jsonl").read_text().splitlines()) == len(ROWS)
    assert main([*words, "--overwrite"]) == 0 and len(out.read_text().splitlines()) == len(ROWS)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (UserError("the check fails"), 1), (SystemExit(143), 143)])
def test_complete_answers_are_kept_when_the_command_ends_early(
    error: BaseException, code: int, base: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, line, made = sampled(base, questions, "--n", 2), sample._line, list[object]()

    def interrupted(*args: Any) -> dict[str, Any]:
        made.append(args)
        if len(made) == 4:  # the second answer to the second question
            raise error
        return line(*args)

    monkeypatch.setattr(sample, "_line", interrupted)
    out = questions.with_name("some.jsonl")
    argv = ["sample", base, "--data", questions, "--out", out, "--max_new_tokens", 6, "--precision", "32-true", "--n", 2]
    if isinstance(error, SystemExit):
        with pytest.raises(SystemExit):
            main([str(word) for word in argv])
    else:
        assert main([str(word) for word in argv]) == code
    assert [json.loads(text) for text in out.read_text().splitlines()] == whole[:2]
    assert "some.jsonl. Missing: 2 questions" in capsys.readouterr().err


def test_checks(base: Path, questions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checks = questions.with_name("checks.py")
    lines = sampled(base, questions, "--n", 2, "--check", f"{checks}:even")
    texts = [line["answer"] if isinstance(line["answer"], str) else line["answer"][0]["content"] for line in lines]
    sums = [row["sum"] for row in ROWS for _ in range(2)]
    wanted = [(len(text) + number) % 2 == 0 for text, number in zip(texts, sums, strict=True)]
    assert [line["correct"] for line in lines] == wanted
    assert sampled(base, questions, "--n", 2, "--check", f"{checks}:numpys") == lines
    assert f"{100 * sum(wanted) / 6:.1f} % of the answers are correct" in capsys.readouterr().err
    rewards = sampled(base, questions, "--n", 2, "--check", f"{checks}:length")
    assert [line["reward"] for line in rewards] == [float(len(text)) for text in texts]
    assert sampled(base, questions, "--n", 2, "--check", f"{checks}:torchs") == rewards
    answers = [line["answer"] for line in sampled(base, questions, "--n", 1, "--temperature", 0)][:2]
    known = [{**row, "output": answer} for row, answer in zip(ROWS, answers, strict=False)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in known))
    assert all(line["correct"] for line in sampled(base, questions, "--n", 1, "--temperature", 0))
    assert "2 questions, 1 answer each: 100.0 % of the answers are correct; 2 questions with a correct" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--check", "exactly"], "'exact' or FILE.py:FUNCTION"),
        (["--check", "nowhere.py:even"], "nowhere.py does not exist"),
        (["--check", "checks.py:odd"], "has no function 'odd'"),
        (["--check", "checks.py:nothing"], "check returned None for an answer to record 1"),
        (["--check", "checks.py:broken"], "KeyError: 'missing'"),
        (["--check", "wrong.py:even"], "wrong.py cannot be run: SyntaxError"),
        (["--n", "0"], "n is 0: a whole number of at least 1"),
        (["--out", "answers.txt"], "ends in .jsonl"),
        (["--out", "old.jsonl"], "old.jsonl exists already"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl is not a file"),
        (["--data", "text.jsonl"], "text.jsonl, record 1 is a text without a question"),
        (["--data", "old.jsonl", "--out", "old.jsonl", "--overwrite", "true"], "old.jsonl is the file of questions"),
        (["--out", "old.jsonl/answers.jsonl"], "cannot be written: old.jsonl is a file"),
    ],
)
def test_refusals(
    words: list[str], message: str, base: Path, questions: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(questions.parent)
    Path("old.jsonl").write_text("mine")
    Path("wrong.py").write_text("def even(:")
    Path("text.jsonl").write_text('{"text": "hello"}\n')
    given = {word for word in words if word.startswith("--")}
    rest = [word for key, value in (("--out", "a.jsonl"), ("--data", questions.name)) if key not in given for word in (key, value)]
    assert main(["sample", str(base), "--max_new_tokens", "2", *rest, *words]) == 1
    assert message in capsys.readouterr().err
    assert Path("old.jsonl").read_text() == "mine" and not Path("a.jsonl").exists()
