"""General questions with the base model's own answers, trained beside the data, so that the model forgets less of what it knows.

Rehearsal (Robins 1995, doi:10.1080/09540099550039318) with pseudo-items: nothing is taught, the answers are those that the base gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch

from litgpt.data.base import DataModule
from litgpt.generate.engine import decode, until_stop
from litgpt.lora import GPT
from litgpt.prompts import PromptStyle
from litgpt.sample import Sample
from litgpt.tokenizer import Tokenizer

ANSWER_TOKENS = 24
QUESTIONS = (  # about equally long, so that few batches answer them
    "What is a volcano?", "What do bees make?", "Who was Napoleon Bonaparte?", "What is a computer?", "What do cows eat?",
    "What is an atom?", "Name a famous painter.", "Write about the sea.", "Tell me a joke.", "Why is grass green?", "Is a whale a fish?",
    "Explain gravity to me.", "What is democracy for?", "How are clouds made?", "Where is Kenya located?", "Who invented the telephone?",
    "Name three sweet fruits.", "How do planes fly?", "What is good sleep?", "What does CPU mean?", "How old is Rome?",
    "Why do people laugh?", "What are whole numbers?", "How do I relax?",
)  # fmt: skip


@dataclass
class _Pairs(DataModule):
    mask_prompt: bool = True
    val_split_fraction: float | None = 0.0
    pairs: list[dict[str, str]] = field(default_factory=list)

    def records(self) -> tuple[list[dict[str, str]], None]:
        return self.pairs, None


def base_answers(model: GPT, tokenizer: Tokenizer, style: PromptStyle, count: int, progress: Callable[[int, int], Any]) -> list[str]:
    """Return the model's most probable answers to the first `count` questions, of `ANSWER_TOKENS` tokens at most.

    The answer is empty where the question leaves no room for one within the model's `max_seq_length`.
    """
    prompts = [tokenizer.encode(style.apply(question), bos=style.bos) for question in QUESTIONS[:count]]
    answers, stops = [""] * len(prompts), style.stop_tokens(tokenizer)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, group in groupby(by_length, key=lambda i: len(prompts[i])):
        indices = list(group)
        stacked = torch.stack([prompts[i] for i in indices])  # (B, T)
        end = min(stacked.size(1) + ANSWER_TOKENS, model.max_seq_length)
        if end <= stacked.size(1):
            continue
        tokens = torch.cat(list(decode(model, stacked, end, lambda logits: logits.argmax(-1))), dim=1)
        for i, ids in zip(indices, tokens.tolist(), strict=True):
            answers[i] = tokenizer.decode(list(until_stop(ids, stops))).strip()
        progress(sum(map(bool, answers)), len(answers))
    return answers


def replay_samples(answers: list[str], tokenizer: Tokenizer, style: PromptStyle, max_seq_length: int) -> list[Sample]:
    """Return the questions with these answers as training samples; the loss is on the answers."""
    pairs = [{"instruction": q, "output": a} for q, a in zip(QUESTIONS, answers, strict=False) if a]
    return _Pairs(pairs=pairs).splits(tokenizer, style, max_seq_length).train if pairs else []
