"""Run the tests of LitGPT's source distribution with this package, and compare what fails with scripts/litgpt_tests.txt.

    python scripts/litgpt_tests.py [SDIST] [FILE ...]     FILE: test_lora.py, for example; default: all

pip fetches the distribution unless a path is given; without a network nothing is run. Each file runs in a process of its own, for which
this module is a pytest plugin too. It stands in for what the distribution leaves out (fixtures), for what only tests import (`_RunIf`,
converters of Hugging Face tensors), and for a small model that tests download. A name that the package lacks becomes one that fails when
it is used, so that the other tests of its file run. Functions that need a GPU are skipped.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import types
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

VERSION, MODEL = "0.5.13", "EleutherAI/pythia-14m"
ROOT = Path(__file__).parent.parent
LIST = Path(__file__).with_suffix(".txt")
SECONDS = 120  # of a test
FILES = ("model_config.yaml", "lit_model.pth", "tokenizer.json", "tokenizer_config.json")


# --- The plugin ---


def pytest_configure(config: pytest.Config) -> None:
    from lightning.fabric.utilities.testing import _runif_reasons

    import litgpt.download
    import litgpt.utils

    def run_if(thunder: bool = False, **kwargs: Any) -> Any:
        reasons, marks = _runif_reasons(**kwargs)
        return pytest.mark.skipif(thunder or bool(reasons), reason=f"needs {'Thunder' if thunder else ', '.join(reasons)}", **marks)

    litgpt.utils._RunIf = run_if  # type: ignore[attr-defined]
    litgpt.utils.kill_process_tree = lambda pid: subprocess.run(["pkill", "-P", str(pid)])
    litgpt.download.fetch = lambda name, folder, *_: shutil.copytree(os.environ["STAND_IN"], folder, dirs_exist_ok=True)
    for file in map(Path, config.args):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("litgpt."):
                stand_in(str(node.module), [alias.name for alias in node.names])
            elif isinstance(node, ast.Import):
                for name in (alias.name for alias in node.names if alias.name.startswith("litgpt.")):
                    stand_in(name, [])


def stand_in(name: str, members: list[str]) -> None:
    """Give the module the members that it lacks; make it if need be."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        parent, _, last = name.rpartition(".")
        stand_in(parent, [])
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = []
        setattr(sys.modules[parent], last, module)
    for member in members:
        if not hasattr(module, member):
            made = converted if member.startswith("copy_weights_") else type(member, (), {"__init__": absent})
            setattr(module, member, False if member.endswith("_AVAILABLE") else made)


def absent(self: Any, *args: Any, **kwargs: Any) -> None:
    raise NotImplementedError(f"litgpt lacks {type(self).__name__}")


def converted(*args: Any, **_: Any) -> None:
    """Fill the state dict, the last argument but one, from a Hugging Face model's, the last, by this package's tables of names."""
    from litgpt.convert import names

    state, weights = args[-2:]
    frame = inspect.currentframe()
    assert frame and frame.f_back
    test = frame.f_back.f_locals
    config, model = test["ours_config"], test["theirs_model"].config
    stored = {key: names.Stored(tuple(value.shape), lambda value=value: value) for key, value in weights.items()}
    plan = names.fit(stored, names.hf_table(model.model_type, config), config, "the test's model", "lm_head.weight" not in weights)
    state.update({key: value for keys, load in plan.items() for value in [load()] for key in keys})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"more than {SECONDS} seconds"))
    signal.alarm(SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    import torch

    dtype, folder = torch.get_default_dtype(), Path.cwd()
    yield
    torch.set_default_dtype(dtype)
    os.chdir(folder)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def fake_checkpoint_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints" / "tmp"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).touch()
    return folder


@pytest.fixture
def tensor_like() -> Any:
    import torch

    return type("Any tensor", (), {"__eq__": lambda _, other: isinstance(other, torch.Tensor)})()


@pytest.fixture
def alpaca_path(tmp_path: Path) -> Path:
    file = tmp_path / "alpaca" / "alpaca.json"
    file.parent.mkdir()
    file.write_text(json.dumps([{"instruction": f"Count to {i}.", "input": "", "output": str(i)} for i in range(12)]), encoding="utf-8")
    return file


@pytest.fixture
def mock_tokenizer() -> Any:
    return types.SimpleNamespace(bos_id=0, eos_id=1, stop_ids={1}, token_to_id=lambda _: None)


# --- The command ---


def fetch(folder: Path) -> Path | None:
    """Return the source distribution, or None where pip does not get it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-binary",
        ":all:",
        "-d",
        str(folder),
    ]
    subprocess.run([*command, f"litgpt=={VERSION}"])
    return next(iter(folder.glob("litgpt-*.tar.gz")), None)


def prepare(folder: Path, archive: Path) -> Path:
    """Unpack the tests beside links to what they look for there, and write the small model that they name. Return their folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from litgpt import GPT
    from litgpt.checkpoint import save_config
    from litgpt.convert.hf import to_hf

    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    work, model = folder / "work", folder / "work" / "checkpoints" / MODEL
    model.mkdir(parents=True)
    shutil.move(next(folder.glob("litgpt-*/tests")), work)
    for name in ("litgpt", "config_hub"):
        (work / name).symlink_to(ROOT / name)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}', encoding="utf-8")
    (model / "generation_config.json").write_text('{"eos_token_id": 0}', encoding="utf-8")
    torch.manual_seed(1)
    gpt = GPT.from_name(MODEL)
    with torch.no_grad():
        gpt.lm_head.weight[[0, *range(tokenizer.get_vocab_size(), gpt.config.vocab_size)]] = (
            0  # what has no text is never the most probable
        )
    torch.save(gpt.state_dict(), model / "lit_model.pth")
    save_config(gpt.config, model)
    (model / "config.json").write_text(json.dumps(to_hf(gpt.config)), encoding="utf-8")
    return work


def run(work: Path, file: Path) -> dict[str, tuple[str, str]]:
    """Return each function of a file with passed, failed or skipped, and the first failure's message."""
    words = ["-m", "pytest", "-q", "-p", "litgpt_tests", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(work)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    more = {"PATH": path, "PYTHONPATH": str(ROOT / "scripts"), "STAND_IN": str(work / "checkpoints" / MODEL), "HF_HUB_OFFLINE": "1"}
    report = work / f"{file.stem}.xml"
    with (work / f"{file.stem}.log").open("w") as log:
        command = [sys.executable, *words, "--junitxml", str(report), str(file)]
        subprocess.run(command, cwd=work, env={**os.environ, **more}, stdout=log, stderr=log)
    ends = {node.name: ("failed", "its file does not run") for node in ast.walk(ast.parse(file.read_text())) if is_test(node)}
    cases: dict[str, list[tuple[str, str]]] = {}
    for case in (case for case in ET.parse(report).iter("testcase") if case.get("classname")):
        parts = {part.tag: part.get("message") or "" for part in case}
        kind = "failed" if parts.keys() & {"failure", "error"} else "skipped" if "skipped" in parts else "passed"
        cases.setdefault(str(case.get("name")).partition("[")[0], []).append((kind, " ".join(parts.values())))
    for name, found in cases.items():
        ends[name] = min(found, key=lambda end: ["failed", "passed", "skipped"].index(end[0]))
    return ends


def is_test(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test_")


def main(words: list[str]) -> int:
    """Return 1 if other functions fail than the list says."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        archive = Path(words.pop(0)) if words and words[0].endswith(".gz") else fetch(folder)
        if archive is None:
            print("skipped: pip does not get the source distribution of LitGPT")
            return 0
        work = prepare(folder, archive)
        known = dict(line.split(": ", 1) for line in LIST.read_text(encoding="utf-8").splitlines())
        wrong, counts = 0, Counter[str]()
        for file in sorted((work / "tests").glob("test_*.py")):
            if words and file.name not in words:
                continue
            for test, (end, message) in run(work, file).items():
                key = f"{file.stem}.{test}"
                counts[f"failed: {known[key].partition(':')[0]}" if end == "failed" and key in known else end] += 1
                if (end == "failed") != (key in known):
                    wrong += 1
                    print(f"{key} {end}, the list says {known.get(key, 'that it passes')}: {message[:300]}", flush=True)
        print("\n".join(f"{count:4} {end}" for end, count in counts.most_common()))
        return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
