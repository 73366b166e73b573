"""Values out of range are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from litgpt.errors import UserError
from litgpt.objectives.settings import ObjectiveSettings


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dpo_beta", 0),
        ("dpo_beta", float("inf")),
        ("kto_beta", -1),
        ("orpo_lambda", float("nan")),
        ("dpo_label_smoothing", 0.5),
        ("kto_desirable_weight", -0.1),
        ("kto_undesirable_weight", "high"),
    ],
)
def test_values_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"{key} is .*: a number .* is needed"):
        ObjectiveSettings(**{key: value})
