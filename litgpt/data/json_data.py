"""A user's own data: a .json or .jsonl file, or a folder with a training and a validation file."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.data.base import DataModule, Record
from litgpt.errors import UserError
from litgpt.files import expand_path, parse_json, read_text

# keys of question and answer; the first pair that a record has counts
PAIRS = (("instruction", "output"), ("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
# key of a conversation -> keys of a turn's role and text
CONVERSATIONS = {"messages": ("role", "content"), "conversations": ("from", "value")}
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
SUFFIXES = (".json", ".jsonl")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
SHOWN = 3  # bad records in an error message


@dataclass
class JSON(DataModule):
    """Records of a .json file (a list), a .jsonl file (one a line), or a folder with train.json(l) and val.json(l).

    A record has `instruction`, `output` and perhaps `input`; or `prompt` and `completion` (or `response`); or `messages`, a list of
    `{"role", "content"}`; or `conversations`, a list of `{"from": "human" | "gpt" | "system", "value"}`.
    """

    json_path: Path | None = None
    """The file, or the folder with train.json(l) and val.json(l)."""
    val_split_fraction: float | None = None
    """Share of a file's samples that is kept for validation. Default: 0.1. Leave it unset for a folder, which has a validation file."""

    @property
    def source(self) -> str:
        return str(self.json_path)

    def records(self) -> tuple[list[Record], list[Record] | None]:
        """Read and check all records. Raise UserError with the file, the line or record, and the problem."""
        if self.json_path is None:
            raise UserError("data.json_path is missing: name a .json or .jsonl file, or a folder with train.json and val.json")
        path = expand_path(self.json_path)
        if not path.is_dir():
            return read_records(path), None
        train, val = _find_file(path, ("train",)), _find_file(path, ("val", "validation", "valid", "test"))
        if self.val_split_fraction is not None:
            raise UserError(f"data.val_split_fraction is set, but {path} has its own validation file {val.name}: leave one of them out")
        return read_records(train), read_records(val)


def _find_file(folder: Path, stems: tuple[str, ...]) -> Path:
    for stem in stems:
        files = [file for suffix in SUFFIXES if (file := folder / f"{stem}{suffix}").is_file()]
        if len(files) > 1:
            raise UserError(f"{folder} has both {files[0].name} and {files[1].name}: remove one")
        if files:
            return files[0]
    raise UserError(
        f"{folder} has no {stems[0]}.json or {stems[0]}.jsonl: a data folder needs a train and a val file. "
        "To split one file, give the file itself as data.json_path"
    )


def read_records(path: Path) -> list[Record]:
    """Return the checked records of a .json or .jsonl file."""
    records: list[Record] = []
    problems: list[str] = []
    for where, entry in _read_entries(path):
        try:
            records.append(check_record(entry))
        except UserError as error:
            problems.append(f"{where}: {error}")
    if problems:
        more = f"; and {len(problems) - SHOWN:,} more" if len(problems) > SHOWN else ""
        raise UserError(f"{path}, {'; '.join(problems[:SHOWN])}{more}")
    return records


def _read_entries(path: Path) -> list[tuple[str, Any]]:
    """Return (place, parsed value) of each record."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a .json or .jsonl file is needed, or a folder with train.json and val.json")
    text = read_text(path, "does not exist: check data.json_path", most=None)
    if not text.strip():
        raise UserError(f"{path} is empty: add records")
    if path.suffix == ".jsonl":
        lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [(f"line {n}", _parse(line, path, n)) for n, line in lines]
    content = _parse(text, path)
    if not isinstance(content, list):
        raise UserError(
            f"{path} holds {_kind(content)}, a list of records is needed: [{{...}}, {{...}}]; or one record a line in a .jsonl file"
        )
    if not content:
        raise UserError(f"{path} holds an empty list: add records")
    return [(f"record {n}", entry) for n, entry in enumerate(content, 1)]


def _parse(text: str, path: Path, line: int | None = None) -> Any:
    hint = ""
    if line is None and re.match(r"\s*\{.*\}\s*\n\s*\{", text):
        hint = ". If it holds one record a line, name it .jsonl"
    elif line == 1 and text.strip() in ("[", "{"):
        hint = ". If it holds one list over many lines, name it .json"
    return parse_json(text, str(path), line, hint)


def check_record(entry: Any) -> Record:
    """Return a record in the form of `instruction`, `input`, `output` or of `messages`. Raise UserError with the key that is wrong."""
    if not isinstance(entry, dict):
        raise UserError(f"{_kind(entry)}, an object with keys is needed")
    for key, names in CONVERSATIONS.items():
        if key in entry:
            return {"messages": _check_turns(entry[key], key, *names)}
    for question, answer in PAIRS:
        if question in entry and answer in entry:
            extra = entry.get("input")
            return {
                "instruction": _check_text(entry[question], question),
                "input": _check_text("" if extra is None else extra, "input"),
                "output": _check_text(entry[answer], answer),
            }
    raise UserError(_missing_keys(list(entry)))


def _missing_keys(keys: list[str]) -> str:
    """Return a message with the missing keys, judged by the pair that fits best, and the keys that may be meant."""
    pair = max(PAIRS, key=lambda pair: sum(key in keys for key in pair))
    missing = [key for key in pair if key not in keys]
    shown = ", ".join(repr(key)[:60] for key in keys[:12]) + (", ..." if len(keys) > 12 else "")
    message = f"no key {' and no key '.join(map(repr, missing))}; it has {shown or 'no keys'}"
    for key in missing:
        near = difflib.get_close_matches(key, [name for name in keys if name not in pair], n=1)
        if near:
            message += f" (is {near[0]!r} meant to be {key!r}?)"
    return message


def _check_text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{key!r} is {_kind(value)}, a text is needed")
    if LONE_SURROGATE.search(value):
        raise UserError(f"{key!r} holds half of a character (a lone surrogate, such as \\ud800): write the whole character")
    return value


def _check_turns(turns: Any, key: str, role_key: str, text_key: str) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not turns:
        raise UserError(f"{key!r} is {'an empty list' if turns == [] else _kind(turns)}, a list of turns is needed")
    messages = []
    for n, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise UserError(f"turn {n} of {key!r} needs the keys {role_key!r} and {text_key!r}")
        role = ROLES.get(turn[role_key]) if isinstance(turn[role_key], str) else None
        if role is None:
            raise UserError(f"turn {n} of {key!r}: {role_key!r} is {repr(turn[role_key])[:60]}, one of {', '.join(ROLES)} is needed")
        if role == "system" and n > 1:
            raise UserError(f"turn {n} of {key!r} is a system message: it can only be the first")
        messages.append({"role": role, "content": _check_text(turn[text_key], text_key)})
    if all(message["role"] != "assistant" for message in messages):
        raise UserError(f"{key!r} has no turn of the assistant, so there is nothing to learn")
    return messages


def _kind(value: Any) -> str:
    """Return the name of a JSON value's type."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names[type(value)]
