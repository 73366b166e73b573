"""The page about a finished run."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from litgpt.train.page import chart, curve_of, flat, page

CURVES = {"training": [(1, 4.0), (2, 3.0), (4, 1.0)], "validation": [(0, 5.0), (4, 2.0)]}


def test_the_page_is_one_file_and_escapes_what_is_not_ours() -> None:
    evil = "<script>alert(1)</script>\x1b[2J\x07\x9b31m\u202e"
    text = page(evil, evil, {evil: evil}, CURVES, 4, [(evil, [(0, evil), (4, "ok")])], {"key": evil})
    assert "<script>" not in text and text.count(r"&lt;script&gt;alert(1)&lt;/script&gt;\x1b[2J\x07\x9b31m\u202e") >= 6
    assert not set(text) & set("\x1b\x07\x9b\u202e")
    assert not re.findall(r"""(?:src|href)=|url\(|@import|https?://""", text)
    HTMLParser().feed(text)


def test_answers_before_and_after() -> None:
    text = page(
        "t", "", {}, {"training": [], "validation": []}, None, [("q", [(0, "old"), (2, "mid"), (4, "new")]), ("r", [(1, "one")])], {}
    )
    assert "<dt>before<dd>old" in text and "<dt>after 4 steps<dd class=after>new" in text and "mid" not in text
    assert "<dt>after 1 step<dd class=after>one" in text
    assert text.count("<dt>before") == 1 and "<svg" not in text


def test_the_chart_puts_points_where_their_values_are() -> None:
    """Points of the lines against the positions of the axes' own labels."""
    svg = chart(CURVES, 4)
    lines = [[tuple(map(float, point.split(","))) for point in points.split()] for points in re.findall(r'points="([^"]+)"', svg)]
    assert [len(line) for line in lines] == [3, 2]
    (x1, y1), (x2, y2), (x4, y4) = lines[0]
    (v0, w0), (v4, w4) = lines[1]
    assert abs((x4 - x2) - 2 * (x2 - x1)) < 0.2 and x4 == v4 and v0 < x1  # steps 1, 2 and 4
    assert abs((y4 - y2) - 2 * (y2 - y1)) < 0.2 and w0 < y1 < y2 < w4 < y4  # losses 4, 3, 1 and 5, 2; y grows downwards
    circle: Any = re.search(r"<circle cx=([\d.]+) cy=([\d.]+)", svg)
    assert (float(circle[1]), float(circle[2])) == (v4, w4)
    quoted = re.sub(r"=([\w.-]+)(?=[ />])", r'="\1"', svg)
    assert ElementTree.fromstring(quoted).tag == "svg"


@pytest.mark.parametrize(
    ("losses", "labels"),
    [
        ((5.0, 2.0), ["0", "2", "4", "6"]),
        ((4.0255, 1.5), ["0", "1", "2", "3", "4", "5"]),
        ((2.55, 2.5), ["2.3", "2.4", "2.5", "2.6", "2.7"]),
        ((0.004, 0.001), ["0", "0.001", "0.002", "0.003", "0.004", "0.005"]),
        ((0.0, 0.0), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
    ],
)
def test_the_axes_have_round_numbers_once(losses: tuple[float, float], labels: list[str]) -> None:
    svg = chart({"training": [], "validation": [(0, losses[0]), (2, losses[1])]}, None)
    assert re.findall(r"text-anchor=end dy=4>([^<]+)", svg) == labels
    assert re.findall(r"text-anchor=middle>(\d+)", svg) == ["0", "1", "2"]


def test_long_curves_are_thinned_by_means() -> None:
    assert curve_of([(i, float(i)) for i in range(1, 9)], most=4) == [(2, 1.5), (4, 3.5), (6, 5.5), (8, 7.5)]
    assert curve_of([(1, float("nan")), (2, 1.0)]) == [(2, 1.0)]


def test_settings_by_their_full_keys() -> None:
    assert flat({"a": 1, "train": {"epochs": 2, "x": None}}) == {"a": "1", "train.epochs": "2"}


def test_secrets_are_no_settings() -> None:
    """The card of a model leaves out the same keys."""
    settings = {"access_token": "a", "log": {"metadata": {"api_key": "b", "owner": "c", "secret": {"d": "e"}}}, "lora_key": True}
    assert flat(settings) == {"log.metadata.owner": "c", "lora_key": "True"}
