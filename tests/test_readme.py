"""README.md and docs/: their commands are run or parsed as written, their links lead somewhere, and the tree is the tree."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from litgpt.__main__ import COMMANDS, load, main
from litgpt.cli import parse
from litgpt.examine import normalised
from litgpt.finetune.lora import Finetune
from litgpt.finetune.sweep import Sweep
from tests.helpers import tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").glob("*.md"))
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def command_lines(text: str, program: str) -> list[str]:
    return re.findall(rf"^ {{4,6}}({program} .+)$", text, re.MULTILINE)


COMMAND_LINES = [line for page in PAGES for line in command_lines(page.read_text(encoding="utf-8"), "litgpt")]
MODULE_LINES = [line for page in PAGES for line in command_lines(page.read_text(encoding="utf-8"), "python")]


def test_short() -> None:
    assert len(README.splitlines()) <= 110


@pytest.mark.parametrize("line", dict.fromkeys(COMMAND_LINES))
def test_every_command_is_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that follow from the data are left out: checkpoints and files of the pages do not exist here."""
    _, name, *words = shlex.split(line, comments=True)
    for command in (Finetune, Sweep):
        monkeypatch.setattr(command, "follows_data", False)
    assert name in COMMANDS
    assert parse(f"litgpt {name}", load(name), words)


@pytest.mark.parametrize("line", dict.fromkeys(MODULE_LINES))
def test_every_script_is_there_and_knows_its_options(line: str) -> None:
    """The options of `python evaluate_skip2lora_comparison.py` are checked in tests/benchmarks/test_comparison.py."""
    _, target, *words = shlex.split(line, comments=True)
    if target != "-m":
        assert (ROOT / target).is_file()
        return
    module = ROOT / words.pop(0).replace(".", "/")
    file = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
    text = file.read_text(encoding="utf-8")
    assert all(f'"{word}"' in text for word in words if word.startswith("--"))


def test_own_data_in_four_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_tiny_tokenizer: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The section "Your own data" from a Hugging Face folder to an answer, with a tiny model in the place of a real one."""
    section = README.split("## Your own data")[1].split("## ")[0]
    lines = command_lines(section, "litgpt")[:4]
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "path" / "to" / "model"
    tiny.hf_llama(vocab_size=512, max_position_embeddings=128).save_pretrained(model)
    write_tiny_tokenizer(model)
    records = [{"instruction": f"Say {word}.", "output": word} for word in WORDS]
    Path("my.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("Say one.\n"))
    for line in lines:
        assert main(shlex.split(line, comments=True)[1:]) == 0, capsys.readouterr().err
    assert [line.split()[1] for line in lines] == ["convert_to_litgpt", "data", "finetune", "chat"]
    for snippet in PYTHON:
        exec(snippet, {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """To a file or folder, and to a heading in it."""
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles], target


def test_the_tree_is_the_tree() -> None:
    """Every folder that git tracks has a line, and every line is a folder."""
    tree = README.split("## The tree")[1]
    done = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        pytest.skip(f"not a git checkout: {done.stderr}")
    paths = [Path(name).parts for name in done.stdout.split("\0")]
    for indent, parent in ((4, ()), (6, ("litgpt",))):
        level = len(parent)
        folders = {parts[level] for parts in paths if parts[:level] == parent and len(parts) > level + 1}
        listed = set(re.findall(rf"^ {{{indent}}}(\w+)/", tree, re.MULTILINE))
        assert listed == {folder for folder in folders if not folder.startswith(".")}
    for name in re.findall(r"(\w+\.py)\b", tree):
        assert (ROOT / "litgpt" / name).is_file(), name


LITGPT = (  # the commands of LitGPT 0.5.13
    "chat convert_from_litgpt convert_pretrained_checkpoint convert_to_litgpt download evaluate finetune finetune_adapter "
    "finetune_adapter_v2 finetune_full finetune_lora finetune_lora_legacy generate generate_adapter generate_adapter_v2 generate_full "
    "generate_sequentially generate_speculatively generate_tp merge_lora pretrain serve validate"
)


def test_the_table_of_litgpts_commands() -> None:
    """docs/litgpt.md has a row for each, says which are missing, and names commands that LitGPT does not have."""
    page = (ROOT / "docs/litgpt.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.MULTILINE))
    assert sorted(rows) == LITGPT.split()
    assert {name for name, text in rows.items() if text.strip() == "not here"} == set(rows) - set(COMMANDS)
    others = re.search(r"LitGPT does not have, among others, (.+?)\.", page)
    assert others and set(re.findall(r"`(\w+)`", others[1])) <= set(COMMANDS) - set(rows)


SNIPPETS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/litgpt.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_trainer_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write_base(tmp_path / "path/to/model", write_tiny_tokenizer)
    records = [{"instruction": f"Say {word}.", "output": word} for word in WORDS]
    Path("my.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    exec(
        SNIPPETS[0].replace("max_epochs=1)", "max_epochs=1, logger=False, enable_checkpointing=False, accelerator='cpu')"),
        {"__name__": "docs"},
    )
    assert Path("out/tuned/lit_model.pth").is_file()


def test_lora_on_gpt2_as_the_docs_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (snippet,) = SNIPPETS[1:]
    exec(snippet.replace("GPT2Config()", "GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=50)"), {"__name__": "docs"})
    assert Path("lora.safetensors").is_file()


def test_the_demo_asks_in_words_that_are_not_trained_on() -> None:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "scripts" / "demo.py")
    assert spec is not None and spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    records = [json.loads(line) for line in (ROOT / demo.DATA).read_text(encoding="utf-8").splitlines()]
    asked, trained = {normalised(text) for text in demo.QUESTIONS}, {normalised(record["instruction"]) for record in records}
    assert len(records) == len(trained) == 60 and not asked & trained
    answers = {record["output"] for record in records}
    assert len(answers) == len(asked) == 15
    assert all(sum(key in answer for answer in answers) == 1 for key in demo.QUESTIONS.values())


def notebook() -> Any:
    return json.loads((ROOT / "docs/own_data.ipynb").read_text(encoding="utf-8"))


def test_the_notebooks_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds no outputs, which differ from machine to machine. $MODEL is a variable of the notebook."""
    monkeypatch.setenv("MODEL", "path/to/model")
    for command in (Finetune, Sweep):
        monkeypatch.setattr(command, "follows_data", False)
    code = [cell for cell in notebook()["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in code)
    lines = [line for cell in code for line in "".join(cell["source"]).split("\n") if line.startswith("!litgpt")]
    assert len(lines) > 3
    for line in lines:
        _, name, *words = shlex.split(line.partition(" 2>")[0])
        assert parse(f"litgpt {name}", load(name), words)


@pytest.mark.slow
def test_the_notebook_runs(smollm2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From start to finish, on the real model, which then has the fact."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("MODEL", str(smollm2_dir))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    done = nbclient.NotebookClient(
        nbformat.read(ROOT / "docs/own_data.ipynb", 4), timeout=1800, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    texts = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in done.cells]
    assert any("14 Mill Lane" in text for text in texts[5:]) and (tmp_path / "out/shop-gguf/adapter.gguf").is_file()
