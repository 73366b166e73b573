"""Every architecture that has a GGUF name: a transformers model -> checkpoint -> GGUF -> checkpoint, and GGUF -> transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from litgpt.checkpoint import load_weights, save_weights
from litgpt.config import Config
from litgpt.convert.compare import essence
from litgpt.convert.gguf.config import read_config
from litgpt.convert.gguf.convert import convert_gguf
from litgpt.convert.gguf.export import convert_to_gguf
from litgpt.convert.gguf.reader import Reader
from litgpt.convert.gguf.writer import BLOCKS, choose, group, write_gguf
from litgpt.convert.hf import hf_settings, to_hf
from litgpt.errors import UserError
from litgpt.rope import frequencies
from litgpt.tokenizer import Tokenizer
from tests.helpers import gguf_files
from tests.helpers.cases import first, quick


@pytest.mark.parametrize("case", gguf_files.QUICK_FIRST)
@torch.inference_mode()
def test_there_and_back_and_into_transformers(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path], case: str) -> None:
    family, changes, architecture, known = gguf_files.CASES[case]
    hf, folder = gguf_files.checkpoint_folder(tmp_path, write_tiny_tokenizer, family, **changes)
    convert_to_gguf(folder, tmp_path / "x.gguf")
    convert_gguf(tmp_path / "x.gguf", tmp_path / "again")

    assert Reader(tmp_path / "x.gguf").metadata["general.architecture"] == architecture
    before, after = Config.from_checkpoint(folder), Config.from_checkpoint(tmp_path / "again")
    ignored = {"router_aux_loss_coef": None}  # training's
    assert essence(after) | ignored == essence(before) | ignored
    assert (after.vocab_size, after.padded_vocab_size) == (320, gguf_files.V)
    old, new = load_weights(folder / "lit_model.pth"), load_weights(tmp_path / "again" / "lit_model.pth")
    assert new.keys() == old.keys()
    for key, weight in old.items():
        exact = ("norm" not in key and "ln_f" not in key) or not before.unit_offset  # 1 + weight was rounded
        torch.testing.assert_close(new[key], weight, rtol=0, atol=0 if exact else 2e-7)
    torch.testing.assert_close(gguf_files.logits(tmp_path / "again"), hf(gguf_files.IDS).logits, atol=1e-4, rtol=1e-4)
    tokenizer = Tokenizer(tmp_path / "again")
    assert tokenizer.ids("the task <|im_end|>") == Tokenizer(folder).ids("the task <|im_end|>") and tokenizer.vocab_size == 320
    if known:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32).eval()
        assert theirs.config.model_type == hf.config.model_type
        torch.testing.assert_close(theirs(gguf_files.IDS).logits, hf(gguf_files.IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "architecture"),
    quick(
        [
            ("Llama-3.2-1B", "llama"),
            ("Mistral-7B-v0.1", "llama"),
            ("Mixtral-8x7B-v0.1", "llama"),
            ("Qwen2.5-0.5B", "qwen2"),
            ("Qwen3-0.6B", "qwen3"),
            ("Gemma-2-27b", "gemma2"),
            ("Gemma-3-27b-it", "gemma3"),
            ("phi-2", "phi2"),
            ("Phi-3.5-mini-instruct", "phi3"),
            ("Phi-4-mini-instruct", "phi3"),
            ("gpt-neox-20b", "gptneox"),
            ("falcon-40b", "falcon"),
            ("SmolLM3-3B", "smollm3"),
        ],
        ("Llama-3.2-1B", "llama"),
        ("Qwen3-0.6B", "qwen3"),
        ("gpt-neox-20b", "gptneox"),
    ),
)
def test_named_models_have_an_architecture(name: str, architecture: str) -> None:
    """With the rotary tables, scales and windows of the real sizes."""
    config = Config.from_name(name)
    made, _ = choose(
        config, {"tokenizer.ggml.tokens": ["x"] * config.vocab_size}, Path("x.gguf"), "emma" in name, to_hf(config)["model_type"]
    )
    assert made.architecture == architecture
    found = read_config(made)
    apart = {"router_aux_loss_coef": None, "rope_adjustments": None}
    assert essence(found) | apart == essence(config) | apart
    for long in (False, True):
        torch.testing.assert_close(frequencies(found, long), frequencies(config, long), rtol=1e-5, atol=0)
    scales = [(each.rope_adjustments or {}).get("attention_factor", 1) for each in (found, config)]
    assert scales[0] == pytest.approx(scales[1], rel=1e-6)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    first(
        [
            ("qwen2 window", {}, r"sliding_window_indices \[1, 1, 1\] instead of \[0, 1, 1\]"),
            ("qwen3_moe not normalised", {}, "the nearest, qwen3moe, has norm_topk_prob True instead of False"),
            ("llama yarn not truncated", {}, "truncate"),
            ("gemma2", {}, "the nearest, gemma2, has attention_scores_scalar 10 instead of 20"),
            (
                "gemma3",
                {"query_pre_attn_scalar": 10},
                r"the nearest, gemma3, has sliding_window_indices \[1, 1, 1\] instead of \[1, 1, 0\]",
            ),
            ("smollm3", {}, r"the nearest, smollm3, has rope_indices \[0, 0, 0, -1\] instead of \[0, 0, -1, 0\]"),
            ("gemma", {"tie_word_embeddings": False}, "the nearest, gemma, has no place for output.weight"),
            ("llama 3.1", {}, "the nearest, llama, has rope_freqs.weight is not Llama 3.1's rotary scaling"),
        ],
        3,
    ),
)
def test_what_no_architecture_expresses_is_named(
    tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path], family: str, changes: dict[str, Any], message: str
) -> None:
    _, folder = gguf_files.checkpoint_folder(tmp_path, write_tiny_tokenizer, family, **changes)
    with pytest.raises(
        UserError, match="no architecture of GGUF expresses this model; " + (".*" if "nearest" not in message else "") + message
    ):
        write_gguf(folder, tmp_path / "x.gguf")
    assert not [file for file in tmp_path.iterdir() if "gguf" in file.name]


@pytest.mark.parametrize("kind", quick(["F32", "F16", "BF16", *BLOCKS], "F32", "BF16", "Q4_0", "Q8_0"))
def test_number_formats(tmp_path: Path, mixture: Path, kind: str) -> None:
    """Each tensor is what the gguf library makes of the weight, in the type that llama.cpp would choose."""
    convert_to_gguf(mixture, tmp_path / "x.gguf", dtype=kind.lower())  # type: ignore[arg-type]
    weights, config = load_weights(mixture / "lit_model.pth"), Config.from_checkpoint(mixture)
    groups = group("llama", config, {key: tuple(weight.shape) for key, weight in weights.items()}, tied=False)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert tensors.keys() == groups.keys()
    for name in (
        "blk.1.ffn_up_exps.weight",
        "blk.1.ffn_down_exps.weight",
        "blk.1.ffn_gate_inp.weight",
        "output_norm.weight",
        "output.weight",
        "blk.0.attn_v.weight",
    ):
        stored = [weights[slot.key] for slot in groups[name].slots]
        value = torch.stack(stored) if "exps" in name else stored[0]
        if name == "blk.0.attn_v.weight":
            value = value[-16:]
        expected = "F32" if "norm" in name or "inp" in name else "F16" if kind in BLOCKS and "down" in name else kind
        if kind in BLOCKS and name in ("token_embd.weight", "output.weight"):
            expected = "Q8_0"
        assert tensors[name].tensor_type.name == expected
        made = gguf.quantize(value.numpy(), tensors[name].tensor_type)
        assert np.array_equal(tensors[name].data.view(np.uint8), made.view(np.uint8).reshape(tensors[name].data.view(np.uint8).shape))
    assert {field.contents() for name, field in gguf.GGUFReader(tmp_path / "x.gguf").fields.items() if name == "general.file_type"} == {
        gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]
    }
    convert_gguf(tmp_path / "x.gguf", tmp_path / "again")
    again = load_weights(tmp_path / "again" / "lit_model.pth")
    stated = {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)
    assert {weight.dtype for weight in again.values()} == {stated}
    if kind not in BLOCKS:
        assert all(torch.equal(again[key], weight.to(stated)) for key, weight in weights.items())


@pytest.mark.slow
def test_paired_rows(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    """llama.cpp turns neighbours: rows 0, h/2, 1, h/2 + 1 ... of a head, for the architectures whose converter orders them so."""
    for family, paired in (("llama", True), ("granite", True), ("olmo", True), ("qwen2", False), ("gemma", False), ("olmo2", False)):
        _, folder = gguf_files.checkpoint_folder(tmp_path / family, write_tiny_tokenizer, family)
        write_gguf(folder, tmp_path / "x.gguf")
        config, weights = Config.from_checkpoint(folder), load_weights(folder / "lit_model.pth")
        h = config.head_size or 0
        order = [head * h + half * (h // 2) + j for head in range(config.n_head) for j in range(h // 2) for half in (0, 1)]
        q = weights["transformer.h.1.attn.qkv.weight"][: h * config.n_head].numpy()
        assert np.array_equal(Reader(tmp_path / "x.gguf").array("blk.1.attn_q.weight"), q[order] if paired else q), family


def test_gemmas_norms_are_stored_with_one_added(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    _, folder = gguf_files.checkpoint_folder(tmp_path, write_tiny_tokenizer, "gemma")
    write_gguf(folder, tmp_path / "x.gguf")
    weight = load_weights(folder / "lit_model.pth")["transformer.h.0.norm_1.weight"]
    assert np.array_equal(Reader(tmp_path / "x.gguf").array("blk.0.attn_norm.weight"), (weight + 1).numpy())


def test_numbers_that_f16_cannot_hold(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    _, folder = gguf_files.checkpoint_folder(tmp_path, write_tiny_tokenizer, "qwen2")
    weights = {key: weight.clone() for key, weight in load_weights(folder / "lit_model.pth").items()}
    weights["transformer.h.1.mlp.proj.weight"][0, 0] = 7e4
    save_weights(weights, folder / "lit_model.pth")
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"blk\.1\.ffn_down\.weight holds numbers above 65504.*--dtype bf16"):
        write_gguf(folder, tmp_path / "x.gguf", "f16")
    assert write_gguf(folder, tmp_path / "x.gguf", "bf16") == "qwen2"


@pytest.mark.slow
def test_the_hubs_name_decides_between_architectures(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    """A plain Qwen 2 without biases computes what a Llama does: config.json says which it is."""
    _, folder = gguf_files.checkpoint_folder(tmp_path, write_tiny_tokenizer, "llama")
    assert hf_settings(Config.from_checkpoint(folder), folder)["model_type"] == "llama"
    assert write_gguf(folder, tmp_path / "x.gguf") == "llama"
    _, folder = gguf_files.checkpoint_folder(tmp_path / "phi3", write_tiny_tokenizer, "phi3")
    assert write_gguf(folder, tmp_path / "x.gguf") == "phi3"
    (folder / "config.json").unlink()
    assert write_gguf(folder, tmp_path / "x.gguf") == "llama"


@pytest.mark.slow
def test_smollm2_there_and_back(smollm2_dir: Path, tmp_path: Path) -> None:
    convert_to_gguf(smollm2_dir, tmp_path / "x.gguf", dtype="bf16")
    assert convert_gguf(tmp_path / "x.gguf", tmp_path / "again").name == "SmolLM2-135M-Instruct"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "model_config.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (smollm2_dir / name).read_bytes()
    old, new = load_weights(smollm2_dir / "lit_model.pth"), load_weights(tmp_path / "again" / "lit_model.pth")
    assert old.keys() == new.keys() and all(torch.equal(new[key], weight) for key, weight in old.items())
    assert new["lm_head.weight"].data_ptr() == new["transformer.wte.weight"].data_ptr()
