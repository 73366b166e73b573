"""Tasks of a real Slurm on this machine. Needs root, and Debian's slurm-wlm."""

from __future__ import annotations

import contextlib
import os
import re
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
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment in which srun and sbatch find a Slurm with two nodes, both this machine, whose names have no address."""
    if os.geteuid() or any(shutil.which(name) is None for name in ("srun", "slurmctld", "slurmd")):
        pytest.skip("Slurm needs root and its programs (slurm-wlm)")
    folder = tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(3)]
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=socket.gethostname(), ports=ports, folder=folder))
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**environ(), "SLURM_CONF": str(config)}
    daemons = list[subprocess.Popen[bytes]]()
    try:
        for words in (["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", "node1"], ["slurmd", "-D", "-N", "node2"]):
            daemons.append(subprocess.Popen([*words, "-f", str(config)], env=environment, **quiet))
        until = time.monotonic() + 60
        while "2 idle" not in subprocess.run(["sinfo", "-h", "-o", "%D %T"], env=environment, capture_output=True, text=True).stdout:
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
@pytest.mark.parametrize(("tasks", "strategy"), [("-n2", "fsdp"), ("-N2 -n3", "ddp")])
def test_tasks_have_the_losses_of_one_process(slurm: dict[str, str], base: Path, tmp_path: Path, tasks: str, strategy: str) -> None:
    """Three tasks on two nodes are two on the first and one on the second."""
    bench = Bench(base, write_data(tmp_path / "sums.json"))
    settings = {**SKIP, "strategy": strategy, "lora_dropout": 0.0, "train.global_batch_size": 6, "train.micro_batch_size": 1}
    one, several = tmp_path / "one", tmp_path / "several"
    assert litgpt(bench.argv(one, **{**settings, "strategy": "auto"})).status == 0
    environment = {**slurm, "MASTER_ADDR": "127.0.0.1"} if "-N2" in tasks else slurm
    done = run(environment, "srun", *tasks.split(), sys.executable, "-m", "litgpt", *bench.argv(several, **settings))
    assert done.returncode == 0, done.stderr
    for row, expected in zip(curve(several), curve(one), strict=True):
        assert [float(x or 0) for x in row[:4]] == pytest.approx([float(x or 0) for x in expected[:4]], abs=1e-5)


@pytest.mark.slow
def test_scancel_leaves_a_checkpoint_that_is_resumed(slurm: dict[str, str], base: Path, tmp_path: Path) -> None:
    bench, out = Bench(base, write_data(tmp_path / "sums.json")), tmp_path / "out"
    settings = {**SKIP, "train.global_batch_size": 6, "train.micro_batch_size": 1, "train.epochs": 100, "train.save_interval": 5}
    words = [sys.executable, "-m", "litgpt", *bench.argv(out, **settings)]
    with subprocess.Popen(["srun", "-n2", *words], env=slurm, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        until = time.monotonic() + 120
        while not list(out.glob("step-*")) and time.monotonic() < until:
            time.sleep(0.1)
        run(slurm, "scancel", "--user=root")
        said = job.communicate(timeout=60)[0]
    assert re.search(r"SIGTERM: stopped after step \d+: .* is complete", said), said
    done = run(slurm, "srun", "-n3", *words, "--resume", "auto")
    assert done.returncode == 0 and "resum" in done.stdout + done.stderr, done.stderr
