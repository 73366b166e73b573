"""Weight files written one tensor at a time, so that a whole model is never in memory: `.pth` and safetensors.

They are written into a folder of `atomic.new_folder`, or to `atomic.new_file`, which flush to disk and reveal only complete files.
"""

import json
import math
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any, NamedTuple
from zipfile import ZIP64_LIMIT, ZipFile, ZipInfo

import torch

from litgpt.convert.names import Load
from litgpt.errors import UserError

PTH_ALIGNMENT, HEADER_ALIGNMENT = 64, 8  # bytes: of a record of a `.pth` file, and of the header's length in a safetensors file
PADDING = 0x4246  # type of the zip field that torch uses as padding


class Pending(NamedTuple):
    """A tensor that is not loaded yet."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """The size of its data."""
        return self.dtype.itemsize * math.prod(self.shape)


class _Storage(tuple[Any, ...]):
    """A record of a `.pth` file, as `torch.load` knows it: ("storage", its class, the <number> of `data/<number>`, "cpu", its length)."""


class _Tensor:
    """Pickled as a contiguous tensor that fills a record."""

    def __init__(self, storage: _Storage, tensor: torch.Tensor) -> None:
        self.parts: tuple[Any, ...] = (storage, 0, tuple(tensor.shape), tensor.stride(), False, OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.parts


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        return tuple(value) if isinstance(value, _Storage) else None


def write_pth(plan: Mapping[tuple[str, ...], Load], file: Path | IO[bytes]) -> None:
    """Load the plan's tensors one after the other and write them to a new file that `torch.load` reads like one of `torch.save`.

    Layout: an uncompressed zip with a record `data/<number>` for each tensor's bytes and the pickled state dict in `data.pkl`
    (docs.pytorch.org/docs/stable/notes/serialization.html). torch's own record writer ends the process if the disk is full.
    """
    kinds: dict[torch.dtype, Any] = {torch.float32: torch.FloatStorage, torch.bfloat16: torch.BFloat16Storage}
    kinds |= {torch.float16: torch.HalfStorage, torch.float64: torch.DoubleStorage}
    with ZipFile(file, "w") as archive:
        state: dict[str, _Tensor] = {}
        for number, (keys, load) in enumerate(plan.items()):
            tensor = load().contiguous()
            _add(archive, f"data/{number}", _data(tensor))
            storage = _Storage(("storage", kinds[tensor.dtype], str(number), "cpu", tensor.numel()))
            state |= dict.fromkeys(keys, _Tensor(storage, tensor))
            del tensor  # before the next one is loaded
        pickled = BytesIO()
        _Pickler(pickled, protocol=2).dump(state)
        for name, content in (("data.pkl", pickled.getbuffer()), ("byteorder", sys.byteorder.encode()), ("version", b"3\n")):
            _add(archive, name, content)


def _add(archive: ZipFile, name: str, content: Any) -> None:
    """Add a record, its content aligned by a field that readers skip."""
    record = ZipInfo(f"archive/{name}")
    record.file_size = memoryview(content).nbytes
    long = record.file_size > ZIP64_LIMIT // 2
    before = archive.start_dir + 30 + len(record.filename) + 20 * long + 4  # the local header, its long sizes, the field's own head
    record.extra = struct.pack("<HH", PADDING, -before % PTH_ALIGNMENT) + bytes(-before % PTH_ALIGNMENT)
    with archive.open(record, "w", force_zip64=long) as target:
        target.write(content)


def _data(tensor: torch.Tensor) -> Any:
    """Return the bytes of a contiguous tensor without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def write_safetensors(tensors: Mapping[str, Pending], path: Path) -> None:
    """Load the tensors one after the other and write them to one file.

    Layout: the header's length (8 bytes), the header (JSON: dtype, shape and place of each tensor), the bytes
    (github.com/huggingface/safetensors#format). Wide numbers come first, which aligns all of them.
    """
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, pending in ordered:
        if pending.dtype not in names:
            raise UserError(f"the tensor for {name} holds {pending.dtype}, not floating-point numbers: convert the unquantised model")
        start, end = end, end + pending.nbytes
        header[name] = {"dtype": names[pending.dtype], "shape": pending.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, pending in ordered:
            tensor = pending.load().contiguous()
            assert tensor.dtype == pending.dtype and tuple(tensor.shape) == pending.shape, name
            file.write(_data(tensor))
            del tensor  # before the next one is loaded


def write_sharded(tensors: Mapping[str, Pending], folder: Path, largest: int) -> None:
    """Write model.safetensors, or parts of at most `largest` bytes and their index, as transformers names them."""
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        dict(tensors), get_storage_size=lambda pending: pending.nbytes, filename_pattern="model{suffix}.safetensors", max_shard_size=largest
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name, group in split.filename_to_tensors.items():
        write_safetensors({tensor: tensors[tensor] for tensor in group}, folder / name)
