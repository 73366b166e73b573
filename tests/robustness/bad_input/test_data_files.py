"""Bad data files, through `litgpt finetune`."""

from __future__ import annotations

import gzip
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cases import quick
from tests.helpers.places import RECORDS, Case, Place, check

GOOD = RECORDS[0]


def data(content: Any, name: str = "data.json", *more: Any) -> Callable[[Place], list[Any]]:
    """`litgpt finetune` on a file with this content; None: the name is given, no file is written."""

    def words(place: Place) -> list[Any]:
        if content is not None:
            place.write(name, content)
        return ["finetune_lora", place.base(), "--data", "JSON", "--data.json_path", name, "--out_dir", "out", *more]

    return words


def record(value: Any) -> Callable[[Place], list[Any]]:
    """A good file but for its third record."""
    return data([*RECORDS[:2], value, *RECORDS[2:]])


def lines(*extra: str) -> str:
    good = '{"instruction": "a", "output": "b"}'
    return "\n".join([good, good, *extra, good]) + "\n"


def folder(files: dict[str, Any], *more: Any) -> Callable[[Place], list[Any]]:
    def words(place: Place) -> list[Any]:
        (place.folder / "d").mkdir()
        for name, content in files.items():
            place.write(f"d/{name}", content)
        return ["finetune_lora", place.base(), "--data", "JSON", "--data.json_path", "d", "--out_dir", "out", *more]

    return words


def made(make: Callable[[Path], None], name: str = "data.json") -> Callable[[Place], list[Any]]:
    def words(place: Place) -> list[Any]:
        make(place.folder / name)
        return data(None, name)(place)

    return words


def turns(*roles: str, **changes: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"{role} speaks", **changes} for role in roles]}


def workbook() -> bytes:
    """The first bytes of a spreadsheet: it is a zip archive of XML files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")
    return file.getvalue()


ROWS = [
    # places
    Case("missing", data(None), "data.json does not exist", "check the path"),
    Case(
        "no path",
        lambda place: ["finetune_lora", place.base(), "--data", "JSON", "--out_dir", "out"],
        "data.json_path is missing",
        "name a .json",
    ),
    Case("a folder named like a file", made(lambda path: path.mkdir()), "data.json has no train.json", "give the file itself"),
    Case("a pipe", made(os.mkfifo), "data.json", "not a file"),
    Case("a device", data(None, "/dev/zero"), "/dev/zero", ".json, .jsonl"),
    Case("a device behind a name", made(lambda path: path.symlink_to("/dev/zero")), "data.json", "not a file"),
    Case("a link to itself", made(lambda path: path.symlink_to(path)), "data.json", "a link"),
    Case("a link to nothing", made(lambda path: path.symlink_to("nowhere")), "data.json does not exist", "check the path"),
    Case("a name too long", data(None, "x" * 300 + ".json"), "data.json_path", "too long", 2),
    Case("a zero byte in the name", data(None, "da\0ta.json"), "data.json_path", "zero byte", 2),
    # kinds of file
    Case("CSV", data("instruction,output\na,b,c\n", "data.csv"), "data.csv, line 2", "names 2 columns"),
    Case("a column twice, of very many", data("c,".join(map(str, range(50_000))) + "c,0c\n", "data.csv"), "the column '0c'", "leave one"),
    Case(
        "a key twice, of very many",
        data("[{" + ",".join(f'"{i}": 0' for i in (*range(50_000), 49_999)) + "}]"),
        "data.json: an object has the key '49999' twice",
        "leave one",
    ),
    Case("parquet", data(b"PAR1" + bytes(20), "data.parquet"), "data.parquet", "Copy it again"),
    Case("no ending", data("[]", "data"), "data", ".json, .jsonl"),
    Case("gzip", data(gzip.compress(b"[]" * 99)), "data.json is a gzip file", "the ending of its format"),
    Case("a workbook named .csv", data(workbook(), "data.csv"), "data.csv is an Excel file", "save it as CSV"),
    Case("curly quotes", data("{“instruction”: “a”, “output”: “b”}", "data.jsonl"), "data.jsonl, line 1, column 2", '" is needed, not “'),
    Case("Latin-1", data('[{"instruction": "é", "output": "b"}]'.encode("latin-1")), "data.json, line 1", "save the file as UTF-8"),
    Case("UTF-16", data('[{"instruction": "a"}]'.encode("utf-16")), "data.json, line 1", "save the file as UTF-8"),
    Case("UTF-32", data('[{"instruction": "a"}]'.encode("utf-32")), "data.json, line 1", "save the file as UTF-8"),
    Case("binary", data(bytes(range(256))), "data.json, line", "save the file as UTF-8"),
    Case("zeros", data(bytes(100)), "data.json, line 1", "not valid JSON"),
    Case("Python", data("[{'instruction': 'a', 'output': 'b'}]"), "data.json, line 1, column 3", "not valid JSON"),
    Case("YAML", data("- instruction: a\n  output: b\n"), "data.json, line 1", "not valid JSON"),
    Case("HTML", data("<!DOCTYPE html><html>404</html>"), "data.json, line 1", "not valid JSON"),
    Case("a Git LFS pointer", data("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "data.json, line 1", "not valid JSON"),
    # JSON
    Case("empty", data(""), "data.json is empty", "add records"),
    Case("blanks", data(" \n\t\n"), "data.json is empty", "add records"),
    Case("an empty list", data("[]"), "data.json holds an empty list", "add records"),
    Case("cut off", data('[{"instruction": "a", "output": "b"},'), "data.json, line 1", "not valid JSON"),
    Case("a comma too many", data('[{"instruction": "a", "output": "b"},]'), "data.json, line 1", "not valid JSON"),
    Case("lines in .json", data(lines()), "data.json, line 2", "name it .jsonl"),
    Case("a list in .jsonl", data('[\n{"instruction": "a", "output": "b"}\n]', "data.jsonl"), "data.jsonl, line 1", "name it .json"),
    Case("null", data("null"), "data.json holds null", "a list of records"),
    Case("a number", data("3"), "data.json holds a number", "a list of records"),
    Case("not a number", data("NaN"), "data.json", "a list of records"),
    Case("an object", data(GOOD), "data.json holds an object", "a list of records"),
    Case("an object of lists", data({"data": RECORDS, "more": RECORDS}), "data.json holds an object", "a list of records"),
    Case("nested lists", data("[" * 100_000 + "]" * 100_000), "data.json, line 1", "nested too deeply"),
    Case("nested objects", data('{"a":' * 100_000), "data.json, line 1", "nested too deeply"),
    Case("nested in a line", data(lines('{"instruction": ' + "[" * 100_000), "data.jsonl"), "data.jsonl, line 3", "nested too deeply"),
    Case("a number of 5,000 digits", data('[{"instruction": "a", "output": ' + "9" * 5000 + "}]"), "data.json", "number"),
    Case("a bad line", data(lines("{instruction}"), "data.jsonl"), "data.jsonl, line 3", "not valid JSON"),
    Case(
        "half a character",
        data('[{"instruction": "a", "output": "\\ud800"}, {"instruction": "a", "output": "b"}]'),
        "record 1",
        "surrogate",
    ),
    Case("one record", data([GOOD]), "data.json holds one record", "at least two"),
    # records
    Case("a list as a record", record(["a", "b"]), "data.json, record 3", "an object with keys is needed"),
    Case("a text as a record", record("a"), "data.json, record 3: a text", "an object with keys is needed"),
    Case("null as a record", record(None), "data.json, record 3: null", "an object with keys is needed"),
    Case("an empty record", record({}), "data.json, record 3: no key", "'instruction'"),
    Case("no answer", record({"instruction": "a"}), "record 3: no key 'output'", "it has 'instruction'"),
    Case("a misspelt key", record({"instruction": "a", "outptu": "b"}), "no key 'output'", "is 'outptu' meant to be 'output'?"),
    Case(
        "a key in capitals too",
        record({"instruction": "a", "output": "b", "Output": "c"}),
        "record 3: its keys 'output' and 'Output' differ",
        "in capitals",
    ),
    Case("keys of no pair", record({"content": "all in one"}), "record 3: no key 'instruction'", "it has 'content'"),
    Case("NaN as the answer", data('[{"instruction": "a", "output": NaN}]'), "record 1: 'output' is a number", "a text is needed"),
    Case("infinity as the question", data('[{"instruction": -Infinity, "output": "b"}]'), "'instruction' is a number", "a text is needed"),
    Case("null as the answer", record({"instruction": "a", "output": None}), "record 3: 'output' is null", "a text is needed"),
    Case("a list as the input", record({"instruction": "a", "input": ["c"], "output": "b"}), "'input' is a list", "a text is needed"),
    Case("a switch as the question", record({"prompt": True, "completion": "b"}), "'prompt' is true or false", "a text is needed"),
    Case("empty answers", data([{**GOOD, "output": " "}] * 4), "their answers are empty", "`output`"),
    Case("many bad records", data([{"instruction": i} for i in range(500)]), "record 1 and 499 others: no key", "'output'"),
    Case("a key of control characters", record({"\x1b[2Jinstruction": "a", "\x07output": "b"}), "record 3: no key", "'instruction'"),
    # conversations
    Case("an empty conversation", record({"messages": []}), "'messages' is an empty list", "a list of turns"),
    Case("a conversation as text", record({"messages": "hello"}), "'messages' is a text", "a list is needed"),
    Case("a conversation as null", record({"messages": None}), "'messages' is null", "a list is needed"),
    Case("turns as texts", record({"messages": ["hello"]}), "turn 1 of 'messages'", "'role' and 'content'"),
    Case("turns without content", record({"messages": [{"role": "user"}]}), "turn 1 of 'messages'", "'role' and 'content'"),
    Case("half of each dialect", record({"messages": [{"from": "human", "content": "a"}]}), "turn 1 of 'messages'", "'role' and 'content'"),
    Case(
        "a weight below 0", record({"messages": [{"role": "user", "content": "a", "weight": -0.5}]}), "'weight' is -0.5", "a number from 0"
    ),
    Case("a number as a role", record({"messages": [{"role": 1, "content": "a"}]}), "'role' is 1", "system, developer, user"),
    Case("a role of 100,000 letters", record(turns("x" * 100_000)), "'role' is 'xxx", "system, developer, user"),
    Case(
        "a late system turn in a style without them",
        data([turns("user", "system", "assistant")] * 3, "data.json", "--data.prompt_style", "chatml"),
        "record 1: prompt style chatml",
        "at most one system message, at its start",
    ),
    Case("nobody answers", record(turns("user", "user")), "no turn of the assistant", "nothing to learn"),
    Case("an image", record(turns("user", "assistant", content=[{"type": "image"}])), "part 1 of 'content'", "only text can be read"),
    Case(
        "a style without turns",
        data([turns("user", "assistant", "user", "assistant")] * 3, "data.json", "--data.prompt_style", "alpaca"),
        "record",
        "chatml",
    ),
    # folders
    Case("an empty folder", folder({}), "d has no train.json", "a train and a val file"),
    Case("no validation file", folder({"train.json": RECORDS}), "d has no val.json", "a train and a val file"),
    Case(
        "two training files",
        folder({"train.json": RECORDS, "train.jsonl": "", "val.json": RECORDS}),
        "both train.json and train.jsonl",
        "remove one",
    ),
    Case("an empty validation file", folder({"train.json": RECORDS, "val.jsonl": ""}), "val.jsonl is empty", "add records"),
    Case("validation answers are empty", folder({"train.json": RECORDS, "val.json": [{**GOOD, "output": ""}]}), "validation", "`output`"),
    Case(
        "a share and a file",
        folder({"train.json": RECORDS, "val.json": RECORDS}, "--data.val_split_fraction", "0.2"),
        "data.val_split_fraction",
        "leave one of them out",
    ),
    # other modules
    Case(
        "a package that is not there",
        lambda place: ["finetune_lora", place.base(), "--data", "PythonDocs", "--data.packages", "[no_such_package]", "--out_dir", "out"],
        "data.packages: 'no_such_package' cannot be imported",
        "install it or drop it",
    ),
    Case(
        "an Alpaca file of something else",
        lambda place: [
            "finetune_lora",
            place.base(),
            "--data",
            "Alpaca",
            "--data.download_dir",
            place.write("a/alpaca_data_cleaned.json", "{").parent,
            "--out_dir",
            "out",
        ],
        "alpaca_data_cleaned.json",
        "not valid JSON",
    ),
    Case(
        "an Alpaca archive of something else",
        lambda place: [
            "finetune_lora",
            place.base(),
            "--data",
            "Alpaca",
            "--data.download_dir",
            place.write("a/alpaca_data_cleaned_archive.json", [{"a": 1}]).parent,
            "--out_dir",
            "out",
        ],
        "alpaca_data_cleaned_archive.json, record 1",
        "'instruction'",
    ),
]


@pytest.mark.parametrize("case", quick(ROWS, *ROWS[::3]), ids=lambda case: case.name)
def test_bad_data(case: Case, place: Place) -> None:
    check(case, place)


def test_bad_data_have_names_of_their_own() -> None:
    assert len({case.name for case in ROWS}) == len(ROWS)
