"""`litgpt chat` with messages from a pipe."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from litgpt.__main__ import main
from litgpt.api import LLM
from litgpt.generate.chat import Conversation
from litgpt.prompts import Alpaca, save_prompt_style
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
GREEDY = {"temperature": 0.0, "top_k": None, "top_p": 1.0, "generator": None}


@pytest.fixture
def base(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    return tiny.write_base(tmp_path / "base", write_tiny_tokenizer)


@pytest.fixture
def llm(base: Path) -> LLM:
    return LLM.load(base, precision="32-true", device="cpu")


@pytest.fixture
def chat(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """chat("piped text", "--key", value) -> exit code, stdout, stderr"""

    def run(text: str, *words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code = main(["chat", str(base), "--precision", "32-true", "--temperature", "0", *map(str, words)])
        return (code, *capsys.readouterr())

    return run


def said_to(monkeypatch: pytest.MonkeyPatch, reply: str = "answer") -> list[str]:
    """Replace the model's answers; the list collects the prompt texts."""
    prompts: list[str] = []

    def complete(self: LLM, text: str, max_new_tokens: int, **settings: Any) -> Iterator[int]:
        prompts.append(text)
        yield from self.tokenizer.ids(reply)[:max_new_tokens]

    monkeypatch.setattr(LLM, "complete", complete)
    return prompts


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


OPEN = "<|im_start|>assistant\n"


def test_the_second_answer_knows_the_first_turn(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = said_to(monkeypatch)
    code, out, err = chat("one\ntwo\nthree\n")
    assert (code, out) == (0, "answer\n" * 3)
    first = turn("user", "one") + turn("assistant", "answer")
    second = turn("user", "two") + turn("assistant", "answer")
    assert prompts == [
        turn("user", "one") + OPEN,
        first + turn("user", "two") + OPEN,
        first + second + turn("user", "three") + OPEN,
    ]
    assert err.count("tokens/s") == 3


def test_real_answers(chat: Any, llm: LLM) -> None:
    code, out, _ = chat("hello\n", "--max_new_tokens", 15)
    assert (code, out) == (0, llm.generate("hello", max_new_tokens=15, temperature=0.0) + "\n")


def test_an_empty_line_ends(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said_to(monkeypatch)
    assert chat("one\n\ntwo\n")[:2] == (0, "answer\n")
    assert chat("")[:2] == (0, "")


def test_multiline(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = said_to(monkeypatch)
    code, out, _ = chat("one\n\ntwo\n!submit\nthree\n!submit\n!submit\nnever\n!submit\n", "--multiline", "true")
    assert (code, out) == (0, "answer\n" * 2)
    assert prompts[0] == turn("user", "one\n\ntwo") + OPEN
    assert prompts[1].endswith(turn("user", "three") + OPEN)
    prompts.clear()
    assert chat("at the\nend of input", "--multiline")[0] == 0
    assert prompts == [turn("user", "at the\nend of input") + OPEN]


def test_a_style_without_turns(chat: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_prompt_style(Alpaca(), base)
    prompts = said_to(monkeypatch)
    code, out, err = chat("one\ntwo\n")
    assert (code, out) == (0, "answer\n" * 2)
    assert prompts == [Alpaca().apply("one"), Alpaca().apply("two")]
    assert "prompt style 'alpaca' has no turns" in err


def test_the_oldest_turns_are_forgotten(llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = said_to(monkeypatch)
    llm.model.max_seq_length = 200
    conversation = Conversation(llm, 30, GREEDY)
    messages = [f"{word} {'x' * 30}" for word in ("zero", "one", "two", "three", "four", "five")]
    for message in messages:
        conversation.answer(message)
    for prompt in prompts:
        assert len(llm.tokenizer.ids(prompt)) + 30 <= 200
    assert prompts[1] == turn("user", messages[0]) + turn("assistant", "answer") + turn("user", messages[1]) + OPEN
    last = prompts[-1]
    assert messages[5] in last and messages[4] in last and messages[0] not in last and last.startswith("<|im_start|>user")
    assert "longer than the model's 200 tokens" in capsys.readouterr().err


def test_answers_may_use_what_is_left(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long message gets the room there is, not an error, even if it is less than asked for."""
    said_to(monkeypatch, "y" * 500)
    conversation = Conversation(llm, 200, GREEDY)
    conversation.answer("x" * 230)
    used = len(llm.tokenizer.ids(turn("user", "x" * 230) + OPEN))
    assert 0 < len(llm.tokenizer.ids(conversation.turns[-1]["content"])) == 256 - used < 30


def test_a_message_that_cannot_fit(llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = said_to(monkeypatch)
    conversation = Conversation(llm, 30, GREEDY)
    conversation.answer("short")
    before = list(conversation.turns)
    conversation.answer("x" * 300)
    assert len(prompts) == 1 and conversation.turns == before
    out, err = capsys.readouterr()
    assert out == "answer\n" and "no room in the model's 256 tokens: nothing was sent" in err
    conversation.answer("again")
    assert "short" in prompts[-1] and "again" in prompts[-1]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import litgpt.generate.engine as engine

    drawn = 0
    sample = engine.sample

    def interrupted(*arguments: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn == 6:
            raise KeyboardInterrupt
        return sample(*arguments)

    monkeypatch.setattr(engine, "sample", interrupted)
    conversation = Conversation(llm, 30, GREEDY)
    conversation.answer("one")
    out, err = capsys.readouterr()
    assert "stopped" in err and "5 tokens in" in err
    assert [message["role"] for message in conversation.turns] == ["user", "assistant"]
    assert conversation.turns[1]["content"] == out.strip()
    assert llm.model.blocks[0].attn.kv_cache is None
    conversation.answer("two")
    assert len(conversation.turns) == 4


def test_ctrl_c_at_the_prompt_exits_130(chat: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said_to(monkeypatch)
    lines = iter(["hello", KeyboardInterrupt()])

    def read(prompt: str) -> str:
        line = next(lines)
        if isinstance(line, KeyboardInterrupt):
            raise line
        return str(line)

    monkeypatch.setattr("builtins.input", read)
    code, out, err = chat("")
    assert (code, out) == (130, "answer\n") and err.endswith("Interrupted.\n")


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_exits_130(base: Path) -> None:
    """A message is answered, Ctrl-C at the empty prompt ends the program."""
    leader, follower = pty.openpty()
    words = [sys.executable, "-m", "litgpt", "chat", str(base), "--max_new_tokens", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    process = subprocess.Popen(
        words,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=ROOT,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores SIGINT
    )
    os.close(follower)
    seen = ""

    def wait_for(pattern: str) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while not re.search(pattern, seen, re.DOTALL):
            ready, _, _ = select.select([leader], [], [], max(0.0, end - time.monotonic()))
            assert ready, seen
            seen += os.read(leader, 10_000).decode(errors="replace")

    try:
        wait_for(">> Prompt: ")
        os.write(leader, b"hello\n")
        wait_for(r">> Reply: .*4 tokens in.*>> Prompt: ")
        for _ in range(10):  # one that comes just before readline waits is seen at the next key only
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            if select.select([leader], [], [], 5)[0]:
                break
        wait_for("Interrupted")
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    assert "Talk to tiny; an empty line ends, Ctrl-C stops an answer." in seen and "Traceback" not in seen
