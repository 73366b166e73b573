"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in a file, a setting or a checkpoint.

    The message names the culprit and the remedy; the command line prints it without a traceback and exits with 1.
    """
