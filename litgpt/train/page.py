"""`report.html` of a finished run: its answers before and after, its curves, cost and settings, in one file without external parts."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from itertools import count
from typing import Any

from litgpt import args
from litgpt.text import counted, printable

Points = Sequence[tuple[int, float]]
Answers = Sequence[tuple[str, Sequence[tuple[int, str]]]]  # question, and (step, answer)
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 280, 56, 40, 16  # of the figure, in its own units
TICKS = 5
MARK = b'<meta name="generator" content="litgpt">'  # marks a page that a run wrote
COLOURS = {"training": "#9aa5b1", "validation": "#2563eb"}
STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #616e7c; --line: #d9dfe5; --card: #f5f7fa; --accent: #2563eb; --paper: #fff }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #9aa5b1; --line: #3e4c59; --card: #1f2933; --paper: #12181f } }
* { box-sizing: border-box } body { margin: 0 auto; max-width: 46rem; padding: 1.5rem 1rem 4rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.6rem; margin: 0 0 .3rem } h2 { font-size: 1.1rem; margin: 2.2rem 0 .7rem }
p { margin: .3rem 0 } .soft { color: var(--soft) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; margin-top: 1.2rem }
.tile, .answer { background: var(--card); border-radius: .6rem; padding: .8rem 1rem } .tile b { display: block; font-size: 1.35rem }
.answer { margin-bottom: .7rem; overflow-wrap: anywhere } .answer dt { color: var(--soft); font-size: .85rem; margin-top: .45rem }
.answer dd { margin: 0 } .answer .after { border-left: 3px solid var(--accent); padding-left: .6rem }
svg { width: 100%; height: auto } svg text { fill: var(--soft); font-size: 13px } svg .grid { stroke: var(--line) }
table { border-collapse: collapse; width: 100%; table-layout: fixed; font-size: .9rem } td { border-bottom: 1px solid var(--line);
  padding: .3rem .4rem .3rem 0; vertical-align: top; overflow-wrap: anywhere } details summary { cursor: pointer; color: var(--soft) }
"""


def page(title: str, summary: str, tiles: Mapping[str, str], curves: Mapping[str, Points], best: int | None,
         answers: Answers, settings: Mapping[str, str]) -> str:  # fmt: skip
    """Return the page. `curves` maps "training" and "validation" to (step, loss); `best`: the step to mark."""
    parts = [f"<h1>{_safe(title)}</h1>", f"<p class=soft>{_safe(summary)}</p>"]
    parts.append(
        f"<div class=tiles>{''.join(f'<div class=tile>{_safe(name)}<b>{_safe(value)}</b></div>' for name, value in tiles.items())}</div>"
    )
    if answers:
        parts += ["<h2>Answers before and after</h2>", *(_answer(question, given) for question, given in answers)]
    if any(len(points) > 1 for points in curves.values()):
        parts += ["<h2>Loss</h2>", chart(curves, best)]
    rows = "".join(f"<tr><td>{_safe(key)}<td>{_safe(value)}" for key, value in settings.items())
    parts.append(f"<h2>Settings</h2><details><summary>{len(settings)} settings</summary><table>{rows}</table></details>")
    head = f'{MARK.decode()}<meta charset="utf-8"><title>{_safe(title)}</title>'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f"<!doctype html>\n<html lang=en><head>{head}<style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"


def chart(curves: Mapping[str, Points], best: int | None) -> str:
    """Return an SVG of losses over steps, with axes, a legend and the best step marked."""
    steps = [step for points in curves.values() for step, _ in points]
    losses = [loss for points in curves.values() for _, loss in points]
    last, high = max(max(steps), 1), 1.05 * max(losses) if max(losses) > 0 else 1.0
    low = 0.0 if min(losses) < 0.5 * high else min(losses) * 0.95
    sizes = (factor * 10.0**power for power in count(math.floor(math.log10(high - low)) - 1) for factor in (1, 2, 2.5, 5))
    size = next(size for size in sizes if size * TICKS >= high - low)  # a round distance of the lines
    levels = range(math.floor(low / size), math.ceil(high / size) + 1)
    low, high = size * levels[0], size * levels[-1]

    def at(step: float, loss: float) -> str:
        x = LEFT + (WIDTH - LEFT - 12) * step / last
        return f"{x:.1f},{TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low):.1f}"

    parts = []
    for value in (size * level for level in levels):
        y = at(0, value).split(",")[1]
        parts.append(f'<path class=grid d="M{LEFT} {y}H{WIDTH - 12}"/><text x={LEFT - 8} y={y} text-anchor=end dy=4>{value:.4g}</text>')
    for step in sorted({round(last * i / (TICKS - 1)) for i in range(TICKS)}):
        x = at(step, low).split(",")[0]
        parts.append(f"<text x={x} y={HEIGHT - BOTTOM + 18} text-anchor=middle>{step:,}</text>")
    for name, points in curves.items():
        width = 2.5 if name == "validation" else 1
        line = f'<polyline fill=none stroke="{COLOURS[name]}" stroke-width={width} points="{" ".join(at(*point) for point in points)}"/>'
        parts.append(line if len(points) > 1 else "")
    values = dict(curves.get("validation", ()))
    if best is not None and best in values:
        x, y = at(best, values[best]).split(",")
        anchor = "end" if float(x) > WIDTH - 60 else "middle"
        parts.append(f'<circle cx={x} cy={y} r=5 fill="{COLOURS["validation"]}"/><text x={x} y={y} dy=-9 text-anchor={anchor}>best</text>')
    left = WIDTH - 110
    for row, name in enumerate(name for name, points in curves.items() if len(points) > 1):
        top = TOP + 10 + 18 * row
        parts.append(f'<path stroke="{COLOURS[name]}" stroke-width=3 d="M{left} {top}h18"/><text x={left + 24} y={top + 4}>{name}</text>')
    parts.append(f"<text x={(LEFT + WIDTH) / 2:.0f} y={HEIGHT - 4} text-anchor=middle>step</text>")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="loss over steps">{"".join(parts)}</svg>'


def _answer(question: str, given: Sequence[tuple[int, str]]) -> str:
    rows = [f"<b>{_safe(question)}</b><dl>"]
    if len(given) > 1:
        rows.append(f"<dt>before<dd>{_safe(given[0][1])}")
    rows.append(f"<dt>after {counted(given[-1][0], 'step')}<dd class=after>{_safe(given[-1][1])}</dl>")
    return f"<div class=answer>{''.join(rows)}</div>"


def curve_of(points: Points, most: int = 400) -> list[tuple[int, float]]:
    """Return the finite points, averaged over neighbours if there are more than `most`."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    size = math.ceil(len(finite) / most) or 1
    groups = [finite[i : i + size] for i in range(0, len(finite), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def flat(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings as strings by their full keys, without secrets and nulls."""
    return {key: str(value) for key, value in args.flat(settings) if value is not None and not args.SECRET_KEY.search(key)}


def _safe(text: str) -> str:
    """Return foreign text with HTML, control characters and bidirectional overrides escaped."""
    return escape(printable(text))
