"""Data sets whose files are downloaded once into a folder, from the Hugging Face hub or another address."""

import fnmatch
import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from litgpt.atomic import write_bytes, write_text
from litgpt.data.base import DataModule
from litgpt.data.records import Record
from litgpt.data.sources import check_rows, read_rows
from litgpt.errors import UserError
from litgpt.files import expand_path, fetch
from litgpt.streams import drawing
from litgpt.text import first_line

HUB = "https://huggingface.co/datasets/"  # files below it come through the hub's client: HF_ENDPOINT and tokens apply
MOST_DOWNLOAD = 2**32  # bytes
DOWNLOAD_SECONDS = 3600


@dataclass(kw_only=True)
class Downloaded(DataModule):
    """Records of files that are downloaded once."""

    download_dir: Path = Path("./data")
    """Folder for the downloaded files."""

    renamed: ClassVar[dict[str, str]] = {}  # the keys of a row that are read -> their names in a record; {}: all keys, as they are

    @abstractmethod
    def addresses(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the address of each training file by its name in `download_dir`, and those of the validation files if there are any.

        A name may be a pattern that matches several files on the hub.
        """

    def records(self) -> tuple[list[Record], list[Record] | None]:
        self.prepare_data()
        train, val = self.addresses()
        return self._read(train), self._read(val) if val else None

    @property
    def folder(self) -> Path:
        """The folder of the downloaded files."""
        return expand_path(self.download_dir)

    @property
    def source(self) -> str:
        return str(self.folder)

    def files(self, name: str) -> list[Path]:
        """Return the files in the folder that match this name or pattern, sorted."""
        names = sorted(path.name for path in self.folder.iterdir()) if self.folder.is_dir() else []
        chosen = [name] if name in names else fnmatch.filter(names, name)  # a name with brackets is not a pattern
        return [self.folder / found for found in chosen if (self.folder / found).is_file()]

    def is_ready(self) -> bool:
        return all(self.files(name) for part in self.addresses() for name in part)

    def prepare_data(self) -> None:
        """Download the files that are missing. A failure is a UserError that says which file to put where."""
        for name, address in (entry for part in self.addresses() for entry in part.items()):
            if not self.files(name):
                by_hand = self.folder / address.rpartition("/")[2]
                if by_hand.is_file():
                    write_rows(by_hand, self.folder / name)
                elif address.startswith(HUB):
                    download_from_hub(address, self.folder, name, getattr(self, "access_token", None))
                else:
                    write_bytes(self.folder / name, fetch(address, MOST_DOWNLOAD, DOWNLOAD_SECONDS))

    def _read(self, names: Iterable[str]) -> list[Record]:
        """Return the records of the files with these names or patterns."""
        records = list[Record]()
        for file in (file for name in names for file in self.files(name)):
            rows = [(f"record {n}", converted) for n, row in enumerate(read_rows(file), 1) for converted in self.convert(row)]
            records += check_rows(rows, str(file))
        return records

    def convert(self, row: Any) -> list[Any]:
        """Return the records of a row of a file, in a form that `litgpt.data.records` reads."""
        is_renamed = self.renamed and isinstance(row, dict)
        return [{new: row[old] for old, new in self.renamed.items() if old in row} if is_renamed else row]


def download_from_hub(address: str, folder: Path, name: str, token: str | None = None) -> None:
    """Download a file of a data set, or all files that match a pattern, into `folder`; a single file is named `name`.

    The files appear once all are complete. After an interrupted download, complete files are not fetched again. Raises UserError.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    repo, file = address.removeprefix(HUB).split("/resolve/main/")
    partial = folder / ".download"

    def arrived() -> list[Path]:
        return [path for path in partial.rglob("*") if path.is_file() and fnmatch.fnmatch(str(path.relative_to(partial)), file)]

    try:
        with drawing():
            huggingface_hub.snapshot_download(
                repo, repo_type="dataset", allow_patterns=[file], local_dir=partial, token=token, endpoint=os.environ.get("HF_ENDPOINT")
            )
        if not (paths := arrived()):
            raise FileNotFoundError("the data set has no such file")
        for path in paths:
            target = folder / (path.name if "*" in name else name)
            if path.suffix == target.suffix:
                path.replace(target)
            else:
                write_rows(path, target)
        shutil.rmtree(partial)
    except UserError:
        raise
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = first_line(error)[:200]
        if not arrived():
            shutil.rmtree(partial, ignore_errors=True)
        gated = f"Accept the terms at {HUB}{repo}, then give HF_TOKEN in the environment. " if isinstance(error, GatedRepoError) else ""
        own = "" if "*" in name or name == file.rpartition("/")[2] else f", or its records as a JSON list named {name},"
        raise UserError(
            f"{file} of the dataset {repo} could not be downloaded ({reason}). {gated}Without a network, put that file{own} into {folder}"
        ) from None


def write_rows(path: Path, target: Path) -> None:
    """Write the rows of a data file as a JSON list."""
    write_text(target, json.dumps(read_rows(path), ensure_ascii=False, indent=1))
