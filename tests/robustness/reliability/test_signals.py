"""SIGINT and SIGTERM: the step is finished and saved, the exit code says which signal it was, and the run goes on as if never stopped."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cases import first
from tests.helpers.jobs import SKIP, WARM, Bench, Driver, assert_same, assert_sound

DISK = {**SKIP, "skip2lora_cache": "disk"}
JOBS: dict[str, dict[str, Any]] = {"Skip2-LoRA": DISK, "warm-up": {**WARM, "skip2lora_cache": "disk"}, "LoRA": {"lora_r": 4}}
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture(scope="module")
def reference(bench: Bench, driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def run(job: str) -> Path:
        if job not in made:
            made[job] = tmp_path_factory.mktemp("reference") / "out"
            ended = driver.run(bench.argv(made[job], **JOBS[job]))
            assert ended.status == 0, ended.err
        return made[job]

    return run


Moment = tuple[str, list[Any], int, signal.Signals]
MOMENTS: list[Moment] = [
    ("LoRA", ["loss", 19], 3, signal.SIGTERM),  # between micro-batches
    ("warm-up", ["step", 3], 2, signal.SIGINT),  # after the last step of a phase
    ("Skip2-LoRA", ["validate", 5], 4, signal.SIGTERM),
]
QUICK_FIRST = [MOMENTS[0], *(pytest.param(moment, marks=pytest.mark.slow) for moment in MOMENTS[1:])]
MORE_MOMENTS: list[Moment] = [
    ("warm-up", ["step", 6], 3, signal.SIGTERM),
    ("LoRA", ["validate", 3], 2, signal.SIGINT),
    ("Skip2-LoRA", ["save", 3], 2, signal.SIGINT),
    ("LoRA", ["step", 12], 6, signal.SIGTERM),  # after the last step
]


@pytest.mark.parametrize("moment", QUICK_FIRST, ids=str)
def test_the_step_is_finished_and_saved_and_the_run_goes_on_from_there(
    moment: Moment, bench: Bench, driver: Driver, reference: Any, tmp_path: Path
) -> None:
    check_moment(moment, bench, driver, reference, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("moment", MORE_MOMENTS, ids=str)
def test_at_more_moments(moment: Moment, bench: Bench, driver: Driver, reference: Any, tmp_path: Path) -> None:
    check_moment(moment, bench, driver, reference, tmp_path)


def check_moment(moment: Moment, bench: Bench, driver: Driver, reference: Any, tmp_path: Path) -> None:
    job, at, step, number = moment
    out_dir = tmp_path / "out"
    stopped = driver.run(bench.argv(out_dir, **JOBS[job]), at, number=number)
    folder = out_dir / f"step-{step:06d}"
    assert stopped.status == CODES[number], stopped.err
    last = stopped.err.rstrip().splitlines()[-1]
    assert last == f"{number.name}: stopped after step {step}: {folder} is complete, the same command with --resume true continues from it."
    assert f"{number.name}: stopping after this step; a second signal ends the run at once" in stopped.err
    assert folder.is_dir() and not (out_dir / "final").exists()
    assert_sound(out_dir)
    ended = driver.run(bench.argv(out_dir, **JOBS[job], resume=True))
    assert ended.status == 0 and f"resumed from {folder}" in ended.err, ended.err
    assert_same(out_dir, reference(job))


def test_while_the_cache_is_filled_there_is_nothing_to_lose(bench: Bench, driver: Driver, reference: Any, tmp_path: Path) -> None:
    number = signal.SIGINT
    stopped = driver.run(bench.argv(tmp_path / "out", **DISK), ["_rows", 1], number=number)
    assert stopped.status == CODES[number], stopped.err
    assert stopped.err.rstrip().endswith(f"{number.name}: stopped after step 0: nothing is lost, run the same command again.")
    assert [path.name for path in tmp_path.iterdir()] == ["activation_cache"]
    (cache,) = (tmp_path / "activation_cache").iterdir()
    assert not any((cache / "index.bin").read_bytes()), "no sample is written"
    assert driver.run(bench.argv(tmp_path / "out", **DISK)).status == 0
    assert_same(tmp_path / "out", reference("Skip2-LoRA"))


@pytest.mark.slow
def test_the_warm_up_is_saved_before_the_cache_is_filled(bench: Bench, driver: Driver, reference: Any, tmp_path: Path) -> None:
    out_dir, settings = tmp_path / "out", {**JOBS["warm-up"], "train.save_interval": 1000}
    stopped = driver.run(bench.argv(out_dir, **settings), ["_rows", 3], number=signal.SIGTERM)
    assert stopped.status == 143 and "stopped after step 2: " in stopped.err, stopped.err
    assert [path.name for path in out_dir.glob("step-*")] == ["step-000002"]
    ended = driver.run(bench.argv(out_dir, **settings, resume=True))
    assert ended.status == 0 and not list(out_dir.glob("step-*")), "it was there to resume from only"


@pytest.mark.parametrize("number", first(CODES))
def test_a_second_signal_ends_the_run_at_once(number: signal.Signals, bench: Bench, driver: Driver, reference: Any, tmp_path: Path) -> None:
    """By the kernel: a shell shows 128 + its number."""
    out_dir = tmp_path / "out"
    ended = driver.run(bench.argv(out_dir, **JOBS["LoRA"]), ["loss", 19], ["loss", 21], number=number)
    assert ended.status == -number and not (out_dir / "step-000003").exists()
    assert_sound(out_dir)
    assert driver.run(bench.argv(out_dir, **JOBS["LoRA"], resume=True)).status == 0
    assert_same(out_dir, reference("LoRA"))


def test_a_signal_while_the_result_is_written_waits_for_it(bench: Bench, driver: Driver, reference: Any, tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    ended = driver.run(bench.argv(out_dir, **JOBS["Skip2-LoRA"]), ["save", 13], number=signal.SIGTERM)
    assert ended.status == 0 and "finished: " in ended.err, ended.err
    assert_same(out_dir, reference("Skip2-LoRA"))
