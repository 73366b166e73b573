"""benchmarks/steps.py: counts in closed form, a real loss, a summary that follows from the JSON file, failures that stop nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step, steps
from tests.helpers import tiny

NAMES = [
    "Traditional LoRA (Query+Value)",
    "Skip2-LoRA (2 blocks)",
    "Skip2-LoRA (4 blocks)",
    "Skip2-LoRA (6 blocks)",
    "Skip2-LoRA (recommended)",
]
SECTIONS = [
    "Parameter Count Comparison",
    "Forward Pass Benchmark",
    "Backward Pass Benchmark",
    "Whole Step",
    "Cached Step",
    "Memory Usage",
    "Against the Limit",
]
TINY = ["--batch_size", "2", "--seq_length", "8", "--iterations", "3", "--warmup", "1", "--precision", "32-true", "--device", "cpu"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure in this process, which is quicker; its peak of memory means nothing then."""
    monkeypatch.setattr(steps, "isolated", step.measure)


def counts(settings: step.Settings) -> dict[str, dict[str, Any]]:
    chosen, notes = steps.configurations(settings.model, settings.lora_r)
    assert not notes
    return {name: step.count(settings, adapter) for name, adapter in chosen.items()}


def test_the_guides_parameter_table(settings: step.Settings) -> None:
    """Llama 2 7B has 6,738,415,616 parameters; LoRA on q and v 32 * r * 2 * (4096 + 4096), Skip2-LoRA 2 * 16 * 4096 a block."""
    found = counts(replace(settings, model="Llama-2-7b-hf"))
    expected = dict(zip(NAMES, [4_194_304, 262_144, 524_288, 786_432, found[NAMES[4]]["lora"]], strict=True))
    assert expected[NAMES[4]] % (2 * 4096) == 0  # whatever config_hub recommends
    assert {name: row["lora"] for name, row in found.items()} == expected
    for name, row in found.items():
        assert row["trainable"] == row["lora"]
        assert row["total"] - row["lora"] == 6_738_415_616
        assert row["ratio"] == pytest.approx(100 * expected[name] / row["total"])


def test_a_tied_model_is_counted_once(settings: step.Settings, base: Path) -> None:
    """SmolLM2-135M has 134,515,008 parameters; a checkpoint folder says itself whether it is tied: this one is not."""
    found = counts(replace(settings, model="SmolLM2-135M"))
    assert {row["total"] - row["lora"] for row in found.values()} == {134_515_008}
    assert found[NAMES[0]]["lora"] == 30 * 8 * ((576 + 576) + (576 + 192))
    block = 32 * (32 + 2 * 2 * 8) + 32 * 32 + 3 * 32 * 72 + 2 * 32
    assert {row["total"] - row["lora"] for row in counts(settings).values()} == {7 * block + 2 * 320 * 32 + 32}


def test_count_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert steps.main(["--model", "Llama-2-7b-hf", "--count_only", "--lora_r", "4"]) == 0
    rows = {line[2:32].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    assert {"524,288", "0.52", "-75.0"} <= set(rows["Skip2-LoRA (4 blocks)"])
    assert {"786,432", "0.79", "-62.5"} <= set(rows["Skip2-LoRA (6 blocks)"])
    assert {"2,097,152", "2.10"} <= set(rows[NAMES[0]])


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_everything_is_measured_and_compared(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steps.main(["--model", str(base), "--out", str(tmp_path), *TINY]) == 0
    printed = capsys.readouterr().out
    places = [printed.index(text) for text in [*NAMES, "COMPARISON SUMMARY", *(f"\n{section}" for section in SECTIONS)]]
    assert places == sorted(places)
    content = json.loads((tmp_path / "benchmark_results.json").read_text())
    assert content["settings"]["seq_length"] == 8 and content["environment"]["torch"] == torch.__version__
    rows = {row["name"]: row for row in content["configurations"]}
    assert list(rows) == NAMES and rows[NAMES[0]]["cached"] is None
    for row in rows.values():
        for part in filter(None, (row["uncached"], row["cached"])):
            assert part["parameters"] == row["parameters"]
            for times in (part["forward_ms"], part["backward_ms"], part["step_ms"]):
                assert 0 < times["min"] <= times["median"] <= times["max"] and times["min"] <= times["mean"] <= times["max"]
            assert part["forward_ms"]["mean"] + part["backward_ms"]["mean"] < part["step_ms"]["mean"]
    losses = [part["first_loss"] for row in rows.values() for part in (row["uncached"], row["cached"]) if part]
    assert losses == pytest.approx([losses[0]] * 9, rel=1e-5)  # with B = 0 all of them are the base model

    lora, recommended = rows[NAMES[0]]["uncached"], rows[NAMES[-1]]
    compared = content["comparison"][NAMES[-1]]
    for part in ("forward", "backward", "step"):
        new, old = recommended["uncached"][f"{part}_ms"]["median"], lora[f"{part}_ms"]["median"]
        assert compared[f"{part}_speedup"] == pytest.approx(old / new)
        assert compared[f"{part}_reduction_percent"] == pytest.approx(100 * (old - new) / old)
    cached = recommended["cached"]
    assert compared["cached_step_speedup"] == pytest.approx(lora["step_ms"]["median"] / cached["step_ms"]["median"])
    assert compared["cached_step_over_head_products"] == pytest.approx(cached["step_ms"]["median"] / cached["products_ms"]["median"])
    assert compared["fill_over_bare_forward"] == pytest.approx(cached["fill_ms"]["median"] / cached["bare_forward_ms"]["median"])
    cached_six = rows["Skip2-LoRA (6 blocks)"]["cached"]
    assert cached_six["cache_kib_per_sample"] == 2 * 7 * 32 * 4 / 1024  # loss positions, x and 6 taps, d, bytes
    memory = 100 * (1 - recommended["uncached"]["peak_memory_gb"] / lora["peak_memory_gb"])
    assert compared["memory_reduction_percent"] == pytest.approx(memory)
    trained = [rows[name]["parameters"]["trainable"] for name in (NAMES[-1], NAMES[0])]
    assert compared["parameter_reduction_percent"] == pytest.approx(100 * (1 - trained[0] / trained[1]))
    assert f"{compared['forward_speedup']:.2f}x" in printed


@pytest.mark.slow
def test_a_process_of_its_own(settings: step.Settings) -> None:
    found = steps.isolated(settings, {"lora_r": 2, "skip2lora_enabled": True}, True)
    assert "error" not in found
    assert 0 < found["loaded_memory_gb"] <= found["peak_memory_gb"] < 8
    assert found["first_loss"] == pytest.approx(step.measure(settings, {"lora_r": 2, "lora_query": True}, False)["first_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_failure_is_shown_and_stops_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail_once(settings: step.Settings, adapter: dict[str, Any], cached: bool) -> dict[str, Any]:
        return {"error": "out of memory"} if cached == adapter["skip2lora_enabled"] else step.measure(settings, adapter, cached)

    monkeypatch.setattr(steps, "isolated", fail_once)  # LoRA, and every run with a cache, fail
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert steps.main(["--model", str(base), "--out", str(tmp_path), *TINY]) == 1
    out, err = capsys.readouterr()
    assert "FAILED without cache: out of memory" in out and "FAILED with cache: out of memory" in out
    assert err == "matplotlib is not installed, so there are no pictures: pip install matplotlib\n"
    content = json.loads((tmp_path / "benchmark_results.json").read_text())
    assert [sorted(found) for found in content["comparison"].values()] == [["parameter_reduction_percent"]] * 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark_results.json"]


@pytest.mark.slow
def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    part = {"step_ms": {"median": 2.0}, "peak_memory_gb": 1.0}
    rows = [{"name": name, "parameters": {"trainable": 3}, "uncached": part, "cached": None} for name in NAMES]
    steps.picture(rows, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_small_model_leaves_out_what_does_not_fit(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    small = tiny.write_base(tmp_path / "small", write_tiny_tokenizer)
    chosen, notes = steps.configurations(str(small), 8)
    assert list(chosen)[:3] == NAMES[:3] and "Skip2-LoRA (6 blocks)" not in chosen
    assert notes[0].startswith("Skip2-LoRA (6 blocks) is left out: skip2lora_block_indices names 5: this model has blocks 0 to 4")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--model", "Llama-2-7b"], "near it: Llama-2-7b-hf"),
        (["--precision", "fp8"], "precision 'fp8' is unknown"),
        (["--seq_length", "100000"], "--seq_length 100000 is longer than what SmolLM2-135M reads, 8192"),
    ],
)
def test_mistakes(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert steps.main(words) == 1
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and part in err and err.count("\n") == 1


@pytest.mark.parametrize("words", [["--loss_share", "0"], ["--batch_size", "0"], ["--iterations", "x"]])
def test_numbers_that_make_no_sense(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        steps.main(words)
