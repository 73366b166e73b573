"""Data files of every format, and data sets of the datasets library, with a stand-in for datasets where it would ask the hub."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from litgpt.data import JSON
from litgpt.data.sources import read_records
from litgpt.errors import UserError

RECORD: dict[str, Any] = {"instruction": "Hi", "input": "", "output": "Hello"}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".json.gz", ".JSONL.gz", ".csv.gz", ".parquet", ".arrow"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    """Every format holds the same rows, read by the library of that format."""
    rows = [{"instruction": 'Say "a,\tb"\nplease', "output": "x" * 200_000}, {"instruction": "é", "output": "日本"}]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0], delimiter="\t" if suffix == ".tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    table = suffix.startswith((".csv", ".tsv"))
    lines = suffix.lower().startswith((".jsonl", ".ndjson"))
    content = (text.getvalue() if table else "\n\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)).encode()
    path = tmp_path / f"data{suffix}"
    if suffix in (".parquet", ".arrow"):
        write_columns(path, rows)
    else:
        path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    train, val = JSON(json_path=path).records()
    assert val is None
    assert [(record.question, record.reply) for record in train] == [tuple(row.values()) for row in rows]


def test_keys_that_columns_add_to_nested_objects(tmp_path: Path) -> None:
    """Parquet gives each object the keys of all rows' objects, null where a row has none."""
    call: dict[str, Any] = {"function": {"name": "f", "arguments": {"city": "Bern"}}}
    tool: dict[str, Any] = {"function": {"name": "f", "parameters": {"properties": {"city": {"type": "string"}}}}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    other_call = {"function": {"name": "f", "arguments": {"day": 1}}, "id": "c1"}
    other = [*turns[:1], {**turns[1], "tool_calls": [other_call]}]
    other_tool = {"function": {"name": "f", "parameters": {"properties": {"day": {"type": "string"}}, "required": ["day"]}}}
    rows = [{"messages": turns, "tools": [tool]}, {"messages": other, "tools": [other_tool], "system": "s"}]
    write_columns(tmp_path / "a.parquet", rows)
    (record, _), _ = JSON(json_path=tmp_path / "a.parquet").records()
    assert record.messages == turns and record.tools == [tool] and not record.unread


def write_columns(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pyarrow.Table.from_pylist([{**dict.fromkeys(rows[-1]), **row} for row in rows])
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)


@pytest.mark.parametrize(("suffix", "stream"), [(".parquet", False), (".arrow", False), (".arrow", True)])
def test_a_value_that_all_rows_repeat_is_bounded(suffix: str, stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary stores 200 GB of rows in 2 MB."""
    values = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000, pyarrow.int32()), pyarrow.array(["x" * 2_000_000]))
    table = pyarrow.table({"instruction": values, "output": values})
    monkeypatch.setattr("litgpt.data.sources.MOST_UNPACKED", 10**8)
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":  # whose reader is not told that they are in a dictionary
        parquet.write_table(table, path, store_schema=False, dictionary_pagesize_limit=2**24)
    else:
        with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(path, table.schema) as file:
            file.write_table(table)
    usual, pool = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    pyarrow.set_memory_pool(pool)
    try:
        with pytest.raises(UserError, match="^[^:]* holds more than 100,000,000 bytes once it is unpacked: split it$"):
            JSON(json_path=path).records()
    finally:
        pyarrow.set_memory_pool(usual)
    assert pool.max_memory() < 10**8


def test_columns_without_a_name_are_not_read(tmp_path: Path) -> None:
    """As a spreadsheet saves empty columns, and pandas an index of two levels."""
    (tmp_path / "a.csv").write_text(",,instruction,output,,\n0,1,Hi,Hello,,\n")
    [record] = read_records(tmp_path / "a.csv")
    assert (record.question, record.reply, record.unread) == ("Hi", "Hello", ())


def test_empty_rows_of_a_spreadsheet_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("No;instruction;output;\n1;Hi;Hello;\n;;;\n2;Who?;;\n;;\n")
    assert [(record.question, record.reply) for record in read_records(tmp_path / "a.csv")] == [("Hi", "Hello"), ("Who?", "")]


@pytest.mark.parametrize("head", ["instruction;output", '"instruction";"output"', "instruction\toutput", "instruction,output"])
def test_tables_of_spreadsheets_that_write_other_marks(head: str, tmp_path: Path) -> None:
    """Where the comma is the decimal mark, spreadsheets write semicolons, others tabs; with commas in the first line these are text."""
    mark = next(mark for mark in ";\t," if mark in head)
    for end in ("\n", "\r\n", "\r"):  # the last is a Macintosh's
        reply = "a;b" if mark == "," else "a, b"
        rows = f'{head}\n"1{mark} 2"{mark}"{reply}\nc"\n'
        (tmp_path / "a.csv").write_text(rows, newline=end)
        [record] = read_records(tmp_path / "a.csv")
        assert (record.question, record.reply) == (f"1{mark} 2", f"{reply}\nc")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"instruction,output,output\na,b,c\n", "line 1 names the column 'output' twice"),
        ("a.csv", b",\na,b\n", "line 1 names the columns '', '': it should name `question` and `answer`"),
        ("a.csv", b"instruction,output\na,b\na\n", "line 3: 1 cells, the first line names 2 columns"),
        ("a.csv", b'instruction,output\na,"b"c\n', "line 2: not valid CSV"),
        ("a.csv", b'instruction,output\n"a\nb",c\n"d\n\ne",f,g\n', "line 4: 3 cells, the first line names 2 columns"),
        ("a.csv", b'instruction,output\na,b\n"c,d\ne,f\n', "line 3: not valid CSV: unexpected end of data"),
        ("a.csv", b'messages,weight\n"[\n]",1\n', "line 2: 'messages' is an empty list"),
        ("a.tsv", b"instruction\toutput\n", "holds no rows"),
        ("a.jsonl.gz", b"\x1f\x8bnothing", "is not a complete gzip file"),
        ("a.json.gz", gzip.compress(b"[" * 99, mtime=0)[:-9], "is not a complete gzip file"),
        ("a.parquet", b"PAR0", "is not a readable .parquet file"),
        ("a.arrow", b"ARROW0", "is not a readable .arrow file"),
        ("a.json", b'[{"instruction": "a", "output": "b", "output": "c"}]', "the key 'output' twice ('b' and 'c')"),
        ("a.jsonl", b'\n{"messages": [{"role": "user", "role": "x"}]}\n', "line 2: an object has the key 'role' twice"),
    ],
)
def test_broken_formats(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        JSON(json_path=tmp_path / name).records()
    assert message in str(error.value) and str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize(
    ("names", "count", "message"),
    [
        (["question", "answer", "answer"], 1, "the column 'answer' twice: leave one of them out"),  # the last of them would count
        (["question", "answer"], 0, "holds no rows: add records"),
    ],
)
def test_columns_are_checked_as_those_of_a_table(suffix: str, names: list[str], count: int, message: str, tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"] * count, pyarrow.string())] * len(names), names=names)
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as file:
            file.write_table(table)
    with pytest.raises(UserError, match=message):
        read_records(path)


def test_large_gz_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litgpt.data.sources.MOST_UNPACKED", 1000)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b" " * 1001))
    with pytest.raises(UserError, match="more than 1,000 bytes once it is unpacked"):
        JSON(json_path=tmp_path / "a.json.gz").records()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["saved", "saved parts", "folder"])
def test_datasets_of_the_library(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = {part: [{**RECORD, "output": f"{part} {i}"} for i in range(2)] for part in ("train", "validation")}
    parts = datasets.DatasetDict({part: datasets.Dataset.from_list(records) for part, records in rows.items()})
    folder = tmp_path / "data"
    if where == "folder":
        folder.mkdir()
        for part, records in parts.items():
            records.to_parquet(folder / f"{part}-00000-of-00001.parquet")
    else:
        (parts["train"] if where == "saved" else parts).save_to_disk(folder)
    train, val = JSON(json_path=folder).records()
    assert [record.reply for record in train] == ["train 0", "train 1"]
    assert [record.reply for record in val or []] == ([] if where == "saved" else ["validation 0", "validation 1"])


@pytest.mark.parametrize("where", ["org/name", "saved", "folder"])
@pytest.mark.parametrize("parts", [("train", "validation"), ("train",), None])
def test_datasets(where: str, parts: tuple[str, ...] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of the hub, folders of `save_to_disk` and folders of data files go to the datasets library."""
    rows = {part: [{**RECORD, "output": f"{part} {i}"} for i in range(2)] for part in parts or ("train",)}
    asked: list[tuple[str, str]] = []

    def loader(function: str) -> Any:
        return lambda path: (asked.append((function, path)), rows if parts else rows["train"])[1]

    stand_in = ModuleType("datasets")
    stand_in.__dict__.update(load_dataset=loader("load_dataset"), load_from_disk=loader("load_from_disk"))
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    path = Path(where) if "/" in where else tmp_path
    if where == "saved":
        (tmp_path / "dataset_info.json").write_text("{}")
    elif where == "folder":
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "train-00000-of-00001.parquet").touch()
    train, val = JSON(json_path=path).records()
    assert asked == [("load_from_disk" if where == "saved" else "load_dataset", str(path))]
    assert [record.reply for record in train] == [f"{(parts or ('train',))[0]} {i}" for i in range(2)]
    assert [record.reply for record in val or []] == (["validation 0", "validation 1"] if parts and len(parts) > 1 else [])
    assert JSON(json_path=path, val_split_fraction=0.5).records()[1] is None


def test_datasets_is_optional_and_its_errors_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'org/name is not a local file or folder.* needs .*\(datasets\): pip install "litgpt\[data\]"'):
        JSON(json_path=Path("org/name")).records()
    stand_in = ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    stand_in.__dict__.update(load_dataset=lambda path: {"a": [], "b": []})
    with pytest.raises(UserError, match="has the splits a, b, but none named train"):
        JSON(json_path=Path("org/name")).records()
    stand_in.__dict__.update(load_dataset=lambda path: {}["no such data set\nsecond line"])
    with pytest.raises(UserError, match="org/name: no file or folder, and `datasets` cannot read it: 'no such data set"):
        JSON(json_path=Path("org/name")).records()
