"""A sample of 2,000 records of the Alpaca data (huggingface.co/datasets/mhenrichsen/alpaca_2k_test)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from litgpt.data.alpaca import Alpaca


@dataclass
class Alpaca2k(Alpaca):
    """2,000 instruction / input / output records, downloaded from the Hugging Face hub once."""

    val_split_fraction: float | None = 0.05
    """Share of the samples that is kept for validation: 100 of them."""
    download_dir: Path = Path("./data/alpaca2k")
    """Folder for the downloaded file."""

    repo_id: ClassVar[str] = "mhenrichsen/alpaca_2k_test"
    repo_file: ClassVar[str] = "alpaca_2000.parquet"
    file_name: ClassVar[str] = "alpaca2k_data_cleaned_archive.json"
