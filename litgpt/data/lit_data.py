"""Tokens that LitData's `optimize` wrote, for pretraining. The files are read here: the litdata library needs torchvision.

A folder has index.json and its chunks: the number n of items, n + 1 offsets (uint32 each), and the items' tokens, one after the other.
"""

import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from litgpt.data.text_files import Text
from litgpt.errors import UserError
from litgpt.files import expand_path, read_json
from litgpt.sample import Sample
from litgpt.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np

INDEX = "index.json"
# numpy's dtype names by the number of the dtype in litdata's lists, one for torch and one for numpy
TORCH = {11: "u1", 12: "i1", 13: "i2", 14: "i2", 15: "i4", 16: "i4", 17: "i8", 18: "i8", 20: "u2"}
NUMPY = dict(enumerate(("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")))
FORMATS = {"no_header_tensor": TORCH, "no_header_numpy": NUMPY}


def chunks(folder: Path) -> "Iterator[np.ndarray]":
    """Yield the tokens of each chunk. Raises UserError for files that are missing, broken, compressed, or hold no tokens."""
    import numpy as np

    index = read_json(folder / INDEX, "is missing: LitData's `optimize` writes it next to the chunks")
    settings, entries = index.get("config"), index.get("chunks")
    if not isinstance(settings, dict) or not isinstance(entries, list):
        raise UserError(f"{folder / INDEX} is not LitData's: it has no config and chunks")
    if packed := [key for key in ("compression", "encryption") if settings.get(key)]:
        raise UserError(f"{folder}: {' and '.join(packed)} of chunks is not supported: write them without")
    name, _, number = str((settings.get("data_format") or [""])[0]).partition(":")
    kind = FORMATS.get(name, {}).get(int(number) if number.isdecimal() else -1)
    if kind is None or len(settings["data_format"]) != 1:
        raise UserError(f"{folder}: the data_format {settings.get('data_format')} does not hold tokens: optimize with TokensLoader")
    for entry in entries:
        try:
            file, items, tokens = folder / Path(entry["filename"]).name, int(entry["chunk_size"]), int(entry["dim"])
            yield np.memmap(file, "<" + kind, "r", offset=4 * (items + 2), shape=(tokens,))
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise UserError(f"{folder}: the chunk {str(entry)[:100]} cannot be read ({error}): optimize the data again") from None


@dataclass(kw_only=True)
class LitData(Text):
    """Tokens in LitData's files: blocks of T + 1 tokens of each chunk, in memory, five bytes per token."""

    data_path: Path = field(default=Path("data"), kw_only=False)
    """The folder with index.json."""
    split_names: list[str] | None = field(default=None, kw_only=False)
    """Names of the folders in data_path for training and validation. Default: the last blocks of data_path are for validation."""
    val_split_fraction: float | None = None
    """Share of the blocks held out for validation if split_names is not set. Default: 0.05."""

    path_key: ClassVar[str] = "data_path"

    def texts(self) -> tuple[Iterable[Any], Iterable[Any] | None]:
        if re.match(r"\w{2,}:/", str(self.data_path)):
            raise UserError(f"{self.data_path} is not on this machine: copy the folder, and name the copy")
        folder = expand_path(self.data_path)
        if self.split_names is None:
            return [folder], None
        if len(self.split_names) != 2:
            raise UserError(f"data.split_names is {self.split_names}: two names are needed, such as train and val")
        if self.val_split_fraction is not None:
            raise UserError("data.val_split_fraction is set, and data.split_names names the validation part: leave one of them out")
        train, val = (folder / name for name in self.split_names)
        return [train], [val]

    def check(self) -> None:
        for folders in self.texts():
            for folder in folders or ():
                next(chunks(folder), None)

    def _blocks(self, tokenizer: Tokenizer, texts: Iterable[Any], length: int) -> tuple[list[Sample], int]:
        """Return the blocks of all chunks of the folders, and the number of tokens before they were cut."""
        blocks, count, mask = list[Sample](), 0, bytearray(b"\0" + b"\1" * (length - 1))
        for tokens in (chunk for folder in texts for chunk in chunks(folder)):
            whole, count = tokens[: len(tokens) // length * length].reshape(-1, length), count + len(tokens)
            if whole.size and not 0 <= int(whole.min()) <= int(whole.max()) < tokenizer.vocab_size:
                raise UserError(f"{self.source}: some token ids are outside this tokenizer's vocabulary of {tokenizer.vocab_size:,}")
            blocks += [Sample(array("i", row.astype("i4").tobytes()), mask[:]) for row in whole]
        return blocks, count


@dataclass(kw_only=True)
class TinyLlama(LitData):
    """SlimPajama and StarCoder's data in the shares that TinyLlama was trained on (arXiv 2401.02385), prepared with LitData."""

    use_starcoder: bool = True
    """Train on starcoder too, 0.306416 of the blocks."""

    folders: ClassVar[tuple[str, str, str]] = ("slimpajama/train", "slimpajama/val", "starcoder")
    share: ClassVar[float] = 0.306416

    def texts(self) -> tuple[Iterable[Any], Iterable[Any] | None]:
        place = expand_path(self.data_path)
        train, val, code = (place / name for name in self.folders)
        wanted = [train, val, code] if self.use_starcoder else [train, val]
        if missing := [str(folder) for folder in wanted if not folder.is_dir()]:
            raise UserError(f"{', '.join(missing)} {'are' if missing[1:] else 'is'} missing: name their folder as data.data_path")
        return wanted[::2], [val]

    def _blocks(self, tokenizer: Tokenizer, texts: Iterable[Any], length: int) -> tuple[list[Sample], int]:
        parts = [super(TinyLlama, self)._blocks(tokenizer, [folder], length) for folder in texts]
        if len(parts) == 1:
            return parts[0]
        (web, web_tokens), (code, code_tokens) = parts  # until one of them is used up
        total = min(len(web) / (1 - self.share), len(code) / self.share)
        return web[: round(total * (1 - self.share))] + code[: round(total * self.share)], web_tokens + code_tokens


@dataclass(kw_only=True)
class MicroLlama(TinyLlama):
    """SlimPajama alone, prepared with LitData."""

    use_starcoder: bool = False
    """Train on starcoder too."""
