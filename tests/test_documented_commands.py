"""Every `litgpt` command of README.md and docs/ as a process, in the order of its page, with a tiny model in the place of each.

Runs are shortened. A checkpoint that only a long run has, and a library that is not installed, are refused with a message.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from tests.helpers import fake_hub, tiny
from tests.helpers.fake_hub import Hub
from tests.helpers.jobs import environ
from tests.test_readme import PAGES, ROOT, command_lines

pytestmark = pytest.mark.slow

LINES = {page.name: lines for page in PAGES if (lines := command_lines(page.read_text(encoding="utf-8"), "litgpt"))}
MODELS = (
    *("path/to/model", "path/to/small", "path/to/large", "CHECKPOINT", "MODEL"),
    *("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct", "checkpoints/meta-llama/Llama-2-7b-hf", "checkpoints/EleutherAI/pythia-14m"),
)
RUNS = ("out/demo", "out/lora", "out/clean", "out/ref", "out/faq", "out/codes")  # that the pages take as given
SHORTER = (
    (r" \.\.\. ", " path/to/model --data my.jsonl "),
    (r"--max_tokens \d+", "--max_tokens 4000 --train.global_batch_size 2 --train.micro_batch_size 2 --train.max_seq_length 64"),
    (r"--max_steps \d+", "--max_steps 2"),
    (r"--n \d+", "--n 2"),
    (r" --port 8001", ""),
    ("debug.yaml", "debug.yaml --train.global_batch_size 2 --train.micro_batch_size 2 --train.max_seq_length 64"),
)
REFUSED = {  # part of a line -> part of the message
    "--resume out/x/step-000400": "step-000400",
    "--tasks hellaswag": "the data of a task cannot be loaded",
}
CHECK = "def is_right(record, answer):\n    return len(answer) % 2 == 0\n"


def pair(number: int) -> dict[str, Any]:
    return {"instruction": f"What is {number} and one?", "output": f"It is {number + 1}."}


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def run(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "litgpt", *words]
    return subprocess.run(argv, cwd=folder, env={**environ(), **variables}, input="Hi\n", capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    """A folder with the models, runs and files that the pages name."""
    folder = tmp_path_factory.mktemp("world")
    tiny.hf_llama(vocab_size=512, max_position_embeddings=1024, num_hidden_layers=30).save_pretrained(folder / MODELS[0])
    write_tiny_tokenizer(folder / MODELS[0])
    for name in MODELS[1:]:
        shutil.copytree(folder / MODELS[0], folder / name)
    (folder / "config_hub").symlink_to(ROOT / "config_hub")
    (folder / "checks.py").write_text(CHECK)
    facts = [pair(number) for number in range(20)]
    for name in ("my.jsonl", "faq.jsonl", "data.jsonl", "noisy/train.jsonl", "noisy/val.jsonl"):
        write_lines(folder / name, facts)
    (folder / "mine.json").write_text(json.dumps(facts))
    write_lines(folder / "questions.jsonl", [{"question": fact["instruction"], "answer": fact["output"]} for fact in facts])
    write_lines(folder / "pairs.jsonl", [{"prompt": f["instruction"], "chosen": f["output"], "rejected": "No."} for f in facts])
    rated = [{**fact, "correct": number % 2 == 0} for number, fact in enumerate(facts)]
    for name in ("held_out.jsonl", "answers/train.jsonl", "answers/val.jsonl"):
        write_lines(folder / name, rated)
    (folder / "texts").mkdir()
    (folder / "texts/a.txt").write_text("Once there was a fox. " * 400)
    (folder / "data/tinystories").mkdir(parents=True)
    for name in ("data00.json", "data01.json"):
        (folder / "data/tinystories" / name).write_text(json.dumps([{"story": "Once there was a fox. " * 40}] * 4))
    (folder / "my_task.yaml").write_text("task: mine\n")
    words = ["finetune_lora", MODELS[0], "--data", "JSON", "--data.json_path", "my.jsonl", "--data.val_split_fraction", "0.2"]
    done = run([*words, "--out_dir", RUNS[0], "--train.max_steps", "1"], folder)
    assert done.returncode == 0, done.stderr
    for name in RUNS[1:]:
        shutil.copytree(folder / RUNS[0], folder / name)
    return folder


@pytest.fixture
def hub(world: Path, tmp_path: Path) -> Iterator[Hub]:
    sets = tmp_path / "sets"
    sets.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([{**pair(number), "input": ""} for number in range(40)]), sets / "alpaca_2000.parquet")
    models = {"HuggingFaceTB/SmolLM2-360M-Instruct": world / MODELS[0], "mhenrichsen/alpaca_2k_test": sets}
    with fake_hub.serve(Hub(models, uploads=tmp_path / "uploads", token="hf_a_token_of_tests")) as hub:
        yield hub


def words_of(line: str, folder: Path) -> list[str]:
    """Return a line's words, shortened."""
    for long, short in SHORTER:
        line = re.sub(long, short, line)
    words = shlex.split(line, comments=True)[1:]
    if words[0] in ("finetune", "finetune_lora", "sweep", "pretrain"):
        words += [] if "max_steps" in line or "max_tokens" in line else ["--train.max_steps", "2"]
        words += [] if "--out_dir out/x" in line else ["--overwrite", "true"]
    if words[0] == "sample":
        (folder / words[words.index("--out") + 1]).unlink(missing_ok=True)  # the page shows it in several ways
    return words


def serve(words: list[str], folder: Path, **variables: str) -> None:
    """Start the server, read its page and end it."""
    argv = [sys.executable, "-m", "litgpt", *words, "--port", "0"]
    with subprocess.Popen(argv, cwd=folder, env={**environ(), **variables}, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = ""
        while not (address := re.search(r"http://[\d.]+:\d+", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        with urllib.request.urlopen(address[0]) as page:
            assert page.status == 200 and b"<html" in page.read()
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM, said


@pytest.mark.parametrize("page", LINES)
def test_every_command_of_a_page(page: str, world: Path, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(world, folder, symlinks=True)
    variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": str(hub.token), "HF_HOME": str(tmp_path / "home")}
    variables |= {"HF_HUB_DISABLE_XET": "1"}
    if page != "README.md":  # there it is made on the page
        shutil.copytree(folder / RUNS[0], folder / "out/mine")
    for line in LINES[page]:
        words = words_of(line, folder)
        if words[0] == "serve":
            serve(words, folder, **variables)
            continue
        done = run(words, folder, **variables)
        refusal = next((message for part, message in REFUSED.items() if part in line), None)
        assert "Traceback" not in done.stderr, f"{line}\n{done.stderr}"
        assert (done.returncode == 0) == (refusal is None), f"{line}\n{done.stderr}"
        assert refusal is None or refusal in done.stderr, f"{line}\n{done.stderr}"
