"""A run that is stopped and gone on with is the uninterrupted one, bit for bit; what is another run is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml

from litgpt import atomic, checkpoint
from litgpt.train.loop import Batch, Loop
from litgpt.train.resume import IDENTITY, State
from tests.helpers import runs as finetune_runs
from tests.helpers.cases import quick
from tests.helpers.runs import Run, finetune

SKIP: dict[str, Any] = {"skip2lora_enabled": True, "skip2lora_block_indices": "[0, 2]", "lora_r": 4, "lora_dropout": 0.2}
BLOCK: dict[str, Any] = {**SKIP, "skip2lora_output_layer": "transformer.h.3", "lora_mlp": True}
QUIET: dict[str, Any] = {"eval__max_new_tokens": 0}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("finetune_lora", {"lora_r": 4, "lora_dropout": 0.2}),
    "Skip2-LoRA, cache in memory": ("finetune_lora", {**SKIP, "skip2lora_cache": "memory"}),
    "Skip2-LoRA, no cache": ("finetune_lora", {**BLOCK, "skip2lora_cache": "off"}),
    "warm-up, cache on disk": ("finetune_lora", {**BLOCK, "skip2lora_warmup_steps": 2, "skip2lora_cache": "disk", "train__epochs": 1}),
    "full": ("finetune_full", {"optimizer__lr": 2e-3, "train__micro_batch_size": 3}),
}
CURVE = ("step", "epoch", "train_loss", "val_loss", "val_ppl", "learning_rate")
CLOCKS = ("train_seconds", "total_seconds", "tokens_per_second", "peak_memory_gb")


@pytest.fixture(scope="module")
def whole(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The uninterrupted run of a method, made once. Do not write into its folder."""
    runs: dict[str, Run] = {}

    def run(method: str) -> Run:
        if method not in runs:
            command, settings = METHODS[method]
            runs[method] = finetune(command, base, data, tmp_path_factory.mktemp("whole") / "out", **settings, **QUIET)
            assert runs[method].code == 0, runs[method].err
        return runs[method]

    return run


@pytest.fixture(scope="module")
def stopped(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of "Skip2-LoRA, no cache" with checkpoints of the steps 2 and 4, stopped in step 5. Do not write into it."""
    out_dir = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "step", failing_at(5))
        assert finetune("finetune_lora", base, data, out_dir, **METHODS["Skip2-LoRA, no cache"][1], **QUIET).code == 130
    return out_dir


def failing_at(number: int) -> Callable[..., float]:
    """`Loop.step` that is broken off in step `number`, after its first micro-batch."""
    step, loss = Loop.step, Loop.loss

    def broken(loop: Loop, state: State, batch: Batch) -> dict[str, float]:
        if state.step + 1 == number:
            loss(loop, loop.activations, batch.indices[:1]).backward()
            raise KeyboardInterrupt
        return step(loop, state, batch)

    return broken


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """SIGTERM comes in the steps of this list."""
    steps: list[int] = []
    step = Loop.step

    def signalled(loop: Loop, state: State, batch: Batch) -> dict[str, float]:
        if state.step + 1 in steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(loop, state, batch)

    monkeypatch.setattr(Loop, "step", signalled)
    yield steps


def curve(run: Run) -> list[tuple[str, ...]]:
    return [tuple(row[name] for name in CURVE) for row in run.rows()]


def assert_same(run: Run, other: Run) -> None:
    """The same curve, report and files: weights, optimizer states, random states."""
    assert curve(run) == curve(other)
    assert {key: value for key, value in run.report.items() if key not in CLOCKS} == {
        k: v for k, v in other.report.items() if k not in CLOCKS
    }
    mine, others = finetune_runs.files(run.out_dir), finetune_runs.files(other.out_dir)
    endings = (".pth", ".lora", ".safetensors")
    assert {k: v for k, v in mine.items() if k.endswith(endings)} == {k: v for k, v in others.items() if k.endswith(endings)}
    assert {k for k in mine if "events" not in k} == {k for k in others if "events" not in k}


# --- exactness ---


@pytest.mark.parametrize("method", quick(METHODS, "warm-up, cache on disk"))
def test_a_run_stopped_after_every_single_step_is_the_uninterrupted_one(
    method: str, whole: Callable[[str], Run], base: Path, data: Path, tmp_path: Path, stop_at: list[int]
) -> None:
    """Epochs end with step 3, validation and checkpoints are due in some of the steps: each session does one step."""
    command, settings = METHODS[method]
    steps, out_dir = whole(method).report["steps"], tmp_path / "out"
    for step in range(1, steps + 1):
        stop_at[:] = [step]
        run = finetune(command, base, data, out_dir, **settings, **QUIET, resume=step > 1)
        assert run.code == 143 and f"stopped after step {step}: {out_dir / f'step-{step:06d}'} is complete" in run.err, run.err
    stop_at.clear()
    run = finetune(command, base, data, out_dir, **settings, **QUIET, resume=True)
    assert run.code == 0, run.err
    assert_same(run, whole(method))


def test_a_run_broken_off_in_mid_accumulation_goes_on_from_its_last_checkpoint(
    whole: Callable[[str], Run], stopped: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    out_dir = shutil.copytree(stopped, tmp_path / "out")
    assert [int(row["step"]) for row in Run(0, "", out_dir).rows()] == [0, 1, 2, 3, 4]
    run = finetune("finetune_lora", base, data, out_dir, **METHODS["Skip2-LoRA, no cache"][1], **QUIET, resume="auto")
    assert run.code == 0 and f"resumed from {out_dir / 'step-000004'}" in run.err, run.err
    assert_same(run, whole("Skip2-LoRA, no cache"))


def test_a_named_checkpoint_is_gone_on_from_if_it_is_the_last(
    whole: Callable[[str], Run], stopped: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    out_dir, settings = shutil.copytree(stopped, tmp_path / "out"), {**METHODS["Skip2-LoRA, no cache"][1], **QUIET}
    refused = finetune("finetune_lora", base, data, out_dir, **settings, resume=out_dir / "step-000002")
    assert refused.code == 1 and "holds later results than step-000002 (step-000004): move them away first" in refused.err
    shutil.rmtree(out_dir / "step-000004")
    run = finetune("finetune_lora", base, data, out_dir, **settings, resume=out_dir / "step-000002")
    assert run.code == 0 and "resumed from" in run.err, run.err
    assert_same(run, whole("Skip2-LoRA, no cache"))


def test_settings_that_do_not_touch_the_curve_may_change(
    whole: Callable[[str], Run], stopped: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    """Other places for everything, another schedule of checkpoints: the same steps."""
    out_dir = shutil.copytree(stopped, tmp_path / "moved")
    moved = shutil.copytree(base, tmp_path / "base")
    copied = shutil.copyfile(data, tmp_path / "copied.json")
    changed = {
        "train__save_interval": 5,
        "train__keep_last": 1,
        "train__keep_best": False,
        "train__max_time": 1e6,
        "train__skip_nonfinite": True,
        "eval__patience": 50,
        "eval__max_new_tokens": 2,
        "log__run": "again",
        "skip2lora_cache_dir": tmp_path / "cache",
    }
    run = finetune("finetune_lora", moved, Path(copied), out_dir, **METHODS["Skip2-LoRA, no cache"][1], **changed, resume=True)
    assert run.code == 0, run.err
    assert curve(run) == curve(whole("Skip2-LoRA, no cache"))
    assert [path.name for path in out_dir.glob("step-*")] == ["step-000005"]


def test_the_cache_may_move_from_memory_to_the_disk(
    whole: Callable[[str], Run], base: Path, data: Path, tmp_path: Path, stop_at: list[int]
) -> None:
    stop_at[:] = [3]
    settings = {**SKIP, **QUIET}
    assert finetune("finetune_lora", base, data, tmp_path / "out", **settings, skip2lora_cache="memory").code == 143
    stop_at.clear()
    run = finetune("finetune_lora", base, data, tmp_path / "out", **settings, skip2lora_cache="disk", resume=True, verbose=True)
    assert run.code == 0 and "on disk" in run.err, run.err
    assert_same(run, whole("Skip2-LoRA, cache in memory"))


def test_a_cache_that_no_longer_fits_is_said(base: Path, data: Path, tmp_path: Path, stop_at: list[int], monkeypatch: Any) -> None:
    stop_at[:] = [3]
    settings = {**SKIP, **QUIET, "skip2lora_cache": "memory"}
    assert finetune("finetune_lora", base, data, tmp_path / "out", **settings).code == 143
    stop_at.clear()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=0, total=2**30))
    run = finetune("finetune_lora", base, data, tmp_path / "out", **settings, resume=True)
    assert run.code == 0 and "training activations are computed for every batch, unlike before: the figures may differ" in run.err


def test_a_finished_run_says_so_and_changes_nothing(whole: Callable[[str], Run], base: Path, data: Path, tmp_path: Path) -> None:
    out_dir = shutil.copytree(whole("LoRA").out_dir, tmp_path / "out")
    for resume in (True, "auto"):
        before = finetune_runs.files(out_dir)
        run = finetune("finetune_lora", base, data, out_dir, **METHODS["LoRA"][1], **QUIET, resume=resume)
        assert run.code == 0 and f"{out_dir / 'final'} exists: this run is finished" in run.err
        assert finetune_runs.files(out_dir) == before
    for name, said in ((out_dir / "step-009999", "there is no folder"), (base, "is not a step-* folder of out_dir")):
        run = finetune("finetune_lora", base, data, out_dir, **METHODS["LoRA"][1], **QUIET, resume=name)
        assert run.code == 1 and said in run.err
    (out_dir / "report.json").unlink()
    assert finetune("finetune_lora", base, data, out_dir, **METHODS["LoRA"][1], resume="auto").code == 0
    assert finetune_runs.files(out_dir) == before
    (out_dir / "final" / IDENTITY).unlink()  # as an earlier version left it
    atomic.write_manifest(out_dir / "final")
    assert "this run is finished" in finetune("finetune_lora", base, data, out_dir, **METHODS["LoRA"][1], **QUIET, resume="auto").err


def test_tensorboard_and_the_times_go_on(whole: Callable[[str], Run], base: Path, data: Path, tmp_path: Path, stop_at: list[int]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stop_at[:] = [3]
    first = finetune("finetune_lora", base, data, tmp_path / "out", **METHODS["LoRA"][1], **QUIET, train__save_interval=2)
    shutil.rmtree(tmp_path / "out/step-000003")  # as if killed: step 3 is done twice
    stop_at.clear()
    run = finetune("finetune_lora", base, data, tmp_path / "out", **METHODS["LoRA"][1], **QUIET, resume=True)
    assert (first.code, run.code) == (143, 0), run.err
    events = EventAccumulator(str(tmp_path / "out/logs/version_0"), size_guidance={"scalars": 0}).Reload()
    assert [(e.step, pytest.approx(e.value, rel=1e-5)) for e in events.Scalars("train_loss")] == list(
        zip(range(1, 7), whole("LoRA").column("train_loss"), strict=True)
    )
    assert run.report["train_seconds"] == pytest.approx(sum(run.column("step_time")), rel=1e-6)
    assert run.report["total_seconds"] > run.report["train_seconds"]


def test_what_is_saved_is_a_config_to_resume_with_and_one_that_replaces_nothing(
    whole: Callable[[str], Run], stopped: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    """hyperparameters.yaml never says resume or overwrite, so that `--config` of it neither goes on nor replaces anything by itself."""
    for folder in ("step-000004", "best"):
        values = yaml.safe_load((stopped / folder / "hyperparameters.yaml").read_text())
        assert (values["resume"], values["overwrite"]) == (False, False)
    out_dir = shutil.copytree(stopped, tmp_path / "out")
    argv = ["finetune_lora", "--config", str(out_dir / "step-000004/hyperparameters.yaml"), "--out_dir", str(out_dir)]
    assert finetune_runs.call(argv, out_dir).code == 1
    run = finetune_runs.call([*argv, "--resume"], out_dir)
    assert run.code == 0, run.err
    assert_same(run, whole("Skip2-LoRA, no cache"))


def test_too_little_space_is_said_at_the_start(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run that cannot be saved is begun; one whose checkpoints may not all fit is, with a warning."""
    settings, model = {**METHODS["LoRA"][1], **QUIET, "train__max_steps": 1}, os.path.getsize(base / "lit_model.pth")
    for free, code, words in ((2**10, 1, "1 KiB are free, final alone needs"), (model + 2**14, 0, "a checkpoint to resume from need")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free, total=2**40))
        run = finetune("finetune_lora", base, data, tmp_path / str(free), **settings)
        assert run.code == code and f"the disk of out_dir {tmp_path / str(free)} is too full: " in run.err and words in run.err, run.err
        assert (tmp_path / str(free)).exists() == (code == 0)


# --- another run ---


def other_data(base: Path, data: Path, tmp_path: Path) -> tuple[Path, Path]:
    records = json.loads(data.read_text())
    records[3]["output"] += " now"
    file = tmp_path / "other.json"
    file.write_text(json.dumps(records))
    return base, file


def more_data(base: Path, data: Path, tmp_path: Path) -> tuple[Path, Path]:
    return base, finetune_runs.write_data(tmp_path / "more.json", 30)


def other_base(base: Path, data: Path, tmp_path: Path) -> tuple[Path, Path]:
    folder = shutil.copytree(base, tmp_path / "other")
    (folder / "manifest.json").unlink(missing_ok=True)
    weights = {name: value.clone() for name, value in checkpoint.load_weights(folder / "lit_model.pth").items()}
    weights["transformer.h.4.mlp.proj.weight"].view(-1)[7] += 1e-3
    checkpoint.save_weights(weights, folder / "lit_model.pth")
    return folder, data


def other_config(base: Path, data: Path, tmp_path: Path) -> tuple[Path, Path]:
    folder = shutil.copytree(base, tmp_path / "other")
    (folder / "model_config.yaml").write_text((base / "model_config.yaml").read_text().replace("norm_eps: 1.0e-05", "norm_eps: 1.0e-06"))
    return folder, data


OTHERS: dict[str, tuple[dict[str, Any], Any, list[str]]] = {
    "settings": (
        {"lora_r": 8, "optimizer__lr": 0.01, "train__epochs": 3, "seed": 5},
        None,
        ["lora_r is 8, before 4", "seed is 5, before 1337", "train.epochs is 3, before 2", "optimizer is {"],
    ),
    "cache": ({"skip2lora_cache": "memory"}, None, ["skip2lora_cache is True, before False"]),
    "precision": ({"precision": "bf16-true"}, None, ["precision is 'bf16-true', before '32-true'"]),
    "data": ({}, other_data, ["the training data are different (18 samples, before 18)"]),
    "more data": ({}, more_data, ["training data are different (27 samples, before 18)", "validation data are different"]),
    "base": ({}, other_base, ["the base model is another one"]),
    "base's config": ({}, other_config, ["the base model is another one"]),
    "template": ({"data.prompt_style": "alpaca"}, None, ["training data are different"]),
}


@pytest.mark.parametrize("what", quick(OTHERS, "settings", "data", "base", "template"))
def test_another_run_is_refused_with_all_that_has_changed(what: str, stopped: Path, base: Path, data: Path, tmp_path: Path) -> None:
    changes, make, parts = OTHERS[what]
    if make:
        base, data = make(base, data, tmp_path)
    out_dir = shutil.copytree(stopped, tmp_path / "out")
    before = finetune_runs.files(out_dir)
    run = finetune("finetune_lora", base, data, out_dir, **{**METHODS["Skip2-LoRA, no cache"][1], **QUIET, **changes}, resume=True)
    last = run.err.rstrip().splitlines()[-1]
    assert run.code == 1 and last.startswith(f"Error: resume: {out_dir / 'step-000004'} belongs to another run: "), run.err
    assert all(part in last for part in parts), last
    assert finetune_runs.files(out_dir) == before


def test_another_machine_is_said(stopped: Path, base: Path, data: Path, tmp_path: Path) -> None:
    out_dir = shutil.copytree(stopped, tmp_path / "out")
    file = out_dir / "step-000004/training_state.json"
    facts = json.loads(file.read_text())
    facts["environment"]["threads"] = 99
    atomic.write_text(file, json.dumps(facts))
    atomic.write_manifest(out_dir / "step-000004")
    run = finetune("finetune_lora", base, data, out_dir, **METHODS["Skip2-LoRA, no cache"][1], **QUIET, resume=True)
    now = torch.get_num_threads()
    assert run.code == 0 and f"may differ in their last digits from an uninterrupted run's: threads 99 then, {now} now" in run.err


# --- what cannot be gone on from ---


def cut_off(folder: Path, name: str) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size * 2 // 3)


def flip_a_bit(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)


def remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


def loop_of_links(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(name)


STATE, WEIGHTS, TENSORS = "training_state.json", "lit_model.pth.lora", "training_state.safetensors"


@pytest.mark.parametrize("name", quick([STATE, WEIGHTS, TENSORS, "manifest.json"], WEIGHTS))
@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, remove, loop_of_links])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    damage: Callable[[Path, str], None], name: str, stopped: Path, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_dir = shutil.copytree(stopped, tmp_path / "out")
    damage(out_dir / "step-000004", name)
    problem = name
    if name == "manifest.json" and damage is flip_a_bit:  # the bit may be in another file's name or digest
        problem = atomic.damages(out_dir / "step-000004", contents=True)[0]
    monkeypatch.setattr(Loop, "step", failing_at(3))
    settings = {**METHODS["Skip2-LoRA, no cache"][1], **QUIET}
    run = finetune("finetune_lora", base, data, out_dir, **settings, resume=True)
    assert run.code == 130 and f"{out_dir / 'step-000004'} is incomplete and is skipped: {problem}" in run.err, run.err
    assert f"resumed from {out_dir / 'step-000002'}" in run.err and "Traceback" not in run.err
    named = finetune("finetune_lora", base, data, out_dir, **settings, resume=out_dir / "step-000004")
    assert named.code == 1 and f"Error: resume: {out_dir / 'step-000004'} is incomplete: {problem}" in named.err


def test_what_is_damaged_is_replaced_when_its_step_comes(
    whole: Callable[[str], Run], stopped: Path, base: Path, data: Path, tmp_path: Path
) -> None:
    for damaged in ("best", "step-000004"):
        out_dir = shutil.copytree(stopped, tmp_path / damaged / "out")
        cut_off(out_dir / damaged, WEIGHTS)
        run = finetune("finetune_lora", base, data, out_dir, **METHODS["Skip2-LoRA, no cache"][1], **QUIET, resume=True)
        assert run.code == 0 and f"{out_dir / damaged} is incomplete" in run.err
        assert_same(run, whole("Skip2-LoRA, no cache"))


def test_checkpoints_without_a_manifest_are_none(stopped: Path, base: Path, data: Path, tmp_path: Path) -> None:
    """As upstream's LitGPT leaves them: not gone on from, not replaced, not removed."""
    out_dir = tmp_path / "out"
    shutil.copytree(stopped / "step-000004", out_dir / "step-000004", ignore=shutil.ignore_patterns("manifest.json"))
    before = finetune_runs.files(out_dir)
    settings = {**METHODS["Skip2-LoRA, no cache"][1], **QUIET}
    for resume, message in ((True, "holds no checkpoint to resume"), ("auto", "holds a run, but no checkpoint to resume")):
        run = finetune("finetune_lora", base, data, out_dir, **settings, resume=resume)
        assert run.code == 1 and f"{message}; incomplete: step-000004 (manifest.json is missing or broken)" in run.err, run.err
    assert finetune_runs.files(out_dir) == before


def test_auto_starts_anew_where_nothing_is(whole: Callable[[str], Run], base: Path, data: Path, tmp_path: Path) -> None:
    """Also on the logs of a run that was killed before its first checkpoint."""
    out_dir = tmp_path / "out"
    refused = finetune("finetune_lora", base, data, out_dir, **METHODS["LoRA"][1], **QUIET, resume=True)
    assert (
        refused.code == 1
        and f"resume: out_dir {out_dir} holds no checkpoint to resume. To start anew, give --overwrite true" in refused.err
    )
    assert not out_dir.exists()
    for folder in ("logs/version_0", "best"):
        shutil.copytree(whole("LoRA").out_dir / folder, out_dir / folder)
    run = finetune("finetune_lora", base, data, out_dir, **METHODS["LoRA"][1], **QUIET, resume="auto")
    assert run.code == 0 and "resumed" not in run.err
    assert_same(run, whole("LoRA"))


def test_resume_and_overwrite_contradict_each_other(stopped: Path, base: Path, data: Path) -> None:
    before = finetune_runs.files(stopped)
    run = finetune("finetune_lora", base, data, stopped, **METHODS["Skip2-LoRA, no cache"][1], resume="auto", overwrite=True)
    assert run.code == 1 and "--resume continues the run in out_dir and --overwrite replaces it: give one" in run.err
    assert finetune_runs.files(stopped) == before


def test_a_folder_in_use_is_left_alone(stopped: Path, base: Path, data: Path) -> None:
    before, settings = finetune_runs.files(stopped), METHODS["Skip2-LoRA, no cache"][1]
    held = atomic.lock(stopped)
    try:
        for words in ({"resume": "auto"}, {"overwrite": True}):
            run = finetune("finetune_lora", base, data, stopped, **settings, **words)
            assert run.code == 1 and f"out_dir {stopped} is in use by another run" in run.err
    finally:
        os.close(held)
    assert finetune_runs.files(stopped) == before


def test_resume_without_a_value_means_true(stopped: Path, base: Path, data: Path, tmp_path: Path) -> None:
    run = finetune("finetune_lora", base, data, tmp_path / "out", "--resume", **METHODS["LoRA"][1])
    assert run.code == 1 and "holds no checkpoint to resume" in run.err


@pytest.mark.parametrize("place", ["nowhere", "file", "final", "step-000004"])
def test_a_place_that_is_no_checkpoint_of_this_run(place: str, stopped: Path, base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "final").mkdir()
    shutil.copytree(stopped / "step-000004", tmp_path / "step-000004")
    run = finetune("finetune_lora", base, data, stopped, **METHODS["Skip2-LoRA, no cache"][1], resume=tmp_path / place)
    expected = f"there is no folder {tmp_path / place}" if place in ("nowhere", "file") else f"{tmp_path / place} is not a step-* folder of"
    assert run.code == 1 and f"Error: resume: {expected}" in run.err
