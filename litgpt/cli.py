"""From the words of a command line to the arguments of a function, by jsonargparse, with LitGPT's conventions on top.

    litgpt COMMAND FILE.yaml VALUE --key value ...

FILE.yaml is `--config FILE.yaml`; VALUE is the function's first parameter; a `train.*` key may leave `train.` out; what the command line
says counts more than a file, wherever it stands. Every key is checked before jsonargparse sees it, so that all unknown ones are reported at
once, and no class outside the allow-list is ever imported. Four kinds of parameter are told apart from plain ones by their annotation:

    a group   settings of litgpt.args                 train: TrainArgs            --train.epochs 3
    a class   one of litgpt, chosen by its name       data: Optional[DataModule]  --data JSON --data.json_path my.json
    a recipe  a class for the function to make        optimizer: Union[str, Dict] --optimizer.lr 2e-3
    a grid    lists of values for the other keys      grid: Optional[Grid]        --grid.lora_r '[4, 8]'
"""

import argparse
import dataclasses
import difflib
import importlib
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Union

import docstring_parser
import jsonargparse

from litgpt.args import EvalArgs, Grid, LogArgs, TrainArgs, require_allowed_class
from litgpt.errors import UserError
from litgpt.files import parse_yaml, read_yaml

GROUPS = (TrainArgs, EvalArgs, LogArgs)
SECRET = "access_token"
OLDER_NAMES = {"skip2lora_positions": "skip2lora_block_indices"}
YAML_ENDINGS = (".yaml", ".yml")


class UsageError(UserError):
    """Arguments that cannot be understood: exit code 2."""


class Setting(NamedTuple):
    """One value that the user gave."""

    key: str
    value: Any
    file: str = ""
    """The YAML file it stands in; empty for the command line, where every value is a string."""

    @property
    def place(self) -> str:
        return f"{self.file}: {self.key}" if self.file else f"--{self.key}"

    @property
    def root(self) -> str:
        return self.key.partition(".")[0].rstrip("+")

    @property
    def argument(self) -> str:
        """`json_path` of `data.init_args.json_path` and of `data.json_path`."""
        rest = self.key.partition(".")[2]
        return rest[len("init_args.") :] if rest.startswith("init_args.") else rest


def parse(prog: str, function: Callable[..., Any], argv: list[str]) -> dict[str, Any]:
    """The keyword arguments that `argv` gives for `function`. UsageError where it gives none; SystemExit(0) after --help."""
    try:
        return _parse(prog, Keys(function), argv)
    except UsageError:
        raise
    except UserError as error:
        raise UsageError(str(error)) from None


def _parse(prog: str, keys: "Keys", argv: list[str]) -> dict[str, Any]:
    words = _split(argv, keys)
    from_files = [setting for file in words.files for setting in keys.flatten(_read_yaml(file), file)]
    given = from_files + [setting for option in words.options for setting in keys.flatten_option(option)]
    given = _renamed(given)
    classes = keys.check(given)
    parser = _parser(prog, keys)
    merged = (*keys.recipes, *keys.grids)
    config = keys.merge([setting for setting in given if setting.file or setting.root in merged])
    options = [f"--{key}={_text(value)}" for key, value, file in given if not file and key.partition(".")[0] not in merged]
    if config:
        options.insert(0, f"--config={json.dumps(config, default=str)}")
    try:
        parsed = parser.parse_args([*options, *words.flags])
    except jsonargparse.ArgumentError as error:
        raise UsageError(_explain(str(error), given, {**keys.types, **_argument_types(classes)})) from None
    values = {name: value for name, value in parser.instantiate(parsed).items() if name in keys.parameters}
    seeds = [values.get("seed") or 0]
    for name in keys.grids:
        values[name] = keys.convert(name, values[name] or {})
        seeds += values[name].get("seed", [])
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise UsageError(f"seed is {seed}: a number from 0 to {2**32 - 1} is needed")
    return values


def _renamed(given: list[Setting]) -> list[Setting]:
    """Return the settings with the newer names of their keys. Raises UsageError where a key is given by both names."""
    keys = {setting.key for setting in given}
    result = []
    for setting in given:
        above, dot, last = setting.key.rpartition(".")
        newer = f"{above}{dot}{OLDER_NAMES.get(last, last)}"
        if newer != setting.key and newer in keys:
            raise UsageError(f"{setting.key} is the older name of {newer}: give one of them")
        result.append(setting._replace(key=newer))
    return result


class Keys:
    """The keys that a function takes, from its signature."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.parameters = inspect.signature(function).parameters
        required = [name for name, parameter in self.parameters.items() if parameter.default is parameter.empty]
        self.bare = list(dict.fromkeys([next(iter(self.parameters)), *required]))
        """Keys whose values may stand without a name, in this order: the first, and all without a default."""
        self.types: dict[str, Any] = {}
        self.groups: list[str] = []
        self.classes: dict[str, type] = {}
        """Key -> the base of the classes to choose from."""
        self.recipes: list[str] = []
        self.grids: list[str] = []
        for name, hint in typing.get_type_hints(function).items():
            options = typing.get_args(hint) or (hint,)
            bases = [option for option in options if isinstance(option, type) and option.__module__.startswith("litgpt.")]
            if hint in GROUPS:
                self.groups.append(name)
                self.types.update({f"{name}.{field}": kind for field, kind in typing.get_type_hints(hint).items()})
            elif name in self.parameters:
                self.types[name] = hint
                if Grid in options:
                    self.grids.append(name)
                elif bases:
                    self.classes[name] = bases[0]
                elif str in options and any(map(_is_mapping, options)):
                    self.recipes.append(name)

    def full(self, name: str) -> str:
        """`max_steps` -> `train.max_steps`, unless the function has a `max_steps` of its own; in a grid too."""
        root, _, rest = name.partition(".")
        if root in self.grids and rest:
            return f"{root}.{self.full(rest)}"
        return f"train.{name}" if name not in self.parameters and f"train.{name}" in self.types else name

    def takes(self, key: str) -> bool:
        key = key[:-1] if key.endswith("+") else key
        return key in self.types or any(key.startswith(f"{name}.") and _is_mapping(kind) for name, kind in self.types.items())

    def flatten(self, settings: dict[str, Any], file: str = "") -> Iterator[Setting]:
        """The settings of a YAML mapping, one for each key that ends in a value."""
        for key, value in settings.items():
            setting = Setting(str(key), value, file)
            _check_value(value, setting.place)
            if key in self.groups:
                if not isinstance(value, dict):
                    one = next(name for name in self.types if name.startswith(f"{key}."))
                    raise UsageError(f"{setting.place} needs keys below it, such as {one}")
                yield from (Setting(f"{key}.{name}", item, file) for name, item in value.items())
            elif key in self.grids and isinstance(value, dict):
                yield from (Setting(self.full(f"{key}.{name}"), item, file) for name, item in _leaves(value))
            elif key in (*self.classes, *self.recipes) and isinstance(value, dict):
                arguments = value.get("init_args") or {}
                if not isinstance(arguments, dict) or set(value) - {"class_path", "init_args"}:
                    raise UsageError(f"{setting.place} takes a class_path and the mapping init_args, nothing else")
                if "class_path" in value:
                    yield Setting(key, value["class_path"], file)
                yield from (Setting(f"{key}.init_args.{name}", item, file) for name, item in arguments.items())
            else:
                yield setting

    def flatten_option(self, option: Setting) -> list[Setting]:
        """The same for an option, which may name a file or hold inline YAML where a mapping is expected."""
        key, text, _ = option
        if key in (*self.groups, *self.classes, *self.recipes, *self.grids):
            if text.endswith(YAML_ENDINGS):
                return list(self.flatten({key: _read_yaml(text)}, text))
            value = _yaml_value(text)
            if isinstance(value, dict) or key in self.groups:
                return list(self.flatten({key: value}))
        _check_value(_yaml_value(text) if "class_path" in text else text, option.place)
        return [option]

    def check(self, given: list[Setting]) -> dict[str, type]:
        """The class chosen for each key that takes one. One UsageError for all unknown keys."""
        chosen: dict[str, type] = {}
        problems = []
        for setting in given:
            root, argument = setting.root, setting.argument
            if (root in (*self.classes, *self.recipes) and argument in ("", "class_path")) or (root in self.classes and argument == "help"):
                self._choose(setting, chosen)
            elif root in self.classes and root not in chosen:
                problems.append(f"{setting.place} needs --{root} with one of {', '.join(_known_classes(self.classes[root]))}")
            elif root in self.classes and argument.split(".")[0] not in _init_types(chosen[root]):
                near = _nearest(argument, _init_types(chosen[root]))
                problems.append(f"{setting.place}: {chosen[root].__name__} has no {argument!r}{near}")
            elif setting.value == "" and _takes_path(self.types.get(setting.key)):
                problems.append(f"{setting.place} is empty: name a file or a folder, or leave it out")
            elif root in self.grids:
                problems += self._grid_problems(setting)
            elif root not in self.classes and not self.takes(setting.key):
                bare = [name.partition(".")[2] for name in self.types if name.startswith("train.") and not setting.file]
                problems.append(f"{setting.place} is not a known key{_nearest(setting.key, [*self.types, *self.groups, *bare])}")
        if problems:
            raise UsageError("\n       ".join(problems))
        return chosen

    def _grid_problems(self, setting: Setting) -> list[str]:
        """What is wrong with one list of values, its values' types excepted."""
        root, _, key = setting.key.partition(".")
        value = setting.value if setting.file else _yaml_value(str(setting.value))
        if not key:
            return [f"{setting.place} needs keys below it and a list of values for each, such as --{root}.lora_r '[4, 8]'"]
        if key.partition(".")[0] in self.grids or not (self.takes(key) or key.partition(".")[0] in self.classes):
            return [f"{setting.place} is not a known key{_nearest(setting.key, [f'{root}.{name}' for name in self.types])}"]
        if not isinstance(value, list) or not value:
            return [f"{setting.place}: {_text(value)[:60]!r} is not a list of values to try, such as '[4, 8]'"]
        return []

    def convert(self, name: str, grid: Grid) -> Grid:
        """The lists of the grid `name`, each value as its key takes it. Raises UsageError for the first that it does not take."""
        converted: Grid = {}
        for key, values in grid.items():
            parser = jsonargparse.ArgumentParser(exit_on_error=False)
            parser.add_argument("--value", type=Any if key in self.classes else self.types.get(key, Any))
            try:
                converted[key] = [parser.parse_object({"value": value}).value for value in values]
            except jsonargparse.ArgumentError:
                kind = _describe(self.types[key])
                raise UsageError(f"{name}.{key}: {json.dumps(values, default=str)[:200]}: each value must be {kind}") from None
        return converted

    def _choose(self, setting: Setting, chosen: dict[str, type]) -> None:
        """Note the class that `setting` names. It is imported only after the allow-list has let it pass; a recipe's never is."""
        if setting.value in (None, "", "null"):
            return
        if not isinstance(setting.value, str):
            raise UsageError(f"{setting.place}: expected the name of a class, not {setting.value!r}")
        if "." in setting.value:
            require_allowed_class(setting.value, setting.place)
        if setting.root in self.classes:
            chosen[setting.root] = _find_class(self.classes[setting.root], setting)

    def merge(self, settings: list[Setting]) -> dict[str, Any]:
        """One configuration of many settings: the last one wins, and another class drops the arguments of the one before."""
        config: dict[str, Any] = {}
        for setting in settings:
            root, argument = setting.root, setting.argument
            value = setting.value if setting.file else _yaml_value(str(setting.value))
            if root in self.groups or (root in self.grids and argument):
                config.setdefault(root, {})[argument] = value
            elif root not in (*self.classes, *self.recipes) or (value is None and not argument):
                config[root] = value
            elif argument not in ("", "class_path"):
                spec = config.setdefault(root, self._default_recipe(root))
                spec.setdefault("init_args", {})[argument] = value
            elif value != config.setdefault(root, self._default_recipe(root)).get("class_path"):
                config[root] = {"class_path": value}
        return config

    def _default_recipe(self, key: str) -> dict[str, Any]:
        default = self.parameters[key].default
        return {"class_path": default} if isinstance(default, str) else {**default} if isinstance(default, dict) else {}


class _Words(NamedTuple):
    files: list[str]
    options: list[Setting]
    flags: list[str]


def _split(argv: list[str], keys: Keys) -> _Words:
    """Sort the words of a command line."""
    words = _Words([], [], [])
    free: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word[2:].partition("=")
        key = keys.full(name)
        if word in ("-h", "--help") or name == "print_config":
            words.flags.append(word)
            continue
        if not word.startswith("-"):
            (words.files if word.endswith(YAML_ENDINGS) else free).append(word)
            continue
        if not word.startswith("--") or not name:
            raise UsageError(f"{word!r} is not understood: keys are written --key value")
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        elif not equals and bool in (keys.types.get(key), *typing.get_args(keys.types.get(key))[:1]):
            value = "true"
        elif not equals and keys.takes(key):
            raise UsageError(f"--{name} needs a value")
        if key == "config" and not value:
            raise UsageError("--config needs a value: name a YAML file")
        if key == "config":
            words.files.append(value)
        else:
            words.options.append(Setting(key, value))
    if len(free) > len(keys.bare):
        raise UsageError(f"{free[len(keys.bare)]!r} stands alone: values are written --key value, and a list in quotes: '[0, 1, 2]'")
    words.options[:0] = [Setting(name, value) for name, value in zip(keys.bare, free, strict=False)]
    words.options.sort(key=lambda option: option.root in keys.classes and option.argument not in ("", "class_path"))
    return words


class _Help(jsonargparse.DefaultHelpFormatter):
    """Without Python's name of a path, and without the `--key+` that appends to a list."""

    def _expand_help(self, action: argparse.Action) -> str:
        text: str = super()._expand_help(action)
        return text.replace("<class 'Path'>", "path").replace("Optional[Path]", "Optional[path]")

    def _format_action_invocation(self, action: argparse.Action, *args: Any, **kwargs: Any) -> str:
        text: str = super()._format_action_invocation(action, *args, **kwargs)
        return re.sub(r", --\S+\+ \S+", "", text)


class _Parser(jsonargparse.ArgumentParser):
    """Does not print secrets with --print_config."""

    def dump(self, cfg: jsonargparse.Namespace, **kwargs: Any) -> str:
        cfg = cfg.clone()
        if cfg.get(SECRET):
            cfg[SECRET] = "***"
        text: str = super().dump(cfg, **kwargs)
        return text


def _parser(prog: str, keys: Keys) -> _Parser:
    jsonargparse.set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        docstring_parse_style=docstring_parser.DocstringStyle.GOOGLE,
        subclasses_enabled=list(keys.classes.values()),
        import_path_denylist=["*"],  # a second lock behind require_allowed_class; recipes are never imported here
        import_path_allowlist=["litgpt"],
    )
    usage = " ".join([prog, "[CONFIG.yaml]", *(f"[{name.upper()}]" for name in keys.bare), "[--KEY VALUE ...]"])
    parser = _Parser(prog=prog, exit_on_error=False, usage=usage, formatter_class=_Help)
    parser.add_argument("--config", action="config", help="A YAML file of these keys. The command line counts more.")
    for base in keys.classes.values():
        _known_classes(base)
    if isinstance(keys.function, type):
        parser.add_class_arguments(keys.function)
    else:
        parser.add_function_arguments(keys.function)
    return parser


def _leaves(settings: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """`{"optimizer": {"lr": [1]}}` -> `("optimizer.lr", [1])`"""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _yaml_value(text: str) -> Any:
    """What `text` means as YAML; `text` itself where it means nothing."""
    try:
        return parse_yaml(text, "")
    except UserError:
        return text


def _read_yaml(file: str) -> dict[str, Any]:
    settings = read_yaml(file)
    if not isinstance(settings, dict):
        found = "is empty" if settings is None else f"holds a {type(settings).__name__}"
        raise UsageError(f"the config file {file} {found}: it needs lines such as `checkpoint_dir: DIR`")
    return settings


def _check_value(value: Any, place: str) -> None:
    """Refuse every class_path below `value` that the allow-list does not name, and texts that no file's name can hold."""
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


def _known_classes(base: type) -> dict[str, type]:
    """Name -> class, for the subclasses of `base` that its package imports."""
    importlib.import_module(base.__module__.rpartition(".")[0])
    subclasses: list[type] = base.__subclasses__()
    below: dict[str, type] = {}
    for cls in subclasses:
        if cls.__module__.startswith("litgpt."):
            below.update({} if cls.__name__.startswith("_") else {cls.__name__: cls}, **_known_classes(cls))
    return below


def _find_class(base: type, setting: Setting) -> type:
    module, _, name = setting.value.rpartition(".")
    known = _known_classes(base)
    cls: Any = known.get(name)
    if module:
        try:
            cls = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError as error:
            if not module.startswith(str(error.name)):
                raise
            cls = None
    if isinstance(cls, type) and issubclass(cls, base) and cls is not base:
        return cls
    raise UsageError(f"{setting.place}: there is no {setting.value!r}{_nearest(name, list(known))}. Known: {', '.join(known)}")


def _init_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls if dataclasses.is_dataclass(cls) else inspect.getattr_static(cls, "__init__"))
    return {name: hints.get(name, Any) for name in inspect.signature(cls).parameters}


def _argument_types(classes: dict[str, type]) -> dict[str, Any]:
    return {f"{key}.{name}": kind for key, cls in classes.items() for name, kind in _init_types(cls).items()}


def _explain(message: str, given: list[Setting], kinds: dict[str, Any]) -> str:
    """One or two lines for jsonargparse's many: the key, the value and what was expected."""
    missing = re.search(r'(?:arguments are required: |Key ")([\w., ]+)(?:$|" is required)', message)
    if missing:
        return f"{missing[1]} is missing: name it on the command line or in a YAML file (--help lists all keys)"
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    candidates = [setting for setting in given if f"{setting.root}.{setting.argument}".rstrip(".") == key and key in kinds]
    for setting in sorted(candidates, key=lambda setting: f"value: {setting.value}" not in message)[:1]:
        value = "the value" if key == SECRET else repr(setting.value)
        return f"{setting.place}: {value} is not {_describe(kinds[key])}"
    for setting in given:
        if setting.key == SECRET:
            message = message.replace(str(setting.value), "***")
    return "\n       ".join(line.strip() for line in message.splitlines()[:2])


def _describe(kind: Any) -> str:
    """A type in words: `Optional[int]` -> an integer or null."""
    plain = {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: "a path", type(None): "null"}
    if kind in plain:
        return plain[kind]
    options = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, options))
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_describe, options))
    if typing.get_origin(kind) is list:
        return f"a list (each {_describe(options[0])})"
    return "a mapping" if _is_mapping(kind) else str(kind).replace("typing.", "")


def _is_mapping(kind: Any) -> bool:
    return dict in (kind, typing.get_origin(kind)) or any(_is_mapping(option) for option in typing.get_args(kind) if option is not kind)


def _takes_path(kind: Any) -> bool:
    return Path in (kind, *typing.get_args(kind))


def _nearest(name: str, names: Iterable[str]) -> str:
    by_lower = {known.lower(): known for known in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return f" (did you mean {by_lower[near[0]]}?)" if near else ""
