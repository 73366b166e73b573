"""The benchmark of the server, on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.serve import ADAPTERS, adapter_costs, load, start_litgpt
from tests.helpers import tiny


@pytest.mark.slow
def test_figures(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer, block_size=512)
    peer = start_litgpt(base)
    try:
        found = load(peer, 2, 2, 5)
    finally:
        peer.process.terminate()
        peer.process.wait(20)
    assert found["requests_per_s"] > 0 and 0 < found["first_median_s"] <= found["first_worst_s"]
    plain, added = adapter_costs(base, taps=2, rank=2)
    assert plain > 0 and list(added) == list(ADAPTERS[1:])
