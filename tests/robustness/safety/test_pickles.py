"""Files that would run code or fill the memory if they were unpickled: none does, wherever a command reads weights or state."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt import atomic, checkpoint
from litgpt.errors import UserError
from tests.helpers.places import Place, check_message, run, tree


class Attack:
    """Unpickling it calls `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class StateAttack:
    """Unpickling it sets a state, through a method of an allowed class's name."""

    def __reduce__(self) -> Any:
        return dict, (), None, None, iter([("a", Attack(os.system, "touch sprung"))])


ATTACKS: dict[str, Any] = {
    "os.system": Attack(os.system, "touch sprung"),
    "subprocess": Attack(subprocess.Popen, ["touch", "sprung"]),
    "eval": Attack(eval, "open('sprung', 'w')"),
    "exec": Attack(exec, "open('sprung', 'w')"),
    "import": Attack(__import__, "antigravity"),
    "open": Attack(open, "sprung", "w"),
    "in a dict's items": StateAttack(),
    "torch.load": Attack(torch.load, "other.pth", None, None),
}


def packed(content: Any, kind: str) -> bytes:
    """As `torch.save` writes it, in today's format or in that of before 1.6, or as a bare pickle."""
    if kind == "pickle":
        return pickle.dumps(content)
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=kind == "zip")
    return buffer.getvalue()


def fine_tune(place: Place, base: Any, *more: Any, name: str = "finetune_lora") -> list[Any]:
    return [name, base, "--data", "JSON", "--data.json_path", place.data(), "--out_dir", "out", "--max_steps", 1, *more]


def adapter_of(place: Place, name: str, content: bytes) -> Path:
    place.adapter()
    return place.write(f"adapter/{name}", content).parent


PLACES: dict[str, Callable[[Place, bytes], list[Any]]] = {
    "generate": lambda place, content: ["generate", place.base(), "--max_new_tokens", place.write("base/lit_model.pth", content) and 1],
    "finetune_lora": lambda place, content: fine_tune(place, [place.base(), place.write("base/lit_model.pth", content)][0]),
    "finetune_full": lambda place, content: fine_tune(
        place, [place.base(), place.write("base/lit_model.pth", content)][0], name="finetune_full"
    ),
    "adapter": lambda place, content: ["generate", adapter_of(place, "lit_model.pth.lora", content)],
    "merge_lora": lambda place, content: ["merge_lora", adapter_of(place, "lit_model.pth.lora", content)],
    "an adapter's base": lambda place, content: ["generate", [place.adapter(), place.write("base/lit_model.pth", content)][0]],
    ".bin": lambda place, content: ["convert_to_litgpt", bin_folder(place, {"pytorch_model.bin": content}), "--checkpoint_dir", "lit"],
    ".bin part": lambda place, content: [
        "convert_to_litgpt",
        bin_folder(place, {"a.bin": content, "pytorch_model.bin.index.json": b'{"weight_map": {"x": "a.bin"}}'}),
        "--checkpoint_dir",
        "lit",
    ],
    ".safetensors": lambda place, content: [
        "convert_to_litgpt",
        bin_folder(place, {"model.safetensors": content}),
        "--checkpoint_dir",
        "lit",
    ],
    "tokenizer.json": lambda place, content: ["generate", [place.base(), place.write("base/tokenizer.json", content)][0]],
    "data": lambda place, content: ["finetune_lora", place.base(), "--data", "JSON", "--data.json_path", place.write("data.json", content)],
    "YAML": lambda place, content: ["finetune_lora", place.write("f.yaml", content)],
}


def bin_folder(place: Place, files: dict[str, bytes]) -> Path:
    folder = place.hf()
    (folder / "model.safetensors").unlink(missing_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def assert_refused(place: Place, words: list[Any], culprit: str) -> None:
    before = tree(place.folder)
    ended = run(words)
    check_message(ended, culprit, "", ended.code)
    assert ended.code in (1, 2) and tree(place.folder) == before and not (place.folder / "sprung").exists()


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_the_traps_are_armed(attack: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests below would show nothing: unpickled as torch did before `weights_only`, each of them does something."""
    monkeypatch.chdir(tmp_path)
    if attack in ("import", "torch.load"):
        monkeypatch.setitem(ATTACKS, attack, Attack(os.system, "touch sprung"))
    (tmp_path / "x.pth").write_bytes(packed({"a": ATTACKS[attack]}, kind))
    with (tmp_path / "x.pth").open("rb") as file:
        content = pickle.load(file) if kind == "pickle" else torch.load(file, weights_only=False)
    if hasattr(content["a"], "wait"):
        content["a"].wait()
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("where", PLACES)
def test_code_in_a_file_does_not_run(where: str, place: Place) -> None:
    """One attack everywhere, in all formats, beside good tensors."""
    good = torch.load(place.world.base / "lit_model.pth", weights_only=True)
    for kind in ("zip", "legacy", "pickle"):
        content = packed({**good, "extra": ATTACKS["os.system"]}, kind)
        assert_refused(place, PLACES[where](place, content), ".")


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_attack_runs(attack: str, place: Place) -> None:
    for content in (
        {"model": {"a": ATTACKS[attack]}},
        ATTACKS[attack],
        {ATTACKS[attack]: 1} if attack != "in a dict's items" else [ATTACKS[attack]],
    ):
        for kind in ("zip", "legacy"):
            assert_refused(place, PLACES["generate"](place, packed(content, kind)), "lit_model.pth is not a readable checkpoint")


READ_ON_RESUMING = ("lit_model.pth.lora", "training_state.json", "training_state.safetensors", "manifest.json")


def test_training_state_is_not_unpickled(place: Place) -> None:
    """A run's checkpoint with its files a pickle in turn, its manifest made to fit: resuming is refused, or leaves the file alone."""
    words = fine_tune(place, place.base(), "--max_steps", 2, "--save_interval", 1, "--eval.max_new_tokens", 0)
    assert run(words).code == 0
    shutil.copytree("out/step-000001", "kept")
    shutil.rmtree("out")
    assert set(READ_ON_RESUMING) <= {file.name for file in Path("kept").iterdir()}
    for name in (*READ_ON_RESUMING, "hyperparameters.yaml"):
        for kind in ("zip", "pickle"):
            shutil.copytree("kept", "out/step-000001")
            Path("out/step-000001", name).write_bytes(packed({"model": ATTACKS["os.system"]}, kind))
            if name != atomic.MANIFEST:
                atomic.write_manifest(Path("out/step-000001"))
            ended = run([*words, "--resume", "true"])
            assert not Path("sprung").exists() and "Traceback" not in ended.err
            if name in READ_ON_RESUMING:
                assert ended.code == 1 and name in ended.err, (name, ended.err)
            shutil.rmtree("out")


# Files that grow


def zipped(entries: dict[str, bytes], compression: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def test_a_zip_bomb_is_not_unpacked(place: Place) -> None:
    """100 KB that stand for 100 MB, as torch would read them; twice packed they would be TB."""
    bomb = zipped({"data.pkl": bytes(100_000_000), "version": b"3"}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 140_000
    assert_refused(place, PLACES["generate"](place, bomb), "lit_model.pth is not a readable checkpoint")


def test_a_compressed_but_honest_file_is_refused_too(place: Place) -> None:
    """The packing itself is what is refused, before anything is unpacked: torch's own files are never packed."""
    with zipfile.ZipFile(place.world.base / "lit_model.pth") as archive:
        entries = {entry.filename.partition("/")[2]: archive.read(entry) for entry in archive.infolist()}
    (place.base() / "lit_model.pth").write_bytes(zipped(entries, zipfile.ZIP_STORED))
    assert checkpoint.load_weights(place.base() / "lit_model.pth")
    assert_refused(place, PLACES["generate"](place, zipped(entries, zipfile.ZIP_DEFLATED)), "its entries are compressed")


@pytest.mark.parametrize("shape", [(2**20, 2**20), (2**40,)])
def test_a_number_that_poses_as_a_tensor_of_terabytes(shape: tuple[int, ...], place: Place) -> None:
    """Stride 0: one stored number, a shape of 2^40. Copied or cast, it would be terabytes."""
    good = torch.load(place.world.base / "lit_model.pth", weights_only=True)
    good["transformer.wte.weight"] = torch.zeros(1).expand(shape)
    assert_refused(place, PLACES["generate"](place, packed(good, "zip")), "has more elements than numbers are stored")
    place.hf()
    bins = {"model.embed_tokens.weight": torch.zeros(1).expand(shape)}
    assert_refused(place, PLACES[".bin"](Place(place.folder / "b", place.world), packed(bins, "zip")), "has more elements")


def test_a_pickle_that_asks_for_memory(tmp_path: Path) -> None:
    """bytearray(2^40) is an allowed call of the weights-only unpickler."""
    from tests.helpers.places import bounded

    (tmp_path / "x.pth").write_bytes(packed({"a": Attack(bytearray, 2**40)}, "zip"))
    with bounded(), pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load_weights(tmp_path / "x.pth")


@pytest.mark.parametrize("claimed", [2**20, 2**40, 2**62, 2**63, 2**64 - 1])
def test_a_safetensors_header_of_exabytes(claimed: int, place: Place) -> None:
    content = struct.pack("<Q", claimed) + json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    assert_refused(place, PLACES[".safetensors"](place, content), "model.safetensors is not a readable safetensors file")


def test_a_safetensors_tensor_of_terabytes(place: Place) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(64)
    assert_refused(place, PLACES[".safetensors"](place, content), "model.safetensors is not a readable safetensors file")
