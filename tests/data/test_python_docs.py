"""Docstrings as data: known pairs, what is left out, the same result on every run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from litgpt.data import PythonDocs, python_docs
from litgpt.errors import UserError
from tests.helpers.cases import first

NAME = re.compile(r"What does the Python (function|class|method) `([\w.]+)(\(.*\))?` do\?")


def read(*packages: str) -> dict[str, str]:
    """Question -> answer."""
    train, val = PythonDocs(packages=list(packages)).records()
    assert val is None
    assert all(record.keys() == {"instruction", "input", "output"} for record in train)
    return {record["instruction"]: record["output"] for record in train}


@pytest.mark.parametrize(
    ("package", "question", "answer"),
    first(
        [
            ("math", "What does the Python function `math.radians(x, /)` do?", "Convert angle x from degrees to radians."),
            ("builtins", "What does the Python function `len(obj, /)` do?", "Return the number of items in a container."),
            (
                "builtins",
                "What does the Python method `dict.get(key, default=None, /)` do?",
                "Return the value for key if key is in the dictionary, else default.",
            ),
            (
                "textwrap",
                "What does the Python function `textwrap.dedent(text)` do?",
                "Remove any common leading whitespace from every line in `text`.",
            ),
            ("os.path", "What does the Python function `os.path.ismount(path)` do?", "Test whether a path is a mount point."),
            (
                "heapq",
                "What does the Python function `heapq.heappush(heap, item, /)` do?",
                "Push item onto heap, maintaining the heap invariant.",
            ),
            ("numpy", "What does the Python function `numpy.dot(a, b, out=None)` do?", "Dot product of two arrays."),
        ],
        4,
    ),
)
def test_known_pairs(package: str, question: str, answer: str) -> None:
    assert read(package)[question] == answer


def test_paragraph_with_a_link_is_left_out() -> None:
    assert not any("`json.JSONEncoder`" in question for question in read("json"))  # "Extensible JSON <https://json.org> encoder ..."


@pytest.mark.slow
def test_ufunc_signature_line_is_skipped() -> None:
    [(question, answer)] = [(q, a) for q, a in read("numpy").items() if "`numpy.sin(" in q]
    assert answer == "Trigonometric sine, element-wise."
    assert question.startswith("What does the Python function `numpy.sin(x, /, out=None, *, where=True")
    assert question.endswith(", ...)` do?")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with everything that is to be read, renamed or left out."""
    folder = tmp_path / "sample_docs_package"
    (folder / "inner").mkdir(parents=True)
    (folder / "tests").mkdir()
    (folder / "__init__.py").write_text(
        '''
import collections, dataclasses, functools, json, warnings
from json import dumps
from sample_docs_package.inner.deep import moved, Tool
warnings.warn("noise")
print("noise")
MARK = object()
Point = collections.namedtuple("Point", "x y")
@dataclasses.dataclass
class Auto:
    x: int
def plain(a: int, b: str = "x", *args, key=MARK, _hidden=None, **kwargs) -> int:
    """Adds `a` and :func:`~json.dumps` to ``b``.

    More text.
    """
def wide(first_parameter, second_parameter, third_parameter, fourth_parameter, fifth_parameter):
    """Takes a lot of parameters."""
def listed():
    """Does one thing that is complete. Returns one of:

    - a
    """
def only_list():
    """Returns one of the following values:

    - a
    """
def short():
    """Short."""
def none():
    pass
def deprecated():
    """Deprecated alias of something."""
def address():
    """Returns something like <object at 0x7f0000000000> every time."""
def long():
    """'''
        + "A sentence of forty characters, I think. " * 20
        + '''"""
def _private():
    """A private function that nobody sees."""
same_answer = lambda: None
same_answer.__doc__ = "Takes a lot of parameters."
bound = functools.partial(plain)
@functools.lru_cache
def cached(x):
    """Remembers what it has been asked."""
''',
        encoding="utf-8",
    )
    (folder / "inner" / "__init__.py").write_text("")
    (folder / "inner" / "deep.py").write_text(
        '''
def moved():
    """Lives deeper than it seems."""
class Tool:
    """A tool with many uses"""
    def use(self, times=1):
        """Use it a number of times."""
    @classmethod
    def make(cls, size):
        """Make a tool of a size."""
    @staticmethod
    def check(thing):
        """Check whether a thing is a tool."""
    def __len__(self):
        """The length that nobody sees."""
class Better(Tool):
    def use(self, times=1):
        pass
'''
    )
    (folder / "broken.py").write_text("raise RuntimeError('no')")
    (folder / "leaves.py").write_text("raise SystemExit(3)")
    for hidden in ("_private.py", "tests/__init__.py", "__main__.py", "conftest.py"):
        (folder / hidden).write_text("open(__file__ + '.imported', 'w')\ndef seen():\n    'A function in a hidden module.'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "sample_docs_package"
    for name in [name for name in sys.modules if name.startswith("sample_docs_package")]:
        del sys.modules[name]


def test_package_of_every_kind(package: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = PythonDocs(packages=[package])
    records, _ = data.records()
    p = package
    assert {record["instruction"][len("What does the Python ") : -len(" do?")]: record["output"] for record in records} == {
        f"function `{p}.plain(a, b='x', *args, key=..., **kwargs)`": "Adds `a` and `dumps` to `b`.",
        f"function `{p}.wide(first_parameter, second_parameter, third_parameter, ...)`": "Takes a lot of parameters.",
        f"function `{p}.listed()`": "Does one thing that is complete.",
        f"function `{p}.long()`": " ".join(["A sentence of forty characters, I think."] * 7),
        f"function `{p}.cached(x)`": "Remembers what it has been asked.",
        f"function `{p}.moved()`": "Lives deeper than it seems.",
        f"class `{p}.Tool`": "A tool with many uses.",
        f"method `{p}.Tool.use(times=1)`": "Use it a number of times.",
        f"method `{p}.Tool.make(size)`": "Make a tool of a size.",
        f"method `{p}.Tool.check(thing)`": "Check whether a thing is a tool.",
    }
    assert data.notes() == ["2 submodules could not be imported"]
    assert not list(tmp_path.rglob("*.imported"))
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_the_default_is_large_and_without_duplicates() -> None:
    data = PythonDocs()
    records, _ = data.records()
    questions = [record["instruction"] for record in records]
    answers = [record["output"] for record in records]
    assert len(records) > 3000
    assert len(set(questions)) == len(set(answers)) == len(records)
    assert all(20 <= len(answer) <= 300 and "\n" not in answer for answer in answers)
    assert all(NAME.fullmatch(question) for question in questions)
    assert not any(" at 0x" in text for text in questions + answers)
    kinds = [NAME.fullmatch(question)[1] for question in questions]  # type: ignore[index]
    assert min(kinds.count(kind) for kind in ("function", "class", "method")) > 500


@pytest.mark.slow
def test_same_result_in_every_process() -> None:
    code = (
        "import json, sys; from litgpt.data import PythonDocs\n"
        "records, _ = PythonDocs(packages=sys.argv[1:], max_samples=300).records(); print(json.dumps(records))"
    )
    packages = ["builtins", "collections", "xml", "logging"]

    def run(seed: str, order: list[str]) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        result = subprocess.run([sys.executable, "-c", code, *order], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        return hashlib.sha256(result.stdout.encode()).hexdigest() + str(len(json.loads(result.stdout)))

    first = run("1", packages)
    assert first.endswith("300")
    assert run("2", packages[::-1]) == first


def test_max_samples_depends_on_the_seed() -> None:
    draws = [PythonDocs(packages=["json", "email"], max_samples=20, seed=seed).records()[0] for seed in (1, 1, 2)]
    assert [len(draw) for draw in draws] == [20, 20, 20]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packages": ["json", "no_such_package"]}, "'no_such_package' cannot be imported"),
        ({"packages": []}, "data.packages is an empty list"),
        ({"packages": ["json"], "max_samples": 1}, "data.max_samples is 1"),
        ({"packages": ["this_is_not.a.module"]}, "'this_is_not.a.module' cannot be imported"),
        ({"packages": ["keyword"], "min_answer_chars": 299}, "no public function or class of keyword has a usable docstring"),
    ],
)
def test_errors(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        PythonDocs(**settings).records()  # type: ignore[arg-type]
    assert message in str(error.value)


def test_what_is_imported_here_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers does: a package that adds documented functions to another one's classes."""
    before = PythonDocs(packages=["logging"]).records()
    import logging

    def announce(self: object) -> None:
        """Say something that no logger of the standard library says."""

    monkeypatch.setattr(logging.Logger, "announce", announce, raising=False)
    assert PythonDocs(packages=["logging"]).records() == before


def test_an_import_that_ends_the_interpreter_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deadly_package.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="deadly_package ended the interpreter"):
        PythonDocs(packages=["deadly_package"]).records()


def test_one_object_less_changes_one_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [python_docs.Entry(f"m.f{i}", "function", "()", f"Does number {i}.") for i in range(100)]
    chosen = []
    for found in (entries, entries[:50] + entries[51:]):
        monkeypatch.setattr(python_docs, "collect_apart", lambda *_, found=found: (found, []))
        chosen.append({record["instruction"] for record in PythonDocs(max_samples=60).records()[0]})
    assert len(chosen[0] - chosen[1]) <= 1
