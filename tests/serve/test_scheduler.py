"""Requests that wait, run, end, go away and fail."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from litgpt.generate.sampling import Sampling
from litgpt.prompts import ChatTemplate
from litgpt.serve.models import Models, Served
from litgpt.serve.scheduler import Job, Piece, Scheduler
from tests.helpers import tiny
from tests.serve.conftest import Folders


@pytest.fixture(scope="module")
def model(folders: Folders) -> Served:
    model = Models(folders.base, {}, precision="32-true", device="cpu")["tiny"]
    assert expected(model) != expected(model, 5)  # before the scheduler's thread uses the model
    return model


@pytest.fixture
def scheduler(model: Served) -> Iterator[Scheduler]:
    running = Scheduler(max_batch=2, max_queue=2)
    yield running
    running.close()
    assert not model.batch.rows or [model.batch.remove(row) for row in list(model.batch.rows)]


class Waiting:
    """A request's side of a job."""

    def __init__(self, model: Served, new: int = 20, **settings: Any) -> None:
        self.pieces: list[Piece] = []
        self.done, self.first = threading.Event(), threading.Event()
        sampling = settings.pop("sampling", Sampling(temperature=0.0))
        self.job = Job(model, model.llm.tokenizer.ids("hello there"), new, sampling, self.take, **settings)

    def take(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.first.set()
        if piece.reason:
            self.done.set()

    def answer(self) -> tuple[str, str | None]:
        assert self.done.wait(20)
        return "".join(piece.text for piece in self.pieces), self.pieces[-1].reason


@cache
def expected(model: Served, new: int = 20) -> str:
    return model.llm.tokenizer.decode(list(model.llm.complete("hello there", new, temperature=0.0)))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_answers_and_their_ends(model: Served, scheduler: Scheduler) -> None:
    text = expected(model)
    stop = next(char for char in text if char.isascii() and char.isprintable())
    plain, stopped = Waiting(model), Waiting(model, stops=[stop])
    scheduler.submit([plain.job, stopped.job])
    assert plain.answer() == (text, "length") and plain.pieces[-1].count == 20 and len(plain.pieces) > 3
    assert stopped.answer() == (text.partition(stop)[0], "stop")
    until(lambda: not model.batch.rows)


def test_logprobs_are_the_models_own(model: Served, scheduler: Scheduler) -> None:
    """Before temperature and penalties; the drawn token's and the largest."""
    waiting = Waiting(model, 3, top_logprobs=2, sampling=Sampling(temperature=5.0, top_k=3, presence_penalty=2.0), seed=1)
    scheduler.submit([waiting.job])
    waiting.answer()
    tokens = [token for piece in waiting.pieces for token in piece.tokens]
    row = waiting.job.row
    import torch

    logits = model.llm.model(torch.tensor([row.tokens]))[0, row.start - 1 : -1].log_softmax(-1)
    drawn = row.tokens[row.start :]
    assert [token["logprob"] for token in tokens] == pytest.approx([float(p[i]) for p, i in zip(logits, drawn, strict=True)], abs=1e-4)
    assert [token["top"][0][1] for token in tokens] == pytest.approx(logits.max(-1).values.tolist(), abs=1e-4)
    assert all(len(token["top"]) == 2 for token in tokens)


@pytest.mark.parametrize("template", [tiny.THINKING, tiny.CHANNELS])
def test_reasoning_is_apart_in_a_chat(template: str, model: Served) -> None:
    tokenizer, asked = model.llm.tokenizer, [{"role": "user", "content": "Hi"}]
    style, plain = ChatTemplate(template, eos_token="<|im_end|>"), model.llm.prompt_style
    reply = {"role": "assistant", "content": "Hello,\n\nyou.", "reasoning_content": "They greet.\n\nSo I do."}
    written = style.render([*asked, reply]).removeprefix(style.render(asked, add_generation_prompt=True))
    ids = tokenizer.ids(written.partition("<|im_end|>")[0], bos=False)

    def pieces(**how: Any) -> list[Piece]:
        waiting = Waiting(model, len(ids), **how)
        for number in ids:
            waiting.job.advance(torch.nn.functional.one_hot(torch.tensor(number), model.llm.config.V).float())
        return waiting.pieces

    try:
        model.llm.prompt_style = style
        chat, raw = pieces(is_chat=True), pieces()
    finally:
        model.llm.prompt_style = plain
    assert "".join(piece.reasoning for piece in chat) == reply["reasoning_content"] and len(chat) > 5
    assert "".join(piece.text for piece in chat) == reply["content"] and chat[-1].reason == "length"
    assert "".join(piece.text for piece in raw) == tokenizer.decode(ids) and not any(piece.reasoning for piece in raw)


def test_a_full_queue_refuses(model: Served, scheduler: Scheduler) -> None:
    running = [Waiting(model, 200) for _ in range(4)]
    scheduler.submit([waiting.job for waiting in running])
    with pytest.raises(queue.Full):
        scheduler.submit([Waiting(model).job])
    scheduler.cancel([waiting.job for waiting in running])
    until(lambda: not scheduler.running and not scheduler.waiting)
    last = Waiting(model)
    scheduler.submit([last.job])
    assert last.answer()[0] == expected(model)


def test_a_request_that_goes_away_frees_its_place(model: Served, scheduler: Scheduler) -> None:
    long, other, third = Waiting(model, 200), Waiting(model, 200), Waiting(model, 5)
    scheduler.submit([long.job, other.job])
    assert long.first.wait(10)
    scheduler.submit([third.job])
    scheduler.cancel([long.job])
    assert third.answer()[0] == expected(model, 5) and not other.done.is_set() and not long.done.is_set()
    scheduler.cancel([other.job])
    until(lambda: not model.batch.rows)
    assert model.batch.caches == []  # its place is free


def test_time_limits(model: Served, scheduler: Scheduler) -> None:
    first = Waiting(model, 200, deadline=time.monotonic() + 0.1)
    others = [Waiting(model, 200), Waiting(model, 5, deadline=time.monotonic() - 1)]
    scheduler.submit([first.job, *[waiting.job for waiting in others]])
    assert first.answer()[1] == "length" and first.pieces[-1].count < 200
    assert others[1].answer() == ("", "late")
    scheduler.cancel([others[0].job])


def test_a_failed_step_ends_its_answers_and_no_others(
    model: Served, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("hello there, in memory")

    with monkeypatch.context() as patch:
        patch.setattr(model.batch, "hidden", broken)
        failed = [Waiting(model), Waiting(model)]
        scheduler.submit([waiting.job for waiting in failed])
        assert [waiting.answer()[1] for waiting in failed] == ["error", "error"]
    again = Waiting(model)
    scheduler.submit([again.job])
    assert again.answer()[0] == expected(model)
    messages = capfd.readouterr().err
    assert "an answer failed: RuntimeError at" in messages and "hello" not in messages


def test_a_step_that_runs_out_of_memory_leaves_the_server_working(
    model: Served, scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of its answers is kept: the copies would need memory, and the thread ended."""
    waiting = Waiting(model, 200)

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    scheduler.submit([waiting.job])
    assert waiting.first.wait(20)
    with monkeypatch.context() as patch:
        patch.setattr(model.batch, "_keep", full)
        patch.setattr(model.batch, "_run", full)
        assert waiting.answer()[1] == "error"
    again = Waiting(model)
    scheduler.submit([again.job])
    assert again.answer() == (expected(model), "length")
