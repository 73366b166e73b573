"""Look before you train: `litgpt data` shows a file of records, `litgpt prompts` the prompt styles."""

import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Optional, cast

from litgpt.checkpoint import HOME, require_tokenizer
from litgpt.config import Config
from litgpt.convert.resolve import open_checkpoint
from litgpt.data.base import CUT_AWAY, SHOWN_KEYS, DataModule, Encoder, Rewritten, render
from litgpt.data.json_data import JSON
from litgpt.data.records import Record, read_record
from litgpt.errors import UserError
from litgpt.files import expand_path
from litgpt.prompts import CHAT, STYLES, PromptStyle, misfit, resolve_prompt_style
from litgpt.streams import safe, unescaped
from litgpt.text import counted
from litgpt.tokenizer import Tokenizer
from litgpt.train.recipe import CONTINUES, Look, advice
from litgpt.values import checked

if TYPE_CHECKING:
    from rich.console import Console

SPREAD, LONGEST = 4_000, 1_000  # records of a large file that are tokenised: evenly spread ones, and the longest
BINS, BAR = 8, 40  # of a histogram
SHOWN = 3  # examples
QUOTED = 60  # characters of a text
IGNORED = re.compile(r"[\s.,;:!?¡¿'\"“”‘’„«»()\[\]…。，！？、]+")  # what near-duplicates differ in, besides upper and lower case


@checked
def examine(
    file: Path,
    *,
    checkpoint_dir: Optional[Path] = None,
    prompt_style: Optional[str] = None,
    max_seq_length: Optional[int] = None,
    mask_prompt: bool = True,
    record: int = 1,
) -> None:
    """Show what is in a file of records: their kinds and lengths, repetitions and contradictions, and how a model would read them.

    Args:
        file: The file, the folder with a train and a val file, or the data set.
        checkpoint_dir: The model to be tuned: lengths are counted in its tokens, and a record is shown as the model would read it.
        prompt_style: Name of a prompt style, or "chat" for the checkpoint's own template. Default: the checkpoint's.
        max_seq_length: Samples are cut to this many tokens. Default: what the model can read.
        mask_prompt: Train on answers only, not on questions. Conversations are always trained on the assistant's turns only.
        record: Number of the record to show.
    """
    if (DataModule.reader_of(str(file)) or ("",))[0] == "TextFiles":
        command = f"`litgpt finetune MODEL --data {file}` trains it in blocks"
        raise UserError(f"{file} is running text, without records to look at: {command}. {CONTINUES.rstrip('.')}")
    data = JSON(json_path=Path(file), mask_prompt=mask_prompt, prompt_style=prompt_style)
    train, val = data.records()
    if not 1 <= record <= len(train):
        raise UserError(f"record is {record}: {data.source} has records 1 to {len(train)}")
    validation = "" if val is None else f", and {len(val):,} for validation"
    lines = [f"{data.source}: {counted(len(train), 'record')}{validation}", *kinds(train), *repetitions(train, val or [])]
    look = Look.at(train, val)
    if unread := Counter(key for one in train for key in one.unread if not (look.is_labelled and key == "label")):
        lines.append(f"  keys not read: {', '.join(f'{key[:QUOTED]} ({count:,})' for key, count in unread.most_common(SHOWN_KEYS))}")
    if checkpoint_dir is None:
        lines += ["", *histogram([one.characters for one in train], "characters")]
        print("\n".join(lines))
    else:
        folder = require_tokenizer(open_checkpoint(checkpoint_dir))
        tokenizer, block_size = Tokenizer(folder), Config.from_checkpoint(folder).block_size
        style, limit = resolve_prompt_style(prompt_style, folder, tokenizer), min(max_seq_length or block_size, block_size)
        encoder = Encoder(tokenizer, style, mask_prompt, False, None, data.source)
        print("\n".join([*lines, "", *in_tokens(train, encoder, limit)]))
        print(f"\nRecord {record} in the prompt style {style.name!r}; what is learned is {_green()}:")
        show_record(train[record - 1], style, tokenizer, mask_prompt)
    settings = advice(data, look, checkpoint_dir)
    command = shlex.join(["litgpt", "finetune", str(checkpoint_dir or "MODEL"), "--data", data.source])
    print(f"\n{command}, without other options:\n{settings}")


def kinds(records: Sequence[Record]) -> list[str]:
    """Return a line for each kind of record."""
    pairs, texts = ([one for one in records if getattr(one, name)] for name in ("pair", "is_text"))
    replies = [sum(message["role"] == "assistant" for message in one.messages) for one in records]
    turns = sorted(count for one, count in zip(records, replies, strict=True) if not (one.pair or one.is_text))
    lines = [f"  {counted(len(texts), 'text')}, learned as a whole"] if texts else []
    if pairs:
        inputs = sum(bool(one.input) for one in pairs)
        lines.append(f"  {counted(len(pairs), 'question')} with an answer" + (f", {inputs:,} of them with an input" if inputs else ""))
    if turns:
        span = f"{turns[0]} to {turns[-1]}" if turns[0] < turns[-1] else f"{turns[0]}"
        lines.append(f"  {counted(len(turns), 'conversation')} of {span} {'reply' if turns[-1] == 1 else 'replies'}")
    for text, count in (
        ("with a system text", sum(one.messages[0]["role"] == "system" for one in records)),
        ("with a rejected answer as well", sum(one.rejected is not None for one in records)),
        (
            "with an equal rejected answer: dropped by dpo and orpo",
            sum(one.rejected is not None and one.rejected.messages == one.messages for one in records),
        ),
        ("marked as wrong: learned, except by the objectives kto, critic and verifiable", sum(one.is_wrong for one in records)),
        ("with tools", sum(one.tools is not None for one in records)),
        ("with a reply that is read, not learned", sum(count > len(one.replies) for one, count in zip(records, replies, strict=True))),
        ("with an empty answer: dropped", sum(any(one.learned) and not one.has_answer for one in records)),
        ("with the weight 0: dropped", sum(not any(one.learned) for one in records)),
    ):
        if count:
            lines.append(f"  {count:,} {text}")
    return lines


def repetitions(train: Sequence[Record], val: Sequence[Record]) -> list[str]:
    """Return lines about records that repeat or contradict another one."""
    first: dict[Any, int] = {}
    plain: dict[Any, int] = {}
    answers: dict[Any, dict[str, int]] = {}
    exact, near = list[tuple[int, int]](), list[tuple[int, int]]()
    for number, one in enumerate(train, 1):
        words = tuple(
            (message["role"], normalised(str(message["content"]))) for message in (*one.messages, {"role": "", "content": one.input})
        )
        question, answer = (*words[:-2], words[-1]), words[-2][1]
        if (same := first.setdefault(_whole(one), number)) != number:
            exact.append((number, same))
        elif (same := plain.setdefault((words, _rating(one)), number)) != number:
            near.append((number, same))
        if one.messages[-1]["content"] and not one.is_text and _rating(one) == (None,) * 3:
            answers.setdefault(question, {}).setdefault(answer, number)
    shared = [(number, first[whole]) for number, one in enumerate(val, 1) if (whole := _whole(one)) in first]
    differing = [tuple(found.values()) for found in answers.values() if len(found) > 1]
    lines = []
    for text, pairs in (
        ("equal to an earlier one", exact),
        ("equal to an earlier one but for case, spaces or punctuation", near),
        ("for validation and in the training data as well", shared),
    ):
        if pairs:
            examples = ", ".join(f"{number} (as {same})" for number, same in pairs[:SHOWN])
            lines.append(f"  {counted(len(pairs), 'record')} {text}: {examples}{', ...' if len(pairs) > SHOWN else ''}")
    if differing:
        lines.append(f"  {counted(len(differing), 'question')} with different answers:")
        lines += [f"    {_contradiction(train, numbers)}" for numbers in differing[:SHOWN]] + ["    ..."] * (len(differing) > SHOWN)
    return lines


def normalised(text: str) -> str:
    """Return a text without what near-duplicates differ in."""
    return IGNORED.sub(" ", text.casefold()).strip() or text


def _whole(record: Record) -> Any:
    texts = ((message["role"], str(message["content"]), str(message.get("tool_calls", ""))) for message in record.messages)
    return (record.input, _rating(record), *texts)


def _rating(record: Record) -> Any:
    """Return what tells records with the same answer apart: its rating, or the answer that it is compared with."""
    return record.label, record.reward, record.rejected and _whole(record.rejected)


def _contradiction(records: Sequence[Record], numbers: Sequence[int]) -> str:
    asked = next((one["content"] for one in reversed(records[numbers[0] - 1].messages[:-1]) if one["role"] == "user"), "")
    answers = " / ".join(f"{_quoted(records[number - 1].messages[-1]['content'])} ({number})" for number in numbers[:SHOWN])
    return f"{_quoted(asked)}: {answers}"


def _quoted(text: str) -> str:
    flat = " ".join(str(text).split())
    return repr(flat if len(flat) <= QUOTED else f"{flat[:QUOTED]}...")


def in_tokens(records: Sequence[Record], encoder: Encoder, limit: int) -> list[str]:
    """Return lines about the records' lengths in tokens, where a model reads `limit`. For a large file a sample of records is measured."""
    spread = range(0, len(records), -(-len(records) // SPREAD))
    longest = sorted(range(len(records)), key=lambda i: -records[i].characters)[:LONGEST]
    encoded = {i: [sample for _, unit in encoder.encode_all([(i + 1, records[i])]) for sample in unit] for i in {*spread, *longest}}
    samples = {i: own for i, own in encoded.items() if own}  # several of a conversation that is trained reply by reply
    lengths = {i: max(len(sample.input_ids) for sample in own) for i, own in samples.items()}
    if not lengths:
        raise UserError(
            f"{encoder.source}: no record has an answer. Fill in the key of the answer (`output`), or let a turn have the weight 1"
        )
    chosen = [i for i in spread if i in samples]
    measured = [sample for i in chosen for sample in samples[i]]
    learned, total = sum(sample.n_targets for sample in measured), sum(len(sample.input_ids) for sample in measured)
    scale = len(records) / len(spread)
    about = "about " if scale > 1 else ""
    lines = histogram([lengths[i] for i in chosen], "tokens", scale, max(lengths.values()))
    lines.append(f"  {about}{total * scale:,.0f} tokens, {100 * learned / max(total, 1):.0f} % of them learned")
    cut = [i for i, length in lengths.items() if length > limit]
    lost = sum(not any(any(sample.loss_mask[:limit]) for sample in samples[i]) for i in cut)
    if cut:
        known = "" if len(lengths) == len(records) or len(cut) < LONGEST // 2 else "at least "
        dropped = f", and {lost:,} of them dropped: {CUT_AWAY}" if lost else ""
        lines.append(f"  {known}{counted(len(cut), 'record')} longer than {limit:,} tokens: cut{dropped}")
    encoder.ignored.pop("not read", None)  # counted for all records already
    return lines + [f"  {remark}" for remark in (*encoder.remarks(), misfit(encoder.style, encoder.tokenizer)) if remark]


def histogram(lengths: Sequence[int], unit: str, scale: float = 1.0, longest: Optional[int] = None) -> list[str]:
    """Return lines that show how lengths are distributed; each stands for `scale` records."""
    ordered = sorted(lengths)
    half, most, last = ordered[len(ordered) // 2], ordered[len(ordered) * 9 // 10], longest or ordered[-1]
    lines = [f"Lengths in {unit}: half have up to {half:,}, nine of ten up to {most:,}, the longest {last:,}"]
    usual = ordered[(len(ordered) - 1) * 19 // 20]
    step = next(nice for n in range(12) for nice in (10**n, 2 * 10**n, 5 * 10**n) if nice * BINS >= usual - ordered[0])
    low, high = ordered[0] // step, usual // step
    counts = Counter(min(length // step, high + 1) for length in ordered)
    names = [f"{step * k:,} to {step * (k + 1) - 1:,}" if step > 1 else f"{k:,}" for k in range(low, high + 1)]
    if counts[high + 1]:
        names.append(f"{step * (high + 1):,} and more")
    for k, name in enumerate(names, low):
        bar = "█" * round(BAR * counts[k] / max(counts.values())) or ("▏" if counts[k] else "")
        lines.append(f"  {name:>{max(map(len, names))}}  {bar} {round(counts[k] * scale):,}")
    return lines


def show_record(record: Record, style: PromptStyle, tokenizer: Tokenizer, mask_prompt: bool = True) -> None:
    """Print a record as the model reads it. What is learned is green on a terminal, elsewhere between marks."""
    from rich.text import Text

    try:
        text, spans = render(record, style, tokenizer)
    except Rewritten:
        for part in record.parts:
            show_record(part, style, tokenizer)
        return
    if record.pair and not mask_prompt:
        spans = [(0, len(text))]
    console = _console()
    opening, closing = ("⟦", "⟧") if console.color_system is None else ("", "")
    shown, end = Text(), 0
    for start, stop in spans:
        shown.append(safe(text[end:start]), "dim")
        shown.append(f"{opening}{safe(text[start:stop])}{closing}", "green")
        end = stop
    shown.append(safe(text[end:]), "dim")
    console.print(shown)


def _console() -> "Console":
    from rich.console import Console

    return Console(file=unescaped(sys.stdout), soft_wrap=True)


def _green() -> str:
    return "between ⟦ and ⟧" if _console().color_system is None else "green"


ANY_TOKENIZER = cast(Tokenizer, SimpleNamespace(token_to_id=lambda token: 0))  # has every token
QUESTION: dict[str, Any] = {"instruction": "What is the capital of France?", "output": "Paris."}
CONVERSATION: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Italy?"},
        {"role": "assistant", "content": "Rome."},
    ]
}


def prompts(name: Optional[str] = None) -> None:
    """Show the prompt styles, each with a question and its answer.

    Args:
        name: A style, shown with an input and a conversation too if it has a form for them, or the folder of a model. Default: all.
    """
    if name is None:
        print(f"Prompt styles, for data.prompt_style and prompt_style.yaml. What a model learns to answer is {_green()}.")
        print("`litgpt prompts NAME` shows more of one, `litgpt prompts FOLDER` that of a model.")
        for each, style in sorted(STYLES.items()):
            print(f"\n--- {each}")
            show_record(read_record(QUESTION), style(), ANY_TOKENIZER)
        return
    chosen, tokenizer, title = _style_of(name)
    print(f"{title}. What a model learns to answer is {_green()}.")
    examples = {"a question": QUESTION}
    if getattr(chosen, "text_with_input", ""):
        examples["a question with an input"] = QUESTION | {"input": "Think of Europe."}
    if hasattr(chosen, "render"):
        examples["a conversation"] = CONVERSATION
    for kind, example in examples.items():
        print(f"\n--- {kind}")
        try:
            show_record(read_record(example), chosen, tokenizer)
        except UserError as error:
            print(f"not possible: {error}")


def _style_of(name: str) -> tuple[PromptStyle, Tokenizer, str]:
    """Return the style of this name, or that of a model's folder, with a tokenizer and a title."""
    if name in CHAT:
        raise UserError(f"{name!r} is the checkpoint's own template: name the model's folder to see it")
    if name not in STYLES and (expand_path(name).exists() or (HOME / name).exists()):
        folder = require_tokenizer(open_checkpoint(expand_path(name)))
        own = Tokenizer(folder)
        style = resolve_prompt_style(None, folder, own)
        kind = "the model's own chat template" if style.name == "chat" else f"the prompt style {style.name!r}"
        return style, own, f"{name}: {kind}"
    return PromptStyle.from_name(name), ANY_TOKENIZER, f"The prompt style {name!r}"
