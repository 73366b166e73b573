"""LitData's files, as litdata 0.2.76 wrote them, and the sets that LitGPT makes of them."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from litgpt.data import LitData, MicroLlama, TinyLlama
from litgpt.data.lit_data import chunks
from litgpt.errors import UserError
from litgpt.prompts import PromptStyle

# litdata.streaming.writer.BinaryWriter(folder, chunk_size=40, item_loader=TokensLoader(1)) with 9 items of int32, 0 ... 98
FILES = {
    "chunk-0-0.bin": ("eNotzWsSgQAYQNFP8qgoRcmjsAdLsRjLsdTOjO7M+X3TiOh58+HLL/4tSFiSsmLNhi0ZOQU79pRUHKhpOHKipeM8Py9cuXFnYOTBkxcTYoMD7g=="),
    "chunk-0-1.bin": ("eNotzscRgkAAAMCboQUqEBOCYCAYEBW1H4qiUPfBY/8bhRBiXoxMLEhYsmLNhi0pOzJy9hSUHDhy4kxFTUPLhSs37nQ86HnOhzcDH778+AOytgiq"),
    "chunk-0-2.bin": ("eNotx7cRg0AAALA/JmAqMsbk4ASehcFRQaFCUQghJuMkIb2fU1BSUfOg4UlLR8/AyMTMwsrGizcfvvzYOfhzAYWiCmM="),
}
INDEX: dict[str, Any] = {
    "chunks": [
        {"chunk_bytes": 160, "chunk_size": 4, "dim": 34, "filename": "chunk-0-0.bin"},
        {"chunk_bytes": 164, "chunk_size": 3, "dim": 36, "filename": "chunk-0-1.bin"},
        {"chunk_bytes": 132, "chunk_size": 2, "dim": 29, "filename": "chunk-0-2.bin"},
    ],
    "config": {
        "chunk_bytes": None,
        "chunk_size": 40,
        "compression": None,
        "compression_batch_size": None,
        "compression_level": None,
        "data_format": ["no_header_tensor:16"],
        "data_spec": '[1, {"type": None, "context": None, "children_spec": []}]',
        "encryption": None,
        "ipc_compression": None,
        "item_loader": "TokensLoader",
        "types": "tensor",
    },
    "updated_at": "0",
}


class Tokenizer:
    vocab_size = 99

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def write(folder: Path, **config: Any) -> Path:
    """Write litdata's files; `config` changes its settings."""
    folder.mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(zlib.decompress(base64.b64decode(content)))
    (folder / "index.json").write_text(json.dumps({**INDEX, "config": {**INDEX["config"], **config}}))
    return folder


def made(folder: Path, start: int, count: int) -> Path:
    """Write one chunk of uint16 tokens."""
    folder.mkdir(parents=True)
    header = np.array([1, 12, 12 + 2 * count], "<u4").tobytes()
    (folder / "chunk-0-0.bin").write_bytes(header + np.arange(start, start + count, dtype="<u2").tobytes())
    settings = {"compression": None, "data_format": ["no_header_tensor:20"]}
    chunk = {"chunk_size": 1, "dim": count, "filename": "chunk-0-0.bin"}
    (folder / "index.json").write_text(json.dumps({"chunks": [chunk], "config": settings}))
    return folder


def blocks(data: Any, length: int) -> tuple[list[list[int]], list[list[int]]]:
    splits = data.splits(Tokenizer(), PromptStyle.from_name("default"), length)
    assert all(list(sample.loss_mask) == [0] + [1] * length for sample in splits.train)
    return [list(sample.input_ids) for sample in splits.train], [list(sample.input_ids) for sample in splits.val]


def test_the_tokens_of_litdatas_own_files(tmp_path: Path) -> None:
    assert [chunk.tolist() for chunk in chunks(write(tmp_path / "a"))] == [
        list(range(34)),
        list(range(34, 70)),
        list(range(70, 99)),
    ]


def test_blocks_end_with_their_chunk(tmp_path: Path) -> None:
    """Of 34, 36 and 29 tokens, as litdata's TokensLoader cuts them; the last block is for validation."""
    train, val = blocks(LitData(data_path=write(tmp_path / "a")), 15)
    starts = [0, 16, 34, 50]
    assert train == [list(range(start, start + 16)) for start in starts] and val == [list(range(70, 86))]


def test_folders_of_training_and_validation(tmp_path: Path) -> None:
    write(tmp_path / "train")
    made(tmp_path / "val", 5, 9)
    train, val = blocks(LitData(data_path=tmp_path, split_names=["train", "val"]), 3)
    assert len(train) == 8 + 9 + 7 and val == [[5, 6, 7, 8], [9, 10, 11, 12]]
    with pytest.raises(UserError, match=r"val_split_fraction is set, and data.split_names"):
        blocks(LitData(data_path=tmp_path, split_names=["train", "val"], val_split_fraction=0.1), 3)


@pytest.mark.parametrize(("web", "code", "expected"), [(90, 90, (45, 20)), (90, 30, (34, 15))])
def test_tinyllama_mixes_in_its_shares(tmp_path: Path, web: int, code: int, expected: tuple[int, int]) -> None:
    """Until one of the two is used up: 0.693584 and 0.306416 of the blocks of two tokens."""
    made(tmp_path / "slimpajama" / "train", 0, web)
    made(tmp_path / "slimpajama" / "val", 0, 4)
    with pytest.raises(UserError, match="starcoder is missing: name their folder as data.data_path"):
        blocks(TinyLlama(data_path=tmp_path), 1)
    assert len(blocks(MicroLlama(data_path=tmp_path), 1)[0]) == web // 2
    made(tmp_path / "starcoder", 9, code)
    train, val = blocks(TinyLlama(data_path=tmp_path), 1)
    assert (len([block for block in train if block[0] % 2 == 0]), len([block for block in train if block[0] % 2])) == expected
    assert len(val) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"compression": "zstd"}, "compression of chunks is not supported"),
        ({"data_format": ["jpeg"]}, "does not hold tokens: optimize with TokensLoader"),
        ({"data_format": ["no_header_tensor:18"]}, r"the chunk .* cannot be read .* optimize the data again"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        blocks(LitData(data_path=write(tmp_path / "a", **config)), 3)


def test_what_is_not_there_or_of_another_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index.json is missing: LitData's"):
        blocks(LitData(data_path=tmp_path), 3)
    with pytest.raises(UserError, match="is not on this machine: copy the folder"):
        blocks(LitData(data_path=Path("s3://bucket/x")), 3)
    with pytest.raises(UserError, match="outside this tokenizer's vocabulary of 99"):
        blocks(LitData(data_path=made(tmp_path / "b", 90, 20)), 3)
