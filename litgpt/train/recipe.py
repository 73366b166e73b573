"""The settings of `litgpt finetune MODEL --data FILE`, and of `litgpt sweep`, that were not given: they follow from the data and the model.

Four kinds of data are trained in four ways:

    facts   few records with short answers, or many that share them: all are trained, none is held out, and training ends when the model
            repeats the answers. By LoRA on the replies, behind cached prompts, in the last two fifths of the blocks, with a higher rank if
            facts are told in two or three ways; many facts, and those that are told once, by LoRA in every block, on the prompts too, so
            that their answers are found by other words; those told once without some words of the questions. Up to 1,000 records that
            tell facts several times are also trained as second questions. Answers that are found in their questions are trained without
            either, at a lower rate
    classes 500 and more texts, and a few answers that they share: LoRA in every block for two epochs, in small batches, with a tenth held
            out, so that `litgpt evaluate` can count the right answers; fewer are trained like few facts
    pairs   records that say which answer is better than another: DPO, by LoRA
    style   many records with answers of their own, and running text: a tenth is held out, and the checkpoint with the lowest loss on it
            is kept; by LoRA in every block, and of very many records by cached epochs behind one of LoRA

The trials of a sweep share the frozen blocks' outputs, so Skip2-LoRA takes the place of LoRA in every block. They are compared by the loss
on held-out records; those of facts are held out if each fact is told several times.

`benchmarks/results/own_data.md` has the measurements behind the numbers. The same data and model give the same settings, so that a run can
be resumed by the same command.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby, zip_longest
from pathlib import Path
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any, get_args

from litgpt.adapters.settings import LAYER_FLAGS, AdapterSettings, WarmupSettings
from litgpt.checkpoint import require_checkpoint
from litgpt.config import Config
from litgpt.convert.resolve import open_checkpoint
from litgpt.data.alpaca import DEFAULT, Alpaca
from litgpt.data.base import MOST_REPEATED, DataModule
from litgpt.data.records import Record, read_record
from litgpt.data.sources import name_of
from litgpt.data.text_files import TOKEN, TextFiles
from litgpt.errors import UserError
from litgpt.objectives.settings import Preference, Rating
from litgpt.prompts import reply_header, resolve_prompt_style
from litgpt.text import counted, text_table
from litgpt.tokenizer import Tokenizer
from litgpt.train.trials import without_repeats

REPLAY = 24  # general questions: all that `litgpt.train.replay` has
FOLLOW_UPS = (0.5, 0.2)  # of few questions, and of many, about facts that are told several times; of others they cost recall
MOST_FOLLOWED = 1_000  # records; more were not measured
WORD_DROPOUT = 0.3  # of questions about facts that are told once
FEW = 200  # records that are facts if their answers are short; of more facts answer-only LoRA mixes up too many
FEW_WAYS = 4  # questions for each fact, below which answer-only LoRA of a low rank mixes up facts
MANY = 500  # records of a style, from which cached epochs behind one of LoRA reach in less time what a second epoch of LoRA does
COPYING = 5e-4  # learning rate of LoRA that finds answers in their questions: at higher ones it repeats the answers that it was trained on
COPIED = 0.8  # share of an answer's words that are its question's, from which it is found there; invented facts have at most 0.4
UNSPACED = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese and Japanese characters
SHARED = 0.5  # facts: at most this many different answers a record
CLASSES = 20  # questions for each answer, from which records are texts and their classes
HELD_OUT = 0.1  # share of the records of a style
SHORT = 300  # characters of an answer that is learned word for word
VALIDATIONS = 8
SHORT_ANSWER = 24  # tokens of an answer that is shown: those of `replay.ANSWER_TOKENS`, which are generated in the same batches
SHOWN = 3  # questions that are answered at each
MICRO_CHARS = 2048 * TOKEN  # in a micro-batch

LATE, LATE_SHARE = "last two fifths", 0.4  # of the model's blocks
LINEAR = {f"lora_{name}": (True, "LoRA on every linear layer") for name in ("query", "key", "value", "projection", "mlp")}
SKIP = {
    "skip2lora_enabled": (True, "the frozen blocks run once, so epochs after the first cost a fraction"),
    "skip2lora_block_indices": ("all", "adapters read every block"),
}
EXACT = {
    "lora_r": (16, "room for facts"),
    "lora_alpha": (16, "the rank"),
    "lora_dropout": (0.0, "the answers shall be exact"),
}
METHODS: dict[str, dict[str, tuple[Any, str]]] = {
    "LoRA": LINEAR,
    "answer-only LoRA": {
        **LINEAR,
        "alora_enabled": (True, "prompts run once, and an epoch computes the replies alone"),
        "lora_block_indices": (LATE, "the blocks before run once"),
        **EXACT,
    },
    "Skip2-LoRA": {
        **SKIP,
        "lora_query": (False, "Skip2-LoRA alone is trained"),
        "lora_value": (False, "Skip2-LoRA alone is trained"),
        **EXACT,
    },
    "critic": {
        "value_head": ("mlp", "a hidden layer learns more than none"),
        "lora_query": (False, "the model stays as it is"),
        "lora_value": (False, "the model stays as it is"),
    },
    "warm-up": {
        **LINEAR,
        **SKIP,
        "skip2lora_warmup_epochs": (1.0, "an epoch of LoRA first"),
        "skip2lora_warmup_lr": (1e-3, "for LoRA"),
        "skip2lora_r": (32, "behind LoRA a higher rank still helps"),
        "skip2lora_alpha": (64, "twice the rank"),
    },
}
SKIP_KEYS = {  # settings that ask for Skip2-LoRA
    *(item.name for kind in (AdapterSettings, WarmupSettings) for item in fields(kind) if item.name.startswith("skip2lora_")),
    "mtp_taps",
}
LORA_KEYS = {  # settings that ask for LoRA, or go with nothing else
    "skip2lora_enabled",
    "alora_enabled",
    "lora_variant",
    "modules_to_save",
    "cpu_offload",
    *LAYER_FLAGS,
}
FEW_WAYS_TOLD = {"lora_r": (64, "facts are told in few ways"), "lora_alpha": (64, "the rank")}  # instead of those of answer-only LoRA
CONTINUES = (
    "Running text teaches a model to continue such texts. For a model that answers questions about them, write questions and answers."
)
NARROW = 16  # columns of a terminal that are left for reasons, below which they are not wrapped
TARGET = 0.005  # loss per token of an answer that is repeated word for word
SCHEDULES = {  # (method, is_facts) -> epochs of few records and of many, learning rate
    ("LoRA", True): (12, 8, 1e-3),
    ("LoRA", False): (2, 2, 1e-3),
    ("answer-only LoRA", True): (12, 12, 2e-3),
    ("answer-only LoRA", False): (2, 2, 5e-4),
    ("Skip2-LoRA", True): (24, 16, 2e-3),
    ("Skip2-LoRA", False): (3, 3, 1e-3),
    ("warm-up", True): (8, 5, 5e-4),
    ("warm-up", False): (2, 2, 1e-4),
}
CRITIC = (20, 10, 1e-3)
BLOCKS_OF_TEXT = (3, 3, 2e-3)
TOLD_ONCE = (30, 30, 2e-3)  # of LoRA, and of Skip2-LoRA alone
PREFERENCES = (2, 1, 2e-4)  # the same for DPO, ORPO and KTO, whatever the method


@dataclass(frozen=True)
class Look:
    """The facts that the settings depend on."""

    records: int
    answers: int  # different ones
    longest: int  # characters of the longest record
    is_pair: bool  # questions and answers, not conversations
    has_validation: bool  # the data have validation records of their own
    questions: int = 0  # different ones
    contradicted: int = 0  # questions with several answers
    answer_length: float = 0.0  # characters that are learned of a record, on average
    compares: bool = False  # records say which answers are better
    is_labelled: bool = False  # records say whether their answer is a good one
    is_text: bool = False  # some are running text
    is_single: bool = False  # one question each
    copies: bool = False  # the answers are made of their questions' words: something to do with a text, not facts
    block: int | None = None  # tokens of a sample of running text that is cut into blocks
    is_sweep: bool = False  # the settings are those of a sweep's trials
    held_out: float | None = None  # the share for validation that the user names: 0 if all records shall be known

    @classmethod
    def at(cls, train: Sequence[Any], val: Sequence[Any] | None) -> Look:
        """Look at what a data module's `records` returns. Records without an answer are dropped, as in training."""
        read = [entry if isinstance(entry, Record) else read_record(entry) for entry in train]
        records = [record for record in read if record.has_answer]
        asked = {(*(str(turn["content"]) for turn in record.turns[:-1]), record.reply.strip()) for record in records}
        answers, questions = {pair[-1] for pair in asked}, Counter(pair[:-1] for pair in asked)
        longest = max((each.characters for record in records for each in (record, record.rejected) if each is not None), default=0)
        length = sum(record.learned_characters for record in records) / max(1, len(records))
        is_labelled = {record.label for record in records if record.rejected is None} == {True, False}
        return cls(
            len(records),
            len(answers),
            longest,
            is_pair=all(record.pair for record in records),
            has_validation=val is not None,
            questions=len(questions),
            contradicted=sum(count > 1 for count in questions.values()),
            answer_length=length,
            compares=is_labelled or any(record.rejected is not None for record in records),
            is_labelled=is_labelled,
            is_text=any(record.is_text for record in records),
            is_single=all(record.is_single for record in records),
            copies=copied_share(records[:FEW]) >= COPIED,
        )

    @classmethod
    def of_text(cls, data: TextFiles, block: int | None) -> Look:
        """Look at files of running text, from their sizes. `block`: tokens of a sample, if it is given."""
        block = block or data.block()
        count = max(1, data.tokens() // block)
        return cls(count, count, TOKEN * block, False, data.files()[1] is not None, is_text=True, block=block)

    @property
    def is_repeated(self) -> bool:
        """Return True if the same answers are given to several questions."""
        return self.answers <= SHARED * self.questions

    @property
    def told_once(self) -> bool:
        return self.is_facts and not (self.is_repeated or self.copies)

    @property
    def told_in_few_ways(self) -> bool:
        """Return True for facts with two or three questions each."""
        return self.is_facts and self.is_repeated and self.questions < FEW_WAYS * self.answers

    @property
    def has_classes(self) -> bool:
        """Return True for many texts and their classes; fewer are facts."""
        is_kind = self.shares_few_answers and not (self.compares or self.is_text)
        return self.records >= MANY and is_kind and self.held_out != 0

    @property
    def shares_few_answers(self) -> bool:
        return self.questions >= CLASSES * self.answers

    @property
    def is_facts(self) -> bool:
        spares_none = (self.records <= FEW and self.answer_length <= SHORT) if self.held_out is None else self.held_out == 0
        is_told = spares_none or (self.is_repeated and not self.has_classes)
        return is_told and not (self.has_validation or self.compares or self.is_text)

    @property
    def is_style(self) -> bool:
        """Return True for answers of their own, and for texts that are records."""
        return not (self.is_facts or self.has_classes or self.block)

    def __str__(self) -> str:
        noun = "texts" if self.is_text else "answers"
        answers = f", {self.answers:,} different {noun}" if self.answers < self.records else ""
        facts = "answers to find in their questions" if self.copies else "facts to repeat"
        style = "texts and their classes" if self.has_classes else "a style to learn"
        kind = "texts to continue" if self.is_text else facts if self.is_facts else style
        kind = "answers to prefer or to rate" if self.compares else kind
        if self.held_out is None and replace(self, held_out=0.0).is_facts != replace(self, held_out=HELD_OUT).is_facts:
            other, share = (style, HELD_OUT) if self.is_facts else (facts, 0)
            kind += f" (for {other} give --data.val_split_fraction {share})"
        unit = "" if self.block is None else f" of {self.block} tokens, about"
        return f"{counted(self.records, 'record' if self.block is None else 'block')}{unit}{answers}, taken as {kind}"


@dataclass(frozen=True)
class Chosen:
    """A setting and the reason for it."""

    key: str
    value: Any
    reason: str


def words(text: str) -> set[str]:
    """Return the words of a text, and the characters of Chinese and Japanese, which have no blanks between words."""
    return set(re.findall(f"[{UNSPACED}]|[^\\W{UNSPACED}]+", text.lower()))


def copied_share(records: Sequence[Record]) -> float:
    """Return the mean share of an answer's words that its question has as well.

    Words of most answers (the keys of JSON) or of most questions (the names of classes) do not count.
    """
    sides = [(words(str(record.turns[-2]["content"])), words(record.reply)) for record in records if record.is_single]
    counts = [Counter(word for side in sides for word in side[i]) for i in (0, 1)]
    usual = {word for count in counts for word in count if 2 * count[word] > len(sides)}
    shares = [len(question & own) / len(own) for question, answer in sides if (own := answer - usual)]
    return sum(shares) / max(1, len(shares))


def complete(given: dict[str, Any], is_sweep: bool = False) -> dict[str, Any]:
    """Return a command's settings with those that are missing, and say which were chosen and why.

    `given` maps keys to values, nested as in a YAML file; a class is {"class_path": ..., "init_args": {...}}. Raises UserError if the
    checkpoint or the data cannot be read.
    """
    from litgpt.device import process_rank
    from litgpt.logs import Console

    if "checkpoint_dir" not in given:
        return given
    varied = without_repeats(given.get("grid") or {})
    rate = given.get("optimizer", {}).get("init_args", {}).get("lr")
    if is_sweep and rate is not None and not given.get("grid"):
        raise UserError(f"optimizer.lr is {rate}: a sweep needs a grid: give --grid.optimizer.lr '[5e-4, 1e-3]', or leave it out")
    console = Console(process_rank() == 0)
    if given.get("data") is None:
        console.say(DEFAULT)
    data = given["data"] = given.get("data") or {"class_path": Alpaca}
    dry = bool(given.get("dry_run"))
    base = require_checkpoint(open_checkpoint(given["checkpoint_dir"], convert=not dry))
    module: DataModule = data["class_path"](**data.get("init_args", {}))
    if (not module.is_ready() and dry) or module.gives_tokens:
        return given  # the run will say what is missing, or the data are tokens
    module.prepare_data()
    if isinstance(module, TextFiles):
        look = Look.of_text(module, given.get("train", {}).get("max_seq_length"))
    else:
        look = Look.at(*module.records())
    look = replace(look, is_sweep=is_sweep, held_out=data.get("init_args", {}).get("val_split_fraction"))
    if given.get("objective", "next_token") in (*get_args(Preference), *get_args(Rating)):
        look = replace(look, compares=True)
    rows = choices(look, module, given, base)
    chosen = [choice for choice in rows if choice.key not in varied and _put(given, choice.key, choice.value)]
    console.say(f"{module.source}: {look}. Settings that you did not give:")
    console.say(_table(chosen) + _hint(look))
    if look.is_facts and look.contradicted:
        several = f"{counted(look.contradicted, 'question')} with several answers"
        console.say(f"{several}, of which the model can repeat only one: `litgpt data` shows them.")
    return given


def advice(data: DataModule, look: Look, base: Path | None) -> str:
    """Return what the data are taken as, and the settings that would be chosen for them, and for the checkpoint if it is known."""
    given: dict[str, Any] = {"data": {"init_args": {} if data.mask_prompt else {"mask_prompt": False}}}
    base = None if base is None else open_checkpoint(base)
    chosen = [choice for choice in choices(look, data, given, base) if _put(given, choice.key, choice.value)]
    return f"{look}\n{_table(chosen)}{_hint(look)}"


def _hint(look: Look) -> str:
    """Return a line about other data that would teach more, if there are such."""
    if look.told_once:
        return "\nPhrase the question for each fact in two or three ways: the model then recalls it better."
    if look.block:
        return f"\n{CONTINUES}"
    if look.is_text:
        return "\nRecords with a text alone are continued. To learn answers, name the keys question and answer; of classes, text and label."
    return ""


def _table(chosen: list[Chosen]) -> str:
    rows = []
    for (_, _, reason), group in groupby(chosen, key=lambda choice: (choice.key[:5] == "lora_", choice.value, choice.reason)):
        same = list(group)
        keys = [choice.key for choice in same]
        rows.append((f"{keys[0]} ... {keys[-1]}" if len(keys) > 1 else keys[0], _shown(same[0].value), reason))
    room = get_terminal_size((0, 0)).columns - 6 - sum(max(len(row[column]) for row in rows) for column in (0, 1))
    if room >= NARROW:
        rows = [line for key, value, reason in rows for line in zip_longest((key,), (value,), wrap(reason, room), fillvalue="")]
    return text_table(rows, left=(0, 1, 2))


def choices(look: Look, data: DataModule, given: dict[str, Any], base: Path | None = None) -> list[Chosen]:
    """Return the settings that suit the data, for a command with the settings `given` and a checkpoint; None: for a usual one."""
    layers, style, marks_replies = None, None, True
    if base is not None:
        layers, style = Config.from_checkpoint(base).n_layer, resolve_prompt_style(data.prompt_style, base, Tokenizer(base))
        marks_replies = given["data"].get("init_args", {}).get("mask_prompt", True) and bool(reply_header(style).strip())
    name = name_of(Path(data.source)).lstrip(".") or "data"
    rows = [Chosen("out_dir", Path("out/sweep" if look.is_sweep else "out/finetune") / name, "named after the data")]
    objective = given.get("objective", "kto" if look.is_labelled else "dpo" if look.compares else None)
    if look.is_labelled:
        rows.append(Chosen("objective", "kto", "labels mark good and bad answers"))
    elif look.compares:
        rows.append(Chosen("objective", "dpo", "the records compare answers"))
    elif look.is_pair:
        rows.append(Chosen("data.mask_prompt", True, "the answers are learned, not the questions"))
    if look.is_facts and look.is_sweep and look.is_repeated:
        rows.append(Chosen("data.val_split_fraction", 0.2, "questions in other words compare the settings"))
    elif look.is_facts:
        rows.append(Chosen("data.val_split_fraction", 0.0, "no record can be spared"))
    elif not look.has_validation:
        why = "a tenth shows how many it judges right" if look.has_classes else "a tenth shows when to stop"
        rows.append(Chosen("data.val_split_fraction", HELD_OUT, why))
    method = _method_of(look, given)
    if objective == "dpo":
        rows.append(Chosen("dpo_nll_weight", 0.2, "the preferred answers stay probable"))
    if objective == "verifiable":
        rows.append(Chosen("lr_ratios", {"value_head": 10.0}, "a head begins with nothing"))
    unfit = {"alora_enabled": not marks_replies, "skip2lora_warmup_epochs": "skip2lora_warmup_steps" in given}
    settings = METHODS[method]
    is_open = {*given, *(given.get("grid") or ())}.isdisjoint(FEW_WAYS_TOLD)
    if method == "answer-only LoRA" and is_open and look.told_in_few_ways:
        settings = settings | FEW_WAYS_TOLD
    alphas = {"lora_alpha": given.get("lora_r"), "skip2lora_alpha": 2 * (given.get("skip2lora_r") or 0)}
    for key, (value, reason) in settings.items():
        if not unfit.get(key):
            value = alphas.get(key) or value
            rows.append(Chosen(key, f"last:{math.ceil(LATE_SHARE * layers)}" if layers and value == LATE else value, reason))
    holds_two = look.is_single and (style is None or hasattr(style, "render"))
    is_told_often = (look.is_facts or look.has_classes) and look.is_repeated and not look.copies and look.records <= MOST_FOLLOWED
    few, many = FOLLOW_UPS if is_told_often and holds_two and method in ("LoRA", "answer-only LoRA") else (0.0, 0.0)
    share = few if look.records <= FEW else many
    return rows + _schedule(look, method, given, given.get("train", {}).get("follow_ups", share))


def _put(config: dict[str, Any], key: str, value: Any) -> bool:
    """Set a key that is not set. Returns False if it is."""
    root, _, name = key.partition(".")
    below = config
    if root in ("data", "optimizer"):
        below = config.setdefault(root, {"class_path": "AdamW"}).setdefault("init_args", {})
    elif name:
        below = config.setdefault(root, {})
    if (name or root) in below:
        return False
    below[name or root] = value
    return True


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _method_of(look: Look, given: dict[str, Any]) -> str:
    """Return the method that the given settings ask for, else the one that suits the data."""
    if given.get("objective") == "critic":
        return "critic"
    if given.get("alora_enabled"):
        return "answer-only LoRA"
    if given.get("skip2lora_enabled", any(key in given for key in SKIP_KEYS)):
        return "warm-up" if given.get("skip2lora_warmup_epochs") or given.get("skip2lora_warmup_steps") else "Skip2-LoRA"
    if not given.keys().isdisjoint(LORA_KEYS):
        return "LoRA"
    if look.is_facts:
        is_small = look.records <= FEW or (look.shares_few_answers and look.records < MANY and not look.copies)
        return "answer-only LoRA" if look.is_sweep or (look.is_repeated and is_small) else "LoRA"
    if look.is_sweep:
        return "Skip2-LoRA"
    return "LoRA" if look.compares or look.block or look.has_classes or look.records < MANY else "warm-up"


def _schedule(look: Look, method: str, given: dict[str, Any], follow_ups: float) -> list[Chosen]:
    """Return the settings of the steps and of validation. An epoch with second questions is longer, so there are fewer."""
    train = given.get("train", {})
    batch = train.get("global_batch_size") or math.lcm(8 if look.is_style else 4, train.get("micro_batch_size") or 1)
    micro = max(size for size in range(1, batch + 1) if batch % size == 0 and (size == 1 or size * look.longest <= MICRO_CHARS))
    schedule = CRITIC if method == "critic" else PREFERENCES if look.compares else SCHEDULES[method, look.is_facts]
    if look.told_once and method != "warm-up":
        schedule = TOLD_ONCE
    few, many, rate = BLOCKS_OF_TEXT if look.block and method == "LoRA" else schedule
    copying = look.is_facts and look.copies and method in ("LoRA", "answer-only LoRA")
    rate, why = (COPYING, "low, to find other answers too") if copying else (rate, f"for {method}")
    usual = max(1, round((few if look.records <= FEW else many) / (1 + follow_ups)))
    epochs = train.get("epochs", usual)  # None: max_steps alone
    replayed = 0 if look.compares or look.is_text else train.get("replay", REPLAY)
    per_epoch = math.ceil((look.records * (1 + follow_ups) + replayed) / batch)
    steps = min((limit for limit in (epochs and epochs * per_epoch, train.get("max_steps")) if limit), default=usual * per_epoch)
    rows = [
        Chosen("train.epochs", epochs, "at most" if look.is_facts else "more epochs raise the loss on others"),
        Chosen("grid.optimizer.lr", [rate / 2, rate, 2 * rate], f"around {rate:g}, which suits {method}")
        if look.is_sweep and not given.get("grid")
        else Chosen("optimizer.lr", rate, why),
        *([Chosen("train.max_seq_length", look.block, "the text is cut into blocks")] if look.block else []),
        Chosen("train.global_batch_size", batch, "small batches learn faster"),
        Chosen("train.micro_batch_size", micro, "as many as fit a few thousand tokens"),
        Chosen("eval.initial_validation", True, "the loss before training"),
        Chosen("eval.interval", steps, "at the end: before, a few texts judge by chance")
        if look.has_classes
        else Chosen("eval.interval", max(1, steps // VALIDATIONS), f"{VALIDATIONS} times a run"),
    ]
    if not look.is_sweep:
        is_short = look.is_facts and look.answer_length <= SHORT_ANSWER * TOKEN
        rows.append(Chosen("eval.max_new_tokens", SHORT_ANSWER if is_short else 64, "to see what it answers"))
    if train.get("lr_warmup_steps") is None and (epochs or train.get("max_steps") or train.get("max_tokens")):
        rows.append(Chosen("train.lr_warmup_fraction", 0.1, "of the steps"))
    if not (look.compares or look.is_text):
        rows.append(Chosen("train.replay", REPLAY, "general questions, so that less is forgotten"))
    if follow_ups:
        rows.append(Chosen("train.follow_ups", follow_ups, "of the questions, so that a second one in a chat is answered, too"))
    if look.told_once and method == "LoRA" and not look.is_sweep:
        rows.append(Chosen("train.word_dropout", WORD_DROPOUT, "of a question, so that the answer is found by other words"))
    if look.is_facts and not (look.is_sweep and look.is_repeated) and not look.held_out:
        shown = min(look.records, MOST_REPEATED)
        rows.append(Chosen("eval.evaluate_example", sorted({shown * i // SHOWN for i in range(SHOWN)}), "questions to show"))
        rows.append(Chosen("eval.target_loss", TARGET, "then the answers are repeated word for word"))
    return rows
