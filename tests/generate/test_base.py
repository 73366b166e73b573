"""`litgpt generate` as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from litgpt.__main__ import main
from litgpt.api import LLM
from litgpt.generate.base import Adapter, AdapterV2, Full
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def base(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    return tiny.write_base(tmp_path / "base", write_tiny_tokenizer)


def run(*words: object) -> int:
    return main(["generate", *map(str, words)])


def test_prompt_and_answer_on_stdout_figures_on_stderr(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, "--prompt", "hello", "--temperature", 0, "--max_new_tokens", 20, "--precision", "32-true") == 0
    out, err = capsys.readouterr()
    llm = LLM.load(base, precision="32-true", device="cpu")
    answer: Any = llm.generate("hello", max_new_tokens=20, temperature=0.0, return_as_token_ids=True)
    assert out == llm.tokenizer.decode([*llm.prompt_ids(llm.prompt_style.apply("hello")), *answer.tolist()]) + "\n"
    assert re.match(re.escape(str(base)) + r": tiny, float32 on cpu, loaded in \d", err)
    assert re.search(r"\n20 tokens in \d+\.\d\d s, \d+\.\d tokens/s, peak memory \d+\.\d\d GiB\n$", err)


def test_samples_differ_and_repeat(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for seed in (1, 1, 2):
        assert run(base, "--num_samples", 3, "--max_new_tokens", 8, "--seed", seed) == 0
        out, err = capsys.readouterr()
        assert len(re.findall(r"tokens/s", err)) == 3
        outputs.append(out)
    assert outputs[0] == outputs[1] != outputs[2]
    assert run(base, "--max_new_tokens", 8, "--seed", 1) == 0
    first = capsys.readouterr().out
    assert outputs[0].startswith(first) and outputs[0] != first * 3


def test_system_prompt(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outputs = []
    for words in ((), ("--sys_prompt", "Speak as a pirate.")):
        assert run(base, "--prompt", "hello", "--temperature", 0, *words) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] != outputs[1]


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--num_samples", "0"], "num_samples is 0", 1),
        (["--max_new_tokens", "500"], "the model reads at most 256", 1),
        (["--precision", "64"], "precision '64' is unknown", 1),
        (["--temperatur", "1"], "temperatur is not a known key (did you mean temperature?)", 2),
        (["--top_k", "many"], "--top_k: 'many' is not an integer or null", 2),
    ],
)
def test_mistakes(base: Path, words: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, *words) == code
    out, err = capsys.readouterr()
    assert out == "" and message in err and "Traceback" not in err


@pytest.mark.parametrize("command", ["generate", "chat", "generate_adapter", "generate_speculatively"])
@pytest.mark.parametrize("wrong", [("temperature", "-1"), ("top_k", "0"), ("top_p", "1.5")])
def test_how_to_draw_is_checked_before_a_model_is_looked_for(
    command: str, wrong: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, value = wrong
    nowhere = [str(tmp_path / "nowhere")] * (1 + (command == "generate_speculatively"))
    assert main([command, *nowhere, f"--{key}", value]) == 1
    assert capsys.readouterr().err.startswith(f"Error: {key} is {value}")


def test_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "nowhere") == 1
    assert capsys.readouterr().err.startswith(f"Error: checkpoint folder {tmp_path / 'nowhere'} does not exist")


@pytest.mark.slow
def test_as_a_process(base: Path) -> None:
    words = [sys.executable, "-m", "litgpt", "generate", str(base), "--prompt", "hello", "--max_new_tokens", "5"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n") and "5 tokens in" in done.stderr


@pytest.mark.parametrize("module", ["litgpt.generate.base", "litgpt.generate.chat", "litgpt.convert.merge"])
def test_command_modules_are_light(module: str) -> None:
    heavy = ("torch", "lightning", "transformers", "numpy", "rich", "tokenizers", "jinja2")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_options_and_defaults_of_adapters() -> None:
    """They are LitGPT's; `tests/finetune/test_adapter.py` runs `generate_adapter`."""
    names = "checkpoint_dir prompt input sys_prompt quantize max_new_tokens top_k top_p temperature precision seed"
    for command, path, file in (
        (Adapter, "adapter_path", "adapter/final/lit_model.pth.adapter"),
        (AdapterV2, "adapter_path", "adapter-v2/final/lit_model.pth.adapter_v2"),
        (Full, "finetuned_path", "full/final/lit_model.pth"),
    ):
        defaults = {field.name: field.default for field in fields(command)}
        assert {*names.split(), path} <= defaults.keys() and next(iter(defaults)) == "checkpoint_dir"
        assert defaults[path] == Path("out/finetune") / file and defaults["max_new_tokens"] == 100


def test_generate_full(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The weights of the file, the tokenizer of the base."""
    folder, tuned = (tiny.write_base(tmp_path / name, write_tiny_tokenizer, seed=seed) for name, seed in (("base", 1), ("tuned", 2)))
    words = ["--prompt", "why?", "--max_new_tokens", "20", "--temperature", "0", "--precision", "32-true"]
    assert main(["generate", str(tuned), *words]) == 0
    whole = capsys.readouterr().out
    assert main(["generate_full", str(folder), *words, "--finetuned_path", str(tuned / "lit_model.pth")]) == 0
    answer = capsys.readouterr().out
    assert whole.endswith(answer) and "why?" in whole and "why?" not in answer
    assert main(["generate_full", str(folder), "--finetuned_path", str(tmp_path / "no.pth")]) == 1
    assert "finetuned_path" in capsys.readouterr().err
