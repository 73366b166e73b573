"""Answers of which one is better than the other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 questions with two answers each, two of them held out."""
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {"prompt": f"add {i} and {i + 1}", "chosen": f"{2 * i + 1} is the sum", "rejected": "no" + " idea" * (i % 3)} for i in range(20)
    ]
    file.write_text("".join(json.dumps({**row, "weight": 1 + i % 2}) + "\n" for i, row in enumerate(rows)))
    return file
