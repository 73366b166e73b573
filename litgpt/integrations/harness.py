"""Models of this package for the LM Evaluation Harness (lm_eval): base models, adapters and quantised models alike."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from litgpt.api import LLM
from litgpt.errors import UserError, missing_package
from litgpt.files import parse_yaml, read_text
from litgpt.generate.engine import Session
from litgpt.generate.sampling import Sampling, until_stop_text
from litgpt.streams import drawing
from litgpt.text import first_line

MOST_NEW_TOKENS = 256  # of an answer, if the task does not say how many

try:
    from lm_eval import evaluator, utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager as TaskManager
except ImportError as error:
    raise missing_package("evaluate --tasks", error.name, "eval") from None

Scored = tuple[float, bool]  # log-likelihood of a continuation, and whether it is the most probable one


class HarnessModel(TemplateLM):
    """An `LLM` as the harness calls it."""

    def __init__(self, llm: LLM, batch_size: int = 1) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size, self.max_length = llm.model, llm.tokenizer, batch_size, llm.model.max_seq_length
        self._device = llm.device

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_id is None:
            raise UserError("the model's tokenizer has no end-of-sequence token, which the harness needs")
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context: BOS, else EOS."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.tokenizer.ids(string, bos=add_special_tokens)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Scored]:
        """Return the score of each continuation, the longest sequences first; those of a batch are padded on the right.

        Contexts are cut at their beginning. Raises UserError for a continuation that is longer than what the model reads.
        """
        if (longest := max((len(continuation) for _, _, continuation in requests), default=0)) > self.max_length:
            raise UserError(f"a continuation of a task has {longest} tokens, but the model reads {self.max_length}: leave the task out")
        results: list[Scored | None] = [None] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            sequences = [(requests[i][1] + requests[i][2])[-self.max_length - 1 :] for i in batch]
            inputs = [torch.tensor(ids[:-1]) for ids in sequences]
            idx = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(self._device)  # (B, T)
            pos = self.model.positions(idx)
            hidden = self.model.tail(*self.model.prefix(idx, pos), pos)  # (B, T, d)
            for row, i, ids in zip(hidden, batch, sequences, strict=True):
                targets = torch.tensor(requests[i][2], device=self._device)
                logits = self.model.logits(row[len(ids) - 1 - len(targets) : len(ids) - 1]).float()  # (n, V)
                chosen = logits.log_softmax(-1).gather(1, targets[:, None])
                results[i] = (float(chosen.sum()), bool((logits.argmax(-1) == targets).all()))
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
        return [result for result in results if result is not None]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows of the model's length."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = utils.get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            parts = [(None, *utils.make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each context, which ends before the first of its stop strings."""
        return [self._answer(*request.args) for request in requests]

    def _answer(self, context: str, settings: dict[str, Any]) -> str:
        until, count = settings.get("until") or [], int(settings.get("max_gen_toks", MOST_NEW_TOKENS))
        stops = [until] if isinstance(until, str) else list(until)
        if count >= self.max_length:
            raise UserError(f"a task asks for {count} new tokens, but the model has room for {self.max_length} with the prompt")
        ids = self.tok_encode(context)[-(self.max_length - count) :]
        sampling = Sampling(float(settings.get("temperature") or 0.0) if settings.get("do_sample") else 0.0)
        tokens = Session(self.model).answer(ids, count, sampling, [[i] for i in sorted(self.tokenizer.stop_ids)])
        text = "".join(until_stop_text(self.tokenizer.decode_stream(tokens), stops))
        self.cache_hook.add_partial("generate_until", (context, settings), text)
        return text


def run_tasks(
    llm: LLM, tasks: str, num_fewshot: int | None, batch_size: int, limit: float | None, seed: int, access_token: str | None = None
) -> tuple[dict[str, Any], str]:
    """Return the harness's results for tasks, separated by commas, and its table of them. A name that ends in .yaml is a task's file."""
    if access_token:
        os.environ.setdefault("HF_TOKEN", access_token)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    files = {name: Path(name).absolute() for name in names if name.endswith((".yaml", ".yml"))}
    for name in files:
        _require_task(name)
    manager = TaskManager()
    if unknown := [name for name in names if name not in files and name not in manager.all_tasks]:
        raise UserError(f"the harness has no task {', '.join(unknown)}: `litgpt evaluate list` prints those it has")
    seeds = {"random_seed": seed, "numpy_random_seed": seed, "torch_random_seed": seed}
    share = int(limit) if limit is not None and limit >= 1 else limit
    model = HarnessModel(llm, batch_size)
    if llm.model.switch is not None:
        invocation = llm.tokenizer.decode(llm.model.switch.invocation, skip_special_tokens=False)
        print(f"answer-only LoRA acts behind {invocation!r}: choices of questions without it get the base model's scores", file=sys.stderr)
    wanted = [str(files.get(name, name)) for name in names]
    try:
        with drawing():
            results = evaluator.simple_evaluate(
                model=model, tasks=wanted, num_fewshot=num_fewshot, batch_size=batch_size, limit=share, task_manager=manager, **seeds
            )
    except OSError as error:
        raise UserError(f"the data of a task cannot be loaded: {first_line(error)}") from None
    table = utils.make_table(results) + (f"\n{utils.make_table(results, 'groups')}" if results.get("groups") else "")
    return results, table


def _require_task(file: str) -> None:
    """Raise UserError if a file is not that of a task. The harness itself imports the functions that it names."""
    content = parse_yaml(read_text(file).replace("!function ", ""), file)
    if not isinstance(content, dict) or not isinstance(content.get("task"), str):
        raise UserError(f"{file} names no task: a line `task: NAME` is needed")
