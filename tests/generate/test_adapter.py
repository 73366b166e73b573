"""The options of `generate_adapter` and `generate_full` are LitGPT's; `tests/finetune/test_adapter.py` runs `generate_adapter`."""

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

from litgpt import __main__ as program
from litgpt.generate.adapter import main, main_full, main_v2
from tests.helpers import tiny


def test_options_and_defaults() -> None:
    first, second = (
        {name: parameter.default for name, parameter in inspect.signature(command).parameters.items()} for command in (main, main_v2)
    )
    names = "checkpoint_dir prompt input sys_prompt adapter_path quantize max_new_tokens top_k top_p temperature precision seed"
    assert list(first) == list(second) == names.split()
    assert {name for name in first if first[name] != second[name]} == {"adapter_path"}
    assert second["adapter_path"].name == "lit_model.pth.adapter_v2" and main_v2.__doc__ and "V2" in main_v2.__doc__


def test_generate_full(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """The weights of the file, the tokenizer of the base."""
    full, base = inspect.signature(main_full).parameters, inspect.signature(main).parameters
    assert [name.replace("adapter_path", "finetuned_path") for name in base] == list(full)
    folder, tuned = (tiny.write_base(tmp_path / name, write_tiny_tokenizer, seed=seed) for name, seed in (("base", 1), ("tuned", 2)))
    words = ["--prompt", "why?", "--max_new_tokens", "20", "--temperature", "0", "--precision", "32-true"]
    assert program.main(["generate", str(tuned), *words]) == 0
    expected = capsys.readouterr().out
    assert program.main(["generate_full", str(folder), *words, "--finetuned_path", str(tuned / "lit_model.pth")]) == 0
    assert capsys.readouterr().out == expected
    assert program.main(["generate_full", str(folder), "--finetuned_path", str(tmp_path / "no.pth")]) == 1
    assert "finetuned_path" in capsys.readouterr().err
