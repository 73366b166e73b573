"""Standard streams that work with any encoding, closed or full, for text from any source.

`guard` replaces `sys.stdout` and `sys.stderr`. After that no `print` fails, controls the terminal or shows a secret.
"""

import io
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, redirect_stderr, suppress
from typing import Any, TextIO, cast
from urllib.parse import unquote

from litgpt.text import printable

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # environment variables
SHORTEST_SECRET = 6  # characters; shorter ones would hide parts of words
HUB_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf_(?:jwt_|oauth_)?|api_org_)[A-Za-z0-9]{20,}(?:\.[\w.-]+)?")
USER_PART = re.compile(r"(://|https?:/)[^/\s]*@")  # of a URL, which may have become a path: name and password
QUERY = re.compile(r"([?&][\w.-]*(?:token|key|sig|secret|passw|auth|credential)[\w.-]*=)[^&\s'\"]+", re.IGNORECASE)  # of a URL
HIDDEN = "***"

_secrets: set[str] = set()


def keep_secret(*secrets: str) -> None:
    """Let `without_secrets` hide these texts from now on."""
    _secrets.update(secrets)


def without_secrets(text: str) -> str:
    """Return the text with *** instead of access tokens, and of names, passwords and signatures in URLs."""
    user = os.environ.get("HF_ENDPOINT", "").partition("://")[2].rpartition("@")[0]
    password = user.partition(":")[2]
    known = {*_secrets, user, password, unquote(password), *(os.environ.get(name, "").strip() for name in TOKENS)}
    for secret in sorted(known, key=len, reverse=True):
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, HIDDEN)
    for pattern, shown in ((HUB_TOKEN, HIDDEN), (USER_PART, rf"\1{HIDDEN}@"), (QUERY, rf"\1{HIDDEN}")):
        text = pattern.sub(shown, text)
    return text


def safe(text: str) -> str:
    """Return the text as any reader of a terminal may see it: without secrets, its control characters escaped."""
    return printable(without_secrets(text))


class Stream:
    """A text stream whose writes are cleaned and never fail. `error` is the first failure: a full disk, a closed pipe."""

    def __init__(self, stream: TextIO, clean: Callable[[str], str] = safe) -> None:
        self.stream, self.clean = stream, clean
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        self._try(self.stream.write, self.clean(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            self.error = self.error or error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard() -> None:
    """Make the standard streams of this process safe. A second call changes nothing."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: a file that the command opens must not become descriptor 0, 1 or 2
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            with suppress(io.UnsupportedOperation):  # somebody has read from it already
                stream.reconfigure(errors="surrogateescape" if mode == "r" else "backslashreplace")
        if mode == "w" and not isinstance(stream, Stream):
            setattr(sys, name, Stream(stream))


def unescaped(stream: TextIO) -> TextIO:
    """Return the stream for a library that draws with escape sequences. It still never fails."""
    return cast(TextIO, Stream(stream.stream, str)) if isinstance(stream, Stream) else stream


def drawing() -> AbstractContextManager[TextIO]:
    """Return a context in which a library's progress bars reach standard error as they are."""
    return redirect_stderr(unescaped(sys.stderr))


def show(piece: str) -> None:
    """Write a piece of a model's answer to standard output at once: escaped on a terminal, as it is elsewhere.

    Control characters are escaped one by one, so a sequence split between two pieces has no effect, either. Raises OSError if the piece
    cannot be written.
    """
    stream = sys.stdout.stream if isinstance(sys.stdout, Stream) else sys.stdout
    try:
        stream.write(printable(piece) if stream.isatty() else piece)
        stream.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def lost_output() -> OSError | None:
    """Flush the standard streams. Return the error if a part of standard output was lost."""
    sys.stderr.flush()
    sys.stdout.flush()
    return sys.stdout.error if isinstance(sys.stdout, Stream) else None
