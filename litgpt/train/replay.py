"""Samples that are trained alongside the data: general questions, so that the model forgets less, and second questions.

General questions have the base model's own answers: rehearsal (Robins 1995, doi:10.1080/09540099550039318) with pseudo-items. What is
learned of an answer are the base's probabilities, not its tokens alone: distillation (Hinton et al. 2015, arXiv 1503.02531).

A model that was tuned on single questions repeats its last answer when another question follows in the same conversation, unless some were
trained as second questions.
"""

import random
from collections.abc import Sequence
from functools import partial

import torch

from litgpt.data.base import Encoder
from litgpt.data.records import Record
from litgpt.generate.engine import most_probable
from litgpt.model import GPT, evaluating
from litgpt.packing import Batch, pack, take
from litgpt.prompts import PromptStyle, read_reply
from litgpt.sample import Sample
from litgpt.tokenizer import Tokenizer
from litgpt.train.examples import Example

ANSWER_TOKENS = 24
PROBABLE = 32  # tokens at each place of an answer
AT_ONCE = 8  # answers in a forward pass
TRIES = 64  # records among which one that can go before another is looked for
QUESTIONS = (
    "What is a volcano?", "What do bees make?", "Who was Napoleon Bonaparte?", "What is a computer?", "What do cows eat?",
    "What is an atom?", "Name a famous painter.", "Write about the sea.", "Tell me a joke.", "Why is grass green?", "Is a whale a fish?",
    "Explain gravity to me.", "What is democracy for?", "How are clouds made?", "Where is Kenya located?", "Who invented the telephone?",
    "Name three sweet fruits.", "How do planes fly?", "What is good sleep?", "What does CPU mean?", "How old is Rome?",
    "Why do people laugh?", "What are whole numbers?", "How do I relax?",
)  # fmt: skip


def base_answers(model: GPT, tokenizer: Tokenizer, style: PromptStyle, count: int, examples: Sequence[Example] = ()) -> list[str]:
    """Return the model's most probable answers to the first `count` questions, with special tokens, of `ANSWER_TOKENS` tokens at most.

    The answer is empty where the question leaves no room for one within the model's `max_seq_length`. Short examples are answered too.
    """
    prompts = [tokenizer.ids(style.apply(question), bos=style.bos) for question in QUESTIONS[:count]]
    longest = min(2 * max(map(len, prompts), default=0), model.max_seq_length - ANSWER_TOKENS)
    examples = [example for example in examples if len(example.prompt) <= longest]
    replies = most_probable(model, [*prompts, *(each.prompt for each in examples)], ANSWER_TOKENS, style.stop_tokens(tokenizer))
    for example, ids in zip(examples, replies[len(prompts) :], strict=True):
        example.base = ids
    return [tokenizer.decode(ids or [], skip_special_tokens=False).strip() for ids in replies[: len(prompts)]]


def replay_samples(answers: list[str], tokenizer: Tokenizer, style: PromptStyle, max_seq_length: int) -> list[Sample]:
    """Return the questions with these answers as training samples; the loss is on the answers.

    An answer of `ANSWER_TOKENS` tokens was cut off, so its sample has no token that ends it: the model would learn to stop in mid-sentence.
    """
    pairs = zip(QUESTIONS, (read_reply(answer, style, tokenizer) for answer in answers), strict=False)
    records = [Record([{"role": "user", "content": question}, reply], [0.0, 1.0], pair=True) for question, reply in pairs]
    samples = _encoded([record for record in records if record.has_answer], tokenizer, style, max_seq_length, "train.replay")
    for sample in samples:
        end = [i for i, flag in enumerate(sample.loss_mask, 1) if flag][:ANSWER_TOKENS][-1]
        sample.input_ids, sample.loss_mask = sample.input_ids[:end], sample.loss_mask[:end]
    return samples


@torch.no_grad()
def distil(model: GPT, samples: Sequence[Sample], device: torch.device) -> None:
    """Give each place of an answer the `PROBABLE` tokens that are the model's most probable ones there, with shares that add up to 1."""
    with evaluating(model):
        for start in range(0, len(samples), AT_ONCE):
            chosen = samples[start : start + AT_ONCE]
            logits = model.within(partial(_logits, model, pack(chosen, device, 0)))
            top, tokens = logits.float().topk(min(PROBABLE, logits.size(-1)))
            counts = [sample.n_targets for sample in chosen]
            for sample, own, shares in zip(chosen, tokens.cpu().split(counts), top.softmax(-1).cpu().split(counts), strict=True):
                sample.shares = own, shares


def _logits(model: GPT, batch: Batch) -> torch.Tensor:
    """Return (n, V): the logits at the loss positions."""
    pos = model.packed_positions(batch.packing)
    return model.logits(take(model.tail(*model.prefix(batch.ids, pos), pos), batch.at))


def follow_ups(records: Sequence[Record], share: float, seed: int) -> list[Record]:
    """Return conversations that end with a share of the records, each behind one that has another answer.

    Only records of a single turn take part. Of several records with the same answer, that share is taken. A record that finds no other is
    left out.
    """
    draw = random.Random(seed)
    singles = [record for record in records if record.is_single]
    ordered = sorted(draw.sample(singles, len(singles)), key=lambda record: record.reply)
    conversations, count = [], round(share * len(ordered))
    for record in (ordered[i * len(ordered) // count] for i in range(count)):
        *system, question, answer = record.turns
        drawn = draw.sample(singles, min(TRIES, len(singles)))
        earlier = next((other for other in drawn if other.reply != record.reply and other.messages[:-2] == system), None)
        if earlier is not None:
            messages = [*earlier.turns, question, answer]
            conversations.append(Record(messages, [0.0] * (len(messages) - 1) + record.learned[-1:]))
    return conversations


def follow_up_samples(
    records: Sequence[Record], share: float, seed: int, tokenizer: Tokenizer, style: PromptStyle, max_seq_length: int
) -> list[Sample]:
    """Return `follow_ups` as training samples. Templates may write earlier replies in another form, so only the last one has loss."""
    return _encoded(follow_ups(records, share, seed), tokenizer, style, max_seq_length, "train.follow_ups")


def _encoded(records: list[Record], tokenizer: Tokenizer, style: PromptStyle, max_seq_length: int, source: str) -> list[Sample]:
    encoder = Encoder(tokenizer, style, mask_prompt=True, last_turn_only=False, max_length=max_seq_length, source=source)
    return [sample for _, (sample,) in encoder.encode_all(list(enumerate(records, 1)))]
