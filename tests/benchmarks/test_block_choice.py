"""`benchmarks/block_choice.py` on a tiny model: its losses are those of `litgpt finetune`, and it goes on where it was stopped."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import block_choice
from litgpt.data import JSON
from tests.helpers import runs as finetune_runs, tiny
from tests.helpers.runs import finetune


@pytest.mark.slow
def test_losses_are_those_of_the_command(
    tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    data = finetune_runs.write_data(tmp_path / "sums.json")
    monkeypatch.setattr(block_choice, "PythonDocs", lambda max_samples: JSON(json_path=data, mask_prompt=True, val_split_fraction=0.1))
    out = tmp_path / "out.json"
    argv = [
        "block_choice.py",
        str(base),
        "--epochs",
        "2",
        "--counts",
        "2",
        "--random",
        "1",
        "--rank",
        "4",
        "--lr",
        "0.02",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", argv)
    block_choice.main()
    table, runs = capsys.readouterr().out, json.loads(out.read_text())["runs"]
    assert [name for name in runs if name in table] == ["auto:2", "first 2", "last:2", "evenly spaced 2", "random 2, 1", "all"]
    assert runs["first 2"]["blocks"] == [0, 1] and runs["evenly spaced 2"]["blocks"] == [2, 4] and runs["all"]["blocks"] == [0, 1, 2, 3, 4]
    settings: dict[str, Any] = {"lora_r": 4, "lora_alpha": 4, "lora_dropout": 0.0, "data__mask_prompt": True, "train__epochs": 2}
    settings |= {"skip2lora_enabled": True, "train__global_batch_size": 8, "train__micro_batch_size": 8, "train__lr_warmup_steps": 20}
    run = finetune(
        "finetune_lora", base, data, tmp_path / "run", **settings, skip2lora_block_indices="last:2", lora_query=False, lora_value=False
    )
    assert run.code == 0 and run.report["final_val_loss"] == pytest.approx(runs["last:2"]["losses"][0], rel=1e-5)

    kept = json.loads(out.read_text())
    del kept["runs"]["all"]
    out.write_text(json.dumps(kept))
    monkeypatch.setattr(block_choice, "tuned", lambda base, blocks, *rest: float(len(blocks)))  # is called for what is missing alone
    block_choice.main()
    assert json.loads(out.read_text())["runs"] == {**kept["runs"], "all": {**runs["all"], "losses": [5.0]}}
    monkeypatch.setattr(sys, "argv", [*argv, "--lr", "0.01"])
    with pytest.raises(SystemExit, match="other settings"):
        block_choice.main()
