"""`litgpt finetune_adapter`, `finetune_adapter_v2` and what reads their folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt import adapter, adapter_v2, checkpoint
from litgpt.__main__ import main
from litgpt.api import LLM
from tests.helpers.cases import quick
from tests.helpers.runs import Run, finetune, load, plain_loss, run_files, val_samples

MODULES: dict[str, Any] = {"finetune_adapter": adapter, "finetune_adapter_v2": adapter_v2}


@pytest.fixture(scope="module", params=quick(MODULES, "finetune_adapter_v2"))
def trained(request: pytest.FixtureRequest, base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Run]:
    return request.param, finetune(request.param, base, data, tmp_path_factory.mktemp("runs") / "out", adapter_prompt_length=4)


@pytest.mark.parametrize("command", MODULES)
def test_a_prompt_without_positions_is_refused_before_data_is_read(command: str, base: Path, tmp_path: Path) -> None:
    run = finetune(command, base, tmp_path / "nowhere.json", tmp_path / "out", adapter_prompt_length=0)
    assert run.err == "Error: adapter_prompt_length is 0: a whole number of at least 1 is needed\n"


def test_it_learns_and_leaves_litgpts_files(trained: tuple[str, Run], base: Path, data: Path) -> None:
    command, run = trained
    module = MODULES[command]
    assert run.code == 0, run.err
    assert run.column("val_loss")[-1] < run.column("val_loss")[0]
    name = module.Config.adapter_file
    files = {str(path.relative_to(run.out_dir)) for path in run.out_dir.rglob("*") if path.is_file() and "events" not in path.name}
    assert files == run_files(name) | {f"{folder}/base.json" for folder in ("step-000002", "step-000004", "step-000006", "best", "final")}
    weights = load(run.final / name)
    assert set(weights) == {"model"} and all(module.adapter_filter(key) for key in weights["model"])
    assert all(value.dtype == torch.float32 for value in weights["model"].values())
    model = checkpoint.load_model(run.final, torch.float32)
    assert plain_loss(model, val_samples(base, data)) == pytest.approx(run.report["final_val_loss"], rel=1e-5)
    assert "merge_lora" not in run.err and "convert_from_litgpt" not in run.err


def test_resumed_it_is_the_same(trained: tuple[str, Run], base: Path, data: Path, tmp_path: Path) -> None:
    command, run = trained
    name = MODULES[command].Config.adapter_file
    shutil.copytree(run.out_dir, tmp_path / "out")
    for folder in ("final", "best", "step-000006"):
        for file in sorted((tmp_path / "out" / folder).rglob("*")):
            file.unlink()
        (tmp_path / "out" / folder).rmdir()
    again = finetune(command, base, data, tmp_path / "out", adapter_prompt_length=4, resume="auto")
    assert again.code == 0 and "resumed from" in again.err, again.err
    before, after = (load(folder / name)["model"] for folder in (run.final, again.final))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_what_reads_it(trained: tuple[str, Run], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, run = trained
    llm = LLM.load(run.out_dir, precision="32-true")
    answer = llm.generate("add 3 and 4", max_new_tokens=6, temperature=0)
    assert main(["validate", str(run.final)]) == 0
    words = ["--prompt", "add 3 and 4", "--max_new_tokens", "6", "--temperature", "0", "--precision", "32-true"]
    capsys.readouterr()
    assert main(["generate", str(run.final), *words]) == 0
    assert capsys.readouterr().out.endswith(f"{answer}\n")
    name = MODULES[command].Config.adapter_file
    other = command.replace("finetune", "generate")
    assert main([other, str(base), *words, "--adapter_path", str(run.final / name)]) == 0
    assert capsys.readouterr().out == f"{answer}\n"
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": "add 3 and 4", "output": "7"}]))
    assert main(["evaluate", str(run.final), "--data", str(data), "--out_dir", str(tmp_path), "--max_new_tokens", "4"]) == 0
    assert main(["merge_lora", str(run.final)]) == 1
    error = capsys.readouterr().err
    assert "holds no lit_model.pth.lora: it holds a LLaMA-Adapter, which generate" in error and "which cannot be merged" in error
    assert main(["convert_from_litgpt", str(run.final), str(tmp_path / "hf")]) == 1
    assert "LLaMA-Adapter" in capsys.readouterr().err
    assert main([other, str(base), "--adapter_path", str(tmp_path / "none.pth")]) == 1
    assert "adapter_path" in capsys.readouterr().err


@pytest.mark.parametrize("command", quick(MODULES, "finetune_adapter_v2"))
def test_rehearsal_and_quantised(command: str, base: Path, data: Path, tmp_path: Path) -> None:
    run = finetune(command, base, data, tmp_path / "dry", dry_run=True)
    assert run.code == 0 and not run.out_dir.exists(), run.err
    run = finetune(command, base, data, tmp_path / "out", quantize="int8", max_steps=2)
    assert run.code == 0 and ", 32-true, int8 on cpu\n" in run.err, run.err
    assert main(["evaluate", str(run.final), "--quantize", "int8", "--max_new_tokens", "0"]) == 0
