"""Text for terminals and reports: tables, sizes, durations, and escaped control characters."""

import math
import re
from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"  # of a sparkline
# Control characters (C0 except newline and tab, C1), line separators, bidirectional overrides, and lone surrogates.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return `text` with control characters escaped, so that a terminal does not obey sequences from foreign files."""
    return STEERING.sub(lambda found: repr(found[0])[1:-1], text)


def as_utf8(text: str) -> str:
    """Return text that the system passed as UTF-8, whatever its locale is. Bytes that are not UTF-8 become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") if re.search(r"[\udc80-\udcff]", text) else text


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line(text: str, most: int) -> str:
    """Return text as one line of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 4]} ..."


def text_table(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Return a plain-text table, indented by two spaces. Columns in `left` (negative counts from the end) are left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned_left = {column % len(widths) for column in left}
    lines = []
    for row in rows:
        cells = (cell.ljust(widths[i]) if i in aligned_left else cell.rjust(widths[i]) for i, cell in enumerate(row))
        lines.append("  ".join(("", *cells)).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column left-aligned and the others right-aligned."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines.insert(1, ["---", *["---:"] * (len(header) - 1)])
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def counted(count: float, noun: str) -> str:
    """Return a number of things: "1 record", "2,000 records", "1.5 epochs"."""
    return f"{count:{',' if isinstance(count, int) else 'g'}} {noun}{'s' * (count != 1)}"


def size(count: float) -> str:
    """Return a number of bytes in the unit that fits: 512 B, 3 KiB, 20 MiB, 1.25 GiB."""
    power = min(int(math.log(count, 1024)), 3) if count >= 1 else 0
    return f"{count / 1024**power:.{2 if power == 3 else 0}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def gib(count: float) -> str:
    """Return a number of bytes in GiB, for figures that are compared with each other."""
    return f"{count / 2**30:.2f} GiB"


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """Return the finite values as a sparkline of at most `width` bars, each the mean of consecutive values."""
    finite = [value for value in values if math.isfinite(value)]
    count = min(width, len(finite))
    means = [sum(part) / len(part) for k in range(count) if (part := finite[k * len(finite) // count : (k + 1) * len(finite) // count])]
    low, high = min(means, default=0.0), max(means, default=0.0)
    return "".join(BARS[round((len(BARS) - 1) * (mean - low) / (high - low or 1.0))] for mean in means)


def duration(seconds: float) -> str:
    """Return a duration in seconds up to two minutes, then in minutes, then in hours and minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
