"""The adapters' settings: one home for the commands and for the model's Config, and light."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from litgpt import lora
from litgpt.adapters.settings import AdapterSettings, WarmupSettings
from litgpt.data import JSON
from litgpt.errors import UserError
from litgpt.finetune.lora import Lora

ADAPTERS = {"lora_r": 4, "lora_query": True, "skip2lora_enabled": True}


def test_no_torch_is_imported() -> None:
    code = "import sys, litgpt.adapters.settings; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_defaults_attach_nothing() -> None:
    settings = AdapterSettings()
    assert not settings.has_lora_in_blocks and not settings.skip2lora_enabled and settings.lora_r == 0
    assert {f.name for f in fields(AdapterSettings)} <= lora.Config.adapter_fields()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lora_r": -1}, "lora_r is -1"),
        ({"lora_r": True}, "lora_r is True"),
        ({"skip2lora_r": 2**17}, "skip2lora_r is 131072"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_dropout": 1}, "lora_dropout is 1"),
        ({"skip2lora_dropout": -0.1}, "skip2lora_dropout is -0.1"),
        ({"skip2lora_norm": "max"}, "skip2lora_norm is 'max'"),
        ({"skip2lora_enabled": True}, "skip2lora_enabled needs a rank"),
    ],
)
def test_settings_that_no_model_can_have(settings: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        AdapterSettings(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("warmup", "adapters", "named"),
    [
        ({"skip2lora_warmup_steps": -5}, ADAPTERS, "skip2lora_warmup_steps is -5"),
        ({"skip2lora_warmup_epochs": float("inf")}, ADAPTERS, "skip2lora_warmup_epochs is inf"),
        ({"skip2lora_warmup_steps": 5, "skip2lora_warmup_epochs": 0.5}, ADAPTERS, "give one of them"),
        ({"skip2lora_warmup_steps": 5, "skip2lora_warmup_lr": 0.0}, ADAPTERS, "skip2lora_warmup_lr is 0.0"),
        ({"skip2lora_warmup_steps": 5}, {"lora_r": 4, "lora_query": True}, "skip2lora_warmup_steps needs skip2lora_enabled"),
        ({"skip2lora_warmup_epochs": 1}, {**ADAPTERS, "lora_query": False}, "skip2lora_warmup_epochs needs"),
    ],
)
def test_warm_ups_that_cannot_be(warmup: dict[str, object], adapters: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Lora(checkpoint_dir=Path("base"), data=JSON(), **{"lora_query": False, "lora_value": False, **adapters, **warmup})  # type: ignore[arg-type]


def test_the_length_of_a_warm_up() -> None:
    assert WarmupSettings(skip2lora_warmup_epochs=0.6).warmup_steps(3) == 2
    assert WarmupSettings(skip2lora_warmup_steps=7).warmup_steps(3) == 7
    assert WarmupSettings().warmup_steps(3) == 0 and not WarmupSettings().has_warmup
