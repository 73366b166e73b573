"""Answer-only LoRA, from the command to the answer."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from litgpt import LLM
from litgpt.__main__ import main
from tests.helpers.jobs import curve, results
from tests.helpers.runs import PLAIN, Run, finetune

ALORA: dict[str, Any] = {
    **{f"lora_{name}": True for name in ("query", "key", "value", "projection", "mlp")},
    "alora_enabled": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "data__mask_prompt": True,
    "eval__max_new_tokens": 4,
}


@pytest.fixture(scope="module")
def whole(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An uninterrupted run. Do not write into its folder."""
    return finetune("finetune_lora", base, data, tmp_path_factory.mktemp("runs") / "whole", **ALORA, verbose=True)


def test_cached_stopped_and_resumed(whole: Run, base: Path, data: Path, tmp_path: Path) -> None:
    """The same losses with the prompts in memory and computed for every batch; the same files after a resume."""
    assert whole.code == 0, whole.err
    assert "answer-only LoRA: acts on replies, from '<|im_start|>assistant\\n' on: " in whole.err and "training cache: " in whole.err
    uncached = finetune("finetune_lora", base, data, tmp_path / "uncached", **ALORA, skip2lora_cache="off")
    assert "acts on replies" not in uncached.err and "cache:" not in uncached.err
    for row, other in zip(curve(whole.out_dir), curve(tmp_path / "uncached"), strict=True):
        assert [float(cell or 0) for cell in row] == pytest.approx([float(cell or 0) for cell in other], rel=1e-4), uncached.err
    shutil.copytree(whole.out_dir, tmp_path / "parts")
    for name in ("final", "step-000006"):
        shutil.rmtree(tmp_path / "parts" / name)
    resumed = finetune("finetune_lora", base, data, tmp_path / "parts", resume=True, **ALORA)
    assert resumed.code == 0 and "step-000004" in resumed.err, resumed.err
    assert results(tmp_path / "parts/final") == results(whole.final)


def test_what_becomes_of_the_adapter(whole: Run, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    final = whole.final
    settings = yaml.safe_load((final / "hyperparameters.yaml").read_text())
    assert settings["alora_invocation_tokens"] and not (final / "lit_model.pth").exists()
    llm = LLM.load(final)
    prompt = llm.prompt_style.apply("add 3 and 4")
    ids = llm.tokenizer.encode(prompt, bos=llm.prompt_style.bos)
    with torch.no_grad():
        logits = llm.model(ids[None])[0]
        plain = LLM.load(base).model(ids[None])[0]
    opens = len(ids) - len(settings["alora_invocation_tokens"])
    assert torch.allclose(logits[:opens], plain[:opens], atol=1e-5) and (logits[opens:] - plain[opens:]).abs().max() > 1e-3
    assert main(["merge_lora", str(final)]) == 1 and "cannot be merged" in capsys.readouterr().err
    assert main(["finetune_lora", str(final), "--data", str(tmp_path), "--out_dir", str(tmp_path / "more")]) == 1
    assert f"cannot be merged. To train, name its base ({base})" in capsys.readouterr().err
    assert main(["convert_adapter", str(final), str(tmp_path / "peft")]) == 0
    peft = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert peft["alora_invocation_tokens"] == settings["alora_invocation_tokens"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__mask_prompt": False}, "data.mask_prompt true"),
        ({"alora_invocation_tokens": [5, 6]}, "not alora_invocation_tokens [5, 6]"),
        ({"lora_variant": "dora"}, "alora_enabled works with lora_variant lora only"),
    ],
)
def test_what_does_not_fit_is_said(base: Path, data: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    run = finetune("finetune_lora", base, data, tmp_path / "out", **{**ALORA, **changes})
    assert run.code == 1 and message in run.err, run.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_sweep_over_one_cache_of_prompts(base: Path, data: Path, tmp_path: Path) -> None:
    settings = {key.replace("__", "."): value for key, value in ALORA.items() if not key.startswith("eval")} | {"train.epochs": 1}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value).lower())]
    common = [str(base), "--data", "JSON", "--data.json_path", str(data), "--data.val_split_fraction", "0.1", *words]
    common += ["--precision", "32-true", "--train.global_batch_size", "6", "--train.micro_batch_size", "2", "--eval.max_new_tokens", "0"]
    assert main(["sweep", str(PLAIN), *common, "--out_dir", str(tmp_path / "sweep"), "--grid.lora_r", "[2, 4]"]) == 0
    with (tmp_path / "sweep/sweep.csv").open(newline="") as file:
        losses = {row["setting"]: float(row["final_val_loss"]) for row in csv.DictReader(file)}
    assert main(["finetune_lora", *common, "--out_dir", str(tmp_path / "alone")]) == 0
    report = json.loads((tmp_path / "alone/report.json").read_text())
    assert losses["lora_r=4"] == pytest.approx(report["final_val_loss"], rel=1e-5) and losses["lora_r=2"] != losses["lora_r=4"]
