"""Files of the user's own: the forms that are read, and an error for each way to get one wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from litgpt import prompts
from litgpt.data import JSON
from litgpt.errors import UserError
from litgpt.tokenizer import Tokenizer

RECORD: dict[str, Any] = {"instruction": "Hi", "input": "", "output": "Hello"}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_byte_order_mark_and_line_separators(tmp_path: Path) -> None:
    entry = {"instruction": "a\u2028b", "output": "c\u0085d"}
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(entry, ensure_ascii=False).encode() + b"\r\n" + json.dumps(entry).encode())
    train, _ = JSON(json_path=path).records()
    assert [record.question for record in train] == ["a\u2028b"] * 2


def test_folder_has_its_own_validation(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    write(tmp_path / "train.json", [RECORD] * 4)
    write(tmp_path / "val.jsonl", json.dumps({**RECORD, "output": "Bye"}) + "\n")
    splits = JSON(json_path=tmp_path).splits(Tokenizer(tiny_tokenizer_dir), prompts.ChatML())
    assert (len(splits.train), len(splits.val)) == (4, 1)
    assert splits.examples[0].reply == "Bye"
    with pytest.raises(UserError, match="val_split_fraction is set"):
        JSON(json_path=tmp_path, val_split_fraction=0.1).records()


TURN = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", "a.json is empty"),
        ("a.jsonl", " \n\n", "a.jsonl is empty"),
        ("a.json", "[]", "empty list"),
        ("a.json", '[\n{"instruction": "x",}]', "a.json, line 2, column"),
        ("a.jsonl", '{"instruction": "x", "output": "y"}\n{"instruction": \n', "a.jsonl, line 2, column"),
        ("a.json", '{"instruction": "x", "output": "y"}\n{"instruction": "x", "output": "y"}', "name it .jsonl"),
        ("a.jsonl", "[\n" + json.dumps(RECORD) + "\n]", "name it .json"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", {"data": [RECORD], "other": []}, "holds an object, a list of records is needed"),
        ("a.json", {"messages": [TURN]}, "holds an object, a list of records is needed"),
        (
            "a.jsonl",
            json.dumps(RECORD, indent=1),
            "double quotes. Each record must be one line",
        ),
        ("a.jsonl", f"{json.dumps(RECORD)},\n{json.dumps(RECORD)}", "Extra data. Remove the commas between the lines"),
        ("a.jsonl", '{"instruction": "x", "output": "y",}', "Remove the comma before the last bracket"),
        ("a.json", f"[{json.dumps(RECORD)},\n]", "Remove the comma before the last bracket"),
        ("a.jsonl", "{'instruction': 'x', 'output': 'y'}", ": \" is needed, not '"),
        ("a.csv", "Frage;Antwort\nx;y\n", "line 1 names the columns 'Frage', 'Antwort': it should name `question` and `answer`"),
        ("a.json", "3", "holds a number"),
        ("a.json", [RECORD, "text"], "record 2: a text, an object with keys is needed"),
        ("a.jsonl", "\n[1]\n", "line 2: a list"),
        ("a.json", [{"instruction": "x"}], "record 1: no key 'output'; it has 'instruction'"),
        (
            "a.json",
            [RECORD, {"instruction": "x", "outptu": "y"}],
            "record 2: no key 'output'; it has 'instruction', 'outptu' (is 'outptu' meant",
        ),
        ("a.json", [{"prompt": "x", "chosen": "y"}], "record 1: no key 'rejected'; it has 'prompt', 'chosen'"),
        ("a.json", [{"prompt": "x", "chosen": "y", "rejected": None}], "record 1: 'rejected' is empty: an answer is needed"),
        ("a.json", [{"prompt": "x", "chosen": "", "rejected": ""}], "record 1: 'chosen' is empty: an answer is needed"),
        ("a.json", [{}], "record 1: no key 'instruction' and no key 'output'; it has no keys"),
        (
            "a.json",
            [{"frage": "x", "antwort": "y"}] * 3,
            "record 1 and 2 others: no key 'instruction'",
        ),
        ("a.json", [{"frage": "x", "antwort": "y"}], "call the question 'instruction' and its answer 'output'"),
        ("a.json", [{**RECORD, "Instruction": "z"}], "its keys 'instruction' and 'Instruction' differ in capitals or spaces only"),
        ("a.json", [{"instruction": "x", "output": True}], "record 1: 'output' is true or false, a text is needed"),
        ("a.json", [{"instruction": ["x"], "output": "4"}], "'instruction' is a list"),
        ("a.json", [{"instruction": "x", "output": None}], "'output' is null"),
        ("a.json", [{**RECORD, "input": [4]}], "'input' is a list"),
        ("a.json", [{**RECORD, "output": 10**400}], "'output' is a number, a text is needed"),
        ("a.json", '[{"instruction": "x", "output": 1e400}]', "'output' is a number, a text is needed"),
        ("a.json", [{"messages": []}], "'messages' is an empty list"),
        ("a.json", [{"messages": "Hi"}], "'messages' is a text, a list is needed"),
        ("a.json", [{"messages": [{"from": "human"}]}], "turn 1 of 'messages' needs the keys 'role' and 'content'"),
        ("a.json", [{"messages": [{"role": "robot", "content": "x"}]}], "'role' is 'robot', one of system, developer, user"),
        ("a.json", [{"messages": [TURN, {"role": "user", "content": None}]}], "record 1: turn 2 of 'messages': 'content' is null"),
        ("a.json", [TURN, TURN], 'record 1 and 1 other: it is one turn, a record is a whole conversation: {"messages": [{"role"'),
        ("a.json", [[TURN]], 'record 1: a list, an object with keys is needed, such as {"messages": '),
        (
            "a.json",
            [{"ts": "1", "message": "x", "by": "y"}],
            "(is 'message' meant to be 'messages'?); a conversation is {\"messages\": [...]}",
        ),
        ("a.json", [{"conversation": [TURN]}], "(is 'conversation' meant to be 'conversations'?)"),
        ("a.json", [{"messages": [TURN]}], "no turn of the assistant"),
        ("a.json", [{"messages": [{"role": "user", "content": {}}]}], "'content' is an object"),
        ("a.json", [{"instruction": "x", f"k{i}": "y"} for i in range(12)], "and 9 more"),
        ("a.data", "x", "one of the endings .json, .jsonl"),
        ("a.xlsx", "x", "save the sheet as CSV"),
        ("notes.md", "x", "running text is not read as records: name the file in --data instead"),
    ],
)
def test_broken_file(name: str, content: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as error:
        JSON(json_path=path).records()
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", [{"Instruction": "x", " INPUT ": "", "Output": 4}]),
        ("a.json", {"version": "1", "data": [{"question": "x", "answer": 4}]}),
        ("a.jsonl", '{"question": "x", "answer": 4}'),
        ("a.csv", "Question ; Answer\nx;4\n"),
        ("a.json", [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": 4}]}]),
    ],
)
def test_forms_that_mean_the_same(name: str, content: Any, tmp_path: Path) -> None:
    (record,) = JSON(json_path=write(tmp_path / name, content)).records()[0]
    assert [message["content"] for message in record.messages] == ["x", "4"] and not record.unread


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[\n{"instruction": "na\xefve"}]')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        JSON(json_path=path).records()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no train.json or train.jsonl"),
        ({"train.json": [RECORD]}, "has no val.json"),
        ({"train.json": [RECORD], "train.jsonl": json.dumps(RECORD)}, "both train.json and train.jsonl"),
    ],
)
def test_broken_folder(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        JSON(json_path=tmp_path).records()


def test_no_path() -> None:
    with pytest.raises(UserError, match="data.json_path is missing"):
        JSON().records()
    with pytest.raises(UserError, match="/nowhere/a.json does not exist"):
        JSON(json_path=Path("/nowhere/a.json")).records()


def test_errors_of_single_records_name_file_and_record(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    turns = [TURN, {"role": "assistant", "content": "a"}] * 2
    path = write(tmp_path / "a.json", [RECORD, {"messages": turns}])
    with pytest.raises(UserError, match="a.json, record 2: the prompt style 'alpaca' has no form for conversations"):
        JSON(json_path=path).splits(Tokenizer(tiny_tokenizer_dir), prompts.Alpaca())


def test_an_unset_share_is_litgpts_and_said(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": f"{i}", "output": "x"} for i in range(40)]))
    splits = JSON(json_path=tmp_path / "data.json").splits(Tokenizer(tiny_tokenizer_dir), prompts.ChatML())
    assert (len(splits.train), len(splits.val)) == (38, 2)
    assert "5 % of them for validation, as neither data.val_split_fraction nor a validation file is given" in splits.report
    splits = JSON(json_path=tmp_path / "data.json", val_split_fraction=0.05).splits(Tokenizer(tiny_tokenizer_dir), prompts.ChatML())
    assert len(splits.val) == 2 and "neither" not in splits.report


def test_a_folder_whose_files_have_endings_in_capitals(tmp_path: Path) -> None:
    for name in ("train.CSV", "val.CSV"):
        (tmp_path / name).write_text(f"question,answer\n{name},1\n")
    train, val = JSON(json_path=tmp_path).records()
    assert val is not None and [record.question for record in (*train, *val)] == ["train.CSV", "val.CSV"]
