"""Facts of one's own: what a tuned model repeats when it is asked in other words, what it forgets, and how long that takes.

    python -m benchmarks.own_data CHECKPOINT_DIR [--sets faq codes-once ...] [--sizes 60] [--seeds 0 1 2] [--settings default ...]

Each setting is a `litgpt finetune MODEL --data FILE ...` in a process of its own on the invented facts of `benchmarks.facts`; seconds are
those of the whole process. Recall is the share of facts in the greedy answers to questions in words that were not trained on, alone and as
the second question of a conversation, after another fact's question and its right answer; `general` the share of common-knowledge questions
that the base answers right and the tuned model still does. OUT/results.json is written after each run, and a run that it has is not
repeated; OUT/own_data.md is the table of means.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import facts
from benchmarks.process import ROOT, in_worker, printed_by, run_litgpt
from benchmarks.runs import measure_missing, results_in, write_jsonl
from litgpt.text import markdown_table

LINEAR = [word for name in ("query", "key", "value", "projection", "mlp") for word in (f"--lora_{name}", "true")]
LITGPT = ["--train.replay", "0", "--epochs", "5", "--train.global_batch_size", "16", "--train.micro_batch_size", "1"]
SETTINGS: dict[str, list[str]] = {  # words behind `litgpt finetune MODEL --data FILE`
    "default": [],
    "to the last epoch": ["--eval.interval", "1000000", "--eval.initial_validation", "false", "--eval.max_new_tokens", "0"],
    "without general questions": ["--train.replay", "0"],
    "without second questions": ["--train.follow_ups", "0"],
    "without word dropout": ["--train.word_dropout", "0"],
    "Skip2-LoRA, 12 epochs": ["--skip2lora_enabled", "true", "--epochs", "12"],
    "warm-up of 3 epochs, 5 cached": [
        *("--skip2lora_enabled", "true", "--skip2lora_warmup_epochs", "3", "--skip2lora_warmup_lr", "2e-3", *LINEAR),
        *("--epochs", "5", "--optimizer.lr", "5e-4"),
    ],
    "LoRA, 8 epochs at 1e-3": ["--skip2lora_enabled", "false", "--epochs", "8", "--optimizer.lr", "1e-3"],
    "LitGPT's defaults": [
        *LITGPT,
        "--lora_query",
        "true",
        "--lora_value",
        "true",
        "--train.lr_warmup_steps",
        "100",
        "--optimizer.lr",
        "1e-3",
    ],
}
PEFT = {  # epochs and learning rate of PEFT's LoRA on every linear layer
    f"PEFT, {epochs} epochs at {rate}": {"epochs": epochs, "rate": float(rate)} for epochs in (5, 10) for rate in ("5e-4", "1e-3", "2e-3")
}
ANSWER_TOKENS = 24


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def ask(folder: Path, name: str, size: int, seed: int) -> dict[str, Any]:
    """Return which facts, alone and as a second question, and which general questions the model in `folder` answers right."""
    from litgpt import LLM

    made = facts.make(name, size, seed) if size else facts.Facts([], [], [])
    asked, llm = made.questions, LLM.load(folder)
    texts = [question.text for question in asked + facts.GENERAL]
    earlier = [turn(question.text, answer) for question, answer in zip(asked, made.answers, strict=True)]
    chats = [[*earlier[i - 1], {"role": "user", "content": question.text}] for i, question in enumerate(asked)]
    first, second = (llm.generate(prompts, max_new_tokens=ANSWER_TOKENS, temperature=0.0) if prompts else [] for prompts in (texts, chats))
    return marks(asked, first) | {"second": [question.is_right(str(text)) for question, text in zip(asked, second, strict=True)]}


def marks(asked: list[facts.Question], answers: Any) -> dict[str, Any]:
    """Return which answers, first to `asked` and then to the general questions, are right."""
    right = [question.is_right(str(answer)) for question, answer in zip(asked + facts.GENERAL, answers, strict=True)]
    return {"facts": right[: len(asked)], "general": right[len(asked) :]}


def write_records(name: str, size: int, seed: int, folder: Path) -> Path:
    """Write the records of a set to a file in `folder`."""
    return write_jsonl(folder / f"{name}-{size}-{seed}.jsonl", facts.make(name, size, seed).records)


def measure_peft(checkpoint_dir: Path, name: str, size: int, seed: int, setting: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the figures of one setting of PEFT on one set; its base is the checkpoint as a Hugging Face model in `folder`."""
    base = folder / "hf"
    if not base.is_dir():
        code, output = run_litgpt(["convert_from_litgpt", str(checkpoint_dir), str(base)])
        if code:
            return {"error": output.strip().splitlines()[-1]}
    asked = facts.make(name, size, seed).questions
    run = {
        "checkpoint": str(base),
        "data": str(write_records(name, size, seed, folder)),
        "out_dir": str(folder / "peft"),
        "questions": [question.text for question in asked + facts.GENERAL],
        "answer_tokens": ANSWER_TOKENS,
        "seed": seed,
        "batch": 4,
        "r": 16,
        "warmup": 5,
        "weight_decay": 0.0,
        **setting,
    }
    found = printed_by([sys.executable, str(ROOT / "benchmarks/peers/facts_with_peft.py"), json.dumps(run)])
    return found if "error" in found else {"seconds": found["seconds"], **marks(asked, found["answers"])}


def measure(checkpoint_dir: Path, name: str, size: int, seed: int, words: list[str], folder: Path) -> dict[str, Any]:
    """Return the figures of one setting on one set."""
    data, out_dir = write_records(name, size, seed, folder), folder / "run"
    start = time.perf_counter()
    command = ["finetune", str(checkpoint_dir), "--data", str(data), "--out_dir", str(out_dir), "--overwrite", "true", "--seed", str(seed)]
    code, output = run_litgpt([*command, *words])
    seconds = time.perf_counter() - start
    if code:
        return {"error": output.strip().splitlines()[-1]}
    answers = in_worker("benchmarks.own_data", {"folder": str(out_dir / "final"), "name": name, "size": size, "seed": seed})
    return {"seconds": seconds, **answers}


def table(results: dict[str, Any]) -> str:
    """Return a Markdown table of each set and size: means over the seeds of recall, of what is kept of general knowledge, of seconds."""
    known = results["base"]["general"]
    rows = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, run in results["runs"].items():
        name, size, _, setting = key.split(" ", 3)
        groups.setdefault((f"{name}, {size} records", setting), []).append(run)
    for (data, setting), runs in groups.items():
        done = [run for run in runs if "error" not in run]
        if not done:
            rows.append([data, setting, "failed", "", "", "", ""])
            continue
        recall, second = ([sum(run[key]) / len(run[key]) for run in done if key in run] for key in ("facts", "second"))
        kept = [sum(a and b for a, b in zip(run["general"], known, strict=True)) / sum(known) for run in done]
        means = [f"{100 * sum(values) / len(values):.0f} %" if values else "" for values in (recall, second, kept)]
        rows.append([data, setting, *means, f"{sum(run['seconds'] for run in done) / len(done):.0f}", str(len(done))])
    return markdown_table(["data", "setting", "facts right", "as the second question", "general knowledge kept", "seconds", "seeds"], rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint_dir", type=Path)
    parser.add_argument("--sets", nargs="+", choices=list(facts.SETS), default=["faq", "codes", "glossary"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[60])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=[*SETTINGS, *PEFT], default=[*SETTINGS, *PEFT])
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks/own_data"))
    chosen = parser.parse_args()
    results = results_in(chosen.out)
    if "base" not in results:
        results["base"] = in_worker("benchmarks.own_data", {"folder": str(chosen.checkpoint_dir), "name": "", "size": 0, "seed": 0})
    jobs = []
    for seed, size, name, setting in itertools.product(chosen.seeds, chosen.sizes, chosen.sets, chosen.settings):
        how: Any = (measure_peft, PEFT[setting]) if setting in PEFT else (measure, SETTINGS[setting])
        jobs.append((f"{name} {size} {seed} {setting}", partial(how[0], chosen.checkpoint_dir, name, size, seed, how[1], chosen.out)))
    measure_missing(results, jobs, table, chosen.out / "own_data.md")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        job = json.loads(sys.argv[2])
        print(json.dumps(ask(Path(job.pop("folder")), **job)))
    else:
        sys.exit(main())
