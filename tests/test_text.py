import math

import pytest

from litgpt.text import counted, duration, gib, markdown_table, one_line, printable, size, sparkline, text_table


def test_printable_escapes_what_a_terminal_obeys() -> None:
    assert printable("a\x1b[31mb\x07\r\u202e") == "a\\x1b[31mb\\x07\\r\\u202e"
    assert printable("née\n\tΩ 你好") == "née\n\tΩ 你好"


def test_one_line_of_a_long_text() -> None:
    assert one_line("What is it?\n\n  def f():\n    pass", 40) == "What is it? def f(): pass"
    assert one_line("12345678", 8) == "12345678" and one_line("你" * 9, 8) == "你你你你 ..."


def test_a_table_aligns_its_columns() -> None:
    rows = [("name", "loss", "note"), ("a", "1.25", ""), ("longer", "12.50", "best")]
    assert text_table(rows, left=(0, -1)) == "  name     loss  note\n  a        1.25\n  longer  12.50  best"
    assert text_table([("a", "1"), ("b", "22")]) == "  a   1\n  b  22"


def test_a_table_needs_rows_of_one_length() -> None:
    with pytest.raises(ValueError):
        text_table([("a", "b"), ("c",)])


def test_a_markdown_table_escapes_bars() -> None:
    assert markdown_table(["x", "y"], [["a|b", "1"]]) == "| x | y |\n| --- | ---: |\n| a\\|b | 1 |"


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (0.5, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (20 * 2**20, "20 MiB"),
        (1.25 * 2**30, "1.25 GiB"),
        (2**41, "2048.00 GiB"),
    ],
)
def test_a_size_has_the_unit_that_fits(count: float, shown: str) -> None:
    assert size(count) == shown


def test_gib_is_always_gib() -> None:
    assert gib(2**29) == "0.50 GiB"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (121, "3 min"), (7199, "2 h 0 min"), (7260, "2 h 1 min")]
)
def test_a_duration_in_its_unit(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_a_sparkline_shows_the_course() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([1, 1, 3, 3, math.nan], width=2) == "▁█"
    assert sparkline([]) == "" and sparkline([2.0]) == "▁" and len(sparkline(range(1000))) == 16


@pytest.mark.parametrize(
    ("count", "shown"), [(1, "1 epoch"), (1.0, "1 epoch"), (0.5, "0.5 epochs"), (2.25, "2.25 epochs"), (2000, "2,000 epochs")]
)
def test_a_number_of_things(count: float, shown: str) -> None:
    assert counted(count, "epoch") == shown
