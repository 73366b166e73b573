"""Fixtures for tests that spoil good files: a checkpoint, an adapter, a Hugging Face folder and a GGUF file of a llama of two blocks.

The last two are written by hand. For a conftest: `from tests.helpers.worlds import place, world`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import tiny
from tests.helpers.places import Place, World

D, HIDDEN, BLOCKS, V = 32, 72, 2, 320
HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": D,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": V,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
ADAPTER = {"lora_r": 2, "lora_query": True}
GGUF_SHAPES: dict[str, tuple[int, ...]] = {
    "attn_norm": (D,),
    "attn_q": (D, D),
    "attn_k": (D // 2, D),
    "attn_v": (D // 2, D),
    "attn_output": (D, D),
    "ffn_norm": (D,),
    "ffn_gate": (HIDDEN, D),
    "ffn_up": (HIDDEN, D),
    "ffn_down": (D, HIDDEN),
}
HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_tensors() -> dict[str, torch.Tensor]:
    made = {"model.embed_tokens.weight": torch.randn(V, D), "model.norm.weight": torch.ones(D)}
    for block in range(BLOCKS):
        made.update({f"model.layers.{block}.{HF_NAMES[name]}.weight": torch.randn(shape) * 0.1 for name, shape in GGUF_SHAPES.items()})
    return made


def write_hf(folder: Path, write_tokenizer: Callable[[Path], Path]) -> Path:
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    save_file(hf_tensors(), folder / "model.safetensors")
    return folder


def gguf_metadata(tokenizer: Path) -> dict[str, Any]:
    """The header's keys, the tiny tokenizer's vocabulary among them."""
    model = json.loads((tokenizer / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "general.architecture": "llama",
        "general.name": "Tiny",
        "llama.context_length": 64,
        "llama.embedding_length": D,
        "llama.block_count": BLOCKS,
        "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i < 3 else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
    }


def gguf_tensors() -> dict[str, tuple[int, ...]]:
    made: dict[str, tuple[int, ...]] = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    for block in range(BLOCKS):
        made.update({f"blk.{block}.{name}.weight": shape for name, shape in GGUF_SHAPES.items()})
    return made


def gguf_bytes(metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> bytes:
    """A GGUF file of version 3 with fp32 tensors of those shapes (torch's order), all 0.5."""
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind, content = _value(value)
        header += [_string(key), struct.pack("<I", kind), content]
    offset, data = 0, []
    for name, shape in tensors.items():
        size = torch.Size(shape).numel()
        header += [_string(name), struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), 0, offset)]
        data.append(struct.pack("<f", 0.5) * size)
        padded = -(-4 * size // 32) * 32
        data.append(bytes(padded - 4 * size))
        offset += padded
    head = b"".join(header)
    return head + bytes(-len(head) % 32) + b"".join(data)


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _value(value: Any) -> tuple[int, bytes]:
    """Kind and bytes: bool, uint32 (int32 if negative), fp32, text, or an array of one of them."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return (4, struct.pack("<I", value)) if value >= 0 else (5, struct.pack("<i", value))
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, _string(value)
    items = [_value(item) for item in value]
    kind = items[0][0] if items else 4
    return 9, struct.pack("<IQ", kind, len(items)) + b"".join(content for _, content in items)


def write_gguf(file: Path, tokenizer: Path) -> Path:
    file.write_bytes(gguf_bytes(gguf_metadata(tokenizer), gguf_tensors()))
    return file


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> World:
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("world")
    base = tiny.write_base(folder / "base", write_tiny_tokenizer, n_layer=BLOCKS)
    adapter = tiny.write_adapter(folder / "adapter", base, tiny.tiny(**tiny.SPEAKING, n_layer=BLOCKS, **ADAPTER), **ADAPTER)
    return World(base, adapter, write_hf(folder / "hf", write_tiny_tokenizer), write_gguf(folder / "model.gguf", base))


@pytest.fixture
def place(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty folder, and the current one."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Place(folder, world)
