"""The Alpaca data: 52,000 instructions with an input and an output, and data sets of that form."""

from dataclasses import dataclass
from pathlib import Path

from litgpt.data.downloads import HUB, Downloaded
from litgpt.errors import UserError

DEFAULT = "No data given: Alpaca, 52,000 instructions with answers, as in LitGPT. Your own: --data FILE"


@dataclass(kw_only=True)
class Alpaca(Downloaded):
    """52,000 instruction / input / output records in the cleaned version, downloaded once."""

    val_split_fraction: float | None = 0.03865
    """Share of the samples held out for validation: 2,000 of them."""
    download_dir: Path = Path("./data/alpaca")
    """Folder for the downloaded file."""
    file_url: str = "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"
    """URL of another file to download. For the default, LitGPT's URL, the same records are read from the hub."""
    file_name: str = "alpaca_data_cleaned_archive.json"
    """Name of the file in download_dir."""

    def __post_init__(self) -> None:
        if Path(self.file_name).name != self.file_name:
            raise UserError(f"data.file_name is {self.file_name!r}: the name of a file in data.download_dir is needed")

    @property
    def source(self) -> str:
        return str(self.folder / self.file_name)

    def addresses(self) -> tuple[dict[str, str], dict[str, str]]:
        return {self.file_name: self.on_hub() if self.file_url == Alpaca.file_url else self.file_url}, {}

    def on_hub(self) -> str:
        """Return the address of the records that LitGPT's `file_url` stands for."""
        return f"{HUB}yahma/alpaca-cleaned/resolve/main/alpaca_data_cleaned.json"


@dataclass(kw_only=True)
class Alpaca2k(Alpaca):
    """2,000 instruction / input / output records, downloaded once."""

    val_split_fraction: float | None = 0.05
    """Share of the samples held out for validation: 100 of them."""
    download_dir: Path = Path("./data/alpaca2k")
    repo_id: str = "mhenrichsen/alpaca_2k_test"
    """The data set on the hub."""
    file_name: str = "alpaca2k_data_cleaned_archive.json"

    def on_hub(self) -> str:
        return f"{HUB}{self.repo_id}/resolve/main/alpaca_2000.parquet"


@dataclass(kw_only=True)
class AlpacaGPT4(Alpaca):
    """52,000 instruction / input / output records with the answers of GPT-4, downloaded once."""

    val_split_fraction: float | None = 0.03847
    download_dir: Path = Path("./data/alpacagpt4")
    file_url: str = "https://raw.githubusercontent.com/Instruction-Tuning-with-GPT-4/GPT-4-LLM/main/data/alpaca_gpt4_data.json"
    """Address of the file."""
    file_name: str = "alpacagpt4_data_cleaned_archive.json"


@dataclass(kw_only=True)
class Dolly(Alpaca):
    """15,000 instruction / context / response records written by people, downloaded once."""

    val_split_fraction: float | None = 0.1
    """Share of the samples held out for validation."""
    download_dir: Path = Path("./data/dolly")
    file_url: str = f"{HUB}databricks/databricks-dolly-15k/resolve/main/databricks-dolly-15k.jsonl"
    """Address of the file."""
    file_name: str = "dolly_data_cleaned.json"
