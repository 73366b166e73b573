"""Which cases of a test run by default."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(case: Any) -> Any:
    """Return the case for `parametrize` as one of the slow tests."""
    if hasattr(case, "marks"):
        return pytest.param(*case.values, marks=[*case.marks, pytest.mark.slow], id=case.id)
    return pytest.param(*(case if type(case) is tuple else (case,)), marks=pytest.mark.slow)


def quick(cases: Iterable[Any], *names: Any) -> list[Any]:
    """Return the cases for `parametrize`: those in `names` run by default, the others among the slow tests."""
    cases = list(cases)
    assert set(map(str, names)) <= set(map(str, cases)), f"not all of {names} are cases"
    return [case if case in names else slow(case) for case in cases]


def first(cases: Iterable[Any], count: int = 1) -> list[Any]:
    """Return the cases for `parametrize`: the first `count` run by default, the others among the slow tests."""
    return [case if i < count else slow(case) for i, case in enumerate(cases)]
