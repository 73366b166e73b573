"""Tables, pictures and documents: text for terminals, Markdown, and one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litgpt.text import markdown_table

CSS = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { border: 1px solid #ccc; padding: .3em .7em; text-align: right }
td:first-child, th:first-child { text-align: left } th { background: #f3f3f3 } img { max-width: 100% }"""


@dataclass
class Table:
    header: list[str]
    rows: list[list[str]]


@dataclass
class Picture:
    title: str
    file: Path  # a PNG in the report's folder


Part = str | list[str] | Table | Picture
Sections = dict[str, list[Part]]


def less(base: float, value: float) -> float:
    """Return by how many percent `value` is smaller than `base`; negative if it is larger."""
    return 100 * (1 - value / base)


def percent(reduction: float) -> str:
    """Return the change that a reduction in percent is: 75.0 -> "-75.0 %"."""
    return f"{-reduction + 0.0:+.1f} %"


def as_markdown(title: str, sections: Sections) -> str:
    """Return the sections as a Markdown document. Pictures are links to files beside it."""
    lines = [f"# {title}"]
    for heading, parts in sections.items():
        lines.append(f"## {heading}")
        for part in parts:
            if isinstance(part, Table):
                lines.append(markdown_table(part.header, part.rows))
            elif isinstance(part, Picture):
                lines.append(f"![{part.title}]({part.file.name})")
            else:
                lines.append(part if isinstance(part, str) else "\n".join(f"- {item}" for item in part))
    return "\n\n".join(lines) + "\n"


def as_html(title: str, sections: Sections) -> str:
    """Return the sections as one HTML page with the pictures inside."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, parts in sections.items():
        body.append(f"<h2>{html.escape(heading)}</h2>")
        for part in parts:
            if isinstance(part, Table):
                head = "".join(f"<th>{html.escape(cell)}</th>" for cell in part.header)
                rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in part.rows]
                body.append(f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
            elif isinstance(part, Picture):
                data = base64.b64encode(part.file.read_bytes()).decode()
                body.append(f'<img alt="{html.escape(part.title)}" src="data:image/png;base64,{data}">')
            elif isinstance(part, str):
                body.append(f"<p>{html.escape(part)}</p>")
            else:
                body.append(f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in part)}</ul>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{CSS}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'


def figure(width: float, height: float) -> Any:
    """Return an empty matplotlib figure of this size in inches, or None, with a line on standard error, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed, so there are no pictures: pip install matplotlib", file=sys.stderr)
        return None
    return Figure(figsize=(width, height), layout="constrained")


def bars(axes: Any, title: str, values: dict[str, float], unit: str) -> None:
    """Draw horizontal bars, the first on top, each labelled with its value."""
    drawn = axes.barh(list(values), list(values.values()), color=[f"C{i}" for i in range(len(values))])
    axes.bar_label(drawn, fmt=lambda value: f"{value:,.0f}" if value >= 1000 else f"{value:.3g}", padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25 * max(values.values()) or 1)
    axes.set_title(title)
    axes.set_xlabel(unit)
