"""GGUF files of the llama architecture (Llama, Mistral, SmolLM2 ...) into checkpoint folders.

The header is read here, not by the `gguf` library: every count, length and offset in it is compared with the size of the file before it
is used, so a broken or hostile file is one clear message. Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. Quantised tensors
are turned into numbers by `gguf.quants.dequantize`.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from litgpt import catalog
from litgpt.checkpoint import WEIGHTS, new_folder, save_config, save_weights
from litgpt.config import Config
from litgpt.convert.gguf_tokenizer import write_tokenizer
from litgpt.convert.hf import differences
from litgpt.convert.names import GGUF_LLAMA, Stored, assemble, summary
from litgpt.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct codes of the value types that have a fixed size"""
STRING, ARRAY = 8, 9
QUANTISATION = re.compile(r"[-._](i?q\d\w*|tq\d\w*|b?f16|f32|fp16|fp32|mxfp4\w*)$", re.IGNORECASE)
"""The end of a file's name that says how it is quantised."""


class Tensor(NamedTuple):
    """A tensor in the file, bounds checked. `shape` is torch's order: rows first."""

    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


class Reader:
    """The header of a GGUF file: `metadata` (arrays of numbers as numpy arrays) and `tensors`.

    Raises UserError for everything that is not a whole, little-endian GGUF file of version 2 or 3.
    """

    def __init__(self, path: Path) -> None:
        import numpy as np

        self.path = path
        self._at = 0
        size = path.stat().st_size
        self._data = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._read()

    def fail(self, found: str) -> UserError:
        """The error for what was found, located."""
        return UserError(f"{self.path}: {found} (GGUF, byte {self._at} of {len(self._data)})")

    def _take(self, size: int) -> np.ndarray:
        """The next `size` bytes."""
        if size > len(self._data) - self._at:
            raise self.fail(f"the file ends here, but {size} more bytes are announced; it is truncated or broken, download it again")
        self._at += size
        return self._data[self._at - size : self._at]

    def _number(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)).tobytes())[0]

    def _count(self, least: int) -> int:
        """A count of entries that take at least `least` bytes each."""
        count = self._number("Q")
        if count * least > len(self._data) - self._at:
            raise self.fail(f"{count} entries are announced, more than the rest of the file can hold; it is truncated or broken")
        return count

    def _string(self) -> str:
        try:
            return self._take(self._count(1)).tobytes().decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a text is not UTF-8") from None

    def _value(self, kind: int, in_array: bool = False) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY or in_array:
            raise self.fail(f"value type {kind}{' in an array' if in_array else ''} is not supported")
        kind = self._number("I")
        if kind in SCALARS:
            import numpy as np

            dtype = np.dtype("<" + SCALARS[kind])
            return self._take(self._count(dtype.itemsize) * dtype.itemsize).view(dtype)
        return [self._value(kind, in_array=True) for _ in range(self._count(8))]

    def _read(self) -> None:
        magic = self._data[:4].tobytes()
        if magic != b"GGUF":
            raise self.fail(f"a GGUF file starts with b'GGUF', this one with {magic!r}")
        self._at = 4
        version = self._number("I")
        if version not in (2, 3):
            found = "big-endian data" if version & 0xFFFF == 0 and version else f"version {version}"
            raise self.fail(f"{found} found, supported are versions 2 and 3, little-endian")
        n_tensors, n_values = self._count(24), self._count(13)  # each tensor's and each value's entry is at least that long
        for _ in range(n_values):
            key = self._string()
            if key in self.metadata:
                raise self.fail(f"the key {key!r} occurs twice")
            self.metadata[key] = self._value(self._number("I"))
        entries = [self._tensor_entry() for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {alignment!r}, a power of two from 8 on is expected")
        start = -(-self._at // alignment) * alignment
        for name, dims, kind, offset in entries:
            self._place(name, dims, kind, offset, start, alignment)

    def _tensor_entry(self) -> tuple[str, list[int], int, int]:
        name, n_dims = self._string(), self._number("I")
        if not 1 <= n_dims <= 4:
            raise self.fail(f"tensor {name!r} has {n_dims} dimensions, 1 to 4 are possible")
        return name, [self._number("Q") for _ in range(n_dims)], self._number("I"), self._number("Q")

    def _place(self, name: str, dims: list[int], kind: int, offset: int, start: int, alignment: int) -> None:
        """Check one tensor's entry against the file and keep it."""
        from gguf import GGML_QUANT_SIZES

        if name in self.tensors:
            raise self.fail(f"tensor {name!r} occurs twice")
        sizes = {int(known): value for known, value in GGML_QUANT_SIZES.items()}
        if kind not in sizes:
            raise self.fail(f"tensor {name!r} has the unknown type {kind}")
        block, block_bytes = sizes[kind]
        if min(dims) < 1 or dims[0] % block:
            raise self.fail(f"tensor {name!r} has the impossible dimensions {dims}")
        size = math.prod(dims) // block * block_bytes
        if offset % alignment or start + offset + size > len(self._data):
            raise self.fail(
                f"tensor {name!r} lies at the bytes {start + offset} to {start + offset + size}: truncated or broken, download it again"
            )
        self.tensors[name] = Tensor(tuple(reversed(dims)), kind, start + offset, size)

    def array(self, name: str) -> np.ndarray:
        """The numbers of a tensor, fp32."""
        import numpy as np
        from gguf import GGMLQuantizationType, dequantize

        tensor = self.tensors[name]
        content = self._data[tensor.start : tensor.start + tensor.size].reshape(*tensor.shape[:-1], -1)
        return np.require(dequantize(content, GGMLQuantizationType(tensor.kind)), np.float32, "W")

    def stored(self) -> Iterator[tuple[str, Stored]]:
        """Every tensor with its shape and how to read it, fp32."""
        for name, tensor in self.tensors.items():
            yield name, Stored(tensor.shape, partial(self._load, name))

    def _load(self, name: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.array(name))


class Settings:
    """Typed access to a GGUF file's metadata: `settings.integer("llama.block_count")`. A value of the wrong type is a UserError."""

    def __init__(self, reader: Reader) -> None:
        self.path = reader.path
        self.values: Mapping[str, Any] = reader.metadata

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise UserError(f"{self.path} has no {key}")
        if not isinstance(value, kind):
            raise UserError(f"{self.path}: {key} is {str(value)[:100]}, which is not supported")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key, int, default)
        if value < 1:
            raise UserError(f"{self.path}: {key} is {value}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A positive number. Stored as fp32, meant as the shortest decimal that rounds to it: 9.99999974e-06 is 1e-05."""
        import numpy as np

        value = float(str(np.float32(self.get(key, (int, float), default))))
        if not 0 < value < math.inf:
            raise UserError(f"{self.path}: {key} is {value}")
        return value


def convert_gguf(source: Path, target: Path, model_name: str | None = None, dtype: torch.dtype | None = None) -> Config:
    """Convert the file `source` into the checkpoint folder `target`.

    `dtype` None: fp32 and fp16 files keep theirs; quantised weights become bf16, whose 8 significant bits are about what they carry.
    Raises UserError for broken files and for what is not supported.
    """
    reader = Reader(source)
    check_supported(reader)
    config = choose_config(reader, model_name)
    tied = "output.weight" not in reader.tensors
    with new_folder(target) as folder:
        write_tokenizer(Settings(reader), config, folder)
        save_config(config, folder)
        weights = assemble(dict(reader.stored()), GGUF_LLAMA, config, str(source), tied, dtype or own_dtype(reader))
        save_weights(weights, folder / WEIGHTS)
    return config


def check_supported(reader: Reader) -> None:
    """UserError for another architecture, for mixtures of experts, split files, and tensor types without a dequantiser."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    settings = Settings(reader)
    architecture = settings.get("general.architecture", str)
    if architecture != "llama":
        raise UserError(f"{reader.path} has the architecture {architecture!r}, supported is 'llama' (Llama, Mistral, SmolLM2 and the like)")
    if settings.get("llama.expert_count", int, 0) > 0:
        raise UserError(f"{reader.path} is a mixture of experts (llama.expert_count), which is not supported")
    if settings.get("split.count", int, 0) > 1:
        raise UserError(f"{reader.path} is one of several parts (split.count): join them with `llama-gguf-split --merge` first")
    unsupported: dict[str, list[str]] = {}
    for kind in map(GGMLQuantizationType, sorted({tensor.kind for tensor in reader.tensors.values()})):
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            unsupported[kind.name] = [name for name, tensor in reader.tensors.items() if tensor.kind == kind]
    if unsupported:
        found = "; ".join(f"{kind}: {summary(names)}" for kind, names in unsupported.items())
        raise UserError(
            f"{reader.path} has tensors of a type that cannot be read ({found}): use a file with a common type such as Q8_0 or Q4_K"
        )


def own_dtype(reader: Reader) -> torch.dtype:
    """fp32 or fp16 if the matrices are stored so, else bf16."""
    import torch
    from gguf import GGMLQuantizationType

    kinds = {GGMLQuantizationType(tensor.kind).name for tensor in reader.tensors.values() if len(tensor.shape) > 1}
    return torch.float32 if kinds == {"F32"} else torch.float16 if kinds <= {"F32", "F16"} else torch.bfloat16


def choose_config(reader: Reader, model_name: str | None) -> Config:
    """The named model that the file holds: the name given, else one that the file's name or general.name fits, else an own config."""
    described = read_config(reader)
    ignore = ("sliding_window_size", "sliding_window_indices")  # not in the files: only the name tells
    if model_name is not None:
        named = Config.from_name(model_name)
        if differing := differences(named, described, ignore):
            raise UserError(f"{reader.path} is not of the model {model_name}: {differing}. Without --model_name it is converted as it is")
        return named
    by_lower = {name.lower(): name for name in catalog.names()}
    for name in (QUANTISATION.sub("", reader.path.stem), described.name):
        found = catalog.find(name) or catalog.find(by_lower.get(name.lower(), name))
        if found and not differences(Config(**found), described, ignore):
            return Config(**found)
    return described


def read_config(reader: Reader) -> Config:
    """The model that the metadata describes."""
    settings = Settings(reader)
    n_head, n_embd = settings.size("llama.attention.head_count"), settings.size("llama.embedding_length")
    head_size = settings.size("llama.attention.key_length", n_embd // n_head)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if (found := settings.size(key, head_size)) != head_size:
            raise UserError(f"{reader.path}: {key} is {found}, supported is only the whole head, here {head_size}")
    if head_size % 2:
        raise UserError(f"{reader.path}: the head size is {head_size}, an even number is needed")
    if (embedding := reader.tensors.get("token_embd.weight")) is None:
        raise UserError(f"{reader.path} has no tensor token_embd.weight")
    if len(tokens := settings.get("tokenizer.ggml.tokens", list)) > embedding.shape[0]:
        raise UserError(
            f"{reader.path}: {len(tokens)} tokens (tokenizer.ggml.tokens) for the {embedding.shape[0]} rows of token_embd.weight"
        )
    rope_base = settings.real("llama.rope.freq_base", 10000.0)
    fields = {
        "name": re.sub(r"\s+", "-", settings.get("general.name", str, QUANTISATION.sub("", reader.path.stem)).strip()),
        "block_size": settings.size("llama.context_length"),
        "n_layer": settings.size("llama.block_count"),
        "n_embd": n_embd,
        "n_head": n_head,
        "head_size": head_size,
        "n_query_groups": settings.size("llama.attention.head_count_kv", n_head),
        "vocab_size": len(tokens),
        "padded_vocab_size": embedding.shape[0],
        "intermediate_size": settings.size("llama.feed_forward_length"),
        "norm_class_name": "RMSNorm",
        "norm_eps": settings.real("llama.attention.layer_norm_rms_epsilon"),
        "mlp_class_name": "LLaMAMLP",
        "parallel_residual": False,
        "bias": "blk.0.attn_output.bias" in reader.tensors,
        "attn_bias": "blk.0.attn_q.bias" in reader.tensors and "blk.0.attn_output.bias" not in reader.tensors,
        "rope_base": whole(rope_base),
        "rotary_percentage": 1.0,
        **rope_scaling(reader, head_size, rope_base),
    }
    if "llama.attention.sliding_window" in settings.values:
        fields["sliding_window_size"] = settings.size("llama.attention.sliding_window")
    try:
        return Config(**fields)
    except UserError as error:
        raise UserError(f"{reader.path}: {error}") from None


def rope_scaling(reader: Reader, head_size: int, rope_base: float) -> dict[str, Any]:
    """rope_condense_ratio or rope_adjustments, from llama.rope.scaling.* or the tensor rope_freqs.weight; empty if positions are plain."""
    settings = Settings(reader)
    if "rope_freqs.weight" in reader.tensors:
        factors = reader.array("rope_freqs.weight").astype(float).reshape(-1)
        if len(factors) != head_size // 2:
            raise UserError(f"{reader.path}: rope_freqs.weight has {len(factors)} entries, expected {head_size // 2}")
        adjustments = fit_adjustments(factors, rope_base)
        if adjustments is None:
            raise UserError(
                f"{reader.path}: rope_freqs.weight is not Llama 3.1's rotary scaling, the only one with a table that is supported"
            )
        return {"rope_adjustments": adjustments or None}
    kind = settings.get("llama.rope.scaling.type", str, "none")
    factor = settings.real("llama.rope.scaling.factor", settings.get("llama.rope.scale_linear", float, 1.0))
    if kind not in ("none", "linear"):
        raise UserError(
            f"{reader.path}: llama.rope.scaling.type is {kind!r}, supported are none, linear and Llama 3.1's table (rope_freqs.weight)"
        )
    if factor == 1.0 or (kind == "none" and "llama.rope.scaling.type" in settings.values):
        return {}
    return {"rope_condense_ratio": whole(factor)}


def whole(value: float) -> Any:
    """The number as an int if it is one: configs hold 10000, not 10000.0."""
    return int(value) if value.is_integer() else value


def fit_adjustments(divisors: np.ndarray, rope_base: float) -> dict[str, float] | None:
    """Llama 3.1's parameters from the n/2 numbers that divide the rotary frequencies; {} if all are 1, None if it is another scaling.

    theta_j = base^(-2j/n), turns w_j = theta_j / (2 pi) a position, context C, kept share s_j = clamp((C w_j - low) / (high - low), 0, 1):
    1 / divisor_j = s_j + (1 - s_j) / factor. So factor is the largest divisor, and s is a straight line in w where it is between 0
    and 1. The line has two parameters and C, low, high are three: they are stated for low = 1, as in every Llama.
    """
    import numpy as np

    if np.allclose(divisors, 1.0):
        return {}
    factor = float(divisors.max())
    if not np.isfinite(divisors).all() or divisors.min() <= 0 or factor <= 1:
        return None
    turns = rope_base ** -(np.arange(len(divisors)) / len(divisors)) / (2 * math.pi)
    share = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    between = (share > 1e-4) & (share < 1 - 1e-4)
    if between.sum() < 2:
        return None
    slope, intercept = np.polyfit(turns[between], share[between], 1)
    if slope <= 0 or intercept >= 0:
        return None
    high, context = round(float(1 - 1 / intercept), 3), round(float(-slope / intercept))
    if high <= 1:
        return None
    again = np.clip((context * turns - 1) / (high - 1), 0, 1)
    if not np.allclose(1 / (again + (1 - again) / factor), divisors, rtol=1e-3):
        return None
    return {"factor": round(factor, 3), "low_freq_factor": 1.0, "high_freq_factor": high, "original_max_seq_len": context}
