"""The structure of the package: imports point down a list of layers, without circles; files and functions are short; tests mirror it.

All imports count: at the top of a file, in functions, and those for type checkers alone.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "litgpt"
MOST_LINES_OF_A_FILE = 600
MOST_LINES_OF_A_FUNCTION = 75
MOST_LINES = 12_500  # of all files but families/

# From the bottom to the top. A module imports modules of its own line and of those above it here.
LAYERS = """
errors
text files atomic archive sample streams
values
args adapters.patterns adapters.settings objectives.settings
families
config
fused device
rope packing mlp attention latent model
vocabulary sharding
adapters lora
adapter
adapter_v2
loss
quantize optim logs tokenizer
packed
compiled
activations
memory
templates prompts
checkpoint
data
convert
objectives
generate.drafts generate.engine generate.sampling
train
finetune pretrain
convert.card convert.adapter convert.from_litgpt convert.add_tokens
generate api utils validate download integrations examine push
serve
keys help
evaluate
aliases litgpt cli __main__
"""

# Not yet as it should be: these sets only shrink, and shall be empty.
UPWARD: set[tuple[str, str]] = set()
IN_CIRCLES: set[str] = set()  # files and folders
LONG_FILES: set[str] = set()
LONG_FUNCTIONS: set[str] = set()
LINES_TOO_MANY = 15_656
WITHOUT_TESTS: set[str] = set()

# Files and folders without test files of their names, and the tests that cover them.
COVERED_BY = {
    "adapter_v2": "tests/test_adapter.py",
    "__main__": "tests/test_cli.py",
    "adapters.layers": "tests/test_lora.py",
    "sample": "tests/test_packing.py",
    "mlp": "tests/families/test_moe.py",
    "attention": "tests/test_model.py",
    "families": "tests/families/test_architectures.py",  # all families by the same tests
}


def module_of(file: Path) -> str:
    """Return "activations.cache" for litgpt/activations/cache.py, "activations" for its __init__.py, "litgpt" for the package's."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "litgpt"


FILES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all statements below a node, in functions and branches too; expressions, of which there are many more, have none."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):
            yield child
            yield from statements(child)


def imported_names(node: ast.AST) -> list[str]:
    """Return the dotted names that an import statement may refer to: of `from a import b` both modules and names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "imports are absolute"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports(module: str) -> set[str]:
    """Return the modules of litgpt that a module imports anywhere. `litgpt.__version__` is a constant of the package, no import."""
    found = set()
    for name in (name for node in statements(tree(module)) for name in imported_names(node)):
        if name.split(".")[0] == "litgpt" and name != "litgpt.__version__":
            inner = name.partition(".")[2]
            while inner and inner not in FILES:
                inner = inner.rpartition(".")[0]
            found.add(inner or "litgpt")
    return found - {module}


@cache
def graph() -> dict[str, set[str]]:
    return {module: imports(module) for module in FILES}


def layer(module: str) -> int:
    """Return the number of a module's layer: that of its own name, or else of the folder that it is in."""
    numbers = {name: number for number, line in enumerate(LAYERS.split("\n")) for name in line.split()}
    while module not in numbers:
        assert "." in module, f"{module} is in no layer: add it to LAYERS"
        module = module.rpartition(".")[0]
    return numbers[module]


def circles() -> list[list[str]]:
    """Return the groups of modules that import each other, directly or through others (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(graph()[module]):
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[-len(group) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for module in graph():
        if module not in index:
            visit(module)
    return groups


def test_the_checker_sees_every_import() -> None:
    """At the top, in functions, for type checkers; whatever its form."""
    assert {"errors", "streams"} <= graph()["__main__"]
    source = "import litgpt.args\nfrom litgpt import config\nif TYPE_CHECKING:\n    from litgpt.model import GPT\n"
    source += "def f():\n    from litgpt.convert.hf import convert_hf\n"
    names = [name for node in statements(ast.parse(source)) for name in imported_names(node)]
    assert names == ["litgpt.args", "litgpt.config", "litgpt.model.GPT", "litgpt.convert.hf.convert_hf"]


def test_no_circles() -> None:
    assert [group for group in circles() if not {module.split(".")[0] for module in group} <= IN_CIRCLES] == []


def test_imports_point_down() -> None:
    upward = {(module, other) for module, others in graph().items() for other in others if layer(other) > layer(module)}
    assert upward <= UPWARD, sorted(upward - UPWARD)


def test_every_layer_has_modules() -> None:
    for name in LAYERS.split():
        assert name in FILES, f"LAYERS names {name}, which does not exist"


def test_no_long_files() -> None:
    lengths = {module: len(file.read_text(encoding="utf-8").splitlines()) for module, file in FILES.items()}
    assert {module for module, length in lengths.items() if length > MOST_LINES_OF_A_FILE} <= LONG_FILES
    assert sum(length for module, length in lengths.items() if not module.startswith("families")) <= MOST_LINES + LINES_TOO_MANY


def test_no_long_functions() -> None:
    long = {
        f"{module}.{node.name}"
        for module in FILES
        for node in statements(tree(module))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (node.end_lineno or 0) - node.lineno >= MOST_LINES_OF_A_FUNCTION
    }
    assert long <= LONG_FUNCTIONS


def mirrored(module: str) -> Path:
    """Return tests/activations/test_cache.py for "activations.cache"."""
    parts = FILES[module].relative_to(PACKAGE)
    return ROOT / "tests" / parts.parent / f"test_{parts.name}"


def test_tests_mirror_the_package() -> None:
    missing = {
        module
        for module, file in FILES.items()
        if file.name != "__init__.py"
        and not mirrored(module).is_file()
        and not any(f"{module}.".startswith(f"{covered}.") for covered in COVERED_BY)
    }
    assert missing <= WITHOUT_TESTS, [str(mirrored(module).relative_to(ROOT)) for module in sorted(missing - WITHOUT_TESTS)]


def test_exceptions_are_needed() -> None:
    """What is covered elsewhere exists, has no tests of its own, and is named by the tests that cover it."""
    for module, tests in COVERED_BY.items():
        assert not mirrored(module).is_file(), f"{module} has its own tests: remove the exception"
        text = (ROOT / tests).read_text(encoding="utf-8").lower()
        assert module.rpartition(".")[2].replace("_", "") in text.replace("_", ""), (module, tests)


def test_a_wheel_has_the_files_of_the_package(tmp_path: Path) -> None:
    """All of them, and nothing else. It is built without a network."""
    pytest.importorskip("setuptools", "77")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "litgpt", ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    with zipfile.ZipFile(next((tmp_path / "dist").glob("*.whl"))) as wheel:
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {str(file.relative_to(ROOT)) for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert files == expected and {"litgpt/py.typed", "litgpt/serve/page.html"} <= files
