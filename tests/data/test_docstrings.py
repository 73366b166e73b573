"""Docstrings and signatures in the forms that packages use."""

import pytest

from litgpt.data.docstrings import first_paragraph, signature


@pytest.mark.parametrize(
    ("doc", "answer"),
    [
        ("radians(x, /)\n--\n\nConvert angle x.", "Convert angle x."),
        ("pow(x, y[, z]) -> number\n\nReturn x to the power y.", "Return x to the power y."),
        ("S.count(sub) -> int\nS.count(sub, start) -> int\n\nReturn how often.", "Return how often."),
        ("T.index(value) -> integer -- return first index of value.", "Return first index of value."),
        ("Does :class:`a.b.C <x.y>` and :meth:`~a.b.run` and :math:`x^2` [1]_.", "Does `a.b.C` and `run` and `x^2`."),
        ("Writes *value* to **all** `files <https://x.y>`_ named.", "Writes `value` to all files named."),
        (".. versionadded:: 3.2\n\nDoes its work well.", "Does its work well."),
        ("Does its work.\n>>> run()\n3", "Does its work."),
        ("Does its work.\n\nArgs:\n    x: y", "Does its work."),
        ("Args:\n    x: the thing to do", ""),
        ("See :func:`torch.abs`", ""),
        ("Alias for field number 0", ""),
        ("Computes \\frac{a}{b} of it.", ""),
        ("Computes the value given by\n\n.. math:: x", ""),
        ("Does one thing. Specifically,\n\n- a", "Does one thing."),
        ("Point(x: int, y: int)", ""),
        ("", ""),
    ],
)
def test_first_paragraph(doc: str, answer: str) -> None:
    assert first_paragraph(doc, 10, 300) == answer


def plain(self: object, a: int, /, b: str = "x", *args: int, key: object = object, _hidden: None = None) -> None:
    pass


def many(first_parameter: int, second_parameter: int, third_parameter: int, fourth: int, *, fifth_parameter: int) -> None:
    pass


@pytest.mark.parametrize(
    ("function", "doc", "shown"),
    [
        (plain, "", "(a, /, b='x', *args, key=...)"),
        (many, "", "(second_parameter, third_parameter, fourth, *, fifth_parameter)"),
        (None, "abs(input: Tensor, *, out=None) -> Tensor", "(input, *, out=None)"),
        (None, "f(self, size: Tuple[int, int], axis = 0)\n\nText.", "(size, axis=0)"),
        (None, f"f({'x' * 30}, {'y' * 30}, {'z' * 30})", f"({'x' * 30}, {'y' * 30}, ...)"),
        (None, f"f({'x' * 80})", "(...)"),
        (None, "Text.", ""),
    ],
)
def test_signature(function: object, doc: str, shown: str) -> None:
    assert signature(function, doc, takes_self=True) == shown


def test_a_long_signature_is_cut() -> None:
    assert signature(many, "", takes_self=False) == "(first_parameter, second_parameter, third_parameter, fourth, ...)"
