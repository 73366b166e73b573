"""Errors that end a command: mistakes that the user can correct, and signals. The command line prints one line and sets an exit code."""


class UserError(ValueError):
    """A mistake in a file, a setting or a checkpoint.

    The message names the cause and the remedy; the command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 1


class NonFiniteError(UserError):
    """The loss or the gradient of a training step is not finite. The step was not taken."""

    exit_code = 3

    def __init__(self, message: str, samples: list[int] | None = None) -> None:
        super().__init__(message)
        self.samples = samples or []  # indices of the samples that cause it, or of all samples of the step


class OutOfMemory(UserError):
    """The machine or a device is out of memory."""

    exit_code = 4


class Stopped(SystemExit):
    """SIGINT or SIGTERM ended a command. `message` says what was saved."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(128 + signum)
        self.signum, self.message = signum, message


def missing_package(what: str, package: str | None, extra: str) -> UserError:
    """Return the error of a feature whose package is not installed; `extra` is what installs it with litgpt."""
    return UserError(f'{what} needs a package that is not installed ({package}): pip install "litgpt[{extra}]"')
