"""The standard streams of a command: each encoding, closed and full ones, control characters and secrets."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

import pytest

from litgpt import streams
from litgpt.__main__ import main
from litgpt.streams import Stream, guard, keep_secret, lost_output, safe, show, unescaped, without_secrets

ROOT = Path(__file__).parents[1]
STEERING = "\x1b[2J\x1b]0;title\x07\x9b31m\r\x08\u202e\u2066"
WRITTEN_OUT = r"\x1b[2J\x1b]0;title\x07\x9b31m\r\x08\u202e\u2066"
TEXT = "née 日本\u3000\u200d\u00a0🙂\t\n"  # with spaces and joiners that languages need


class Terminal:
    """A pseudo-terminal: `stream` is its end for the program, `read` returns what was shown."""

    def __init__(self) -> None:
        self.master, slave = os.openpty()
        tty.setraw(slave)
        self.stream = open(slave, "w", encoding="utf-8")  # noqa: SIM115

    def read(self) -> str:
        print("END", end="", file=self.stream, flush=True)
        shown = b""
        while not shown.endswith(b"END"):
            shown += os.read(self.master, 2**16)
        return shown.decode().removesuffix("END")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    opened = Terminal()
    yield opened
    opened.stream.close()
    os.close(opened.master)


def full_disk() -> TextIO:
    return open("/dev/full", "w", encoding="utf-8")


def test_control_characters_are_written_out_and_all_other_text_is_kept() -> None:
    stream = io.StringIO()
    print(STEERING, TEXT, end="", file=cast(TextIO, Stream(stream)))
    cast(TextIO, Stream(stream)).writelines(["\x1b", "x"])
    assert stream.getvalue() == f"{WRITTEN_OUT} {TEXT}\\x1bx"


@pytest.mark.parametrize("cut", range(len(STEERING)))
def test_an_answer_cannot_steer_a_terminal_wherever_it_is_divided(cut: int, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", terminal.stream)
    guard()
    for piece in (STEERING[:cut], STEERING[cut:]):
        show(piece)
    assert terminal.read() == WRITTEN_OUT


def test_an_answer_in_a_pipe_is_the_true_text(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    guard()
    show(STEERING + TEXT)
    assert stream.getvalue() == STEERING + TEXT


def test_a_library_may_draw(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    guard()
    unescaped(sys.stderr).write("\x1b[1m")
    assert terminal.read() == "\x1b[1m" and unescaped(terminal.stream) is terminal.stream


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", r"n\xe9e \U0001f642"), ("cp1252", r"née \U0001f642"), ("utf-8", "née 🙂")])
def test_characters_that_the_encoding_lacks_are_written_out(encoding: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    guard()
    print("née 🙂", end="")
    assert lost_output() is None and raw.getvalue().decode(encoding) == shown
    show("née 🙂")
    assert raw.getvalue().decode(encoding) == shown * 2


def test_a_full_disk_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", full_disk())
    guard()
    print("a" * 10**5)
    lost = lost_output()
    assert lost is not None and lost.strerror == "No space left on device"
    with pytest.raises(OSError, match="standard output"):
        show("answer")


def test_lost_output_is_an_error_of_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--version"], ["--help"], ["finetune", "--help"], ["finetune", "c", "--print_config"]):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full_disk())
            assert main(words) == 1
        assert capsys.readouterr().err == "Error: standard output: No space left on device\n"


def test_closed_streams_become_the_null_device() -> None:
    """In a process of its own, without the three descriptors: none of them is given to a file of the command."""
    code = "import os, sys; from litgpt.streams import guard; guard(); sys.stdin.isatty(); os._exit(open(sys.argv[1]).fileno())"
    closed = f'exec "{sys.executable}" -c "{code}" "{__file__}" <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", closed], cwd=ROOT).returncode == 3


def test_a_second_guard_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    guard()
    first = sys.stdout
    guard()
    assert sys.stdout is first and sys.stdout.getvalue() == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x hf_" + "aB3" * 11 + " y", "x *** y"),
        ("hf_jwt_" + "aB3" * 11 + ".e30.x-y", "***"),
        ("hf_config and hf_models/llama-2-7b-chat-finetuned stay", "hf_config and hf_models/llama-2-7b-chat-finetuned stay"),
        ("https://me:pass@hub.example/a", "https://***@hub.example/a"),
        ("https:/me:pass@hub.example/a", "https:/***@hub.example/a"),
        ("socks5h://me:pass@proxy:1", "socks5h://***@proxy:1"),
        ("data_hf_" + "aB3" * 11 + ".json", "data_***"),
        ("the endpoint me:pa/ss%20word fails", "the endpoint *** fails"),
        ("the password pa/ss word", "the password ***"),
        ("open sesame", "open ***"),
        ("https://a.example/x.yaml?rev=2&X-Amz-Signature=0aF-9 fails", "https://a.example/x.yaml?rev=2&X-Amz-Signature=*** fails"),
        ("'https://a.example/x?access_token=abc&keys'", "'https://a.example/x?access_token=***&keys'"),
        ("is a=b&c what? monkey = 3", "is a=b&c what? monkey = 3"),
        ("kept-secret and environment", "*** and ***"),
    ],
)
def test_secrets_are_hidden(text: str, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_secrets", set())
    monkeypatch.setenv("HF_TOKEN", "sesame")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "environment")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:pa/ss%20word@hub.example")
    keep_secret("kept-secret", "a")
    assert without_secrets(text) == safe(text) == shown
