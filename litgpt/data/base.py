"""Records to token ids with a loss mask, for all data modules.

A record (`litgpt.data.records`) becomes one text and the spans of characters that the model learns. The text is encoded once; a token
carries loss if its last character lies in a span.
"""

import importlib
import math
import random
import re
from abc import ABC
from array import array
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple

from litgpt.data.records import Message, Record, has_text, read_record
from litgpt.data.sources import SUFFIXES, is_dataset, is_text
from litgpt.errors import UserError
from litgpt.files import expand_path
from litgpt.prompts import REASONING, ChatTemplate, PromptStyle, fitting_style, misfit
from litgpt.sample import Sample
from litgpt.text import counted
from litgpt.tokenizer import Tokenizer

UNSET_SHARE = 0.05  # default share of the samples held out for validation, as in LitGPT


@dataclass(slots=True)
class Splits:
    """Tokenised data, a report about it, and the records of `val` and of `train`."""

    train: list[Sample]
    val: list[Sample]
    report: str
    examples: list[Record]
    records: list[Record] = field(default_factory=list)  # of data with questions and answers


Unit = tuple[int, list[Record]]  # the number of a record in its file, and conversations that are trained together
Units = Callable[[Sequence[tuple[int, Record]]], list[Unit]]


def alone(records: Sequence[tuple[int, Record]]) -> list[Unit]:
    """Return one unit per record, with the chosen one of two answers."""
    return [(number, [replace(one, unread=(*one.unread, "rejected")) if one.rejected else one]) for number, one in records]


class Rendered(NamedTuple):
    """A record as text; the model learns `text[start:end]` for each span."""

    text: str
    spans: list[tuple[int, int]]

    @property
    def prompt(self) -> str:
        """The text before the first span; for running text its beginning, up to the end of a word, which a model continues."""
        most = min(CONTINUED, len(self.text) // 2) or 1
        words = re.match(r"(?s).+(?=\s)", self.text[: most + 1])
        return self.text[: self.spans[0][0] or (words.end() if words else most)]


@dataclass(init=False, kw_only=True)  # LitGPT's own data modules call `super().__init__()` after their fields are set
class DataModule(ABC):  # noqa: B024 - the base class of classes that settings name
    """A source of records. Subclasses provide `records`; splitting, prompt styles, tokens and masks are the same for all."""

    mask_prompt: bool = False
    """Train on the answer only, not on the prompt. Conversations are always trained on the assistant's turns only."""
    val_split_fraction: float | None = 0.1
    """Share of the samples held out for validation, below 1. With 0 all samples are trained on, and some of them also validated."""
    prompt_style: str | None = None
    """Name of a prompt style, or "chat" for the checkpoint's own template. Default: the style the checkpoint was trained with."""
    ignore_index: int = -100
    """Accepted for LitGPT's YAML files; no effect, since masks are stored separately from ids."""
    last_turn_only: bool = False
    """Train on the last reply of a conversation only."""
    strict: bool = False
    """Reject keys that are not read, or that the prompt style leaves out, instead of listing them in the data line."""
    seed: int = 42
    """Seed of the split."""
    num_workers: int = 4
    """Accepted for LitGPT's YAML files; no effect, since samples are tokenised before training starts."""

    path_key: ClassVar[str] = ""  # the setting that names the data, if one does
    fallback_style: ClassVar[str] = "alpaca"  # prompt style of a model that has none of its own

    @staticmethod
    def reader_of(name: str) -> tuple[str, str] | None:
        """Return the class that reads the file or folder `name`, and its key for the path; None if `name` names a class."""
        path = expand_path(name)
        if is_text(path):
            return "TextFiles", "train_data_path"
        is_path = path.exists() or name.endswith(SUFFIXES) or is_dataset(path)
        return ("JSON", "json_path") if is_path else None

    @property
    def source(self) -> str:
        """Name of this data in messages."""
        return str(getattr(self, self.path_key)) if self.path_key else type(self).__name__

    def connect(self, tokenizer: Tokenizer | None = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        """Turn this into a LightningDataModule with loaders of padded batches (`litgpt.data.lightning`), as LitGPT's data modules are."""
        from litgpt.data.lightning import connect

        connect(self, tokenizer, batch_size, max_seq_length)

    def prepare_data(self) -> None:  # noqa: B027 - most sources need nothing
        """Download missing files. Call it from one process only."""

    def is_ready(self) -> bool:
        """Return True if `prepare_data` has nothing to do."""
        return True

    def records(self) -> tuple[Sequence[Any], Sequence[Any] | None]:
        """Return training and validation records; None for the latter lets `splits` hold out a share of the former.

        A record is a `Record`, or a mapping in a form that `litgpt.data.records` reads. Raises UserError unless a subclass overrides this.
        """
        raise UserError(f"{self.source} has no records: its loaders yield tokens, which serve only for training and the loss")

    @property
    def gives_tokens(self) -> bool:
        """Return True for a class of LitGPT's form, which has loaders instead of records."""
        return type(self).records is DataModule.records

    def notes(self) -> list[str]:
        """Return remarks about the last call of `records`, for the report."""
        return []

    def splits(self, tokenizer: Tokenizer, prompt_style: PromptStyle, max_seq_length: int | None = None, units: Units = alone) -> Splits:
        """Tokenise all records. Samples longer than `max_seq_length` are cut; a unit with a sample without loss tokens is dropped.

        `units`: which conversations belong together (`litgpt.objectives.base`); their samples follow each other.

        Raises UserError if a split has no sample, or a record does not fit the prompt style.
        """
        if max_seq_length is not None and max_seq_length < 2:
            raise UserError(f"train.max_seq_length is {max_seq_length}: a sample needs at least 2 tokens")
        if self.gives_tokens:
            from litgpt.data.lightning import loaded

            own_train, own_val = loaded(self, tokenizer, max_seq_length)
            return Splits(own_train, own_val, f"{len(own_train):,} train and {len(own_val):,} validation samples", [])
        train, val = self.records()
        if not train:
            raise UserError(f"{self.source} holds no records")
        notes = self.notes()
        if val is None and self.val_split_fraction is None:
            notes.append(
                f"{100 * UNSET_SHARE:g} % of them for validation, as neither data.val_split_fraction nor a validation file is given"
            )
        numbered = list(enumerate(train, 1))
        parts = self._split(numbered) if val is None else (numbered, list(enumerate(val, 1)))
        encoder = Encoder(tokenizer, prompt_style, self.mask_prompt, self.last_turn_only, max_seq_length, self.source)
        encoded = [encoder.encode_all(part, units) for part in parts]
        if repeats := val is None and self.val_split_fraction == 0:
            step = math.ceil(len(encoded[0]) / MOST_REPEATED) or 1
            if len(encoded[0]) > len(numbered):  # good and bad answers alternate: an odd step takes both
                step |= 1
            encoded[1] = encoded[0][::step]
        for name, samples, part in zip(("training", "validation"), encoded, parts, strict=True):
            if not samples:
                raise UserError(self._nothing_left(name, len(part), encoder))
        if self.strict and encoder.ignored:
            raise UserError(f"{self.source}: {', '.join(encoder.remarks())}. Remove these keys, or leave data.strict out")
        train_samples, val_samples = ([sample for _, unit in part for sample in unit] for part in encoded)
        report = _report(encoded, encoder, notes, repeats)
        records, examples = ([record for record, _ in part] for part in encoded)
        return Splits(train_samples, val_samples, report, examples, records)

    def held_out_share(self) -> float:
        """Return the share of the records held out for validation. Raises UserError unless it is from 0 to below 1."""
        share = UNSET_SHARE if self.val_split_fraction is None else self.val_split_fraction
        if not 0 <= share < 1:
            raise UserError(f"data.val_split_fraction is {share}: a number from 0 to below 1 is needed (0.1 keeps a tenth for validation)")
        return share

    def _split(self, records: list[tuple[int, Any]]) -> tuple[list[tuple[int, Any]], list[tuple[int, Any]]]:
        fraction = self.held_out_share()
        if fraction == 0:
            return records, []
        if len(records) < 2:
            raise UserError(
                f"{self.source} holds one record: at least two are needed, one of them for validation, or data.val_split_fraction 0"
            )
        order = list(range(len(records)))
        random.Random(self.seed).shuffle(order)
        held_out = min(max(round(fraction * len(records)), 1), len(records) - 1)
        return [records[i] for i in order[held_out:]], [records[i] for i in order[:held_out]]

    def _nothing_left(self, split: str, count: int, encoder: "Encoder") -> str:
        if not count:
            return f"{self.source}: the {split} set is empty: add records to it"
        start = f"{self.source}: none of the {count:,} {split} records is left: "
        if 2 * encoder.dropped[EQUAL] > encoder.dropped.total():
            return f"{start}in each, 'chosen' and 'rejected' are equal" + (f" in {encoder.max_length:,} tokens" if encoder.cut else "")
        if 2 * encoder.dropped[CUT_AWAY] <= encoder.dropped.total():
            remedy = "Fill in the key of the answer (`output`), or let a turn have the weight 1"
            return f"{start}their answers are empty or have the weight 0. {remedy}"
        return (
            f"{start}their prompts alone fill max_seq_length ({encoder.max_length}), so no answer token is left. "
            "Raise train.max_seq_length, or shorten the prompts"
        )


CONTINUED = 200  # most characters of running text that a model continues at a validation
MOST_REPEATED = 30  # most training samples that are validated if none are held out
EMPTY = "empty answer"
WEIGHTLESS = "weight 0"
CUT_AWAY = "no answer token left"
EQUAL = "chosen and rejected are equal"
SHOWN_KEYS = 12  # in a remark


@dataclass
class Encoder:
    """Encodes records, and counts those that are cut or dropped and the keys that are ignored."""

    tokenizer: Tokenizer
    style: PromptStyle
    mask_prompt: bool
    last_turn_only: bool
    max_length: int | None
    source: str
    cut: int = 0
    apart: int = 0
    by_last_reply: int = 0
    imitated: int = 0  # wrong answers
    dropped: Counter[str] = field(default_factory=Counter)
    ignored: dict[str, Counter[str]] = field(default_factory=dict)
    """reason -> keys"""

    def __post_init__(self) -> None:
        self.stops = {ids[0] for ids in self.style.stop_tokens(self.tokenizer) if len(ids) == 1}

    def encode_all(self, records: Sequence[tuple[int, Any]], units: Units = alone) -> list[tuple[Record, list[Sample]]]:
        """Return the first conversation of each unit, and the unit's samples.

        A conversation whose replies the prompt style rewrites once others follow is trained as several, one for each reply. Conversations
        that are compared count by their last replies then.
        """
        read = [(n, entry if isinstance(entry, Record) else self._at(n, read_record, entry)) for n, entry in records]
        wrong = {number for number, record in read if record.is_wrong}
        encoded, waiting = list[tuple[Record, list[Sample]]](), deque(units(read))
        while waiting:
            number, conversations = waiting.popleft()
            try:
                samples = list(takewhile(bool, (self._at(number, self.encode, each) for each in conversations)))  # counted once if dropped
            except Rewritten:
                parts = [each.parts or [each] for each in conversations]
                if len(parts) > 1 or self.last_turn_only:
                    self.by_last_reply += len(parts) > 1
                    waiting.appendleft((number, [own[-1] for own in parts]))
                else:
                    self.apart += len(parts[0]) > 1
                    waiting.extendleft((number, [part]) for part in reversed(parts[0]))
                continue
            if len(samples) < len(conversations):
                continue
            if conversations[0].label != conversations[-1].label and samples[0].input_ids == samples[-1].input_ids:  # chosen and rejected
                self.dropped[EQUAL] += 1
                continue
            self.imitated += number in wrong and (conversations[0].label, conversations[0].reward) == (None, None)
            encoded.append((conversations[0], samples))
        return encoded

    def _at(self, number: int, work: Callable[[Any], Any], value: Any) -> Any:
        """Return `work(value)`; a UserError names the record."""
        try:
            return work(value)
        except UserError as error:
            raise type(error)(f"{self.source}, record {number}: {error}") from None

    def encode(self, record: Record) -> Sample | None:
        unwritten = unwritten_keys(record, self.style)
        replies = [i for i, message in enumerate(record.messages) if message["role"] == "assistant"]
        chosen = replies[-1:] if self.last_turn_only else replies
        written = [i for i in chosen if has_text(record.messages[i], unwritten)]
        learned = [i for i in written if array("f", [record.learned[i]])[0]]
        text, spans = render(record, self.style, self.tokenizer, learned) if learned else Rendered("", [])
        not_written = f"not written by the prompt style {_name(self.style)}"
        self._ignore("not read", record.unread)
        self._ignore(not_written, sorted(unwritten))
        if not learned:
            self.dropped[WEIGHTLESS if written else EMPTY] += 1
            return None
        left_out = {message["role"] for message in record.messages[: learned[-1]] if _is_left_out(message, text)}
        self._ignore(not_written, [f"{role} messages" for role in sorted(left_out)])
        ids, offsets = encode_divided(text, spans, self.tokenizer)
        values = [record.learned[i] for i in learned]
        if self.mask_prompt or not record.pair or (record.label, record.reward, record.token_weights) != (None, None, None):
            weights = loss_weights(offsets, spans, values)
        else:
            weights = array("f", values * len(ids))
        # A reply ends with a token that stops generation: the template's own marker, else EOS.
        if self.tokenizer.eos_id is not None and (not ids or ids[-1] not in self.stops):
            ids.append(self.tokenizer.eos_id)
            weights.append(values[-1])
        if record.token_weights is not None:
            places = [i for i, weight in enumerate(weights) if weight]
            if len(places) - len(record.token_weights) not in (0, 1):
                raise UserError(
                    f"'token_weights' has {len(record.token_weights):,} numbers, the reply {len(places):,} tokens: give one per token; "
                    "the one for the token that ends the reply may be left out"
                )
            for i, weight in zip(places, record.token_weights, strict=False):
                weights[i] *= weight
        first = self.tokenizer.first_ids if self.style.bos is None or record.is_text else []
        if ids[: len(first)] != first:
            ids = [*first, *ids]
            weights = array("f", [0] * len(first)) + weights
        weights[0] = 0
        if not any(weights):  # weights too small for fp32 are 0
            self.dropped[WEIGHTLESS] += 1
            return None
        too_long = self.max_length is not None and len(ids) > self.max_length
        if too_long:
            ids, weights = ids[: self.max_length], weights[: self.max_length]
        mask = bytearray(map(bool, weights))
        if not any(mask):
            self.dropped[CUT_AWAY] += 1
            return None
        self.cut += too_long
        plain = set(values) == {1} and record.token_weights is None
        return Sample(array("i", ids), mask, None if plain else weights, label=record.label is not False, reward=record.reward)

    def _ignore(self, reason: str, keys: Collection[str]) -> None:
        if keys:
            self.ignored.setdefault(reason, Counter()).update(keys)

    def remarks(self) -> list[str]:
        """Return remarks about conversations that are trained reply by reply, and about ignored keys with the numbers of their records."""
        why = f"as the prompt style {_name(self.style)} rewrites earlier replies"
        remarks = [f"{counted(self.apart, 'conversation')} trained reply by reply, {why}"] if self.apart else []
        remarks += [f"{counted(self.by_last_reply, 'comparison')} of last replies alone, {why}"] if self.by_last_reply else []
        remarks += [f"{counted(self.imitated, 'answer')} marked as wrong but learned like the others"] if self.imitated else []
        for reason, counts in self.ignored.items():
            shown = [f"{key[:60]} ({count:,})" for key, count in counts.most_common(SHOWN_KEYS)]
            more = f" and {len(counts) - SHOWN_KEYS:,} more" if len(counts) > SHOWN_KEYS else ""
            remarks.append(f"keys {reason}: {', '.join(shown)}{more}")
        return remarks


class Rewritten(UserError):
    """A prompt style writes a reply differently once later messages follow: it is not the text that the model would read and write."""


def unwritten_keys(record: Record, style: PromptStyle) -> set[str]:
    """Return the keys of a record that the prompt style leaves out of its text."""
    keys = {key for message in record.messages for key in message} - {"role", "content"} | ({"tools"} if record.tools else set())
    return {key for key in keys if not (isinstance(style, ChatTemplate) and style.reads(key))}


def _is_left_out(message: Message, text: str) -> bool:
    """Return True if the longest word of a system or tool message is not in the text, whatever form the style gives to the others."""
    words = re.findall(r"\w+", message["content"]) if message["role"] in ("system", "tool") else []
    return bool(words) and max(words, key=len) not in text


def _name(style: PromptStyle) -> str:
    return repr(style.name or type(style).__name__)


def render(record: Record, style: PromptStyle, tokenizer: Tokenizer, learned: Sequence[int] | None = None) -> Rendered:
    """Return the text of a record up to the end of its last learned reply, and the spans of its learned replies.

    A span starts where the prompt ends and includes the marker that ends the turn, but not the white space that follows. Styles other than
    chat templates omit the marker if the tokenizer does not have it as a token.
    """
    if record.is_text:
        return Rendered(record.reply, [(0, len(record.reply))])
    if learned is None:
        learned = learned_turns(record, style)
    if isinstance(style, ChatTemplate) or (hasattr(style, "render") and not record.pair):
        return _render_turns(style, record, learned, tokenizer)
    system, prompt, answer = _one_turn(record.messages, style)
    head = style.apply(prompt, sys_prompt=system, input=record.input)
    end = style.end_of_turn if style.end_of_turn and tokenizer.token_to_id(style.end_of_turn) is not None else ""
    text = head + style.gap + answer + end
    return Rendered(text, [(len(head), len(text))] if learned else [])


def learned_turns(record: Record, style: PromptStyle) -> list[int]:
    """Return the indices of the replies to learn of which the prompt style writes something."""
    unwritten = unwritten_keys(record, style)
    return [i for i, weight in enumerate(record.learned) if weight and has_text(record.messages[i], unwritten)]


def question_of(record: Record, style: PromptStyle, tokenizer: Tokenizer) -> str:
    """Return the text before a record's last reply; of running text its beginning."""
    end = record.last + 1  # templates may write a reply differently once others follow
    return render(replace(record, messages=record.messages[:end], learned=record.learned[:end]), style, tokenizer, [record.last]).prompt


def _render_turns(style: Any, record: Record, learned: Sequence[int], tokenizer: Tokenizer) -> Rendered:
    """Find each reply between the starts of two messages, which the built-in styles report.

    The text of a reply must not depend on later messages. To check this, the conversation is rendered up to the reply: for the first
    reply of each kind, the last one, those whose text changes, and for all of them if the starts are not reported.
    """
    messages, options = record.turns, {"tools": record.tools} if record.tools else {}
    is_own, is_own_template = type(style).__module__ == "litgpt.prompts", isinstance(style, ChatTemplate)
    full, starts = style.render_marked(messages, **options) if is_own else (style.render(messages, add_generation_prompt=False), [])
    starts = [*starts, len(full)] if starts else []
    written = {"content", *REASONING} - unwritten_keys(record, style)
    opening: str | None = None  # text between a message's start and the reply
    kinds: set[Any] = set()
    spans = []
    for i in learned:
        is_marked = bool(starts) and 0 <= starts[i] <= starts[i + 1]
        turn = full[starts[i] : starts[i + 1]].rstrip() if is_marked else ""
        kind = (*sorted(messages[i]), *(messages[j]["role"] if j < len(messages) else "" for j in (i - 1, i + 1)))
        is_new = kind not in kinds or i == learned[-1] or opening is None or not is_marked
        is_verbatim = all(str(messages[i].get(key) or "").strip() in turn for key in written)
        if not is_new and turn.startswith(opening or "") and is_verbatim:
            spans.append((starts[i] + len(opening or ""), starts[i] + len(turn)))
            continue
        kinds.add(kind)
        first = messages[0]["content"].strip() if i == 0 and is_own_template and len(messages[0]) == 2 else ""
        if first and first in turn:  # a template need not render a conversation without messages
            head = full[: starts[0] + turn.rindex(first)]
        else:
            head = style.render(messages[:i], add_generation_prompt=True, **options)
        following = full if i + 1 == len(messages) else style.render(messages[: i + 1], add_generation_prompt=False, **options)
        end = len(following.rstrip())
        if not full.startswith(following[:end]):  # Phi-3's template ends a conversation with EOS
            end = len(following.rstrip().removesuffix(style.special_tokens["eos_token"] if is_own_template else "").rstrip())
            if following[:end].endswith(messages[i]["content"].strip() or "\0"):  # gpt-oss's writes another token in the place of EOS
                end = len(following)
        remedy = f"Choose another prompt style, for example {fitting_style(tokenizer)!r}"
        if not following.startswith(head):
            extra = head[len([*takewhile(lambda two: two[0] == two[1], zip(head, following, strict=False))]) :]
            raise UserError(
                f"the prompt style {style.name!r} opens replies with {extra[:60]!r}, but writes message {i + 1} without it, so the prompt "
                f"that the model would answer is not the one it would be trained on. {remedy}"
            )
        if not full.startswith(following[:end]):
            raise Rewritten(f"the prompt style {style.name!r} writes message {i + 1} differently once later messages follow. {remedy}")
        opening = head[starts[i] :] if is_marked and starts[i] <= len(head) and starts[i] + len(turn) == end else None
        spans.append((len(head), end))
    return Rendered(full[: spans[-1][1]] if spans else full, spans)


def _one_turn(messages: list[Message], style: PromptStyle) -> tuple[str | None, str, str]:
    turns = [(message["role"], message["content"]) for message in messages]
    system = turns.pop(0)[1] if turns[0][0] == "system" else None
    if [role for role, _ in turns] != ["user", "assistant"]:
        raise UserError(
            f"the prompt style {_name(style)} has no form for conversations of several turns: choose "
            'data.prompt_style "chat" (the checkpoint\'s own template), "chatml" or "llama3"'
        )
    return system, turns[0][1], turns[1][1]


STOP = itemgetter(1)  # of a token's range of characters


def encode_divided(text: str, spans: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of a text, and each token's range of characters.

    A token that begins in a prompt and ends in its answer is divided, so that the prompt has the ids that the model reads when it answers.
    It is left whole where the parts alone give other text (SentencePiece's blank before a word).
    """
    ids, offsets = tokenizer.ids_with_offsets(text)
    firsts = [(start, bisect_right(offsets, start, key=STOP)) for start, _ in spans]
    cuts = [0, *(start for start, i in firsts if i < len(ids) and offsets[i][0] < start), len(text)]
    if len(cuts) == 2:
        return ids, offsets
    parts = [(start, *tokenizer.ids_with_offsets(text[start:end])) for start, end in pairwise(cuts)]
    divided = [token for _, own, _ in parts for token in own]
    if tokenizer.decode(divided, skip_special_tokens=False) != text:
        return ids, offsets
    return divided, [(start + first, start + last) for start, _, ranges in parts for first, last in ranges]


def loss_weights(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]], values: Sequence[float]) -> "array[float]":
    """Return the value of a span for each token whose last character lies in it, 0 for the others.

    The model has to write a token that begins in the prompt and ends in the answer, so only the last character counts.
    """
    weights = array("f", bytes(4 * len(offsets)))
    for (start, end), value in zip(spans, values, strict=True):
        first, last = (bisect_right(offsets, place, key=STOP) for place in (start, end))
        weights[first:last] = array("f", [value]) * (last - first)
    return weights


def _report(encoded: Sequence[Sequence[tuple[Record, list[Sample]]]], encoder: Encoder, notes: list[str], repeats: bool) -> str:
    lengths = [len(sample.input_ids) for part in encoded for _, unit in part for sample in unit]
    parts = [
        f"{counted(len(encoded[0]), 'train sample')}, {len(encoded[1]):,} of them validated again"
        if repeats
        else f"{len(encoded[0]):,} train and {len(encoded[1]):,} validation samples",
        f"{sum(lengths) / len(lengths):,.0f} tokens on average (longest {max(lengths):,})",
    ]
    weights = [weight for part in encoded for record, _ in part for weight in record.learned if weight]
    if set(weights) != {1}:
        parts.append(f"weights from {min(weights):g} to {max(weights):g}")
    if encoder.cut:
        parts.append(f"{encoder.cut:,} cut to {encoder.max_length:,}")
    parts += [f"{count:,} dropped: {reason}" for reason, count in sorted(encoder.dropped.items())]
    return ", ".join(parts + notes + encoder.remarks() + [remark for remark in (misfit(encoder.style, encoder.tokenizer),) if remark])


def __getattr__(name: str) -> Any:
    if name in ("SFTDataset", "get_sft_collate_fn"):  # they load torch
        return getattr(importlib.import_module("litgpt.data.lightning"), name)
    raise AttributeError(f"module 'litgpt.data' has no attribute {name!r}")
