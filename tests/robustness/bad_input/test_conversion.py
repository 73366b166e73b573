"""Bad sources of `litgpt convert_to_litgpt`: Hugging Face folders (config, index, safetensors, .bin) and GGUF files; and bad places."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import worlds
from tests.helpers.cases import quick
from tests.helpers.places import Case, Place, check

MODEL = "model.safetensors"


def hf(spoil: Callable[[Path], Any], *more: Any) -> Callable[[Place], list[Any]]:
    def words(place: Place) -> list[Any]:
        folder = place.hf()
        spoil(folder)
        return ["convert_to_litgpt", folder, "--checkpoint_dir", "lit", *more]

    return words


def config(**changes: Any) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        values = {**worlds.HF_CONFIG, **changes}
        (folder / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return spoil


def text(name: str, content: Any) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        if name != "config.json":
            (folder / MODEL).unlink()
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return spoil


def index(names: Any, suffix: str = "safetensors") -> Callable[[Path], Any]:
    """An index in place of the weights; a list gives one tensor a file."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = {f"t{i}": name for i, name in enumerate(names)} if isinstance(names, list) else names
    return text(f"{stem}.{suffix}.index.json", {"weight_map": names})


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        content = load_file(folder / MODEL)
        change(content)
        save_file(content, folder / MODEL)

    return spoil


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Change the header of the safetensors file, keep its data."""

    def spoil(folder: Path) -> None:
        content = (folder / MODEL).read_bytes()
        size = int.from_bytes(content[:8], "little")
        facts = json.loads(content[8 : 8 + size])
        change(facts)
        new = json.dumps(facts).encode()
        (folder / MODEL).write_bytes(len(new).to_bytes(8, "little") + new + content[8 + size :])

    return spoil


def gguf(metadata: dict[str, Any] | None = None, shapes: dict[str, Any] | None = None, *more: Any) -> Callable[[Place], list[Any]]:
    """A GGUF file with these keys and tensors changed; ... leaves one out."""

    def words(place: Place) -> list[Any]:
        keys = {**worlds.gguf_metadata(place.world.base), **(metadata or {})}
        kept = {**worlds.gguf_tensors(), **(shapes or {})}
        content = worlds.gguf_bytes(
            {key: value for key, value in keys.items() if value is not ...}, {key: value for key, value in kept.items() if value is not ...}
        )
        return ["convert_to_litgpt", place.write("model.gguf", content), "--checkpoint_dir", "lit", *more]

    return words


def patched(change: Callable[[bytes], bytes]) -> Callable[[Place], list[Any]]:
    """A GGUF file whose bytes are changed."""

    def words(place: Place) -> list[Any]:
        file = place.gguf()
        file.write_bytes(change(file.read_bytes()))
        return ["convert_to_litgpt", file, "--checkpoint_dir", "lit"]

    return words


def at(place: int, code: str, value: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:place] + struct.pack(code, value) + content[place + struct.calcsize(code) :]


Q = "model.layers.0.self_attn.q_proj.weight"
SOURCES = [
    Case("no source", lambda place: ["convert_to_litgpt", "nowhere"], "nowhere does not exist", "check the path"),
    Case("an empty source", lambda place: ["convert_to_litgpt", ""], "--source is empty", "name a file or a folder", 2),
    Case(
        "an empty folder",
        lambda place: ["convert_to_litgpt", place.write("d/e/f", "").parent.parent],
        "config.json is missing",
        "Hugging Face folder",
    ),
    Case(
        "a folder of two GGUF files",
        lambda place: [place.gguf(), place.write("b.gguf", b""), ["convert_to_litgpt", place.folder]][2],
        "holds 2 GGUF files",
        "name one of them, such as",
    ),
    Case("a text file", lambda place: ["convert_to_litgpt", place.write("notes.txt", "hello")], "notes.txt is a file", "or a .gguf file"),
    Case("an empty file", lambda place: ["convert_to_litgpt", place.write("model.gguf", b"")], "model.gguf", "GGUF"),
    Case(
        "a .bin by itself",
        lambda place: ["convert_to_litgpt", place.write("pytorch_model.bin", b"PK\x03\x04")],
        "pytorch_model.bin is a file",
        "or a .gguf file",
    ),
    Case(
        "a pipe as a source",
        lambda place: [os.mkfifo(place.folder / "p.gguf"), ["convert_to_litgpt", "p.gguf"]][1],
        "p.gguf is a pipe or a device",
        "name a folder or a .gguf file",
    ),
    Case("a number format", hf(config(), "--dtype", "int8"), "--dtype: 'int8'", "bfloat16", 2),
    Case("a model's name misspelt", hf(config(), "--model_name", "Lama-2-7b-hf"), "'Lama-2-7b-hf'", "Llama-2-7b-hf"),
    Case("another model's name", hf(config(), "--model_name", "Llama-2-7b-hf"), "Llama-2-7b-hf", "Without --model_name"),
    Case(
        "a target that is full",
        lambda place: ["convert_to_litgpt", place.gguf(), "--checkpoint_dir", place.write("lit/a", "").parent],
        "lit exists already",
        "name another folder",
    ),
    Case(
        "a target that is a file",
        lambda place: ["convert_to_litgpt", place.gguf(), "--checkpoint_dir", place.write("lit", "")],
        "lit is a file",
        "another place",
    ),
    Case(
        "a target below a file",
        lambda place: ["convert_to_litgpt", place.gguf(), "--checkpoint_dir", place.write("f", "") / "lit"],
        "f/lit: ",
        "File exists",
    ),
    Case(
        "a target with a zero byte",
        lambda place: ["convert_to_litgpt", place.gguf(), "--checkpoint_dir", "li\0t"],
        "checkpoint_dir",
        "zero byte",
        2,
    ),
    Case(
        "a target's name too long",
        lambda place: ["convert_to_litgpt", place.gguf(), "--checkpoint_dir", "x" * 300],
        "--checkpoint_dir: 'xxx",
        "too long",
        code=2,
    ),
]
HF = [
    Case("no config", hf(lambda folder: (folder / "config.json").unlink()), "config.json is missing", "Hugging Face folder"),
    Case("an empty config", hf(text("config.json", "")), "config.json", "JSON"),
    Case("a list", hf(text("config.json", [])), "config.json holds no JSON object", "copy it again"),
    Case("UTF-16", hf(text("config.json", "{}".encode("utf-16"))), "config.json", "UTF-8"),
    Case("deep", hf(text("config.json", '{"a":' * 100_000)), "config.json", "nested too deeply"),
    Case(
        "a folder for the config",
        hf(lambda folder: [(folder / "config.json").unlink(), (folder / "config.json").mkdir()]),
        "config.json",
        "folder",
    ),
    Case("no kind", hf(config(model_type=...)), "model_type", "config.json"),
    Case("an unknown kind", hf(config(model_type="lama", architectures=["Lama"])), "'lama'", "llama"),
    Case("a kind that is a list", hf(config(model_type=["llama"])), "model_type", "config.json"),
    Case("no blocks", hf(config(num_hidden_layers=0)), "n_layer is 0", "whole number from 1"),
    Case("blocks as text", hf(config(num_hidden_layers="2")), "n_layer is '2'", "whole number from 1"),
    Case("a billion blocks", hf(config(num_hidden_layers=10**9)), "n_layer is 1000000000", "from 1 to 10000"),
    Case("no heads", hf(config(num_attention_heads=0)), "config.json", "n_head"),
    Case("a missing width", hf(config(hidden_size=...)), "hidden_size", "config.json"),
    Case("a width of null", hf(config(hidden_size=None)), "config.json", "n_embd"),
    Case("a huge width", hf(config(hidden_size=2**62)), "hf", "n_embd"),
    Case("a width of other weights", hf(config(hidden_size=64)), "model.embed_tokens.weight", "is expected"),
    Case("no number", hf(config(rms_norm_eps=float("nan"))), "norm_eps is nan", "number"),
    Case("an activation", hf(config(hidden_act="relu")), "'relu'", "silu"),
    Case("a rope of an unknown kind", hf(config(rope_scaling={"rope_type": "wavy", "factor": 2.0})), "'wavy'", "llama3"),
    Case("a rope of text", hf(config(rope_scaling="linear")), "rope_scaling", "config.json"),
    Case("a rope without its factor", hf(config(rope_scaling={"rope_type": "linear"})), "factor", "config.json"),
    Case("quantised", hf(config(quantization_config={"quant_method": "gptq"})), "'gptq'", "unquantised model"),
    Case("no weights", hf(lambda folder: (folder / MODEL).unlink()), "hf holds no weights", "model.safetensors"),
    # index files
    Case("an empty index", hf(text(f"{MODEL}.index.json", "")), f"{MODEL}.index.json", "JSON"),
    Case(
        "an index without a map", hf(text(f"{MODEL}.index.json", {"metadata": {}})), f"{MODEL}.index.json has no weight_map", "file names"
    ),
    Case("an index of nothing", hf(index({})), f"{MODEL}.index.json has no weight_map", "file names"),
    Case("an index of numbers", hf(index({"a": 1})), f"{MODEL}.index.json has no weight_map", "file names"),
    Case("an index upwards", hf(index(["../model.safetensors"])), "'../model.safetensors'", "inside the folder"),
    Case("an index to a root", hf(index(["/etc/x.safetensors"])), "'/etc/x.safetensors'", "inside the folder"),
    Case("an index backwards", hf(index(["..\\x.safetensors"])), "inside the folder", "plain .safetensors"),
    Case("an index with a zero byte", hf(index(["a\0.safetensors"])), "\\x00", "plain .safetensors"),
    Case("an index of dots", hf(index([".."])), "'..'", "plain .safetensors"),
    Case("an index of pickles", hf(index(["x.bin"])), "'x.bin'", "plain .safetensors"),
    Case("an index to nothing", hf(index(["a.safetensors"])), "lacks a.safetensors", "download the model again"),
    Case("an index of a long name", hf(index(["x" * 300 + ".safetensors"])), "xxx.safetensors", "plain .safetensors"),
    Case("an index of 5,000 names", hf(index([f"{i}.safetensors" for i in range(5000)])), "lacks 0.safetensors", "more"),
    # safetensors
    Case("empty weights", hf(text(MODEL, b"")), f"{MODEL} is not a readable safetensors file", "truncated"),
    Case("text for weights", hf(text(MODEL, "these are the weights")), f"{MODEL} is not a readable safetensors file", "truncated"),
    Case("a header of exabytes", hf(text(MODEL, struct.pack("<Q", 2**62) + b"{}")), f"{MODEL} is not a readable", "truncated"),
    Case("a header of the largest size", hf(text(MODEL, struct.pack("<Q", 2**64 - 1) + b"{}")), f"{MODEL} is not a readable", "truncated"),
    Case("a header that is no JSON", hf(text(MODEL, struct.pack("<Q", 8) + b"nothing!")), f"{MODEL} is not a readable", "truncated"),
    Case("a header of brackets", hf(text(MODEL, struct.pack("<Q", 90_000) + b"[" * 90_000)), f"{MODEL} is not a readable", "truncated"),
    Case("half the data", hf(lambda folder: os.truncate(folder / MODEL, 30_000)), f"{MODEL} is not a readable", "truncated"),
    Case("an offset beyond", hf(header(lambda facts: facts[Q].update(data_offsets=[0, 2**50]))), f"{MODEL} is not a readable", "truncated"),
    Case(
        "an offset backwards", hf(header(lambda facts: facts[Q].update(data_offsets=[4096, 0]))), f"{MODEL} is not a readable", "truncated"
    ),
    Case(
        "a shape that overflows", hf(header(lambda facts: facts[Q].update(shape=[2**40, 2**40]))), f"{MODEL} is not a readable", "truncated"
    ),
    Case("an unknown number format", hf(header(lambda facts: facts[Q].update(dtype="F3"))), f"{MODEL} is not a readable", "truncated"),
    Case("data used twice", hf(header(lambda facts: facts.update(extra=dict(facts[Q])))), f"{MODEL} is not a readable", "truncated"),
    Case("a missing tensor", hf(tensors(lambda content: content.pop(Q))), Q, "missing"),
    Case("an unknown tensor", hf(tensors(lambda content: content.update(extra=torch.zeros(2)))), "extra", "unknown"),
    Case(
        "a wrong shape", hf(tensors(lambda content: content.update({Q: torch.zeros(3, 3)}))), Q, "shape (3, 3) where (32, 32) is expected"
    ),
    Case(
        "whole numbers",
        hf(tensors(lambda content: content.update({Q: torch.zeros(32, 32, dtype=torch.int32)}))),
        "transformer.h.0.attn.qkv.weight",
        "floating-point",
    ),
    # .bin
    Case("an empty .bin", hf(text("pytorch_model.bin", b"")), "pytorch_model.bin is not a readable checkpoint", "truncated"),
    Case("a .bin of text", hf(text("pytorch_model.bin", "x")), "pytorch_model.bin is not a readable checkpoint", "plain tensors"),
    Case("a .bin index upwards", hf(index(["../../x.bin"], "bin")), "'../../x.bin'", "inside the folder"),
]
GGUF = [
    Case("another magic", patched(lambda content: b"GGML" + content[4:]), "model.gguf", "starts with b'GGUF'"),
    Case("version 1", patched(at(4, "<I", 1)), "version 1", "versions 2 and 3"),
    Case("the other byte order", patched(at(4, ">I", 3)), "big-endian", "little-endian"),
    Case("cut in the header", patched(lambda content: content[:200]), "model.gguf", "truncated"),
    Case("cut in the data", patched(lambda content: content[:-500]), "model.gguf", "truncated"),
    Case("2^64 tensors", patched(at(8, "<Q", 2**64 - 1)), "18446744073709551615 entries", "truncated or broken"),
    Case("2^64 keys", patched(at(16, "<Q", 2**64 - 1)), "18446744073709551615 entries", "truncated or broken"),
    Case("a key of 2^63 letters", patched(at(24, "<Q", 2**63)), "model.gguf", "truncated or broken"),
    Case("no architecture", gguf({"general.architecture": ...}), "no general.architecture", "model.gguf"),
    Case("another architecture", gguf({"general.architecture": "mamba"}), "'mamba'", "llama"),
    Case("an adapter's file", gguf({"general.type": "adapter"}), "model.gguf is not a model", "litgpt convert_adapter"),
    Case("an architecture as a number", gguf({"general.architecture": 3}), "general.architecture", "3"),
    Case("no blocks", gguf({"llama.block_count": 0}), "llama.block_count is 0", "model.gguf"),
    Case("blocks as text", gguf({"llama.block_count": "two"}), "llama.block_count is two", "not supported"),
    Case("negative blocks", gguf({"llama.block_count": -2}), "llama.block_count is -2", "model.gguf"),
    Case("a billion blocks", gguf({"llama.block_count": 10**9}), "1000000000 blocks (llama.block_count)", "only 20 tensors"),
    Case("no width", gguf({"llama.embedding_length": ...}), "no llama.embedding_length", "model.gguf"),
    Case("another width", gguf({"llama.embedding_length": 64}), "token_embd.weight", "is expected"),
    Case("no heads", gguf({"llama.attention.head_count": 0}), "llama.attention.head_count is 0", "model.gguf"),
    Case("groups that do not divide", gguf({"llama.attention.head_count_kv": 3}), "n_query_groups (3)", "not a multiple"),
    Case(
        "an odd head",
        gguf({"llama.attention.key_length": 7, "llama.rope.dimension_count": 7, "llama.attention.value_length": 7}),
        "is 7",
        "only the whole head, here 7, is supported",
    ),
    Case("no number as eps", gguf({"llama.attention.layer_norm_rms_epsilon": float("nan")}), "layer_norm_rms_epsilon is nan", "model.gguf"),
    Case("an infinite rope", gguf({"llama.rope.freq_base": float("inf")}), "llama.rope.freq_base is inf", "model.gguf"),
    Case("an unknown rope", gguf({"llama.rope.scaling.type": "wavy"}), "'wavy'", "linear"),
    Case("experts", gguf({"llama.expert_count": 8}), "n_expert 8", "at least 1 expert"),
    Case("a part of a file", gguf({"split.count": 3}), "split.count", "-00001-of-00003.gguf"),
    Case("an alignment of 3", gguf({"general.alignment": 3}), "general.alignment is 3", "power of two"),
    Case("an alignment of 2^31", gguf({"general.alignment": 2**31}), "model.gguf", "truncated or broken"),
    Case("a missing tensor", gguf(None, {"blk.1.ffn_up.weight": ...}), "blk.1.ffn_up.weight", "missing"),
    Case("an unknown tensor", gguf(None, {"blk.1.extra.weight": (4,)}), "blk.1.extra.weight", "unknown"),
    Case("a wrong shape", gguf(None, {"blk.1.ffn_up.weight": (4, 4)}), "blk.1.ffn_up.weight", "shape (4, 4) where (72, 32) is expected"),
    Case("no embedding", gguf(None, {"token_embd.weight": ...}), "no tensor token_embd.weight", "model.gguf"),
    Case("an unknown tokenizer", gguf({"tokenizer.ggml.model": "bert"}), "tokenizer.ggml.model is 'bert'", "'gpt2'"),
    Case("an unknown pre-tokenizer", gguf({"tokenizer.ggml.pre": "mystery"}), "tokenizer.ggml.pre is 'mystery'", "smollm"),
    Case("no tokens", gguf({"tokenizer.ggml.tokens": ...}), "no tokenizer.ggml.tokens", "model.gguf"),
    Case("tokens as numbers", gguf({"tokenizer.ggml.tokens": [1, 2, 3]}), "tokenizer.ggml.tokens", "model.gguf"),
    Case("the same token twice", gguf({"tokenizer.ggml.tokens": ["a"] * 320}), "the tokenizer cannot be built", "vocabulary"),
    Case("types too few", gguf({"tokenizer.ggml.token_type": [1, 1]}), "2 entries in tokenizer.ggml.token_type", "320 tokens"),
    Case("types as texts", gguf({"tokenizer.ggml.token_type": ["a"] * 320}), "tokenizer.ggml.token_type", "not supported"),
    Case("a merge of three", gguf({"tokenizer.ggml.merges": ["a b c"]}), "'a b c'", "two tokens"),
    Case("merges as numbers", gguf({"tokenizer.ggml.merges": [1, 2]}), "tokenizer.ggml.merges", "model.gguf"),
    Case("a merge of nothing known", gguf({"tokenizer.ggml.merges": ["qq zz"]}), "the tokenizer cannot be built", "qq"),
    Case("an end beyond the tokens", gguf({"tokenizer.ggml.eos_token_id": 5000}), "tokenizer.ggml.eos_token_id is 5000", "320 tokens"),
    Case("scores missing", gguf({"tokenizer.ggml.model": "llama"}), "no tokenizer.ggml.scores", "model.gguf"),
    Case("a template that is a number", gguf({"tokenizer.chat_template": 5}), "tokenizer.chat_template is 5", "not supported"),
    Case("a name of a path", gguf({"general.architecture": "../../x"}), "'../../x'", "llama"),
]
ROWS = [*SOURCES, *HF, *GGUF]


@pytest.mark.parametrize("case", quick(ROWS, *ROWS[::3]), ids=lambda case: case.name)
def test_bad_source(case: Case, place: Place) -> None:
    check(case, place)
