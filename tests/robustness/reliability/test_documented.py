"""docs/reliability.md names tests that there are, and every exit code that there is."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from litgpt.errors import NonFiniteError, OutOfMemory, UserError

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs/reliability.md").read_text()


@cache
def functions(file: str) -> dict[str, ast.FunctionDef]:
    """Return the functions at the top level of a file."""
    return {node.name: node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_named_test_exists() -> None:
    named = re.findall(r"\| .+ \| (tests/\S+)::(\w+) \|", TEXT)
    assert len(named) > 30
    for file, function in named:
        assert function in functions(file), f"{file}::{function}"


def test_slow_tests_are_called_slow_and_no_others() -> None:
    for line, file, function in re.findall(r"(\| .+ \| (tests/\S+)::(\w+) \|)", TEXT):
        marked = any("slow" in ast.unparse(decorator) for decorator in functions(file)[function].decorator_list)
        assert ("(slow)" in line) == marked, line


def test_exit_codes_are_those_of_the_errors() -> None:
    for error in (UserError, NonFiniteError, OutOfMemory):
        assert f"| {error.exit_code} | " in TEXT
