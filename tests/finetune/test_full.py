"""`litgpt finetune_full` from the command line to its folder: every weight, tied and untied heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from litgpt import checkpoint
from tests.helpers import runs as finetune_runs, tiny
from tests.helpers.cases import quick
from tests.helpers.runs import Run, finetune, load, plain_loss, val_samples

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"


@pytest.fixture(scope="module")
def tied_base(base: Path, tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    """The same with one weight for embedding and head."""
    folder = tiny.write_base(tmp_path_factory.mktemp("tied"), write_tiny_tokenizer)
    weights = checkpoint.load_weights(base / "lit_model.pth")
    checkpoint.save_weights({**weights, HEAD: weights[EMBEDDING]}, folder / "lit_model.pth")
    return folder


@pytest.fixture(scope="module")
def run(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run. Do not write into its folder."""
    return finetune("finetune_full", base, data, tmp_path_factory.mktemp("runs") / "out", optimizer__lr=2e-3)


def is_tied(folder: Path) -> bool:
    weights = load(folder / "lit_model.pth")
    return weights[HEAD].data_ptr() == weights[EMBEDDING].data_ptr()


def test_a_run_leaves_exactly_these_files(run: Run) -> None:
    assert run.code == 0, run.err
    expected = finetune_runs.run_files("lit_model.pth")
    found = set(finetune_runs.files(run.out_dir))
    events = {name for name in found if name.startswith("logs/version_0/events.out.tfevents.")}
    assert len(events) == 1 and found - events == expected
    assert {path.name for path in run.out_dir.parent.iterdir()} == {"out"}


def test_every_weight_has_moved_and_the_base_has_not(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    before = finetune_runs.files(base)
    old, new = load(base / "lit_model.pth"), load(run.final / "lit_model.pth")
    assert {name: (value.shape, value.dtype) for name, value in new.items()} == {name: (v.shape, v.dtype) for name, v in old.items()}
    assert all(not torch.equal(value, old[name]) for name, value in new.items())
    assert finetune("finetune_full", base, data, tmp_path / "out", train__max_steps=2).code == 0
    assert finetune_runs.files(base) == before


def test_the_reported_loss_is_that_of_the_saved_model(run: Run, base: Path, data: Path) -> None:
    samples = val_samples(base, data)
    before, after = (plain_loss(checkpoint.load_model(folder, torch.float32), samples) for folder in (base, run.final))
    assert run.report["initial_val_loss"] == pytest.approx(before, rel=1e-5)
    assert run.report["final_val_loss"] == pytest.approx(after, rel=1e-5)
    assert after < before - 0.1
    assert (
        run.report["trainable_parameters"]
        == run.report["total_parameters"]
        == sum(v.numel() for v in load(base / "lit_model.pth").values())
    )


def test_metrics_have_each_step_once_and_validation_where_it_was(run: Run) -> None:
    rows = run.rows()
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [0, 4, 6]


@pytest.mark.slow
def test_hyperparameters_are_a_config_that_repeats_the_run_bit_for_bit(run: Run, tmp_path: Path) -> None:
    config = run.final / "hyperparameters.yaml"
    again = finetune_runs.call(["finetune_full", str(config), "--out_dir", str(tmp_path / "again")], tmp_path / "again")
    assert again.code == 0, again.err
    assert again.column("train_loss") == run.column("train_loss") and again.column("val_loss") == run.column("val_loss")
    old, new = load(run.final / "lit_model.pth"), load(again.final / "lit_model.pth")
    assert all(torch.equal(value, old[name]) for name, value in new.items())
    first, second = (yaml.safe_load((one.final / "hyperparameters.yaml").read_text()) for one in (run, again))
    assert second == {**first, "out_dir": str(tmp_path / "again")}


@pytest.mark.parametrize(
    ("start", "asked", "tied"),
    quick([(True, None, True), (False, None, False), (True, False, False), (False, True, True)], (True, None, True), (True, False, False)),
)
def test_the_head_is_tied_as_asked_or_as_it_was(
    start: bool, asked: bool | None, tied: bool, base: Path, tied_base: Path, data: Path, tmp_path: Path
) -> None:
    folder = tied_base if start else base
    assert is_tied(folder) == start
    run = finetune("finetune_full", folder, data, tmp_path / "out", train__tie_embeddings=asked, train__max_steps=2)
    assert run.code == 0, run.err
    assert is_tied(run.final) == tied == is_tied(run.out_dir / "step-000002")
    weights, model = load(run.final / "lit_model.pth"), checkpoint.load_model(run.final, torch.float32)
    assert torch.equal(weights[HEAD], weights[EMBEDDING]) == tied
    assert (model.lm_head.weight is model.transformer["wte"].weight) == tied
    assert run.report["final_val_loss"] == pytest.approx(plain_loss(model, val_samples(base, data)), rel=1e-5)
    assert run.report["trainable_parameters"] == sum(value.numel() for name, value in weights.items() if name != HEAD or not tied)


def test_a_tied_head_stays_tied_when_the_weights_come_from_another_device(
    tied_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a GPU `.cpu()` copies each tensor; here it is made to."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.clone())
    run = finetune("finetune_full", tied_base, data, tmp_path / "out", train__max_steps=1)
    assert run.code == 0, run.err
    monkeypatch.undo()
    assert is_tied(run.final)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)])
def test_other_precisions_run_and_learn(precision: str, dtype: torch.dtype, run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    other = finetune("finetune_full", base, data, tmp_path / "out", optimizer__lr=2e-3, precision=precision)
    assert other.code == 0, other.err
    assert other.column("val_loss") == pytest.approx(run.column("val_loss"), rel=0.05)
    assert {value.dtype for value in load(other.final / "lit_model.pth").values()} == {dtype}


def test_a_second_run_is_refused_and_one_that_would_replace_its_own_base_too(run: Run, base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert finetune("finetune_full", base, data, out, train__max_steps=1).code == 0
    before = finetune_runs.files(tmp_path)
    again = finetune("finetune_full", base, data, out, train__max_steps=1)
    assert again.code == 1 and "holds an earlier run (best, final, logs, report.html, report.json)" in again.err
    own = finetune("finetune_full", out / "final", data, out, train__max_steps=1, overwrite=True)
    assert own.code == 1 and f"checkpoint_dir {out / 'final'} is part of the run in out_dir, which would be replaced" in own.err
    assert finetune_runs.files(tmp_path) == before
    further = finetune("finetune_full", out / "final", data, tmp_path / "further", train__max_steps=1)
    assert further.code == 0
    assert further.report["initial_val_loss"] == pytest.approx(Run(0, "", out).report["final_val_loss"], rel=1e-5)
