"""benchmarks/process.py: results and failures of other processes, and commands without their secrets."""

from __future__ import annotations

import subprocess

import pytest

from benchmarks.process import error_line, in_worker, redacted, run_litgpt


@pytest.mark.parametrize(("code", "error"), [(1, "Error: no"), (-9, "killed by signal 9, perhaps for want of memory")])
def test_a_worker_that_fails(code: int, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **more: subprocess.CompletedProcess(args, code, "", "a warning\nError: no\n"))
    assert in_worker("benchmarks.step", {}) == {"error": error}


def test_a_module_that_does_not_exist() -> None:
    assert in_worker("benchmarks.nonesuch", {})["error"].endswith("No module named benchmarks.nonesuch")


def test_output_is_shown_and_returned(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    code, output = run_litgpt(["finetune_lora", "nowhere.yaml"], lines.append)
    assert code == 2 and output == "".join(lines)
    assert error_line(f"{output}\nbye") == "Error: nowhere.yaml does not exist: check the path"
    assert "nowhere.yaml does not exist" in capsys.readouterr().out


def test_error_line() -> None:
    assert error_line("a\nError: b\nc\n") == "Error: b" and error_line("a\nb\n\n") == "b" and error_line("") == "no output"


def test_commands_are_shown_without_the_token() -> None:
    shown = redacted(["finetune_lora", "my model", "--access_token", "hf_secret", "--seed", "1"])
    assert shown == "litgpt finetune_lora 'my model' --access_token '***' --seed 1"
    assert redacted(["--access_token=hf_secret"]) == "litgpt '--access_token=***'"
