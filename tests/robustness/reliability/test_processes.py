"""True `python -m litgpt` processes, one or two of them: killed, signalled, and with a fault in one of two."""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.jobs import ROOT, SKIP, Bench, Ended, assert_same, assert_sound, curve, environ, litgpt

DISK: dict[str, Any] = {**SKIP, "skip2lora_cache": "disk", "train.save_interval": 1}
FAULTS = {
    "memory": "^Error: rank {}: out of memory after step 2",
    "bug": "^Error: rank {}: KeyError: 'a bug'",
    "loss": "^Error: step 3: the loss is nan on rank {} in a batch",
    "SIGKILL": "^Error: rank {}: process [0-9]+ (was ended by SIGKILL|ended before its time)",
    "SIGTERM": "^SIGTERM: rank {} stopped after step 3",
    "SIGSTOP": r"^Error: rank {}: process [0-9]+ is stopped, and the others waited 10 s for it \(--timeout\)",
}
FAULTY = str(Path(__file__).parents[2] / "helpers" / "faulty.py")


def start(argv: list[str], script: str | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, *([script] if script else ["-m", "litgpt"]), *argv]
    kept: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environ()}
    return subprocess.Popen(command, preexec_fn=heed_signals, **kept)


def heed_signals() -> None:
    """Even if the tests run under nohup or in a shell's background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def end(process: subprocess.Popen[str], timeout: float = 120) -> Ended:
    _, err = process.communicate(timeout=timeout)
    return Ended(process.returncode, err)


def wait_for_step(out_dir: Path, step: int, process: subprocess.Popen[str], timeout: float = 120) -> None:
    """Until metrics.csv has the step."""
    began = time.monotonic()
    while not (out_dir / "logs/version_0/metrics.csv").exists() or len(curve(out_dir)) <= step:
        assert process.poll() is None and time.monotonic() - began < timeout, process.communicate()
        time.sleep(0.01)


@pytest.mark.slow
def test_a_real_process_is_killed_signalled_and_killed_again(bench: Bench, tmp_path: Path) -> None:
    out_dir, whole = tmp_path / "run" / "out", tmp_path / "whole" / "out"
    assert litgpt(bench.argv(whole, **DISK, train__epochs=20)).status == 0
    argv = bench.argv(out_dir, **DISK, train__epochs=20, resume="auto")
    draw = random.Random(1)
    for number, code in ((9, -9), (15, 143), (2, 130), (1, 129), (9, -9)):
        process = start(argv)
        wait_for_step(out_dir, max((int(row[0]) for row in curve(out_dir)), default=0) + 4 if (out_dir / "logs").exists() else 3, process)
        time.sleep(draw.random() / 10)
        process.send_signal(number)
        ended = end(process)
        assert ended.status == code, ended.err
        assert_sound(out_dir)
        if code > 0:
            assert ended.err.rstrip().endswith("is complete, the same command with --resume true continues from it.")
    ended = litgpt(argv)
    assert ended.status == 0, ended.err
    assert_same(out_dir, whole)


# --- two processes ---


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def two(bench: Bench, out_dir: Path, **settings: Any) -> list[str]:
    return bench.argv(out_dir, **{**SKIP, "devices": 2, "skip2lora_cache": "memory", **settings})


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["devices", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("fault", "message"), FAULTS.items())
def test_a_fault_in_one_of_two_processes_ends_both_with_one_message(
    fault: str, message: str, rank: int, launcher: str, bench: Bench, tmp_path: Path
) -> None:
    """The other does not wait for it in vain: neither process is there half a minute later."""
    words = [fault, str(rank), *two(bench, tmp_path / "out", timeout=10, devices=2 if launcher == "devices" else 1)]
    process = start(["--nproc_per_node=2", FAULTY, *words], "-mtorch.distributed.run") if launcher == "torchrun" else start(words, FAULTY)
    family, began = {process.pid}, time.monotonic()
    while process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            family |= {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        assert time.monotonic() - began < 120
        time.sleep(0.1)
    ended = end(process)
    assert ended.status != 0 and len(family) > 1, ended.err
    ours = [line for line in ended.err.splitlines() if "is complete, the same command with --resume true continues from it" in line]
    assert len(ours) == 1 and re.search(message.format(rank), ours[0]), ended.err
    assert f"{tmp_path / 'out'}/step-00000{3 if fault == 'SIGTERM' else 2} is complete" in ours[0]
    ended_at = time.monotonic()
    while any(is_alive(pid) for pid in family):
        assert time.monotonic() - ended_at < 30
        time.sleep(0.1)
    assert_sound(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["bug", "SIGKILL"])
@pytest.mark.parametrize(
    ("strategy", "save_interval", "remedy"), [("ddp", 1, " is complete"), ("fsdp", 1, " is complete"), ("ddp", None, "nothing is lost")]
)
def test_a_fault_in_one_of_four_processes_is_told_once_and_soon(
    strategy: str, save_interval: int | None, remedy: str, fault: str, bench: Bench, tmp_path: Path
) -> None:
    """Those that wait for others than the failed one, and those of a sharded model, notice it too."""
    settings = {
        "devices": 4,
        "strategy": strategy,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 1,
        "train.save_interval": save_interval,
    }
    process = start([fault, "2", *two(bench, tmp_path / "out", **settings)], FAULTY)
    wait_for_step(tmp_path / "out", 2, process)
    began, ended = time.monotonic(), end(process)
    assert time.monotonic() - began < 20 and ended.status == 1, ended.err
    (told,) = [line for line in ended.err.splitlines() if line.startswith("Error: ")]
    assert re.search(FAULTS[fault].format(2), told) and told.count("rank ") == told.count(remedy) == 1, told
    assert_sound(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.5, 1.5], ids=["of the weights", "of the optimizer's state"])
def test_a_sharded_models_file_that_cannot_be_written_ends_all_processes(share: float, bench: Bench, tmp_path: Path) -> None:
    """Each of its tensors is gathered as it is written: the process that writes none waits for no tensor in vain."""
    size = int((bench.base / "lit_model.pth").stat().st_size * share)
    settings = {"devices": 2, "strategy": "fsdp", "train.save_interval": 1}
    words = [str(size), sys.executable, "-m", "litgpt", *bench.argv(tmp_path / "out", "finetune_full", **settings)]
    limited = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2); os.execv(sys.argv[2], sys.argv[2:])"
    )
    began, ended = time.monotonic(), end(start([limited, *words], "-c"))
    assert time.monotonic() - began < 60 and ended.status == 1, ended.err
    (told,) = [line for line in ended.err.splitlines() if line.startswith("Error: ")]
    assert re.search("out/step-000001 cannot be written: File too large", told) and not list((tmp_path / "out").glob("step*")), told


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step_and_the_run_goes_on(
    number: signal.Signals, bench: Bench, tmp_path: Path
) -> None:
    settings = {"train.epochs": 8, "train.save_interval": 1000}
    whole = litgpt(two(bench, tmp_path / "whole", **settings))
    assert whole.status == 0, whole.err
    process = start(["slow", "0", *two(bench, tmp_path / "out", **settings)], FAULTY)
    wait_for_step(tmp_path / "out", 3, process)
    process.send_signal(number)
    ended = end(process)
    assert ended.status == 128 + number, ended.err
    assert ended.err.count("is complete, the same command with --resume true continues from it.") == 1, ended.err
    assert_sound(tmp_path / "out")
    after = litgpt(two(bench, tmp_path / "out", **settings, resume=True))
    assert after.status == 0 and after.err.count("resumed from") == 1, after.err
    assert_same(tmp_path / "out", tmp_path / "whole")


def by_hand(words: list[str], folders: list[Path]) -> list[Ended]:
    """The processes of a run in these folders, each like one of srun's: the first has the store, and none is the child of another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, folder in enumerate(folders):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = {**environ(), "PYTHONPATH": str(ROOT), **{name: str(value) for name, value in place.items()}}
        kept: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "preexec_fn": heed_signals}
        processes.append(subprocess.Popen([sys.executable, FAULTY, *words], cwd=folder, env=variables, **kept))
    return [end(process, 240) for process in processes]


@pytest.mark.slow
def test_the_first_process_reports_its_own_fault_and_the_others_do_not_repeat_it(bench: Bench, tmp_path: Path) -> None:
    """Its store ends with it."""
    words = ["bug", "0", *two(bench, tmp_path / "out", devices=1, **{"train.save_interval": 1})]
    told = [line for ended in by_hand(words, [tmp_path, tmp_path]) for line in ended.err.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1 and told[0].startswith("Error: rank 0: KeyError: 'a bug'. Stopped: "), told


@pytest.mark.slow
@pytest.mark.parametrize("what", ["data", "checkpoint"])
def test_machines_with_other_files_do_not_train_together(what: str, bench: Bench, tmp_path: Path) -> None:
    folders = [tmp_path / "0", tmp_path / "1"]
    records = json.loads(bench.data.read_text())
    for rank, folder in enumerate(folders):
        folder.mkdir()
        (folder / "sums.json").write_text(json.dumps(records[: len(records) - rank * (what == "data")]))
    words = two(Bench(bench.base, Path("sums.json")), Path("out"), devices=1, resume="auto", **{"train.max_steps": 2})
    difference = "the training data are different"
    if what == "checkpoint":
        difference = "it continues after step 0, in the first process 2"
        assert [ended.status for ended in by_hand(["none", "0", *words], folders)] == [0, 0]
        for path in [*(folders[0] / "out").glob("final"), *(folders[0] / "out").glob("report*")]:
            path.rename(tmp_path / path.name)
    first, second = by_hand(["none", "0", *words], folders)
    assert (first.status, second.status) == (1, 1) and not (folders[1] / "out").exists()
    assert first.err.count("Error: ") == 1 and f"Error: rank 1: this process would train something else: {difference}" in first.err, (
        first.err
    )
    assert "Error: " not in second.err
