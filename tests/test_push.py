"""`litgpt push` to a hub on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

from litgpt.__main__ import main
from litgpt.api import LLM
from tests.helpers import fake_hub, tiny
from tests.helpers.fake_hub import Hub

TOKEN = "hf_" + "secret" * 5
LORA = {"lora_r": 4, "lora_query": True, "lora_value": True}
SKIP = {"lora_r": 4, "skip2lora_enabled": True, "skip2lora_block_indices": [0, 2]}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with fake_hub.serve(Hub({}, TOKEN, uploads=tmp_path / "hub")) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def base(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    return tiny.write_base(tmp_path / "base", write_tiny_tokenizer)


@pytest.fixture
def push(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*words: object, token: str | None = TOKEN) -> tuple[int, str]:
        code = main(["push", *map(str, words), *(["--access_token", token] if token else [])])
        out, err = capsys.readouterr()
        assert TOKEN not in out + err
        return code, out + err

    return run


def adapter(folder: Path, base: Path, settings: dict[str, Any]) -> Path:
    return tiny.write_adapter(folder, base, tiny.move_adapters(tiny.tiny(**tiny.SPEAKING, **settings)), **settings)


def test_a_lora_run_becomes_an_adapter_that_peft_loads(hub: Hub, base: Path, push: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    adapter(run / "final", base, LORA)
    code, out = push(run, "me/my-lora", "--private")
    assert code == 0, out
    assert out.startswith(f"{hub.url}/me/my-lora\n") and hub.visibility == {"me/my-lora": "private"}
    uploaded = hub.models["me/my-lora"]
    assert {file.name for file in uploaded.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert str(tmp_path) not in (uploaded / "README.md").read_text() and ', "my-lora")' in (uploaded / "README.md").read_text()
    assert main(["convert_from_litgpt", str(base), str(tmp_path / "hf")]) == 0
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ours, idx = LLM.load(run, precision="32-true").model, tiny.ids(1, 9)
    torch.testing.assert_close(PeftModel.from_pretrained(hf, str(uploaded))(idx).logits, ours(idx), rtol=1e-4, atol=1e-4)
    assert [path.name for path in run.iterdir()] == ["final"]  # the conversion's folder is gone


def test_a_skip2lora_adapter(hub: Hub, base: Path, push: Any, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "skip", base, SKIP)
    assert push(folder, "me/skip")[0] == 0
    files = {file.name for file in hub.models["me/skip"].iterdir()}
    assert files == {"README.md", "skip2lora_config.json", "skip2lora_adapter.safetensors"} and hub.visibility == {"me/skip": None}


def test_a_checkpoint_becomes_a_model_that_transformers_loads(hub: Hub, base: Path, push: Any) -> None:
    assert push(base, "me/model")[0] == 0
    uploaded = hub.models["me/model"]
    assert not {"lit_model.pth", "model_config.yaml", "hyperparameters.yaml"} & {file.name for file in uploaded.iterdir()}
    idx = tiny.ids(1, 9)
    hf = transformers.AutoModelForCausalLM.from_pretrained(uploaded)
    torch.testing.assert_close(hf(idx).logits, LLM.load(base, precision="32-true").model(idx), rtol=1e-4, atol=1e-4)


def test_a_folder_in_a_public_form_goes_up_without_other_files(hub: Hub, base: Path, push: Any, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    assert main(["convert_from_litgpt", str(base), str(folder)]) == 0
    for name in ("lit_model.pth", "conversion.json", ".env", "notes.txt", "training_state.json"):
        (folder / name).write_text("private")
    assert push(folder, "me/model")[0] == 0
    uploaded = hub.models["me/model"]
    assert load_file(uploaded / "model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    assert not any(file.read_text(errors="replace") == "private" for file in uploaded.iterdir())
    assert json.loads((uploaded / "config.json").read_text())["model_type"] == "llama"


def test_only_the_model_s_own_files_go_up_whatever_their_names(hub: Hub, base: Path, push: Any, tmp_path: Path) -> None:
    """Not the checkpoints of a Trainer in folders below; a name with brackets is no pattern."""
    folder = tmp_path / "hf"
    assert main(["convert_from_litgpt", str(base), str(folder)]) == 0
    (folder / "checkpoint-5").mkdir()
    for name in ("checkpoint-5/model.safetensors", "checkpoint-5/optimizer.safetensors", "model.v1 [q8].gguf"):
        (folder / name).write_text("tensors")
    code, out = push(folder, "me/model")
    assert code == 0, out
    uploaded = hub.models["me/model"]
    files = {file.relative_to(uploaded).as_posix() for file in uploaded.rglob("*") if file.is_file()}
    assert {name for name in files if name.endswith(("gguf", "safetensors"))} == {"model.safetensors", "model.v1 [q8].gguf"}


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "model-2.safetensors", "additional_chat_templates/a.jinja"])
def test_a_link_out_of_the_folder_is_not_followed(name: str, hub: Hub, base: Path, push: Any, tmp_path: Path) -> None:
    folder, key = tmp_path / "hf", tmp_path / "id_rsa"
    assert main(["convert_from_litgpt", str(base), str(folder)]) == 0
    key.write_text("private")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(key)
    code, out = push(folder, "me/model")
    assert code == 1 and f"{name} is a link to {key}, outside its folder" in out and not hub.models


def test_a_line_break_in_a_name_is_shown_as_one(hub: Hub, base: Path, push: Any, tmp_path: Path) -> None:
    assert main(["convert_from_litgpt", str(base), str(tmp_path / "hf")]) == 0
    (tmp_path / "hf" / "LICENSE\nUploading 0 files").touch()
    assert "LICENSE\\nUploading 0 files, " in push(tmp_path / "hf", "me/model")[1]


def test_refusals(hub: Hub, base: Path, push: Any, tmp_path: Path) -> None:
    (tmp_path / ".scratch.litgpt-0123abcd.tmp").mkdir()  # of an upload that was killed
    code, out = push(base, "me/model", token=None)
    assert code == 1 and "a token that may write there" in out and "401" in out
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    code, out = push(base, "me/model", token="hf_" + "wrong" * 5)
    assert code == 1 and "403" in out and "wrongwrong" not in out
    for words, message in (
        ((base, "no slash"), "give ORG/NAME"),
        ((tmp_path / "none", "me/x"), "does not exist"),
        ((tmp_path, "me/x"), "lacks"),
    ):
        code, out = push(*words)
        assert code == 1 and message in out, out


def test_an_unreachable_hub(base: Path, push: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, out = push(base, "me/model")
    assert code == 1 and "the upload failed" in out and "Traceback" not in out
