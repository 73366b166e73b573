"""The processes of a run: started by torchrun, by SLURM's srun or by this program, on one machine or several, and joined to one group."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from litgpt.device import default_device
from litgpt.errors import UserError
from litgpt.text import first_line

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of torchrun; the fields of `Place`
SLURM_VARIABLES = [
    f"SLURM_{name}" for name in ("PROCID", "LOCALID", "NODEID", "JOB_ID", "STEP_NUM_TASKS", "STEP_TASKS_PER_NODE", "STEP_NODELIST")
]
SLURM_OPTIONAL = ("SLURM_STEP_ID", "SLURM_STEP_NUM_NODES", "MASTER_PORT")
POLL_SECONDS = 0.2
START_SECONDS = 300.0  # in which all processes must have started
TELL_SECONDS = 20.0  # after which a process says for which other it waits
NOTICE_SECONDS = 10.0  # after which a process that has not noticed the end of another gets SIGTERM
SIGNAL_SECONDS = 1.0  # in which a signal that has ended another process ends this one too
STORE_SECONDS = 3.0
END_SECONDS = 30.0  # after which it is ended, whatever it does


@dataclass(frozen=True)
class Place:
    """The place of a process among those of a run."""

    index: int
    size: int
    local_index: int
    local_size: int  # processes on this machine
    address: str  # of the machine of the first process
    port: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place | None:
        """Return the place that a launcher's variables describe; None if this process was started alone.

        Raises UserError if the variables name several processes, but do not say which of them this one is.
        """
        names, place = list(VARIABLES), None
        try:
            if all(name in environment for name in VARIABLES):
                index, size, local_index, own_size, host, port = (environment[name] for name in VARIABLES)
                place = cls(int(index), int(size), int(local_index), int(own_size), host, int(port))
            elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
                names = SLURM_VARIABLES + [name for name in SLURM_OPTIONAL if name in environment]
                place = cls._of_slurm(environment)
            elif "RANK" not in environment or environment.get("WORLD_SIZE", "1") == "1":  # some launchers set these two and no LOCAL_RANK
                return None
        except UserError:
            raise
        except (KeyError, ValueError, IndexError):
            pass
        if place and 0 <= place.index < place.size and 0 <= place.local_index < place.local_size <= place.size and place.port < 2**16:
            return place
        said = ", ".join(f"{name}={environment[name]}" if name in environment else f"no {name}" for name in names)
        alone = ", or set LOCAL_RANK=0 and LOCAL_WORLD_SIZE=1 if each machine has one process" if names[0] == "RANK" else ""
        raise UserError(
            f"the environment does not say which of the run's processes this is: {said}. Start the run with torchrun or srun{alone}"
        )

    @classmethod
    def _of_slurm(cls, environment: Mapping[str, str]) -> Place:
        machines, order = int(environment.get("SLURM_STEP_NUM_NODES", 1)), environment.get("SLURM_DISTRIBUTION", "block")
        if machines > 1 and not order.startswith("block"):
            raise UserError(
                f"SLURM distributes tasks {order!r}: start srun with --distribution=block, so that a machine's tasks follow each other"
            )
        nodes = environment["SLURM_STEP_NODELIST"]  # such as node[07-09,12]
        first = re.match(r"([^\[,]+)(?:\[([0-9]+))?", nodes)
        host = "".join(part or "" for part in first.groups()) if first else nodes
        address = environment.get("MASTER_ADDR", host if machines > 1 else "127.0.0.1")  # a node's name may have no address
        step = int(environment["SLURM_JOB_ID"]) + 997 * int(environment.get("SLURM_STEP_ID", 0))  # the steps of a job may run together
        meeting = int(environment.get("MASTER_PORT", 12000 + step % 20000))
        counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"])  # such as 3(x2),1
        own = [int(count) for count, times in counts for _ in range(int(times or 1))][int(environment["SLURM_NODEID"])]
        index, size, local_index = (int(environment[f"SLURM_{name}"]) for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID"))
        return cls(index, size, local_index, own, address, meeting)

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that describe this place, under torchrun's names."""
        return dict(zip(VARIABLES, map(str, astuple(self)), strict=True))


def place_of(devices: int | str, num_nodes: int) -> Place | None:
    """Return the place of this process in a run on `devices` devices per machine; None for a run of one process."""
    place = Place.of(os.environ)
    if num_nodes < 1:
        raise UserError(f"num_nodes is {num_nodes}: at least 1 is needed")
    if place is not None:
        asked = {str(devices), str(num_nodes * int(devices)) if str(devices).isdecimal() else "auto"}
        if not asked & {"1", "auto", str(place.local_size), str(place.size)}:
            raise UserError(f"devices is {devices}, but {place.local_size} processes were started on this machine: leave devices out")
        return place if place.size > 1 else None
    count = _count(devices)
    if count * num_nodes == 1:
        return None
    if num_nodes == 1:
        return Place(0, count, 0, count, "127.0.0.1", 0)
    try:
        node, address, port = (os.environ[name] for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"))
        return Place(int(node) * count, count * num_nodes, 0, count, address, int(port))
    except (KeyError, ValueError):
        raise UserError(
            f"num_nodes is {num_nodes}: start the command on each machine with torchrun (--nnodes {num_nodes} --nproc_per_node {count}) "
            "or srun; or set NODE_RANK (0, 1, ...), and MASTER_ADDR and MASTER_PORT of the first machine"
        ) from None


def _count(devices: int | str) -> int:
    """Return the number of devices that the setting names. Raises UserError if this machine does not have them."""
    device = default_device()
    here = torch.cuda.device_count() if device.type == "cuda" else 1
    if devices == "auto":
        return here
    count = int(devices) if re.fullmatch(r"[0-9]{1,6}", str(devices)) else 0
    most = {"cuda": here, "cpu": 10**6}.get(device.type, 1)
    if not 1 <= count <= most:
        has = f'it has {most} of type {device.type}. Give a number up to that, or "auto"' if count else 'give a number from 1, or "auto"'
        raise UserError(f"devices {devices!r} do not fit this machine: {has}")
    return count


@dataclass(frozen=True)
class Peer:
    """A process of the run."""

    host: str
    pid: int

    @property
    def state(self) -> str:
        """ "gone", "stopped" or "alive", as far as this machine can tell."""
        if self.host != socket.gethostname():
            return "alive"
        try:
            status = psutil.Process(self.pid).status()
        except psutil.NoSuchProcess:
            return "gone"
        return {psutil.STATUS_ZOMBIE: "gone", psutil.STATUS_DEAD: "gone", psutil.STATUS_STOPPED: "stopped"}.get(status, "alive")


@dataclass(frozen=True)
class Failure:
    """A process that ended prematurely."""

    index: int
    code: int  # its exit code
    message: str


def _wait(is_there: Callable[[], bool], what: str, limit: timedelta) -> None:
    """Wait until `is_there()`, and say so if that takes long. Unlike the store's own waits, this one does not delay signals."""
    began, is_told = time.monotonic(), False
    while not is_there():
        waited = time.monotonic() - began
        if waited > limit.total_seconds():
            raise dist.DistStoreError(f"{what} has not started")
        if waited > TELL_SECONDS and not is_told:
            print(f"waiting for {what} to start, up to {limit.total_seconds():.0f} s", file=sys.stderr, flush=True)
            is_told = True
        time.sleep(POLL_SECONDS)


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), STORE_SECONDS).close()
    except OSError:
        return False
    return True


class Group:
    """The processes of a run: those started here, and how each learns why another ended."""

    current: Group | None = None  # torch allows one
    has_met = False  # this process has connected to others

    def __init__(self, place: Place, timeout: float, joined: bool = True) -> None:
        """Start the other processes of this machine, unless a launcher has, and join all of them in torch's process group.

        If not `joined`, the first process does not wait for the others, they wait for the first, and none ends with another. Raises
        UserError if the processes do not find each other, or if one that was started here ends before that.
        """
        self.place, self.timeout, self.ended, self.is_reachable, self.joined = place, timeout, False, True, joined
        self.children, self.peers, self.has_begun = list[subprocess.Popen[bytes]](), list[Peer](), False
        self.device = default_device()
        if self.device.type == "cuda":
            self.device = torch.device("cuda", place.local_index)
            torch.cuda.set_device(self.device)
        launched = Place.of(os.environ) is not None
        if place.local_size == place.size and sys.platform == "linux" and not launched:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name may have no address
        is_host = place.index == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        limit = timedelta(seconds=timeout)
        start_limit = max(limit, timedelta(seconds=START_SECONDS))
        self._parent = None if place.local_index == 0 or os.environ.get("TORCHELASTIC_RUN_ID") else os.getppid()
        if self._parent is not None and not joined:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the first process stops the others
        try:
            if not is_host:
                _wait(lambda: _answers(place.address, place.port), f"the first process at {place.address}:{place.port}", start_limit)
            store = TCPStore(place.address, place.port, None, is_host, start_limit, wait_for_workers=False)
            self.port = store.port
            if not launched:
                self._launch(replace(place, port=store.port))
            atexit.register(self._close)
            self.watcher = threading.Thread(target=self._watch, daemon=True)
            self.watcher.start()
            self.store = PrefixStore(f"litgpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            self.store.set(f"peer/{place.index}", f"{os.getpid()} {socket.gethostname()}")
            facts = [self._fact_of(k, start_limit) for k in range(place.size if joined else 1)]
            self.peers = [Peer(host, int(pid)) for pid, host in facts]
            is_cuda = self.device.type == "cuda"
            if joined:
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if is_cuda else "gloo",
                    store=self.store,
                    rank=place.index,
                    world_size=place.size,
                    timeout=limit,
                    device_id=self.device if is_cuda else None,
                )
        except dist.DistError as error:
            self.ended = True
            reason = next((f"process {pid} {how}" for pid, how in self.lost.items()), first_line(error))
            self.end_children()
            raise UserError(f"the {place.size} processes of the run did not find each other at {place.address}: {reason}") from None
        except SystemExit:  # a signal
            self.ended = True
            self.end_children()
            raise
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_size))
        self.has_begun = Group.has_met = True
        if joined:
            Group.current = self

    def _fact_of(self, index: int, limit: timedelta) -> list[str]:
        """Wait until a process has started and return its id and host."""
        _wait(lambda: self.store.check([f"peer/{index}"]), f"rank {index}", limit)
        return self.store.get(f"peer/{index}").decode().split(" ", 1)

    def _launch(self, first: Place) -> None:
        """Start the other processes of this machine with the same command."""
        main = sys.modules["__main__"]
        spec = getattr(main, "__spec__", None)
        command = [sys.executable, *(["-m", spec.name] if spec else [os.path.abspath(sys.argv[0])]), *sys.argv[1:]]
        for local in range(1, first.local_size):
            place = replace(first, index=first.index + local, local_index=local)
            environment = {"TORCH_CPP_LOG_LEVEL": "ERROR", **os.environ, **place.variables}  # no C++ stack when the first process ends
            self.children.append(subprocess.Popen(command, env=environment))

    def _close(self) -> None:
        """Wait for the processes that this one has started, and for the watcher: a thread in the store's C++ code aborts Python's exit."""
        if not self.ended:
            with suppress(subprocess.TimeoutExpired):
                for child in self.children:
                    child.wait(END_SECONDS)
        self.end_children()
        self.ended = True
        self.watcher.join(STORE_SECONDS)

    @property
    def lost(self) -> dict[int, str]:
        """How processes that were started here ended prematurely, by process id."""
        codes = {child.pid: code for child in self.children if (code := child.poll())}
        return {
            pid: f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}" for pid, code in codes.items()
        }

    def end_children(self) -> None:
        """Kill the processes that this one has started, and those of the run on this machine that are stopped."""
        for child in self.children:
            child.kill()
        for peer in self.peers:
            if peer.state == "stopped":
                os.kill(peer.pid, signal.SIGKILL)

    def _watch(self) -> None:
        """End this process, which may be busy, after another on this machine has ended: first by SIGTERM, then by `os._exit`.

        Before all have found each other nothing can be lost, and it ends at once. Processes that are not joined end only with the first.
        """
        while self._parent in (None, os.getppid()) and not self._is_stopped:
            if self.ended:
                return
            if self.joined and self.lost:
                break
            time.sleep(POLL_SECONDS)
        if self.has_begun:
            time.sleep(NOTICE_SECONDS if self.joined else 0)
            if self.ended:
                return
            if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # the signal has arrived already
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(END_SECONDS)
        else:
            time.sleep(SIGNAL_SECONDS)
            if self.ended:
                return
            for pid, how in [*self.lost.items()][:1]:
                print(f"Error: process {pid} of the run {how} before the run began", file=sys.stderr, flush=True)
        self.end_children()
        os._exit(1)

    @property
    def _is_stopped(self) -> bool:
        """True if this process is not joined, and the first has stopped the others or cannot be reached."""
        if self.joined or self.place.index == 0 or not self.has_begun:
            return False
        try:
            return bool(self.store.check(["stopped"]))
        except (dist.DistError, RuntimeError):
            return True

    def tell(self, *failures: Failure) -> None:
        """Tell the others why this process ends: its own failure, or those of others."""
        self._soon(lambda: self.store.set(f"failed/{self.place.index}", json.dumps([astuple(failure) for failure in failures])))

    def told_by(self, index: int) -> list[Failure]:
        """Return the failures that a process reported before it ended."""
        said = self._soon(lambda: self.store.check([f"failed/{index}"]) and self.store.get(f"failed/{index}"))
        return [Failure(*failure) for failure in json.loads(said)] if said else []

    def _soon(self, ask: Callable[[], Any]) -> Any:
        """Return the store's answer; None if it takes too long, as a connection to an unreachable machine may wait for minutes."""
        answer: list[Any] = []

        def work() -> None:
            with suppress(dist.DistError, RuntimeError):
                answer.append(ask())

        if self.is_reachable:
            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            thread.join(STORE_SECONDS)
            self.is_reachable = not thread.is_alive()
        return answer[0] if answer else None

    def failures(self, seconds: float, count: int = 1) -> list[Failure]:
        """Wait up to `seconds` for `count` failures of other processes, and return them. A process's report on itself takes precedence."""
        until = time.monotonic() + seconds
        others = [k for k in range(self.place.size) if k != self.place.index]
        while True:
            told = [(k, failure) for k in others for failure in self.told_by(k) or self._seen(k)]
            known = {failure.index: failure for k, failure in sorted(told, key=lambda item: item[0] == item[1].index)}
            known.pop(self.place.index, None)
            if len(known) >= count or time.monotonic() > until:
                return [known[k] for k in sorted(known)]
            time.sleep(POLL_SECONDS)

    def _seen(self, index: int) -> list[Failure]:
        """Return the failure of a process on this machine that ended without a report, or that is stopped."""
        peer = self.peers[index]
        if peer.state == "alive":
            return []
        if peer.state == "stopped":
            return [Failure(index, 1, f"process {peer.pid} is stopped, and the others waited {self.timeout:g} s for it (--timeout)")]
        return [Failure(index, 1, f"process {peer.pid} {self.lost.get(peer.pid, 'ended before its time')}")]

    @property
    def elsewhere(self) -> list[int]:
        """The processes of other machines."""
        first = self.place.index - self.place.local_index
        return [k for k in range(self.place.size) if not first <= k < first + self.place.local_size]

    @property
    def speaker(self) -> int:
        """The process that reports an error: the first that is alive."""
        return next(k for k, peer in enumerate(self.peers) if k == self.place.index or peer.state == "alive")

    def disconnect(self) -> None:
        """Shut down the connections to the other processes, so that those waiting for this one notice.

        torch closes them only when nothing refers to its group any more, and a sharded model does. The connection to the store stays open.
        """
        for connection in psutil.Process().net_connections("tcp") if self.device.type == "cpu" else ():
            if connection.raddr and self.port not in (connection.laddr.port, connection.raddr.port):
                with suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as own:
                    own.shutdown(socket.SHUT_RDWR)

    def dismiss(self) -> None:
        """Let the other processes notice that this one ends, and why: the store may end with it."""
        self.disconnect()
        until = time.monotonic() + STORE_SECONDS
        others = [k for k in range(self.place.size) if k != self.place.index]
        while time.monotonic() < until and not all(self.peers[k].state != "alive" or self.told_by(k) for k in others):
            time.sleep(POLL_SECONDS)

    def leave(self) -> None:
        """Leave the group, and wait for the first process to report the error."""
        self.disconnect()
        until = time.monotonic() + END_SECONDS
        with suppress(SystemExit):  # torchrun sends SIGTERM when the first process has ended
            while self.speaker != self.place.index and time.monotonic() < until:
                time.sleep(POLL_SECONDS)
