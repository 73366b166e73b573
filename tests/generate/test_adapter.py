"""The options of `generate_adapter` and `generate_full` are LitGPT's; `tests/finetune/test_adapter.py` runs `generate_adapter`."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from litgpt import __main__ as program
from litgpt.generate.adapter import Adapter, AdapterV2, Full
from tests.helpers import tiny


def test_options_and_defaults() -> None:
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
    assert program.main(["generate", str(tuned), *words]) == 0
    whole = capsys.readouterr().out
    assert program.main(["generate_full", str(folder), *words, "--finetuned_path", str(tuned / "lit_model.pth")]) == 0
    answer = capsys.readouterr().out
    assert whole.endswith(answer) and "why?" in whole and "why?" not in answer
    assert program.main(["generate_full", str(folder), "--finetuned_path", str(tmp_path / "no.pth")]) == 1
    assert "finetuned_path" in capsys.readouterr().err
