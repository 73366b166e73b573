"""`litgpt merge_lora`: the merged folder is a checkpoint of its own that computes what base and adapter computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.testing import assert_close

from litgpt import atomic, checkpoint, lora
from litgpt.__main__ import main
from litgpt.adapters.base import adapter_parameters, adapter_state
from litgpt.convert.adapter import convert_adapter
from litgpt.convert.hf import Reader
from litgpt.convert.merge import merge_lora
from litgpt.errors import UserError
from litgpt.lora import VARIANTS, LoRALinear
from tests.helpers import runs, tiny

LORA: dict[str, Any] = {"lora_r": 3, "lora_alpha": 7, **tiny.ALL_LORA}
PRECISIONS = {"32-true": "float32", "bf16-true": "bfloat16"}
SKIP: dict[str, Any] = {"lora_r": 3, "skip2lora_enabled": True}


@pytest.fixture
def base(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    return tiny.write_base(tmp_path / "base", write_tiny_tokenizer)


def adapter(base: Path, **settings: Any) -> Path:
    model = tiny.move_adapters(tiny.tiny(**{**tiny.SPEAKING, **settings}))
    return tiny.write_adapter(base.parent / "adapter", base, model, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_merged_folder_stands_alone(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adapter(base, **LORA)
    idx = tiny.ids(2, 15, V=320)
    with torch.no_grad():
        want, plain = (checkpoint.load_model(path, torch.float32)(idx) for path in (folder, base))
    assert main(["merge_lora", str(folder)]) == 0
    assert str(folder / "lit_model.pth") in capsys.readouterr().out
    assert checkpoint.load_weights(folder / "lit_model.pth").keys() == checkpoint.load_weights(base / "lit_model.pth").keys()
    base.rename(base.parent / "gone")
    with torch.no_grad():
        got = checkpoint.load_model(folder, torch.float32)(idx)
    assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert (got - plain).abs().max() > 0.05


def test_the_folder_of_a_run_stands_for_its_result(base: Path) -> None:
    run = base.parent / "run"
    for steps in (4, 12):
        folder = adapter(base, **LORA)
        run.mkdir(exist_ok=True)
        folder.rename(run / f"step-{steps:06d}")
    convert_adapter(run, base.parent / "peft")
    merge_lora(run)
    assert (run / "step-000012" / "lit_model.pth").is_file() and not (run / "step-000004" / "lit_model.pth").exists()


def test_a_base_elsewhere_and_another_precision(base: Path) -> None:
    folder = adapter(base, **LORA)
    moved = base.rename(base.parent / "moved")
    with pytest.raises(UserError, match="no such folder"):
        merge_lora(folder)
    merge_lora(folder, moved, "bf16-true")
    assert {value.dtype for value in checkpoint.load_weights(folder / "lit_model.pth").values()} == {torch.bfloat16}


def test_precision_is_that_of_training(base: Path) -> None:
    folder = adapter(base, **LORA)
    values = yaml.safe_load((folder / "hyperparameters.yaml").read_text())
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({**values, "precision": "bf16-true"}))
    merge_lora(folder)
    assert {value.dtype for value in checkpoint.load_weights(folder / "lit_model.pth").values()} == {torch.bfloat16}


def test_own_files_are_kept(base: Path, tmp_path: Path) -> None:
    """An adapter folder's tokenizer may differ from its base's (an added token)."""
    folder = adapter(base, **LORA)
    (folder / "tokenizer.json").write_text("own")
    merge_lora(folder)
    assert (folder / "tokenizer.json").read_text() == "own"
    assert (folder / "model_config.yaml").read_text() == (base / "model_config.yaml").read_text()


def test_skip2lora_is_refused_and_nothing_written(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adapter(base, **SKIP)
    before = contents(folder)
    assert main(["merge_lora", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: Skip2-LoRA cannot be merged: its adapters add functions of earlier blocks' outputs")
    assert contents(folder) == before


def test_refusals(base: Path) -> None:
    with pytest.raises(UserError, match=r"holds no adapter: lit_model\.pth\.lora is missing") as caught:
        merge_lora(base)
    assert str(base) in str(caught.value)
    folder = adapter(base, **LORA)
    with pytest.raises(UserError, match="precision 'bf17' is unknown"):
        merge_lora(folder, precision="bf17")
    with pytest.raises(UserError, match="nowhere does not exist"):
        merge_lora(folder, base.parent / "nowhere")
    merge_lora(folder)
    before = contents(folder)
    merge_lora(folder)  # LitGPT's run, which has no manifest, and is merged already
    assert contents(folder) == before
    atomic.write_manifest(folder)
    merge_lora(folder)  # ours
    (folder / "lit_model.pth").write_bytes(b"x")
    with pytest.raises(UserError, match=r"lit_model\.pth exists already"):
        merge_lora(folder)


def test_weights_that_somebody_wrote_meanwhile_are_kept(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, fuse = adapter(base, **LORA), LoRALinear.fuse

    def meanwhile(layer: LoRALinear) -> Any:
        (folder / "lit_model.pth").write_bytes(b"theirs")
        return fuse(layer)

    monkeypatch.setattr(LoRALinear, "fuse", meanwhile)
    with pytest.raises(UserError, match=r"lit_model\.pth exists already: it was written in the meantime"):
        merge_lora(folder)
    assert (folder / "lit_model.pth").read_bytes() == b"theirs" and not list(folder.glob(".*"))


def test_interrupted_merge_leaves_no_checkpoint(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = adapter(base, **LORA)
    before, fuse = contents(folder), LoRALinear.fuse

    def interrupted(layer: LoRALinear) -> Any:
        if next(folder.glob(".*tmp")).stat().st_size > 1000:  # some of it is written
            raise KeyboardInterrupt
        return fuse(layer)

    monkeypatch.setattr(LoRALinear, "fuse", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_lora(folder)
    assert contents(folder) == before and checkpoint.is_adapter_folder(folder)

    def rewritten(layer: LoRALinear) -> Any:
        os.utime(base / "lit_model.pth", ns=(1, 1))
        return fuse(layer)

    monkeypatch.setattr(LoRALinear, "fuse", rewritten)
    with pytest.raises(UserError, match="was changed while it was read"):
        merge_lora(folder)
    assert contents(folder) == before
    monkeypatch.undo()
    merge_lora(folder)
    assert checkpoint.load_weights(folder / "lit_model.pth")


EVERYWHERE = {**tiny.ALL_LORA, "lora_r": 3}
MERGED: dict[str, dict[str, Any]] = {
    **{variant: {**EVERYWHERE, "lora_variant": variant} for variant in ("lora", *VARIANTS)},
    "query": {"lora_r": 3, "lora_query": True},
    "head": {"lora_r": 3, "lora_head": True},
    "wte": {"lora_r": 3, "lora_query": True, "modules_to_save": ["wte"]},
    "both": {"lora_r": 3, "lora_query": True, "modules_to_save": ["wte", "lm_head"]},
    "mixture": {**EVERYWHERE, "mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2},
    "corrected": {**EVERYWHERE, "mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "n_expert_groups": 2}
    | {"n_topk_groups": 1, "n_topk_scores_per_group": 2},
}


@pytest.mark.parametrize(("precision", "tied"), [("32-true", False), ("bf16-true", True)], ids=["untied", "tied"])
@pytest.mark.parametrize("name", MERGED)
def test_what_is_written_is_what_merging_in_memory_gives(
    name: str, precision: str, tied: bool, tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]
) -> None:
    """Bit for bit, in the order and with the shared tensors of the model's own state dict."""
    sizes = {key: value for key, value in MERGED[name].items() if key.startswith(("n_", "mlp"))}
    settings = {key: value for key, value in MERGED[name].items() if key not in sizes}
    base, dtype = tiny.write_base(tmp_path / "base", write_tiny_tokenizer, **sizes), getattr(torch, PRECISIONS[precision])
    if tied:
        weights = checkpoint.load_weights(base / "lit_model.pth", mapped=False)
        checkpoint.save_weights({**weights, "lm_head.weight": weights["transformer.wte.weight"]}, base / "lit_model.pth")
    folder = adapter(base, **MERGED[name])
    model = checkpoint.build_model(lora.Config.from_checkpoint(base, **settings), base, dtype)
    for key, parameter in adapter_parameters(tiny.move_adapters(model, size=0.1)).items():
        parameter.data += 0.01 * ("lora_" not in key)
    checkpoint.save_weights({"model": adapter_state(model)}, folder / "lit_model.pth.lora")  # type: ignore[dict-item]
    merge_lora(folder, precision=precision)
    lora.merge_lora_weights(model)
    expected, written = model.state_dict(), checkpoint.load_weights(folder / "lit_model.pth")
    assert list(written) == list(expected)
    for key, value in written.items():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key
    assert checkpoint.is_tied(written) == model.is_tied
    assert checkpoint.is_tied(written) == (tied and name not in ("head", "wte", *(MERGED.keys() if settings.get("lora_head") else ())))


def test_one_weight_is_read_at_a_time(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, read, load = adapter(base, **LORA), list[Any](), Reader.load

    def counted(reader: Reader, file: Path, name: str) -> torch.Tensor:
        tensor = load(reader, file, name)
        assert all(weight() is None for weight in read), "another weight is held"
        read.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Reader, "load", counted)
    monkeypatch.setattr("litgpt.convert.hf.RELEASE", 0)  # the file is mapped again for each weight
    merge_lora(folder)
    assert len(read) == len(checkpoint.load_weights(folder / "lit_model.pth"))


def test_a_base_that_is_not_finite_is_refused(base: Path) -> None:
    weights = checkpoint.load_weights(base / "lit_model.pth", mapped=False)
    weights["transformer.ln_f.weight"][0] = float("nan")
    checkpoint.save_weights(weights, base / "lit_model.pth")
    folder = adapter(base, **LORA)
    with pytest.raises(UserError, match="transformer.ln_f.weight holds non-finite numbers"):
        merge_lora(folder)
    assert not (folder / "lit_model.pth").exists()


@pytest.mark.slow
def test_litgpt_merges_and_answers_what_is_written_here(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    """LitGPT 0.5.13 from PyPI, with this environment's other packages, adds the same weights up and generates with them."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", python.parents[1]], check=True)
    packages = next((python.parents[1] / "lib").glob("python*/site-packages"))
    (packages / "others.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "litgpt==0.5.13"], check=True)
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer}))
    data = runs.write_data(tmp_path / "data.json")
    run = runs.finetune("finetune", base, data, tmp_path / "out", max_steps=2, lora_query=True, lora_mlp=True, precision="32-true")
    ours = checkpoint.load_weights(run.final / "lit_model.pth", mapped=False)
    (run.final / "lit_model.pth").unlink()
    litgpt = python.with_name("litgpt")
    for words in (["merge_lora", run.final], ["generate", run.final, "--max_new_tokens", "3"]):
        done = subprocess.run([litgpt, *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    theirs = checkpoint.load_weights(run.final / "lit_model.pth")
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-6, atol=1e-6)
