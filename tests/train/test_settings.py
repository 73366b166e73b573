"""The settings of a run: paths as texts, and what is saved of them."""

from pathlib import Path
from typing import Any

import pytest

from litgpt.args import EvalArgs, LogArgs, TrainArgs, as_config
from litgpt.data import JSON, LIMA, Alpaca
from litgpt.finetune.lora import Lora
from litgpt.train.settings import Run


def test_run_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(Run(checkpoint_dir=Path("base")).data, Alpaca)
    assert "No data given: Alpaca" in capsys.readouterr().err


def test_paths_may_be_texts() -> None:
    """As a script would write them."""
    texts: dict[str, Any] = {"checkpoint_dir": "base", "out_dir": "out/x", "resume": "out/x/step-000010"}
    run = Run(**texts, data=JSON())
    assert (run.checkpoint_dir, run.out_dir, run.resume) == (Path("base"), Path("out/x"), Path("out/x/step-000010"))
    cache_dir: Any = "~/cache"
    assert Lora(checkpoint_dir=Path("base"), data=JSON(), skip2lora_cache_dir=cache_dir).skip2lora_cache_dir == Path.home() / "cache"
    assert [Run(checkpoint_dir=Path("base"), data=JSON(), resume=value).resume for value in (False, True, "auto")] == [False, True, "auto"]


def test_what_is_saved() -> None:
    run = Lora(checkpoint_dir=Path("base"), data=JSON(json_path=Path("a.json")), access_token="sesame", resume=True, overwrite=True)
    saved = run.hyperparameters()
    assert "access_token" not in saved and saved == {**as_config(vars(run)), "resume": False, "overwrite": False}
    assert saved["checkpoint_dir"] == "base" and saved["lora_r"] == 8
    assert saved["data"]["class_path"] == "litgpt.data.json_data.JSON" and saved["data"]["init_args"]["json_path"] == "a.json"
    assert saved["train"]["micro_batch_size"] == 1 and saved["log"] == vars(LogArgs())


def test_facts_are_asked_for_with_the_most_probable_tokens() -> None:
    """And one at a time, unless some were trained as second questions."""
    for train, evaluation, words, note in (
        (TrainArgs(), EvalArgs(), "", "talk to it"),
        (TrainArgs(follow_ups=0.5), EvalArgs(), " --temperature 0", "ask it"),
        (TrainArgs(), EvalArgs(target_loss=0.1), " --temperature 0", "ask it; /reset before each new question"),
    ):
        run = Run(checkpoint_dir=Path("base"), data=JSON(), train=train, eval=evaluation)
        assert run.chat_with(Path("a b")) == (f"litgpt chat 'a b'{words}", note)


def test_the_token_reaches_gated_data() -> None:
    run = Lora(checkpoint_dir=Path("base"), data=LIMA(), access_token="sesame")
    assert isinstance(run.data, LIMA) and run.data.access_token == "sesame" and "sesame" not in str(run.hyperparameters())
    own = Lora(checkpoint_dir=Path("base"), data=LIMA(access_token="mine"), access_token="sesame")
    assert isinstance(own.data, LIMA) and own.data.access_token == "mine"
