"""Functions of installed packages and what they do, in a sentence: a real data set of long prompts and short answers, for benchmarks.

    {"instruction": "What does this Python function do?\\n\\n```python\\ndef ...\\n```", "output": "Return the ..."}

The functions are those of the standard library and of torch, without their docstrings, whose first paragraphs are the answers.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from litgpt.data.docstrings import first_paragraph

CODE_CHARS = (200, 800)
ANSWER_CHARS = (20, 200)
NOT_READ = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "distributed", "_inductor", "onnx"}


def records(seed: int) -> list[dict[str, str]]:
    """Return a record for each function, one for each answer, in the seed's order."""
    roots = Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent
    files = sorted(file for root in roots for file in root.rglob("*.py") if not NOT_READ & set(file.relative_to(root).parts))
    found = {answer: code for file in files for code, answer in functions(file)}
    asked = "What does this Python function do?\n\n```python\n{}\n```"
    drawn = [{"instruction": asked.format(code), "output": answer} for answer, code in found.items()]
    random.Random(seed).shuffle(drawn)
    return drawn


def functions(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the code and the summary of each function of a file that has both."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="replace"))):
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)) and node.body[1:]:
            node.body = node.body[1:]
            code, answer = ast.unparse(node), first_paragraph(doc, *ANSWER_CHARS)
            if answer and CODE_CHARS[0] <= len(code) <= CODE_CHARS[1]:
                yield code, answer
