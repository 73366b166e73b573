"""The header of a GGUF file, checked, and its tensors.

It is not parsed by the `gguf` library: every count, length and offset is compared with the size of the file before it is used, so a broken
or hostile file gives one clear message. Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. Quantised tensors are dequantised by
`gguf.dequantize`.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from litgpt.convert.gguf import SPLIT
from litgpt.errors import UserError

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct codes by value type
STRING, ARRAY = 8, 9
CHUNK = 2**22  # numbers that are converted to or from fp32 at a time
BROKEN = "it is truncated or broken, download it again"


class Tensor(NamedTuple):
    """A tensor in a file. `shape` is in torch's order: rows first."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    content: np.ndarray  # its bytes in the memory map of the file
    map: mmap.mmap


class Source:
    """The description of a model in a file's header, or in the plan of a file, with typed access to its metadata:
    `source.size("llama.block_count")`. A value of the wrong type raises UserError.
    """

    path: Path
    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]  # of all tensors

    def array(self, name: str) -> np.ndarray:
        """Return a tensor as an fp32 array."""
        raise NotImplementedError

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a value of the type `kind`."""
        value = self.metadata.get(key, default)
        if value is None:
            raise UserError(f"{self.path} has no {key}")
        if not isinstance(value, kind):
            raise UserError(f"{self.path}: {key} is {str(value)[:100]}, which is not supported")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """Return a positive integer."""
        value = self.get(key, int, default)
        if value < 1:
            raise UserError(f"{self.path}: {key} is {value}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """Return a positive number: the shortest decimal that rounds to the stored fp32, 1e-05 for 9.99999974e-06."""
        value = float(str(np.float32(self.get(key, (int, float), default))))
        if not 0 < value < math.inf:
            raise UserError(f"{self.path}: {key} is {value}")
        return value


class Reader(Source):
    """The header of a GGUF file: `metadata` (arrays of numbers as numpy arrays) and `tensors`.

    Raises UserError for anything but a complete, little-endian GGUF file of version 2 or 3.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else None
        self._data = np.frombuffer(self._map or b"", np.uint8)
        self.metadata, self.shapes = {}, {}
        self.tensors: dict[str, Tensor] = {}
        self._read()

    def _error(self, problem: str) -> UserError:
        return UserError(f"{self.path}: {problem} (GGUF, byte {self._at} of {len(self._data)})")

    def _take(self, size: int) -> np.ndarray:
        """Return the next `size` bytes."""
        if size > len(self._data) - self._at:
            raise self._error(f"the file ends here, but {size} more bytes are announced; {BROKEN}")
        self._at += size
        return self._data[self._at - size : self._at]

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)).tobytes())[0]

    def _count(self, least: int) -> int:
        """Return a count of entries that take at least `least` bytes each."""
        count = self._number("Q")
        if count * least > len(self._data) - self._at:
            raise self._error(f"{count} entries are announced, more than the rest of the file can hold; {BROKEN}")
        return count

    def _string(self) -> str:
        try:
            return self._take(self._count(1)).tobytes().decode("utf-8")
        except UnicodeDecodeError:
            raise self._error("a text is not UTF-8") from None

    def _value(self, kind: int, in_array: bool = False) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY or in_array:
            raise self._error(f"value type {kind}{' in an array' if in_array else ''} is not supported")
        kind = self._number("I")
        if kind in SCALARS:
            dtype = np.dtype("<" + SCALARS[kind])
            return self._take(self._count(dtype.itemsize) * dtype.itemsize).view(dtype)
        return [self._value(kind, in_array=True) for _ in range(self._count(8))]

    def _read(self) -> None:
        magic = self._data[:4].tobytes()
        if magic != b"GGUF":
            raise self._error(f"a GGUF file starts with b'GGUF', this one with {magic!r}")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            format_ = "big-endian data" if version & 0xFFFF == 0 and version else f"version {version}"
            raise self._error(f"{format_} found, but only versions 2 and 3, little-endian, are supported")
        n_tensors, n_values = self._count(24), self._count(13)  # the least bytes of a tensor's and a value's entry
        for _ in range(n_values):
            key = self._string()
            if key in self.metadata:
                raise self._error(f"the key {key!r} occurs twice")
            self.metadata[key] = self._value(self._number("I"))
        entries = [self._tensor_entry() for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {alignment!r}, a power of two from 8 on is expected")
        start = -(-self._at // alignment) * alignment
        for name, dims, kind, offset in entries:
            if name in self.tensors:
                raise self._error(f"tensor {name!r} occurs twice")
            self.tensors[name] = self._tensor(name, dims, kind, start + offset, alignment)
            self.shapes[name] = self.tensors[name].shape

    def _tensor_entry(self) -> tuple[str, list[int], int, int]:
        name, n_dims = self._string(), self._number("I")
        if not 1 <= n_dims <= 4:
            raise self._error(f"tensor {name!r} has {n_dims} dimensions, 1 to 4 are possible")
        return name, [self._number("Q") for _ in range(n_dims)], self._number("I"), self._number("Q")

    def _tensor(self, name: str, dims: list[int], kind: int, start: int, alignment: int) -> Tensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if kind not in GGML_QUANT_SIZES:
            raise self._error(f"tensor {name!r} has the unknown type {kind}")
        known = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[known]
        if min(dims) < 1 or dims[0] % block:
            raise self._error(f"tensor {name!r} has the impossible dimensions {dims}")
        size = math.prod(dims) // block * block_bytes
        if start % alignment or start + size > len(self._data):
            raise self._error(f"tensor {name!r} is at the bytes {start} to {start + size}: {BROKEN}")
        assert self._map is not None
        return Tensor(tuple(reversed(dims)), known, self._data[start : start + size], self._map)

    def add(self, part: Reader) -> None:
        """Add the tensors of another part of a split file."""
        if twice := self.tensors.keys() & part.tensors.keys():
            raise self._error(f"tensor {min(twice)!r} occurs in {part.path} too")
        self.tensors |= part.tensors
        self.shapes |= part.shapes

    def array(self, name: str) -> np.ndarray:
        return self.load(name).numpy()

    def load(self, name: str, dtype: torch.dtype | None = None, part: int | None = None) -> torch.Tensor:
        """Return a tensor in `dtype` (default: fp32), or one of the parts along its first dimension."""
        from gguf import dequantize

        tensor = self.tensors[name]
        shape = tensor.shape if part is None else tensor.shape[1:]
        rows, columns = math.prod(shape[:-1]), shape[-1]
        content = tensor.content if part is None else tensor.content.reshape(tensor.shape[0], -1)[part]
        content = content.reshape(rows, -1)
        numbers = torch.empty(rows, columns, dtype=dtype or torch.float32)
        step = max(1, CHUNK // columns)
        for start in range(0, rows, step):
            with np.errstate(all="ignore"):  # broken scales give nan
                chunk = dequantize(content[start : start + step], tensor.kind)
            numbers[start : start + step] = torch.from_numpy(np.require(chunk, np.float32, "W"))
            tensor.map.madvise(mmap.MADV_DONTNEED)  # release the pages that were read
        return numbers.view(shape)


def open_gguf(path: Path) -> Reader:
    """Return the reader of a file, or of all parts of a split file if `path` is one of them, as llama.cpp names them.

    Raises UserError for parts that are missing or do not belong together.
    """
    reader = Reader(path)
    count = reader.get("split.count", int, 0)
    if count < 2:
        return reader
    match = SPLIT.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise UserError(f"{path} is one of {count} parts (split.count): their names must end in -00001-of-{count:05}.gguf and so on")
    parts = [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise UserError(f"{path} is one of {count} parts: {', '.join(missing[:5])} {'are' if missing[1:] else 'is'} missing next to it")
    first, *others = (reader if part == path else Reader(part) for part in parts)
    for number, part in enumerate((first, *others)):
        if [part.get(f"split.{key}", int, -1) for key in ("no", "count")] != [number, count]:
            raise UserError(f"{part.path} is not the part that its name says (split.no, split.count): download it again")
        if number:
            first.add(part)
    if (total := first.get("split.tensors.count", int, len(first.tensors))) != len(first.tensors):
        raise UserError(f"{first.path}: the parts hold {len(first.tensors)} tensors instead of {total}: download them again")
    return first
