"""From the words of a command line to the arguments of a command, with LitGPT's conventions.

    litgpt COMMAND FILE.yaml VALUE --key value ...

FILE.yaml is `--config FILE.yaml`, a file or an https address; it may name another file that it overrides (`base: FILE.yaml`). VALUE is the
first parameter; `train.*` keys may leave out `train.`; the command line overrides files wherever it stands.
"""

import inspect
import json
import shlex
from collections.abc import Callable
from typing import Any
from urllib.parse import urljoin

from litgpt.files import MOST_YAML, decode_text, expand_path, fetch, is_url, parse_yaml, read_yaml
from litgpt.keys import Keys, Setting, UsageError, as_usage
from litgpt.values import from_text, members_of

YAML_ENDINGS = (".yaml", ".yml")
BASE = "base"  # key of a config file: another config file, which it overrides
MOST_BASES = 8
WARMUP_EPOCHS = "skip2lora_warmup_epochs"


def parse(
    prog: str, command: Callable[..., Any], argv: list[str], before: Callable[[dict[str, Any]], None] = lambda config: None
) -> dict[str, Any]:
    """Return the keyword arguments for `command`, defaults included. Raises UsageError, or SystemExit(0) after --help.

    `before` is called with the given settings, before others are derived from the model. A command's `data_defaults` replace a data
    module's own.
    """
    with as_usage():
        keys = Keys(command)
        files, options, flags = _split(argv, keys)
        sources = [source for file in files for source in _read_config(file, keys)]
        sources.append([setting for key, text in options for setting in _read_option(key, text, keys)])
        config = keys.merge(sources)
        if flags:
            from litgpt.help import show

            show(prog, command, keys, config, flags)
    before(config)
    for name, value in getattr(command, "data_defaults", {}).items():
        data = config.get("data")
        if data and name in inspect.signature(data["class_path"]).parameters:
            data.setdefault("init_args", {}).setdefault(name, value)
    if not files and getattr(command, "follows_data", False):
        from litgpt.train.recipe import complete

        config = complete(config, is_sweep=bool(keys.grids))
    with as_usage():
        return keys.arguments(config)


def _split(argv: list[str], keys: Keys) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """Return the config files, the options with their values, and the flags that jsonargparse answers."""
    files, options, flags, free, rest = list[str](), list[tuple[str, str]](), list[str](), list[str](), list(argv)
    while rest:
        word = rest.pop(0)
        name, equals, value = word[2:].partition("=")
        if word in ("-h", "--help") or name == "print_config":
            flags.append(word)
            continue
        if not word.startswith("-"):
            (files if word.endswith(YAML_ENDINGS) else free).append(word)
            continue
        if not word.startswith("--") or not name:
            raise UsageError(f"{word!r} is not understood: keys are written --key value")
        kind = keys.types.get(keys.full(name, True))
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
            if members_of(kind)[0] == list[str] and not value.startswith("["):  # --adapters a=A b=B
                count = next((i for i, word in enumerate(rest) if word.startswith("--")), len(rest))
                value, rest = json.dumps([value, *rest[:count]]), rest[count:]
        elif not equals and members_of(kind)[0] is bool:
            value = "true"
        elif not equals and kind is not None:
            raise UsageError(f"--{name} needs a value")
        if name == "config":
            if not value:
                raise UsageError("--config needs a value: name a YAML file")
            files.append(value)
        elif name.endswith(".help") and name.removesuffix(".help") in keys.classes:
            keys.merge([[Setting(name.removesuffix(".help"), value, name)]])
            flags.append(f"--{name}={value}")
        else:
            options.append((name, value))
    if len(free) > len(keys.bare):
        stray = free[len(keys.bare)]
        paths = [name for name in ("data", "checkpoint_dir") if name in {*keys.classes, *keys.types} - {*keys.bare}]
        meant = paths[0] if paths and expand_path(stray).exists() else "prompt" if "prompt" in keys.types else None
        hint = f"do you mean --{meant} {shlex.quote(stray)}?" if meant else "a list is written in quotes: '[0, 1, 2]'"
        raise UsageError(f"{stray!r} stands alone, and values are written --key value: {hint}")
    bare = dict(zip(keys.bare, free, strict=False))
    for name, value in options:
        if (key := keys.full(name, True)) in bare:
            raise UsageError(f"{key} is given twice, as {bare[key]!r} and as --{name} {value!r}: leave one of them out")
    return files, [*bare.items(), *options], flags


def _read_option(written: str, text: str, keys: Keys) -> list[Setting]:
    """Return the settings of an option, whose value may be a YAML file or inline YAML where a mapping is expected."""
    if written in (*keys.groups, *keys.classes, *keys.grids):
        if text.endswith(YAML_ENDINGS):
            return keys.of_mapping({written: _read_mapping(text)}, text)
        value = from_text(text)
        if isinstance(value, dict) or written in keys.groups:
            return keys.of_mapping({written: value})
    return keys.of_mapping({written: text})


def _read_config(file: str, keys: Keys, depth: int = 0) -> list[list[Setting]]:
    """Return the settings of a config file, after those of the file that it names as its base."""
    mapping, below = _read_mapping(file), list[list[Setting]]()
    if WARMUP_EPOCHS in keys.types and mapping.pop("skip2lora_warmup", False) and not mapping.get("skip2lora_warmup_steps"):
        mapping[WARMUP_EPOCHS] = mapping.get(WARMUP_EPOCHS) or 1.0  # a converted adapter's file says only that there was a warm-up
    if BASE in mapping and BASE not in keys.types:
        base = mapping.pop(BASE)
        if not isinstance(base, str) or not base.endswith(YAML_ENDINGS):
            raise UsageError(f"{file}: {BASE}: {base!r} is not the name of a YAML file")
        if depth == MOST_BASES:
            raise UsageError(f"{file}: {BASE}: a chain of more than {MOST_BASES} base files: check that no file is its own base")
        below = _read_config(urljoin(file, base) if is_url(file) else str(expand_path(file).parent / expand_path(base)), keys, depth + 1)
    return [*below, keys.of_mapping(mapping, file)]


def _read_mapping(file: str) -> dict[str, Any]:
    mapping = parse_yaml(decode_text(fetch(file, MOST_YAML), file), file) if is_url(file) else read_yaml(expand_path(file))
    if not isinstance(mapping, dict):
        content = "is empty" if mapping is None else f"holds a {type(mapping).__name__}"
        raise UsageError(f"the config file {file} {content}: it needs lines such as `checkpoint_dir: DIR`")
    return mapping
