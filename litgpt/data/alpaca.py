"""The Alpaca data: 52,000 instructions, in the cleaned version (huggingface.co/datasets/yahma/alpaca-cleaned)."""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from litgpt.atomic import write_text
from litgpt.data.base import DataModule
from litgpt.data.records import Record
from litgpt.data.sources import read_records, read_rows
from litgpt.errors import UserError
from litgpt.files import expand_path, fetch

MOST_DOWNLOAD = 2**32  # bytes


@dataclass
class Alpaca(DataModule):
    """52,000 instruction / input / output records, downloaded from the Hugging Face hub once."""

    val_split_fraction: float | None = 0.03865
    """Share of the samples that is kept for validation: 2,000 of them."""
    download_dir: Path = Path("./data/alpaca")
    """Folder for the downloaded file."""
    file_url: str = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"
    """Address of another file to download. The default, LitGPT's, stands for its records on the hub."""
    file_name: str = "alpaca_data_cleaned_archive.json"
    """Name of the file in download_dir."""

    repo_id: ClassVar[str] = "yahma/alpaca-cleaned"
    repo_file: ClassVar[str] = "alpaca_data_cleaned.json"

    def __post_init__(self) -> None:
        if Path(self.file_name).name != self.file_name:
            raise UserError(f"data.file_name is {self.file_name!r}: the name of a file in data.download_dir is needed")

    @property
    def source(self) -> str:
        return str(self.file)

    @property
    def file(self) -> Path:
        """Path of the file with the records."""
        return expand_path(self.download_dir) / self.file_name

    def is_ready(self) -> bool:
        return self.file.is_file()

    def prepare_data(self) -> None:
        """Download the records if they are missing. A failure is a UserError that says which file to put where."""
        if not self.is_ready():
            by_hand = self.file.with_name(self.repo_file)
            rows = read_rows(by_hand) if by_hand.is_file() else self._download()
            write_text(self.file, json.dumps(rows, ensure_ascii=False, indent=1))

    def records(self) -> tuple[list[Record], list[Record] | None]:
        self.prepare_data()
        return read_records(self.file), None

    def _download(self) -> list[Any]:
        from huggingface_hub import hf_hub_download

        folder = Path(tempfile.mkdtemp(prefix="alpaca-"))
        try:
            if self.file_url != Alpaca.file_url:
                (folder / self.file_name).write_bytes(fetch(self.file_url, MOST_DOWNLOAD))
                return read_rows(folder / self.file_name)
            return read_rows(Path(hf_hub_download(self.repo_id, self.repo_file, repo_type="dataset", local_dir=folder)))
        except UserError:
            raise
        except Exception as error:  # the hub's client raises errors of several libraries
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise UserError(
                f"{self.repo_file} of the dataset {self.repo_id} could not be downloaded ({reason[:200]}). Without a network, put that "
                f"file, or its records as a JSON list named {self.file_name}, into {self.file.parent}"
            ) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Alpaca2k(Alpaca):
    """2,000 instruction / input / output records, downloaded from the Hugging Face hub once."""

    val_split_fraction: float | None = 0.05
    """Share of the samples that is kept for validation: 100 of them."""
    download_dir: Path = Path("./data/alpaca2k")
    """Folder for the downloaded file."""
    repo_id: str = "mhenrichsen/alpaca_2k_test"  # type: ignore[misc]
    """The data set on the hub."""
    file_name: str = "alpaca2k_data_cleaned_archive.json"
    """Name of the file in download_dir."""

    repo_file: ClassVar[str] = "alpaca_2000.parquet"
