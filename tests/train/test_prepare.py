"""What is read and checked before a run writes anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.args import EvalArgs, TrainArgs
from litgpt.data import JSON, TextFiles
from litgpt.errors import UserError
from litgpt.finetune.lora import Lora
from litgpt.train.methods import adapters
from litgpt.train.prepare import Job, prepare
from tests.helpers import runs as finetune_runs


def prepared(base: Path, data: Path, **settings: Any) -> Job:
    values = {"precision": "32-true", "train": TrainArgs(micro_batch_size=2, global_batch_size=6), "eval": EvalArgs(), **settings}
    run = Lora(checkpoint_dir=base, data=JSON(json_path=data, val_split_fraction=0.1), **values)
    return prepare(run, adapters(run))


def test_a_job_has_what_was_read_and_nothing_is_written(base: Path, data: Path, tmp_path: Path) -> None:
    before = finetune_runs.files(base)
    job = prepared(base, data, out_dir=tmp_path / "out")
    assert (len(job.splits.train), len(job.splits.val)) == (18, 2)
    assert (job.precision, job.cache_dtype, job.chosen) == ("32-true", torch.float32, None)
    assert job.examples[0].question == job.splits.examples[0].question and job.cache_folder == tmp_path / "activation_cache"
    assert finetune_runs.files(base) == before and not list(tmp_path.iterdir())


def test_samples_are_cut_to_the_setting_or_to_what_the_model_reads(base: Path, data: Path) -> None:
    for setting, expected in ((None, 256), (20, 20), (1000, 256)):
        job = prepared(base, data, train=TrainArgs(micro_batch_size=2, global_batch_size=6, max_seq_length=setting))
        assert job.model.max_seq_length == expected
        assert max(len(sample.input_ids) for sample in job.splits.train) <= expected


def test_the_cache_has_the_dtype_that_is_asked_for(base: Path, data: Path, tmp_path: Path) -> None:
    job = prepared(base, data, skip2lora_cache_dtype="bf16", skip2lora_cache_dir=tmp_path)
    settings = job.cache_settings("disk")
    assert job.cache_dtype == settings.dtype == torch.bfloat16 and job.cache_folder == tmp_path
    with pytest.raises(UserError, match="skip2lora_cache_dtype is 'int4': choose one of bfloat16, "):
        prepared(base, data, skip2lora_cache_dtype="int4")


def test_wrong_optimizers_and_rates_show_at_once(base: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="optimizer"):
        prepared(base, data, optimizer="Nothing")
    prepared(base, data, optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.0}})
    assert "warning: nothing is trained, as the optimizer's learning rate (lr) is 0" in capsys.readouterr().err


@pytest.mark.parametrize(("replay", "added"), [(0, 9), (4, 4 + 9)])
def test_a_share_of_the_questions_is_trained_as_second_ones(replay: int, added: int, base: Path, data: Path) -> None:
    plain = prepared(base, data)
    job = prepared(base, data, train=TrainArgs(micro_batch_size=2, global_batch_size=6, replay=replay, follow_ups=0.5))
    assert job.splits.train[:18] == plain.splits.train and len(job.splits.train) == 18 + added
    assert job.splits.val == plain.splits.val and not job.splits.records
    assert plain.splits.train != prepared(base, data, seed=3, train=TrainArgs(follow_ups=0.5)).splits.train != job.splits.train


def test_questions_that_cannot_follow_others(base: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("A long story. " * 200)
    for train, what in ((TrainArgs(word_dropout=0.5), "leaves out words"), (TrainArgs(follow_ups=0.5), "puts questions after others")):
        run = Lora(checkpoint_dir=base, data=TextFiles(train_data_path=tmp_path / "book.txt"), precision="32-true", train=train)
        with pytest.raises(UserError, match=rf"train.\w+ {what}.*, and TextFiles is running text: leave it out"):
            prepare(run, adapters(run))
    run = Lora(checkpoint_dir=base, data=JSON(json_path=data, prompt_style="alpaca"), precision="32-true", train=train)
    with pytest.raises(UserError, match=r"train.follow_ups, record 1: the prompt style 'alpaca' has no form for conversations .*: choose"):
        prepare(run, adapters(run))
