"""Signals during a run, and memory that runs out. Real processes get signals in tests/robustness/reliability/test_signals.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch

from litgpt.errors import OutOfMemory, Stopped
from litgpt.train.interrupts import SIGNALS, Interrupts, is_out_of_memory, memory_explained

CPU = torch.device("cpu")
TWICE = """
import os, sys, threading, time
from litgpt.train.interrupts import Interrupts
def send():
    for _ in range(2):
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(0.02)
with Interrupts() as interrupts, interrupts.held():
    thread = threading.Thread(target=send)
    thread.start()
    thread.join()
    print(interrupts.asked)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_at_once(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(Stopped) as stopped, Interrupts():
            os.kill(os.getpid(), number)
        assert stopped.value.signum == number and signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_held_signal_waits_and_the_next_one_is_the_kernels(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts() as interrupts, interrupts.held():
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.asked == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == before
    assert capfd.readouterr().err == "\nSIGTERM: stopping after this step; a second signal ends the run at once\n"


def test_a_signal_to_all_processes_of_a_run_is_told_by_the_first(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    with Interrupts() as interrupts, interrupts.held():
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.asked == signal.SIGTERM
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("first", SIGNALS)
def test_a_closed_terminal_which_sends_several_hangups_ends_nothing_at_once(first: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGHUP)
    with Interrupts() as interrupts, interrupts.held():
        for number in (first, signal.SIGHUP, signal.SIGHUP):
            os.kill(os.getpid(), number)
        assert interrupts.asked == first
    assert signal.getsignal(signal.SIGHUP) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_sent_to_the_process_and_to_its_group_is_one(number: signal.Signals) -> None:
    """As `timeout` sends it: the second comes while Python handles the first."""

    def heed() -> None:
        signal.signal(number, signal.SIG_DFL)

    done = subprocess.run([sys.executable, "-c", TWICE, str(int(number))], capture_output=True, text=True, preexec_fn=heed)
    assert (done.returncode, done.stdout) == (0, f"{int(number)}\n"), done.stderr


@pytest.mark.parametrize("is_held", [False, True])
def test_a_signal_after_an_error_does_not_replace_it(is_held: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """As that of torchrun, which ends the other processes as soon as one has failed."""
    with Interrupts() as interrupts:
        with pytest.raises(ValueError, match="the cause"):
            try:
                with interrupts.ending(), interrupts.held() if is_held else nullcontext():
                    raise ValueError("the cause")
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.asked is None and capfd.readouterr().err == ""


def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_leaves_the_handlers_alone() -> None:
    before, seen = [signal.getsignal(number) for number in SIGNALS], []

    def enter() -> None:
        with Interrupts():
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_memory_errors_get_figures_and_others_pass() -> None:
    figures = r"out of memory for 1048576\.00 GiB more while reading: at most .* GiB are free now"
    with pytest.raises(OutOfMemory, match=figures), memory_explained(CPU, "while reading"):
        torch.empty(2**50, dtype=torch.uint8)
    with pytest.raises(ValueError, match="other"), memory_explained(CPU, "while reading"):
        raise ValueError("other")
