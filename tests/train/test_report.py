"""report.json and the summary: figures of a state whose values are known."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any

import pytest

from litgpt.data import DataModule
from litgpt.finetune.adapter import Adapter
from litgpt.finetune.full import Full
from litgpt.finetune.lora import Lora
from litgpt.keys import known_classes
from litgpt.lora import Config
from litgpt.pretrain import Pretrain
from litgpt.train.report import as_json, figures, next_steps, page_of, summary_rows
from litgpt.train.resume import State
from litgpt.values import members_of
from tests.helpers import family_configs

STATE = State(step=6, tokens=300, seconds=2.0, losses=[(0, 3.0), (4, 1.5), (6, 2.0)], best=(4, 1.5))


def test_figures_of_a_run() -> None:
    report = figures(STATE, steps_per_epoch=4, trainable=10, total=1000, peak_memory_gb=0.5)
    assert report.pop("total_seconds") > 0
    assert report == {
        "steps": 6,
        "epochs": 1.5,
        "initial_val_loss": 3.0,
        "final_val_loss": 2.0,
        "best_val_loss": 1.5,
        "best_step": 4,
        "skipped_steps": 0,
        "trainable_parameters": 10,
        "total_parameters": 1000,
        "train_seconds": 2.0,
        "tokens_per_second": 150.0,
        "peak_memory_gb": 0.5,
    }


def test_losses_count_where_they_were_measured() -> None:
    report = figures(State(step=6, losses=[(4, 1.5)]), 3, 1, 2, 0.0)
    assert (report["initial_val_loss"], report["final_val_loss"], report["best_step"]) == (None, None, None)
    assert report["tokens_per_second"] == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_json_has_null_for_what_is_not_finite(value: float) -> None:
    assert json.loads(as_json({"a": value, "b": 1.5, "c": None})) == {"a": None, "b": 1.5, "c": None}


@pytest.mark.parametrize("kind", [Lora, Full, Adapter, Pretrain, *known_classes(DataModule).values()])
def test_the_page_shows_the_names_of_paths_only(kind: type) -> None:
    hints = typing.get_type_hints(kind)
    keys = [item.name for item in dataclasses.fields(kind) if Path in members_of(hints[item.name]) and item.name != "resume"]
    page = page_of("m", figures(STATE, 4, 10, 1000, 0.5), {}, [], {"data": {key: f"/home/me/{key}.x" for key in keys}}, Path("best"))
    assert page.count(".x") == len(keys) and "/home/me" not in page


def test_the_page_names_the_losses_that_were_measured(tmp_path: Path) -> None:
    def words(best: str, **changed: float | None) -> str:
        page = page_of("m", {**figures(STATE, 4, 10, 1000, 0.5), **changed}, {}, [], {}, tmp_path / best)
        return page.partition("<p class=soft>")[2].partition("</p>")[0]

    lowest = "The lowest validation loss, 1.500, was at step 4"
    assert words("") == f"Validation loss 3.000 before, 2.000 after. {lowest}: its checkpoint is in best/."
    assert words("none") == f"Validation loss 3.000 before, 2.000 after. {lowest}."  # train.keep_best false
    assert words("none", initial_val_loss=None) == f"Validation loss 2.000 after. {lowest}."
    assert words("none", initial_val_loss=None, final_val_loss=None) == f"{lowest}."
    assert words("", best_val_loss=2.0, initial_val_loss=None) == "Validation loss 2.000 after."
    assert not words("", initial_val_loss=None, final_val_loss=None, best_val_loss=None)


def test_the_summary(tmp_path: Path) -> None:
    report = figures(STATE, 4, 10, 1000, 0.5)
    rows = summary_rows(report, tmp_path)
    assert rows["validation loss after"] == "2.0000 (perplexity 7.39)"
    assert rows["trainable parameters"] == "10 of 1,000 (1.000 %)" and rows["steps"] == "6 (1.5 epochs)"
    assert summary_rows({**report, "epochs": 1.0}, tmp_path)["steps"] == "6 (1 epoch)"
    assert rows["best checkpoint"] == f"{tmp_path}: step 4, validation loss 1.5000"
    assert "skipped steps" not in rows and "merged into the base" not in rows
    assert "eval.target_loss" not in {**rows, **summary_rows(report, tmp_path, 2.0)}
    assert summary_rows(report, tmp_path, 0.5)["eval.target_loss"].endswith("that are missing (--train.epochs 3)")
    more = summary_rows({**report, "skipped_steps": 2, "merged_val_loss": 2.5, "initial_val_loss": None}, tmp_path / "none")
    assert more["skipped steps"].startswith("2 ") and more["merged into the base"].startswith("2.5000")
    assert more["validation loss before"] == "not measured" and "best checkpoint" not in more


def test_the_next_steps_name_gguf_where_it_can_hold_the_model() -> None:
    """Llama's decoder has a form there, gpt-oss's none in this package."""
    llama, gpt_oss = (family_configs.pair(family)[1] for family in ("llama", "gpt_oss"))
    answers: dict[str, Any] = {"lora_r": 2, "lora_query": True, "alora_enabled": True, "alora_invocation_tokens": [1]}
    for settings, whole, gguf in (({}, True, "convert_to_gguf"), (answers, False, "--to gguf")):
        for fields, has in ((llama, True), (gpt_oss, False)):
            commands = [command for command, _ in next_steps(Path("out"), Config(**fields, **settings), ("litgpt chat out", ""), whole)]
            assert any(gguf in command for command in commands) is has, commands
            assert commands[:2] == ["litgpt chat out", "litgpt serve out"] and len(commands) == 4 + has


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"value_head": "linear"}, ["best"]),
        ({"value_head": "linear", "lora_r": 2, "lora_query": True}, ["chat", "serve", "best"]),
        ({"mtp_heads": 1}, ["chat", "serve", "heads"]),
        ({"mtp_heads": 1, "lora_r": 2, "skip2lora_enabled": True, "skip2lora_block_indices": "all"}, ["chat", "serve", "heads"]),
        ({"mtp_heads": 1, "value_head": "mlp", "lora_r": 2, "lora_query": True, "alora_enabled": True}, ["chat", "serve", "best", "heads"]),
    ],
)
def test_the_next_steps_of_heads_are_commands_that_use_them(settings: dict[str, Any], expected: list[str]) -> None:
    """Exports are refused for a folder with heads."""
    llama = family_configs.pair("llama")[1]
    commands = {
        "litgpt chat out": "chat",
        "litgpt serve out": "serve",
        "litgpt generate out/final --prompt 'A question' --best_of 8 --by value": "best",
        "litgpt generate out/final --prompt 'A question' --speculate heads": "heads",
    }
    steps = next_steps(Path("out"), Config(**llama, **settings), ("litgpt chat out", ""), False)
    assert [commands[command] for command, _ in steps[:-1]] == expected
