"""The place of a process: by torchrun's, SLURM's and a user's variables, and what does not fit the machine."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.errors import UserError
from litgpt.train.launch import VARIABLES, Failure, Group, Peer, Place, place_of
from tests.helpers.cases import quick
from tests.helpers.jobs import ROOT, environ

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_JOB_ID": "30001",
    "SLURM_STEP_NODELIST": "gpu-node[07-08,12]",
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, *SLURM, "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_torchruns_variables_are_the_place_and_come_back_as_they_are() -> None:
    place = Place.of(TORCHRUN)
    assert place == Place(5, 8, 1, 4, "10.0.0.1", 29500) and place.variables == TORCHRUN


@pytest.mark.parametrize(
    ("nodes", "address"),
    [
        ("gpu-node[07-08,12]", "gpu-node07"),
        ("a1,b2", "a1"),
        ("single", "single"),
        ("n[1,3]-ib", "n1"),
        ("rack2-node[003]", "rack2-node003"),
    ],
)
def test_sruns_variables(nodes: str, address: str) -> None:
    assert Place.of({**SLURM, "SLURM_STEP_NODELIST": nodes}) == Place(5, 8, 1, 4, address, 22001)
    assert Place.of({**SLURM, "MASTER_ADDR": "here", "MASTER_PORT": "1234"}) == Place(5, 8, 1, 4, "here", 1234)


def test_srun_may_give_a_machine_more_tasks_than_another() -> None:
    uneven = {**SLURM, "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "4", "SLURM_STEP_TASKS_PER_NODE": "3,2(x2),1"}
    sizes = [Place.of({**uneven, "SLURM_NODEID": str(node)}).local_size for node in range(4)]  # type: ignore[union-attr]
    assert sizes == [3, 2, 2, 1]
    with pytest.raises(UserError, match="SLURM distributes tasks 'cyclic:block': start srun with --distribution=block"):
        Place.of({**uneven, "SLURM_DISTRIBUTION": "cyclic:block"})


def test_steps_of_srun_on_one_machine_need_no_name_of_it_and_each_has_its_port() -> None:
    one = {**SLURM, "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "8"}
    places = [Place.of({**one, "SLURM_STEP_ID": step}) for step in ("0", "1")]
    assert places == [Place(5, 8, 1, 8, "127.0.0.1", port) for port in (22001, 22998)]


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, {**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}],
)
def test_a_process_that_no_launcher_started_is_alone(environment: dict[str, str]) -> None:
    assert Place.of(environment) is None


@pytest.mark.parametrize("kind", [TORCHRUN, SLURM], ids=["torchrun", "slurm"])
def test_variables_that_do_not_describe_a_process_are_named(kind: dict[str, str]) -> None:
    """Such processes must not train alone, each as if it were the only one: some launchers set RANK and WORLD_SIZE and no LOCAL_RANK."""
    for name in kind.keys() - {"RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"}:
        with pytest.raises(UserError, match=f"does not say which of the run's processes this is: .*no {name}"):
            Place.of({key: value for key, value in kind.items() if key != name})
    for name in kind.keys() - {"MASTER_ADDR", "SLURM_STEP_NODELIST"}:
        with pytest.raises(UserError, match=f"does not say .*{name}=x"):
            Place.of({**kind, name: "x"})
    for name in kind.keys() & {"RANK", "LOCAL_RANK", "MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"}:
        with pytest.raises(UserError, match=f"does not say .*{name}=99999"):
            Place.of({**kind, name: "99999"})


def test_the_settings_say_how_many_processes_there_are_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_of(1, 1) is None and place_of("auto", 1) is None
    assert place_of("3", 1) == Place(0, 3, 0, 3, "127.0.0.1", 0)
    with pytest.raises(UserError, match="num_nodes is 2: start the command on each machine with torchrun .* or set NODE_RANK"):
        place_of(4, 2)
    for name, value in {"NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert place_of(4, 2) == Place(4, 8, 0, 4, "10.0.0.1", 29500)


def test_a_launchers_processes_are_used_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    for devices, nodes in ((1, 1), ("auto", 1), (4, 2), (8, 1)):
        assert place_of(devices, nodes) == Place.of(TORCHRUN)
    with pytest.raises(UserError, match="devices is 3, but 4 processes were started on this machine: leave devices out"):
        place_of(3, 1)


@pytest.mark.parametrize(("devices", "nodes", "message"), [(1, 0, "num_nodes is 0"), (0, 1, "devices 0"), (-3, 1, "devices -3")])
def test_numbers_below_one_are_refused(devices: int, nodes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        place_of(devices, nodes)


@pytest.mark.parametrize("devices", ["many", "", "1.5", [0, 5], "3,"])
def test_devices_are_a_number_or_auto(devices: Any) -> None:
    with pytest.raises(UserError, match=r'devices .* do not fit this machine: give a number from 1, or "auto"'):
        place_of(devices, 1)


def test_more_gpus_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="devices 7 do not fit this machine: it has 2 of type cuda"):
        place_of(7, 1)
    assert place_of("auto", 1) == Place(0, 2, 0, 2, "127.0.0.1", 0)


def test_what_can_be_seen_of_a_process() -> None:
    assert Peer("elsewhere", 1).state == "alive" == Peer(socket.gethostname(), os.getpid()).state
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    peer = Peer(socket.gethostname(), process.pid)
    assert peer.state == "alive"
    process.kill()
    process.wait()
    assert peer.state == "gone"


def test_a_failure_that_several_processes_tell_of_is_one_in_the_words_of_the_one_that_failed() -> None:
    store, groups = torch.distributed.HashStore(), [object.__new__(Group) for _ in range(4)]
    for index, group in enumerate(groups):
        group.place, group.store, group.is_reachable = Place(index, 4, index, 4, "127.0.0.1", 0), store, True  # type: ignore[assignment]
        group.peers = [Peer("elsewhere", 1)] * 4
    groups[1].tell(Failure(2, 1, "ended before its time"))
    assert groups[0].failures(0) == [Failure(2, 1, "ended before its time")]
    groups[2].tell(Failure(2, 4, "out of memory"))
    groups[3].tell(Failure(2, 1, "ended before its time"))
    assert groups[0].failures(0) == [Failure(2, 4, "out of memory")] and groups[2].failures(0) == []


ENDS = [("sys.exit(3)", "ended with exit code 3"), ("os.kill(os.getpid(), 9)", "was ended by SIGKILL")]


@pytest.mark.parametrize(("end", "how"), quick(ENDS, ENDS[1]))
def test_a_process_that_ends_before_the_others_have_found_it_ends_the_run_at_once(end: str, how: str, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        f"import os, sys\nif 'RANK' in os.environ:\n    {end}\nfrom litgpt.train import launch\nlaunch.Group(launch.place_of(2, 1), 600)\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, env={**environ(), "PYTHONPATH": str(ROOT)}, timeout=120
    )
    assert done.returncode == 1 and re.fullmatch(rf"Error: process \d+ of the run {how} before the run began\n", done.stderr), done.stderr
    assert time.monotonic() - began < 60, "most of it to load torch"


def test_a_signal_while_the_others_start_ends_the_run_at_once(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "if 'RANK' in os.environ:\n    time.sleep(2)\n    os.kill(os.getppid(), signal.SIGTERM)\n    time.sleep(60)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "from litgpt.train import launch\nlaunch.Group(launch.place_of(2, 1), 600)\n"
    )
    began, kept = time.monotonic(), {**environ(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT, env=kept, timeout=120)
    assert done.returncode == 143 and not done.stderr, done.stderr
    assert time.monotonic() - began < 25, "the process that sleeps is not waited for"


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_says_for_which_other_it_waits_and_heeds_signals(index: int) -> None:
    other = ["rank 1", "the first process at 127.0.0.1:%d"][index]
    script = (
        "import signal, sys\nfrom litgpt.train import launch\nlaunch.TELL_SECONDS = 0\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"launch.Group(launch.Place({index}, 2, 0, 1, '127.0.0.1', int(sys.argv[1])), 30)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, "-c", script, str(port)], stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environ()) as process:
        assert process.stderr is not None
        said, began = process.stderr.readline(), time.monotonic()
        process.terminate()
        assert process.wait(60) == 143 and time.monotonic() - began < 20 and process.stderr.read() == ""
    assert said == f"waiting for {other % port if index else other} to start, up to 300 s\n"


def test_no_thread_asks_the_store_while_python_ends() -> None:
    script = (
        "import atexit, threading\nfrom torch._C._distributed_c10d import TCPStore\nfrom litgpt.train import launch\n"
        "atexit.register(lambda: print(threading.active_count()))\n"  # the last that is called
        "store = TCPStore('127.0.0.1', 0, None, True, wait_for_workers=False)\nstore.set('litgpt/0/peer/0', '1 here')\n"
        "launch.Group(launch.Place(1, 2, 0, 1, '127.0.0.1', store.port), 600, joined=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ(), cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("late", [0, 1])
def test_torchrun_does_not_end_the_process_that_reports_a_mistake_of_all(late: int, tmp_path: Path) -> None:
    """It ends all of them as soon as one has failed."""
    script = tmp_path / "run.py"
    script.write_text(
        f"import os, sys, time\nfrom litgpt.__main__ import main\ntime.sleep(3 * (os.environ['LOCAL_RANK'] == '{late}'))\n"
        "sys.exit(main(['finetune_lora', 'missing', '--bogus', '1']))\n"
    )
    command, kept = (
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(script)],
        {**environ(), "PYTHONPATH": str(ROOT)},
    )
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=kept, timeout=240)
    assert done.returncode == 1 and done.stderr.count("Error: --bogus is not a known key") == 1, done.stderr
