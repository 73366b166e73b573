"""A run from its settings to its report. Faults, signals and kills are in tests/robustness/reliability."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import JSON
from litgpt.errors import UserError
from litgpt.finetune.lora import Lora
from litgpt.train.methods import adapters
from litgpt.train.resume import identity
from litgpt.train.run import finished_report, require_same, run
from tests.helpers import runs as finetune_runs


def train(base: Path, data: Path, out_dir: Path, **settings: Any) -> dict[str, Any]:
    train_args = TrainArgs(micro_batch_size=2, global_batch_size=6, max_steps=2, epochs=None, save_interval=None)
    values = {"precision": "32-true", "train": train_args, "eval": EvalArgs(max_new_tokens=0), **settings}
    lora = Lora(checkpoint_dir=base, data=JSON(json_path=data), out_dir=out_dir, **values)
    return run(lora, adapters(lora))


def test_the_report_is_returned_and_written_and_a_finished_run_changes_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    report = train(base, data, out_dir)
    assert report["steps"] == 2 and report == json.loads((out_dir / "report.json").read_text())
    before = finetune_runs.files(out_dir)
    assert train(base, data, out_dir, resume=True) == report and finetune_runs.files(out_dir) == before
    (out_dir / "report.json").unlink()  # as if killed between the two
    assert finished_report(out_dir, None) == report and finetune_runs.files(out_dir) == before
    with pytest.raises(UserError, match=r"resume: .*final belongs to another run: .*seed is 5, and was 1337|resume: .*seed"):
        train(base, data, out_dir, resume=True, seed=5)


@pytest.mark.parametrize(("warmup", "steps", "is_told"), [(100, 2, True), (2, 2, True), (1, 2, False), (0, 2, False), (1, 1, False)])
def test_a_run_that_is_over_in_its_warm_up_is_told(
    warmup: int, steps: int, is_told: bool, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_args = TrainArgs(
        micro_batch_size=2, global_batch_size=6, max_steps=steps, epochs=None, lr_warmup_steps=warmup, save_interval=None
    )
    train(base, data, tmp_path / "out", train=train_args)
    told, err = (
        "the learning rate rises for 2 of the training's 2 steps: give --train.lr_warmup_steps 1, or more epochs",
        capsys.readouterr().err,
    )
    assert (told in err) == ("the learning rate rises" in err) == is_told


def test_a_dry_run_writes_nothing(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(base, data, tmp_path / "out", dry_run=True) == {} and not list(tmp_path.iterdir())
    assert "2" in capsys.readouterr().err


def test_every_difference_is_named(base: Path, data: Path) -> None:
    own = identity({"seed": 1, "lora_r": 2}, base, {}, [], [])
    before = identity({"seed": 3, "lora_r": 4}, base, {}, [], [])
    require_same(base, own, own, Lora)
    with pytest.raises(UserError) as error:
        require_same(base, own, before, Lora)
    assert all(part in str(error.value) for part in ("seed", "lora_r", "1", "2", "3", "4", "another --out_dir"))
