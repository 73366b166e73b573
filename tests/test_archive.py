"""The records of a `.pth` file: a tensor's numbers are exactly one of them, in the order of bytes that the file states."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from litgpt.checkpoint import load_weights
from litgpt.errors import UserError

WEIGHTS = {"a": torch.arange(64.0), "b": torch.arange(16, dtype=torch.bfloat16), "c": torch.arange(4, dtype=torch.float64)}


def rewritten(folder: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """WEIGHTS as torch saves them, with other contents of the records."""
    file = folder / "changed.pth"
    torch.save(WEIGHTS, folder / "sound.pth")
    with zipfile.ZipFile(folder / "sound.pth") as sound, zipfile.ZipFile(file, "w") as changed:
        for name in sound.namelist():
            changed.writestr(name, change(name.partition("/")[2], sound.read(name)))
    return file


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("content", [b"", bytes(255), bytes(260)])
def test_a_record_of_another_size_than_its_tensor(content: bytes, mapped: bool, tmp_path: Path) -> None:
    file = rewritten(tmp_path, lambda name, old: content if name == "data/0" else old)
    with pytest.raises(UserError, match=f"changed.pth is not a readable checkpoint.*\\b{len(content)} bytes"):
        load_weights(file, mapped)


@pytest.mark.parametrize("mapped", [True, False])
def test_a_file_of_a_big_endian_machine(mapped: bool, tmp_path: Path) -> None:
    sizes = {f"data/{number}": value.itemsize for number, value in enumerate(WEIGHTS.values())}

    def turned(name: str, old: bytes) -> bytes:
        size = sizes.get(name, 1)
        return b"big" if name == "byteorder" else b"".join(old[at : at + size][::-1] for at in range(0, len(old), size))

    file = rewritten(tmp_path, turned)
    before = hashlib.sha256(file.read_bytes()).digest()
    read = load_weights(file, mapped)
    assert all(torch.equal(read[name], value) for name, value in WEIGHTS.items())
    assert hashlib.sha256(file.read_bytes()).digest() == before


def test_one_record_for_several_tensors(tmp_path: Path) -> None:
    torch.save({"a": WEIGHTS["a"], "part": WEIGHTS["a"][3:7], "empty": torch.zeros(0)}, tmp_path / "x.pth")
    read = load_weights(tmp_path / "x.pth")
    assert read["part"].tolist() == [3, 4, 5, 6] and read["part"].data_ptr() == read["a"].data_ptr() + 12
