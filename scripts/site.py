"""What mkdocs adds to the pages of docs/: README.md as the first page, results of the benchmarks, and all settings of all commands.

The settings come from the commands' dataclasses and signatures, when the site is built.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonargparse
from mkdocs.structure.files import File

from litgpt.__main__ import COMMANDS, load
from litgpt.data import DataModule
from litgpt.help import parser_of
from litgpt.keys import Keys, known_classes

ROOT = Path(__file__).parent.parent
PAGES = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
LIKE = "finetune_lora"  # other commands that train list what they have besides
PARTS = re.compile(r"(?s)(.*?)\s*\((?:required, )?type: (.*?)(?:, default: (.*?))?(?:, known subclasses.*)?\)")
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)]*)?\)")
MOST = 80  # characters of a default


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    sources = {page: ROOT / name for page, name in PAGES.items()}
    sources |= {f"results/{file.name}": file for file in (ROOT / "benchmarks/results").glob("*") if file.suffix in (".md", ".png", ".txt")}
    for page, file in sources.items():
        content = file.read_bytes() if file.suffix == ".png" else relinked(file.read_text(encoding="utf-8"), file, files)
        files.append(File.generated(config, page, content=content))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    file = ROOT / "docs" / page.file.src_uri
    return relinked(markdown, file, files) if file.is_file() else markdown


def relinked(text: str, file: Path, files: Any) -> str:
    """Return a page whose links to files of the repository lead to their pages, or are plain text where there is none."""
    root = "../" if file.parent.name == "results" else ""

    def lead(match: re.Match[str]) -> str:
        begin, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target:
            return match[0]
        path = (file.parent / target).resolve()
        name = next((page for page, source in PAGES.items() if path == ROOT / source), None)
        if path.parent == ROOT / "benchmarks/results" and path.is_file() and path.suffix in (".md", ".png", ".txt"):
            name = f"results/{path.name}"
        if path.parent == ROOT / "docs" and path.suffix in (".md", ".ipynb"):
            name = path.name
        return f"{begin}{root}{name}{anchor})" if name else "](#)"

    return re.sub(r"\[([^\]]*)\]\(#\)", r"\1", LINK.sub(lead, text))


def reference() -> str:
    """Return the page of all commands and their settings."""
    lines = [
        "# All settings",
        "",
        "`litgpt COMMAND --help` shows the same. Keys are written `--key value`, or stand in a YAML file: `key: value`.",
        "",
    ]
    common = rows_of(LIKE)
    for name in sorted(COMMANDS, key=lambda name: name != LIKE):
        rows = rows_of(name)
        trains = name != LIKE and len(rows.keys() & common.keys()) > 20
        shown = {key: row for key, row in rows.items() if not (trains and common.get(key) == row)}
        lines += [f"## {name}", "", COMMANDS[name][1], ""]
        if trains:
            lines += [f"It has the settings of [{LIKE}](#{LIKE})" + (", and:" if shown else "."), ""]
        lines += table(shown)
    lines += ["## Data sets", "", "Named as `--data JSON`, with keys as `--data.json_path my.json`.", "", *data_sets()]
    return "\n".join(lines)


def rows_of(name: str) -> dict[str, tuple[str, str, str]]:
    """Return meaning, type and default of each setting of a command."""
    command = load(name)
    return rows(parser_of(f"litgpt {name}", command, Keys(command)))


def data_sets() -> Iterator[str]:
    """Yield the lines about the classes of litgpt.data."""
    for name, kind in sorted(known_classes(DataModule).items()):
        parser = jsonargparse.ArgumentParser()
        parser.add_class_arguments(kind)
        yield from (f"### {name}", "", str(kind.__doc__).split("\n\n")[0], "", *table(rows(parser)))


def table(rows: dict[str, tuple[str, str, str]]) -> list[str]:
    lines = [f"| `{key}` | {' | '.join(row)} |" for key, row in rows.items()]
    return ["| key | meaning | type | default |", "|---|---|---|---|", *lines, ""] if lines else []


def rows(parser: jsonargparse.ArgumentParser) -> dict[str, tuple[str, str, str]]:
    found_rows = {}
    formatter = parser._get_formatter()
    for action in parser._actions:
        key = (action.option_strings or [action.dest])[0]
        if (
            action.help in (None, argparse.SUPPRESS, "Path to a configuration file.")
            or key.endswith("help")
            or key in ("-h", "--print_config")
        ):
            continue
        found = PARTS.fullmatch(formatter._expand_help(action))
        parts = found.groups("") if found else (formatter._expand_help(action), "", "")
        meaning, kind, default = (re.sub(r"\s+", " ", part).replace("|", "\\|").replace("<", "&lt;") for part in parts)
        kind = re.sub(r"Optional\[(.*)\]", r"\1 or null", kind.replace("NoneType", "null"))
        kind = re.sub(r"(?:Union|Literal)\[(.*?)\]", r"\1", kind)
        found_rows[key.removeprefix("--")] = (meaning, f"`{kind}`" if kind else "", f"`{default[:MOST]}`" if default else "")
    return found_rows
