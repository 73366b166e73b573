"""Two machines: network namespaces joined by a veth pair, with a real torchrun across them. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import ROOT, SKIP, Bench, assert_sound, curve, environ
from tests.helpers.runs import write_data

FAULTY = str(ROOT / "tests/helpers/faulty.py")
ADDRESS, PORT = "10.77.0.1", 29511


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """The names of two namespaces whose interfaces, eth0, are joined."""
    if os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"litgpt-{os.getpid()}-{k}" for k in (0, 1)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for k, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{k + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces: {error.stderr.decode()}")
    else:
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def torchrun(machines: list[str], words: list[str]) -> list[subprocess.Popen[str]]:
    common = ["--nnodes=2", "--nproc_per_node=1", f"--master_addr={ADDRESS}", f"--master_port={PORT}"]
    kept: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    kept["env"] = {**environ(), "GLOO_SOCKET_IFNAME": "eth0"}
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-mtorch.distributed.run", f"--node_rank={k}", *common, FAULTY, *words], **kept
        )
        for k, name in enumerate(machines)
    ]


def ended(processes: list[subprocess.Popen[str]], timeout: float) -> list[tuple[int, str]]:
    """Exit code and stderr of each; whatever is left after the time is killed."""
    until = time.monotonic() + timeout
    try:
        return [(process.returncode, err) for process in processes for _, err in [process.communicate(timeout=until - time.monotonic())]]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)


@pytest.mark.slow
def test_a_cut_link_ends_both_machines_and_the_run_is_resumed(machines: list[str], base: Path, tmp_path: Path) -> None:
    bench, out_dir = Bench(base, write_data(tmp_path / "sums.json")), tmp_path / "out"
    settings = {**SKIP, "strategy": "fsdp", "skip2lora_cache": "off", "train.epochs": 8, "train.save_interval": 1, "timeout": 10}
    processes = torchrun(machines, ["slow", "0", *bench.argv(out_dir, **settings)])
    began = time.monotonic()
    while not (out_dir / "logs/version_0/metrics.csv").exists() or len(curve(out_dir)) < 4:
        assert all(process.poll() is None for process in processes) and time.monotonic() - began < 150
        time.sleep(0.05)
    ip("-n", machines[0], "link", "set", "eth0", "down")
    results = ended(processes, 90)
    assert all(code != 0 for code, _ in results), results
    lines = [line for _, err in results for line in err.splitlines() if line.startswith("Error: ")]
    assert lines and all("on another machine, cannot be reached" in line and "is complete" in line for line in lines), results
    assert_sound(out_dir)
    ip("-n", machines[0], "link", "set", "eth0", "up")
    results = ended(torchrun(machines, ["none", "0", *bench.argv(out_dir, **settings, resume=True)]), 180)
    assert [code for code, _ in results] == [0, 0] and "resumed from" in results[0][1], results
    assert int(curve(out_dir)[-1][0]) == 24 and (out_dir / "final").is_dir()
