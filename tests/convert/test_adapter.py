"""`litgpt convert_adapter`, from folder to folder; and the real model, here, in PEFT and on transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from torch.testing import assert_close

from litgpt import checkpoint
from litgpt.__main__ import main
from litgpt.config import Config
from litgpt.convert.adapter import convert_adapter
from litgpt.errors import UserError
from litgpt.integrations.transformers import load_skip2lora
from litgpt.tokenizer import Tokenizer
from tests.helpers import tiny
from tests.helpers.runs import finetune, write_data

LORA: dict[str, Any] = {"lora_r": 3, "lora_alpha": 7, "lora_dropout": 0.0, "lora_query": True, "lora_mlp": True}
SKIP: dict[str, Any] = {"lora_r": 3, "skip2lora_enabled": True, "skip2lora_output_layer": "transformer.h.3", "lora_value": True}
IDX = tiny.ids(2, 15, V=320)


@pytest.fixture
def base(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    return tiny.write_base(tmp_path / "base", write_tiny_tokenizer)


def adapter(base: Path, name: str = "adapter", **settings: Any) -> Path:
    """An adapter folder with the files of a run that matter here."""
    model = tiny.move_adapters(tiny.tiny(**{**tiny.SPEAKING, **settings}))
    folder = tiny.write_adapter(base.parent / name, base, model, **settings)
    checkpoint.save_config(model.config, folder)
    (folder / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpaca\n")
    return folder


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {"manifest.json"}


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return checkpoint.load_model(folder, torch.float32)(IDX)


@pytest.mark.parametrize(("settings", "files"), [
    (LORA, {"adapter_config.json", "adapter_model.safetensors"}),
    (SKIP, {"skip2lora_config.json", "skip2lora_adapter.safetensors"}),
])  # fmt: skip
def test_there_and_back(settings: dict[str, Any], files: set[str], base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, back = adapter(base, **settings), base.parent / "new" / "out", base.parent / "back"
    assert main(["convert_adapter", str(source), str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert names(out) == files | {"README.md", "prompt_style.yaml"}
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {base.stat().st_mode & 0o666}, "as the umask has it"
    assert main(["convert_adapter", str(out), str(back), "--checkpoint_dir", str(base)]) == 0
    want = {"lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml", "prompt_style.yaml", "base.json"}
    assert names(back) == want | {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    before, after = (checkpoint.load_weights(folder / "lit_model.pth.lora") for folder in (source, back))
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(logits(source), logits(back)) and not torch.equal(logits(back), logits(base))
    assert (back / "prompt_style.yaml").read_text() == (source / "prompt_style.yaml").read_text()
    assert yaml.safe_load((back / "hyperparameters.yaml").read_text())["checkpoint_dir"] == str(base.resolve())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_merged_in_the_bases_precision(dtype: torch.dtype, base: Path) -> None:
    weights = {name: value.to(dtype) for name, value in checkpoint.load_weights(base / "lit_model.pth", mapped=False).items()}
    checkpoint.save_weights(weights, base / "lit_model.pth")
    convert_adapter(adapter(base, **LORA), base.parent / "out")
    convert_adapter(base.parent / "out", base.parent / "back", base)
    assert main(["merge_lora", str(base.parent / "back")]) == 0
    assert {value.dtype for value in checkpoint.load_weights(base.parent / "back" / "lit_model.pth").values()} == {dtype}


def test_the_base_is_not_needed_to_write(base: Path) -> None:
    source = adapter(base, **LORA)
    base.rename(base.parent / "moved")
    convert_adapter(source, base.parent / "out")
    assert (base.parent / "out" / "adapter_config.json").is_file()


def contents(folder: Path) -> dict[str, str]:
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


def test_refusals_leave_nothing(base: Path) -> None:
    source, out = adapter(base, **LORA), base.parent / "out"
    convert_adapter(source, out)
    before = contents(base.parent)
    wrong = adapter(base, "wrong", **LORA)
    (wrong / "hyperparameters.yaml").write_text(yaml.safe_dump({"checkpoint_dir": str(base), **LORA, "lora_r": 5}))
    other = base.parent / "other"
    cases: list[tuple[tuple[Path, ...], str]] = [
        ((source, out), "exists already"),
        ((out, other), "checkpoint folder as --checkpoint_dir"),
        ((out, other, base.parent / "nowhere"), "nowhere"),
        ((base, other), "cannot be converted: it has none of lit_model.pth.lora"),
        ((base.parent / "nothing", other), "cannot be converted: it has none of"),
        ((wrong, other), "does not fit the adapter settings"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            convert_adapter(*arguments)
        assert not other.exists() and before.items() <= contents(base.parent).items()
    assert not list(base.parent.glob(".*.tmp"))


def test_an_adapter_for_another_model(base: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    small = tiny.write_base(base.parent / "small", write_tiny_tokenizer, n_layer=2, intermediate_size=40)
    for number, settings in enumerate((LORA, SKIP)):
        out = base.parent / f"out{number}"
        convert_adapter(adapter(base, f"adapter{number}", **settings), out)
        with pytest.raises(UserError, match=r"layers\.\{2\.\.4\}|n_layer is 2, the adapter's 5"):
            convert_adapter(out, base.parent / "other", small)
    assert not (base.parent / "other").exists()


def real_run(smollm2_dir: Path, folder: Path, **settings: Any) -> Path:
    """The adapter of two steps of two samples."""
    few: dict[str, Any] = {"train__epochs": None, "train__max_steps": 2, "train__global_batch_size": 2, "train__save_interval": None}
    quiet: dict[str, Any] = {"eval__initial_validation": False, "eval__interval": 99, "eval__max_new_tokens": 0}
    data = write_data(folder / "data.json")
    done = finetune("finetune_lora", smollm2_dir, data, folder / "out", **few, **quiet, lora_r=8, lora_key=True, lora_mlp=True, **settings)
    assert done.code == 0, done.err
    return done.final


@pytest.fixture(scope="module")
def smollm2_hf(smollm2_dir: Path) -> Any:
    """SmolLM2 in transformers, float32."""
    return tiny.hf_of(Config.from_checkpoint(smollm2_dir), checkpoint.load_weights(smollm2_dir / "lit_model.pth"))


@pytest.mark.slow
def test_the_real_model_in_peft(smollm2_dir: Path, smollm2_hf: Any, tmp_path: Path) -> None:
    final = real_run(smollm2_dir, tmp_path, lora_projection=True, optimizer__lr=0.003)
    convert_adapter(final, tmp_path / "peft")
    idx = torch.tensor([Tokenizer(smollm2_dir).ids("The capital of France is Paris, and the sum of 3 and 4 is")])
    with torch.no_grad():
        want, plain = checkpoint.load_model(final, torch.float32)(idx), smollm2_hf(idx).logits
        adapted = peft.PeftModel.from_pretrained(smollm2_hf, tmp_path / "peft")
        got = adapted(idx).logits
    adapted.unload()
    assert_close(got, want, rtol=1e-4, atol=2e-4)
    assert (want - plain).abs().max() > 0.5
    told = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert set(told["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    text = (tmp_path / "peft" / "README.md").read_text()
    assert "SmolLM2-135M-Instruct" in text and "--lora_mlp true" in text and str(tmp_path) not in text


@pytest.mark.slow
def test_the_real_model_on_transformers(smollm2_dir: Path, smollm2_hf: Any, tmp_path: Path) -> None:
    """With LoRA behind the cut: all kinds of hooks."""
    skip = {"skip2lora_enabled": True, "skip2lora_output_layer": "transformer.h.27", "skip2lora_cache": "off"}
    final = real_run(smollm2_dir, tmp_path, **skip, optimizer__lr=0.01)
    convert_adapter(final, tmp_path / "portable")
    prompt = torch.tensor([Tokenizer(smollm2_dir).ids("<|im_start|>user\nadd 3 and 4<|im_end|>\n<|im_start|>assistant\n")])
    start = prompt.size(1)
    settings = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 16,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    plain = smollm2_hf.generate(prompt, **settings)[0, start:].tolist()
    ours = list(tiny.generate(checkpoint.load_model(final, torch.float32), prompt[0], start + 16, temperature=0.0))
    with load_skip2lora(smollm2_hf, tmp_path / "portable"):
        assert smollm2_hf.generate(prompt, **settings)[0, start:].tolist() == ours
    assert ours != plain
    assert smollm2_hf.generate(prompt, **settings)[0, start:].tolist() == plain
