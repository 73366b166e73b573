"""benchmarks/styles.py: the records that are drawn, and the table."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from benchmarks import code_summaries, styles
from litgpt.data import PythonDocs


def test_held_out_records_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(styles, "PythonDocs", partial(PythonDocs, packages=["argparse", "json", "csv"]))
    first, again, other = (styles.draw("docstrings", 12, seed, tmp_path / name) for seed, name in ((0, "a"), (0, "b"), (1, "c")))
    trained, held_out = (file.read_text().splitlines() for file in first)
    assert len(trained) == 12 and held_out and not set(trained) & set(held_out)
    assert [file.read_text() for file in again] == [file.read_text() for file in first]
    assert other[0].read_text() != first[0].read_text()


def test_the_table_has_means_over_seeds() -> None:
    base = {"loss": 4.0, "general": [True, True, False]}
    runs = {
        "wordnet 300 0 default": {"loss": 3.0, "general": [True, False, True], "seconds": 10.0},
        "wordnet 300 1 default": {"loss": 2.0, "general": [True, True, True], "seconds": 20.0},
        "wordnet 300 0 as a style": {"error": "failed"},
        "classes 300 0 default": {"loss": 0.5, "exact_match": 0.875, "general": [True, False, True], "seconds": 10.0},
    }
    bases = {"wordnet 300 0": base, "wordnet 300 1": {**base, "loss": 5.0}, "classes 300 0": base}
    lines = styles.table({"bases": bases, "runs": runs}).splitlines()
    assert lines[2:] == [
        "| wordnet, 300 records | default | 4.500 | 2.500 |  | 3 of 4 | 15 | 2 |",
        "| classes, 300 records | default | 4.000 | 0.500 | 87.5 % | 1 of 2 | 10 | 1 |",
    ]


def test_functions_and_their_summaries(tmp_path: Path) -> None:
    """Those of the right length with a docstring, which is not in the code."""
    body = "".join(f"    value_{i} = {i} * argument\n" for i in range(12))
    long = f'def long(argument):\n    """Return the last multiple of the argument.\n\n    More.\n    """\n{body}    return value_11\n'
    file = tmp_path / "module.py"
    file.write_text(f'{long}\n\ndef short(x):\n    """Return the same value as x."""\n    return x\n\n\ndef bare(argument):\n{body}')
    ((code, answer),) = code_summaries.functions(file)
    assert answer == "Return the last multiple of the argument."
    assert code.startswith("def long(argument):\n    value_0") and code.endswith("return value_11") and "multiple" not in code
