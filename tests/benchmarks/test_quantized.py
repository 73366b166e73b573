"""benchmarks/quantized.py on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import quantized


def test_a_model_is_measured(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "LENGTH", 12)
    monkeypatch.setattr(quantized, "ANSWER", 4)
    plain, eight = (quantized.measure(base, mode, 1) for mode in ("bf16", "int8"))
    assert plain.keys() == eight.keys() and eight["weights_mb"] < plain["weights_mb"]
    assert all(
        found[f"{work}_{unit}"] > 0 for found in (plain, eight) for work in ("forward", "step", "answer") for unit in ("ms", "ratio")
    )
