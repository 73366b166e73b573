"""`litgpt finetune` from the command line to its folder: LoRA and Skip2-LoRA at every output layer, and what it refuses."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import resource
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.testing import assert_close

import litgpt
from litgpt import Tokenizer, atomic, checkpoint, optim
from litgpt.__main__ import main
from litgpt.cli import parse
from litgpt.finetune.lora import Lora, setup
from litgpt.lora import lora_filter
from litgpt.model import GPT
from litgpt.prompts import ChatTemplate, resolve_prompt_style
from litgpt.train.loop import Batch, Loop
from litgpt.train.resume import State
from tests.helpers import runs as finetune_runs, tiny
from tests.helpers.cases import first, quick
from tests.helpers.runs import Run, finetune, in_two_processes, load, plain_loss, val_samples

SKIP: dict[str, Any] = {"skip2lora_enabled": True, "skip2lora_block_indices": "[0, 2]", "lora_r": 4}
LAYERS = {"lora_key": True, "lora_projection": True, "lora_mlp": True}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora_r": 4},
    "LoRA everywhere": {"lora_r": 4, **LAYERS, "lora_head": True},
    "late LoRA": {"lora_r": 4, "lora_block_indices": "last:2"},
    "lm_head": SKIP,
    "lm_head with LoRA": {**SKIP, "lora_head": True},
    "ln_f": {**SKIP, "skip2lora_output_layer": "transformer.ln_f"},
    "block": {**SKIP, **LAYERS, "skip2lora_output_layer": "transformer.h.3"},
}
PACKAGE = str(Path(litgpt.__file__).parent)
RATE_OF_A = 4 * 32
"""parameters of an A of rank 4 over d 32"""


@pytest.fixture(scope="module")
def made(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The run of a method, made once. Do not write into its folder."""
    runs: dict[str, Run] = {}

    def run(method: str) -> Run:
        if method not in runs:
            runs[method] = finetune("finetune_lora", base, data, tmp_path_factory.mktemp("runs") / "out", **METHODS[method])
        return runs[method]

    return run


# --- the folder ---


@pytest.mark.parametrize("method", quick(METHODS, "LoRA everywhere", "lm_head", "block"))
def test_a_run_leaves_exactly_these_files(method: str, made: Callable[[str], Run]) -> None:
    run = made(method)
    assert run.code == 0, run.err
    merged = set() if METHODS[method].get("skip2lora_enabled") else {"final/lit_model.pth"}
    expected = finetune_runs.run_files("lit_model.pth.lora") | merged
    found = set(finetune_runs.files(run.out_dir))
    events = {name for name in found if name.startswith("logs/version_0/events.out.tfevents.")}
    assert len(events) == 1 and found - events == expected
    assert {path.name for path in run.out_dir.parent.iterdir()} == {"out"}, "no cache on disk where memory suffices"


@pytest.mark.parametrize("method", quick(METHODS, "LoRA everywhere", "lm_head", "block"))
def test_the_weights_file_holds_the_trained_adapters_and_nothing_else(method: str, made: Callable[[str], Run], base: Path) -> None:
    run = made(method)
    settings, values = checkpoint.adapter_settings(run.final)
    model = tiny.tiny(**{**tiny.SPEAKING, **{key: value for key, value in values.items() if value is not None}})
    content = load(run.final / "lit_model.pth.lora")
    assert settings == base.resolve() and set(content) == {"model"}
    assert {name: value.shape for name, value in content["model"].items()} == {
        name: value.shape for name, value in model.state_dict().items() if lora_filter(name)
    }
    assert all(value.dtype == torch.float32 and value.any() for value in content["model"].values())
    last = load(run.out_dir / "step-000006" / "lit_model.pth.lora")["model"]
    assert all(torch.equal(value, last[name]) for name, value in content["model"].items())
    earlier = load(run.out_dir / "step-000002" / "lit_model.pth.lora")["model"]
    assert all(not torch.equal(value, earlier[name]) for name, value in content["model"].items())


@pytest.mark.parametrize("method", quick(METHODS, "LoRA everywhere", "lm_head", "block"))
def test_the_reported_loss_is_that_of_the_saved_model(method: str, made: Callable[[str], Run], base: Path, data: Path) -> None:
    run, samples = made(method), val_samples(base, data)
    assert len(samples) == 2
    before = plain_loss(checkpoint.load_model(base, torch.float32), samples)
    after = plain_loss(checkpoint.load_model(run.final, torch.float32), samples)
    assert run.report["initial_val_loss"] == pytest.approx(before, rel=1e-5)
    assert run.report["final_val_loss"] == pytest.approx(after, rel=1e-5)
    assert after < before - 0.1


@pytest.mark.parametrize("method", quick(METHODS, "LoRA everywhere", "lm_head", "block"))
def test_metrics_have_each_step_once_and_validation_where_it_was(method: str, made: Callable[[str], Run]) -> None:
    run = made(method)
    rows = run.rows()
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [0, 4, 6] == [int(row["step"]) for row in rows if row["val_ppl"]]
    measured = ("train_loss", "learning_rate", "step_time", "tokens_per_second", "peak_memory_gb")
    assert all(all(row[name] for name in measured) == (row["step"] != "0") for row in rows)
    assert run.column("epoch") == pytest.approx([n / 3 for n in range(7)], abs=1e-4)
    assert run.column("learning_rate")[:3] == pytest.approx([0.01, 0.02, 0.02])
    assert [float(v) for v in (rows[0]["val_loss"], rows[-1]["val_loss"])] == [run.report["initial_val_loss"], run.report["final_val_loss"]]
    for loss, perplexity in zip(run.column("val_loss"), run.column("val_ppl"), strict=True):
        assert perplexity == pytest.approx(math.exp(loss))


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("LoRA", 5 * (2 * RATE_OF_A + 4 * (32 + 16))),
        ("late LoRA", 2 * (2 * RATE_OF_A + 4 * (32 + 16))),
        ("lm_head", 2 * 2 * RATE_OF_A),
        ("ln_f", 2 * 2 * RATE_OF_A),
        ("lm_head with LoRA", 2 * 2 * RATE_OF_A + 4 * (32 + 320)),
        ("block", 2 * 2 * RATE_OF_A + 2 * (3 * RATE_OF_A + 4 * (32 + 16 + 16) + 2 * RATE_OF_A + 3 * 4 * (32 + 72))),
    ],
)
def test_the_report_counts_in_closed_form(method: str, trained: int, made: Callable[[str], Run], base: Path) -> None:
    run, report = made(method), made(method).report
    plain = sum(p.numel() for p in checkpoint.load_model(base, torch.float32).parameters())
    assert (report["steps"], report["epochs"]) == (6, 2.0)
    assert (report["trainable_parameters"], report["total_parameters"]) == (trained, plain + trained)
    assert 0 < report["train_seconds"] < report["total_seconds"] and report["tokens_per_second"] > 0 and report["peak_memory_gb"] > 0.01
    for line in (
        f"{trained:,} of {plain + trained:,} (",
        f"{report['final_val_loss']:.4f}",
        "18 train and 2 validation",
    ):
        assert line in run.err


@pytest.mark.parametrize("method", quick(["LoRA", "LoRA everywhere", "late LoRA"], "LoRA everywhere"))
def test_plain_lora_is_also_left_merged(method: str, made: Callable[[str], Run], base: Path, tmp_path: Path) -> None:
    run = made(method)
    merged = load(run.final / "lit_model.pth")
    assert {name: value.shape for name, value in merged.items()} == {name: v.shape for name, v in load(base / "lit_model.pth").items()}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("lit_model.pth.lora", "hyperparameters.yaml", "model_config.yaml"):
        (adapter / name).write_bytes((run.final / name).read_bytes())
    unmerged, whole = checkpoint.load_model(adapter, torch.float32), checkpoint.load_model(run.final, torch.float32)
    assert not any(lora_filter(name) for name, _ in whole.named_parameters()) and any(
        lora_filter(n) for n, _ in unmerged.named_parameters()
    )
    idx = tiny.ids(2, 20, V=320)
    assert_close(whole(idx), unmerged(idx), rtol=1e-4, atol=1e-4)
    assert isinstance(whole, GPT) and not torch.allclose(whole(idx), checkpoint.load_model(base, torch.float32)(idx), atol=1e-2)


def test_the_base_stays_as_it_was(base: Path, data: Path, tmp_path: Path) -> None:
    before = finetune_runs.files(base)
    assert finetune("finetune_lora", base, data, tmp_path / "out", **METHODS["LoRA everywhere"], train__max_steps=2).code == 0
    assert finetune_runs.files(base) == before


def test_tensorboard_reads_the_curves(made: Callable[[str], Run]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = made("lm_head")
    events = EventAccumulator(str(run.out_dir / "logs/version_0")).Reload()
    assert [(e.step, pytest.approx(e.value, rel=1e-5)) for e in events.Scalars("val_loss")] == list(
        zip((0, 4, 6), run.column("val_loss"), strict=True)
    )
    assert [e.value for e in events.Scalars("train_loss")] == pytest.approx(run.column("train_loss"), rel=1e-5)


def test_the_model_config_is_the_bases_and_the_tokenizer_comes_along(made: Callable[[str], Run], base: Path) -> None:
    run = made("block")
    assert yaml.safe_load((run.final / "model_config.yaml").read_text()) == yaml.safe_load((base / "model_config.yaml").read_text())
    for name in finetune_runs.TOKENIZER_FILES:
        assert (run.final / name).read_bytes() == (base / name).read_bytes()
    assert isinstance(resolve_prompt_style(None, run.final), ChatTemplate)
    settings = yaml.safe_load((run.final / "hyperparameters.yaml").read_text())
    assert {key for key in settings if key.startswith("lora_")} == {  # LitGPT's merge_lora refuses any other
        *("lora_r", "lora_alpha", "lora_dropout", "lora_query", "lora_key", "lora_value", "lora_projection", "lora_mlp", "lora_head")
    }


@pytest.mark.slow
@pytest.mark.parametrize("by", ["steps", "epochs"])
def test_a_warm_up_trains_lora_first_and_freezes_it_before_the_cut(by: str, base: Path, data: Path, tmp_path: Path) -> None:
    length = {"skip2lora_warmup_steps": 2} if by == "steps" else {"skip2lora_warmup_epochs": 0.6}  # of 3 steps
    settings = {**METHODS["block"], **length, "skip2lora_warmup_lr": 0.05, "lora_dropout": 0.2}
    runs = {mode: finetune("finetune_lora", base, data, tmp_path / mode, **settings, skip2lora_cache=mode) for mode in ("memory", "off")}
    run = runs["memory"]
    assert run.code == 0, run.err
    assert [int(row["step"]) for row in run.rows()] == list(range(9)) and run.report["steps"] == 8
    rates = run.column("learning_rate")
    assert (max(rates[:2]), max(rates[2:])) == (0.05, 0.02), rates
    first, second, last = (load(run.out_dir / name / "lit_model.pth.lora")["model"] for name in ("step-000002", "step-000004", "final"))
    for name in last:
        before_the_cut = name.startswith(tuple(f"transformer.h.{i}." for i in range(3))) and "skip2lora" not in name
        assert torch.equal(second[name], last[name]) == before_the_cut, name
        assert before_the_cut or not torch.equal(first[name], last[name])
    assert all(not first[name].any() for name in first if name.endswith("skip2lora.lora_B"))
    after = plain_loss(checkpoint.load_model(run.final, torch.float32), val_samples(base, data))
    assert run.report["final_val_loss"] == pytest.approx(after, rel=1e-5)
    for name in ("train_loss", "val_loss"):
        assert run.column(name) == pytest.approx(runs["off"].column(name), rel=1e-4)


# --- again ---


@pytest.mark.parametrize("method", quick(["LoRA", "block"], "block"))
def test_hyperparameters_are_a_config_that_repeats_the_run_bit_for_bit(method: str, made: Callable[[str], Run], tmp_path: Path) -> None:
    run = made(method)
    config = run.final / "hyperparameters.yaml"
    again = finetune_runs.call(["finetune_lora", "--config", str(config), "--out_dir", str(tmp_path / "again")], tmp_path / "again")
    assert again.code == 0, again.err
    for name in ("train_loss", "val_loss", "learning_rate"):
        assert again.column(name) == run.column(name)
    assert (again.final / "lit_model.pth.lora").read_bytes() == (run.final / "lit_model.pth.lora").read_bytes()
    first, second = (yaml.safe_load((one.final / "hyperparameters.yaml").read_text()) for one in (run, again))
    assert second == {**first, "out_dir": str(tmp_path / "again")}


def test_another_seed_is_another_run(made: Callable[[str], Run], base: Path, data: Path, tmp_path: Path) -> None:
    other = finetune("finetune_lora", base, data, tmp_path / "out", **METHODS["lm_head"], seed=7, train__max_steps=2)
    assert other.code == 0 and other.column("train_loss") != made("lm_head").column("train_loss")[:2]


def test_a_second_run_into_the_same_folder_is_refused_and_changes_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert finetune("finetune_lora", base, data, out, **SKIP).code == 0
    before = finetune_runs.files(tmp_path)
    again = finetune("finetune_lora", base, data, out, **SKIP)
    assert (
        again.code == 1
        and f"Error: out_dir {out} holds an earlier run (best, final, logs, report.html, report.json, step-000002" in again.err
    )
    assert finetune_runs.files(tmp_path) == before
    (out / "notes.txt").write_text("mine")
    replaced = finetune("finetune_lora", base, data, out, **SKIP, overwrite=True, train__max_steps=1)
    assert replaced.code == 0, replaced.err
    assert {path.name for path in out.iterdir()} == {"best", "final", "logs", "report.html", "report.json", "notes.txt"}
    assert [int(row["step"]) for row in replaced.rows()] == [0, 1] and replaced.report["steps"] == 1


# --- settings ---


def test_max_steps_without_its_prefix(base: Path, data: Path, tmp_path: Path) -> None:
    run = finetune("finetune_lora", base, data, tmp_path / "out", "--max_steps", "2", **SKIP)
    assert run.code == 0 and run.report["steps"] == 2 and (tmp_path / "out/step-000002").is_dir()


def test_positions_is_the_older_name_of_block_indices(made: Callable[[str], Run], base: Path, data: Path, tmp_path: Path) -> None:
    settings = {**SKIP, "skip2lora_block_indices": None, "skip2lora_positions": "[transformer.h.0, transformer.h.2]"}
    run = finetune("finetune_lora", base, data, tmp_path / "out", **settings)
    assert run.code == 0, run.err
    assert run.column("train_loss") == made("lm_head").column("train_loss")
    assert "skip2lora_positions" not in (run.final / "hyperparameters.yaml").read_text()
    assert checkpoint.load_model(run.final, torch.float32).config.taps == (0, 2)


@pytest.mark.parametrize(
    ("precision", "method"),
    quick(
        itertools.product(("bf16-true", "bf16-mixed"), ("LoRA everywhere", "lm_head with LoRA", "block")), ("bf16-true", "LoRA everywhere")
    ),
)
def test_other_precisions_run_and_learn_the_same(
    precision: str, method: str, made: Callable[[str], Run], base: Path, data: Path, tmp_path: Path
) -> None:
    run = finetune("finetune_lora", base, data, tmp_path / "out", **{**METHODS[method], "precision": precision})
    assert run.code == 0, run.err
    assert run.column("val_loss") == pytest.approx(made(method).column("val_loss"), rel=0.02)
    assert all(value.dtype == torch.float32 for value in load(run.final / "lit_model.pth.lora")["model"].values())
    if method == "LoRA everywhere":
        dtypes = {value.dtype for value in load(run.final / "lit_model.pth").values()}
        assert dtypes == {torch.bfloat16 if precision == "bf16-true" else torch.float32}


@pytest.mark.parametrize(
    ("precision", "itemsize"), quick([("bf16-true", 2), ("bf16-mixed", 4), ("32-true", 4)], ("bf16-true", 2), ("bf16-mixed", 4))
)
@pytest.mark.parametrize("method", quick(["lm_head", "lm_head with LoRA"], "lm_head"))
def test_a_cache_has_the_backbones_dtype_unless_told_otherwise(
    method: str, precision: str, itemsize: int, base: Path, data: Path, tmp_path: Path
) -> None:
    settings = {**METHODS[method], "precision": precision, "skip2lora_cache": "disk", "train__max_steps": 1}
    assert finetune("finetune_lora", base, data, tmp_path / "out", **settings).code == 0
    positions = sum(sample.n_targets for sample in val_samples(base, data))
    sizes = sorted(file.stat().st_size for file in (tmp_path / "activation_cache").glob("*/activations.bin"))
    assert sizes[0] == positions * 3 * 32 * itemsize


@pytest.mark.parametrize("method", quick(["late LoRA", "lm_head", "block"], "block"))
def test_runs_without_a_cache_and_with_one_on_disk_have_the_same_curve(method: str, base: Path, data: Path, tmp_path: Path) -> None:
    runs = {}
    for mode in ("off", "memory", "disk"):
        settings = {**METHODS[method], "lora_dropout": 0.0, "skip2lora_cache": mode}
        runs[mode] = finetune("finetune_lora", base, data, tmp_path / mode / "out", **settings)
        assert runs[mode].code == 0, runs[mode].err
    assert len(list((tmp_path / "disk/activation_cache").glob("*/activations.bin"))) == 2
    assert {path.name for path in (tmp_path / "memory").iterdir()} == {path.name for path in (tmp_path / "off").iterdir()} == {"out"}
    for name in ("train_loss", "val_loss"):
        for mode in ("memory", "disk"):
            assert runs[mode].column(name) == pytest.approx(runs["off"].column(name), rel=1e-5)


def test_a_later_run_starts_on_the_cache_of_an_earlier_one(base: Path, data: Path, tmp_path: Path) -> None:
    cache = {"skip2lora_cache": "disk", "skip2lora_cache_dir": tmp_path / "cache"}
    first = finetune("finetune_lora", base, data, tmp_path / "one", **SKIP, **cache)
    second = finetune("finetune_lora", base, data, tmp_path / "two", **{**SKIP, "lora_r": 2}, **cache, optimizer__lr=0.01, seed=3)
    assert (first.code, second.code) == (0, 0)
    assert first.err.count("is reused") == 0 and second.err.count("is reused") == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2
    other = finetune("finetune_lora", base, data, tmp_path / "three", **{**SKIP, "precision": "bf16-mixed"}, **cache)
    assert other.code == 0 and other.err.count("is reused") == 0


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("bfloat16", "32-true"),
        pytest.param("float32", "bf16-true", marks=pytest.mark.slow),
        pytest.param("float16", "32-true", marks=pytest.mark.slow),
    ],
)
def test_the_cache_may_have_another_dtype_than_the_model(name: str, precision: str, base: Path, data: Path, tmp_path: Path) -> None:
    run = finetune(
        "finetune_lora", base, data, tmp_path / "out", **{**METHODS["block"], "precision": precision}, skip2lora_cache_dtype=name
    )
    assert run.code == 0, run.err


def test_a_run_of_one_epoch_does_not_cache_what_it_reads_once(base: Path, data: Path, tmp_path: Path) -> None:
    run = finetune("finetune_lora", base, data, tmp_path / "out", **SKIP, train__epochs=1)
    assert run.code == 0 and "training cache" not in run.err and "validation cache" in run.err


@pytest.mark.parametrize("which", quick(["first", "random", 1], "random", 1))
@pytest.mark.parametrize("method", quick(["LoRA everywhere", "lm_head"], "lm_head"))
def test_an_example_is_answered_at_every_validation(which: Any, method: str, base: Path, data: Path, tmp_path: Path) -> None:
    run = finetune("finetune_lora", base, data, tmp_path / "out", **METHODS[method], eval__evaluate_example=which, train__max_steps=1)
    assert run.code == 0, run.err
    assert run.err.count("asked: add ") == 2 == run.err.count("answered: ")


def test_examples_with_the_same_question_keep_their_answers_apart(base: Path, tmp_path: Path) -> None:
    """Records of one task share its words: the input tells them apart, or nothing does."""
    file = tmp_path / "data.json"
    file.write_text(json.dumps([{"instruction": "Sum up.", "input": f"text {i % 19}", "output": f"{i}"} for i in range(20)]))
    settings: dict[str, Any] = {**SKIP, "eval__max_new_tokens": 2, "eval__evaluate_example": "[0, 1, 0]", "eval__initial_validation": False}
    run = finetune("finetune_lora", base, file, tmp_path / "out", **settings, train__max_steps=1)
    assert run.code == 0, run.err
    page = (run.out_dir / "report.html").read_text()
    shown = re.findall(r"<div class=answer><b>Sum up.\n(text \d+)</b>", page)
    assert len(shown) == 3 and shown[0] == shown[2] != shown[1]
    assert f"  asked: Sum up. {shown[0]}\n" in run.err and f"\n  Sum up. {shown[0]}\n  now: " in run.err, (
        "a question is one line on the screen"
    )
    assert page.count("<dt>after 1 step<") == 3 and "<dt>before" not in page and "before:" not in run.err


def test_an_answer_that_is_cut_is_marked(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = Tokenizer(base).encode("12 34 5").tolist()
    monkeypatch.setattr("litgpt.train.run.answer", lambda model, example, most, *given: ids[:most])
    for most, shown in ((len(ids) - 1, " ..."), (len(ids), ""), (len(ids) + 1, "")):
        run = finetune("finetune_lora", base, data, tmp_path / str(most), **SKIP, eval__max_new_tokens=most, train__max_steps=1)
        text = Tokenizer(base).decode(ids[:most]).strip() + shown
        assert run.code == 0 and f"answered: {text}\n" in run.err and f"now:     {text}\n" in run.err, run.err


def test_an_answer_is_not_cut_within_a_character(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = Tokenizer(base).encode("a東b").tolist()
    most = next(most for most in range(1, len(ids)) if "\ufffd" in Tokenizer(base).decode(ids[:most]))
    monkeypatch.setattr("litgpt.train.run.answer", lambda model, example, most, *given: ids[:most])
    run = finetune("finetune_lora", base, data, tmp_path / "out", **SKIP, eval__max_new_tokens=most, train__max_steps=1)
    assert run.code == 0 and "answered: a ...\n" in run.err, run.err


def test_no_answers_are_made_where_none_are_wanted(base: Path, data: Path, tmp_path: Path) -> None:
    run = finetune("finetune_lora", base, data, tmp_path / "out", **SKIP, eval__max_new_tokens=0, train__max_steps=1)
    assert run.code == 0 and "asked" not in run.err


def test_the_access_token_is_never_written_or_shown(base: Path, data: Path, tmp_path: Path) -> None:
    secret = "hf_verysecret123"
    run = finetune("finetune_lora", base, data, tmp_path / "out", **SKIP, access_token=secret, train__max_steps=1)
    assert run.code == 0 and secret not in run.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert "access_token" not in yaml.safe_load((run.final / "hyperparameters.yaml").read_text())


def test_fewer_validation_samples_than_max_iters_asks_for_and_fewer_batches_than_there_are(base: Path, data: Path, tmp_path: Path) -> None:
    one = finetune("finetune_lora", base, data, tmp_path / "out", **SKIP, train__micro_batch_size=1, eval__max_iters=1, train__max_steps=1)
    assert one.code == 0
    first = plain_loss(checkpoint.load_model(base, torch.float32), val_samples(base, data)[:1])
    assert one.report["initial_val_loss"] == pytest.approx(first, rel=1e-5)


# --- what is refused ---

BAD: dict[str, tuple[int, dict[str, Any], str]] = {
    "example beyond the set": (1, {"eval__evaluate_example": 99}, "eval.evaluate_example is 99: the validation set has 2 samples"),
    "unknown precision": (1, {"precision": "fp8"}, "precision 'fp8' is unknown: choose one of"),
    "unknown quantize": (2, {"quantize": "int2"}, "--quantize"),
    "taps behind the cut": (
        1,
        {"skip2lora_output_layer": "transformer.h.2", "skip2lora_block_indices": "[0, 3]"},
        "skip2lora_block_indices names block 3, which does not run before skip2lora_output_layer 'transformer.h.2'",
    ),
    "no such block": (1, {"skip2lora_block_indices": "[9]"}, "skip2lora_block_indices names 9: this model has blocks 0 to 4"),
    "two names for the taps": (2, {"skip2lora_positions": "[0]"}, "skip2lora_positions is the older name"),
    "LoRA before the cut": (1, {"lora_block_indices": "[0]"}, "lora_block_indices names block 0"),
    "no such output layer": (1, {"skip2lora_output_layer": "transformer.h.77"}, "skip2lora_output_layer is 'transformer.h.77'"),
    "nothing to train": (
        1,
        {"skip2lora_enabled": False, "skip2lora_block_indices": None, "lora_query": False, "lora_value": False},
        "nothing would be trained",
    ),
    "rank 0": (1, {"lora_r": 0}, "needs a rank"),
    "cache dtype": (1, {"skip2lora_cache_dtype": "int4"}, "skip2lora_cache_dtype is 'int4': choose one of"),
    "optimizer": (1, {"optimizer": "LBFGS", "optimizer.lr": None}, "optimizer: LBFGS does not work with this training loop"),
    "unknown optimizer": (1, {"optimizer": "AdanW", "optimizer.lr": None}, "do you mean AdamW?"),
    "optimizer's argument": (1, {"optimizer.beta": 3}, "AdamW has no argument beta"),
    "devices": (1, {"devices": 0}, "devices 0"),
    "nodes": (1, {"num_nodes": 0}, "num_nodes is 0"),
    "tied embeddings": (1, {"train.tie_embeddings": True}, "train.tie_embeddings is for finetune_full"),
    "batches for two": (
        1,
        {"devices": 2, "train.global_batch_size": 3, "train.micro_batch_size": 1},
        "3 is not a multiple of the 2 devices",
    ),
    "batches": (2, {"train.micro_batch_size": 4}, "must be a multiple of train.micro_batch_size"),
    "validation share": (1, {"data.val_split_fraction": 1.5}, "data.val_split_fraction is 1.5"),
    "prompt style": (1, {"data.prompt_style": "nonsense"}, "nonsense"),
    "too short": (1, {"train.max_seq_length": 3, "data.mask_prompt": True}, "no answer token is left"),
    "unknown key": (2, {"lora_rank": 3}, "--lora_rank is not a known key"),
}


def assert_one_line(run: Run, code: int, message: str) -> None:
    """The error is the last thing said, on one line."""
    last = run.err.rstrip("\n").split("\n")[-1]
    assert run.code == code and last.startswith("Error: ") and message in last, run.err
    assert "Traceback" not in run.err and run.err.count("Error") == 1


@pytest.mark.parametrize("what", BAD)
def test_a_mistake_is_one_line_and_creates_nothing(what: str, base: Path, data: Path, tmp_path: Path) -> None:
    code, settings, message = BAD[what]
    run = finetune("finetune_lora", base, data, tmp_path / "out", **{**SKIP, **settings})
    assert_one_line(run, code, message)
    assert not list(tmp_path.iterdir())


def earlier_run(out_dir: Path) -> None:
    (out_dir / "final").mkdir(parents=True)
    (out_dir / "final/lit_model.pth.lora").write_text("precious")
    atomic.write_manifest(out_dir / "final")
    (out_dir / "report.json").write_text('{"trainable_parameters": 1}')


@pytest.mark.parametrize("what", quick(BAD, "example beyond the set", "no such block", "nothing to train", "optimizer", "unknown key"))
def test_a_mistake_does_not_cost_the_earlier_run_that_was_to_be_replaced(what: str, base: Path, data: Path, tmp_path: Path) -> None:
    earlier_run(tmp_path / "out")
    before = finetune_runs.files(tmp_path)
    code, settings, message = BAD[what]
    assert_one_line(finetune("finetune_lora", base, data, tmp_path / "out", **{**SKIP, **settings}, overwrite=True), code, message)
    assert finetune_runs.files(tmp_path) == before


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_logger_that_is_not_installed(overwrite: bool, base: Path, data: Path, tmp_path: Path) -> None:
    if overwrite:
        earlier_run(tmp_path / "out")
    before = finetune_runs.files(tmp_path)
    run = finetune("finetune_lora", base, data, tmp_path / "out", **SKIP, logger_name="wandb", overwrite=overwrite)
    assert_one_line(run, 1, "logger_name 'wandb' needs a package that is not installed")
    assert "parameters" not in run.err  # the model was not read yet
    assert finetune_runs.files(tmp_path) == before


def test_a_wrong_optimizer_is_told_before_the_model_is_read(base: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base/tokenizer.json").write_text("{")  # which reading the model would find
    run = finetune("finetune_lora", tmp_path / "base", data, tmp_path / "out", **SKIP, optimizer="AdanW")
    assert_one_line(run, 1, "do you mean AdamW?")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", quick(["finetune", "finetune_lora"], "finetune"))
def test_alpaca_is_the_default(command: str, base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in LitGPT; a line says so before it is downloaded."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "data/alpaca/alpaca_data_cleaned_archive.json"
    place.parent.mkdir(parents=True)
    place.write_bytes(data.read_bytes())
    run = finetune(command, base, None, tmp_path / "out", train__max_steps=1)
    assert run.code == 0 and "No data given: Alpaca, 52,000 instructions" in run.err and run.report["steps"] > 0


def test_wrong_places(base: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "out"
    assert_one_line(
        finetune("finetune_lora", tmp_path / "nowhere", data, out), 1, f"checkpoint folder {tmp_path / 'nowhere'} does not exist"
    )
    assert_one_line(finetune("finetune_lora", empty, data, out), 1, f"checkpoint folder {empty} lacks lit_model.pth, model_config.yaml")
    assert_one_line(finetune("finetune_lora", base, tmp_path / "no.json", out), 1, f"{tmp_path / 'no.json'} does not exist")
    assert_one_line(finetune("finetune_lora", base, data, file), 1, f"out_dir {file} cannot be a folder")
    assert_one_line(finetune("finetune_lora", base, data, file / "below"), 1, f"out_dir {file / 'below'}")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "empty"} and file.read_text() == "mine" and not list(empty.iterdir())


def test_weights_of_another_model(base: Path, data: Path, tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    other = tiny.write_base(tmp_path / "other", write_tiny_tokenizer, n_layer=3)
    (other / "lit_model.pth").write_bytes((base / "lit_model.pth").read_bytes())
    run = finetune("finetune_lora", other, data, tmp_path / "out", lora_r=4)
    assert_one_line(run, 1, "transformer.h.3.attn.qkv.weight is unknown")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_ends_in_one_line(base: Path, data: Path, tmp_path: Path) -> None:
    run = finetune(
        "finetune_lora", base, data, tmp_path / "out", **SKIP, optimizer__lr=1e38, train__lr_warmup_steps=0, eval__max_new_tokens=0
    )
    assert_one_line(run, 3, "the loss is")
    assert not (tmp_path / "out/final").exists()


def test_few_frames_from_the_command_to_the_optimizer(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, stacks = torch.optim.AdamW.step, list[list[str]]()

    def recorded(optimizer: torch.optim.AdamW, *args: Any) -> Any:
        frames = (frame.f_code for frame, _ in traceback.walk_stack(None))
        stacks.append([code.co_name for code in frames if code.co_filename.startswith(PACKAGE)][::-1])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    monkeypatch.setattr(optim, "without_dynamo", lambda kind: kind)
    assert finetune("finetune_lora", base, data, tmp_path / "out", lora_r=4, train__max_steps=1).code == 0
    assert stacks == [["main", "main", "run", "run", "step"]]


def test_setup_is_the_command_for_scripts(base: Path, data: Path, tmp_path: Path, made: Callable[[str], Run]) -> None:
    """LitGPT's name, with texts for paths."""
    words = parse("litgpt finetune", Lora, [str(made("LoRA").final / "hyperparameters.yaml")])
    arguments: dict[str, Any] = {**words, "out_dir": str(tmp_path / "out"), "access_token": None}
    setup(str(arguments.pop("checkpoint_dir")), **arguments)
    ours, theirs = (load(folder / "final/lit_model.pth.lora")["model"] for folder in (tmp_path / "out", made("LoRA").out_dir))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_an_interrupt_in_mid_step_leaves_whole_checkpoints_and_no_other(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Loop.step

    def interrupted(loop: Loop, state: State, batch: Batch) -> dict[str, float]:
        if state.step == 4:
            raise KeyboardInterrupt
        return step(loop, state, batch)

    monkeypatch.setattr(Loop, "step", interrupted)
    run = finetune("finetune_lora", base, data, tmp_path / "out", **SKIP)
    assert run.code == 130 and run.err.endswith("Interrupted.\n")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"step-000002", "step-000004", "best", "logs"}
    assert [int(row["step"]) for row in run.rows()] == [0, 1, 2, 3, 4]
    checkpoint.load_model(tmp_path / "out/step-000004", torch.float32)


def test_a_disk_that_fills_up_ends_in_one_line_and_leaves_no_half_checkpoint(base: Path, data: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for it: the weights are larger, everything else is smaller."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    settings = {**METHODS["LoRA everywhere"], "lora_r": 200, "train__max_steps": 3, "eval__max_new_tokens": 0}
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, hard))
    try:
        run = finetune("finetune_lora", base, data, tmp_path / "out", **settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_line(run, 1, f"{tmp_path / 'out/step-000002'} cannot be written: File too large")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"logs"}


# --- several devices ---


@pytest.mark.slow
def test_two_processes_reach_the_loss_of_one(base: Path, data: Path, tmp_path: Path) -> None:
    """With as many samples in a batch as there are, both see the same batches."""
    whole = {"train__global_batch_size": 18, "train__micro_batch_size": 3, "lora_dropout": 0.0, **METHODS["block"]}
    alone = finetune("finetune_lora", base, data, tmp_path / "one", **whole)
    assert alone.code == 0
    two = in_two_processes(alone.out_dir, tmp_path / "two")
    assert two.column("train_loss") == pytest.approx(alone.column("train_loss"), rel=1e-4)
    assert two.column("val_loss") == pytest.approx(alone.column("val_loss"), rel=1e-4)
    assert two.report["final_val_loss"] == pytest.approx(alone.report["final_val_loss"], abs=1e-4)
    assert two.err.count("finished: ") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    first(
        [
            ({"optimizer.lr": 0.0}, "nothing is trained, as the optimizer's learning rate (lr) is 0"),
            ({"lora_alpha": 0}, "nothing is trained, as the adapters' alpha (lora_alpha, skip2lora_alpha) is 0"),
            ({}, None),
        ],
        2,
    ),
)
def test_settings_that_train_nothing_are_reported(
    settings: dict[str, Any], message: str | None, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["finetune_lora", str(base), "--data", str(data), "--out_dir", str(tmp_path / "out"), "--dry_run", "true"]
    assert main([*argv, *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]) == 0
    output = " ".join("".join(capsys.readouterr()).split())
    assert message in output if message else "nothing is trained" not in output
