"""Running text for pretraining: a folder of text files, TinyStories, OpenWebText. All tokens are learned, in blocks of equal length."""

import json
import math
import tarfile
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from litgpt.data.base import MOST_REPEATED, DataModule, Splits, Units, alone
from litgpt.data.downloads import HUB, download_from_hub
from litgpt.data.records import Record
from litgpt.data.sources import SAVED, import_library, texts_of
from litgpt.errors import UserError
from litgpt.files import expand_path, parse_json, read_text
from litgpt.prompts import PromptStyle
from litgpt.sample import Sample
from litgpt.streams import drawing
from litgpt.text import counted, first_line
from litgpt.tokenizer import Tokenizer

PIECE = 2**20  # characters that are tokenised at once
TOKEN = 4  # characters, about
BLOCKS = 512, 128  # tokens of a block; the second if the first would give fewer than FEWEST blocks
FEWEST = 20


@dataclass(kw_only=True)
class Text(DataModule):
    """Texts, joined and cut into blocks of T + 1 tokens, where the model reads T tokens at a time; the remainder is dropped.

    Each text begins with BOS or, if the tokenizer has none, ends with EOS.
    """

    fallback_style: ClassVar[str] = "default"

    @abstractmethod
    def texts(self) -> tuple[Iterable[str], Iterable[str] | None]:
        """Return training and validation texts. If the latter is None, the last blocks of the former are held out.

        With a share of 0 all blocks are trained on, and some of them are also validated.
        """

    def check(self) -> None:
        """Raise UserError if files are missing."""
        self.texts()

    def records(self) -> tuple[list[Record], list[Record] | None]:
        raise UserError(
            f"{type(self).__name__} holds running text, not questions and answers: use `litgpt pretrain`, finetune_lora or finetune_full"
        )

    def splits(self, tokenizer: Tokenizer, prompt_style: PromptStyle, max_seq_length: int | None = None, units: Units = alone) -> Splits:
        """Tokenise all texts. Raises UserError if they do not fill a block of `max_seq_length` + 1 tokens."""
        assert max_seq_length is not None
        train_texts, val_texts = self.texts()
        train, tokens = self._blocks(tokenizer, train_texts, max_seq_length + 1)
        val, val_tokens = ([], tokens) if val_texts is None else self._blocks(tokenizer, val_texts, max_seq_length + 1)
        if is_repeated := val_texts is None and not self.held_out_share():
            val = train[:: math.ceil(len(train) / MOST_REPEATED) or 1]
        elif val_texts is None:
            if len(train) == 1:
                raise UserError(
                    f"{self.source}: the text of {tokens:,} tokens is shorter than two blocks of {max_seq_length + 1:,}, one of which is "
                    "for validation: add text, or lower train.max_seq_length"
                )
            kept = max(1, len(train) - max(1, round(self.held_out_share() * len(train))))
            train, val = train[:kept], train[kept:]
        for name, blocks, count in (("training", train, tokens), ("validation", val, val_tokens)):
            if not blocks:
                raise UserError(
                    f"{self.source}: the {name} text is shorter than a block of {max_seq_length + 1:,} tokens (all of it: {count:,}): "
                    "add text, or lower train.max_seq_length"
                )
        report = f"{len(train):,} train and {len(val):,} validation blocks of {max_seq_length + 1:,} tokens{self.held_out_file()}"
        if is_repeated:
            report = f"{counted(len(train), 'train block')} of {max_seq_length + 1:,} tokens, {len(val):,} of them validated again"
        start = {"role": "assistant", "content": tokenizer.decode(list(val[0].input_ids))}
        return Splits(train, val, report, [Record([start], [1.0], is_text=True)])

    def held_out_file(self) -> str:
        """Return the end of the report: the file of the training texts that is held out, if there is one."""
        return ""

    def _blocks(self, tokenizer: Tokenizer, texts: Iterable[str], length: int) -> tuple[list[Sample], int]:
        """Return the blocks, and the number of tokens before they were cut."""
        ids, blocks, count = array("i"), list[Sample](), 0
        mask = bytearray(b"\0" + b"\1" * (length - 1))
        for text in texts:
            for n, piece in enumerate(pieces(text.strip())):
                ids.extend(tokenizer.ids(piece, bos=tokenizer.bos_id is not None and n == 0))
            if tokenizer.bos_id is None and tokenizer.eos_id is not None:
                ids.append(tokenizer.eos_id)
            whole = len(ids) // length
            blocks += [Sample(ids[i * length : (i + 1) * length], mask[:]) for i in range(whole)]
            count, ids = count + whole * length, ids[whole * length :]
        return blocks, count + len(ids)


def pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces that can be tokenised, cut at ends of paragraphs, lines or words if possible."""
    while len(text) > PIECE:
        end = next((place for mark in ("\n\n", "\n", " ") if (place := text.rfind(mark, PIECE // 2, PIECE)) > 0), PIECE)
        yield text[:end]
        text = text[end:]
    yield text


@dataclass(kw_only=True)
class TextFiles(Text):
    """The .txt files of a folder, or its .md files if it has none."""

    train_data_path: Path | None = field(default=None, kw_only=False)
    """The folder, or a single file."""
    val_data_path: Path | None = field(default=None, kw_only=False)
    """Another folder or file for validation. Default: the first file of the folder, or the last blocks of a single one."""
    val_split_fraction: float | None = None
    """Share of the blocks held out for validation. Default: 0.05 of a single file. With 0 all blocks are trained on, and some of them also
    validated."""

    path_key: ClassVar[str] = "train_data_path"

    def files(self) -> tuple[list[Path], list[Path] | None]:
        """Return the files of the training and the validation text; None for the latter if it is a share of the former."""
        if self.train_data_path is None:
            raise UserError("data.train_data_path is missing: name a folder with .txt files")
        if self.val_data_path is not None and self.val_split_fraction is not None:
            raise UserError("data.val_split_fraction is set, and data.val_data_path names the validation text: leave one of them out")
        train = self._files(self.train_data_path)
        val = None if self.val_data_path is None else self._files(self.val_data_path)
        if val is None and len(train) > 1 and self.val_split_fraction is None:
            val, train = train[:1], train[1:]
        return train, val

    def held_out_file(self) -> str:
        val = self.files()[1] if self.val_data_path is None else None
        return f"; {val[0].name} is held out for validation" if val else ""

    def tokens(self) -> int:
        """Estimate the number of training tokens from the sizes of the files."""
        return sum(file.stat().st_size for file in self.files()[0]) // TOKEN

    def block(self) -> int:
        """Return a block length in tokens that suits the length of the training text."""
        return next((size for size in BLOCKS if self.tokens() >= FEWEST * size), BLOCKS[-1])

    def texts(self) -> tuple[Iterable[str], Iterable[str] | None]:
        train, val = self.files()
        return map(read_any, train), None if val is None else map(read_any, val)

    def _files(self, path: Path) -> list[Path]:
        place = expand_path(path)
        if not place.exists():
            raise UserError(f"{path} does not exist: name a folder with .txt files")
        files = texts_of(place) if place.is_dir() else [place]
        if not files:
            raise UserError(f"{path} holds no .txt or .md files")
        return files


def read_any(file: Path) -> str:
    """Return the text of a file, however large it is."""
    return read_text(file, "was removed while it was read", None)


@dataclass(kw_only=True)
class TinyStories(Text):
    """Two million short stories in the words of small children, downloaded once (arXiv 2305.07759)."""

    data_path: Path = field(default=Path("data/tinystories"), kw_only=False)
    """Folder for the downloaded files, JSON lists of stories. The first is for validation."""

    path_key: ClassVar[str] = "data_path"
    archive: ClassVar[str] = "TinyStories_all_data.tar.gz"

    def is_ready(self) -> bool:
        return len(self._files()) > 1

    def _files(self) -> list[Path]:
        return sorted(expand_path(self.data_path).rglob("*.json"))

    def prepare_data(self) -> None:
        folder = expand_path(self.data_path)
        if not self.is_ready():
            if not (folder / self.archive).is_file():
                download_from_hub(f"{HUB}roneneldan/TinyStories/resolve/main/{self.archive}", folder, self.archive)
            try:
                with tarfile.open(folder / self.archive) as archive:
                    archive.extractall(folder, filter="data")
            except (tarfile.TarError, OSError, EOFError) as error:
                raise UserError(f"{folder / self.archive} is not a complete archive ({error}): remove it to download it again") from None

    def texts(self) -> tuple[Iterable[str], Iterable[str] | None]:
        self.prepare_data()
        files = self._files()
        if len(files) < 2:
            raise UserError(f"{self.data_path} holds {len(files)} .json files: at least two are needed, the first for validation")
        return stories(files[1:]), stories(files[:1])


def stories(files: Iterable[Path]) -> Iterator[str]:
    """Yield the stories of JSON lists of objects with the key `story`."""
    for file in files:
        for n, row in enumerate(parse_json(read_any(file), str(file)), 1):
            if not isinstance(row, dict) or not isinstance(row.get("story"), str):
                raise UserError(f"{file}, record {n}: an object with the text `story` is needed, not {json.dumps(row)[:60]}")
            yield row["story"]


@dataclass(kw_only=True)
class OpenWebText(Text):
    """Eight million web pages, read by the `datasets` library. All tokens are held in memory; the whole set does not fit."""

    data_path: Path = field(default=Path("data/openwebtext"), kw_only=False)
    """Folder of the library's files, or a data set saved there with a column `text`."""
    val_split_fraction: float | None = 0.0005
    """Share of the blocks held out for validation."""

    repo_id: ClassVar[str] = "Skylion007/openwebtext"

    def texts(self) -> tuple[Iterable[str], Iterable[str] | None]:
        datasets: Any = import_library("datasets", "OpenWebText")
        folder = expand_path(self.data_path)
        try:
            is_saved = any((folder / name).is_file() for name in SAVED)
            with drawing():
                loaded = datasets.load_from_disk(str(folder)) if is_saved else datasets.load_dataset(self.repo_id, cache_dir=str(folder))
            rows = loaded.get("train", loaded)
        except Exception as error:  # the library raises errors of many other libraries
            reason = first_line(error)[:200]
            raise UserError(f"the dataset {self.repo_id} could not be loaded ({reason}). Without a network, save it in {folder}") from None
        return (row["text"] for row in rows), None
