"""`litgpt generate_speculatively` answers as the large model does; `test_drafts.py` has the distribution."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from litgpt.__main__ import main
from tests.helpers import tiny


def test_command(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]) -> None:
    small = tiny.write_base(tmp_path / "small", write_tiny_tokenizer, n_layer=1)
    large = tiny.write_base(tmp_path / "large", write_tiny_tokenizer)
    words = ["--prompt", "why?", "--max_new_tokens", "20", "--temperature", "0", "--precision", "32-true"]
    assert main(["generate_speculatively", str(small), str(large), *words]) == 0
    shown = capsys.readouterr()
    assert main(["generate", str(large), *words]) == 0
    assert shown.out == capsys.readouterr().out and " tokens from " in shown.err and " drafts, peak memory" in shown.err
