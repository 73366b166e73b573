"""Rows of data files in the usual formats, and of data sets that the `datasets` library reads."""

import csv
import gzip
import importlib
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from litgpt.data.records import KEYS, Record, kind_of, known_key, read_record
from litgpt.errors import UserError, missing_package
from litgpt.files import MISSING, decode_text, parse_json, read_bytes
from litgpt.streams import drawing
from litgpt.text import counted, first_line

LINES = (".jsonl", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}  # and their delimiters
COLUMNS = (".parquet", ".arrow")
TEXTS = (".json", *LINES, *TABLES)
SUFFIXES = (*TEXTS, *(f"{suffix}.gz" for suffix in TEXTS), *COLUMNS)
RUNNING = (".txt", ".md")  # of running text
SAVED = ("dataset_dict.json", "dataset_info.json")  # in a folder of `Dataset.save_to_disk`
VALIDATION = ("val", "validation", "valid", "test")  # names of the validation part
MOST_UNPACKED = 2**32  # bytes of a compressed file or data set, once unpacked
SLICE = 2**28  # bytes of rows that are unpacked at once; a single row may have more
SAVED_AS = dict.fromkeys((".xlsx", ".xls", ".ods"), "save the sheet as CSV, in UTF-8, and name that file")
SAVED_AS |= dict.fromkeys((".pdf", ".docx", ".odt", ".rtf", ".html", ".epub"), "save its text as a .txt file, and name that")
SAVED_AS |= dict.fromkeys(RUNNING, "running text is not read as records: name the file in --data instead, without JSON")
OTHER_FORMATS = {
    b"PK\x03\x04": "an Excel file or an archive",
    b"\xd0\xcf\x11\xe0": "an Excel file",
    b"\x1f\x8b": "a gzip file",
    b"PAR1": "parquet",
}
SHOWN = 3  # problems in an error message


def suffix_of(path: Path) -> str:
    """Return the suffix that names a file's format, such as ".jsonl.gz"."""
    end = "".join(path.suffixes[-2:]) if path.suffix.lower() == ".gz" else path.suffix
    return end.lower()


def name_of(path: Path) -> str:
    """Return a data file's name without its suffix; other names are unchanged."""
    suffix = suffix_of(path)
    return path.name[: -len(suffix)] if suffix in (*SUFFIXES, *RUNNING) else path.name


def read_records(path: Path) -> list[Record]:
    """Return the records of a file. Raise UserError with the file, the line or record, and the problem."""
    return check_rows(numbered_rows(path), str(path))


def read_rows(path: Path) -> list[Any]:
    """Return the rows of a file as plain values."""
    return [row for _, row in numbered_rows(path)]


def check_rows(rows: Sequence[tuple[str, Any]], source: str) -> list[Record]:
    """Return records of (place, row). Raise UserError with the first places that have a problem."""
    records: list[Record] = []
    problems: dict[str, list[str]] = {}
    for where, row in rows:
        try:
            records.append(read_record(row))
        except UserError as error:
            problems.setdefault(str(error), []).append(where)
    if problems:
        others = {problem: f" and {counted(len(places) - 1, 'other')}" if len(places) > 1 else "" for problem, places in problems.items()}
        shown = [f"{places[0]}{others[problem]}: {problem}" for problem, places in problems.items()]
        raise UserError(f"{source}, {'; '.join(shown[:SHOWN])}{f'; and {more:,} more' if (more := len(shown) - SHOWN) > 0 else ''}")
    return records


def numbered_rows(path: Path) -> list[tuple[str, Any]]:
    """Return (place, row) of each row of a file."""
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        wanted = f"a file with one of the endings {', '.join(SUFFIXES)} is needed, or a folder with a train and a val file"
        raise UserError(f"{path}: {SAVED_AS.get(suffix) or wanted}")
    raw = read_bytes(path, MISSING, most=None)
    if suffix in COLUMNS:
        return _records(_read_columns(raw, path, suffix))
    if not suffix.endswith(".gz") and (format_ := next((name for start, name in OTHER_FORMATS.items() if raw.startswith(start)), None)):
        raise UserError(f"{path} is {format_}, whatever its name says: give it the ending of its format, or save it as CSV in UTF-8")
    text = decode_text(_unpack(raw, path) if suffix.endswith(".gz") else raw, path)
    suffix = suffix.removesuffix(".gz")
    if not text.strip():
        raise UserError(f"{path} is empty: add records")
    if suffix in TABLES:
        return _read_table(text, path, TABLES[suffix])
    if suffix in LINES:
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [(f"line {n}", _parse(line, path, n)) for n, line in lines]
    content = _parse(text, path)
    if isinstance(content, dict) and not content.keys() & KEYS:  # {"version": ..., "data": [...]}
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else content
    if not isinstance(content, list):
        raise UserError(
            f"{path} holds {kind_of(content)}, a list of records is needed: [{{...}}, {{...}}]; or one record a line in a .jsonl file"
        )
    if not content:
        raise UserError(f"{path} holds an empty list: add records")
    return _records(content)


def _records(rows: Sequence[Any]) -> list[tuple[str, Any]]:
    return [(f"record {n}", row) for n, row in enumerate(rows, 1)]


def _parse(text: str, path: Path, line: int | None = None) -> Any:
    hint, stripped = "", text.strip()
    if line is None and re.match(r"\s*\{.*\}\s*\n\s*\{", text):
        hint = ". If it holds one record a line, name it .jsonl"
    elif line == 1 and stripped == "[":
        hint = ". If it holds one list over many lines, name it .json"
    elif line is not None and stripped == "{":
        hint = ". Each record must be one line"
    elif line is not None and stripped.endswith("},"):
        hint = ". Remove the commas between the lines"
    elif wrong := re.match(r"[\[{\s]+([“”„'])", stripped):
        hint = f': " is needed, not {wrong[1]}'
    elif re.search(r",\s*[\]}]$", stripped):
        hint = ". Remove the comma before the last bracket"
    return parse_json(text, str(path), line, hint, unique=True)


def _unpack(raw: bytes, path: Path) -> bytes:
    content = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            while len(content) <= MOST_UNPACKED and (piece := file.read(2**20)):
                content += piece
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a complete gzip file: {error}. Copy it again") from None
    if len(content) > MOST_UNPACKED:
        raise UserError(f"{path} holds more than {MOST_UNPACKED:,} bytes once it is unpacked: split it")
    return bytes(content)


def _read_table(text: str, path: Path, delimiter: str) -> list[tuple[str, Any]]:
    """Return the rows of a table whose first line names the columns. Some spreadsheets write semicolons or tabs instead of commas."""
    names_line = re.split(r"[\r\n]", text, maxsplit=1)[0]
    if delimiter == "," and "," not in names_line:
        delimiter = next((mark for mark in ";\t" if mark in names_line), ",")
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    reader = csv.reader(io.StringIO(text, newline=None), delimiter=delimiter, strict=True)  # a line break in a cell is one character
    rows: list[tuple[str, Any]] = []
    start = 1  # the line in which the row begins: a cell may hold line breaks
    try:
        names = next(reader)
        _require_different(filter(None, names), f"{path}, line 1")  # a spreadsheet's empty columns have no names
        if not any(known_key(name) in KEYS for name in names):
            raise UserError(
                f"{path}, line 1 names the columns {', '.join(map(repr, names[:4]))[:200]}: it should name `question` and `answer`"
            )
        start = reader.line_num + 1
        for cells in reader:
            if any(cells) and len(cells) != len(names):
                raise UserError(f"{path}, line {start}: {len(cells)} cells, the first line names {len(names)} columns")
            if any(cells):
                rows.append((f"line {start}", {name: cell for name, cell in zip(names, cells, strict=True) if name}))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {start}: not valid CSV: {error}") from None
    if not rows:
        raise UserError(f"{path} holds no rows below the names of its columns: add records")
    return rows


def _require_different(names: Iterable[str], where: object) -> None:
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise UserError(f"{where} names the column {repeated[0]!r} twice: leave one of them out")


def _bounded(rows: Iterable[Any], path: Path) -> list[Any]:
    """Return the rows of a columnar format without null keys in objects, since the format gives each object the keys of all rows."""
    bounded, size = [], 0
    for columns in rows:
        size += _size(columns)
        if size > MOST_UNPACKED:
            raise UserError(f"{path} holds more than {MOST_UNPACKED:,} bytes once it is unpacked: split it")
        bounded.append({name: _without_nulls(value) for name, value in columns.items()} if isinstance(columns, dict) else columns)
    if not bounded:
        raise UserError(f"{path} holds no rows: add records")
    return bounded


def _size(value: Any) -> int:
    """Estimate the bytes that a plain value takes in memory."""
    if isinstance(value, str | bytes):
        return 50 + len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 50 + sum(map(_size, parts))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None} if isinstance(value, dict) else value


def _read_columns(raw: bytes, path: Path, suffix: str) -> list[Any]:
    arrow, parquet = import_library("pyarrow", path), import_library("pyarrow.parquet", path)
    try:
        if suffix == ".parquet":
            schema = parquet.ParquetFile(io.BytesIO(raw)).schema
            columns = [schema.column(number).path for number in range(len(schema))]  # a value that rows repeat is in memory once
            file = parquet.ParquetFile(io.BytesIO(raw), read_dictionary=columns)
            names, batches = file.schema_arrow.names, file.iter_batches(batch_size=1_000)
        elif raw.startswith(b"ARROW1"):  # the format with an index at its end
            file = arrow.ipc.open_file(raw)
            names, batches = file.schema.names, map(file.get_batch, range(file.num_record_batches))
        else:
            batches = arrow.ipc.open_stream(raw)
            names = batches.schema.names
        _require_different(names, path)
        return _bounded(_unpacked(batches), path)
    except UserError:
        raise
    except (ValueError, OSError, MemoryError) as error:  # the library raises these
        raise UserError(f"{path} is not a readable {suffix} file: {str(error)[:200].rstrip('.')}. Copy it again") from None


def _unpacked(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield rows of Arrow's batches as plain values. Few are unpacked at once: each row may repeat the longest value of its batch."""
    for batch in batches:
        count = max(1, SLICE // max(1, batch.get_total_buffer_size()))
        for start in range(0, batch.num_rows, count):
            yield from batch.slice(start, count).to_pylist()


def import_library(name: str, what: object) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise missing_package(f"{what}: reading it", name.partition(".")[0], "data") from None


def is_dataset(path: Path) -> bool:
    """Return True for the name of a data set on the hub, and for a folder with data files and none named train."""
    if path.is_dir():
        return not named(path, "train") and any(file.stem not in VALIDATION for file in visible(path, SUFFIXES))
    return not path.exists() and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(path)) is not None and suffix_of(path) not in SUFFIXES


def named(folder: Path, stem: str) -> list[Path]:
    """Return the data files of a folder that have this name and any suffix, in order."""
    return sorted(file for file in folder.iterdir() if name_of(file) == stem and suffix_of(file) in SUFFIXES and file.is_file())


def visible(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Return the files below a folder whose formats have these suffixes, in order, without hidden ones."""
    files = (file for file in folder.rglob("*") if suffix_of(file) in suffixes and file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def texts_of(folder: Path) -> list[Path]:
    """Return the .txt files below a folder, or its .md files if it has none."""
    return next((files for suffix in RUNNING if (files := visible(folder, [suffix]))), [])


def is_text(path: Path) -> bool:
    """Return True for a .txt or .md file, and for a folder of such files.

    A folder that also has data files holds records, unless it has .txt files and no training data.
    """
    if not path.is_dir():
        return suffix_of(path) in RUNNING
    if visible(path, SUFFIXES):
        return any(suffix_of(file) == ".txt" for file in path.iterdir()) and not named(path, "train")
    return bool(texts_of(path))


def read_dataset(path: Path) -> tuple[list[Record], list[Record] | None]:
    """Return the training and validation records of a data set; None for the latter if it has no such part."""
    datasets = import_library("datasets", f"{path}" if path.is_dir() else f"{path} is not a local file or folder; as a data set of the hub")
    saved = any((path / name).is_file() for name in SAVED)
    try:
        with drawing():
            loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
        parts: Mapping[str, Any] = loaded if isinstance(loaded, Mapping) else {"train": loaded}
        val = next((name for name in VALIDATION if name in parts), None)
        rows = {name: _bounded(parts[name], path) for name in ("train", val) if name is not None and name in parts}
    except UserError:
        raise
    except Exception as error:  # the library raises errors of many other libraries
        reason = first_line(error)[:300]
        raise UserError(f"{path}: no file or folder, and `datasets` cannot read it: {reason}. Check data.json_path") from None
    if "train" not in rows:
        raise UserError(f"{path} has the splits {', '.join(map(str, parts))}, but none named train: save the one to train on")
    read = {name: check_rows(_records(part), f"{path}, {name}") for name, part in rows.items()}
    return read["train"], read[val] if val else None
