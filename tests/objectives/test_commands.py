"""`litgpt finetune_*` with an objective: what it leaves, how it is resumed, by several processes, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from litgpt import checkpoint
from tests.helpers.cases import quick
from tests.helpers.runs import Run, finetune, in_two_processes
from tests.objectives.test_preferences import log_p

SKIP: dict[str, Any] = {"skip2lora_enabled": True, "skip2lora_block_indices": "[0, 2]", "lora_r": 4}
WARM = {**SKIP, "lora_mlp": True, "skip2lora_output_layer": "transformer.h.3", "skip2lora_warmup_steps": 2}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("finetune_lora", {"lora_r": 4, "lora_dropout": 0.1}),
    "alora": ("finetune_lora", {"lora_r": 4, "alora_enabled": True, "data__prompt_style": "chatml"}),
    "lm_head": ("finetune_lora", SKIP),
    "warm-up": ("finetune_lora", WARM),
    "dora": ("finetune_lora", {"lora_r": 4, "lora_variant": "dora"}),
    "adapter_v2": ("finetune_adapter_v2", {}),
    "full": ("finetune_full", {}),
}
FEW: dict[str, Any] = {"eval__max_new_tokens": 0, "data__val_split_fraction": 0.1}


def write_rated(file: Path, between: str) -> Path:
    """Write 20 answers, of which those with a certain word are right."""
    rows = [
        {"prompt": f"add {i}", "answer": f"{'good' if i % 2 else 'task'}{between}{i}", "correct": bool(i % 2), "weight": 1 + i % 3}
        for i in range(20)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def curve(run: Run) -> list[tuple[str, ...]]:
    """metrics.csv without what depends on the clock."""
    with (run.out_dir / "logs/version_0/metrics.csv").open(newline="") as file:
        return [tuple(row.get(name, "") for name in ("step", "train_loss", "val_loss", "val_accuracy")) for row in csv.DictReader(file)]


def assert_two_processes_train_like(one: Run, out_dir: Path) -> None:
    two = in_two_processes(one.out_dir, out_dir)
    for (_, *mine), (_, *other) in zip(curve(one), curve(two), strict=True):
        assert_close([float(x) for x in mine if x], [float(x) for x in other if x], rtol=1e-4, atol=1e-5)


def rewound(run: Run, to: Path, step: int) -> Path:
    """A copy of the run as it was after a step, without caches."""
    shutil.copytree(run.out_dir, to)
    for name in ("final", "best", "report.json", "report.html"):
        path = to / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for folder in to.glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    return to


@pytest.mark.parametrize(
    ("method", "objective"),
    quick(
        [*((method, "dpo") for method in METHODS), ("LoRA", "orpo"), ("lm_head", "kto")],
        ("alora", "dpo"),
        ("lm_head", "kto"),
    ),
)
def test_a_run_learns_and_is_resumed_bit_for_bit(method: str, objective: str, base: Path, pairs: Path, tmp_path: Path) -> None:
    """The resumed run has no file of the reference: it is computed from the base, not from the trained weights."""
    command, settings = METHODS[method]
    settings = {**FEW, **settings, "objective": objective, "orpo_lambda": 1.0}
    run = finetune(command, base, pairs, tmp_path / "a" / "run", **settings)
    assert run.code == 0, run.err
    losses = [float(loss) for _, loss, _, _ in curve(run) if loss]
    assert len(losses) == 6 + (method == "warm-up") * 2 + (objective == "kto") * 6 and losses[-1] < losses[0]
    again = finetune(command, base, pairs, rewound(run, tmp_path / "b" / "run", 2 + 2 * (method == "warm-up")), resume=True, **settings)
    assert again.code == 0, again.err
    assert curve(again) == curve(run)
    assert json.loads((run.out_dir / "report.json").read_text())["val_accuracy"] == float(curve(run)[-1][3])
    assert f"{float(curve(run)[-1][3]):.1%} of the validation records are judged correctly" in (run.out_dir / "report.html").read_text()


def test_the_reported_accuracy_and_loss_are_those_of_the_saved_model(base: Path, pairs: Path, tmp_path: Path) -> None:
    from litgpt.data import JSON
    from litgpt.objectives.named import objective_of
    from litgpt.objectives.settings import ObjectiveSettings
    from litgpt.prompts import resolve_prompt_style
    from litgpt.tokenizer import Tokenizer

    run = finetune("finetune_lora", base, pairs, tmp_path / "run", objective="dpo", **FEW, **SKIP)
    tokenizer, objective = Tokenizer(base), objective_of(ObjectiveSettings(objective="dpo"))
    data = JSON(json_path=pairs, val_split_fraction=0.1)
    val = data.splits(tokenizer, resolve_prompt_style(None, base, tokenizer), 256, objective.units).val
    before, after = (checkpoint.load_model(folder, torch.float32) for folder in (base, run.final))
    with torch.no_grad():
        r = torch.stack([log_p(after, sample) - log_p(before, sample) for sample in val])
    weights = torch.tensor([1.0 if s.weights is None else max(s.weights) for s in val[::2]])
    z = 0.1 * (r[::2] - r[1::2])
    assert_close(run.report["final_val_loss"], ((-z.sigmoid().log() * weights).sum() / weights.sum()).item(), rtol=1e-4, atol=1e-5)
    assert run.report["val_accuracy"] == ((z > 0) * weights).sum().item() / weights.sum().item()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "objective"), [("lm_head", "dpo"), ("LoRA", "dpo"), ("lm_head", "kto")])
def test_two_processes_train_like_one(method: str, objective: str, base: Path, pairs: Path, tmp_path: Path) -> None:
    own = {**METHODS[method][1], "lora_dropout": 0.0}
    settings = {**FEW, **own, "objective": objective, "train__global_batch_size": 8, "train__epochs": 3, "train__micro_batch_size": 4}
    assert_two_processes_train_like(finetune("finetune_lora", base, pairs, tmp_path / "one", **settings), tmp_path / "two")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "holds 'chosen' and 'rejected' answers: set objective"),
        ({"objective": "dpo", "dpo_beta": -1}, "dpo_beta is -1"),
        ({"objective": "dpo", "train__replay": 3}, "train.replay adds answers that have no counterpart"),
        ({"objective": "dpo", "train__follow_ups": 0.5}, "train.follow_ups adds answers that have no counterpart"),
        ({"objective": "dpo", "train__word_dropout": 0.5}, "train.word_dropout changes the questions for each answer: leave it out"),
        ({"objective": "ppo"}, "objective"),
    ],
)
def test_mistakes_are_one_line(settings: dict[str, Any], message: str, base: Path, pairs: Path, tmp_path: Path) -> None:
    run = finetune("finetune_lora", base, pairs, tmp_path / "run", **settings)
    assert run.code in (1, 2) and message in run.err and "Traceback" not in run.err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_writes_nothing(base: Path, pairs: Path, tmp_path: Path) -> None:
    run = finetune("finetune_lora", base, pairs, tmp_path / "run", objective="dpo", dry_run=True, **SKIP)
    assert run.code == 0 and list(tmp_path.iterdir()) == []


def test_another_objective_is_another_run(base: Path, pairs: Path, tmp_path: Path) -> None:
    finetune("finetune_lora", base, pairs, tmp_path / "run", objective="dpo", **FEW, **SKIP)
    run = finetune("finetune_lora", base, pairs, tmp_path / "run", objective="orpo", resume=True, **FEW, **SKIP)
    assert run.code == 1 and "objective is 'orpo', before 'dpo'" in run.err


@pytest.mark.parametrize("method", quick(["lm_head", "full"], "lm_head"))
def test_rho1_from_a_reference_that_was_trained_before(method: str, base: Path, data: Path, tmp_path: Path) -> None:
    """An adapter or a full model as reference; resumed without its file the run is the same; keeping all tokens it is the plain one."""
    command, settings = METHODS[method]
    reference = finetune(command, base, data, tmp_path / "reference", **FEW, **settings)
    settings = {**FEW, **settings, "objective": "rho1", "rho1_reference": reference.final}
    run = finetune(command, base, data, tmp_path / "a" / "run", **settings)
    assert run.code == 0, run.err
    again = finetune(command, base, data, rewound(run, tmp_path / "b" / "run", 2), resume=True, **settings)
    assert again.code == 0, again.err
    assert again.column("train_loss") == run.column("train_loss") and again.column("val_ppl") == run.column("val_ppl")
    everything = finetune(command, base, data, tmp_path / "a" / "all", **{**settings, "rho1_keep": 1.0})
    assert "is reused" in everything.err
    assert_close(everything.column("train_loss")[0], reference.column("train_loss")[0], rtol=1e-5, atol=0)
    assert_close(everything.column("train_loss"), reference.column("train_loss"), rtol=1e-2, atol=0)  # AdamW makes steps of rounding errors
    assert run.column("train_loss")[0] > reference.column("train_loss")[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "rho1_reference is missing"),
        ({"rho1_reference": "nowhere"}, "rho1_reference: checkpoint folder nowhere"),
        ({"rho1_keep": 2, "rho1_reference": "x"}, "rho1_keep is 2"),
    ],
)
def test_rho1_mistakes_are_one_line(settings: dict[str, Any], message: str, base: Path, data: Path, tmp_path: Path) -> None:
    for dry_run in (False, True):
        run = finetune("finetune_lora", base, data, tmp_path / "run", objective="rho1", dry_run=dry_run, **settings)
        assert run.code in (1, 2) and message in run.err and "Traceback" not in run.err
        assert "parameters: " not in run.err, "before the model is loaded"
