"""Exit codes of errors."""

import signal

import pytest

from litgpt.errors import NonFiniteError, OutOfMemory, Stopped, UserError


def test_exit_codes() -> None:
    assert [error.exit_code for error in (UserError, NonFiniteError, OutOfMemory)] == [1, 3, 4]
    assert Stopped(signal.SIGINT).code == 130 and Stopped(signal.SIGTERM).code == 143


def test_a_non_finite_error_carries_its_samples() -> None:
    error = NonFiniteError("the loss is nan", [3, 5])
    assert str(error) == "the loss is nan" and error.samples == [3, 5] and NonFiniteError("x").samples == []
    with pytest.raises(ValueError):
        raise error


def test_a_signal_says_what_was_saved() -> None:
    assert Stopped(signal.SIGINT, "saved step 3").message == "saved step 3"
