"""Docstrings of installed packages as questions and answers.

    math.radians -> {"instruction": "What does the Python function `math.radians(x, /)` do?",
                     "output": "Convert angle x from degrees to radians."}

The packages are imported in a separate interpreter: other imports may have changed them (transformers adds methods to
`logging.Logger`). The records depend on the packages' versions only.
"""

import hashlib
import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

from litgpt.data.base import DataModule
from litgpt.data.docstrings import first_paragraph, signature
from litgpt.errors import UserError

# The standard library's modules that exist on every platform and in every version, numpy and torch.
_PACKAGES = (
    "abc argparse array ast asyncio base64 bdb binascii bisect builtins bz2 calendar cmath cmd code codecs codeop collections colorsys "
    "compileall concurrent configparser contextlib contextvars copy copyreg csv ctypes dataclasses datetime decimal difflib dis email "
    "enum errno faulthandler filecmp fileinput fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib gzip hashlib "
    "heapq hmac html http imaplib importlib inspect io ipaddress itertools json keyword linecache locale logging lzma mailbox marshal "
    "math mimetypes mmap modulefinder multiprocessing netrc numbers operator optparse os os.path pathlib pdb pickle pickletools pkgutil "
    "platform plistlib poplib pprint profile pstats py_compile pyclbr pydoc queue quopri random re reprlib runpy sched secrets select "
    "selectors shelve shlex shutil signal site smtplib socket socketserver sqlite3 ssl stat statistics string stringprep struct "
    "subprocess symtable sys sysconfig tabnanny tarfile tempfile textwrap threading time timeit token tokenize trace traceback "
    "tracemalloc types typing unicodedata unittest urllib uuid venv warnings wave weakref webbrowser wsgiref xml xmlrpc zipapp zipfile "
    "zipimport zlib zoneinfo numpy torch torch.utils.data"
)
DEFAULT_PACKAGES = tuple(_PACKAGES.split())
# Submodules, by last or full name, that are read only on request: of little use, or slow to import. Private ones are never read.
_SKIPPED = (
    "test tests testing conftest setup distutils f2py idlelib gen_pyi matlib mypy_plugin windows_events windows_utils popen_spawn_win32 "
    "torch.ao torch.backends torch.contrib torch.distributed torch.export torch.fx torch.jit torch.mps torch.mtia torch.nn.attention "
    "torch.nn.intrinsic torch.nn.qat torch.nn.quantizable torch.nn.quantized torch.onnx torch.package torch.quantization torch.utils "
    "torch.compiler.config torch.xpu"
)
SKIPPED_MODULES = frozenset(_SKIPPED.split())


class Entry(NamedTuple):
    """A documented object: its public name, its kind, its call signature ("" for classes) and the answer."""

    name: str
    kind: str
    signature: str
    answer: str


@dataclass(kw_only=True)
class PythonDocs(DataModule):
    """Docstrings of installed packages as questions and answers: several thousand from the standard library, numpy and torch."""

    mask_prompt: bool = True
    """Train on the answer only, not on the question."""
    packages: list[str] | None = None
    """Importable packages or modules to read, submodules included. Default: the standard library, numpy and torch."""
    max_samples: int | None = None
    """Keep this many samples, drawn with `seed`."""
    min_answer_chars: int = 20
    """Shorter answers are left out."""
    max_answer_chars: int = 300
    """Longer answers are cut to whole sentences, or left out."""
    unreadable: list[str] = field(default_factory=list, init=False, repr=False)

    def records(self) -> tuple[list[dict[str, str]], None]:
        """Return records sorted by name, each object and each answer once."""
        packages = list(DEFAULT_PACKAGES) if self.packages is None else self.packages
        if not packages:
            raise UserError("data.packages is an empty list: name importable packages, for example [json, numpy]")
        if self.max_samples is not None and self.max_samples < 2:
            raise UserError(f"data.max_samples is {self.max_samples}: at least 2 are needed, one of them for validation")
        entries, self.unreadable = collect_apart(packages, self.min_answer_chars, self.max_answer_chars)
        if not entries:
            raise UserError(f"data.packages: no public function or class of {', '.join(packages)} has a usable docstring")
        if self.max_samples is not None and self.max_samples < len(entries):
            # drawn by a hash of the name: one object more or less changes one sample only
            lots = {entry: hashlib.sha256(f"{self.seed} {entry.name}".encode()).digest() for entry in entries}
            entries = sorted(sorted(entries, key=lots.__getitem__)[: self.max_samples])
        question = "What does the Python {0.kind} `{0.name}{0.signature}` do?"
        return [{"instruction": question.format(entry), "input": "", "output": entry.answer} for entry in entries], None

    def notes(self) -> list[str]:
        return [f"{len(self.unreadable):,} submodules could not be imported"] if self.unreadable else []


def collect_apart(packages: list[str], min_chars: int, max_chars: int) -> tuple[list[Entry], list[str]]:
    """Run `collect` in a fresh interpreter. Raise UserError if a package cannot be imported, or its import ends the interpreter."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "from litgpt.data.python_docs import answer_request; answer_request()"],
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
    """Serve `collect_apart`: read a JSON line, print a JSON line, a string if it is the message of a UserError."""
    out = sys.stdout
    sys.stdout = sys.stderr  # imported packages may print
    try:
        answer: Any = collect(*json.load(sys.stdin))
    except UserError as error:
        answer = str(error)
    print("\n" + json.dumps(answer), file=out, flush=True)


class Member(NamedTuple):
    """A function or class and its shortest public name. `caller` has the signature: for class methods, the bound method."""

    name: str
    kind: str
    object: Any
    caller: Any
    takes_self: bool = False

    @property
    def order(self) -> tuple[int, int, str]:
        return self.name.count("."), len(self.name), self.name

    @property
    def doc(self) -> str:
        """The object's own docstring, not one inherited from its class or a base class."""
        doc = vars(self.object).get("__doc__") if self.kind == "class" else getattr(self.object, "__doc__", None)
        return inspect.cleandoc(doc) if isinstance(doc, str) else ""


def collect(packages: list[str], min_chars: int, max_chars: int) -> tuple[list[Entry], list[str]]:
    """Return the documented public objects of the packages, sorted by name, and the submodules that could not be imported.

    An object with several names keeps the shortest; an answer that several objects share goes to the shortest name.
    """
    unreadable: list[str] = []
    modules = (named for package in sorted(set(packages)) for named in _modules(package, unreadable))
    members = _shortest(member for name, module in modules for member in _members(name, module))
    methods = [method for member in members if member.kind == "class" for method in _methods(member.name, member.object)]
    entries: dict[str, Entry] = {}  # by answer
    for member in _shortest([*members, *methods]):
        answer = first_paragraph(member.doc, min_chars, max_chars)
        if answer and answer not in entries:
            shown = "" if member.kind == "class" else signature(member.caller, member.doc, member.takes_self)
            entries[answer] = Entry(member.name, member.kind, shown, answer)
    return sorted(entries.values()), sorted(set(unreadable))


def _shortest(members: Iterable[Member]) -> list[Member]:
    """Return each object under its shortest name, sorted by length."""
    kept: dict[int, Member] = {}  # by id of the object
    for member in sorted(members, key=attrgetter("order")):
        kept.setdefault(id(member.object), member)
    return list(kept.values())


def _modules(name: str, unreadable: list[str], required: bool = True) -> Iterator[tuple[str, ModuleType]]:
    """Import a module and its public submodules. Raise UserError if the first cannot be imported."""
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if required:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"data.packages: {name!r} cannot be imported ({reason}): install it or drop it") from None
        unreadable.append(name)
        return
    yield name, module
    for info in sorted(pkgutil.iter_modules(getattr(module, "__path__", [])), key=lambda info: info.name):
        full = f"{name}.{info.name}"
        if not info.name.startswith("_") and info.name not in SKIPPED_MODULES and full not in SKIPPED_MODULES:
            yield from _modules(full, unreadable, required=False)


def _members(prefix: str, module: ModuleType) -> Iterator[Member]:
    """Yield the public functions and classes in the module's `__all__`, else those that are not imported from another package."""
    listed = getattr(module, "__all__", None)
    package = module.__name__.partition(".")[0].lstrip("_")
    # Names in `__all__` may be loaded on first use; others are looked up where that cannot start an import.
    names = dict(vars(module)) if listed is None else dict[str, Any]()
    for name in map(str, listed or ()):
        with suppress(Exception):  # a module that loads a name on first use may fail
            names[name] = getattr(module, name)
    for name, member in sorted(names.items(), key=lambda item: item[0]):
        is_function = inspect.isroutine(member) or type(member).__name__ == "ufunc"
        if name.startswith("_") or not (inspect.isclass(member) or is_function):
            continue
        home = getattr(member, "__module__", None) or package
        if listed is not None or str(home).partition(".")[0].lstrip("_") == package:
            full = name if prefix == "builtins" else f"{prefix}.{name}"
            yield Member(full, "class" if inspect.isclass(member) else "function", member, member)


def _methods(class_name: str, cls: type) -> Iterator[Member]:
    """Yield the public methods that a class defines, or inherits from a class in a private module (as torch.Tensor does)."""
    own = dict(vars(cls))
    for base in cls.__mro__[1:]:
        if "._" in f".{base.__module__}":
            own = {**vars(base), **own}
    for name, member in sorted(own.items()):
        wrapped = isinstance(member, (staticmethod, classmethod))
        if name.startswith("_") or not (wrapped or inspect.isroutine(member)):
            continue
        static = wrapped or inspect.isbuiltin(member) or type(member).__name__ == "classmethod_descriptor"
        function = member.__func__ if wrapped else member
        yield Member(f"{class_name}.{name}", "method", function, getattr(cls, name, None), takes_self=not static)
