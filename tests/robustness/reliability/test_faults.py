"""Full disks, memory that does not suffice, losses that are no numbers, files that may not be read: one message, and nothing that was
saved before is lost."""

from __future__ import annotations

import csv
import json
import math
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt import atomic, checkpoint
from litgpt.data import JSON
from litgpt.prompts import resolve_prompt_style
from litgpt.tokenizer import Tokenizer
from litgpt.train.loop import Batches, Loop
from litgpt.train.parallel import Rank
from litgpt.train.phase import Phase
from litgpt.train.resume import State
from tests.helpers import runs as finetune_runs
from tests.helpers.cases import first, quick
from tests.helpers.jobs import SKIP, Bench, Driver, assert_sound
from tests.helpers.runs import Run, finetune

LORA: dict[str, Any] = {"lora_r": 4, "lora_dropout": 0.2, "eval__max_new_tokens": 0}
LARGE: dict[str, Any] = {**LORA, "lora_r": 200, "lora_mlp": True}  # the weights are the only large files
SETTINGS: dict[str, dict[str, Any]] = {
    "LORA": LORA,
    "BEST": {**LARGE, "eval__interval": 4},
    "SAVED": {**LARGE, "eval__interval": 4, "eval__final_validation": False},
}
CURVE = ("step", "epoch", "train_loss", "val_loss", "learning_rate")


@pytest.fixture(scope="module")
def whole(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The undisturbed run of SETTINGS, made once."""
    runs: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in runs:
            runs[name] = finetune("finetune_lora", bench.base, bench.data, tmp_path_factory.mktemp("whole") / "out", **SETTINGS[name])
            assert runs[name].code == 0, runs[name].err
        return runs[name]

    return run


def assert_same(run: Run, other: Run) -> None:
    assert run.code == 0, run.err
    assert [[row[name] for name in CURVE] for row in run.rows()] == [[row[name] for name in CURVE] for row in other.rows()]
    mine, others = finetune_runs.files(run.out_dir), finetune_runs.files(other.out_dir)
    assert {k: v for k, v in mine.items() if k.endswith((".lora", ".pth", ".safetensors"))} == {
        k: v for k, v in others.items() if k.endswith((".lora", ".pth", ".safetensors"))
    }


def assert_one_message(run: Run, code: int, *parts: str) -> None:
    last = run.err.rstrip("\n").splitlines()[-1]
    assert run.code == code and last.startswith("Error: ") and all(part in last for part in parts), run.err
    assert "Traceback" not in run.err


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file can grow beyond the limit: what a full disk looks like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- a full disk ---


@pytest.mark.parametrize(
    ("at", "limit", "what"),
    quick([(3, 2**19, "best"), (5, 2**19, "step-000006"), (5, 2**21, "step-000006"), (7, 2**19, "final")], (5, 2**19, "step-000006")),
)
def test_a_disk_that_fills_up_costs_no_checkpoint(
    at: int, limit: int, what: str, bench: Bench, whole: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full from step `at` on. 2 MiB suffice for the weights, not for the optimizer's state. After it is mended the run goes on."""
    out_dir, on_step = tmp_path / "out", Phase.on_step
    name = "BEST" if what == "best" else "SAVED"
    settings = SETTINGS[name]

    def filling(phase: Phase, state: State, metrics: dict[str, float], is_last: bool) -> bool:
        if state.step == at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        ends = on_step(phase, state, metrics, is_last)
        if state.step == 6 and at == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        return ends

    with small_files(resource.RLIM_INFINITY), monkeypatch.context() as patch:
        patch.setattr(Phase, "on_step", filling)
        run = finetune("finetune_lora", bench.base, bench.data, out_dir, **settings)
    newest = {"best": "step-000002", "step-000006": "step-000004", "final": "step-000006"}[what]
    remedy = f"{out_dir / newest} is complete: make room, and the same command with --resume true continues from it"
    assert_one_message(run, 1, f"{out_dir / what} cannot be written: File too large", remedy)
    assert_sound(out_dir)
    assert not list(out_dir.glob(".*")) and not (out_dir / what).exists()
    assert_same(finetune("finetune_lora", bench.base, bench.data, out_dir, **settings, resume=True), whole(name))


@pytest.mark.slow
def test_a_checkpoint_by_the_clock_is_left_out_if_the_disk_is_full(
    bench: Bench, whole: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**LARGE, "train__save_interval": None, "train__save_every_minutes": 1e-9, "train__keep_best": False}
    step = Loop.step

    def filling(loop: Loop, state: State, *args: Any) -> dict[str, float]:
        full = 3 <= state.step < 5
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**19 if full else resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return step(loop, state, *args)

    with small_files(resource.RLIM_INFINITY), monkeypatch.context() as patch:
        patch.setattr(Loop, "step", filling)
        run = finetune("finetune_lora", bench.base, bench.data, tmp_path / "out", **settings)
    assert run.code == 0 and run.err.count("cannot be written: File too large") == 2, run.err
    assert run.column("train_loss") == whole("SAVED").column("train_loss")
    assert not list((tmp_path / "out").glob("step-*")), "they were there to resume from only"


def test_a_cache_that_changes_under_a_run_stops_it_with_its_state_saved(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SKIP, "eval__max_new_tokens": 0, "skip2lora_cache": "disk"}
    reference = finetune("finetune_lora", bench.base, bench.data, tmp_path / "reference", **settings)
    step = Loop.step

    def changing(loop: Loop, state: State, *args: Any) -> dict[str, float]:
        for file in (tmp_path / "activation_cache").glob("*/activations.bin") if state.step == 3 else ():
            os.truncate(file, 100)
        return step(loop, state, *args)

    out_dir = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", changing)
        run = finetune("finetune_lora", bench.base, bench.data, out_dir, **settings)
    assert_one_message(run, 1, "activations.bin: rows ", f"{out_dir / 'step-000003'} is complete")
    resumed = finetune("finetune_lora", bench.base, bench.data, out_dir, **settings, resume=True)
    assert "are filled again" in resumed.err
    assert_same(resumed, reference)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_base_that_is_removed_under_a_run_is_not_needed(
    quantize: str | None, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, step = Path(shutil.copytree(bench.base, tmp_path / "base")), Loop.step
    settings = {**LORA, "quantize": quantize} if quantize else LORA
    reference = finetune("finetune_lora", base, bench.data, tmp_path / "reference", **settings)

    def removing(loop: Loop, state: State, *args: Any) -> dict[str, float]:
        if state.step == 3:
            shutil.rmtree(base)
        return step(loop, state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", removing)
        run = finetune("finetune_lora", base, bench.data, tmp_path / "out", **settings)
    assert run.code == 0, run.err
    mine, others = (finetune_runs.files(one.final) for one in (run, reference))
    merged = {"lit_model.pth"} if quantize else set()  # the weights before they were quantised are needed for it
    assert others.keys() - mine.keys() == merged and ("the adapter is not merged" in run.err) is bool(merged)
    assert all(mine[name] == others[name] for name in mine if name.startswith(("lit_model", "tokenizer", "generation")))


def test_a_disk_too_full_for_the_cache_is_said_and_the_run_goes_on(bench: Bench, tmp_path: Path) -> None:
    settings = {**SKIP, "lora_dropout": 0.0, "skip2lora_output_layer": "transformer.h.3", "eval__max_new_tokens": 0}
    with small_files(2**17):
        run = finetune("finetune_lora", bench.base, bench.data, tmp_path / "out", **settings, skip2lora_cache="disk")
    assert run.code == 0, run.err
    assert "training cache: " in run.err and "(File too large), activations are computed again for every batch" in run.err
    assert len(list((tmp_path / "activation_cache").iterdir())) <= 1, "the validation samples' cache may fit"
    plain = finetune("finetune_lora", bench.base, bench.data, tmp_path / "plain", **settings, skip2lora_cache="off")
    assert run.column("train_loss") == plain.column("train_loss")


# --- memory ---


def test_memory_that_runs_out_is_told_with_figures_and_remedies_and_what_was_done_is_saved(
    bench: Bench, whole: Callable[[str], Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_dir, loss = tmp_path / "out", Loop.loss

    def greedy(loop: Loop, activations: Any, rows: Any) -> torch.Tensor:
        if loop.model.training and len(Run(0, "", out_dir).rows()) == 6:  # in step 6
            torch.empty(2**50, dtype=torch.uint8)
        return loss(loop, activations, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "loss", greedy)
        run = finetune("finetune_lora", bench.base, bench.data, out_dir, **LORA)
    remedies = (
        "Batches have 2 samples of up to 60 tokens; set train.micro_batch_size below 2",
        "train.max_seq_length",
        "skip2lora_enabled",
    )
    assert_one_message(run, 4, "out of memory for 1048576.00 GiB more after step 5: at most ", "GiB are free now", *remedies)
    assert f"Stopped: {out_dir / 'step-000005'} is complete, the same command with --resume true continues from it" in run.err
    assert_same(finetune("finetune_lora", bench.base, bench.data, out_dir, **LORA, resume=True), whole("LORA"))


@pytest.mark.parametrize("error", first([MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")]))
def test_other_forms_of_it(error: Exception, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(*args: Any) -> None:
        raise error

    monkeypatch.setattr(Loop, "loss", greedy)
    run = finetune("finetune_lora", bench.base, bench.data, tmp_path / "out", **LORA, eval__initial_validation=False)
    assert_one_message(run, 4, "out of memory after step 0: ", "Stopped: nothing is lost, run the same command again")
    assert not (tmp_path / "out").exists()


def test_a_model_too_large_to_be_read(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "load_base", lambda *args: torch.empty(2**50, dtype=torch.uint8))
    run = finetune("finetune_lora", bench.base, bench.data, tmp_path / "out", **LORA)
    assert_one_message(run, 4, "out of memory for 1048576.00 GiB more while data and model were read", "bf16-true")
    assert not list(tmp_path.iterdir())


# --- losses that are no numbers ---


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, int], None]:
    """`spoil(value, sample)`: in training the sample's loss is the value."""

    def set_up(value: float, sample: int) -> None:
        loss = Loop.loss

        def spoilt(loop: Loop, activations: Any, rows: Any) -> torch.Tensor:
            result = loss(loop, activations, rows)
            return result * value if sample in rows and activations is loop.activations else result

        monkeypatch.setattr(Loop, "loss", spoilt)

    return set_up


def third_batch(bench: Bench) -> list[int]:
    """The samples of step 3."""
    tokenizer = Tokenizer(bench.base)
    samples = (
        JSON(json_path=bench.data, val_split_fraction=0.1).splits(tokenizer, resolve_prompt_style(None, bench.base, tokenizer), 256).train
    )
    return [indices for indices, *_ in Batches(samples, 6, Rank(), 1337).epoch(0)][2]


@pytest.mark.parametrize("value", first([math.nan, math.inf]))
def test_a_loss_that_is_no_number_stops_with_the_step_and_the_sample_and_saves_what_was_before(
    value: float, bench: Bench, whole: Callable[[str], Run], tmp_path: Path, spoil: Callable[[float, int], None], monkeypatch: Any
) -> None:
    out_dir, rows = tmp_path / "out", third_batch(bench)
    with monkeypatch.context() as patch:
        spoil(value, rows[4])
        run = finetune("finetune_lora", bench.base, bench.data, out_dir, **LORA, train__save_interval=1000)
        patch.undo()
    monkeypatch.undo()
    assert_one_message(run, 3, f"step 3: the loss is {value} in a batch with samples {rows}: lower the learning rate")
    assert f"The training samples (counted from 0) begin {rows[4]}: 'user\\nadd " in run.err
    assert f"Stopped: {out_dir / 'step-000002'} is complete, the same command with --resume true continues from it" in run.err
    after = finetune("finetune_lora", bench.base, bench.data, out_dir, **LORA, resume=True)
    assert [[row[name] for name in CURVE] for row in after.rows()] == [[row[name] for name in CURVE] for row in whole("LORA").rows()]
    assert load(after, "final") == load(whole("LORA"), "final"), "the random states are those before the step that failed"


def load(run: Run, folder: str) -> dict[str, list[Any]]:
    content = finetune_runs.load(run.out_dir / folder / "lit_model.pth.lora")["model"]
    return {name: value.tolist() for name, value in content.items()}


def test_such_steps_can_be_left_out(bench: Bench, tmp_path: Path, spoil: Callable[[float, int], None]) -> None:
    rows = third_batch(bench)
    spoil(math.nan, rows[0])
    settings = {**LORA, "train__save_interval": 1, "train__epochs": 1}
    run = finetune("finetune_lora", bench.base, bench.data, tmp_path / "out", **settings, train__skip_nonfinite=True)
    assert run.code == 0, run.err
    assert f"step 3: the loss is nan in a batch with samples {rows}: the step is skipped" in run.err
    assert run.report["skipped_steps"] == 1 and "skipped steps" in run.err
    assert load(run, "step-000003") == load(run, "step-000002") != load(run, "step-000001")
    with (tmp_path / "out/logs/version_0/metrics.csv").open(newline="") as file:
        assert [row["train_loss"] for row in csv.DictReader(file)][3] == "nan"


@pytest.mark.slow
def test_a_run_that_stopped_can_go_on_without_the_step(bench: Bench, tmp_path: Path, spoil: Callable[[float, int], None]) -> None:
    rows = third_batch(bench)
    spoil(math.nan, rows[0])
    settings = {**LORA, "train__epochs": 1}
    left_out = finetune("finetune_lora", bench.base, bench.data, tmp_path / "left_out", **settings, train__skip_nonfinite=True)
    stopped = finetune("finetune_lora", bench.base, bench.data, tmp_path / "out", **settings)
    assert (left_out.code, stopped.code) == (0, 3)
    run = finetune("finetune_lora", bench.base, bench.data, tmp_path / "out", **settings, train__skip_nonfinite=True, resume=True)
    assert_same(run, left_out)
    assert run.report["skipped_steps"] == 1


# --- checkpoints kept and removed ---


def test_the_last_ones_are_kept(bench: Bench, tmp_path: Path) -> None:
    run = finetune("finetune_lora", bench.base, bench.data, tmp_path / "out", **LORA, train__save_interval=1, train__keep_last=2)
    assert run.code == 0 and sorted(path.name for path in run.out_dir.glob("step-*")) == ["step-000005", "step-000006"]


def test_by_the_clock_there_are_the_newest_and_the_last_with_a_sound_loss(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, step = [], Loop.step

    def looking(loop: Loop, state: State, *args: Any) -> dict[str, float]:
        seen.append(sorted(path.name for path in (tmp_path / "out").glob("step-*")))
        return step(loop, state, *args)

    monkeypatch.setattr(Loop, "step", looking)
    settings = {**LORA, "train__save_every_minutes": 1e-9, "train__save_interval": 3}
    run = finetune("finetune_lora", bench.base, bench.data, tmp_path / "out", **settings)
    kept = "step-000003"
    assert run.code == 0
    at = [[int(name[5:]) for name in names] for names in seen]
    assert at == [[], [1], [1, 2], [2, 3], [3, 4], [3, 4, 5]]
    assert sorted(path.name for path in run.out_dir.glob("step-*")) == [kept, "step-000006"]


def test_the_best_is_kept_and_training_stops_when_it_gets_no_better(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation losses are made up: after the 3rd of them two are no better."""
    made_up = {0: 1.0, 1: 5.0, 2: 4.0, 3: 3.0, 4: 3.5, 5: 3.0, 6: 1.0}
    steps = iter(made_up)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "validate", lambda *args: made_up[next(steps)])
        run = finetune("finetune_lora", bench.base, bench.data, tmp_path / "out", **LORA, eval__interval=1, eval__patience=2)
    assert run.code == 0, run.err
    assert (run.report["steps"], run.report["best_step"], run.report["best_val_loss"]) == (5, 3, 3.0)
    assert "step 5: no better validation loss than 3.0000 in 2 validations: training ends" in run.err
    assert f"best checkpoint         {run.out_dir / 'best'}: step 3, validation loss 3.0000" in run.err
    assert json.loads((run.out_dir / "best/report.json").read_text()) == {"step": 3, "val_loss": 3.0}
    assert load(run, "best") != load(run, "step-000002") and atomic.damages(run.out_dir / "best", contents=True) == []
    longer = finetune("finetune_lora", bench.base, bench.data, tmp_path / "longer", **LORA, train__max_steps=3, train__save_interval=3)
    assert load(run, "best").keys() == load(longer, "step-000003").keys()


def test_no_best_where_none_is_wanted(bench: Bench, tmp_path: Path) -> None:
    run = finetune("finetune_lora", bench.base, bench.data, tmp_path / "out", **LORA, train__keep_best=False, train__max_steps=1)
    assert run.code == 0 and not (run.out_dir / "best").exists() and "best checkpoint" not in run.err
    assert run.report["best_step"] == 1


# --- files that may not be read or written ---


@pytest.mark.parametrize(
    ("locked", "message"),
    quick(
        [
            ("base/lit_model.pth", "lit_model.pth"),
            ("base/tokenizer.json", "tokenizer.json"),
            ("data.json", "data.json"),
            ("", "you may not write to"),
            ("out", "you may not write to"),
            ("out/step-000004/training_state.safetensors", "training_state.safetensors cannot be read: Permission denied"),
        ],
        ("base/lit_model.pth", "lit_model.pth"),
        ("out", "you may not write to"),
    ),
)
def test_permissions_that_are_gone(locked: str, message: str, bench: Bench, driver: Driver, tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    folder.mkdir()
    shutil.copytree(bench.base, folder / "base")
    shutil.copy(bench.data, folder / "data.json")
    argv = Bench(folder / "base", folder / "data.json").argv(folder / "out", lora_r=4, lora_dropout=0.2)
    if locked.startswith("out"):
        assert driver.run(argv, ["step", 9]).status == -9
        argv += ["--resume"]
    (folder / locked).chmod(0o500 if (folder / locked).is_dir() else 0)
    ended = driver.run(argv, powerless=True)
    (folder / locked).chmod(0o700)
    if "training_state" in locked:
        assert ended.status == 0 and message in ended.err and "resumed from" in ended.err, ended.err
        return
    last = ended.err.rstrip().splitlines()[-1]
    assert ended.status == 1 and last.startswith("Error: ") and message in last and "Traceback" not in ended.err, ended.err


@pytest.mark.parametrize("place", ["out_dir", "parent of out_dir", "base", "weights", "data"])
def test_links_that_lead_nowhere(place: str, bench: Bench, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    base, data, out_dir = bench.base, bench.data, tmp_path / "out"
    if place == "weights":
        base = shutil.copytree(bench.base, tmp_path / "base")
        (base / "lit_model.pth").unlink()
        (base / "lit_model.pth").symlink_to("lit_model.pth")
    base, data = (loop if place == "base" else base), (loop if place == "data" else data)
    out_dir = {"out_dir": loop, "parent of out_dir": loop / "out"}.get(place, out_dir)
    before = sorted(path.name for path in tmp_path.iterdir())
    run = finetune("finetune_lora", base, data, out_dir, **LORA)
    assert_one_message(run, 1, "lit_model.pth" if place == "weights" else str(loop))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
