"""The header of a GGUF file is what the gguf library reads; a broken or hostile file gives one clear error."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from litgpt.checkpoint import require_checkpoint
from litgpt.convert.gguf.reader import Reader
from litgpt.convert.to_litgpt import convert_to_litgpt
from litgpt.errors import UserError
from tests.helpers import gguf_files
from tests.helpers.gguf_files import AddMetadata


def assert_same_header(path: Path) -> None:
    ours, theirs = Reader(path), gguf.GGUFReader(path)
    assert [*ours.metadata] == [key for key in theirs.fields if not key.startswith("GGUF.")]
    for key, value in ours.metadata.items():
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == theirs.fields[key].contents()
    assert [*ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors[:12]:
        found = ours.tensors[tensor.name]
        assert (found.content.size, list(reversed(found.shape))) == (tensor.n_bytes, tensor.shape.tolist())
        assert found.content.tobytes() == tensor.data.tobytes()
        assert np.array_equal(ours.array(tensor.name), gguf.dequantize(tensor.data, tensor.tensor_type))


def test_header_equals_that_of_the_gguf_library(tmp_path: Path, byte_level: AddMetadata) -> None:
    assert_same_header(gguf_files.write_tiny(tmp_path, byte_level, lambda writer: writer.add_chat_template("é"), kind="Q4_0"))


@pytest.mark.slow
def test_header_of_smollm2(smollm2_gguf: Path) -> None:
    assert_same_header(smollm2_gguf)


def dequantisable(kind: gguf.GGMLQuantizationType) -> bool:
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_type_that_the_gguf_library_turns_into_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row and one of several parts, as the library does it at once."""
    kinds = [kind for kind in gguf.GGMLQuantizationType if dequantisable(kind)]
    assert {"Q4_0", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ2_XXS", "IQ4_NL", "TQ1_0", "BF16", "MXFP4"} <= {kind.name for kind in kinds}
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    content = {kind: np.random.default_rng(int(kind)).integers(0, 255, (3, 5, 256), np.uint8) for kind in kinds}
    for kind, numbers in content.items():
        block, size = gguf.GGML_QUANT_SIZES[kind]
        content[kind] = (
            numbers[..., : size * 256 // block] if size * 256 // block <= 256 else np.tile(numbers, 4)[..., : size * 256 // block]
        )
        writer.add_tensor(kind.name, content[kind], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr("litgpt.convert.gguf.reader.CHUNK", 2 * 256)
    reader = Reader(tmp_path / "x.gguf")
    for kind, numbers in content.items():
        expected = gguf.dequantize(numbers, kind)
        assert np.array_equal(reader.array(kind.name), expected, equal_nan=True), kind.name
        assert np.array_equal(reader.load(kind.name, part=1).numpy(), expected[1], equal_nan=True), kind.name


class Whole(bytes):
    """The bytes of a sound file, not printed when a test fails."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, byte_level: AddMetadata) -> Whole:
    return Whole(gguf_files.write(tmp_path_factory.mktemp("whole") / "tiny.gguf", gguf_files.llama(), byte_level, kind="Q8_0").read_bytes())


def broken(tmp_path: Path, content: bytes) -> str:
    """The message for a broken file; no other exception may come, and nothing may be left behind."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        convert_to_litgpt(path, tmp_path / "lit")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "lit").exists()
    return str(caught.value)


def test_truncated_anywhere(tmp_path: Path, whole: Whole) -> None:
    header = whole.index(b"blk.0.attn_norm")
    places = [
        *range(40),
        *random.Random(0).sample(range(40, header), 40),
        *random.Random(1).sample(range(header, len(whole)), 40),
        len(whole) - 1,
    ]
    for size in places:
        message = broken(tmp_path, whole[:size])
        assert "starts with b'GGUF'" in message if size < 4 else "truncated" in message, size


def patched(whole: Whole, at: int, code: str, value: int) -> bytes:
    return whole[:at] + struct.pack(code, value) + whole[at + struct.calcsize(code) :]


@pytest.mark.parametrize("value", [10**6, 2**31, 2**63, 2**64 - 1])
@pytest.mark.parametrize(
    "field",
    [
        ("tensor count", lambda whole: 8),
        ("value count", lambda whole: 16),
        ("key length", lambda whole: 24),
        ("string length", lambda whole: whole.index(b"Tiny Model") - 8),
        ("array length", lambda whole: whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8),
        ("string array length", lambda whole: whole.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8),
        ("token length", lambda whole: whole.index(b"<|endoftext|>") - 8),
        ("tensor name length", lambda whole: whole.index(b"blk.0.attn_norm") - 8),
        ("dimension", lambda whole: whole.index(b"token_embd.weight") + len("token_embd.weight") + 4),
        ("offset", lambda whole: whole.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16 + 4),
    ],
    ids=lambda field: field[0],
)
def test_absurd_counts(tmp_path: Path, whole: Whole, field: tuple[str, Callable[[bytes], int]], value: int) -> None:
    content = patched(whole, field[1](whole), "<Q", value)
    assert "truncated" in broken(tmp_path, content) or field[0] == "dimension"


def test_wrong_magic_versions_and_types(tmp_path: Path, whole: Whole) -> None:
    assert "this one with b'PK" in broken(tmp_path, b"PK\x03\x04" + whole)
    assert "version 1 found" in broken(tmp_path, patched(whole, 4, "<I", 1))
    assert "version 99 found" in broken(tmp_path, patched(whole, 4, "<I", 99))
    assert "big-endian" in broken(tmp_path, patched(whole, 4, ">I", 3))
    name = whole.index(b"token_embd.weight") + len("token_embd.weight")
    assert "5 dimensions" in broken(tmp_path, patched(whole, name, "<I", 5))
    assert "unknown type 777" in broken(tmp_path, patched(whole, name + 20, "<I", 777))
    assert "Q8_1" in broken(tmp_path, patched(whole, name + 20, "<I", 9))
    assert "impossible dimensions" in broken(tmp_path, patched(whole, name + 4, "<Q", 0))
    kind = whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type")
    assert "value type 42" in broken(tmp_path, patched(whole, kind, "<I", 42))
    assert "value type 9 in an array" in broken(tmp_path, patched(whole, kind + 4, "<I", 9))
    assert "occurs twice" in broken(tmp_path, whole.replace(b"blk.1.attn_norm.weight", b"blk.0.attn_norm.weight"))
    assert "not UTF-8" in broken(tmp_path, whole.replace(b"Tiny Model", b"Tiny\xff\xff\xff\xff\xff\xff"))
    blocks = whole.index(b"llama.block_count") + len("llama.block_count") + 4
    assert "4294967295 blocks" in broken(tmp_path, patched(whole, blocks, "<I", 2**32 - 1))
    width = whole.index(b"llama.feed_forward_length") + len("llama.feed_forward_length") + 4
    assert "shape (64, 96) where (64, 4294967)" in broken(tmp_path, patched(whole, width, "<I", 4294967))
    heads = whole.index(b"llama.attention.head_count_kv") + len("llama.attention.head_count_kv") + 4
    assert "not a multiple" in broken(tmp_path, patched(whole, heads, "<I", 3))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_changed_bytes_give_one_clear_error_or_a_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, whole: Whole, data: st.DataObject
) -> None:
    header = whole.index(b"output_norm.weight")
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "fuzz.gguf").write_bytes(content)
    try:
        convert_to_litgpt(folder / "fuzz.gguf", folder / "lit")
    except UserError as error:
        assert "fuzz.gguf" in str(error)
        assert not (folder / "lit").exists()
    else:
        assert require_checkpoint(folder / "lit")
