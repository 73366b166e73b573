"""`litgpt sweep`: each setting is the run that `litgpt finetune` makes of it, and the prefix runs once for all of them."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from litgpt.model import GPT
from litgpt.train import prepare
from litgpt.train.loop import Batch, Loop
from litgpt.train.resume import State
from tests.conftest import CHATML
from tests.helpers import runs as finetune_runs
from tests.helpers.cases import quick
from tests.helpers.jobs import ROOT, environ
from tests.helpers.runs import PLAIN, Run, finetune, load

SKIP: dict[str, Any] = {"skip2lora_enabled": True, "lora_dropout": 0.1, "eval__max_new_tokens": 0}
BLOCK: dict[str, Any] = {**SKIP, "lora_r": 2, "skip2lora_output_layer": "transformer.h.3", "skip2lora_block_indices": "[0, 2]"}
SWEEPS: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "lm_head": (SKIP, {"lora_r": [2, 4], "skip2lora_block_indices": ["last:2", [0, 2]]}),
    "a block": ({**BLOCK, "lora_block_indices": "[3, 4]"}, {"skip2lora_enabled": [True, False], "lora_mlp": [True]}),
    "learning": (
        {**BLOCK, "skip2lora_cache": "disk", "train__keep_best": False, "samples": 3},
        {"optimizer.lr": [0.01, 3e-3], "seed": [1, 2], "train.global_batch_size": [6, 9], "train.micro_batch_size": [3]},
    ),
    "auto": ({**SKIP, "lora_r": 2}, {"skip2lora_block_indices": ["auto:2", "auto:1", "last:3"], "seed": [1, 2]}),
    "late LoRA": ({"lora_block_indices": "last:2", "lora_key": True, "eval__max_new_tokens": 0}, {"lora_r": [2, 3], "lora_alpha": [4]}),
    "8 bits": ({**BLOCK, "quantize": "int8"}, {"lora_mlp": [True, False]}),
    "variants in 8 bits": ({**BLOCK, "quantize": "int8"}, {"lora_variant": ["dora", "pissa"]}),
}


def sweep(base: Path, data: Path, out_dir: Path, values: dict[str, list[Any]], **settings: Any) -> Run:
    words = [word for key, listed in values.items() for word in (f"--grid.{key}", json.dumps(listed))]
    return finetune("sweep", base, data, out_dir, *words, **settings)


def rows(out_dir: Path) -> list[dict[str, str]]:
    with (out_dir / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """A sweep, made once. Do not write into its folder."""
    runs: dict[str, Run] = {}

    def run(name: str) -> Run:
        if name not in runs:
            settings, values = SWEEPS[name]
            runs[name] = sweep(base, data, tmp_path_factory.mktemp("sweeps") / "out", values, **settings)
            assert runs[name].code == 0, runs[name].err
        return runs[name]

    return run


# --- each setting is the run of its own ---


@pytest.mark.parametrize("name", quick(SWEEPS, "lm_head"))
def test_each_setting_is_the_run_of_its_own(name: str, made: Callable[[str], Run], base: Path, data: Path, tmp_path: Path) -> None:
    """Weights, losses and settings of `litgpt finetune`, bit for bit, for every combination."""
    settings, values = SWEEPS[name]
    found = rows(made(name).out_dir)
    settings = {**settings}
    assert len(found) == settings.pop("samples", math.prod(map(len, values.values())))
    losses = [row["final_val_loss"] for row in found]
    assert len(set(losses)) == len(losses), "or the comparison would show nothing"
    for row in found:
        own = {key: row[key] for key in values}
        run = finetune(
            "finetune_lora", base, data, tmp_path / row["setting"], *(f"--{key}={text}" for key, text in own.items()), **settings
        )
        assert run.code == 0, run.err
        swept = Run(0, "", made(name).out_dir / row["setting"])
        expected, weights = (load(each.final / "lit_model.pth.lora")["model"] for each in (run, swept))
        assert expected.keys() == weights.keys() and all(torch.equal(weights[key], expected[key]) for key in expected)
        assert any(weights[key].count_nonzero() for key in weights if key.endswith("lora_B"))
        for column in ("val_loss", "train_loss", "learning_rate"):
            assert swept.column(column) == run.column(column)
        for key in ("final_val_loss", "best_val_loss", "steps", "trainable_parameters", "total_parameters"):
            assert swept.report[key] == run.report[key]
        plans, models = (
            [yaml.safe_load((each.final / file).read_text()) for each in (run, swept)]
            for file in ("hyperparameters.yaml", "model_config.yaml")
        )
        assert {**plans[0], "out_dir": 0} == {**plans[1], "out_dir": 0} and models[0] == models[1]


def test_the_prefix_runs_once(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens go through it for six settings of two epochs as for one."""
    seen: list[int] = []
    prefix = GPT.prefix
    monkeypatch.setattr(GPT, "prefix", lambda model, idx, *rest: (seen.append(idx.numel()), prefix(model, idx, *rest))[1])
    counts = []
    for values in ({"lora_r": [2]}, SWEEPS["lm_head"][1]):
        seen.clear()
        assert sweep(base, data, tmp_path / str(len(counts)), values, **SKIP).code == 0
        counts.append(sum(seen))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", quick(["lm_head", "late LoRA"], "lm_head"))
def test_a_setting_is_a_run_like_others(name: str, made: Callable[[str], Run]) -> None:
    """Its folder answers, and has a run's files; only the merged weights of plain LoRA are left to merge_lora."""
    out_dir = made(name).out_dir
    run = out_dir / rows(out_dir)[0]["setting"]
    files = {file for file in finetune_runs.files(run) if "tfevents" not in file}
    assert files == finetune_runs.run_files("lit_model.pth.lora")
    assert finetune_runs.call(["generate", str(run / "final"), "--prompt", "add 1 and 2", "--max_new_tokens", "3"], run).code == 0


# --- what it tells ---


def test_the_table(made: Callable[[str], Run], capsys: pytest.CaptureFixture[str]) -> None:
    run = made("lm_head")
    found = rows(run.out_dir)
    assert [(row["lora_r"], row["skip2lora_block_indices"]) for row in found] == [
        (r, blocks) for r in ("2", "4") for blocks in ("last:2", "[0, 2]")
    ]
    assert found[1]["setting"] == "lora_r=2,blocks=0-2"
    for row in found:
        folder = run.out_dir / row["setting"]
        report = json.loads((folder / "report.json").read_text())
        for key in ("initial_val_loss", "best_val_loss", "final_val_loss", "steps", "trainable_parameters", "total_seconds"):
            assert float(row[key]) == report[key]
        assert row["status"] == "finished" and row["reason"] == "" and Path(row["folder"]) in (folder / "best", folder / "final")
        assert (
            json.loads((Path(row["folder"]) / "report.json").read_text()).get("val_loss", report["final_val_loss"])
            == report["best_val_loss"]
        )
    rank, blocks = 4, 2
    assert int(found[3]["trainable_parameters"]) == 2 * 32 * rank * blocks
    facts = json.loads((run.out_dir / "sweep.json").read_text())
    assert facts["cache"]["blocks"] == [0, 2, 3, 4] and facts["cache_seconds"] > 0 and facts["environment"]["torch"] == torch.__version__
    assert [each["grid"] for each in facts["runs"]][1] == {"lora_r": 2, "skip2lora_block_indices": [0, 2]}


def test_the_best_comes_first(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from litgpt.__main__ import main

    words = [
        "--data",
        "JSON",
        "--data.json_path",
        str(data),
        "--lora_block_indices",
        "last:1",
        "--max_steps",
        "4",
        "--precision",
        "32-true",
    ]
    code = main(
        ["sweep", str(PLAIN), str(base), *words, "--out_dir", str(tmp_path / "out"), "--grid", "{optimizer: {lr: [1e-9, 0.05, 1e-3]}}"]
    )
    out = capsys.readouterr().out
    assert code == 0
    lines = [line.split()[0] for line in out.splitlines() if line.startswith("  lr=")]
    losses = {row["setting"]: float(row["best_val_loss"]) for row in rows(tmp_path / "out")}
    assert lines == sorted(losses, key=losses.__getitem__) and lines != list(losses)
    assert f"best: {lines[0]}," in out and f"litgpt chat {tmp_path / 'out' / lines[0] / 'final'}\n" in out
    assert main(["chat", str(tmp_path / "out")]) == 1
    assert f"it holds a sweep, name its best setting {tmp_path / 'out' / lines[0]}\n" in capsys.readouterr().err


def test_a_sweep_over_pairs_validates_as_many_pairs_as_a_run(base: Path, tmp_path: Path) -> None:
    """`eval.max_iters` counts pairs, whose two answers are samples of the cache."""
    rows_of_pairs = [{"prompt": f"add {i}", "chosen": f"{i} is the sum", "rejected": "no"} for i in range(20)]
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps(rows_of_pairs))
    settings = {**SKIP, "objective": "dpo", "eval__max_iters": 1, "train__micro_batch_size": 1}
    run = sweep(base, pairs, tmp_path / "sweep", {"dpo_beta": [0.1, 0.5]}, **settings)
    assert run.code == 0, run.err
    one = finetune("finetune_lora", base, pairs, tmp_path / "one", **settings, dpo_beta=0.5)
    assert float(rows(run.out_dir)[1]["final_val_loss"]) == one.report["final_val_loss"]


def test_losses_of_different_samples_are_pointed_out(base: Path, data: Path, tmp_path: Path) -> None:
    """Two validation samples: one batch of one is half of them."""
    values = {"train.micro_batch_size": [1, 2]}
    few = sweep(base, data, tmp_path / "few", values, eval__max_iters=1, dry_run=True, **SKIP)
    assert few.code == 0 and "on different samples: eval.max_iters 1 batches of train.micro_batch_size are 1 or 2 samples" in few.err
    assert "on different samples" not in sweep(base, data, tmp_path / "all", values, eval__max_iters=2, dry_run=True, **SKIP).err


# --- refused ---


@pytest.mark.parametrize(
    "key", ["checkpoint_dir", "precision", "quantize", "data.json_path", "skip2lora_output_layer", "skip2lora_norm", "train.max_seq_length"]
)
def test_what_the_cache_depends_on_cannot_vary(key: str, base: Path, data: Path, tmp_path: Path) -> None:
    value = {"train.max_seq_length": 50, "skip2lora_norm": "rms", "quantize": "int8"}.get(key, "x")
    run = sweep(base, data, tmp_path / "out", {key: [value], "lora_r": [2]}, **SKIP)
    assert run.code == 1 and f"{key} cannot vary" in run.err and "computed once" in run.err and "lora_r, lora_alpha" in run.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        ({}, {"lora_r": [2, 4]}, "none is frozen"),
        ({}, {"lora_block_indices": ["last:1", "last:2"]}, "lora_blocks=last-1 trains from block 4 on, lora_blocks=last-2 from block 3 on"),
        ({"skip2lora_cache": "off", **SKIP}, {"lora_r": [2]}, "skip2lora_cache is off"),
        ({"skip2lora_warmup_steps": 2, **SKIP}, {"lora_r": [2]}, "skip2lora_warmup_steps"),
        ({"skip2lora_warmup_epochs": 1, **SKIP}, {"lora_r": [2]}, "skip2lora_warmup_epochs"),
        ({"devices": 2, "skip2lora_cache": "memory", **SKIP}, {"lora_r": [2]}, "several processes share a cache on disk"),
        ({"resume": "step-000002", **SKIP}, {"lora_r": [2]}, "--resume auto"),
        (SKIP, {"lora_r": [-1, 0]}, "no setting of the grid can be trained. lora_r=-1: lora_r is -1"),
        (SKIP, {"optimizer.lrr": [1]}, "AdamW has no argument lrr"),
    ],
)
def test_what_cannot_be_swept(settings: Any, values: Any, message: str, base: Path, data: Path, tmp_path: Path) -> None:
    run = sweep(base, data, tmp_path / "out", values, **settings)
    assert run.code == 1 and message in run.err, run.err
    assert not (tmp_path / "out").exists()


# --- what goes wrong on the way ---


def failing_at(number: int, error: Callable[[Loop], None]) -> Callable[..., float]:
    """`Loop.step`, with something else in step `number` of the runs with rank 4."""
    step = Loop.step

    def broken(loop: Loop, state: State, batch: Batch) -> dict[str, float]:
        if state.step + 1 == number and loop.model.config.skip2lora_r == 4:
            error(loop)
        return step(loop, state, batch)

    return broken


def poison(loop: Loop) -> None:
    loop.trained[0].data.fill_(math.nan)


def interrupt(loop: Loop) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_setting_that_fails_does_not_end_the_sweep(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is no number, and values that do not go together."""
    monkeypatch.setattr(Loop, "step", failing_at(3, poison))
    run = sweep(base, data, tmp_path / "out", {"lora_r": [4, 2], "train.micro_batch_size": [2, 4]}, **SKIP)
    found = {row["setting"]: row for row in rows(tmp_path / "out")}
    assert [row["status"] for row in found.values()] == ["failed", "failed", "finished", "failed"]
    assert "step 3: the loss is nan" in found["lora_r=4,micro_batch_size=2"]["reason"]
    assert "must be a multiple of train.micro_batch_size" in found["lora_r=2,micro_batch_size=4"]["reason"]
    assert run.code == 1 and "3 of 4 settings failed. lora_r=4,micro_batch_size=2: step 3" in run.err


@pytest.mark.parametrize("cache", quick(["memory", "disk"], "disk"))
def test_a_stopped_sweep_goes_on(cache: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished settings are left alone, the one that was stopped is resumed, the rest is trained: all as if nothing had happened."""
    values, settings = {"lora_r": [2, 4, 3]}, {**SKIP, "skip2lora_cache": cache}
    whole, out = sweep(base, data, tmp_path / "whole", values, **settings), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", failing_at(4, interrupt))
        stopped = sweep(base, data, out, values, **settings)
    assert stopped.code == 130 and "1 of 3 settings are finished: the same command with --resume auto continues" in stopped.err
    assert [row["status"] for row in rows(out)] == ["finished", "stopped", "waiting"]
    assert {path.name for path in (out / "lora_r=4").glob("step-*")} == {"step-000002", "step-000004"}
    assert "earlier sweep" in sweep(base, data, out, values, **settings).err

    before = finetune_runs.files(out / "lora_r=2")
    trained: list[int] = []
    step = Loop.step
    monkeypatch.setattr(Loop, "step", lambda loop, state, *rest: (trained.append(state.step), step(loop, state, *rest))[1])
    assert sweep(base, data, out, values, resume="auto", **settings).code == 0
    assert trained == [4, 5, 0, 1, 2, 3, 4, 5]
    assert finetune_runs.files(out / "lora_r=2") == before
    assert [row["status"] for row in rows(out)] == ["finished"] * 3
    for name in ("lora_r=2", "lora_r=4", "lora_r=3"):
        ended, expected = (load(folder / name / "final/lit_model.pth.lora")["model"] for folder in (out, whole.out_dir))
        assert all(torch.equal(ended[key], expected[key]) for key in expected)
    trained.clear()
    assert sweep(base, data, out, values, resume="auto", **settings).code == 0 and not trained


def test_a_sweep_of_other_settings_is_not_gone_on_with(base: Path, data: Path, tmp_path: Path) -> None:
    assert sweep(base, data, tmp_path, {"lora_r": [2]}, **SKIP).code == 0
    run = sweep(base, data, tmp_path, {"lora_r": [2]}, resume="auto", train__epochs=3, **SKIP)
    assert run.code == 1 and "\n1 setting, 0 of them to be trained\n" in run.err and "another sweep: train.epochs is 3, before 2" in run.err
    wider = sweep(base, data, tmp_path, {"lora_r": [2, 4], "seed": [1337]}, resume="auto", **SKIP)
    assert wider.code == 0 and [row["setting"] for row in rows(tmp_path)] == ["lora_r=2,seed=1337", "lora_r=4,seed=1337"]
    assert "not in this grid" in wider.err
    fewer = sweep(base, data, tmp_path, {"lora_r": [4], "seed": [1337]}, resume="auto", **SKIP)
    assert fewer.code == 0 and [row["setting"] for row in rows(tmp_path)] == ["lora_r=4,seed=1337"]
    assert "1 earlier setting not in this grid: lora_r=2,seed=1337. The table leaves them out; their folders stay" in fewer.err
    assert sweep(base, data, tmp_path, {"lora_r": [2]}, overwrite=True, train__epochs=1, **SKIP).code == 0
    assert [row["steps"] for row in rows(tmp_path)] == ["3"]


def test_a_sweep_resumed_on_another_day_keeps_its_date(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chat template of Llama 3.2 and others writes the date into each record."""

    class Earlier(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2024, 7, 26)

    model = shutil.copytree(base, tmp_path / "base")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ strftime_now('%d %b %Y') }}" + CHATML}))
    values, out = {"lora_r": [4, 2]}, tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "datetime", Earlier)
        patch.setattr(Loop, "step", failing_at(4, interrupt))
        assert sweep(model, data, out, values, data__prompt_style="chat", **SKIP).code == 130
    resumed = sweep(model, data, out, values, resume="auto", data__prompt_style="chat", **SKIP)
    assert resumed.code == 0, resumed.err
    assert json.loads((out / "lora_r=2/final/identity.json").read_text())["date"] == "2024-07-26T00:00:00"


def test_results_of_an_earlier_sweep_are_not_taken_for_those_of_another(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep that replaces another is stopped, and resumed; in the end a value is added that only the earlier one had."""
    values = {"lora_r": [2, 4, 3]}
    assert sweep(base, data, tmp_path, {"lora_r": [2, 4, 3, 5]}, train__epochs=1, **SKIP).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", failing_at(4, interrupt))
        assert sweep(base, data, tmp_path, values, overwrite=True, **SKIP).code == 130
    assert sweep(base, data, tmp_path, values, resume="auto", **SKIP).code == 0
    assert [row["steps"] for row in rows(tmp_path)] == ["6"] * 3
    wider = sweep(base, data, tmp_path, {"lora_r": [2, 4, 3, 5]}, resume="auto", **SKIP)
    assert wider.code == 1 and [row["status"] for row in rows(tmp_path)] == ["finished"] * 3 + ["failed"]
    assert "lora_r=5/final belongs to another run: train.epochs is 2, before 1" in wider.err


def test_a_dry_run_writes_nothing(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "JSON", "--data.json_path", str(data), "--skip2lora_enabled", "--precision", "32-true", "--global_batch_size", "6"]
    words += ["--data.val_split_fraction", "0.1"]
    from litgpt.__main__ import main

    argv = [
        "sweep",
        str(PLAIN),
        str(base),
        *words,
        "--grid.lora_r",
        "[2, 4, -1]",
        "--grid.epochs",
        "[1, 3]",
        "--out_dir",
        str(tmp_path / "out"),
    ]
    assert main([*argv, "--dry_run", "true"]) == 0
    out = capsys.readouterr().out
    assert "6 settings, 24 steps in all; 0.00 GiB of activations, computed once" in out
    shown = [line.split()[:3] for line in out.splitlines() if line.startswith("  lora_r=")]
    assert ["lora_r=2,epochs=1", f"{2 * 2 * 32 * 5}", "3"] in shown and ["lora_r=4,epochs=3", f"{2 * 4 * 32 * 5:,}", "9"] in shown
    assert "lora_r=-1,epochs=1" in out and "lora_r is -1" in out and "nothing was written" in out
    assert not list(tmp_path.iterdir())


# --- blocks left to auto ---


@pytest.mark.slow
def test_the_sweep_says_which_blocks_were_chosen(made: Callable[[str], Run]) -> None:
    run = made("auto")
    facts, found = json.loads((run.out_dir / "sweep.json").read_text()), {row["setting"] for row in rows(run.out_dir)}
    assert facts["chosen"].keys() == {name for name in found if "auto" in name}
    assert all(len(blocks) == (2 if "auto-2" in name else 1) for name, blocks in facts["chosen"].items())
    tapped = {block for blocks in facts["chosen"].values() for block in blocks} | {2, 3, 4}
    assert set(facts["cache"]["blocks"]) == tapped  # no more than is trained on
    assert run.err.count("skip2lora_block_indices auto: blocks ") == 4


def test_blocks_are_chosen_once(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all settings that would choose the same, and not again by a session that goes on."""
    settings = {**SKIP, "skip2lora_block_indices": "auto:2"}
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", failing_at(4, interrupt))
        stopped = sweep(base, data, tmp_path, {"lora_r": [2, 4]}, **settings)
    assert stopped.code == 130 and stopped.err.count("auto: blocks ") == 1
    monkeypatch.setattr("litgpt.train.prepare.choose", None)  # choosing again would fail
    assert sweep(base, data, tmp_path, {"lora_r": [2, 4]}, resume="auto", **settings).code == 0


@pytest.mark.slow
@pytest.mark.parametrize("broken", [5, ["x"], [[0], [1]], [0, 1, 2], [99, 1]])
def test_chosen_blocks_that_cannot_be_are_chosen_anew(broken: Any, base: Path, data: Path, tmp_path: Path) -> None:
    settings = {**SKIP, "skip2lora_block_indices": "auto:2"}
    assert sweep(base, data, tmp_path, {"lora_r": [2]}, **settings).code == 0
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chosen": {"lora_r=2": broken}}))
    run = sweep(base, data, tmp_path, {"lora_r": [2]}, resume="auto", **settings)
    assert run.code == 0 and run.err.count("auto: blocks ") == 1


# --- several processes ---

GRID = {"lora_r": [2, 4, 3], "seed": [1, 2]}
EACH: dict[str, Any] = {**SKIP, "train__save_interval": 2, "train__micro_batch_size": 3}
TIMES = {"train_seconds", "total_seconds", "folder"}


def by_two(base: Path, data: Path, folder: Path, fault: str = "none", launcher: str = "devices", **settings: Any) -> subprocess.Popen[str]:
    """Start a sweep of two processes, each of which trains at least one setting."""
    (folder / "meeting").mkdir(parents=True, exist_ok=True)
    keys = {**finetune_runs.SETTINGS, "data.val_split_fraction": 0.1, "data.json_path": data, "out_dir": folder / "out", **EACH, **settings}
    keys |= {f"grid.{key}": json.dumps(values) for key, values in GRID.items()} | ({"devices": 2} if launcher == "devices" else {})
    words = [f"--{key.replace('__', '.')}={str(value).lower() if isinstance(value, bool) else value}" for key, value in keys.items()]
    start = ["-mtorch.distributed.run", "--nproc_per_node=2"] if launcher == "torchrun" else []
    command = [
        sys.executable,
        *start,
        str(ROOT / "tests/helpers/faulty.py"),
        fault,
        "1",
        "sweep",
        str(PLAIN),
        str(base),
        "--data=JSON",
        *words,
    ]
    environment = {**environ(), "PYTHONPATH": str(ROOT), "MEETING": str(folder / "meeting")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def alone(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "out"
    assert sweep(base, data, folder, GRID, **EACH).code == 0
    return folder


def assert_same_sweep(out_dir: Path, expected: Path) -> None:
    """The same table and weights, bit for bit, but for the time that they took."""
    tables = [[{key: value for key, value in row.items() if key not in TIMES} for row in rows(folder)] for folder in (out_dir, expected)]
    assert tables[0] == tables[1]
    for row in rows(expected):
        ended, weights = (load(folder / row["setting"] / "final/lit_model.pth.lora")["model"] for folder in (out_dir, expected))
        assert all(torch.equal(ended[key], weights[key]) for key in weights)
    assert {path.name for path in out_dir.iterdir()} == {path.name for path in expected.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["devices", "torchrun"])
def test_two_processes_share_the_settings_and_one_cache(launcher: str, base: Path, data: Path, alone: Path, tmp_path: Path) -> None:
    out, err = by_two(base, data, tmp_path, launcher=launcher).communicate(timeout=240)
    assert "best: " in out and "6 settings, by 2 processes" in err and "on rank 1: validation loss" in err, err
    assert all(err.count(f"] {row['setting']}") == err.count(f"\n  {row['setting']}") == 1 for row in rows(alone)), err
    assert len(list((tmp_path / "activation_cache").glob("*"))) == 2, "of training and validation samples"
    assert_same_sweep(tmp_path / "out", alone)


@pytest.mark.slow
def test_the_setting_of_a_killed_process_is_taken_by_another(base: Path, data: Path, alone: Path, tmp_path: Path) -> None:
    process = by_two(base, data, tmp_path, "SIGKILL")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "was ended by SIGKILL: the others have done its work" in err, err
    (taken,) = [row["setting"] for row in rows(alone) if err.count(f"] {row['setting']}") == 2]
    assert f"] {taken} on rank 1" in err and "best: " in out
    assert_same_sweep(tmp_path / "out", alone)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_processes_stop_together_and_one_resumes_the_sweep(
    number: signal.Signals, base: Path, data: Path, alone: Path, tmp_path: Path
) -> None:
    process, began = by_two(base, data, tmp_path, "slow"), time.monotonic()
    while not (tmp_path / "out/sweep.csv").exists() or sum(row["status"] == "begun" for row in rows(tmp_path / "out")) < 2:
        assert process.poll() is None and time.monotonic() - began < 120
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number and err.count("the same command with --resume auto continues") == 1, err
    assert [row["status"] for row in rows(tmp_path / "out")].count("stopped") == 2
    assert sweep(base, data, tmp_path / "out", GRID, resume="auto", **EACH).code == 0
    assert_same_sweep(tmp_path / "out", alone)
