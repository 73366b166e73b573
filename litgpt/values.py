"""Conversion of YAML values, and of texts from the command line, to the types of settings."""

import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union

from litgpt.errors import UserError
from litgpt.files import expand_path, parse_yaml
from litgpt.text import as_utf8

NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: "a path", type(None): "null"}
P = ParamSpec("P")
R = TypeVar("R")
NULLS = ("null", "Null", "NULL", "~")


def from_text(text: str) -> Any:
    """Return the YAML value that `text` represents; `text` itself if it is a string in YAML or not YAML at all."""
    with suppress(ValueError):
        return int(text)  # 010 is ten, unlike in YAML
    try:
        value = parse_yaml(text, "")
    except UserError:
        return text
    is_text = isinstance(value, str) or (value is None and text not in NULLS)  # quotes and "# comments" are part of a text
    return text if is_text else value


def members_of(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def is_mapping(kind: Any) -> bool:
    """Return True if a dict is a value of the type."""
    return any(dict in (member, typing.get_origin(member)) for member in members_of(kind))


def convert(value: Any, kind: Any) -> Any:
    """Return `value` as the type `kind`. Raises ValueError if it is of another type.

    A string may represent another value: "3" is an integer, unless the type is text.
    """
    if isinstance(value, str) and kind is not Any:
        with suppress(ValueError):
            return _exact(from_text(value if Path in members_of(kind) else as_utf8(value)), kind)
    return _exact(value, kind)


def _exact(value: Any, kind: Any) -> Any:
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        for member in members:
            try:
                return _exact(value, member)
            except UserError:
                raise
            except ValueError:
                continue
    elif kind is Any or (origin is Literal and value in members):
        return value
    elif origin is list and isinstance(value, list):
        return [convert(item, members[0]) for item in value]
    elif is_mapping(kind) and isinstance(value, dict):
        return {str(key): from_text(item) if isinstance(item, str) else item for key, item in value.items()}
    elif kind is Path and isinstance(value, str | Path):
        return expand_path(value)
    elif kind is float and type(value) in (int, float):
        if abs(value) <= sys.float_info.max:  # neither infinite nor NaN
            return float(value)
    elif type(value) is kind:
        return as_utf8(value) if kind is str else value
    raise ValueError(f"{value!r} is not {describe(kind)}")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function of the Python API whose arguments are checked: UserError for one that is missing, unknown, or
    of another type than its annotation's.

    Numbers and texts of numpy count as Python's. Types besides those of settings are left to the function.
    """
    signature, hints = inspect.signature(function), functools.cache(typing.get_type_hints)  # hints are looked up at the first call

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        kinds = hints(function)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UserError(f"{function.__name__}: {error}") from None
        for name, value in bound.arguments.items():
            kind = kinds.get(name)
            if kind is not None and all(member in NAMES or typing.get_origin(member) is Literal for member in members_of(kind)):
                try:
                    bound.arguments[name] = _exact(value.item() if getattr(value, "shape", None) == () else value, kind)
                except ValueError:
                    shown = "of another type" if name.endswith("_token") else repr(value)[:100]
                    raise UserError(f"{name} is {shown}: {describe(kind)} is needed") from None
        return function(*bound.args, **bound.kwargs)

    return call


def describe(kind: Any) -> str:
    """Return the name of a type in words: `Optional[int]` is "an integer or null"."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, members))}"
    if origin is list:
        return f"a list (each {describe(members[0])})"
    if len(members_of(kind)) > 1:
        return " or ".join(map(describe, members))
    return "a mapping" if is_mapping(kind) else NAMES.get(kind, str(kind))
