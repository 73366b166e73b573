"""Every name that the settings accept is an objective."""

from __future__ import annotations

from types import SimpleNamespace
from typing import get_args

from litgpt.objectives.base import Objective
from litgpt.objectives.named import OBJECTIVES, objective_of
from litgpt.objectives.settings import Name


def test_every_name_is_an_objective() -> None:
    assert set(get_args(Name)) == set(OBJECTIVES)
    assert type(objective_of(SimpleNamespace())) is Objective
