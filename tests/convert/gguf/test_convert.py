"""GGUF files into checkpoint folders: the logits are transformers', the weights the file's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from litgpt.checkpoint import load_weights
from litgpt.config import Config
from litgpt.convert.gguf.reader import Reader
from litgpt.convert.to_litgpt import convert_to_litgpt
from litgpt.errors import UserError
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from tests.helpers import gguf_files
from tests.helpers.gguf_files import AddMetadata

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ROPE_TABLE = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}, "head_dim": 64}


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, ROPE_TABLE, {"head_dim": 32}], ids=["plain", "tied", "llama 3.1", "head size"]
)
def test_logits_equal_those_of_transformers(tmp_path: Path, byte_level: AddMetadata, changes: dict[str, Any]) -> None:
    model = gguf_files.llama(**changes)

    def rope_table(writer: gguf.GGUFWriter) -> None:
        if changes is ROPE_TABLE:
            plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
            writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32))
        if "head_dim" in changes:
            writer.add_key_length(changes["head_dim"])
            writer.add_value_length(changes["head_dim"])

    convert_to_litgpt(gguf_files.write(tmp_path / "tiny.gguf", model, byte_level, extra=rope_table), tmp_path / "lit")
    gguf_files.assert_same_logits(model, tmp_path / "lit")
    config = Config.from_checkpoint(tmp_path / "lit")
    assert (config.name, config.norm_eps) == ("Tiny-Model", 1e-6)
    if changes is ROPE_TABLE:
        assert config.rope_adjustments == {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}


@pytest.mark.parametrize(
    ("kind", "dtype", "bits"),
    [("Q8_0", torch.bfloat16, 8), ("F16", torch.float16, 11), ("BF16", torch.bfloat16, 8), ("Q4_1", torch.bfloat16, 8)],
)
def test_stored_dtypes(tmp_path: Path, byte_level: AddMetadata, kind: str, dtype: torch.dtype, bits: int) -> None:
    """Each stored weight is the file's, rounded to the dtype: what `gguf.dequantize` gives, within half a unit in the last place."""
    model = gguf_files.llama()
    convert_to_litgpt(gguf_files.write(tmp_path / "tiny.gguf", model, byte_level, kind=kind), tmp_path / "lit")
    weights = load_weights(tmp_path / "lit" / "lit_model.pth")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    quantised = gguf.GGMLQuantizationType[kind]
    original = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    expected = torch.from_numpy(np.array(gguf.dequantize(gguf.quantize(original, quantised), quantised)))
    torch.testing.assert_close(weights["transformer.h.1.mlp.proj.weight"].float(), expected, rtol=2.0**-bits, atol=1e-7)

    convert_to_litgpt(tmp_path / "tiny.gguf", tmp_path / "wide", dtype="float32")
    exact = load_weights(tmp_path / "wide" / "lit_model.pth")["transformer.h.1.mlp.proj.weight"]
    assert torch.equal(exact, expected)


def test_linear_rope_scaling(tmp_path: Path, byte_level: AddMetadata) -> None:
    model = gguf_files.llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})

    def scaling(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    convert_to_litgpt(gguf_files.write(tmp_path / "tiny.gguf", model, byte_level, extra=scaling), tmp_path / "lit")
    gguf_files.assert_same_logits(model, tmp_path / "lit")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), r"has no llama\.rope\.scaling\.original_context_length"),
        (lambda w: w.add_string("llama.rope.scaling.type", "odd"), r"llama\.rope\.scaling\.type is 'odd'"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 9, 8, dtype=np.float32)), r"rope_freqs\.weight is not Llama 3\.1's"),
        (lambda w: w.add_expert_count(8), "LLaMAMoE with n_expert 8 and n_expert_per_token 0"),
        (lambda w: w.add_uint16("split.count", 3), "is one of 3 parts .* must end in -00001-of-00003.gguf"),
        (lambda w: w.add_key_length(15), "dimension_count is 16, but only the whole head, here 15, is supported"),
        (lambda w: w.add_value_length(8), "value_length is 8"),
        (lambda w: w.add_pad_token_id(5000), "padding_token_id is 5000, but there are 320 tokens"),
        (lambda w: w.add_chat_template("x") or w.add_string("llama.attention.sliding_window", "y"), "sliding_window is y"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.float32)), r"missing: blk\.\{0,1\}\.attn_k\.bias"),
        (lambda w: w.add_tensor("blk.7.odd.weight", np.zeros(64, np.float32)), r"unknown: blk\.7\.odd\.weight"),
        (lambda w: w.add_tensor("odd.weight", np.zeros((2, 4), np.int32)), "the type I32, which cannot be read"),
    ],
)
def test_unsupported_files_name_the_key(
    tmp_path: Path, byte_level: AddMetadata, extra: Callable[[gguf.GGUFWriter], Any], message: str
) -> None:
    path = gguf_files.write_tiny(tmp_path, byte_level, extra)
    with pytest.raises(UserError, match=message) as caught:
        convert_to_litgpt(path, tmp_path / "lit")
    assert str(path) in str(caught.value)
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".lock"] == ["tiny.gguf"], "nothing may be left behind"


def split_tiny(folder: Path, byte_level: AddMetadata) -> tuple[list[Path], Any]:
    """Write a tiny model as llama.cpp splits files: here the tensors in turn into three parts, by the gguf library."""
    whole = Reader(gguf_files.write_tiny(folder, byte_level, lambda writer: None))
    parts = []
    for number in range(3):
        writer = gguf.GGUFWriter(folder / f"tiny-Q8_0-{number + 1:05}-of-00003.gguf", "llama")
        for key, value in whole.metadata.items() if number == 0 else ():
            if key not in ("general.architecture", "general.name"):
                kind = gguf.GGUFValueType.get_type(value.tolist() if hasattr(value, "tolist") else value)
                writer.add_key_value(key, value.tolist() if hasattr(value, "tolist") else value, kind)
        for key, value in (("no", number), ("count", 3)):
            writer.add_uint16(f"split.{key}", value)
        writer.add_int32("split.tensors.count", len(whole.tensors))
        for name in list(whole.tensors)[number::3]:
            writer.add_tensor(name, whole.array(name))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(folder / f"tiny-Q8_0-{number + 1:05}-of-00003.gguf")
    convert_to_litgpt(folder / "tiny.gguf", folder / "lit")
    (folder / "tiny.gguf").unlink()
    return parts, load_weights(folder / "lit" / "lit_model.pth")


@pytest.mark.parametrize("given", [0, 2, None])
def test_split_files(tmp_path: Path, byte_level: AddMetadata, given: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any part, or the folder, stands for all; the checkpoint bears the name without the parts' numbers."""
    monkeypatch.chdir(tmp_path)
    parts, weights = split_tiny(tmp_path, byte_level)
    (tmp_path / "parts").mkdir()
    parts = [part.rename(tmp_path / "parts" / part.name) for part in parts]
    convert_to_litgpt(tmp_path / "parts" if given is None else parts[given])
    again = load_weights(tmp_path / "checkpoints" / "tiny-Q8_0" / "lit_model.pth")
    assert again.keys() == weights.keys() and all(torch.equal(again[key], weights[key]) for key in weights)
    assert Config.from_checkpoint(tmp_path / "checkpoints" / "tiny-Q8_0").name == "tiny"


def test_split_files_that_are_not_complete(tmp_path: Path, byte_level: AddMetadata) -> None:
    parts, _ = split_tiny(tmp_path, byte_level)
    content = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(UserError, match="is one of 3 parts: tiny-Q8_0-00002-of-00003.gguf is missing next to it"):
        convert_to_litgpt(parts[0], tmp_path / "new")
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(UserError, match="00002-of-00003.gguf is not the part that its name says"):
        convert_to_litgpt(parts[0], tmp_path / "new")
    parts[1].write_bytes(content[:-100])
    with pytest.raises(UserError, match="truncated or broken"):
        convert_to_litgpt(parts[0], tmp_path / "new")


def test_other_architectures_and_missing_tensors(tmp_path: Path, byte_level: AddMetadata) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="unsupported architecture 'mamba'; supported are falcon, gemma, .*llama, .*stablelm"):
        convert_to_litgpt(tmp_path / "other.gguf", tmp_path / "lit")
    path = gguf_files.write_tiny(tmp_path, byte_level, lambda writer: None, skip=("model.norm.weight", "model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"missing: blk\.1\.ffn_up\.weight, output_norm\.weight"):
        convert_to_litgpt(path, tmp_path / "lit")


def test_names(tmp_path: Path, smollm2_gguf: Path, byte_level: AddMetadata) -> None:
    path = gguf_files.write_tiny(tmp_path, byte_level, lambda writer: None)
    named = path.rename(tmp_path / "smollm2-135m-instruct-Q4_K_M.gguf")
    convert_to_litgpt(named, tmp_path / "a")
    assert Config.from_checkpoint(tmp_path / "a").name == "Tiny-Model", "a name alone does not make a model"
    with pytest.raises(UserError, match="is not of the model SmolLM2-135M: n_layer is 2, expected 30"):
        convert_to_litgpt(named, tmp_path / "b", model_name="SmolLM2-135M")


@pytest.mark.slow
@torch.inference_mode()
def test_smollm2_knows_the_capital_of_france(smollm2_dir: Path) -> None:
    tokenizer = Tokenizer(smollm2_dir)
    model = GPT(Config.from_checkpoint(smollm2_dir))
    model.load_state_dict(load_weights(smollm2_dir / "lit_model.pth"))
    logits = model.float()(tokenizer.encode("The capital of France is")[None])
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


@pytest.mark.slow
@torch.inference_mode()
def test_smollm2_logits_equal_those_of_transformers(smollm2_gguf: Path, tmp_path: Path) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)
    convert_to_litgpt(smollm2_gguf, tmp_path / "lit", dtype="float32")
    gguf_files.assert_same_logits(reference.eval(), tmp_path / "lit", tolerance=1e-3)
