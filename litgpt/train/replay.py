"""General questions with the base model's own answers, trained alongside the data, so that the model forgets less.

Rehearsal (Robins 1995, doi:10.1080/09540099550039318) with pseudo-items: nothing new is taught, as the answers are the base's own.
"""

from collections.abc import Sequence

from litgpt.data.base import Encoder
from litgpt.generate.engine import most_probable
from litgpt.lora import GPT
from litgpt.prompts import PromptStyle
from litgpt.sample import Sample
from litgpt.tokenizer import Tokenizer
from litgpt.train.examples import Example

ANSWER_TOKENS = 24
QUESTIONS = (
    "What is a volcano?", "What do bees make?", "Who was Napoleon Bonaparte?", "What is a computer?", "What do cows eat?",
    "What is an atom?", "Name a famous painter.", "Write about the sea.", "Tell me a joke.", "Why is grass green?", "Is a whale a fish?",
    "Explain gravity to me.", "What is democracy for?", "How are clouds made?", "Where is Kenya located?", "Who invented the telephone?",
    "Name three sweet fruits.", "How do planes fly?", "What is good sleep?", "What does CPU mean?", "How old is Rome?",
    "Why do people laugh?", "What are whole numbers?", "How do I relax?",
)  # fmt: skip


def base_answers(model: GPT, tokenizer: Tokenizer, style: PromptStyle, count: int, examples: Sequence[Example] = ()) -> list[str]:
    """Return the model's most probable answers to the first `count` questions, of `ANSWER_TOKENS` tokens at most.

    The answer is empty where the question leaves no room for one within the model's `max_seq_length`. Short examples are answered too.
    """
    prompts = [tokenizer.ids(style.apply(question), bos=style.bos) for question in QUESTIONS[:count]]
    longest = min(2 * max(map(len, prompts), default=0), model.max_seq_length - ANSWER_TOKENS)
    examples = [example for example in examples if len(example.prompt) <= longest]
    replies = most_probable(model, [*prompts, *(each.prompt for each in examples)], ANSWER_TOKENS, style.stop_tokens(tokenizer))
    for example, ids in zip(examples, replies[len(prompts) :], strict=True):
        example.base = ids
    return [tokenizer.decode(ids or []).strip() for ids in replies[: len(prompts)]]


def replay_samples(answers: list[str], tokenizer: Tokenizer, style: PromptStyle, max_seq_length: int) -> list[Sample]:
    """Return the questions with these answers as training samples; the loss is on the answers.

    An answer of `ANSWER_TOKENS` tokens was cut off, so its sample has no token that ends it: the model would learn to stop in mid-sentence.
    """
    pairs = [{"instruction": q, "output": a} for q, a in zip(QUESTIONS, answers, strict=False) if a]
    encoder = Encoder(tokenizer, style, mask_prompt=True, last_turn_only=False, max_length=max_seq_length, source="train.replay")
    samples = [sample for _, (sample,) in encoder.encode_all(list(enumerate(pairs, 1)))]
    for sample in samples:
        end = [i for i, flag in enumerate(sample.loss_mask, 1) if flag][:ANSWER_TOKENS][-1]
        sample.input_ids, sample.loss_mask = sample.input_ids[:end], sample.loss_mask[:end]
    return samples
