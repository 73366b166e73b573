"""Records whose replies are shown while a model learns them."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import takewhile

import torch

from litgpt.args import EvalArgs
from litgpt.data.base import learned_turns, render
from litgpt.data.records import Record
from litgpt.errors import UserError
from litgpt.generate import drafts
from litgpt.generate.engine import most_probable
from litgpt.generate.sampling import Sampling, until_stop
from litgpt.lora import GPT
from litgpt.model import evaluating
from litgpt.prompts import PromptStyle
from litgpt.sharding import is_sharded
from litgpt.tokenizer import Tokenizer

DRAFTED = 16  # tokens of the record's own reply that are checked in one pass


@dataclass
class Example:
    """A question, and its record's own reply, which the model may learn to give."""

    question: str  # as it is shown
    prompt: list[int]
    text: list[int]  # the prompt and the record's reply
    is_text: bool = False  # running text that is continued
    base: list[int] | None = None  # the base model's answer, if it was generated in a batch with others
    answers: list[tuple[int, str]] = field(default_factory=list)  # (step, answer), in the order of the steps


def examples_of(evaluation: EvalArgs, seed: int, records: Sequence[Record], style: PromptStyle, tokenizer: Tokenizer) -> list[Example]:
    """Return the validation records that `eval.evaluate_example` names. Raises UserError for one that does not exist."""
    which = evaluation.evaluate_example
    if not records:  # the data are tokens
        return []
    if which == "random":
        which = int(torch.randint(len(records), (), generator=torch.Generator().manual_seed(seed)))
    examples = []
    for index in which if isinstance(which, list) else [0 if which == "first" else int(which)]:
        if index >= len(records):
            raise UserError(f"eval.evaluate_example is {index}: the validation set has {len(records)} samples, counted from 0")
        record = records[index]
        rendered = render(record, style, tokenizer)
        first = next(iter(learned_turns(record, style)), 0)  # learned reply of a conversation
        asked = record.messages[first - 1]["content"] if first else ""
        question = f"{record.question}\n{record.input}".rstrip("\n") if record.pair else str(asked or rendered.prompt)
        prompt, text = (tokenizer.ids(part, bos=None if record.is_text else style.bos) for part in (rendered.prompt, rendered.text))
        examples.append(Example(question, prompt, text, record.is_text))
    return examples


def answer(
    model: GPT, example: Example, most: int, stop_tokens: Sequence[Sequence[int]], is_stopped: Callable[[], bool]
) -> list[int] | None:
    """Return the most probable answer, of `most` tokens at most; None if the prompt fills `model.max_seq_length`.

    The record's own reply serves as the draft, so a reply that the model has learned takes a few passes, not one per token.
    """
    prompt, most = example.prompt, min(most, model.max_seq_length - len(example.prompt))
    if is_sharded(model) or model.config.rope_kind == "longrope" or most < 1:
        return most_probable(model, [prompt], most, stop_tokens, lambda ids: is_stopped())[0]
    generator = torch.Generator(next(model.parameters()).device)  # leaves the run's random state unchanged
    draws = Sampling(temperature=0.0)
    drafted = drafts.generate("prompt_lookup", model, prompt, len(prompt) + most, draws, DRAFTED, generator, text=example.text)
    with evaluating(model), closing(drafted):
        return list(takewhile(lambda _: not is_stopped(), until_stop(drafted, stop_tokens)))
