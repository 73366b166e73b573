"""The versions that are installed: pinned, without the poisoned ones, and none older than the fix of a hole that our promises rest on.

`pip-audit --strict --no-deps --disable-pip -r constraints.txt` is the whole answer where an advisory service can be reached. Without
--strict it passes where it could look up nothing.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest needs there

ROOT = Path(__file__).parents[3]
POISONED = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
FIXED_IN = {
    "torch": ("2.6.0", "CVE-2025-32434: weights_only=True ran code"),
    "jinja2": ("3.1.6", "CVE-2025-27516: |attr reached str.format in the sandbox"),
    "safetensors": ("0.3.0", "the audited header checks"),
    "pyyaml": ("5.4", "CVE-2020-14343: full_load ran code"),
    "transformers": ("4.53.0", "CVE-2025-3933 and others: patterns that backtrack"),
    "huggingface-hub": ("0.23.0", "tokens left out of redirects to other hosts"),
    "requests": ("2.32.4", "CVE-2024-47081: credentials of .netrc to other hosts"),
    "urllib3": ("2.6.0", "CVE-2025-66418: unbounded decompression"),
    "aiohttp": ("3.12.14", "CVE-2025-53643: request smuggling"),
    "h11": ("0.16.0", "CVE-2025-43859: request smuggling"),
    "pillow": ("11.3.0", "CVE-2025-48379: a write beyond a buffer"),
    "protobuf": ("6.31.1", "CVE-2025-4565: unbounded recursion"),
    "setuptools": ("78.1.1", "CVE-2025-47273: path traversal"),
    "filelock": ("3.20.1", "CVE-2025-68146: a link race on lock files"),
    "werkzeug": ("3.1.4", "CVE-2025-66221: device names on Windows"),
    "fonttools": ("4.60.2", "CVE-2025-66034: path traversal"),
    "virtualenv": ("20.26.6", "CVE-2024-53899: command injection"),
}


def name_of(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def pins() -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def dependencies() -> list[Requirement]:
    """What pyproject.toml asks for, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for group in (project["dependencies"], *project["optional-dependencies"].values()) for text in group]


def test_every_version_is_pinned() -> None:
    loose = [str(pin) for pin in pins() if len(pin.specifier) != 1 or next(iter(pin.specifier)).operator != "==" or pin.url]
    assert not loose and len(pins()) > 50


@pytest.mark.parametrize(("package", "versions"), POISONED.items())
def test_poisoned_releases_are_excluded(package: str, versions: tuple[str, ...]) -> None:
    """2.6.2 and 2.6.3 of Lightning were taken over: neither a lock nor a plain `pip install` may take them."""
    locked = [pin for pin in pins() if name_of(pin.name) == package]
    assert locked and not any(pin.specifier.contains(version) for pin in locked for version in versions)
    asked = [requirement for requirement in dependencies() if name_of(requirement.name) == package]
    assert asked or package == "pytorch-lightning"  # which comes with lightning, in its version
    assert not any(requirement.specifier.contains(version) for requirement in asked for version in versions)


@pytest.mark.parametrize("package", FIXED_IN)
def test_known_holes_are_closed(package: str) -> None:
    least, why = FIXED_IN[package]
    for pin in (pin for pin in pins() if name_of(pin.name) == package):
        version = next(iter(pin.specifier)).version
        assert Version(version) >= Version(least), why
    for requirement in (one for one in dependencies() if name_of(one.name) == package and package in ("torch",)):
        assert not requirement.specifier.contains("2.5.1"), why


def test_what_is_installed_is_what_is_locked() -> None:
    """The tests of these folders hold for the versions that the lock names."""
    from importlib.metadata import version

    for package in ("jinja2", "torch", "safetensors", "pyyaml", "jsonargparse", "gguf", "tokenizers", "lightning"):
        locked = [next(iter(pin.specifier)).version for pin in pins() if name_of(pin.name) == package]
        assert version(package).partition("+")[0] in locked


def test_the_page_names_tests_that_exist() -> None:
    """docs/security.md, promise by promise."""
    named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", (ROOT / "docs" / "security.md").read_text())
    assert len(named) > 12
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text()]
    assert not missing
