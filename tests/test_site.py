"""The site: all commands and their settings are on its page, and the messages of docs/troubleshooting.md are those of the package."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from litgpt.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
SOURCE = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "litgpt").rglob("*.py"))
MESSAGES = [
    message
    for row in re.findall(r"^\| (`[^|]+) \|", (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    for message in re.findall(r"`([^`]+)`", row)
]


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_is_one_of_the_package(message: str) -> None:
    assert message in SOURCE


@pytest.fixture(scope="module")
def site() -> Any:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "scripts/site.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_reference(site: Any) -> None:
    page = site.reference()
    assert set(re.findall(r"^## (\w+)$", page, re.MULTILINE)) == set(COMMANDS)
    assert "| `lora_r` | Rank of the adapters. | `int` | `8` |" in page
    assert "| `train.epochs` | Passes over the training samples. | `int or null` | `5` |" in page
    assert "### JSON" in page and "| `json_path` |" in page and "access_token" in page
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert len(rows) > 200 and all(re.fullmatch(r"(\|[^|\\]*(?:\\\|[^|\\]*)*){4}\|", row) for row in rows)


def test_links_lead_to_pages_or_become_text(site: Any) -> None:
    text = "[a](docs/own_data.md#x) [n](docs/own_data.ipynb) [b](config_hub) [c](CHANGELOG.md) [d](benchmarks/results/peers.md) [e](https://a.b/c)"
    assert (
        site.relinked(text, ROOT / "README.md", None)
        == "[a](own_data.md#x) [n](own_data.ipynb) b [c](CHANGELOG.md) [d](results/peers.md) [e](https://a.b/c)"
    )
