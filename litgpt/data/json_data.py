"""A user's own data: a file, a folder with a training and a validation file, or a data set of the Hugging Face hub."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from litgpt.data.base import DataModule
from litgpt.data.records import Record
from litgpt.data.sources import VALIDATION, is_dataset, named, read_dataset, read_records
from litgpt.errors import UserError
from litgpt.files import expand_path


@dataclass(kw_only=True)
class JSON(DataModule):
    """Records of a .json (a list), .jsonl, .ndjson (one per line), .csv, .tsv, .parquet or .arrow file, of a folder with a train and a val
    file, or of a data set that the `datasets` library reads: a folder, or ORG/NAME on the hub. Text files may end in .gz.

    `litgpt.data.records` lists the forms of a record. A `weight` multiplies the loss of
    a record or of a turn; a turn with `weight` 0 or `train` false is read, not learned.
    """

    json_path: Path | None = field(default=None, kw_only=False)
    """The file, the folder with a train and a val file, or the data set."""
    val_split_fraction: float | None = None
    """Share of the samples held out for validation. Default: 0.05. Leave it unset for a folder, which has a validation file."""

    path_key: ClassVar[str] = "json_path"

    def records(self) -> tuple[list[Record], list[Record] | None]:
        """Read and check all records. Raise UserError with the file, the line or record, and the problem."""
        if self.json_path is None:
            raise UserError("data.json_path is missing: name a .json or .jsonl file, or a folder with train.json and val.json")
        path = expand_path(self.json_path)
        if is_dataset(path):
            train, val = read_dataset(path)
            return train, val if self.val_split_fraction is None else None
        if not path.is_dir():
            return read_records(path), None
        train_file, val_file = _find_file(path, ("train",)), _find_file(path, VALIDATION)
        if self.val_split_fraction is not None:
            raise UserError(
                f"data.val_split_fraction is set, but {path} has its own validation file {val_file.name}: leave one of them out"
            )
        return read_records(train_file), read_records(val_file)


def _find_file(folder: Path, stems: tuple[str, ...]) -> Path:
    for stem in stems:
        files = named(folder, stem)
        if len(files) > 1:
            raise UserError(f"{folder} has both {files[0].name} and {files[1].name}: remove one")
        if files:
            return files[0]
    raise UserError(
        f"{folder} has no {stems[0]}.json or {stems[0]}.jsonl: a data folder needs a train and a val file. "
        "To split one file, give the file itself as data.json_path"
    )
