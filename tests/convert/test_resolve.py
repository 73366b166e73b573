"""A checkpoint in any form, wherever one is asked for: converted once, remembered, never at the cost of the user's files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from litgpt import LLM, checkpoint
from litgpt.__main__ import main
from litgpt.convert.gguf import convert as conversion
from litgpt.convert.resolve import locate, open_checkpoint
from litgpt.convert.to_litgpt import convert_to_litgpt
from litgpt.errors import UserError
from tests.helpers import gguf_files, tiny
from tests.helpers.cases import quick

Write = Callable[[Path], Path]
FILES_OF_A_CONVERSION = ("lit_model.pth", "model_config.yaml", "conversion.json", ".conversion.litgpt.tmp")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test in a folder of its own, with its own `checkpoints`."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hf(tmp_path: Path, write_tiny_tokenizer: Write) -> Path:
    """A Hugging Face folder with the tiny tokenizer."""
    config = transformers.LlamaConfig(**SIZES, vocab_size=320, max_position_embeddings=256, tie_word_embeddings=False)
    write_hf(tmp_path / "hub" / "tiny-llama", config, seed=1)
    return write_tiny_tokenizer(tmp_path / "hub" / "tiny-llama")


def write_hf(folder: Path, config: transformers.LlamaConfig, seed: int) -> transformers.PreTrainedModel:
    model = tiny.randomise(transformers.LlamaForCausalLM(config), seed)
    model.save_pretrained(folder)
    return model


def write_gguf(file: Path, tokenizer_dir: Path, seed: int = 1) -> Path:
    """Write a small Llama in llama.cpp's format."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return gguf_files.write(file, gguf_files.llama(seed), gguf_files.byte_level_of(tokenizer_dir))


def converted(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that say so."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("converted ")]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def wte(folder: Path) -> torch.Tensor:
    return checkpoint.load_weights(folder / "lit_model.pth")["transformer.wte.weight"]


def test_folders_that_need_nothing(tmp_path: Path, write_tiny_tokenizer: Write) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    adapter = tiny.write_adapter(tmp_path / "adapter", base, tiny.tiny(lora_r=2, lora_query=True), lora_r=2, lora_query=True)
    before = {folder: names(folder) for folder in (base, adapter)}
    assert all(open_checkpoint(folder) == folder and names(folder) == before[folder] for folder in before)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert open_checkpoint(empty) == empty, "for require_checkpoint to judge"


def test_a_hugging_face_folder_is_converted_in_place_and_once(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(hf)
    assert open_checkpoint(hf) == hf
    (line,) = converted(capsys)
    assert str(hf) in line and "(once" in line
    assert names(hf) - before == {"lit_model.pth", "model_config.yaml", "conversion.json"}
    assert checkpoint.require_checkpoint(hf) == hf
    stamp = (hf / "lit_model.pth").stat().st_mtime_ns
    assert open_checkpoint(str(hf)) == hf and converted(capsys) == [] and (hf / "lit_model.pth").stat().st_mtime_ns == stamp
    ids = torch.arange(3, 40)[None]
    expected = transformers.AutoModelForCausalLM.from_pretrained(hf)(ids).logits
    torch.testing.assert_close(LLM.load(hf, precision="32-true").model(ids), expected, atol=1e-4, rtol=1e-4)


def test_a_read_only_folder_is_converted_elsewhere(hf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = names(hf)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != hf)
    assert open_checkpoint(hf) == open_checkpoint(hf) == Path("checkpoints/tiny-llama")
    assert len(converted(capsys)) == 1 and names(hf) == before
    assert checkpoint.Config.from_checkpoint("checkpoints/tiny-llama").n_embd == 32


def test_a_gguf_file_and_a_folder_with_one(tmp_path: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "models" / "tiny.Q8_0.gguf", tiny_tokenizer_dir)
    assert open_checkpoint(file) == open_checkpoint(file.parent) == Path("checkpoints/tiny.Q8_0")
    assert len(converted(capsys)) == 1 and names(file.parent) == {file.name}
    assert open_checkpoint("tiny.Q8_0") == Path("checkpoints/tiny.Q8_0"), "below checkpoints by its name"
    shutil.copy(file, file.with_name("other.gguf"))
    with pytest.raises(UserError, match=r"holds 2 GGUF files: name one of them, such as .*\.gguf"):
        open_checkpoint(file.parent)


def test_a_file_converted_by_hand_is_known(tmp_path: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer_dir)
    convert_to_litgpt(file)
    assert open_checkpoint(file) == Path("checkpoints/tiny") and converted(capsys) == []


def test_what_a_killed_conversion_left_beside_the_complete_one_is_removed(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    folder = open_checkpoint(write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer_dir))
    leftover = folder.with_name(f".{folder.name}.litgpt-0a1b2c3d.tmp.old")
    leftover.mkdir()
    assert open_checkpoint(tmp_path / "tiny.gguf") == folder and folder.is_dir() and not leftover.exists()


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/d\xe9")
    with pytest.raises(UserError, match="its name is not UTF-8, .*: rename it, or set PYTHONUTF8=1"):
        locate(tmp_path / os.fsdecode(b"d\xe9"))


def test_names_below_checkpoints(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints" / "org").mkdir(parents=True)
    hf.rename(tmp_path / "checkpoints" / "org" / "model")
    assert open_checkpoint("org/model") == Path("checkpoints/org/model")
    assert open_checkpoint("org/model") == Path("checkpoints/org/model") and len(converted(capsys)) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("org/other", r"checkpoint folder org/other does not exist: nor does checkpoints/org/other; `litgpt download org/other` gets"),
        ("./no/such/place", "checkpoint folder no/such/place does not exist: check the path; `litgpt download list` names models to get"),
        ("Small", r"checkpoint folder Small does not exist: is org/small meant\?"),
        ("/nowhere/at/all", "checkpoint folder /nowhere/at/all does not exist: check the path"),
        ("weights.pth", r"weights\.pth is a file: name its folder"),
    ],
)
def test_what_is_no_checkpoint(given: str, message: str) -> None:
    Path("weights.pth").write_bytes(b"1")
    Path("checkpoints/org/small").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        open_checkpoint(given)


def test_a_changed_source_is_converted_again(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it was converted before: the dtype asked for stays."""
    convert_to_litgpt(hf, dtype="float16")
    old = wte(hf).clone()
    model = write_hf(hf, transformers.AutoConfig.from_pretrained(hf), seed=2)
    assert open_checkpoint(hf) == hf
    assert "which has changed" in converted(capsys)[0]
    assert wte(hf).dtype == torch.float16 and not torch.equal(wte(hf), old)
    torch.testing.assert_close(wte(hf), model.model.embed_tokens.weight.detach().half())
    (hf / "model.safetensors").unlink()
    assert open_checkpoint(hf) == hf and converted(capsys) == [], "the originals may go"


def test_a_changed_gguf_file(tmp_path: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer_dir)
    target = open_checkpoint(file)
    old = wte(target).clone()
    write_gguf(file, tiny_tokenizer_dir, seed=2)
    assert open_checkpoint(file) == target and not torch.equal(wte(target), old)
    assert len(converted(capsys)) == 2

    write_gguf(file, tiny_tokenizer_dir, seed=3)
    mine = target / "prompt_style.yaml"
    mine.write_text("mine")
    kept = (target / "lit_model.pth").read_bytes()
    with pytest.raises(UserError, match=r"prompt_style\.yaml in checkpoints/tiny was changed or added .* move checkpoints/tiny away"):
        open_checkpoint(file)
    assert mine.read_text() == "mine" and (target / "lit_model.pth").read_bytes() == kept


@pytest.mark.parametrize("recorded", [True, False])
def test_weights_of_the_users_own_in_a_hugging_face_folder_stay(hf: Path, recorded: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained ones put in the place of the converted, or converted by LitGPT itself; whatever happens to the originals."""
    if recorded:
        open_checkpoint(hf)
    (hf / "lit_model.pth").write_bytes(b"mine")
    (hf / "model.safetensors").write_bytes((hf / "model.safetensors").read_bytes())
    capsys.readouterr()
    assert open_checkpoint(hf) == hf and (hf / "lit_model.pth").read_bytes() == b"mine" and converted(capsys) == []
    with pytest.raises(UserError, match=r"lit_model\.pth"):
        convert_to_litgpt(hf)
    assert (hf / "lit_model.pth").read_bytes() == b"mine"


@pytest.mark.parametrize("how", ["moved", "copied", "copied without times"])
def test_a_folder_that_was_moved_or_copied(hf: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    open_checkpoint(hf)
    new = tmp_path / "elsewhere"
    if how == "moved":
        hf.rename(new)
    else:
        shutil.copytree(hf, new, copy_function=shutil.copy2 if how == "copied" else shutil.copyfile)
    capsys.readouterr()
    assert open_checkpoint(new) == new and converted(capsys) == []


def test_a_folder_of_the_users_own_stays(hf: Path) -> None:
    (hf / ".conversion").mkdir()
    (hf / ".conversion" / "notes.txt").write_text("mine")
    for _ in range(2):
        open_checkpoint(hf)
        assert (hf / ".conversion" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["/etc/passwd", "../config.json"])
@pytest.mark.parametrize("key", ["files", "made"])
def test_a_record_that_names_files_elsewhere_is_none(hf: Path, key: str, name: str) -> None:
    open_checkpoint(hf)
    record = json.loads((hf / "conversion.json").read_text())
    (hf / "conversion.json").write_text(json.dumps({**record, key: {name: [1, 2]}}))
    before = (hf / "lit_model.pth").read_bytes()
    assert open_checkpoint(hf) == hf and (hf / "lit_model.pth").read_bytes() == before


def test_a_settings_file_of_the_users_own_is_not_replaced(hf: Path) -> None:
    (hf / "model_config.yaml").write_text("name: mine\n")
    before = names(hf)
    with pytest.raises(UserError, match=r"model_config\.yaml exists and does not match .*config\.json: move"):
        open_checkpoint(hf)
    assert names(hf) == before and (hf / "model_config.yaml").read_text() == "name: mine\n"


def test_a_place_that_is_taken(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    first, second = (write_gguf(tmp_path / name / "tiny.gguf", tiny_tokenizer_dir) for name in "ab")
    target = open_checkpoint(first)
    with pytest.raises(UserError, match=f"holds the conversion of {first}: name {target}"):
        open_checkpoint(second)
    (target / "conversion.json").write_text("{}")
    with pytest.raises(UserError, match="holds something else"):
        open_checkpoint(first)
    convert_to_litgpt(second, tmp_path / "own place")
    assert open_checkpoint(tmp_path / "own place") == tmp_path / "own place"


def test_a_failed_conversion_leaves_nothing_behind(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(hf)
    (hf / "model.safetensors").write_bytes((hf / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="safetensors"):
        open_checkpoint(hf)
    assert names(hf) == before


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("at", quick(range(6), 2, 4, 5))
def test_killed_at_any_moment_of_a_conversion_in_place(hf: Path, again: bool, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file operations of the swap: the next use has the present weights and the chosen dtype, and so has the one after a change."""
    config = transformers.AutoConfig.from_pretrained(hf)
    if again:
        convert_to_litgpt(hf, dtype="float16")
        write_hf(hf, config, seed=2)
    own = {"unlink": Path.unlink, "rename": Path.rename, "replace": Path.replace}
    count = iter(range(100))

    def dies(act: Callable[..., object]) -> Callable[..., object]:
        def checked(path: Path, *args: object, **kwargs: object) -> object:
            if Path(path).name in FILES_OF_A_CONVERSION and next(count) >= at:  # nothing is cleaned up afterwards
                raise KeyboardInterrupt
            return act(path, *args, **kwargs)

        return checked

    with monkeypatch.context() as patch:
        for name, act in own.items():
            patch.setattr(Path, name, dies(act))
        patch.setattr(shutil, "rmtree", dies(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            open_checkpoint(hf)
    assert next(count) > at
    assert open_checkpoint(hf) == hf
    for seed in (None, 3):
        if seed is not None:
            write_hf(hf, config, seed)
        with safe_open(open_checkpoint(hf) / "model.safetensors", framework="pt") as source:
            torch.testing.assert_close(wte(hf).float(), source.get_tensor("model.embed_tokens.weight"), rtol=1e-3, atol=1e-3)
        assert wte(hf).dtype == (torch.float16 if again else torch.float32)
        assert not [name for name in names(hf) if name.startswith(".")]


def test_a_full_disk_is_one_message(hf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(hf)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("litgpt.convert.hf.write_pth", full)
    with pytest.raises(UserError, match="cannot be converted to .*: No space left on device"):
        open_checkpoint(hf)
    assert names(hf) == before


def test_two_at_once(tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One of them converts, both get the complete folder."""
    file = write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer_dir)
    convert, both = conversion.convert_gguf, threading.Barrier(2)

    def slowly(*args: Any) -> Any:
        time.sleep(0.2)  # the other one waits meanwhile
        return convert(*args)

    def open_it(_: int) -> Path:
        both.wait(30)
        return open_checkpoint(file)

    monkeypatch.setattr(conversion, "convert_gguf", slowly)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(open_it, range(2))) == [Path("checkpoints/tiny")] * 2
    assert len(converted(capsys)) == 1 and "lit_model.pth" in names(tmp_path / "checkpoints" / "tiny")


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    """One of them converts, both get the whole folder."""
    file = write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer_dir)
    script = f"""
import sys, time
import torch, gguf
from litgpt.convert import resolve
from litgpt.convert.gguf import convert as conversion
convert = conversion.convert_gguf
conversion.convert_gguf = lambda *args: (time.sleep(1), convert(*args))[1]
print("ready", flush=True); sys.stdin.readline()
print(resolve.open_checkpoint({str(file)!r}))
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = [subprocess.Popen([sys.executable, "-c", script], text=True, env=environment, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    assert all(process.stdout.readline() == "ready\n" for process in running)
    ends = [process.communicate("\n") for process in running]
    assert [out for out, _ in ends] == ["checkpoints/tiny\n"] * 2, ends
    assert sum(err.count("converted ") for _, err in ends) == 1
    assert names(tmp_path / "checkpoints") == {"tiny"} and "lit_model.pth" in names(tmp_path / "checkpoints" / "tiny")


def test_every_command_takes_any_form(hf: Path, tmp_path: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer_dir)
    assert main(["generate", str(file), "--max_new_tokens", "2", "--precision", "32-true"]) == 0
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": f"say {i}", "output": f"{i}"} for i in range(8)]))
    words = ["--data", "JSON", "--data.json_path", str(data), "--data.val_split_fraction", "0.25", "--max_steps", "1"]
    words += ["--precision", "32-true", "--eval.max_new_tokens", "0", "--train.save_interval", "1"]
    assert main(["finetune_lora", str(hf), "--out_dir", "out/lora", *words]) == 0, capsys.readouterr().err
    assert main(["finetune_full", str(file), "--out_dir", "out/full", *words]) == 0
    base, _ = checkpoint.adapter_settings(tmp_path / "out/lora/final")
    assert base == hf and len(converted(capsys)) == 2
    step = "out/lora/step-000001"
    assert main(["merge_lora", step, "--pretrained_checkpoint_dir", str(hf)]) == 0, capsys.readouterr().err
    assert main(["generate", step, "--max_new_tokens", "2"]) == 0


def test_a_stopped_run_stands_for_its_best_folder_else_its_last_step(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("step-000009", "step-000010", "step-1000000"):  # the last is incomplete
        (run / name).mkdir(parents=True)
    assert locate(run) == run
    for name in ("step-000009", "step-000010"):
        (run / name / "lit_model.pth.lora").touch()
    assert locate(run) == run / "step-000010"
    (run / "best").mkdir()
    (run / "best" / "lit_model.pth.lora").touch()
    assert locate(run) == run / "best"
