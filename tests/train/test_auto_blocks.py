"""Runs with `skip2lora_block_indices: auto`: what their folders say, what reads them, resuming, a dry run, two processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from litgpt import LLM, Config, checkpoint
from litgpt.errors import UserError
from litgpt.train.loop import Batch, Loop
from litgpt.train.resume import State
from tests.helpers import runs as finetune_runs
from tests.helpers.cases import quick
from tests.helpers.runs import Run, finetune, in_two_processes, load, plain_loss, val_samples

RUN: dict[str, Any] = {"skip2lora_enabled": True, "skip2lora_block_indices": "auto:2", "lora_r": 4, "eval__max_new_tokens": 0}
OUTPUT_LAYERS = ("lm_head", "transformer.ln_f", "transformer.h.3")


@pytest.fixture(scope="module", params=quick(OUTPUT_LAYERS, "transformer.h.3"))
def made(request: pytest.FixtureRequest, base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with blocks chosen for each output layer. Do not write into its folder."""
    run = finetune("finetune_lora", base, data, tmp_path_factory.mktemp("made") / "out", **RUN, skip2lora_output_layer=request.param)
    assert run.code == 0, run.err
    return run


def blocks_of(folder: Path) -> list[int]:
    return yaml.safe_load((folder / "model_config.yaml").read_text())["skip2lora_block_indices"]


def test_every_checkpoint_names_the_chosen_blocks(made: Run, base: Path, data: Path) -> None:
    chosen = blocks_of(made.final)
    assert len(chosen) == 2 and "skip2lora_block_indices auto: blocks " in made.err and "held-out samples (last:2 " in made.err
    for folder in (made.final, *made.out_dir.glob("step-*"), made.out_dir / "best"):
        assert blocks_of(folder) == chosen
        assert yaml.safe_load((folder / "hyperparameters.yaml").read_text())["skip2lora_block_indices"] == "auto:2"
        names = load(folder / "lit_model.pth.lora")["model"]
        assert {int(name.split(".")[2]) for name in names if "skip2lora" in name} == set(chosen)
    model = checkpoint.load_model(made.final, torch.float32)
    assert list(model.config.taps) == chosen
    assert plain_loss(model, val_samples(base, data)) == pytest.approx(made.report["final_val_loss"], rel=1e-5)


def test_the_final_folder_works_everywhere(made: Run, base: Path, tmp_path: Path) -> None:
    assert isinstance(LLM.load(made.final, precision="32-true").generate("add 1 and 2", max_new_tokens=3), str)
    for argv in (["generate", str(made.final), "--prompt", "add", "--max_new_tokens", "2"], ["validate", str(made.final)]):
        done = finetune_runs.call(argv, tmp_path)
        assert done.code == 0, done.err
    assert Config.from_checkpoint(made.final).base_dict() == Config.from_checkpoint(base).base_dict()


def test_a_folder_without_its_blocks_is_refused(made: Run, tmp_path: Path) -> None:
    for name in ("hyperparameters.yaml", "lit_model.pth.lora"):
        (tmp_path / name).write_bytes((made.final / name).read_bytes())
    with pytest.raises(UserError, match=r"model_config.yaml is missing: it names the blocks"):
        checkpoint.read_adapter_settings(tmp_path)
    values = yaml.safe_load((made.final / "model_config.yaml").read_text())
    del values["skip2lora_block_indices"]
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="must name the blocks that auto chose"):
        checkpoint.read_adapter_settings(tmp_path)


@pytest.mark.slow
def test_the_same_command_makes_the_same_choice_and_weights(base: Path, data: Path, tmp_path: Path) -> None:
    one, two = (finetune("finetune_lora", base, data, tmp_path / name, **RUN) for name in ("one", "two"))
    assert blocks_of(one.final) == blocks_of(two.final) and one.column("val_loss") == two.column("val_loss")


def test_a_resumed_run_keeps_its_blocks(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = finetune("finetune_lora", base, data, tmp_path / "whole", **RUN)
    step = Loop.step

    def signalled(loop: Loop, state: State, batch: Batch) -> dict[str, float]:
        if state.step == 2 and not os.environ.get("RESUMED"):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(loop, state, batch)

    monkeypatch.setattr(Loop, "step", signalled)
    out_dir = tmp_path / "out"
    assert finetune("finetune_lora", base, data, out_dir, **RUN).code == 143
    monkeypatch.setenv("RESUMED", "1")
    monkeypatch.setattr("litgpt.train.prepare.choose", None)  # choosing again would fail
    run = finetune("finetune_lora", base, data, out_dir, **RUN, resume=True)
    assert run.code == 0 and "auto: blocks" not in run.err, run.err
    assert blocks_of(run.final) == blocks_of(whole.final) and run.column("val_loss") == whole.column("val_loss")
    other = finetune("finetune_lora", base, data, tmp_path / "out2", **{**RUN, "skip2lora_block_indices": "[0, 1]"}, train__max_steps=2)
    assert other.code == 0
    (tmp_path / "out2/final").rename(tmp_path / "moved")
    refused = finetune("finetune_lora", base, data, tmp_path / "out2", **RUN, train__max_steps=2, resume=True)
    assert refused.code == 1 and "skip2lora_block_indices is 'auto:2', before [0, 1]" in refused.err


def test_a_warm_up_and_positions_and_all(base: Path, data: Path, tmp_path: Path) -> None:
    """Blocks are chosen before LoRA's warm-up; the older key works; choosing as many as there are takes all."""
    settings = {**RUN, "skip2lora_block_indices": None, "skip2lora_positions": "auto:5", "lora_query": True, "skip2lora_warmup_steps": 1}
    run = finetune("finetune_lora", base, data, tmp_path / "out", **settings, train__epochs=1)
    assert run.code == 0 and blocks_of(run.final) == [0, 1, 2, 3, 4], run.err


def test_a_dry_run_chooses_and_writes_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    run = finetune("finetune_lora", base, data, tmp_path / "out", **RUN, dry_run=True)
    assert run.code == 0 and "skip2lora_block_indices auto: blocks " in run.err and not list(tmp_path.iterdir()), run.err


@pytest.mark.slow
def test_two_processes_take_the_choice_of_the_first(base: Path, data: Path, tmp_path: Path) -> None:
    alone = finetune("finetune_lora", base, data, tmp_path / "one", **RUN)
    two = in_two_processes(alone.out_dir, tmp_path / "two")
    assert blocks_of(tmp_path / "two/final") == blocks_of(alone.final) and two.err.count("auto: blocks") == 1
