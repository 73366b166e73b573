"""benchmarks/analysis.py on made-up results whose figures are known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import analysis


def record(name: str, repeat: int = 1, loss: float = 2.5, seconds: float = 100.0, trainable: int = 4000, **settings: Any) -> dict[str, Any]:
    """A completed run of 50 steps: from 3.5 down to `loss`, a peak of a hundredth GiB for each second."""
    measured = {"steps": 50, "initial_val_loss": 3.5, "final_val_loss": loss, "best_val_loss": loss, "trainable_parameters": trainable}
    measured |= {"total_parameters": 100_000, "train_seconds": seconds / 2, "total_seconds": seconds, "peak_memory_gb": seconds / 100}
    about = {
        "name": name,
        "repeat": repeat,
        "folder": f"gone/{name}",
        "status": "completed",
        "settings": {"checkpoint_dir": "m", **settings},
    }
    return {**about, "measured": {**measured, "steps_per_second": 100 / seconds, "tokens_per_second": 10.0}}


def write(folder: Path, *runs: Any, **more: Any) -> Path:
    (folder / "comparison_results.json").write_text(json.dumps({"format": 1, "environment": {}, "runs": runs, **more}))
    return folder


def test_known_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = {"name": "lost", "repeat": 1, "folder": "x", "status": "failed", "error": "Error: disk full", "measured": {}}
    write(tmp_path, record("skip", loss=2.75, seconds=25.0, trainable=1000), record("lora_baseline"), failed)
    assert analysis.main([str(tmp_path)]) == 0
    out, text = capsys.readouterr().out, (tmp_path / "report" / "report.md").read_text()
    for row in (
        "| skip | 1,000 | 0.00 M | 100,000 | 1.0000 % | -75.0 % |",
        "| skip | 50 | 4.00 | 10 | 12.5 | -75.0 % | 25.0 | -75.0 % |",
        "| skip | 0.25 | -75.0 % |",
        "| skip | 3.5000 | 2.7500 | 2.7500 | 0.7500 | +0.2500 | 75 % |",
        "| skip | 0.015000 | 0.030000 | - |",
        "| lora_baseline | 0.020000 | 0.010000 |  |",
        "| lost | 0 | 1 | Error: disk full |",
    ):
        assert row in text
    for line in (
        "lost failed (1x): Error: disk full",
        "skip trains 1,000 parameters, 4,000 in lora_baseline: 75.0 % fewer.",
        "skip took 25.0 s, 100.0 s in lora_baseline: 75.0 % less time.",
        "skip needed 0.25 GiB, 1.00 GiB in lora_baseline: 75.0 % less memory.",
        "skip ended at a validation loss of 2.7500, lora_baseline at 2.5000: 0.2500 worse. It gained 75 % of what lora_baseline gained.",
        "The lowest final validation loss: lora_baseline (2.5).",
        "The shortest run: skip (25).",
        "Fewer than three repetitions of skip, lora_baseline: small differences may be due to chance.",
    ):
        assert f"{line}\n" in out and f"- {line}\n" in text


def test_conclusions_turn_with_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slower, larger and better is called so; what overlaps over the repetitions is no difference."""
    runs = [record("lora_baseline", n, 2.5 + n / 100, 100.0 + n) for n in (1, 2, 3)]
    runs += [record("skip", n, 2.4 + n / 100, 101.0 + n, 8000, data={"class_path": "other"}) for n in (1, 2, 3)]
    write(tmp_path, *runs)
    assert analysis.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "skip trains 8,000 parameters, 4,000 in lora_baseline: 100.0 % more.\n" in out
    assert "skip took 103.0 s, 102.0 s in lora_baseline: no clear difference, the repetitions overlap.\n" in out
    assert "skip ended at a validation loss of 2.4200, lora_baseline at 2.5200: 0.1000 better. It gained 110 %" in out
    assert "skip and lora_baseline differ in data too, so the adapter is not the only cause.\n" in out
    assert "Fewer than three" not in out
    assert "| skip | 3.5000 ± 0.0000 | 2.4200 ± 0.0100 |" in (tmp_path / "report" / "report.md").read_text()
    assert analysis.main([str(tmp_path), "--baseline", "skip"]) == 0
    assert "lora_baseline ended at a validation loss of 2.5200, skip at 2.4200: 0.1000 worse." in capsys.readouterr().out


def test_without_a_baseline_nothing_is_concluded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = {**record("lora_baseline"), "status": "failed", "error": "Error: no", "measured": {}}
    write(tmp_path, lost, record("skip", skip2lora_enabled=True), record("tail", loss=2.0))
    assert analysis.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "no completed run to compare with" in out and "worse" not in out and "better" not in out and "fewer" not in out


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert analysis.main([str(write(tmp_path, record("lora_baseline")))]) == 0
    assert capsys.readouterr().err == "matplotlib is not installed, so there are no pictures: pip install matplotlib\n"
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.html", "report.md"]


def test_a_benchmark_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = {"forward_ms": {"median": 4.0}, "backward_ms": {"median": 8.0}, "step_ms": {"median": 13.0}}
    rows = [{"name": "L", "uncached": part, "cached": None}, {"name": "S", "uncached": part, "cached": {"step_ms": {"median": 1.5}}}]
    content = {"environment": {"date": "today"}, "configurations": rows, "comparison": {"L": {}, "S": {"backward_reduction_percent": 90.0}}}
    content["settings"] = {"model": "M", "batch_size": 2, "seq_length": 8, "precision": "32-true", "device": "cpu"}
    file = tmp_path / "b.json"
    file.write_text(json.dumps(content))
    words = [str(write(tmp_path, record("lora_baseline"))), "--benchmark", str(file)]
    assert analysis.main(words) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| L | 4.00 | 8.00 |  | 13.00 | - |\n| S | 4.00 | 8.00 | -90.0 % | 13.00 | 1.50 |" in text
    file.write_text('{"settings": {}}')
    assert analysis.main(words) == 1
    assert "is not a benchmark's result" in capsys.readouterr().err


def damaged(**changes: Any) -> dict[str, Any]:
    good = record("a")
    return {**good, "measured": {**good["measured"], **changes}}


@pytest.mark.parametrize(
    ("runs", "part"),
    [
        ([], "holds no list of runs"),
        (["a"], "holds no list of runs"),
        ([{}], "name, repeat or folder is missing; run 1: status is None; run 1: measured or settings is not an object"),
        ([damaged(final_val_loss=float("nan"))], "final_val_loss is nan"),
        ([damaged(total_seconds=-1)], "total_seconds is -1"),
        ([damaged(steps="many")], "steps is 'many'"),
        ([damaged(peak_memory_gb=True, steps=0)], "peak_memory_gb is True, steps is missing or 0"),
        ([damaged(trainable_parameters=200_000)], "more trainable parameters than parameters"),
        ([record("a"), record("a")], "a, repetition 1, occurs twice"),
        ([record("a"), record("b", checkpoint_dir="other")], "runs of different models"),
    ],
)
def test_nonsense_is_refused(runs: list[Any], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analysis.main([str(write(tmp_path, *runs))]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and part in err and err.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_files_that_are_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, metrics = tmp_path / "broken.json", tmp_path / "runs" / "a" / "logs" / "version_0" / "metrics.csv"
    broken.write_text("{")
    metrics.parent.mkdir(parents=True)
    metrics.write_text("step,train_loss\n1,2.5\nx,2.5\n")
    (tmp_path / "empty").mkdir()
    for words, part in (
        ([str(tmp_path / "none")], "does not exist"),
        ([str(broken)], "cannot be read as JSON"),
        ([str(tmp_path / "empty")], "holds neither comparison_results.json nor runs"),
        ([str(tmp_path / "runs")], "metrics.csv, line 3: not a row of a run's metrics"),
        ([str(write(tmp_path, record("a"))), "--baseline", "b"], "--baseline b: the runs are a"),
    ):
        assert analysis.main(words) == 1
        err = capsys.readouterr().err
        assert err.startswith("Error: ") and part in err and err.count("\n") == 1
