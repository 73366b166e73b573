"""Tasks of a real Slurm on this machine. Needs root, and Debian's slurm-wlm."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.jobs import ROOT, SKIP, Bench, curve, environ, litgpt
from tests.helpers.runs import write_data

CONFIG = """
ClusterName=litgpt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
SlurmdParameters=config_overrides
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdSpoolDir={folder}/spool
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which srun and sbatch find a Slurm with one node, whose name has no address."""
    if os.geteuid() or any(shutil.which(name) is None for name in ("srun", "slurmctld", "slurmd")):
        pytest.skip("Slurm needs root and its programs (slurm-wlm)")
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = [server.getsockname()[1] for server in (one, other)]
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=socket.gethostname(), ports=ports, folder=folder))
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**environ(), "SLURM_CONF": str(config)}
    daemons = list[subprocess.Popen[bytes]]()
    try:
        for words in (["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", "node1"]):
            daemons.append(subprocess.Popen([*words, "-f", str(config)], env=environment, **quiet))
        until = time.monotonic() + 60
        while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True).stdout:
            assert time.monotonic() < until, (folder / "slurmctld.log").read_text()
            time.sleep(0.5)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def run(slurm: dict[str, str], *words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env=slurm, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.mark.slow
def test_two_tasks_have_the_losses_of_one_process(slurm: dict[str, str], base: Path, tmp_path: Path) -> None:
    bench = Bench(base, write_data(tmp_path / "sums.json"))
    settings = {**SKIP, "strategy": "fsdp", "lora_dropout": 0.0}
    one, two = tmp_path / "one", tmp_path / "two"
    assert litgpt(bench.argv(one, **{**settings, "strategy": "auto"})).status == 0
    done = run(slurm, "srun", "-n2", sys.executable, "-m", "litgpt", *bench.argv(two, **settings))
    assert done.returncode == 0, done.stderr
    for row, expected in zip(curve(two), curve(one), strict=True):
        assert [float(x or 0) for x in row[:4]] == pytest.approx([float(x or 0) for x in expected[:4]], abs=1e-5)
