"""The thread that computes. Requests join the running batch between two steps, and leave it when they are complete or nobody waits."""

import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch

from litgpt.generate.engine import Row
from litgpt.generate.sampling import Sampling, StopFilter
from litgpt.prompts import ReplyReader
from litgpt.serve.models import Served
from litgpt.tokenizer import StreamDecoder


@dataclass
class Piece:
    """A part of an answer. The last one has a reason: "stop", "length", "late" (it never ran) or "error"."""

    text: str = ""
    reasoning: str = ""  # of a chat
    tokens: list[dict[str, Any]] = field(default_factory=list)  # with logprobs: token, at, logprob, top: [(token, logprob), ...]
    reason: str | None = None
    count: int = 0  # tokens of the answer so far


@dataclass(eq=False)
class Job:
    """One answer that a request waits for. `send` is called with each piece, by the scheduler's thread."""

    model: Served
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    send: Callable[[Piece], None]
    _: KW_ONLY
    seed: int | None = None
    stops: Iterable[str] = ()
    top_logprobs: int | None = None
    is_chat: bool = False
    deadline: float = float("inf")

    def __post_init__(self) -> None:
        llm = self.model.llm
        self.row = Row(list(self.prompt), self.sampling, llm.generator(self.seed), self.model.head)
        self.ids = StopFilter(llm.prompt_style.stop_tokens(llm.tokenizer))
        self.chars = StopFilter(self.stops)
        reader = ReplyReader(llm.prompt_style, llm.tokenizer)
        self.reader = reader if self.is_chat and reader.has_marks else None
        self.decoder = StreamDecoder(llm.tokenizer, skip_special_tokens=self.reader is None)
        self.tokens: list[dict[str, Any]] = []  # logprobs to be sent with the next piece
        self.length = 0  # characters of all tokens with logprobs
        self.cancelled = False

    def advance(self, logits: torch.Tensor) -> bool:
        """Draw the next token and send the text that is complete with it. Return True at the end of the answer."""
        token = self.row.draw(logits)
        if self.top_logprobs is not None:
            self.tokens.append(self._logprobs(logits, token))
        count = len(self.row.tokens) - self.row.start
        free = self.ids.push(token)
        text = "".join(self.chars.free(self.decoder.push(free) if free else ""))
        stopped = self.ids.stopped or self.chars.stopped
        full = count == self.max_new_tokens or time.monotonic() > self.deadline
        if (stopped or full) and not self.chars.stopped:
            text += "".join(self.chars.free(self.decoder.push(self.ids.held) + self.decoder.rest()))
            text += "" if self.chars.stopped else "".join(self.chars.held)
        reason = "stop" if stopped or self.chars.stopped else "length" if full else None
        reasoning, text = ("", text) if self.reader is None else self.reader.push(text, is_last=reason is not None)
        if text or reasoning or reason:
            self.send(Piece(text, reasoning, self.tokens, reason, count))
            self.tokens = []
        return reason is not None

    def _logprobs(self, logits: torch.Tensor, token: int) -> dict[str, Any]:
        """Return the token's log-probability under the model itself, before temperature and penalties, and the largest ones."""
        values = logits.float().log_softmax(-1)
        tokenizer = self.model.llm.tokenizer
        top = values.topk(min(self.top_logprobs or 0, values.numel()))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        named = [(tokenizer.decode([i], skip_special_tokens=False), value) for i, value in pairs]
        text, at = tokenizer.decode([token], skip_special_tokens=False), self.length
        self.length += len(text)
        return {"token": text, "at": at, "logprob": float(values[token]), "top": named}


class Scheduler:
    """At most `max_batch` answers run at a time, and `max_queue` wait."""

    def __init__(self, max_batch: int = 16, max_queue: int = 64) -> None:
        self.max_batch, self.max_queue, self.most = max_batch, max_queue, max_batch + max_queue
        self.waiting: deque[Job] = deque()
        self.running: dict[Row, Job] = {}
        self.changed = threading.Condition()
        self.closed = False
        self.thread = threading.Thread(target=self._run, name="litgpt-serve", daemon=True)
        self.thread.start()

    def submit(self, jobs: list[Job]) -> None:
        """Queue jobs. Raises `queue.Full` if there is no room for all of them."""
        with self.changed:
            free = self.max_batch - len(self.running) + self.max_queue - len(self.waiting)
            if self.closed or len(jobs) > free:
                raise queue.Full
            self.waiting.extend(jobs)
            self.changed.notify()

    def cancel(self, jobs: list[Job]) -> None:
        """Remove jobs that nobody waits for any more; complete ones are ignored."""
        with self.changed:
            for job in jobs:
                job.cancelled = True
            self.changed.notify()

    def close(self) -> None:
        """End the thread. Answers that run are dropped."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def _run(self) -> None:
        while True:
            with self.changed:
                while not self.closed and not self.waiting and not self.running:
                    self.changed.wait()
                if self.closed:
                    return
                self._admit()
            for batch in {id(job.model.batch): job.model.batch for job in self.running.values()}.values():
                rows = list(batch.rows)
                try:
                    for row, logits in batch.step():
                        self._advance(self.running[row], logits)
                except Exception as error:
                    self._fail([self.running[row] for row in rows if row in self.running], error)

    def _admit(self) -> None:
        """Remove cancelled and late jobs, and start as many of the others as there is room for."""
        for job in [job for job in self.running.values() if job.cancelled]:
            self._end(job)
        late = [job for job in self.waiting if job.cancelled or time.monotonic() > job.deadline]
        for job in late:
            self.waiting.remove(job)
            if not job.cancelled:
                job.send(Piece(reason="late"))
        while self.waiting and len(self.running) < self.max_batch:
            job = self.waiting.popleft()
            self.running[job.row] = job
            job.model.batch.add(job.row)

    def _advance(self, job: Job, logits: torch.Tensor) -> None:
        try:
            if job.cancelled or job.advance(logits):
                self._end(job)
        except Exception as error:  # for example non-finite logits
            self._fail([job], error)

    def _fail(self, jobs: list[Job], error: Exception) -> None:
        """End jobs; the server goes on. Standard error gets the place, not the message, which may hold a part of a request."""
        place = traceback.extract_tb(error.__traceback__)[-1]
        print(f"an answer failed: {type(error).__name__} at {place.filename}:{place.lineno}", file=sys.stderr, flush=True)
        for job in jobs:
            job.row.computed = 0  # none of its keys and values are kept: that takes memory, and they may be broken
        for job in jobs:
            self._end(job)
            job.send(Piece(reason="error"))

    def _end(self, job: Job) -> None:
        if job.row in job.model.batch.rows:
            job.model.batch.remove(job.row)
        self.running.pop(job.row, None)
