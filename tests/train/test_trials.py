"""The trials of a sweep: combinations, names, samples of a large grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from litgpt.args import marked
from litgpt.data import JSON
from litgpt.errors import UserError
from litgpt.finetune.lora import Lora
from litgpt.train.trials import expand, foreign_files

SETTINGS_OF_ALL = Lora(
    checkpoint_dir=Path("base"),
    out_dir=Path("out"),
    data=JSON(json_path=Path("data.json")),
    seed=1,
    optimizer={"class_path": "AdamW", "init_args": {"lr": 1.0, "eps": 1e-6}},
)


def test_the_optimizer_and_its_arguments() -> None:
    trials = expand(SETTINGS_OF_ALL, {"optimizer.lr": [2.0, 3.0], "optimizer": ["SGD", "AdamW"]})
    assert [trial.settings.optimizer for trial in trials] == [
        {"class_path": "SGD", "init_args": {"lr": 2.0}},
        {"class_path": "AdamW", "init_args": {"lr": 2.0, "eps": 1e-6}},
        {"class_path": "SGD", "init_args": {"lr": 3.0}},
        {"class_path": "AdamW", "init_args": {"lr": 3.0, "eps": 1e-6}},
    ]
    assert SETTINGS_OF_ALL.optimizer["init_args"] == {"lr": 1.0, "eps": 1e-6}


def test_names_of_folders() -> None:
    many = {"skip2lora_block_indices": [list(range(60)), [-1], "last:6", "transformer.h.3"], "optimizer.betas": [[0.9, 0.95]], "seed": [1]}
    names = [trial.name for trial in expand(SETTINGS_OF_ALL, many)]
    assert names[1:] == [f"blocks={blocks},betas=0.9-0.95,seed=1" for blocks in ("-1", "last-6", "transformer.h.3")]
    assert len(names[0]) < 140 and names[0].startswith("blocks=0-1-2-3-")
    alike = [trial.name for trial in expand(SETTINGS_OF_ALL, {"skip2lora_block_indices": ["last:6", "last-6"]})]
    assert len(set(alike)) == 2 and all(name.startswith("blocks=last-6-") for name in alike)


def test_a_sample_of_a_large_grid() -> None:
    large = {"seed": list(range(10**4)), "lora_r": list(range(1, 1000)), "lora_alpha": list(range(1, 1000))}
    drawn = [trial.values for trial in expand(SETTINGS_OF_ALL, large, 5)]
    assert drawn == [trial.values for trial in expand(SETTINGS_OF_ALL, large, 5)] and len({str(values) for values in drawn}) == 5
    assert drawn != [trial.values for trial in expand(replace(SETTINGS_OF_ALL, seed=2), large, 5)]
    whole = [trial.values for trial in expand(SETTINGS_OF_ALL, {"seed": [1, 2], "lora_r": [1, 2]}, 9)]
    assert whole == [{"seed": seed, "lora_r": r} for seed in (1, 2) for r in (1, 2)]
    with pytest.raises(UserError, match="more than 10,000"):
        expand(SETTINGS_OF_ALL, large)


def test_the_keys_that_may_vary() -> None:
    names = set(marked(Lora, "varies"))
    assert {"lora_r", "skip2lora_block_indices", "optimizer", "seed", "train.epochs", "train.min_lr", "eval.patience"} <= names
    assert not names & {
        "data",
        "precision",
        "checkpoint_dir",
        "quantize",
        "skip2lora_output_layer",
        "skip2lora_norm",
        "train.max_seq_length",
    }


def test_files_that_no_sweep_wrote(tmp_path: Path) -> None:
    own = {"sweep.csv": "setting,lora_r,status,trainable_parameters,", "sweep.json": '{"identity": {}}', ".sweep.lock": ""}
    for name, content in own.items():
        (tmp_path / name).write_text(content)
    assert foreign_files(tmp_path) == [] == foreign_files(tmp_path / "missing")
    for name, content in (("sweep.csv", "setting,mine"), ("sweep.json", "{}"), ("sweep.json", "[" * 9), (".sweep.lock", "mine")):
        (tmp_path / name).write_text(content)
        assert foreign_files(tmp_path) == [name]
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to("elsewhere")
        assert foreign_files(tmp_path) == [name]
        (tmp_path / name).unlink()
        (tmp_path / name).write_text(own[name])
