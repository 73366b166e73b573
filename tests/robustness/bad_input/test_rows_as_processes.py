"""A dozen rows of the tables as processes of their own, as a shell sees them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.places import Case, Ended, Place, check
from tests.robustness.bad_input import test_checkpoints, test_conversion, test_data_files, test_places, test_settings

ROOT = Path(__file__).parents[3]
TABLES: dict[str, list[Case]] = {
    "settings": test_settings.ROWS,
    "data": test_data_files.ROWS,
    "checkpoints": test_checkpoints.ROWS,
    "sources": test_conversion.ROWS,
    "places": test_places.ROWS,
}
LIGHT = [("settings", name) for name in ("command misspelt", "a foreign class")]
HEAVY = [
    ("settings", "a bomb of aliases"),
    ("settings", "seed=-1"),
    ("settings", "nested too deeply"),
    ("settings", "a file as the checkpoint"),
    ("data", "half a character"),
    ("checkpoints", "a pickle of the old kind"),
    ("checkpoints", "a billion blocks"),
    ("checkpoints", "a template with no end"),
    ("sources", "an index upwards"),
    ("sources", "2^64 tensors"),
    ("places", "a loop of links"),
]


def as_a_process(words: list[Any]) -> Ended:
    command = [sys.executable, "-c", "import sys; from litgpt.__main__ import main; sys.exit(main())", *map(str, words)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(("table", "name"), [*LIGHT, *(pytest.param(*row, marks=pytest.mark.slow) for row in HEAVY)])
def test_a_row_as_a_process(table: str, name: str, place: Place) -> None:
    check(next(case for case in TABLES[table] if case.name == name), place, as_a_process)
