"""The folder that a run writes: what counts as a result of a run, and that nothing else is ever removed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from litgpt import atomic
from litgpt.args import LogArgs
from litgpt.errors import UserError
from litgpt.logs import METRICS, MetricLoggers
from litgpt.train import out_dir as out_dir_module
from litgpt.train.out_dir import OutDir, earlier, prune


def fill(out_dir: Path) -> None:
    """Write what a run leaves, without weights."""
    for name in ("step-000002", "best", "final"):
        with atomic.new_folder(out_dir / name) as folder:
            (folder / "lit_model.pth.lora").write_bytes(b"weights")
    (out_dir / "report.json").write_text(json.dumps({"trainable_parameters": 1}))
    logger = MetricLoggers(out_dir, "csv", LogArgs(), {})
    logger(1, {"step": 1, "train_loss": 2.0})
    logger.close()


def settings(out_dir: Path, resume: Any = False, overwrite: bool = False) -> Any:
    return SimpleNamespace(out_dir=out_dir, resume=resume, overwrite=overwrite, checkpoint_dir=out_dir.parent / "base")


def replace(out_dir: Path) -> None:
    with OutDir(settings(out_dir, overwrite=True)) as folder:
        folder.make(resumed=False)
        (out_dir / "kept").touch()


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    """TensorBoard and safetensors cannot write there."""
    folder = OutDir(settings(tmp_path / os.fsdecode(b"d\xe9")))
    with pytest.raises(UserError, match="its name is not UTF-8, .*: rename it, or set PYTHONUTF8=1"):
        folder.check()


def test_a_lock_does_not_outlive_a_failure_to_enter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later run of the same process, as in a notebook, is not refused."""
    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(atomic, "remove_leftovers", lambda folder: (_ for _ in ()).throw(PermissionError))
        OutDir(settings(tmp_path)).__enter__()
    with OutDir(settings(tmp_path)):
        pass


def test_a_run_is_replaced_and_the_users_files_stay(tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    fill(out_dir)
    mine = ["step-by-step.json", "notes.txt", ".draft.tmp", "logs/notes.txt", "logs/version_0/plot.png", "step-mine/a.txt"]
    mine += ["logs/version_0/events.out.tfevents.1.theirs.2.0", "logs/version_0/hparams.yaml"]
    for name in mine:
        (out_dir / name).parent.mkdir(exist_ok=True)
        (out_dir / name).write_text("mine")
    replace(out_dir)
    assert sorted(p.relative_to(out_dir).as_posix() for p in out_dir.rglob("*") if p.is_file()) == sorted([*mine, "kept"])


def test_a_run_that_ended_before_its_first_checkpoint_is_begun_anew(tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    fill(out_dir)
    (out_dir / "report.json").unlink()
    for name in ("final", "best", "step-000002"):
        with pytest.raises(UserError, match="holds an earlier run"):
            OutDir(settings(out_dir)).check()
        shutil.rmtree(out_dir / name)
    assert (out_dir / METRICS).is_file()
    with OutDir(settings(out_dir)) as folder:
        folder.make(resumed=False)
        assert not (out_dir / METRICS).exists()


def test_a_run_is_replaced_after_a_process_was_killed_in_its_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out_dir = tmp_path / "out"
    fill(out_dir)

    def killed(folder: Path, **_: Any) -> None:
        (folder / "manifest.json").unlink()
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(shutil, "rmtree", killed)
        replace(out_dir)
    replace(out_dir)
    assert [path.name for path in out_dir.iterdir()] == ["kept"]


def test_an_empty_log_folder_goes_with_the_run(tmp_path: Path) -> None:
    fill(tmp_path / "out")
    replace(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]


@pytest.mark.parametrize(
    "name", ["best/notes.txt", "final/deep/notes.txt", "step-000002/extra.pth", "step-000007", "report.json", METRICS.as_posix()]
)
def test_files_under_the_names_of_results_are_refused_by_name(name: str, tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    fill(out_dir)
    (out_dir / name).parent.mkdir(exist_ok=True)
    (out_dir / name).write_text("[]" if name == "report.json" else "step,train_loss_step\n1,2\n")
    with pytest.raises(UserError, match=f"no run wrote \\({name}\\): move them away"):
        replace(out_dir)
    assert (out_dir / name).exists() and (out_dir / "final").is_dir()
    with pytest.raises(UserError, match="holds an earlier run"):
        OutDir(settings(out_dir)).check()


def test_a_folder_without_a_manifest_is_not_a_result(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "lit_model.pth").touch()
    assert earlier(tmp_path) == ([], [tmp_path / "final" / "lit_model.pth"])


def test_a_link_is_not_a_result(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "best").symlink_to(tmp_path / "elsewhere")
    assert earlier(tmp_path) == ([], [tmp_path / "best"])


def test_leftovers_are_told_by_their_mark(tmp_path: Path) -> None:
    for name in (".draft.tmp", ".report.json.litgpt-0123abcd.tmp"):
        (tmp_path / name).touch()
    for name in (".thesis.litgpt-12.tmp", ".thesis.litgpt-chapters.tmp.old", ".final.litgpt-0123abcd.tmp"):
        (tmp_path / name).mkdir()
    with OutDir(settings(tmp_path)):
        left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".draft.tmp", ".thesis.litgpt-12.tmp", ".thesis.litgpt-chapters.tmp.old"]


@pytest.mark.parametrize("place", ["logs", "logs/version_0"])
@pytest.mark.parametrize("kind", ["link", "file"])
@pytest.mark.parametrize("resume", [False, "auto"])
def test_the_logs_are_not_led_elsewhere(resume: Any, kind: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    planted = tmp_path / "out" / place
    planted.parent.mkdir(parents=True)
    planted.symlink_to(tmp_path / "elsewhere") if kind == "link" else planted.touch()
    with pytest.raises(UserError, match=f"no run wrote \\({place}\\): move them away"):
        OutDir(settings(tmp_path / "out", resume=resume)).check()


def test_what_the_user_puts_into_a_checkpoint_stays(tmp_path: Path) -> None:
    """Where a checkpoint is replaced, it moves to the new one; one that would be removed is kept."""
    for content in ("first", "second"):
        with atomic.new_folder(tmp_path / "best", overwrite=True) as folder:
            (folder / "lit_model.pth.lora").write_text(content)
        if content == "first":
            (tmp_path / "best/deep").mkdir()
            (tmp_path / "best/deep/notes.txt").write_text("mine")
    assert (tmp_path / "best/lit_model.pth.lora").read_text() == "second" and (tmp_path / "best/deep/notes.txt").read_text() == "mine"
    for step in (1, 2, 3):
        with atomic.new_folder(tmp_path / f"step-00000{step}") as folder:
            atomic.write_text(folder / "training_state.json", '{"facts": {"kept": false}}')
    (tmp_path / "step-000001/notes.txt").write_text("mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(out_dir_module, "_is_kept", lambda folder: False)
        prune(tmp_path, 3, keep_last=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step-000001", "step-000003"]
