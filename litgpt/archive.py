"""The records of a `.pth` file, a zip. torch trusts their sizes when it maps the file: it could read bytes of a neighbouring record."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

from litgpt.files import read_bytes


def is_mappable(path: Path) -> bool:
    """Return True if a torch file is a zip, torch's format since 1.6. Older files cannot be mapped."""
    return read_bytes(path, "is missing", most=None, count=4) == b"PK\x03\x04"


def refuse_compressed(path: Path) -> None:
    """Raise ValueError for a zip with compressed entries, which torch never writes: a kilobyte of them can fill the memory."""
    with zipfile.ZipFile(path) as content:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in content.infolist()):
            raise ValueError("its entries are compressed")


def require_full_records(path: Path) -> None:
    """Raise ValueError if a tensor's elements do not fill exactly one record. For files that `torch.load` accepts."""
    with zipfile.ZipFile(path) as content:
        sizes = {name.partition("/")[2]: content.getinfo(name).file_size for name in content.namelist()}
        if len(sizes) < len(content.namelist()):
            raise ValueError("two of its records have one name")
        storages = _Storages(io.BytesIO(content.read(next(name for name in content.namelist() if name.endswith("/data.pkl")))))
        storages.needed = {}
        storages.load()
    for record, needed in storages.needed.items():
        if sizes[record] != needed:
            raise ValueError(f"its record {record} has {sizes[record]:,} bytes, and the tensor in it {needed:,}")


class _Nothing(dict[Any, Any]):
    """Stands for every class that a pickle names."""

    def __init__(self, *args: Any) -> None: ...
    def __setstate__(self, state: Any) -> None: ...


class _Storages(pickle._Unpickler):  # in Python: the C version allocates whatever memory a number in the file requests
    """Collects the bytes that each record needs."""

    needed: dict[str, int]

    def find_class(self, module: str, name: str) -> Any:
        import torch

        return getattr(torch, name) if name.endswith("Storage") else _Nothing

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, numbers = pid
        self.needed[f"data/{key}"] = numbers * (kind.dtype.itemsize if hasattr(kind, "dtype") else 1)
        return _Nothing()
