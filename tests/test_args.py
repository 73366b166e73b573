"""Settings: ranges, and marks on fields."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from litgpt.args import EvalArgs, TrainArgs, defaults, marked, older_names, require_allowed_class, setting
from litgpt.data import JSON
from litgpt.errors import UserError
from litgpt.train.settings import Run


@dataclass(kw_only=True)
class Example(Run):
    rate: float = setting(0.5, varies=True, older_names=("lr", "learning_rate"))
    folder: Path = setting(Path("x"), may_change=True)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (dict(epochs=0), "train.epochs"),
        (dict(max_steps=-1), "train.max_steps"),
        (dict(save_interval=0), "train.save_interval"),
        (dict(micro_batch_size=0), "train.micro_batch_size"),
        (dict(global_batch_size=2, micro_batch_size=4), "train.micro_batch_size"),
        (dict(global_batch_size=6, micro_batch_size=4), "multiple of train.micro_batch_size"),
        (dict(max_norm=0.0), "train.max_norm"),
        (dict(max_norm=float("nan")), "train.max_norm"),
        (dict(min_lr=-1.0), "train.min_lr"),
        (dict(max_time=0.0), "train.max_time"),
        (dict(epochs=None), "would never end"),
        (dict(lr_warmup_fraction=1.5), "from 0 to 1"),
        (dict(lr_warmup_steps=7, lr_warmup_fraction=0.1), "both given"),
        (dict(epochs=None, max_time=60.0, lr_warmup_fraction=0.1), "train.lr_warmup_fraction is 0.1, a share of all steps"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=re.escape(part)):
        TrainArgs(**settings)


def test_eval_settings_that_make_no_sense() -> None:
    for settings in (
        dict(interval=0),
        dict(max_iters=0),
        dict(max_new_tokens=-1),
        dict(evaluate_example="last"),
        dict(evaluate_example=-1),
    ):
        with pytest.raises(UserError, match=f"eval.{next(iter(settings))}"):
            EvalArgs(**settings)


def test_marks() -> None:
    varying, changing = set(marked(Example, "varies")), set(marked(Example, "may_change"))
    assert {"rate", "seed", "optimizer", "train.epochs", "eval.patience"} <= varying and "folder" not in varying
    assert {"folder", "out_dir", "data", "train.max_time", "eval.max_new_tokens"} <= changing and "rate" not in changing
    names = {item.name for item in dataclasses.fields(Example)} | {f"train.{item.name}" for item in dataclasses.fields(TrainArgs)}
    assert {name for name in varying | changing if not name.startswith("eval.")} <= names


def test_older_names() -> None:
    assert older_names(Example) == {"lr": "rate", "learning_rate": "rate"} and older_names(Run) == {}


def test_defaults_are_fresh_copies() -> None:
    first, second = defaults(Example), defaults(Example)
    assert first == second and first["rate"] == 0.5 and "checkpoint_dir" not in first
    assert first["train"] == TrainArgs(micro_batch_size=1) and first["train"] is not second["train"]
    first["train"].epochs = 9
    assert Example(checkpoint_dir=Path("c"), data=JSON()).train.epochs == 5


def test_allowed_classes() -> None:
    for name in ("litgpt.data.JSON", "torch.optim.AdamW", "bitsandbytes.optim.PagedAdamW8bit"):
        require_allowed_class(name, "x")
    for name in ("torch.hub.load", "litgpt", "litgpt.", "torch.optim.", "torch.optim.x y", None, ["torch.optim.AdamW"]):
        with pytest.raises(UserError, match="not allowed"):
            require_allowed_class(name, "x")


def test_iterations_of_litgpts_loops() -> None:
    train = TrainArgs(global_batch_size=32, micro_batch_size=4, lr_warmup_steps=10)
    assert (train.batch_size(2), train.gradient_accumulation_iters(2), train.gradient_accumulation_iters(2, 4)) == (16, 4, 1)
    assert (train.warmup_iters(2, 1, 1000, []), train.warmup_iters(2, 1, 30, [])) == (40, 30)
    train = TrainArgs(lr_warmup_fraction=0.3)
    assert (train.warmup_iters(1, 1, 1000, range(5)), train.warmup_iters(1, 1, 1, range(5))) == (2, 1)
