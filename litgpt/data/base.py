"""Records to token ids with a loss mask, for all data modules.

A record is `{"instruction", "input", "output"}` or `{"messages": [{"role", "content"}, ...]}`. It becomes one text and the spans of
characters that the model learns. The text is encoded once; a token carries loss if its last character lies in a span.
"""

import random
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from litgpt.errors import UserError
from litgpt.sample import Sample

if TYPE_CHECKING:
    from litgpt.prompts import PromptStyle
    from litgpt.tokenizer import Tokenizer

Record = dict[str, Any]


@dataclass(slots=True)
class Splits:
    """Tokenised data, a report about it, and the record of each sample of `val`."""

    train: list[Sample]
    val: list[Sample]
    report: str
    examples: list[Record]


class Rendered(NamedTuple):
    """A record as text; the model learns `text[start:end]` for each span."""

    text: str
    spans: list[tuple[int, int]]


@dataclass
class DataModule(ABC):
    """A source of records. Subclasses provide `records`; splitting, prompt styles, tokens and masks are the same for all."""

    mask_prompt: bool = False
    """Learn the answer only, not the prompt. Conversations are always learned on the assistant's turns only."""
    val_split_fraction: float | None = 0.1
    """Share of the samples that is kept for validation, between 0 and 1."""
    prompt_style: str | None = None
    """Name of a prompt style, or "chat" for the checkpoint's own template. Default: the style the checkpoint was trained with."""
    ignore_index: int = -100
    """Accepted for LitGPT's YAML files; without effect, as masks are kept apart from ids."""
    seed: int = 42
    """Seed of the split."""
    num_workers: int = 4
    """Accepted for LitGPT's YAML files; without effect, as samples are tokenised before training starts."""

    @property
    def source(self) -> str:
        """Name of this data in messages."""
        return type(self).__name__

    def prepare_data(self) -> None:  # noqa: B027 - most sources need nothing
        """Download missing files. To be called by one process."""

    def is_ready(self) -> bool:
        """Return True if `prepare_data` has nothing to do."""
        return True

    @abstractmethod
    def records(self) -> tuple[list[Record], list[Record] | None]:
        """Return training and validation records; None for the latter lets `splits` hold out a share of the former."""

    def notes(self) -> list[str]:
        """Return remarks about the last call of `records`, for the report."""
        return []

    def splits(self, tokenizer: "Tokenizer", prompt_style: "PromptStyle", max_seq_length: int | None = None) -> Splits:
        """Tokenise all records. Samples longer than `max_seq_length` are cut at the end; those without loss tokens are dropped.

        Raises UserError if a split has no sample, or a record does not fit the prompt style.
        """
        if max_seq_length is not None and max_seq_length < 2:
            raise UserError(f"train.max_seq_length is {max_seq_length}: a sample needs at least 2 tokens")
        train, val = self.records()
        if not train:
            raise UserError(f"{self.source} holds no records")
        numbered = list(enumerate(train, 1))
        if val is None:
            numbered, numbered_val = self._split(numbered)
        else:
            numbered_val = list(enumerate(val, 1))
        encoder = _Encoder(tokenizer, prompt_style, self.mask_prompt, max_seq_length, self.source)
        encoded = [encoder.encode_all(part) for part in (numbered, numbered_val)]
        for name, samples, part in zip(("training", "validation"), encoded, (numbered, numbered_val), strict=True):
            if not samples:
                raise UserError(self._nothing_left(name, len(part), encoder))
        return Splits(
            [sample for _, sample in encoded[0]],
            [sample for _, sample in encoded[1]],
            _report(encoded, encoder, self.notes()),
            [record for record, _ in encoded[1]],
        )

    def _split(self, records: list[tuple[int, Record]]) -> tuple[list[tuple[int, Record]], list[tuple[int, Record]]]:
        fraction = 0.1 if self.val_split_fraction is None else self.val_split_fraction
        if not 0 < fraction < 1:
            raise UserError(f"data.val_split_fraction is {fraction}: it must lie between 0 and 1 (0.1 keeps a tenth for validation)")
        if len(records) < 2:
            raise UserError(f"{self.source} holds one record: at least two are needed, one of them for validation")
        order = list(range(len(records)))
        random.Random(self.seed).shuffle(order)
        held_out = min(max(round(fraction * len(records)), 1), len(records) - 1)
        return [records[i] for i in order[held_out:]], [records[i] for i in order[:held_out]]

    def _nothing_left(self, split: str, count: int, encoder: "_Encoder") -> str:
        if not count:
            return f"{self.source}: the {split} set is empty: add records to it"
        start = f"{self.source}: none of the {count:,} {split} records is left: "
        if encoder.dropped[EMPTY] >= encoder.dropped[CUT_AWAY]:
            return start + "their answers are empty. Fill in the key of the answer (`output`)"
        return (
            f"{start}their prompts alone fill max_seq_length ({encoder.max_length}), so no answer token is left. "
            "Raise train.max_seq_length, or shorten the prompts"
        )


EMPTY = "empty answer"
CUT_AWAY = "no answer token left"


@dataclass
class _Encoder:
    """Encodes records and counts those that are cut or dropped."""

    tokenizer: "Tokenizer"
    style: "PromptStyle"
    mask_prompt: bool
    max_length: int | None
    source: str
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.stops = {ids[0] for ids in self.style.stop_tokens(self.tokenizer) if len(ids) == 1}

    def encode_all(self, records: Sequence[tuple[int, Record]]) -> list[tuple[Record, Sample]]:
        encoded = []
        for number, record in records:
            try:
                sample = self.encode(record)
            except UserError as error:
                raise UserError(f"{self.source}, record {number}: {error}") from None
            if sample:
                encoded.append((record, sample))
        return encoded

    def encode(self, record: Record) -> Sample | None:
        if not _has_answer(record):
            self.dropped[EMPTY] += 1
            return None
        text, spans = render(record, self.style, self.tokenizer)
        ids, offsets = self.tokenizer.ids_with_offsets(text)
        if self.mask_prompt or "messages" in record:
            mask = loss_mask(offsets, spans)
        else:
            mask = bytearray(b"\1") * len(ids)
        # A reply ends with a token that stops generation: the template's own marker, else EOS.
        if self.tokenizer.eos_id is not None and (not ids or ids[-1] not in self.stops):
            ids.append(self.tokenizer.eos_id)
            mask.append(1)
        if self.tokenizer.use_bos and self.tokenizer.bos_id is not None and ids[0] != self.tokenizer.bos_id:
            ids.insert(0, self.tokenizer.bos_id)
            mask.insert(0, 0)
        mask[0] = 0
        too_long = self.max_length is not None and len(ids) > self.max_length
        if too_long:
            ids, mask = ids[: self.max_length], mask[: self.max_length]
        if not any(mask):
            self.dropped[CUT_AWAY] += 1
            return None
        self.cut += too_long
        return Sample(array("i", ids), mask)


def _has_answer(record: Record) -> bool:
    if "messages" in record:
        return any(turn["role"] == "assistant" and turn["content"].strip() for turn in record["messages"])
    return bool(record["output"].strip())


def render(record: Record, style: "PromptStyle", tokenizer: "Tokenizer") -> Rendered:
    """Return the text of a record up to the end of its last reply, and the spans of its replies.

    A span starts where the prompt ends and includes the marker that ends the turn, but not the white space that follows. Styles other than
    chat templates omit the marker if the tokenizer does not have it as a token.
    """
    from litgpt.prompts import ChatTemplate

    multi_turn = hasattr(style, "render")
    if "messages" in record:
        messages = record["messages"]
        if multi_turn:
            return _render_turns(style, messages)
        system, prompt, answer = _one_turn(messages, style)
        head, extra = style.apply(prompt, sys_prompt=system), ""
    else:
        prompt, extra, answer = record["instruction"], record.get("input") or "", record["output"]
        if isinstance(style, ChatTemplate):
            question = f"{prompt}\n\n{extra}" if extra else prompt
            return _render_turns(style, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
        head = style.apply(prompt, input=extra)
    end = style.end_of_turn if style.end_of_turn and tokenizer.token_to_id(style.end_of_turn) is not None else ""
    text = head + style.gap + answer + end
    return Rendered(text, [(len(head), len(text))])


def _render_turns(style: Any, messages: list[dict[str, str]]) -> Rendered:
    """Find each reply by rendering the conversation up to it. The text of earlier turns must not depend on later ones."""
    full = style.render(messages, add_generation_prompt=False)
    spans = []
    last = len(messages) - 1
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = style.render(messages[:i], add_generation_prompt=True)
        so_far = full if i == last else style.render(messages[: i + 1], add_generation_prompt=False)
        turn = so_far.rstrip()
        if not so_far.startswith(head) or not full.startswith(turn):
            raise UserError(
                f"the prompt style {style.name!r} writes the conversation up to message {i + 1} differently once a reply or later messages "
                "follow, so the text that the model would read when it answers is not the text it would be trained on. Choose another "
                "prompt style, for example chatml, or split the conversation into single turns"
            )
        spans.append((len(head), len(turn)))
    return Rendered(full[: spans[-1][1]], spans)


def _one_turn(messages: list[dict[str, str]], style: "PromptStyle") -> tuple[str | None, str, str]:
    turns = [(message["role"], message["content"]) for message in messages]
    system = turns.pop(0)[1] if turns[0][0] == "system" else None
    if [role for role, _ in turns] != ["user", "assistant"]:
        raise UserError(
            f"the prompt style {style.name or type(style).__name__!r} has no form for conversations of several turns: choose "
            'data.prompt_style "chat" (the checkpoint\'s own template), "chatml" or "llama3"'
        )
    return system, turns[0][1], turns[1][1]


def loss_mask(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> bytearray:
    """Return 1 for each token whose last character lies in a span.

    The model has to write a token that begins in the prompt and ends in the answer, so only the last character counts.
    """
    mask = bytearray(len(offsets))
    for start, end in spans:
        for i, (_, stop) in enumerate(offsets):
            if start < stop <= end:
                mask[i] = 1
    return mask


def _report(encoded: Sequence[Sequence[tuple[Record, Sample]]], encoder: _Encoder, notes: list[str]) -> str:
    lengths = [len(sample.input_ids) for part in encoded for _, sample in part]
    parts = [
        f"{len(encoded[0]):,} train and {len(encoded[1]):,} validation samples",
        f"{sum(lengths) / len(lengths):,.0f} tokens on average (longest {max(lengths):,})",
    ]
    if encoder.cut:
        parts.append(f"{encoder.cut:,} cut to {encoder.max_length:,}")
    parts += [f"{count:,} dropped: {reason}" for reason, count in sorted(encoder.dropped.items())]
    return ", ".join(parts + notes)
