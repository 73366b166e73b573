"""`make gpu`: a clear end without CUDA, and on a CPU the script itself; on CUDA the losses of the CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from litgpt.lora import Config
from litgpt.pretrain import fresh

SMALL = "pythia-14m"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu", *words])
    return gpu.main()


def test_without_cuda_it_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(monkeypatch, "--out", str(tmp_path / "out")) == 1
    assert "torch sees no CUDA device here, so nothing was run and nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_rows_are_written_with_the_error_of_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [gpu.Row("LoRA", "32-true", gpu.LORA), gpu.Row("Skip2-LoRA, cached", "32-true", gpu.SKIP, cached=True), gpu.Row("x", "fp8", {})]
    monkeypatch.setattr(gpu, "ROWS", rows)
    assert run(monkeypatch, "--device", "cpu", "--model", SMALL, "--length", "12", "--no-tests", "--out", str(tmp_path)) == 0
    lora, skip, wrong = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert lora["losses"][-1] < lora["losses"][0] and skip["losses"][-1] < skip["losses"][0]
    assert wrong["error"].startswith("UserError: precision 'fp8' is unknown")
    assert "| UserError" not in (tmp_path / "gpu.md").read_text() and SMALL in (tmp_path / "gpu.md").read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("row", [row for row in gpu.ROWS if row.precision in ("32-true", "bf16-true")], ids=lambda row: row.name)
def test_losses_on_cuda_are_those_of_the_cpu(row: gpu.Row) -> None:
    weights = fresh(Config.from_name(SMALL), seed=0).state_dict()
    plain = gpu.Row(row.name, row.precision, row.adapters, row.cached)
    expected = gpu.measure(plain, SMALL, weights, 64, torch.device("cpu"))["losses"]
    assert gpu.measure(row, SMALL, weights, 64, torch.device("cuda", 0))["losses"] == pytest.approx(expected, rel=2e-2)
