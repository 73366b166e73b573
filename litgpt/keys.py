"""The keys that a command takes: how a value finds its key, its type and its place in the settings.

Each value is checked and converted once, by the type of its key, and merged into one mapping; unknown keys and wrong values are reported
together. No class outside the allow-list is imported, except the user's own on the command line. The annotation of a parameter
distinguishes four kinds from plain ones:

    a group   settings of litgpt.args                    train: TrainArgs            --train.epochs 3
    a class   a subclass from litgpt, chosen by name     data: Optional[DataModule]  --data JSON --data.json_path my.json
    a recipe  a class for the command to construct       optimizer: Union[str, dict] --optimizer.lr 2e-3
    a grid    lists of values for the other keys         grid: Optional[Grid]        --grid.lora_r '[4, 8]'
"""

import dataclasses
import difflib
import importlib
import inspect
import json
import os
import sys
import types
import typing
from abc import ABC
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from litgpt.args import ALLOWED_CLASSES, SECRET, Grid, defaults, flat, older_names, require_allowed_class, require_seed
from litgpt.errors import UserError
from litgpt.values import NULLS, convert, describe, from_text, is_mapping, members_of

SEEDS = ("seed", "grid.seed")
MOST_SHOWN = 200  # characters of a value in a message
ELSEWHERE = {  # what other tools call a key -> its name here
    **dict.fromkeys(("lr", "learning_rate"), "optimizer.lr"),
    "weight_decay": "optimizer.weight_decay",
    **dict.fromkeys(("beta1", "beta2"), "optimizer.betas"),
    **dict.fromkeys(("num_epochs", "num_train_epochs", "n_epochs"), "train.epochs"),
    **dict.fromkeys(("batch_size", "train_batch_size"), "train.global_batch_size"),
    **dict.fromkeys(("per_device_train_batch_size", "device_batch_size"), "train.micro_batch_size"),
    **dict.fromkeys(("max_length", "seq_length", "sequence_len", "cutoff_len"), "train.max_seq_length"),
    **dict.fromkeys(("warmup_steps", "num_warmup_steps"), "train.lr_warmup_steps"),
    **dict.fromkeys(("warmup_ratio", "warmup_fraction"), "train.lr_warmup_fraction"),
    **dict.fromkeys(("lora_rank", "rank", "r"), "lora_r"),
    **dict.fromkeys(("output_dir", "output", "out", "save_dir"), "out_dir"),
    **dict.fromkeys(("dataset", "dataset_name", "dataset_path", "data_path", "train_file", "file"), "data"),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpus"), "devices"),
    **dict.fromkeys(("dtype", "torch_dtype", "bf16", "fp16"), "precision"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "bits"), "quantize"),
    **dict.fromkeys(("system", "system_prompt"), "sys_prompt"),
    "gradient_accumulation_steps": "train.global_batch_size",
    "eval_steps": "eval.interval",
    "save_steps": "train.save_interval",
    "logging_steps": "train.log_interval",
    "max_tokens": "max_new_tokens",
    "device": "accelerator",
    **dict.fromkeys(("model", "model_name", "model_name_or_path", "base_model", "model_filename"), "checkpoint_dir"),
}


class UsageError(UserError):
    """Arguments that a command does not take."""

    exit_code = 2


@contextmanager
def as_usage() -> Iterator[None]:
    """Reraise a UserError from the block as a UsageError."""
    try:
        yield
    except UserError as error:
        raise UsageError(str(error)) from None


class Setting(NamedTuple):
    """A value that the user gave to a key."""

    key: str  # its full name: train.epochs, data.json_path
    value: Any
    written: str  # the key as the user wrote it
    file: str = ""  # empty for the command line

    @property
    def place(self) -> str:
        return f"{self.file}: {self.written}" if self.file else f"--{self.written}"


class Keys:
    """The keys that a command takes, and the type of each."""

    def __init__(self, command: Callable[..., Any]) -> None:
        self.parameters = inspect.signature(command).parameters
        self.defaults = {name: parameter.default for name, parameter in self.parameters.items() if parameter.default is not parameter.empty}
        self.older: dict[str, str] = {}  # older name of a key -> its name
        if isinstance(command, type):
            self.defaults, self.older = defaults(command), older_names(command)
        required = [name for name in self.parameters if name not in self.defaults]
        # Their values may be given without a key, in this order.
        self.bare = list(dict.fromkeys([getattr(command, "first", next(iter(self.parameters))), *required]))
        self.types: dict[str, Any] = {}
        self.groups: list[str] = []
        self.classes: dict[str, type | None] = {}  # key -> base class, None for a recipe
        self.grids: list[str] = []
        hints = typing.get_type_hints(command)
        for name, hint in ((name, hints[name]) for name in self.parameters):
            members = members_of(hint)
            if dataclasses.is_dataclass(hint):
                self.groups.append(name)
                self.types.update({f"{name}.{field}": kind for field, kind in typing.get_type_hints(hint).items()})
                continue
            self.types[name] = hint
            if Grid in members:
                self.grids.append(name)
            elif bases := [member for member in members if isinstance(member, type) and ABC in member.__bases__]:
                self.classes[name] = bases[0]
            elif str in members and is_mapping(hint):
                self.classes[name] = None

    def full(self, written: str, short: bool) -> str:
        """Return the current, full name of a key: `train.epochs` for `epochs` (if `short`), `data.seed` for `data.init_args.seed`."""
        root, _, rest = written.partition(".")
        if root in self.grids and rest:
            return f"{root}.{self.full(rest, True)}"
        if root in self.classes:
            rest = rest.removeprefix("init_args.")
            return root if rest in ("", "class_path") else f"{root}.{rest}"
        group, dot, name = written.rpartition(".")
        name = f"{group}{dot}{self.older.get(name, name)}"
        return f"train.{name}" if short and name not in self.parameters and f"train.{name}" in self.types else name

    def of_mapping(self, mapping: dict[Any, Any], file: str = "") -> list[Setting]:
        """Return the settings of a YAML mapping, one for each key that ends in a value."""
        settings = []
        for key, value in mapping.items():
            place = Setting("", None, str(key), file).place
            _check_value(value, place)
            settings += [Setting(self.full(name, not file), item, name, file) for name, item in self._leaves(str(key), value, place)]
        return settings

    def _leaves(self, key: str, value: Any, place: str) -> Iterator[tuple[str, Any]]:
        """Yield the keys at and below `key` that end in a value, with their values."""
        if key in self.groups:
            if not isinstance(value, dict):
                raise UsageError(f"{place} needs keys below it, such as {next(name for name in self.types if name.startswith(f'{key}.'))}")
            yield from ((f"{key}.{name}", item) for name, item in value.items())
        elif key in self.grids and isinstance(value, dict):
            yield from flat(value, f"{key}.")
        elif key in self.classes and isinstance(value, dict):
            arguments = value.get("init_args") or {}
            if not isinstance(arguments, dict) or set(value) - {"class_path", "init_args"}:
                raise UsageError(f"{place} takes a class_path and the mapping init_args, nothing else")
            if "class_path" in value:
                yield key, value["class_path"]
            for name, item in arguments.items():
                is_style = name == "prompt_style" and isinstance(item, dict) and not item.get("init_args")  # LitGPT's form
                yield f"{key}.init_args.{name}", item.get("class_path", item) if is_style else item
        elif key in self.classes and (reader := _reader_of(self.classes[key], value)):
            yield key, reader[0]
            yield f"{key}.init_args.{reader[1]}", value
        else:
            yield key, value

    def merge(self, sources: list[list[Setting]]) -> dict[str, Any]:
        """Return the values, converted and nested as in a YAML file. Later sources override earlier ones.

        Raises one UsageError for all unknown keys and wrong values.
        """
        config: dict[str, Any] = {}
        problems = []
        written = {setting.written for source in sources for setting in source}
        for setting in [setting for source in sources for setting in sorted(source, key=lambda setting: setting.key not in self.classes)]:
            try:
                if setting.key in self.classes:
                    config[setting.key] = self._class(setting, config.get(setting.key))
                else:
                    self._put(setting, config)
            except UsageError as error:
                problems.append(str(error))
            if setting.key != setting.written and setting.key in written and setting.written.rpartition(".")[2] in self.older:
                problems.append(f"{setting.written} is the older name of {setting.key}: give one of them")
        if problems:
            raise UsageError("\n       ".join(problems))
        return config

    def _class(self, setting: Setting, before: dict[str, Any] | None) -> dict[str, Any] | None:
        """Return the class that a setting names, with those arguments from `before` that fit. A recipe's class is not imported."""
        base, name = self.classes[setting.key], None if setting.value in NULLS else setting.value
        if name is None and base:
            return None
        if not isinstance(name, str):
            raise UserError(f"{setting.place}: expected the name of a class, not {name!r}")
        by_hand = not setting.file and setting.written == setting.key  # --data mymodule.MyData
        is_own = base is not None and "." in name and by_hand and not name.startswith(ALLOWED_CLASSES)
        if "." in name and not is_own:
            require_allowed_class(name, setting.place)
        chosen: Any = name if base is None else _own_class(base, setting) if is_own else _find_class(base, setting)
        before = before or {"class_path": self.defaults.get(setting.key)}
        is_same = chosen == before["class_path"]
        arguments = {key: value for key, value in before.get("init_args", {}).items() if is_same or (base and key in _init_types(chosen))}
        return {"class_path": chosen, **({"init_args": arguments} if arguments else {})}

    def _put(self, setting: Setting, config: dict[str, Any]) -> None:
        """Convert a value and put it into `config`. Raises UsageError for an unknown key or a wrong value."""
        key, kind = setting.key, self._kind(setting, config)
        root, _, argument = key.partition(".")
        if setting.value == "" and Path in members_of(kind):
            raise UsageError(f"{setting.place} is empty: name a file or a folder, or leave it out")
        try:
            is_yaml = kind is Any and not setting.file and isinstance(setting.value, str)
            value = from_text(setting.value) if is_yaml else convert(setting.value, kind)
            if root in self.grids and not value:
                raise ValueError("nothing to try")
        except UserError as error:
            raise UsageError(f"{setting.place}: {error}") from None
        except ValueError:
            shown = "the value" if key.rpartition(".")[2] == SECRET else repr(setting.value)[:MOST_SHOWN]
            example = " to try, such as '[4, 8]'" if root in self.grids else ""
            _check_entries(setting, kind)
            raise UsageError(f"{setting.place}: {shown} is not {describe(kind)}{example}") from None
        if key in SEEDS and value is not None:
            with as_usage():
                for seed in value if isinstance(value, list) else [value]:
                    require_seed(seed, setting.place)
        if root in self.classes:
            below = config.setdefault(root, {"class_path": self.defaults[root]}).setdefault("init_args", {})
        else:
            below = config.setdefault(root, {}) if argument else config
        name = argument or root
        if (mapping := self._mapping_above(key)) and mapping != root:
            name, entry = argument[: len(mapping) - len(root) - 1], argument[len(mapping) - len(root) :]
            value = {**(below.get(name) or {}), entry: value}
        below[name] = value

    def _kind(self, setting: Setting, config: dict[str, Any]) -> Any:
        """Return the type of a setting's key. Raises UsageError if there is no such key."""
        key = setting.key
        kind: Any = None
        root, _, argument = key.partition(".")
        if root in self.grids:
            if not argument:
                raise UsageError(f"{setting.place} needs keys below it and a list of values for each, such as --{root}.lora_r '[4, 8]'")
            name = argument.partition(".")[0]
            if name not in self.grids:
                item = Any if name in self.classes else self.types.get(argument)
                kind = types.GenericAlias(list, (item,)) if item else None
        elif base := self.classes.get(root):
            cls = (config.get(root) or {}).get("class_path")
            if cls is None:
                raise UsageError(f"{setting.place} needs --{root} with one of {', '.join(known_classes(base))}")
            known = _init_types(cls)
            if argument not in known:
                elsewhere = next((name for name in (f"train.{argument}", argument) if name in self.types), "")
                meant = f" (did you mean {elsewhere}?)" if elsewhere else _nearest(argument, known)
                raise UsageError(f"{setting.place}: {cls.__name__} has no {argument!r}{meant}")
            kind = known[argument]
        else:
            kind = self.types.get(key, Any if root in self.classes or self._mapping_above(key) else None)
        if kind is None:
            bare = [name.removeprefix("train.") for name in self.types if name.startswith("train.") and not setting.file]
            in_grid = [f"{grid}.{name}" for grid in self.grids for name in self.types]
            raise UsageError(
                f"{setting.place} is not a known key{_nearest(key, [*self.types, *self.groups, *self.classes, *bare, *in_grid])}"
            )
        return kind

    def _mapping_above(self, key: str) -> str:
        """Return the key of the mapping in a group that `key` is an entry of: `log.metadata` for `log.metadata.x`."""
        above = (name for name in self.types if key.startswith(f"{name}.") and name not in self.classes)
        return next((name for name in above if is_mapping(self.types[name])), "")

    def arguments(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the value of every parameter: that of `config`, else its default."""
        if missing := [name for name in self.parameters if name not in config and name not in self.defaults]:
            raise UsageError(f"{', '.join(missing)} is missing: name it on the command line or in a YAML file (--help lists all keys)")
        values = {**self.defaults, **config}
        for name in self.groups:
            values[name] = dataclasses.replace(self.defaults[name], **config.get(name, {}))
        for name, base in self.classes.items():
            if base and (chosen := config.get(name)):
                values[name] = chosen["class_path"](**chosen.get("init_args", {}))
        values.update({name: values[name] or {} for name in self.grids})
        return {name: values[name] for name in self.parameters}


def _check_entries(setting: Setting, kind: Any) -> None:
    """Raise UsageError for an entry of a list that is not of the list's type."""
    entries = from_text(setting.value) if isinstance(setting.value, str) else setting.value
    for entry in entries if typing.get_origin(kind) is list and isinstance(entries, list) else ():
        try:
            convert(entry, member := typing.get_args(kind)[0])
        except ValueError:
            raise UsageError(f"{setting.place}: {json.dumps(entry, default=str)[:MOST_SHOWN]} is not {describe(member)}") from None


def _check_value(value: Any, place: str) -> None:
    """Raise UserError for a class_path at or below `value` that is not allowed, and for a text with a zero byte."""
    if isinstance(value, str) and "class_path" in value:
        value = from_text(value)
    if isinstance(value, dict):
        if "." in str(value.get("class_path", "")):
            require_allowed_class(value["class_path"], f"{place}.class_path")
        for key, item in value.items():
            _check_value(item, f"{place}.{key}")
    elif isinstance(value, list):
        for item in value:
            _check_value(item, place)
    elif isinstance(value, str) and "\0" in value:
        raise UsageError(f"{place} holds a zero byte: leave it out")


def _reader_of(base: Any, value: Any) -> tuple[str, str] | None:
    """Return the subclass of `base` that reads the path `value`, and its key for the path; None if `value` is not a path."""
    if not isinstance(value, str) or value in NULLS or not hasattr(base, "reader_of") or value in known_classes(base):
        return None
    return base.reader_of(value)


def known_classes(base: type) -> dict[str, type]:
    """Return the subclasses of `base` that its package imports, by name."""
    importlib.import_module(base.__module__.rpartition(".")[0])
    classes: dict[str, type] = {}
    subclasses: list[type] = base.__subclasses__()
    for cls in subclasses:
        if cls.__module__.startswith("litgpt.") and getattr(sys.modules[cls.__module__], cls.__name__, None) is cls:  # made at import
            classes.update({} if cls.__name__.startswith("_") or inspect.isabstract(cls) else {cls.__name__: cls}, **known_classes(cls))
    return classes


def _find_class(base: type, setting: Setting) -> type:
    """Return the subclass of `base` that an allowed name stands for."""
    module, _, name = setting.value.rpartition(".")
    with suppress(ModuleNotFoundError):
        importlib.import_module(module or base.__module__)
    known = known_classes(base)
    if name in known and (not module or getattr(sys.modules.get(module), name, None) is known[name]):
        return known[name]
    raise UserError(f"{setting.place}: there is no {setting.value!r}{_nearest(name, known)}. Known: {', '.join(known)}")


def _own_class(base: type, setting: Setting) -> type:
    """Return the user's own subclass of `base`, from an importable module or one in the current folder. Only the command line names it."""
    module, _, name = setting.value.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        own = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # the module is the user's code
        raise UserError(
            f"{setting.place}: {setting.value!r} is no file or folder here, and no class: {module!r} cannot be imported "
            f"({error or type(error).__name__})"
        ) from None
    ways = [name for name in ("records", "train_dataloader") if getattr(own, name, None) is not getattr(base, name, None)]
    if isinstance(own, type) and issubclass(own, base) and not inspect.isabstract(own) and ways:
        return own
    raise UserError(
        f"{setting.place}: {setting.value!r} is not a subclass of litgpt.data.{base.__name__} with a method `records`, or LitGPT's "
        "`setup`, `train_dataloader` and `val_dataloader`"
    )


def _init_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {name: hints.get(name, Any) for name in inspect.signature(cls).parameters}


def _nearest(name: str, names: Iterable[str]) -> str:
    by_lower = {known.lower(): known for known in names}
    above, _, last = name.lower().rpartition(".")
    for usual in (f"{above}.{ELSEWHERE[last]}", ELSEWHERE[last]) if last in ELSEWHERE else ():
        if usual in by_lower or usual.partition(".")[0] in by_lower.keys() - {above}:
            return f" (did you mean {usual}?)"
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[near[0]]}?)" if near else ""
