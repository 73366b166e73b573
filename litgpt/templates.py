"""The sandbox of chat templates, which are untrusted programs. jinja2's sandbox hides Python's internals; this one bounds the cost too.

Each rendering has one budget: every loop pass, call, filter, comparison and operation takes a step, and another one for each `STEP_SIZE`
characters or entries of its result. Where one operation can multiply sizes (`*`, `**`, `%`, `~`, join, replace, indent, formats) the size
is computed before the operation, elsewhere it is measured afterwards; a list counts with all of its content. No result exceeds `MAX_SIZE`,
so that a check of the clock in every step ends what is merely slow, without threads, signals or processes. Only those filters and methods
that chat templates use are available.
"""

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

MAX_SIZE = 10_000_000  # characters of a value, and of the complete text
ENTRY = 10  # characters that a list's entry counts for, besides its content
MAX_STEPS = 200_000
STEP_SIZE = 1_000
MAX_SECONDS = 10.0  # per rendering
MAX_BITS = 4_096  # of an integer
MAX_WIDTH = 10_000  # of a padded field, an indentation, a batch

_FILTERS = (
    "abs batch capitalize count d default dictsort e escape first float format groupby indent int items join last length list lower map "
    "max min reject rejectattr replace reverse round safe select selectattr slice sort string sum title tojson trim truncate unique upper "
    "wordcount"
)
FILTERS = frozenset(_FILTERS.split())
WITH_WIDTH = ("batch", "indent", "replace", "round", "slice", "tojson", "truncate")  # filters that multiply their value by a number
_OF_TEXTS = (
    "capitalize casefold count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip swapcase title upper"
)
# Callable methods of Python's own values. Other values are jinja2's: macros, loops, namespaces.
METHODS: dict[type, tuple[str, ...]] = {
    str: tuple(_OF_TEXTS.split()),
    dict: ("copy", "get", "items", "keys", "values"),
    list: ("copy", "count", "index"),
    tuple: ("count", "index"),
}
PYTHONS_OWN = (str, bytes, bytearray, memoryview, int, float, complex, list, tuple, dict, set, frozenset, range, type)


def size_of(value: Any) -> int:
    """Return the number of characters in `value`, nested ones included. An entry of a list counts as `ENTRY`.

    Counting stops soon after `MAX_SIZE`.
    """
    if isinstance(value, str):
        return len(value)
    total, left = 0, [value]
    while left and total <= MAX_SIZE:
        item = left.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, int):
            total += item.bit_length() // 3
        elif isinstance(item, (list, tuple, set, frozenset, dict, range)):
            total += ENTRY * len(item)
            if not isinstance(item, range):
                left.extend(item)
            if isinstance(item, dict):
                left.extend(item.values())
    return total


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that Hugging Face templates expect. Call `start` before each rendering. A template over budget is a SecurityError."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: datetime) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, Generation], finalize=self.made, optimized=False
        )
        self.filters = {name: self._bounded(name, function) for name, function in self.filters.items() if name in FILTERS}
        self.filters["tojson"] = self._bounded("tojson", _as_json)
        self.filters["sum"] = self._sum
        self.filters |= {"_each": self.each, "_made": self.made, "_joined": self._joined, "_mark": self._mark}
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace", "cycler", "joiner")}
        self.globals["raise_exception"] = _fail
        self.globals["strftime_now"] = partial(_strftime, now)
        self.start()

    def start(self) -> None:
        """Start a new budget, and a text of which nothing is written yet."""
        self.steps, self.deadline = 0, time.monotonic() + MAX_SECONDS
        self.written = 0  # characters; counted by the reader of the text
        self.marks: dict[int, int] = {}  # id of a mapping that a loop went through -> `written` at the start of that pass

    def spend(self, size: int = 0) -> None:
        """Spend a step whose result has this size."""
        self.steps += 1 + size // STEP_SIZE
        if size > MAX_SIZE:
            raise SecurityError(f"it makes more than {MAX_SIZE:,} characters")
        if self.steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS:,} steps")
        if time.monotonic() > self.deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS:.0f} seconds")

    def made(self, value: Any) -> Any:
        """Return `value` after its cost is spent."""
        self.spend(size_of(value))
        return value

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.spend()
            yield item

    def _mark(self, item: Any) -> None:
        if isinstance(item, dict):
            self.marks[id(item)] = self.written

    def concat(self, parts: Iterable[str]) -> str:  # jinja2's hook
        texts = list(parts)
        self.spend(sum(map(len, texts)))
        return "".join(texts)

    def _joined(self, parts: list[Any]) -> str:
        """Return left ~ right ~ ..."""
        self.spend(size_of(parts))
        return self.concat(str(part) for part in parts)

    def _sum(self, items: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
        if attribute is not None:
            items = (self.getitem(item, attribute) for item in items)
        for item in self.each(items):
            start = self.call_binop(None, "+", start, item)
        return start

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that spends the cost of its input and its result."""
        at = int(hasattr(function, "jinja_pass_arg"))  # 1 if the context or the environment is the first argument

        def filtered(*args: Any, **kwargs: Any) -> Any:
            before, value, rest = args[:at], args[at], args[at + 1 :]
            if isinstance(value, Iterator):
                value = self.each(value)
                if name in WITH_WIDTH or name in ("join", "format", "string"):
                    value = list(value)
            arguments = (*rest, *kwargs.values())
            if name in WITH_WIDTH and any(isinstance(number, int) and abs(number) > MAX_WIDTH for number in arguments):
                raise SecurityError(f"the filter {name} is given a number beyond {MAX_WIDTH:,}")
            if name == "indent" and not isinstance(value, str):  # jinja2 appends to a list before it notices that it is not a text
                raise SecurityError(f"the filter indent is given a {type(value).__name__}")
            self.spend(_result_size(name, value, arguments))
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
                value, arguments = (args[0], (owner,)) if method.__name__ == "join" and args else (owner, (*args, *kwargs.values()))
                self.spend(_result_size(method.__name__, value, arguments))
        return self.made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str:  # most operators of a template
            self.spend(len(left) + len(right))
            return left + right
        self.spend(_operated_size(operator, left, right))
        return self.made(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _Counting().visit(tree)
        tree.set_environment(self)
        return tree


def _operated_size(operator: str, left: Any, right: Any) -> int:
    """Return the size of an operator's result. Raise SecurityError if it is too large to be computed."""
    if operator == "%" and isinstance(left, str):
        return _formatted_size(left, right)
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


def _formatted_size(pattern: str, values: Any) -> int:
    """Return the largest size of a formatted text. Raise SecurityError for a width of five digits, or one taken from a value (*)."""
    if re.search(r"\d{5}", pattern) or re.search(r"%[^a-zA-Z%]*\*", pattern):
        raise SecurityError("it formats with a huge width")
    nested = re.search(r"\{[^}]*\{", pattern)  # a width taken from a value
    if nested and any(isinstance(value, int) and abs(value) > MAX_WIDTH for value in _plain_values(values)):
        raise SecurityError("it formats with a huge width")
    width, fields = MAX_WIDTH if nested or re.search(r"\d", pattern) else 0, pattern.count("%") + pattern.count("{")
    return len(pattern) + fields * (width + size_of(values))


def _plain_values(values: Any) -> list[Any]:
    if isinstance(values, dict):
        return list(values.values())
    return list(values) if isinstance(values, (list, tuple)) else [values]


def _result_size(name: str, value: Any, arguments: tuple[Any, ...]) -> int:
    """Return the largest size of the result of a filter, or of a text's method of the same name. `value` is what `join` joins."""
    size, text = size_of(value), value if isinstance(value, str) else ""
    if name == "replace" and len(arguments) > 1:
        return size + str(value).count(str(arguments[0])) * len(str(arguments[1]))
    if name == "join":
        return size + (len(value) if hasattr(value, "__len__") else 0) * sum(len(one) for one in arguments if isinstance(one, str))
    if name in ("format", "format_map"):
        return _formatted_size(text, [*arguments, *(item for argument in arguments for item in _plain_values(argument))])
    if name in ("indent", "tojson"):
        flat = [one for argument in arguments for one in _plain_values(argument)]  # of two separators too
        widths = [one if isinstance(one, int) else len(one) for one in flat if isinstance(one, (int, str))]
        return size + (text.count("\n") + 1 if text else size) * max(widths, default=0)
    if name in ("batch", "slice"):
        return size + sum(abs(number) for number in arguments if isinstance(number, int))
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
    """`{% generation %} ... {% endgeneration %}` marks a reply. Only its text is rendered."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Counting(NodeTransformer):
    """Inserts the sandbox's own filters where a template builds, compares or iterates without a call."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateError("recursive loops are not supported")
        self.generic_visit(node)
        node.iter = _through("_each", node.iter)
        if isinstance(node.target, nodes.Name):
            node.body.insert(
                0, nodes.ExprStmt(_through("_mark", nodes.Name(node.target.name, "load", lineno=node.lineno)), lineno=node.lineno)
            )
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
        node.expr = _through("_made", node.expr)
        for operand in node.ops:
            operand.expr = _through("_made", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _through("_made", node) if isinstance(node.arg, nodes.Slice) else node


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
