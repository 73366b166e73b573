"""`litgpt chat` with messages from a pipe."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.__main__ import main
from litgpt.api import LLM
from litgpt.data import JSON
from litgpt.generate.chat import Conversation, talk
from litgpt.generate.engine import Session
from litgpt.generate.sampling import Sampling
from litgpt.prompts import Alpaca, ChatTemplate, save_prompt_style
from litgpt.tokenizer import Tokenizer
from tests.helpers import runs, tiny

ROOT = Path(__file__).parents[2]
GREEDY = Sampling(temperature=0.0)


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


def said_to(monkeypatch: pytest.MonkeyPatch, folder: Path, reply: str = "answer") -> list[str]:
    """Replace the model's answers; the list collects the prompt texts."""
    prompts: list[str] = []
    tokenizer = Tokenizer(folder)

    def answer(self: Session, prompt: list[int], max_new_tokens: int, *settings: Any) -> Iterator[int]:
        prompts.append(tokenizer.decode(prompt, skip_special_tokens=False))
        yield from tokenizer.ids(reply)[:max_new_tokens]

    monkeypatch.setattr(Session, "answer", answer)
    return prompts


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


OPEN = "<|im_start|>assistant\n"


def test_the_second_answer_knows_the_first_turn(chat: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = said_to(monkeypatch, base)
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


def test_an_empty_line_ends(chat: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said_to(monkeypatch, base)
    assert chat("one\n\ntwo\n")[:2] == (0, "answer\n")
    assert chat("")[:2] == (0, "")


def test_multiline(chat: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = said_to(monkeypatch, base)
    code, out, _ = chat("one\n\ntwo\n!submit\nthree\n!submit\n!submit\nnever\n!submit\n", "--multiline", "true")
    assert (code, out) == (0, "answer\n" * 2)
    assert prompts[0] == turn("user", "one\n\ntwo") + OPEN
    assert prompts[1].endswith(turn("user", "three") + OPEN)
    prompts.clear()
    assert chat("at the\nend of input", "--multiline")[0] == 0
    assert prompts == [turn("user", "at the\nend of input") + OPEN]


@pytest.mark.parametrize("template", [tiny.THINKING, tiny.CHANNELS])
def test_reasoning_is_not_part_of_a_reply(
    template: str, chat: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next prompt is what the template makes of the reasoning and the content, and so is a record that is trained on it."""
    style = ChatTemplate(template, eos_token="<|im_end|>")
    asked, reply = {"role": "user", "content": "one"}, {"role": "assistant", "reasoning_content": "why", "content": "answer"}
    written = style.render([asked, reply]).removeprefix(style.render([asked], True)).strip().removesuffix("<|im_end|>")
    prompts = said_to(monkeypatch, tiny.set_template(base, template), written)
    assert chat(f"one\ntwo\n/save {tmp_path / 'talk.jsonl'}\n/save {tmp_path / 'talk.txt'}\n")[0] == 0
    second = {**asked, "content": "two"}
    assert prompts == [style.render([asked], True), style.render([asked, {"role": "assistant", "content": "answer"}, second], True)]
    saved = [asked, reply, second, reply]
    assert json.loads((tmp_path / "talk.jsonl").read_text()) == {"messages": saved}
    assert "assistant: why\n\nanswer\n" in (tmp_path / "talk.txt").read_text()
    samples = JSON(json_path=tmp_path / "talk.jsonl", val_split_fraction=0).splits(Tokenizer(base), style).train
    assert [Tokenizer(base).decode(list(sample.input_ids), False) for sample in samples] == [
        style.render(saved[:end]).rstrip() for end in (2, 4)
    ]


def test_a_style_without_turns(chat: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_prompt_style(Alpaca(), base)
    prompts = said_to(monkeypatch, base)
    code, out, err = chat("one\ntwo\n")
    assert (code, out) == (0, "answer\n" * 2)
    assert prompts == [Alpaca().apply("one"), Alpaca().apply("two")]
    assert "prompt style 'alpaca' has no turns" in err


def test_the_oldest_turns_are_forgotten(llm: LLM, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = said_to(monkeypatch, base)
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
    assert "longer than the model's 200 tokens, so the model no longer sees its beginning (1 exchange)]\n" in capsys.readouterr().err


def test_answers_may_use_what_is_left(llm: LLM, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long message gets the room there is, not an error, even if it is less than asked for."""
    said_to(monkeypatch, base, "y" * 500)
    conversation = Conversation(llm, 200, GREEDY)
    conversation.answer("x" * 230)
    used = len(llm.tokenizer.ids(turn("user", "x" * 230) + OPEN))
    assert 0 < len(llm.tokenizer.ids(conversation.turns[-1]["content"])) == 256 - used < 30


def test_a_message_that_cannot_fit(llm: LLM, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = said_to(monkeypatch, base)
    conversation = Conversation(llm, 30, GREEDY)
    conversation.answer("short")
    before = list(conversation.turns)
    conversation.answer("x" * 300)
    assert len(prompts) == 1 and conversation.turns == before
    out, err = capsys.readouterr()
    assert out == "answer\n" and "not fit into the model's 256 tokens: nothing was sent" in err
    conversation.answer("again")
    assert "short" in prompts[-1] and "again" in prompts[-1]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = 0
    draw = Sampling.draw

    def interrupted(*arguments: Any) -> Any:
        nonlocal drawn
        drawn += 1
        if drawn == 6:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(Sampling, "draw", interrupted)
    conversation = Conversation(llm, 30, GREEDY)
    conversation.answer("one")
    out, err = capsys.readouterr()
    assert "stopped" in err and "5 tokens in" in err
    assert [message["role"] for message in conversation.turns] == ["user", "assistant"]
    assert conversation.turns[1]["content"] == out.strip()
    assert llm.model.blocks[0].attn.kv_cache is None
    conversation.answer("two")
    assert len(conversation.turns) == 4


@pytest.mark.parametrize(
    ("is_terminal", "multiline", "lines", "asked"),
    [
        (True, False, ["hello", "C", "again", "C", "C", "late"], ["hello", "again"]),
        (True, False, ["C", "C", "late"], []),
        (True, True, ["dropped", "C", "one", "!submit", "C", "C", "late"], ["one"]),
        (False, False, ["hello", "C", "late"], ["hello"]),
    ],
)
def test_ctrl_c_at_the_prompt(
    is_terminal: bool, multiline: bool, lines: list[str], asked: list[str], base: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, the first Ctrl-C drops the message and the second ends."""
    said_to(monkeypatch, base)
    keys = iter(lines)

    def read(_: str) -> str:
        if (line := next(keys)) == "C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", type("Input", (io.StringIO,), {"isatty": lambda _: is_terminal})())
    conversation = Conversation(llm, 8, GREEDY)
    with pytest.raises(KeyboardInterrupt):
        talk(conversation, multiline)
    assert [turn["content"] for turn in conversation.turns if turn["role"] == "user"] == asked
    assert list(keys) == ["late"]


def test_ctrl_c_before_an_answer_keeps_the_conversation(
    llm: LLM, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base of a fully tuned model takes seconds to load."""
    said_to(monkeypatch, base)

    def load(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("litgpt.generate.chat._base_of_run", load)
    conversation = Conversation(llm, 8, GREEDY, folder=base)
    for is_terminal in (True, False):
        monkeypatch.setattr(sys, "stdin", type("Input", (io.StringIO,), {"isatty": lambda _, answer=is_terminal: answer})())
        lines = iter(["hello", "/base", "again", ""])
        monkeypatch.setattr("builtins.input", lambda _, lines=lines: next(lines))
        with nullcontext() if is_terminal else pytest.raises(KeyboardInterrupt):
            talk(conversation, False)
    assert "[stopped]" in capsys.readouterr().err
    assert [turn["content"] for turn in conversation.turns] == ["hello", "answer", "again", "answer", "hello", "answer"]


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_exits_130(base: Path) -> None:
    """A message is answered, Ctrl-C twice at the empty prompt ends the program."""
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
        for pattern in ("nothing was sent.*>> Prompt: ", "\nInterrupted"):  # the latter on a line of its own
            for _ in range(10):  # one that comes just before readline waits is seen at the next key only
                time.sleep(0.5)
                process.send_signal(signal.SIGINT)
                if select.select([leader], [], [], 5)[0]:
                    break
            wait_for(pattern)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    assert f"{base}: tiny, " in seen and "Traceback" not in seen
    assert "Talk to tiny; an empty line ends, Ctrl-C stops an answer, /help lists commands." in seen


def test_commands(chat: Any, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prompts = said_to(monkeypatch, base)
    lines = ["one", "/reset", "/system Be brief.", "two", "/save talk.jsonl", "/save talk.txt", "/system -", "three", "/nosuch", "/usr/bin"]
    monkeypatch.chdir(tmp_path)
    code, out, err = chat("\n".join([*lines, "/help", "/quit", "never"]), "--sys_prompt", "Be kind.")
    assert code == 0 and out.startswith("answer\n" * 4) and "/reset" in out
    two = turn("system", "Be brief.") + turn("user", "two")
    assert prompts[0] == turn("system", "Be kind.") + turn("user", "one") + OPEN
    assert prompts[1] == two + OPEN
    assert prompts[2] == turn("user", "two") + turn("assistant", "answer") + turn("user", "three") + OPEN
    assert len(prompts) == 4 and turn("user", "/usr/bin") in prompts[3]
    assert "there is no command /nosuch" in err and "system text: Be brief." in err
    roles = {"system": "Be brief.", "user": "two", "assistant": "answer"}
    messages = [{"role": role, "content": content} for role, content in roles.items()]
    assert json.loads((tmp_path / "talk.jsonl").read_text()) == {"messages": messages}
    assert (tmp_path / "talk.txt").read_text() == "system: Be brief.\n\nuser: two\n\nassistant: answer\n\n"
    assert [record.messages for record in JSON(json_path=tmp_path / "talk.jsonl").records()[0]] == [messages]


def test_a_conversation_is_saved_to_files_only(chat: Any, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said_to(monkeypatch, base)
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.jsonl")
    Path("folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        code, _, err = chat("\n".join(["hi", *(f"/save {name}" for name in ("pipe.jsonl", "folder", "socket", "/dev/null", "no/file"))]))
    assert code == 0 and re.findall(r"\[(\S+): (.*)\]", err) == [
        ("pipe.jsonl", "it is a pipe or a device, not a file: put a file there"),
        ("folder", "Is a directory"),
        ("socket", "it is a link, a pipe or a device, not a file: put a file there"),
        ("/dev/null", "it is a pipe or a device, not a file: put a file there"),
        ("no/file", "No such file or directory"),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"base", "folder", "pipe.jsonl", "socket"}


def test_a_saved_conversation_is_a_line_of_its_own(chat: Any, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said_to(monkeypatch, base)
    (tmp_path / "own.jsonl").write_text('{"instruction": "a", "output": "b"}')  # as an editor leaves it, without an end of line
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "own.jsonl")
    assert chat(f"hi\n/save {tmp_path}/link.jsonl\n")[0] == 0
    assert [record.reply for record in JSON(json_path=tmp_path / "own.jsonl").records()[0]] == ["b", "answer"]


def test_commands_with_nothing_to_do(chat: Any) -> None:
    code, out, err = chat("/base\n/save\n/save x.jsonl\n/system\n/quit\n")
    assert (code, out) == (0, "")
    for words in ("is not a tuned model", "/save FILE", "nothing was said yet", "no system text"):
        assert words in err


def test_a_command_is_one_line_of_a_multiline_message(chat: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = said_to(monkeypatch, base)
    assert chat("one\n/help\n!submit\n/reset\ntwo\n!submit\n", "--multiline")[0] == 0
    assert prompts == [turn("user", "one\n/help") + OPEN, turn("user", "two") + OPEN]


@pytest.mark.parametrize("settings", [{"lora_r": 4, "lora_query": True, "lora_mlp": True}, {"lora_r": 4, "skip2lora_enabled": True}])
def test_base_beside_tuned(base: Path, tmp_path: Path, settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The base's answer is that of the base's own folder, and the tuned model's is its own."""
    built = tiny.move_adapters(tiny.tiny(**tiny.SPEAKING, **settings))
    folder = tiny.write_adapter(tmp_path / "adapter", base, built, **settings)
    tuned, plain = (LLM.load(where, precision="32-true", device="cpu") for where in (folder, base))
    conversation = Conversation(tuned, 8, GREEDY, folder=folder)
    conversation.take("/base hello")
    shown = " ".join(re.findall(r"[^\s│|]+", capsys.readouterr().out))
    expected = [model.generate("hello", max_new_tokens=8, temperature=0.0) for model in (tuned, plain)]
    assert expected[0] != expected[1] and conversation.turns[1]["content"] == expected[0].strip()
    base_model = conversation.base.batch.model
    idx = tiny.ids(1, 9)
    assert torch.equal(base_model(idx), plain.model(idx)) and not torch.equal(tuned.model(idx), plain.model(idx))
    weights = {parameter.data_ptr() for parameter in tuned.model.parameters()}
    assert all(parameter.data_ptr() in weights for parameter in base_model.parameters())
    assert "base" in shown and "tuned" in shown


def test_base_of_a_model_whose_weights_are_all_tuned(base: Path, tmp_path: Path, write_tiny_tokenizer: Any) -> None:
    full = tiny.write_base(tmp_path / "full", write_tiny_tokenizer, seed=5)
    (full / "hyperparameters.yaml").write_text(f"checkpoint_dir: {base}\n")
    tuned, plain = (LLM.load(where, precision="32-true", device="cpu") for where in (full, base))
    conversation = Conversation(tuned, 8, GREEDY, folder=full)
    idx = tiny.ids(1, 9)
    assert torch.equal(conversation.base.batch.model(idx), plain.model(idx))


@pytest.mark.parametrize("words", ["finetune_lora --modules_to_save [lm_head]", "finetune_adapter", "finetune_adapter_v2"])
def test_base_of_a_model_that_changes_weights_of_the_base(base: Path, tmp_path: Path, words: str) -> None:
    command, *options = words.split()
    data = runs.write_data(tmp_path / "sums.json", 3)
    final = runs.finetune(command, base, data, tmp_path / "run", *options, max_steps=1, optimizer__lr=0.1).final
    tuned, plain = (LLM.load(where, precision="bf16-true", device="cpu") for where in (final, base))
    base_model, idx = Conversation(tuned, 8, GREEDY, folder=final).base.batch.model, tiny.ids(1, 9)
    assert torch.equal(base_model(idx), plain.model(idx)) and not torch.equal(tuned.model(idx), plain.model(idx))
