"""`litgpt sample`: draw several answers to each question of a file and check them, for critics and rejection sampling."""

import json
import math
import runpy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Union

from litgpt.args import POSITIVE, setting
from litgpt.atomic import new_file
from litgpt.data.base import question_of
from litgpt.data.records import PAIRS, Record, read_record
from litgpt.data.sources import check_rows, numbered_rows
from litgpt.errors import UserError
from litgpt.files import expand_path, require_file, require_place
from litgpt.generate.base import Checkpoint, Drawing
from litgpt.prompts import Message, read_reply
from litgpt.text import as_utf8, counted

EXACT = "exact"
TOGETHER = 128  # answers between two reports of the progress
Check = Callable[[dict[str, Any], str], Union[bool, float]]


@dataclass
class Files:
    """The options for input and output."""

    data: Path
    """The file of questions: records as for `litgpt finetune`, which need no answers if a function of yours checks."""
    out: Path
    """The .jsonl file for the answers, one per line: prompt, answer, and `correct` or `reward`."""


@dataclass
class SampleAnswers(Drawing, Files, Checkpoint):
    """Draw several answers to each question of a file, and check them."""

    n: int = setting(8, POSITIVE)
    """Answers to each question."""
    check: str = EXACT
    """exact: the same words as the record's own answer. FILE.py:FUNCTION calls your function with the record, as it is in the file, and the
    answer; it returns True or False, which is written as `correct`, or a number, which is written as `reward`."""
    overwrite: bool = False
    """Replace an existing file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data, self.out = expand_path(self.data), expand_path(self.out)

    def main(self) -> None:
        check = check_of(self.check)
        if self.out.suffix != ".jsonl":
            raise UserError(f"out: {self.out} is written in lines of JSON: give it a name that ends in .jsonl")
        require_place(self.out)
        if self.out.exists() and not self.overwrite:
            raise UserError(f"{self.out} exists already: name another file, or add --overwrite to replace it")
        if not self.data.is_file():
            raise UserError(f"data: {self.data} is not a file: name one with records, such as questions.jsonl")
        if self.out.exists() and self.out.samefile(self.data):
            raise UserError(f"out: {self.out} is the file of questions: name another file for the answers")
        numbered = numbered_rows(self.data)
        rows = [row for _, row in numbered]
        records = check_rows([(place, _with_answer(row)) for place, row in numbered], str(self.data))
        if self.check == EXACT:
            try:
                records = check_rows(numbered, str(self.data))
            except UserError as error:
                raise UserError(f"{error}. {EXACT} needs answers to compare with: without them, name --check FILE.py:FUNCTION") from None
        if texts := [place for place, record in enumerate(records, 1) if record.is_text]:
            raise UserError(f"data: {self.data}, record {texts[0]} is a text without a question: there is nothing to answer")
        if self.sys_prompt is not None:
            records = [_with_system(record, self.sys_prompt) for record in records]
        llm = self.opened(self.checkpoint_dir)
        from litgpt.logs import Console

        lines, console, cut = list[dict[str, Any]](), Console(), 0
        step = max(1, TOGETHER // self.n)
        try:
            with console.progress("answers") as progress:
                for first in range(0, len(records), step):
                    places = range(first, min(first + step, len(records)))
                    questions = [question_of(records[place], llm.prompt_style, llm.tokenizer) for place in places]
                    drawn = self.drawn(llm, questions, self.n, first)
                    cut += sum(len(ids) == self.max_new_tokens for ids in drawn)
                    answers = (read_reply(llm.tokenizer.decode(ids, False), llm.prompt_style, llm.tokenizer) for ids in drawn)
                    for place, answer in zip((place for place in places for _ in range(self.n)), answers, strict=True):
                        value = check(rows[place], answer["content"])
                        lines.append(_line(records[place], answer, value, f"record {place + 1}"))
                    progress(self.n * places.stop, self.n * len(records))
            if cut:
                console.say(f"{counted(cut, 'answer')} reached --max_new_tokens {self.max_new_tokens} and may be incomplete: raise it")
        finally:  # a signal or an error ends the work of hours: what is complete is kept
            if complete := lines[: len(lines) // self.n * self.n]:
                rest = len(records) - len(complete) // self.n
                missing = f". Missing: {counted(rest, 'question')}" if rest else ""
                console.say(f"{summary(complete, self.n)}. The answers are in {self._write(complete)}{missing}")

    def _write(self, lines: Sequence[dict[str, Any]]) -> Path:
        """Write the answers to `out`, or to another name in its folder if `out` exists by now. Returns the file's name."""
        names = (self.out.with_stem(f"{self.out.stem}-{i}") for i in count(2))
        out = self.out if self.overwrite or not self.out.exists() else next(name for name in names if not name.exists())
        with new_file(out, self.overwrite) as file:
            file.writelines(as_utf8(json.dumps(line, ensure_ascii=False) + "\n").encode() for line in lines)
        return out


def check_of(name: str) -> Check:
    """Return the function that checks answers. Raises UserError if there is none of this name."""
    if name == EXACT:
        return lambda row, answer: is_exact(read_record(row).reply, answer)
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise UserError(f"check is {name!r}: {EXACT!r} or FILE.py:FUNCTION is needed")
    file = expand_path(path)
    require_file(file, "does not exist: name the file with your function (check)")
    try:
        check = runpy.run_path(str(file)).get(function)
    except Exception as error:  # the module is the user's code
        raise UserError(f"check: {file} cannot be run: {type(error).__name__}: {error}") from None
    if not callable(check):
        raise UserError(f"check: {file} has no function {function!r}")

    def checked(row: dict[str, Any], answer: str) -> Any:
        try:
            return check(row, answer)
        except Exception as error:  # the function is the user's code
            raise UserError(f"check: {function} fails on the answer {answer[:200]!r}: {type(error).__name__}: {error}") from None

    return checked


def is_exact(expected: str, answer: str) -> bool:
    """Return True for the same words in the same order."""
    return answer.split() == expected.split()


def summary(lines: Sequence[dict[str, Any]], n: int) -> str:
    """Return how good the answers are, n to each question."""
    scores = [float(line["correct"] if "correct" in line else line["reward"]) for line in lines]
    groups = [scores[i : i + n] for i in range(0, len(scores), n)]
    mean = sum(scores) / len(scores)
    asked = f"{counted(len(groups), 'question')}, {counted(n, 'answer')} each"
    if any("reward" in line for line in lines):
        best = sum(max(group) for group in groups) / len(groups)
        return f"{asked}: mean reward {mean:.4g}, of the best answers {best:.4g}"
    some, every = sum(max(group) > 0 for group in groups), sum(min(group) > 0 for group in groups)
    correct = f"{counted(some, 'question')} with a correct answer, {every:,} with only correct ones"
    return f"{asked}: {100 * mean:.1f} % of the answers are correct; {correct}"


def _line(record: Record, answer: Message, value: Any, where: str) -> dict[str, Any]:
    """Return what is written for an answer: a record with its question."""
    value = value.item() if getattr(value, "shape", None) == () else value  # of numpy or torch
    if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
        raise UserError(f"check returned {value!r} for an answer to {where}: True, False or a number is needed")
    result = {"correct": value} if isinstance(value, bool) else {"reward": float(value)}
    before = record.turns[: record.last]
    if not record.pair or "reasoning_content" in answer:
        tools = {"tools": record.tools} if record.tools else {}
        return {"prompt": before, "answer": [answer], **tools, **result}
    system = before[0]["content"] if before[0]["role"] == "system" else ""
    texts = {"prompt": record.question, "input": record.input, "system": system, "answer": answer["content"]}
    return {**{key: text for key, text in texts.items() if text or key == "answer"}, **result}


def _with_answer(row: Any) -> Any:
    """Return a row that has a question alone with an empty answer."""
    if not isinstance(row, dict) or not row.keys().isdisjoint(("chosen", "rejected", *(answer for _, answer in PAIRS))):
        return row
    turns = next((row[key] for key in ("messages", "prompt") if isinstance(row.get(key), list)), None)
    if turns is None:
        return {**row, **{answer: "" for question, answer in PAIRS if question in row}}
    is_open = bool(turns) and isinstance(turns[-1], dict) and turns[-1].get("role") in ("user", "tool")
    return {**row, "messages": [*turns, {"role": "assistant", "content": ""}]} if is_open else row


def _with_system(record: Record, text: str) -> Record:
    """Return a record with this system text instead of its own."""
    start = int(record.messages[0]["role"] == "system")
    system = [{"role": "system", "content": text}]
    return replace(record, messages=[*system, *record.messages[start:]], learned=[0.0, *record.learned[start:]])
