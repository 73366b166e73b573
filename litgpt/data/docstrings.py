"""The signature of a function, and the first paragraph of a docstring as one line of plain text."""

import inspect
import re
from typing import Any

SIGNATURE_CHARS = 72
_CALL = re.compile(r"[\w.]+\((?P<parameters>.*?)\)(\s*-+>\s*.*)?\s*[:.]?")
_CALL_WITH_TEXT = re.compile(r"[\w.]+\(.*\)(\s*-+>\s*[^-]*)?\s+--\s+(?P<text>\S.*)")
_HEADER = re.compile(
    r"(args|arguments|parameters|returns?|raises|yields|examples?|notes?|usage|attributes|warnings?|see also|keyword args)\s*:*",
    re.IGNORECASE,
)
_NO_ANSWER = re.compile(
    r"[.:>@|*+=~\-]|\w+ = |see |same as|just like|alias |equivalent to |((out-of-|in-?)place|quantized) version|deprecated|obsolete|"
    r"internal|todo|fixme|initialize self|partial\(|overloaded|this (method|function|class) is deprecated|windows:|unix:|"
    r"abstract base class\b.{0,4}$|this docstring|scalar method|helper for pickle|copy of|do not use|override|inherited|undocumented",
    re.IGNORECASE,
)
_UNREADABLE = re.compile(r"\\|\$|<[^>]* at 0x|https?://|-{3,}|={3,}|=>|::")
# the end of a sentence that continues in a list or a formula
_LEADS_ON = re.compile(r"([:,;(]|\b(as|by|where|is|are|of|the|and|with|follows|equation|formula))$")
_MARKUP = (
    (re.compile(r":[\w:+-]+:`~(?:[\w.]*\.)?(\w+)(\(\))?`"), r"`\1\2`"),
    (re.compile(r":[\w:+-]+:`([^`<]*?)\s*<[^`>]*>`"), r"`\1`"),
    (re.compile(r":[\w:+-]+:`!?([^`]*)`"), r"`\1`"),
    (re.compile(r"``([^`]*)``"), r"`\1`"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?"), r"\1"),
    (re.compile(r"`([^`]+)`__?(?!\w)"), r"`\1`"),
    (re.compile(r"\s*\[[\w#]+\]_"), ""),
    (re.compile(r"\*\*([^*`\s][^*`]*)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*`(])\*(\w+)\*(?![\w*])"), r"`\1`"),
    (re.compile(r"` s\b"), "`s"),
    (re.compile(r"\s+"), " "),
)


def first_paragraph(doc: str, min_chars: int, max_chars: int) -> str:
    """Return the first paragraph of a docstring as one line of plain text; "" if it does not say what the object does.

    Call signatures at the start are skipped and reStructuredText markup becomes backticks. A paragraph that is too long, or that leads
    over to a list, is cut to whole sentences.
    """
    for block in re.split(r"\n\s*\n", doc.strip()):
        if block.startswith(".. "):
            continue
        lines: list[str] = []
        only_calls = True
        for line in map(str.strip, block.splitlines()):
            is_call = _CALL.fullmatch(line) or line == "--"
            only_calls = only_calls and bool(is_call)
            described = None if lines else _CALL_WITH_TEXT.fullmatch(line)
            if described:
                lines.append(described["text"])
            elif _HEADER.fullmatch(line) or line.startswith((">>> ", ":param ", ".. ", "@param")):
                break
            elif line != "--" and (lines or not is_call):
                lines.append(line)
        if lines:
            return _sentences(" ".join(lines), min_chars, max_chars)
        if not only_calls:
            return ""
    return ""


def _sentences(text: str, min_chars: int, max_chars: int) -> str:
    text = text.strip()
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    if _NO_ANSWER.match(text) or _UNREADABLE.search(text):
        return ""
    sentences = re.split(r"(?<=[a-z0-9)`\"'][.!?])\s+(?=[A-Z`\"(])", text)
    while sentences and (_LEADS_ON.search(sentences[-1]) or len(" ".join(sentences)) > max_chars):
        sentences.pop()
    answer = " ".join(sentences).strip()
    if answer and answer[-1] not in ".!?":
        answer += "."
    if re.match(r"[a-z]+ ", answer):
        answer = answer[0].upper() + answer[1:]
    return answer if min_chars <= len(answer) <= max_chars else ""


# --- Signatures ---


class _Shown(str):
    """A default value in a signature."""

    __repr__ = str.__str__


def signature(function: Any, doc: str, takes_self: bool) -> str:
    """Return `(x, /, *, key=None)` without annotations and `self`; "" if neither Python nor the docstring has it."""
    empty = inspect.Parameter.empty
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError, NameError, AttributeError):
        stated = _CALL.fullmatch(doc.partition("\n")[0])
        if not stated:
            return ""
        text = re.sub(r"\s*:[^=,(\[]*([\[(][^\])]*[\])])?\s*(?=[,=]|$)", "", stated["parameters"])  # such as "x: Tuple[int, int] = None"
        return _cut(f"({re.sub(r' ?= ?', '=', text).removeprefix('self').removeprefix(', ')})")
    shown = [
        parameter.replace(annotation=empty, default=empty if parameter.default is empty else _Shown(_default_text(parameter.default)))
        for parameter in parameters[takes_self:]
        if not parameter.name.startswith("_")
    ]
    # Without private parameters a default may precede a parameter that has none, which Signature would refuse.
    return _cut(str(inspect.Signature(shown, __validate_parameters__=False)))


def _cut(text: str) -> str:
    """Return a signature of `SIGNATURE_CHARS` at most: a longer one ends in "...)"."""
    if len(text) <= SIGNATURE_CHARS:
        return text
    start = text[: SIGNATURE_CHARS - len("...)")].rpartition(", ")[0].removesuffix(", *")
    return f"{start}, ...)" if start else "(...)"


def _default_text(value: Any) -> str:
    """Return the value as written, if that is short and the same on every run."""
    plain = isinstance(value, (bool, int, float, str, bytes, type(None), tuple))
    return text if plain and len(text := repr(value)) <= 20 and "<" not in text else "..."
