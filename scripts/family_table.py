"""Write docs/families.md: run the tests and record which family passes them. --check compares the table with the collected tests."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from litgpt import families

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "families.md"
COLUMNS = {
    "forward": ("families/test_parity.py", ("test_logits", "test_cached_decoding", "test_right_padded_batch")),
    "LoRA": ("families/test_adapters.py", ("test_lora_gradients_are_those_of_the_merged_weights", "test_lora_cached_decoding")),
    "Skip2-LoRA": (
        "families/test_adapters.py",
        ("test_skip2lora_against_hooks_on_transformers", "test_a_cached_step_is_an_uncached_one"),
    ),
    "HF in, out": ("convert/test_round_trip.py", ("test_hf_to_litgpt_to_hf",)),
    "GGUF in, out": ("convert/gguf/test_writer.py", ("test_there_and_back_and_into_transformers",)),
    "PEFT": ("convert/test_peft.py", ("test_peft_computes_the_same", "test_ours_there_and_back")),
    "hooks on transformers": ("integrations/test_transformers.py", ("test_logits_equal_ours",)),
}
HEAD = """# Families

Made by `python scripts/family_table.py` from the tests, which compare tiny random models with transformers, PEFT and the gguf library.
`yes`: the column's tests pass; `-`: not tested.

- forward: logits in one pass, with the key/value cache, in padded batches, beyond sliding windows
- LoRA, Skip2-LoRA: gradients, cached decoding, training from cached activations
- HF in, out: from Hugging Face to litgpt and back, every tensor bit for bit
- GGUF in, out: to a GGUF file and back; where transformers supports the architecture, it reads the file
- PEFT: adapters to PEFT's format and back; hooks: `litgpt.integrations.transformers`

"""


REFUSED = ("", "Refused, with a message that says so, are all other architectures, among them:", "")


class Recorder:
    """Record for each column and family if all its tests passed, or exist if they are only collected."""

    def __init__(self) -> None:
        self.passed: dict[tuple[str, str], bool] = {}
        self.cells: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            name = getattr(item, "originalname", "")
            params = item.callspec.params if hasattr(item, "callspec") else {}
            family = params.get("family") or params.get("case")
            for column, (file, functions) in COLUMNS.items():
                if name in functions and family and item.nodeid.split("::")[0].endswith(file):
                    self.cells[item.nodeid] = (column, family)
                    self.passed[column, family] = True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cell = self.cells.get(report.nodeid)
        if cell and not report.passed:
            self.passed[cell] = False

    def table(self) -> str:
        tested = dict.fromkeys(family for _, family in self.passed)
        lines = [f"| family | {' | '.join(COLUMNS)} |", "|" + "---|" * (len(COLUMNS) + 1)]
        words = {True: "yes", False: "**fails**", None: "-"}
        for family in sorted(tested):
            cells = (words[self.passed.get((column, family))] for column in COLUMNS)
            lines.append(f"| {family} | {' | '.join(cells)} |")
        refused = (f"- `{kind}`: {reason}" for kind, reason in sorted(families.REFUSED.items()))
        return HEAD + "\n".join([*lines, *REFUSED, *refused]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare docs/families.md with the collected tests")
    check = parser.parse_args().check
    recorder = Recorder()
    files = dict.fromkeys(str(ROOT / "tests" / file) for file, _ in COLUMNS.values())
    options = ["--collect-only"] if check else []
    code = pytest.main([*files, "-q", "--no-header", "-m", "not gpu", *options], plugins=[recorder])
    if check:
        if code == 0 and TABLE.read_text(encoding="utf-8") == recorder.table():
            return 0
        print(f"{TABLE} differs from the tests: run python scripts/family_table.py", file=sys.stderr)
        return 1
    TABLE.write_text(recorder.table(), encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
