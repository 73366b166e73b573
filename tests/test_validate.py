"""`litgpt validate` on whole folders, and on folders with one thing wrong each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from litgpt import atomic, checkpoint, validate
from litgpt.__main__ import main
from tests.helpers import tiny
from tests.helpers.cases import quick

LLAMA = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": 48, "bias": False, "parallel_residual": False}
ADAPTER: dict[str, Any] = {"lora_r": 2, "lora_query": True, "skip2lora_enabled": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("whole") / "base", write_tiny_tokenizer)


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "base"))


def run(capsys: pytest.CaptureFixture[str], folder: Path) -> tuple[int, str, str]:
    code = main(["validate", str(folder)])
    out, err = capsys.readouterr()
    return code, out, err


def change(folder: Path, **tensors: Any) -> None:
    """Replace (None: remove) tensors of lit_model.pth; __ stands for a dot."""
    stored = {name: value.clone() for name, value in checkpoint.load_weights(folder / "lit_model.pth").items()}
    for name, value in tensors.items():
        key = name.replace("__", ".")
        stored.pop(key, None)
        if value is not None:
            stored[key] = value
    checkpoint.save_weights(stored, folder / "lit_model.pth")


def test_a_whole_checkpoint(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, base)
    assert code == 0 and not err
    for word in ("files", "manifest", "config", "tokenizer", "prompt style", "weights", "values"):
        assert f"\n  ok  {word} " in out
    for method, *_ in validate.TRAINING:
        assert f"\n  {method} " in out
    numbers = sum(value.numel() for value in validate.unique(checkpoint.load_weights(base / "lit_model.pth")).values())
    assert f"{numbers:,} parameters" in out and "8 x 256 tokens" in out


@pytest.mark.slow
def test_any_form(tmp_path: Path, smollm2_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real one, at its figures."""
    code, out, _ = run(capsys, smollm2_dir)
    assert code == 0 and "134,515,008 parameters, bfloat16" in out and "460,800" in out


DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a file is missing": (lambda folder: (folder / "tokenizer.json").unlink(), ["files: tokenizer.json is missing", "tokenizer: "]),
    "a file is empty": (lambda folder: (folder / "model_config.yaml").write_text(""), ["files: model_config.yaml is empty", "config: "]),
    "weights are cut off": (
        lambda folder: (folder / "lit_model.pth").write_bytes((folder / "lit_model.pth").read_bytes()[:-500]),
        ["weights: ", "is not a readable checkpoint"],
    ),
    "a weight is missing, another unknown": (
        lambda folder: change(folder, transformer__h__1__mlp__proj__weight=None, extra__weight=torch.ones(2, 2)),
        ["transformer.h.1.mlp.proj.weight is missing", "extra.weight is unknown"],
    ),
    "a shape": (lambda folder: change(folder, lm_head__weight=torch.ones(3, 4)), ["lm_head.weight has shape (3, 4)"]),
    "an empty tensor": (lambda folder: change(folder, lm_head__weight=torch.ones(0, 32)), ["lm_head.weight has shape (0, 32)"]),
    "whole numbers": (lambda folder: change(folder, lm_head__weight=torch.ones(320, 32).int()), ["lm_head.weight holds torch.int32"]),
    "not a number": (
        lambda folder: change(folder, transformer__wte__weight=torch.full((320, 32), torch.nan).index_fill_(0, torch.arange(319), 1.0)),
        ["values: transformer.wte.weight: 32 of 10,240 values are not finite"],
    ),
    "infinite": (
        lambda folder: change(folder, transformer__ln_f__weight=torch.full((32,), torch.inf)),
        ["transformer.ln_f.weight: 32 of 32 values are not finite"],
    ),
    "zeros": (lambda folder: change(folder, lm_head__weight=torch.zeros(320, 32)), ["lm_head.weight is zero everywhere"]),
    "a strange tokenizer": (lambda folder: tokens(folder, 330), ["has the id 329, the model has 320", "belongs to another model"]),
    "a tokenizer that loses text": (lambda folder: lossy(folder), ["tokenizer: ", "comes back as"]),
    "no end": (
        lambda folder: [(folder / name).write_text("{}") for name in ("tokenizer_config.json", "generation_config.json")],
        ["no eos token"],
    ),
    "a template that fails": (lambda folder: template(folder, "{{ messages[9].content }}"), ["prompt style: ", "chat template failed"]),
    "a template that forgets": (
        lambda folder: template(folder, "{{ messages[0].content }}"),
        ["prompt style: 'two' is not in the conversation", "prompt style: 'three'"],
    ),
    "not as the manifest says": (
        lambda folder: (atomic.write_manifest(folder), (folder / "tokenizer.json").open("a").write(" ")),
        ["manifest: tokenizer.json has"],
    ),
    "a broken manifest": (lambda folder: (folder / "manifest.json").write_text("[]"), ["manifest: manifest.json is missing or broken"]),
}


def tokens(folder: Path, count: int) -> None:
    """A vocabulary whose entry for "the" lies at the end of `count`."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["a"] = count - 1
    file.write_text(json.dumps(content))


def lossy(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def template(folder: Path, text: str) -> None:
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**content, "chat_template": text}))


@pytest.mark.parametrize("damage", quick(DAMAGES, *list(DAMAGES)[::2]))
def test_what_is_wrong_is_named(damage: str, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    act, messages = DAMAGES[damage]
    act(base)
    code, out, err = run(capsys, base)
    assert code == 1 and err.startswith(f"Error: {base} has ") and "\n  NO  " in out
    assert [message for message in messages if message not in err] == [], err


def test_all_problems_at_once(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template(base, "{{ messages[9].content }}")
    change(base, lm_head__weight=torch.zeros(320, 32), transformer__ln_f__weight=torch.full((32,), torch.nan))
    code, _, err = run(capsys, base)
    assert code == 1 and err.startswith(f"Error: {base} has 3 problems:\n  prompt style: ") and len(err.splitlines()) == 4


def test_an_adapter(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**ADAPTER, "skip2lora_block_indices": [0]}
    folder = tiny.write_adapter(tmp_path / "adapter", whole, tiny.tiny(**{**tiny.SPEAKING, **settings}), **settings)
    code, out, _ = run(capsys, folder)
    assert code == 0 and "\n  ok  base: values " in out and "fits its base" in out and "this adapter" in out

    weights = torch.load(folder / "lit_model.pth.lora", weights_only=True)
    some = next(iter(weights["model"]))
    weights["model"][some] = weights["model"][some] * torch.nan
    torch.save(weights, folder / "lit_model.pth.lora")
    code, out, err = run(capsys, folder)
    assert code == 1 and f"values: {some}: " in err and "not finite" in err

    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({"checkpoint_dir": str(whole), **settings, "lora_r": 3}))
    assert "adapter: " in run(capsys, folder)[2]
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({"checkpoint_dir": str(tmp_path / "gone"), **settings}))
    assert "base: " in run(capsys, folder)[2]


def test_a_damaged_base_is_told_apart(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**ADAPTER, "skip2lora_block_indices": [0]}
    folder = tiny.write_adapter(tmp_path / "adapter", base, tiny.tiny(**{**tiny.SPEAKING, **settings}), **settings)
    change(base, lm_head__weight=torch.zeros(320, 32))
    code, _, err = run(capsys, folder)
    assert code == 1 and "base: values: lm_head.weight is zero everywhere" in err


def test_memory_in_a_format(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, gradients and two moments of each parameter."""
    config = checkpoint.load_model(whole, torch.float32).config
    stored = checkpoint.load_weights(whole / checkpoint.WEIGHTS)
    number = sum(value.numel() for value in validate.unique(stored).values())
    assert main(["validate", str(whole), "--dtype", "float16", "--training", "true"]) == 0
    assert f"{number * 8 / 2**30:.2f} GiB to train all {number:,} weights in float16" in capsys.readouterr().out
    half, full = (validate.estimate_model_memory(config, kind) for kind in (torch.bfloat16, "float32"))
    assert full["param_memory_gb"] == 2 * half["param_memory_gb"] and full["estimated_total_gb"] == full["param_memory_gb"]
    assert main(["validate", str(whole), "--dtype", "float8"]) == 2


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, tmp_path / "nowhere")[0] == 1
    code, _, err = run(capsys, tmp_path)
    assert code == 1 and all(f"files: {name} is missing" in err for name in ("lit_model.pth", "model_config.yaml", "tokenizer.json"))
