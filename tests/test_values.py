"""Values of YAML files and texts of the command line, converted to the types of settings."""

import math
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest

from litgpt.__main__ import load
from litgpt.cli import parse
from litgpt.values import convert, describe, from_text, is_mapping

Blocks = Optional[Union[int, list[Union[int, str]], str]]
Resume = Union[bool, Literal["auto"], Path]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4),
        ("1_000", 1000),
        ("010", 10),
        ("0x10", 16),
        ("2e-3", 0.002),
        ("true", True),
        ("[1, x]", [1, "x"]),
        ("{a: 1}", {"a": 1}),
        ("null", None),
        ("~", None),
        ("", ""),
        ("  ", "  "),
        ("'4'", "'4'"),
        ("# no comment", "# no comment"),
        ("hello # world", "hello # world"),
        ("a: b: c", "a: b: c"),
        ("[1", "[1"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_texts(text: str, value: Any) -> None:
    result = from_text(text)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        (3, int, 3),
        ("3", int, 3),
        (3, float, 3.0),
        ("3", float, 3.0),
        ("3", str, "3"),
        ("null", str, "null"),
        ("null", Optional[str], None),
        ("", Optional[str], ""),
        ("true", Optional[str], "true"),
        ("[1]", Optional[str], "[1]"),
        ("yes", bool, True),
        ("off", Literal["auto", "off"], "off"),
        ("null", Optional[int], None),
        ("5", Path, Path("5")),
        ("null", Optional[Path], None),
        ("auto", Resume, "auto"),
        ("true", Resume, True),
        ("a/b", Resume, Path("a/b")),
        ("auto", Union[int, str], "auto"),
        ("2", Union[int, str], 2),
        ("[0, h.1]", Blocks, [0, "h.1"]),
        ("last:6", Blocks, "last:6"),
        (["0", 1], Blocks, [0, 1]),
        ([1, 2.5], list[float], [1.0, 2.5]),
        ({1: 2}, dict[str, Any], {"1": 2}),
        ("{a: 1}", Optional[dict[str, Any]], {"a": 1}),
        ("3", Any, "3"),
        (0.5, float | None, 0.5),
    ],
)
def test_converted(given: Any, kind: Any, value: Any) -> None:
    result = convert(given, kind)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (4.0, int),
        ("4.0", int),
        ("'4'", int),
        (True, int),
        ("true", float),
        (math.nan, float),
        (math.inf, float),
        ("nan", float),
        (".inf", float),
        (10**400, float),
        (5, str),
        (True, Optional[str]),
        (1, bool),
        ("1", bool),
        (None, bool),
        (None, int),
        (5, Path),
        (False, Literal["off"]),
        ([1], Literal["off"]),
        ([[1]], Blocks),
        ([True], Blocks),
        ({"a": 1}, Blocks),
        ("x", list[int]),
        ([1, "x"], list[int]),
        ([1], dict[str, Any]),
    ],
)
def test_refused(given: Any, kind: Any) -> None:
    with pytest.raises(ValueError, match="is not"):
        convert(given, kind)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Optional[int], "an integer or null"),
        (bool | None, "true or false or null"),
        (Path, "a path"),
        (Literal["a", "b"], "one of a, b"),
        (Optional[Literal["a", "b"]], "one of a, b or null"),
        (Blocks, "an integer or a list (each an integer or text) or text or null"),
        (Union[str, dict[str, Any]], "text or a mapping"),
    ],
)
def test_described(kind: Any, words: str) -> None:
    assert describe(kind) == words


def test_mappings() -> None:
    assert is_mapping(dict[str, int]) and is_mapping(Optional[dict[str, Any]]) and is_mapping(dict)
    assert not is_mapping(str) and not is_mapping(list[dict[str, int]])


def test_paths_are_expanded_wherever_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell leaves `~` alone behind `=`, and YAML knows neither form."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text("out_dir: ~/a\nskip2lora_cache_dir: $HOME/b\ndata:\n  class_path: JSON\n  init_args:\n    json_path: ~/d.json\n")
    values = parse("litgpt finetune", load("finetune_lora"), [str(file), "--checkpoint_dir=~/c"])
    assert (values["checkpoint_dir"], values["out_dir"]) == (tmp_path / "c", tmp_path / "a")
    assert values["skip2lora_cache_dir"] == tmp_path / "b" and values["data"].json_path == tmp_path / "d.json"


def test_a_list_in_a_locale_that_lacks_its_characters() -> None:
    assert convert("[<ü>, 日]".encode().decode("ascii", "surrogateescape"), list[str]) == ["<ü>", "日"]
