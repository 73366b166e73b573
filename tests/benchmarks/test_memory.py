"""benchmarks/memory.py: what it computes and shows; one step of a small model measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import memory, report
from benchmarks.step import Settings
from litgpt import lora
from litgpt.errors import UserError
from litgpt.tokenizer import Tokenizer

GIB = 2**30


def test_what_is_computed() -> None:
    """Weights at least, in the order of the methods; the largest model that fits is the last one below the bound."""
    models = ["SmolLM2-135M", "tiny-llama-1.1b"]
    for model, numbers in zip(models, (134.5e6, 1.1e9), strict=True):
        full, again, skip = (memory.computed(model, method, 4, 2) for method in memory.METHODS)
        assert 2 * numbers < skip < again < full
        assert memory.computed(model, "LoRA", 4, 4) > full > memory.computed(model, "LoRA", 1, 2)
    need = memory.computed(models[1], "LoRA", 1, 2)
    assert memory.largest(models, "LoRA", 1, need / 1e9) == models[1]
    assert memory.largest(models, "LoRA", 1, need / 1e9 - 1e-6) == models[0] and memory.largest(models, "LoRA", 1, 0.1) is None
    assert [lora.Config.from_name(name).name for name in memory.MODELS] == list(memory.MODELS)


def test_shares_of_the_bar() -> None:
    """Peaks of 4 and 1.6 GiB of which 1 is the model: 0.40 in all, 0.20 above it; each workload against its own."""
    rows = [
        {"workload": "a", "method": "LoRA", "loaded": GIB, "peak": 4 * GIB, "own": 2 * GIB, "step_ms": 10.0},
        {"workload": "a", "method": "LoRA, more", "error": "Error: no"},
        {"workload": "a", "method": "Skip2-LoRA", "loaded": GIB, "peak": 1.6 * GIB, "own": GIB, "step_ms": 1.0},
        {"workload": "b", "method": "LoRA", "loaded": GIB, "peak": 2 * GIB, "own": GIB, "step_ms": 10.0},
    ]
    text = report.as_markdown("", memory.run_sections(rows))
    assert "| a: LoRA | 1.00 | 4.00 | 3.00 | 2.00 | 10 | 0.40 | 0.20 | 0.50 |" in text
    assert "| b: LoRA | 1.00 | 2.00 | 1.00 | 1.00 | 10 |  |  |  |" in text and "- a, LoRA, more: Error: no" in text


def test_measured_and_computed_side_by_side() -> None:
    row = {"model": "m", "batch": 1, "method": "LoRA", "computed": 2 * GIB, "computed_bf16": GIB}
    rows = [{**row, "peak": 3 * GIB}, row, {**row, "error": "killed"}]
    text = report.as_markdown("", memory.step_sections(rows, ["SmolLM2-135M"], [1], "32-true"))
    for line in ("3.00 | 2.00 | 1.50 | 1.00 |", "computed | 2.00 |  | 1.00 |", "failed | 2.00 |  | 1.00 |"):
        assert f"| m | LoRA | 1 x 512 | {line}" in text
    assert "- m, LoRA: killed" in text and "| Skip2-LoRA, 1 x 512 | SmolLM2-135M |" in text


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_a_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: the peak is above the loaded model, whose weights it holds."""
    monkeypatch.setattr(memory, "LENGTH", 16)
    found = memory.measured("pythia-14m", "Skip2-LoRA", 1, "32-true")
    assert found["peak"] > found["loaded"] > 4 * 14e6 and found["step_ms"] > 0


def test_a_step_of_an_unknown_model() -> None:
    job = {"settings": asdict(Settings("nonesuch", 1, 16, 0.25, 1, 1, "32-true", "cpu", 8)), "method": "LoRA"}
    with pytest.raises(UserError, match="nonesuch"):
        memory.step(job)


@pytest.fixture
def long_data(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "LENGTH", 24)
    monkeypatch.setattr(memory, "PROMPT", 10)
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"instruction": f"say {i}", "output": f"number {i}"}) + "\n" for i in range(240)))
    monkeypatch.setattr(memory.wordnet, "prepare", lambda folder, samples: short)
    return memory.long_data(tmp_path, base, 4)


def test_long_data(base: Path, long_data: Path) -> None:
    """Every sample fills the length: the question comes first and has `PROMPT` tokens."""
    tokenizer = Tokenizer(base)
    records = [json.loads(line) for line in long_data.read_text().splitlines()]
    assert len(records) == 4 and all(len(tokenizer.ids(r["instruction"] + r["output"])) > 34 for r in records)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_a_run_is_watched(base: Path, long_data: Path, tmp_path: Path) -> None:
    words = ["finetune_lora", str(base), "--data", "JSON", "--data.json_path", str(long_data), "--precision", "32-true", "--max_steps", "1"]
    words += ["--train.max_seq_length", "40", "--out_dir", str(tmp_path / "run"), *memory.RUNS["Skip2-LoRA"]]
    found = memory.watched([*words, "--skip2lora_cache_dir", str(tmp_path / "cache")])
    assert 0 < found["loaded"] <= found["peak"] and 0 < found["own"] <= found["peak"]
    assert memory.watched(["finetune_lora", str(tmp_path / "none")])["error"].startswith("Error: ")
