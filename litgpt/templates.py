"""Where chat templates run: they are foreign programs. jinja2's sandbox keeps them from Python's internals; this keeps them bounded.

One budget per rendering: every loop pass, call, filter, comparison and operation takes a step, and one more for each `STEP_SIZE`
characters or entries that it makes. Sizes are worked out before anything is made where one operation can multiply them (`*`, `**`,
`%`, `~`, join, replace, indent, formats) and looked at afterwards elsewhere; a list counts with all that it holds, as often as it holds
it. No step makes more than `MAX_SIZE`, so the clock, which is looked at on every step, ends what is merely slow. Nothing of this
needs a thread, a signal or a process. Filters and methods are those of a list: what chat templates use.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SIZE = 10_000_000
"""characters of any value, and of the whole text"""
ENTRY = 10
"""characters that an entry of a list counts for, besides what it holds"""
MAX_STEPS = 200_000
STEP_SIZE = 1_000
MAX_SECONDS = 10.0
"""of one rendering, for what takes long in few steps"""
MAX_BITS = 4_096
"""of a whole number"""
MAX_WIDTH = 10_000
"""of a padded field, an indentation, a batch"""

_FILTERS = (
    "abs batch capitalize count d default dictsort e escape first float format groupby indent int items join last length list lower map "
    "max min reject rejectattr replace reverse round safe select selectattr slice sort string sum title tojson trim truncate unique upper "
    "wordcount"
)
FILTERS = frozenset(_FILTERS.split())
WITH_WIDTH = ("batch", "indent", "replace", "round", "slice", "tojson", "truncate")
"""Filters that multiply their value by a number."""
_OF_TEXTS = (
    "capitalize casefold count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip swapcase title upper"
)
METHODS: dict[type, tuple[str, ...]] = {
    str: tuple(_OF_TEXTS.split()),
    dict: ("copy", "get", "items", "keys", "values"),
    list: ("copy", "count", "index"),
    tuple: ("count", "index"),
}
"""What may be called of Python's own values. Other values are jinja2's: macros, loops, namespaces."""
PYTHONS_OWN = (str, bytes, bytearray, memoryview, int, float, complex, list, tuple, dict, set, frozenset, range, type)


def size_of(value: Any) -> int:
    """Characters in `value`, nested ones included; an entry of a list counts as `ENTRY`. Counting ends soon after `MAX_SIZE`."""
    total, left = 0, [value]
    while left and total <= MAX_SIZE:
        item = left.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, (list, tuple, set, frozenset)):
            total += ENTRY * len(item)
            left.extend(item)
        elif isinstance(item, dict):
            total += ENTRY * len(item)
            left.extend(item)
            left.extend(item.values())
        elif isinstance(item, int):
            total += item.bit_length() // 3
        elif isinstance(item, range):
            total += ENTRY * len(item)
    return total


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that Hugging Face templates expect. `start` before each rendering. What is too much raises SecurityError."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: datetime) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, Generation], finalize=self.made, optimized=False
        )
        self.filters = {name: self._bounded(name, function) for name, function in self.filters.items() if name in FILTERS}
        self.filters["tojson"] = self._bounded("tojson", _as_json)
        self.filters["sum"] = self._sum
        self.filters |= {"_each": self.each, "_made": self.made, "_joined": self._joined, "_checked": self._checked}
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")}
        self.globals["raise_exception"] = _fail
        self.globals["strftime_now"] = partial(_strftime, now)
        self.start()

    def start(self) -> None:
        """A new budget."""
        self.steps, self.deadline = 0, time.monotonic() + MAX_SECONDS

    def spend(self, size: int = 0) -> None:
        """A step that makes something of that size."""
        self.steps += 1 + size // STEP_SIZE
        if size > MAX_SIZE:
            raise SecurityError(f"it makes more than {MAX_SIZE:,} characters")
        if self.steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps")
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS:.0f} seconds")

    def made(self, value: Any) -> Any:
        """`value`, paid for."""
        self.spend(size_of(value))
        return value

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.spend()
            yield item

    def concat(self, parts: Iterable[str]) -> str:  # jinja2 puts texts together with this
        texts = list(parts)
        self.spend(sum(map(len, texts)))
        return "".join(texts)

    def _joined(self, parts: list[Any]) -> str:
        """left ~ right ~ ..."""
        self.spend(size_of(parts))
        return self.concat(str(part) for part in parts)

    def _checked(self, value: Any) -> Any:
        self.spend(size_of(value) if isinstance(value, str) else 0)
        return value

    def _sum(self, items: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
        if attribute is not None:
            items = (self.getitem(item, attribute) for item in items)
        for item in self.each(items):
            start = self.call_binop(None, "+", start, item)
        return start

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that pays for what it reads and makes."""
        at = int(hasattr(function, "jinja_pass_arg"))  # then the context, the environment or the evaluation context comes first

        def filtered(*args: Any, **kwargs: Any) -> Any:
            before, value, rest = args[:at], args[at], args[at + 1 :]
            if isinstance(value, Iterator):
                value = self.each(value)
                if name in WITH_WIDTH or name in ("join", "format", "string"):
                    value = list(value)
            given = (*rest, *kwargs.values())
            if name in WITH_WIDTH and any(isinstance(number, int) and abs(number) > MAX_WIDTH for number in given):
                raise SecurityError(f"the filter {name} is given a number beyond {MAX_WIDTH:,}")
            self.spend(_filtered_size(name, value, given))
            result = function(*before, value, *rest, **kwargs)
            return self.each(result) if isinstance(result, Iterator) else self.made(result)

        if at:
            filtered.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return filtered

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        args = tuple(list(self.each(arg)) if isinstance(arg, Iterator) else arg for arg in args)
        self.spend(size_of((args, kwargs)))
        if isinstance(owner, PYTHONS_OWN):
            allowed = next((names for kind, names in METHODS.items() if isinstance(owner, kind)), ())
            if method.__name__ not in allowed:
                raise SecurityError(f"{type(owner).__name__}.{method.__name__} is not available")
            if isinstance(owner, str):
                self.spend(_method_size(method.__name__, owner, args, kwargs))
        return self.made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.spend(_operated_size(operator, left, right))
        return self.made(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Counting().visit(tree)
        tree.set_environment(self)
        return tree


def _operated_size(operator: str, left: Any, right: Any) -> int:
    """The size of what an operator makes. SecurityError for what is too large to be worked out."""
    if operator == "%" and isinstance(left, str):
        return _formatted_size(left, left.count("%"), right)
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if operator == "**":
        if not (numbers and abs(left) <= 1e6 and abs(right) <= 64):
            raise SecurityError("it computes a huge power")
    elif operator == "*" and not numbers:
        times, sequence = (left, right) if isinstance(left, int) else (right, left)
        return size_of(sequence) * max(times, 0) if isinstance(times, int) else 0
    elif numbers and sum(number.bit_length() for number in (left, right) if isinstance(number, int)) > MAX_BITS:
        raise SecurityError(f"it computes numbers of more than {MAX_BITS:,} bits")
    return size_of(left) + size_of(right)


def _formatted_size(pattern: str, fields: int, values: Any) -> int:
    """The most that a format with so many fields makes. SecurityError for a width of five digits, or one given as a value (*)."""
    if re.search(r"\d{5}", pattern) or re.search(r"%[^a-zA-Z%]*\*", pattern):
        raise SecurityError("it formats with a huge width")
    widths = [value for value in _plain_values(values) if isinstance(value, int)]
    width = MAX_WIDTH if re.search(r"\d|\{[^}]*\{", pattern) else 0
    if "{" in pattern and re.search(r"\{[^}]*\{", pattern) and any(abs(number) > MAX_WIDTH for number in widths):
        raise SecurityError("it formats with a huge width")
    return len(pattern) + fields * (width + size_of(values))


def _plain_values(values: Any) -> list[Any]:
    if isinstance(values, dict):
        return list(values.values())
    return list(values) if isinstance(values, (list, tuple)) else [values]


def _method_size(name: str, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The most that a method of a text makes."""
    if name in ("format", "format_map"):
        values = [*args, *kwargs.values()]
        return _formatted_size(text, text.count("{"), [*values, *(item for value in values for item in _plain_values(value))])
    if name == "join" and args:
        return size_of(args[0]) + len(text) * size_of(args[0])
    if name == "replace" and len(args) > 1 and all(isinstance(arg, str) for arg in args[:2]):
        return len(text) + text.count(args[0]) * len(args[1])
    return len(text)


def _filtered_size(name: str, value: Any, given: tuple[Any, ...]) -> int:
    """The most that a filter makes."""
    size, text = size_of(value), value if isinstance(value, str) else ""
    if name == "replace" and len(given) > 1:
        return size + str(value).count(str(given[0])) * len(str(given[1]))
    if name == "join":
        return size + (len(value) if hasattr(value, "__len__") else 0) * sum(len(one) for one in given if isinstance(one, str))
    if name == "format":
        return _formatted_size(text, text.count("%"), given)
    if name in ("indent", "tojson"):
        widths = [number if isinstance(number, int) else len(number) for number in given if isinstance(number, (int, str))]
        return size + (text.count("\n") + 1 if text else size) * max(widths, default=0)
    if name in ("batch", "slice"):
        return size + sum(abs(number) for number in given if isinstance(number, int))
    return size


def _as_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _fail(message: str) -> None:
    raise TemplateError(str(message))


def _strftime(now: datetime, pattern: str) -> str:
    if len(pattern) > MAX_WIDTH:
        raise SecurityError("it formats a date with a huge pattern")
    return now.strftime(pattern)


class Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` marks a reply; the text is what counts here."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Counting(NodeTransformer):
    """Puts the sandbox's own filters where a template makes, compares or goes through something without calling anything."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateError("recursive loops are not supported")
        self.generic_visit(node)
        node.iter = _through("_each", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("_joined", nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        is_target = isinstance(node, nodes.Tuple) and node.ctx != "load"
        return node if is_target else _through("_made", node)

    visit_Tuple = visit_Dict = visit_List

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _through("_checked", node.expr)
        for operand in node.ops:
            operand.expr = _through("_checked", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through("_made", node) if isinstance(node.arg, nodes.Slice) else node


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
