"""`litgpt download` against a hub on this machine."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from litgpt import checkpoint, download, families as catalog
from litgpt.__main__ import main
from litgpt.checkpoint import Config
from tests.helpers import fake_hub, tiny
from tests.helpers.fake_hub import Hub

TOKEN = "hf_" + "secret" * 5
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
UNWANTED = ("README.md", "pytorch_model.bin", "consolidated.safetensors", "adapter_model.safetensors", "model.onnx", "training_args.bin")
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
CONVERTED = {"lit_model.pth", "model_config.yaml", "conversion.json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    """A model as the hub has it: what is wanted of it, and much that is not."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    config = transformers.LlamaConfig(**SIZES, vocab_size=320, max_position_embeddings=64)
    tiny.randomise(transformers.LlamaForCausalLM(config)).save_pretrained(folder)
    for name in UNWANTED:
        (folder / name).write_bytes(b"not needed")
    return write_tiny_tokenizer(folder)


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub that commands talk to; `checkpoints` is in a new folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with fake_hub.serve(Hub({"org/model": model})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code, and what was printed."""
    capsys.readouterr()
    code = main(["download", *words])
    out, err = capsys.readouterr()
    assert TOKEN not in out + err
    return code, out + err


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_only_what_is_needed_and_converted(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(capsys, "org/model")
    folder = Path("checkpoints/org/model")
    assert code == 0 and f"org/model is in {folder}, ready as a checkpoint_dir\n" in said, said
    assert hub.fetched() == TOKENIZER | {"config.json", "model.safetensors"}
    assert names(folder) == hub.fetched() | CONVERTED
    assert checkpoint.require_checkpoint(folder) == folder and Config.from_checkpoint(folder).n_embd == 32

    hub.requests.clear()
    assert run(capsys, "org/model")[0] == 0 and hub.fetched() == set(), "what is there is not fetched again"


def test_what_else_can_be_asked_for(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "org/model", "--tokenizer_only", "--checkpoint_dir", "a")[0] == 0
    assert names(Path("a/org/model")) == TOKENIZER | {"config.json"}
    assert run(capsys, "org/model", "--convert_checkpoint", "false", "--checkpoint_dir", "a")[0] == 0
    assert names(Path("a/org/model")) == TOKENIZER | {"config.json", "model.safetensors"}
    assert run(capsys, "org/model", "--dtype", "float16", "--checkpoint_dir", "a")[0] == 0
    weights = checkpoint.load_weights("a/org/model/lit_model.pth")
    assert {str(value.dtype) for value in weights.values()} == {"torch.float16"}
    code, said = run(capsys, "org/model", "--model_name", "pythia-14m", "--checkpoint_dir", "a")
    assert code == 1 and "is not of the model pythia-14m" in said


def test_more_templates(hub: Hub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Templates of other names, in their folder, come with the model; nothing else does from a folder."""
    more = tmp_path / "more"
    shutil.copytree(model, more)
    templates = more / "additional_chat_templates"
    templates.mkdir()
    for name in ("tool_use.jinja", "readme.txt"):
        (templates / name).write_text("{{ messages[0].content }}")
    hub.models["org/more"] = more
    for _ in range(2):
        code, said = run(capsys, "org/more")
        assert code == 0, said
    assert names(Path("checkpoints/org/more/additional_chat_templates")) == {"tool_use.jinja"}


def test_parts_that_an_index_names(hub: Hub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sharded = tmp_path / "sharded"
    transformers.LlamaForCausalLM.from_pretrained(model).save_pretrained(sharded, max_shard_size="40KB")
    shutil.copy(model / "tokenizer.json", sharded)
    parts = {file.name for file in sharded.glob("model-*.safetensors")}
    (sharded / "model-00099-of-00099.safetensors").write_bytes(b"not in the index")
    hub.models["org/sharded"] = sharded
    assert run(capsys, "org/sharded")[0] == 0
    assert len(parts) > 1 and {name for name in hub.fetched() if name.endswith("safetensors")} == parts

    (sharded / sorted(parts)[0]).unlink()
    code, said = run(capsys, "org/sharded", "--checkpoint_dir", "b")
    assert code == 1 and f"its model.safetensors.index.json names {sorted(parts)[0]}, which it lacks" in said


def test_bin_files_where_there_is_nothing_better(hub: Hub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old"
    shutil.copytree(model, old)
    (old / "model.safetensors").unlink()
    hub.models["org/old"] = old
    assert run(capsys, "org/old", "--convert_checkpoint", "false")[0] == 0 and "pytorch_model.bin" in hub.fetched()


def test_the_token_of_the_command_line_or_the_environment(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.token = TOKEN
    code, said = run(capsys, "org/model")
    assert code == 1 and said.startswith(f"Error: {hub.url}/org/model is gated: accept its terms there, then give --access_token")
    code, said = run(capsys, "org/model", "--access_token", "hf_wrong")
    assert code == 1 and "is gated" in said and "hf_wrong" not in said
    assert run(capsys, "org/model", "--access_token", TOKEN, "--checkpoint_dir", "a")[0] == 0
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run(capsys, "org/model", "--checkpoint_dir", "b")[0] == 0
    assert not any(TOKEN in file.read_text(errors="replace") for file in Path().rglob("*") if file.is_file())


def test_names_that_the_hub_does_not_know(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(capsys, "org/nothing")
    assert code == 1 and said.startswith(f"Error: {hub.url}/org/nothing does not exist, or is private") and len(said.splitlines()) == 1
    for name in ("pythia-14m", "../../etc", "org/../x", "https://x.y/org/model"):
        code, said = run(capsys, name)
        assert code == 1 and f"{name!r} is not a model's name on the hub: give ORG/NAME" in said
        assert ".." not in said.partition("give ORG/NAME")[2]
    assert "such as EleutherAI/pythia-14m" in run(capsys, "pythia-14m")[1]


def test_a_model_without_weights_that_can_be_read(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    (folder / "model.Q4_K.gguf").write_bytes(b"GGUF")
    hub.models["org/gguf"] = folder
    code, said = run(capsys, "org/gguf")
    assert code == 1 and "it holds model.Q4_K.gguf; get one of the .gguf files by hand" in said


@pytest.mark.parametrize("change", [{"model_type": "qwen2_vl"}, {"quantization_config": {"quant_method": "fp8"}}])
def test_what_cannot_be_converted_is_told_before_its_weights(
    hub: Hub, model: Path, change: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.models["org/other"] = other = shutil.copytree(model, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(json.loads((other / "config.json").read_text()) | change))
    code, said = run(capsys, "org/other")
    assert code == 1 and ("qwen2_vl" in said or "fp8" in said)
    assert "config.json" in hub.fetched() and "model.safetensors" not in hub.fetched()
    assert run(capsys, "org/other", "--convert_checkpoint", "false")[0] == 0 and "model.safetensors" in hub.fetched()


def test_an_interrupted_transfer_goes_on_in_the_next_run(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What arrived before the connection broke is not sent again, within a run or in the next one."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import http_get

    size = (model / "model.safetensors").stat().st_size
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))  # before it tries again
    hub.breaks["model.safetensors"] = 1
    assert run(capsys, "org/model", "--checkpoint_dir", "a", "--convert_checkpoint", "false")[0] == 0
    (within,) = hub.ranges
    assert size / 3 < int(within.removeprefix("bytes=").rstrip("-")) <= size / 2
    assert Path("a/org/model/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()

    def impatient(*args: object, **kwargs: object) -> None:
        if "_nb_retries" in kwargs:  # its second try
            raise ConnectionError("the line is dead")
        http_get(*args, **kwargs)  # type: ignore[arg-type]

    hub.ranges.clear()
    hub.breaks["model.safetensors"] = 1
    folder = Path("b/org/model")
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.http_get", impatient)
        code, said = run(capsys, "org/model", "--checkpoint_dir", "b", "--convert_checkpoint", "false")
    assert code == 1 and "Try again, the download resumes" in said and not hub.ranges
    assert f"into {folder}: model.safetensors (or model.safetensors.index.json and the files that it names), and" in said
    (partial,) = folder.glob(".model.safetensors.*.part")
    have = partial.stat().st_size
    assert 0 < have < size and not (folder / "model.safetensors").exists()
    assert run(capsys, "org/model", "--checkpoint_dir", "b")[0] == 0
    assert hub.ranges == [f"bytes={have}-"]
    assert names(folder) == TOKENIZER | {"config.json", "model.safetensors"} | CONVERTED


def test_a_wrong_content_is_noticed(hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("checkpoints/org/model")
    run(capsys, "org/model", "--tokenizer_only")
    listed = fake_hub.facts
    monkeypatch.setattr(fake_hub, "facts", lambda *file: {**listed(*file), "lfs": {"sha256": "a" * 64, "size": 1, "pointerSize": 1}})
    (folder / "config.json").unlink()
    for name in TOKENIZER:
        (folder / name).unlink()
    code, said = run(capsys, "org/model")
    assert code == 1 and "does not have the content that the hub announces" in said and names(folder) == set()


def test_a_file_of_the_users_own_is_not_replaced(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("checkpoints/org/model")
    folder.mkdir(parents=True)
    (folder / "tokenizer_config.json").write_text("{}")
    code, said = run(capsys, "org/model")
    assert code == 1 and f"{folder / 'tokenizer_config.json'} differs from the hub's file: move it away" in said
    assert names(folder) == {"tokenizer_config.json"}


def test_out_of_reach(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What is missing is named; files put there by hand are enough."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        folder = Path("checkpoints/org/model")
        code, said = run(capsys, "org/model")
        assert code == 1 and "org/model cannot be downloaded" in said and len(said.splitlines()) == 1
        assert f"into {folder}: config.json, tokenizer.json, model.safetensors (or" in said
        shutil.copytree(model, folder)
        (folder / "tokenizer.json").unlink()
        assert f"into {folder}: tokenizer.json, and" in run(capsys, "org/model")[1]
        shutil.copy(model / "tokenizer.json", folder)
        code, said = run(capsys, "org/model")
        assert code == 0 and "the files in" in said and "are used" in said and checkpoint.require_checkpoint(folder)


def test_a_hub_that_fails(hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, said = run(capsys, "org/model")
    assert code == 1 and "offline" in said.lower() and "get by hand" in said and hub.requests == []


@pytest.mark.parametrize("when", ["before", "while writing"])
def test_a_full_disk(hub: Hub, when: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if when == "before":
        usage = shutil.disk_usage(".")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2000))
        message = "2 KiB are free there: make room, or name another --checkpoint_dir"
    else:

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        message = "cannot be written to: No space left on device"
    code, said = run(capsys, "org/model")
    assert code == 1 and message in said and len(said.splitlines()) == 1


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(capsys, "list")
    listed = said.splitlines()
    assert code == 0 and listed == download.hub_names() and len(listed) == len(set(listed)) > 50
    assert {"EleutherAI/pythia-14m", "HuggingFaceTB/SmolLM2-135M"} <= set(listed)
    assert all(catalog.find(name) for name in listed)


@pytest.mark.slow
def test_the_command_as_a_process(hub: Hub, tmp_path: Path) -> None:
    """A name that some other import had loaded is missing there."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "litgpt", "download", "org/model", "--checkpoint_dir", str(tmp_path / "new")]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 0 and "ready as a checkpoint_dir" in ended.stdout, ended.stderr
    assert names(tmp_path / "new" / "org" / "model") >= CONVERTED | TOKENIZER


def test_a_model_without_a_tokenizer_is_not_called_ready(hub: Hub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    hub.models["org/bare"] = tmp_path / "bare"
    for _ in range(2):
        code, text = run(capsys, "org/bare")
        assert code == 1 and "lacks tokenizer.json: copy what is missing" in text and "ready" not in text


@pytest.mark.parametrize("address", ["https://huggingface.co/org/model", "org/model/", "https://huggingface.co/org/model/tree/main"])
def test_the_address_of_a_page_is_answered_with_the_name(address: str, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, address)
    assert code == 1 and "is not a model's name on the hub: give ORG/NAME, such as org/model (" in text
