"""Instruction data sets with training and validation files of their own, or with conversations: Deita, FLAN, LIMA, LongForm."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Optional

from litgpt.data.downloads import HUB, Downloaded
from litgpt.errors import UserError


@dataclass(kw_only=True)
class _Parts(Downloaded):
    """A training and a validation part, each with files of its own."""

    val_split_fraction: float | None = field(default=None, init=False, repr=False)  # the data set has a validation part


@dataclass(kw_only=True)
class Deita(_Parts):
    """10,000 conversations, chosen for their complexity and quality, downloaded once."""

    include_multiturn_conversations: bool = False
    """Make a sample of every question and its answer. Otherwise of the first in each conversation."""
    download_dir: Path = Path("./data/deita")
    repo_id: str = "HuggingFaceH4/deita-10k-v0-sft"
    """The data set on the hub."""

    def addresses(self) -> tuple[dict[str, str], dict[str, str]]:
        train, val = ({f"{part}-*": f"{HUB}{self.repo_id}/resolve/main/data/{part}-*"} for part in ("train_sft", "test_sft"))
        return train, val

    def convert(self, row: Any) -> list[Any]:
        texts = [turn.get("content") for turn in row.get("messages") or [] if turn.get("role") != "system"] if isinstance(row, dict) else []
        return pairs(texts, self.include_multiturn_conversations)


@dataclass(kw_only=True)
class FLAN(_Parts):
    """Questions of 66 data sets, each in ten wordings, with short answers; downloaded once."""

    prompt_style: str | None = "flan"
    """Name of a prompt style, or "chat" for the checkpoint's own template."""
    download_dir: Path = Path("./data/flan")
    url: str = f"{HUB}Muennighoff/flan/resolve/main"
    """Base URL of the files."""
    subsets: Optional[str] = None
    """Comma-separated names of the data sets to use: aeslc_10templates,squad_v2_10templates. Default: all of them."""

    renamed: ClassVar[dict[str, str]] = {"inputs": "instruction", "targets": "output"}

    def __post_init__(self) -> None:
        if not self.subsets and not self.url.startswith(HUB):
            raise UserError("data.subsets is missing: only the hub lists the files below data.url, so name those to use")

    def addresses(self) -> tuple[dict[str, str], dict[str, str]]:
        names = [name.strip() for name in (self.subsets or "*").split(",")]
        train, val = ([f"{name}_{split}.jsonl" for name in names] for split in ("train", "test"))
        return {file: f"{self.url}/train/{file}" for file in train}, {file: f"{self.url}/test/{file}" for file in val}


@dataclass(kw_only=True)
class LongForm(_Parts):
    """24,000 texts with the instructions that they answer; downloaded once."""

    prompt_style: str | None = "longform"
    """Name of a prompt style, or "chat" for the checkpoint's own template."""
    download_dir: Path = Path("./data/longform")

    url = "https://raw.githubusercontent.com/akoksal/LongForm/main/dataset"
    renamed: ClassVar[dict[str, str]] = {"input": "instruction", "output": "output"}

    def addresses(self) -> tuple[dict[str, str], dict[str, str]]:
        return {"train.json": f"{self.url}/train.json"}, {"val.json": f"{self.url}/val.json"}


@dataclass(kw_only=True)
class LIMA(Downloaded):
    """1,000 questions with carefully chosen answers, and 30 conversations. The hub requires you to accept the terms first."""

    include_multiturn_conversations: bool = False
    """Make a sample of every question and its answer. Otherwise of the first in each conversation."""
    download_dir: Path = Path("./data/lima")
    """Folder for the downloaded file."""
    repo_id: str = "GAIR/lima"
    """The data set on the hub."""
    access_token: Optional[str] = field(default=None, repr=False)
    """Hugging Face token. Default: HF_TOKEN in the environment, or the saved login."""

    def addresses(self) -> tuple[dict[str, str], dict[str, str]]:
        return {"train.jsonl": f"{HUB}{self.repo_id}/resolve/main/train.jsonl"}, {}

    def convert(self, row: Any) -> list[Any]:
        return pairs(row.get("conversations") or [] if isinstance(row, dict) else [], self.include_multiturn_conversations)


def pairs(texts: list[Any], every: bool) -> list[dict[str, Any]]:
    """Return a record for each question and answer in a list of turns' texts, or for the first pair only."""
    found = [{"instruction": texts[i], "output": texts[i + 1]} for i in range(0, len(texts) - 1, 2)]
    return found if every else found[:1]
