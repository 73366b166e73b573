"""How a command fails: what the user can mend, and a signal that ended it. The command line turns each into one line and an exit code."""


class UserError(ValueError):
    """A mistake in a file, a setting or a checkpoint.

    The message names the culprit and the remedy; the command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 1


class NonFiniteError(UserError):
    """The loss or the gradient of a training step is not a number; the step was not taken."""

    exit_code = 3

    def __init__(self, message: str, samples: list[int] | None = None) -> None:
        super().__init__(message)
        self.samples = samples or []
        """numbers of the training samples that make it, or of those of the step"""


class OutOfMemory(UserError):
    """The machine's memory, or a device's, does not suffice."""

    exit_code = 4


class Stopped(SystemExit):
    """SIGINT or SIGTERM ended a command. `message` says what was saved."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(128 + signum)
        self.signum, self.message = signum, message
