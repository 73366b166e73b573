"""The settings of `litgpt sweep`: what it refuses, and the settings that a trial gets. tests/train/test_sweep.py runs sweeps."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from litgpt.data import JSON
from litgpt.errors import UserError
from litgpt.finetune.lora import Lora
from litgpt.finetune.sweep import Sweep


def settings(**values: Any) -> Sweep:
    return Sweep(checkpoint_dir=Path("base"), data=JSON(), **values)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"skip2lora_cache": "off"}, "skip2lora_cache is off"),
        (
            {"skip2lora_enabled": True, "skip2lora_warmup_steps": 3},
            "skip2lora_warmup_steps: a warm-up changes",
        ),
        ({"resume": "out/step-000010"}, "resumed by --resume auto"),
        ({"lora_r": -1}, "lora_r is -1"),
    ],
)
def test_refused(values: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part):
        settings(**values)


def test_it_is_resumed_if_there_is_one() -> None:
    assert [settings(resume=value).resume for value in (False, True, "auto")] == [False, "auto", "auto"]


def test_it_has_every_setting_of_lora() -> None:
    names = [item.name for item in fields(Sweep)]
    assert {item.name for item in fields(Lora)} == set(names) - {"grid", "samples"}
    sweep, lora = settings(), Lora(checkpoint_dir=Path("base"), data=JSON())
    differing = {name for name in names if getattr(sweep, name) != getattr(lora, name, None)}
    assert differing == {"out_dir", "eval"} and sweep.eval.max_new_tokens is None
