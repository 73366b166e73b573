"""SIGKILL at any moment: what is there is whole, and the run that goes on ends as the one that was never killed, bit for bit."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import SKIP, WARM, Bench, Driver, assert_same, assert_sound

JOBS: dict[str, dict[str, Any]] = {
    "Skip2-LoRA, cache on disk": {**SKIP, "skip2lora_cache": "disk"},
    "Skip2-LoRA, cache in memory, last two kept": {**SKIP, "skip2lora_cache": "memory", "train.keep_last": 2},
    "Skip2-LoRA, no cache": {**SKIP, "skip2lora_cache": "off"},
    "LoRA": {"lora_r": 4, "lora_dropout": 0.2},
    "LoRA's warm-up, cache on disk": {**WARM, "skip2lora_cache": "disk", "train.keep_last": 2},
    "full": {"command": "finetune_full", "optimizer.lr": 2e-3},
}


@pytest.fixture(scope="module")
def reference(bench: Bench, driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, int]]:
    """The uninterrupted run of a job and the number of its events, made once."""
    made: dict[str, tuple[Path, int]] = {}

    def run(job: str) -> tuple[Path, int]:
        if job not in made:
            out_dir = tmp_path_factory.mktemp("reference") / "out"
            ended = driver.run(bench.argv(out_dir, **JOBS[job]))
            assert ended.status == 0, ended.err
            made[job] = out_dir, ended.events
        return made[job]

    return run


def killed_often(job: str, kills: int, seed: int, bench: Bench, driver: Driver, reference: Path, events: int, out_dir: Path) -> int:
    """Begin the job, kill it at a random event, go on, and so on until it has ended. The number of kills."""
    argv = bench.argv(out_dir, **JOBS[job], resume="auto")
    draw, survived = random.Random(seed), 0
    while True:
        ended = driver.run(argv, *([draw.randint(1, events)] if survived < kills else []))
        assert ended.status in (0, -signal.SIGKILL), ended.err
        assert_sound(out_dir)
        if ended.status == 0:
            assert_same(out_dir, reference)
            assert not [*out_dir.glob(".*"), *(out_dir.parent / "activation_cache").glob(".*")]
            return survived
        survived += 1


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_never_had_been(
    bench: Bench, driver: Driver, reference: Any, tmp_path: Path
) -> None:
    """The job with the most phases: LoRA, the filling of a cache, training from it."""
    job, survived, rounds = "LoRA's warm-up, cache on disk", 0, 0
    while survived < 2:
        rounds += 1
        survived += killed_often(job, 2, rounds, bench, driver, *reference(job), tmp_path / str(rounds) / "out")


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_a_run_that_is_killed_all_along_its_way_ends_as_if_it_never_had_been(
    job: str, bench: Bench, driver: Driver, reference: Any, tmp_path: Path
) -> None:
    """At each sixth of its events once, before and after steps, micro-batches, fsyncs, renames and removals; every job at other ones."""
    whole, events = reference(job)
    survived = 0
    for kill_at in range(1 + list(JOBS).index(job), events + 1, len(JOBS)):
        out_dir = tmp_path / "out"
        first = driver.run(bench.argv(out_dir, **JOBS[job], resume="auto"), kill_at)
        assert first.status == -signal.SIGKILL, first.err
        assert_sound(out_dir)
        second = driver.run(bench.argv(out_dir, **JOBS[job], resume="auto"))
        assert second.status == 0, second.err
        assert_same(out_dir, whole)
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)
        survived += 1
    print(f"{job}: {survived} kills survived, at every 6th of {events} events")


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_a_run_that_is_killed_dozens_of_times(job: str, bench: Bench, driver: Driver, reference: Any, tmp_path: Path) -> None:
    survived, rounds = 0, 0
    while survived < 40:
        rounds += 1
        survived += killed_often(job, 40, 100 + rounds, bench, driver, *reference(job), tmp_path / str(rounds) / "out")
    print(f"{job}: {survived} kills survived in {rounds} runs")
