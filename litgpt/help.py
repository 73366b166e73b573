"""The help and the configuration of a command, printed by jsonargparse."""

import argparse
import json
import re
from collections.abc import Callable
from typing import Any

import docstring_parser
import jsonargparse

from litgpt.args import SECRET
from litgpt.keys import Keys, UsageError, known_classes
from litgpt.text import first_line


class _Help(jsonargparse.DefaultHelpFormatter):
    """Omits Python's name of a path, the `--key+` that appends to a list, and the backspace before optional values."""

    def _expand_help(self, action: argparse.Action) -> str:
        text: str = super()._expand_help(action)
        return text.replace("<class 'Path'>", "path").replace("Optional[Path]", "Optional[path]")

    def _format_action_invocation(self, action: argparse.Action, *args: Any, **kwargs: Any) -> str:
        text: str = super()._format_action_invocation(action, *args, **kwargs)
        return re.sub(r", --\S+\+ \S+", "", text.replace(" \b", ""))


def show(prog: str, command: Callable[..., Any], keys: Keys, config: dict[str, Any], flags: list[str]) -> None:
    """Answer the flags (--help, --print_config, --data.help=CLASS) and raise SystemExit(0). Tokens are not printed."""
    for settings in (config, *((config.get(name) or {}).get("init_args", {}) for name in keys.classes)):
        if settings.get(SECRET):
            settings[SECRET] = "***"
    values = json.dumps(config, default=lambda value: f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else str(value))
    try:
        parser_of(prog, command, keys).parse_args([f"--config={values}", *flags])
    except jsonargparse.ArgumentError as error:
        raise UsageError(first_line(error)) from None


def parser_of(prog: str, command: Callable[..., Any], keys: Keys) -> jsonargparse.ArgumentParser:
    """Return jsonargparse's parser of a command. It imports no class from outside litgpt either."""
    bases: list[type | str] = [base for base in keys.classes.values() if base]
    jsonargparse.set_parsing_settings(
        docstring_parse_attribute_docstrings=True,
        docstring_parse_style=docstring_parser.DocstringStyle.GOOGLE,
        subclasses_enabled=bases,
        import_path_denylist=["*"],
        import_path_allowlist=["litgpt"],
    )
    usage = " ".join([prog, "[CONFIG.yaml]", *(f"[{name.upper()}]" for name in keys.bare), "[--KEY VALUE ...]"])
    parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False, usage=usage, formatter_class=_Help)
    parser.add_argument("--config", action="config", help="A YAML file of these keys. Its key base names another file, which it overrides.")
    for base in filter(None, keys.classes.values()):
        known_classes(base)  # imports them
    if isinstance(command, type):
        parser.add_class_arguments(command)
    else:
        parser.add_function_arguments(command)
    return parser
