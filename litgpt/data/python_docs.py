"""What the functions of installed packages do: their docstrings as questions and answers.

    math.radians -> {"instruction": "What does the Python function `math.radians(x, /)` do?",
                     "output": "Convert angle x from degrees to radians."}

The packages are imported, so their import code runs: in an interpreter of its own, since what this one has imported may have added to
them (transformers gives `logging.Logger` new methods). The result depends on their versions and on nothing else.
"""

import hashlib
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

from litgpt.data.base import DataModule, Record
from litgpt.errors import UserError

_STDLIB = (
    "abc argparse array ast asyncio base64 bdb binascii bisect builtins bz2 calendar cmath cmd code codecs codeop collections "
    "colorsys compileall concurrent configparser contextlib contextvars copy copyreg csv ctypes dataclasses datetime decimal difflib dis "
    "email enum errno faulthandler filecmp fileinput fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib gzip "
    "hashlib heapq hmac html http imaplib importlib inspect io ipaddress itertools json keyword linecache locale logging lzma mailbox "
    "marshal math mimetypes mmap modulefinder multiprocessing netrc numbers operator optparse os os.path pathlib pdb pickle pickletools "
    "pkgutil platform plistlib poplib pprint profile pstats py_compile pyclbr pydoc queue quopri random re reprlib runpy sched secrets "
    "select selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl stat statistics string stringprep struct "
    "subprocess symtable sys sysconfig tabnanny tarfile tempfile textwrap threading time timeit token tokenize trace traceback "
    "tracemalloc types typing unicodedata unittest urllib uuid venv warnings wave weakref webbrowser wsgiref xml xmlrpc zipapp zipfile "
    "zipimport zlib zoneinfo"
)
DEFAULT_PACKAGES = (*_STDLIB.split(), "numpy", "torch", "torch.utils.data")
"""Read unless told otherwise: the standard library's modules for every platform and version, numpy and torch."""

_SKIPPED = (
    "test tests testing conftest setup distutils f2py idlelib gen_pyi matlib mypy_plugin windows_events windows_utils popen_spawn_win32 "
    "torch.ao torch.backends torch.contrib torch.distributed torch.export torch.fx torch.jit torch.mps torch.mtia torch.nn.attention "
    "torch.nn.intrinsic torch.nn.qat torch.nn.quantizable torch.nn.quantized torch.onnx torch.package torch.quantization torch.utils "
    "torch.compiler.config torch.xpu"
)
SKIPPED_MODULES = frozenset(_SKIPPED.split())
"""Submodules, by last or full name, that are read only if they are named themselves: dull, or heavy to import. Private ones never are."""
SIGNATURE_CHARS = 72
"""A longer signature ends in "...)"."""


class Entry(NamedTuple):
    """A documented object: its public name, what it is, its call signature ("" for classes) and the answer."""

    name: str
    kind: str
    signature: str
    answer: str


@dataclass
class PythonDocs(DataModule):
    """Docstrings of installed packages as questions and answers: several thousand from the standard library, numpy and torch."""

    mask_prompt: bool = True
    """Learn the answer only, not the question."""
    packages: list[str] | None = None
    """Importable packages or modules to read, submodules included. Default: the standard library, numpy and torch."""
    max_samples: int | None = None
    """Keep this many, drawn with `seed`."""
    min_answer_chars: int = 20
    """Shorter answers are left out."""
    max_answer_chars: int = 300
    """Longer answers are cut to whole sentences, or left out."""
    unreadable: list[str] = field(default_factory=list, init=False, repr=False)

    def records(self) -> tuple[list[Record], list[Record] | None]:
        """Sorted by name, each object and each answer once."""
        packages = list(DEFAULT_PACKAGES) if self.packages is None else self.packages
        if not packages:
            raise UserError("data.packages is an empty list: name importable packages, for example [json, numpy]")
        if self.max_samples is not None and self.max_samples < 2:
            raise UserError(f"data.max_samples is {self.max_samples}: at least 2 are needed, one of them for validation")
        entries, self.unreadable = collect_apart(packages, self.min_answer_chars, self.max_answer_chars)
        if not entries:
            raise UserError(f"data.packages: no public function or class of {', '.join(packages)} has a docstring that can be used")
        if self.max_samples is not None and self.max_samples < len(entries):
            # by a hash of the name, so that one object more or less does not change the whole choice
            entries = sorted(sorted(entries, key=lambda entry: _lot(self.seed, entry.name))[: self.max_samples])
        return [_record(entry) for entry in entries], None

    def notes(self) -> list[str]:
        return [f"{len(self.unreadable):,} submodules could not be imported"] if self.unreadable else []


def _record(entry: Entry) -> Record:
    question = f"What does the Python {entry.kind} `{entry.name}{entry.signature}` do?"
    return {"instruction": question, "input": "", "output": entry.answer}


def _lot(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def collect_apart(packages: list[str], min_chars: int, max_chars: int) -> tuple[list[Entry], list[str]]:
    """`collect` in a fresh interpreter. Raises UserError if a package cannot be imported, or its import ends the interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", "from litgpt.data.python_docs import answer_request; answer_request()"],
        input=json.dumps([packages, min_chars, max_chars]),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"data.packages: importing {', '.join(packages)[:200]} ended the interpreter ({result.returncode}): {reason}")
    answer = json.loads(result.stdout.splitlines()[-1])
    if isinstance(answer, str):
        raise UserError(answer)
    entries, unreadable = answer
    return [Entry(*entry) for entry in entries], unreadable


def answer_request() -> None:
    """The other side of `collect_apart`: a JSON line in, a JSON line out, a string where it is a UserError's message."""
    out = sys.stdout
    try:
        answer: Any = collect(*json.loads(sys.stdin.read()))
    except UserError as error:
        answer = str(error)
    out.write("\n" + json.dumps(answer) + "\n")
    out.flush()


def collect(packages: list[str], min_chars: int, max_chars: int) -> tuple[list[Entry], list[str]]:
    """The documented public objects of the packages, sorted by name, and the submodules that could not be imported.

    An object that has several names keeps the shortest; an answer that several objects share goes to the shortest name.
    """
    unreadable: list[str] = []
    found: dict[int, tuple[str, Any]] = {}  # id -> (name, object); the objects stay alive, so ids stay theirs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in sorted(set(packages)):
            for prefix, module in _modules(package, unreadable):
                for name, member in _members(module):
                    _keep_shortest(found, _public_name(prefix, name), member)
        for class_name, member in sorted((item for item in found.values() if inspect.isclass(item[1])), key=_by_length):
            for name, method in _methods(member):
                _keep_shortest(found, f"{class_name}.{name}", method)
        answers: dict[str, Entry] = {}
        for name, member in sorted(found.values(), key=_by_length):
            answer = first_paragraph(_own_doc(member), min_chars, max_chars)
            if answer and answer not in answers:
                answers[answer] = _entry(name, member, answer)
    return sorted(answers.values()), sorted(set(unreadable))


def _by_length(item: tuple[str, Any]) -> tuple[int, int, str]:
    return item[0].count("."), len(item[0]), item[0]


def _keep_shortest(found: dict[int, tuple[str, Any]], name: str, member: Any) -> None:
    new = (name, member)
    old = found.get(id(_identity(member)))
    if old is None or _by_length(new) < _by_length(old):
        found[id(_identity(member))] = new


def _identity(member: Any) -> Any:
    return member.function if isinstance(member, Method) else member


def _public_name(module: str, name: str) -> str:
    return name if module == "builtins" else f"{module}.{name}"


# --- Finding the objects ---


class Method(NamedTuple):
    """A function of a class."""

    function: Any
    caller: Any
    """What its signature is taken from: bound for class methods."""
    takes_self: bool


def _modules(name: str, unreadable: list[str], required: bool = True) -> Iterator[tuple[str, ModuleType]]:
    """Import a module and its public submodules. UserError if the first cannot be imported."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if required:
            raise UserError(
                f"data.packages: {name!r} cannot be imported ({type(error).__name__}: {error}): install it or drop it"
            ) from None
        unreadable.append(name)
        return
    yield name, module
    for info in sorted(pkgutil.iter_modules(getattr(module, "__path__", [])), key=lambda info: info.name):
        full = f"{name}.{info.name}"
        if not info.name.startswith("_") and info.name not in SKIPPED_MODULES and full not in SKIPPED_MODULES:
            yield from _modules(full, unreadable, required=False)


def _members(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The public functions and classes of a module: those in `__all__`, else those that are not imported from another package."""
    listed = getattr(module, "__all__", None)
    package = module.__name__.partition(".")[0].lstrip("_")
    # Names in `__all__` may be loaded on first use; others are looked up where that cannot start an import.
    names = {str(name): _attribute(module, str(name)) for name in listed} if listed is not None else dict(vars(module))
    for name, member in sorted(names.items(), key=lambda item: item[0]):
        if name.startswith("_") or not (inspect.isclass(member) or _is_function(member)):
            continue
        home = getattr(member, "__module__", None) or package
        if listed is not None or str(home).partition(".")[0].lstrip("_") == package:
            yield name, member


def _attribute(module: ModuleType, name: str) -> Any:
    try:
        return getattr(module, name, None)
    except Exception:  # a module may load a name on first use, and fail
        return None


def _is_function(member: Any) -> bool:
    return inspect.isroutine(member) or type(member).__name__ == "ufunc"


def _methods(cls: type) -> Iterator[tuple[str, Method]]:
    """The public methods that a class defines itself, or takes from a base class in a private module (torch.Tensor does)."""
    own = dict(vars(cls))
    for base in cls.__mro__[1:]:
        if "._" in f".{base.__module__}":
            own = {**vars(base), **own}
    for name, member in sorted(own.items()):
        if name.startswith("_"):
            continue
        if isinstance(member, (staticmethod, classmethod)):
            yield name, Method(member.__func__, getattr(cls, name, None), False)
        elif inspect.isroutine(member):
            static = inspect.isbuiltin(member) or type(member).__name__ == "classmethod_descriptor"
            yield name, Method(member, getattr(cls, name, None), not static)


def _own_doc(member: Any) -> str:
    """The docstring an object has itself, not one that its class or a base class lends it."""
    target = _identity(member)
    doc = vars(target).get("__doc__") if inspect.isclass(target) else getattr(target, "__doc__", None)
    return inspect.cleandoc(doc) if isinstance(doc, str) else ""


def _entry(name: str, member: Any, answer: str) -> Entry:
    if inspect.isclass(member):
        return Entry(name, "class", "", answer)
    if isinstance(member, Method):
        return Entry(name, "method", _signature(member.caller, _own_doc(member), member.takes_self), answer)
    return Entry(name, "function", _signature(member, _own_doc(member), False), answer)


# --- Signatures ---


class _Shown:
    """A default value in a signature."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _signature(function: Any, doc: str, skip_first: bool) -> str:
    """`(x, /, *, key=None)` without annotations, cut to SIGNATURE_CHARS. "" if neither Python nor the docstring tells it."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError, NameError, AttributeError):
        return _signature_from_doc(doc)
    shown = []
    for parameter in parameters[skip_first:]:
        if parameter.name.startswith("_"):
            continue
        default = parameter.default
        if default is not inspect.Parameter.empty:
            default = _Shown(_default_text(default))
        shown.append(parameter.replace(annotation=inspect.Parameter.empty, default=default))
    full = _join(shown)
    kept = len(shown)
    while len(full) > SIGNATURE_CHARS and kept:
        kept -= 1
        full = _join(shown[:kept])[:-1] + (", ...)" if kept else "...)")
    return full


def _join(parameters: list[inspect.Parameter]) -> str:
    # Leaving out private parameters can leave a default before a parameter without one, which Signature would refuse.
    return str(inspect.Signature(parameters, __validate_parameters__=False))


def _default_text(value: Any) -> str:
    """The value as written, if that is short and the same on every run."""
    if isinstance(value, (bool, int, float, str, bytes, type(None), tuple)):
        text = repr(value)
        if len(text) <= 20 and "<" not in text:
            return text
    return "..."


def _signature_from_doc(doc: str) -> str:
    """From a first line such as "abs(input: Tensor, *, out=None) -> Tensor"."""
    line = doc.partition("\n")[0]
    match = _CALL.fullmatch(line)
    if not match:
        return ""
    parameters = [re.sub(r":[^=]*(?=$|=)", "", part).replace(" =", "=").replace("= ", "=") for part in _split(match["parameters"])]
    if parameters and parameters[0] == "self":
        del parameters[0]
    full = ", ".join(parameters)
    while len(full) + 2 > SIGNATURE_CHARS and parameters:
        parameters.pop()
        full = ", ".join([*parameters, "..."])
    return f"({full})"


def _split(parameters: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth = [""], 0
    for char in parameters:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts if part.strip()]


# --- Answers ---

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
_LEADS_ON = re.compile(r"([:,;(]|\b(as|by|where|is|are|of|the|and|with|follows|equation|formula))$")
"""The end of a sentence that goes on in a list or a formula."""
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
    """The first paragraph of a docstring as one line of plain text, "" if it does not answer what the object does.

    Call signatures at the start are skipped, reStructuredText markup becomes backticks; a paragraph that is too long, or that leads over to
    a list, is cut to whole sentences.
    """
    for block in re.split(r"\n\s*\n", doc.strip()):
        if block.startswith(".. "):
            continue
        lines: list[str] = []
        for line in block.splitlines():
            signature = None if lines else _CALL.fullmatch(line.strip())
            described = None if lines else _CALL_WITH_TEXT.fullmatch(line.strip())
            if described:
                lines.append(described["text"])
            elif _HEADER.fullmatch(line.strip()) or line.lstrip().startswith((">>> ", ":param ", ".. ", "@param")):
                break
            elif not signature and line.strip() != "--":
                lines.append(line.strip())
        if lines:
            return _sentences(" ".join(lines), min_chars, max_chars)
        if not all(_CALL.fullmatch(line.strip()) or line.strip() == "--" for line in block.splitlines()):
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
