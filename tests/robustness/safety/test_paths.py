"""Names that come from files lead nowhere but into the folder they belong to; patterns and figures in them hold nothing up."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from litgpt import atomic
from litgpt.convert.hf import open_weights
from litgpt.errors import UserError
from tests.helpers import worlds
from tests.helpers.cases import quick
from tests.helpers.places import Place, check_message, run, tree
from tests.helpers.worlds import gguf_bytes, gguf_metadata, gguf_tensors

NAMES = (
    "../../escaped",
    "/tmp/escaped",
    "..",
    ".",
    "a/b",
    "a\\b",
    "~root",
    "a\nb",
    "\x1b[2Ja",
    "-rf",
    "x" * 300,
    "CON",
    "$(touch sprung)",
    "`touch sprung`",
    "{0.__class__}",
    "%s%n",
)


@pytest.mark.parametrize("name", [name if i < 4 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(NAMES)])
def test_a_models_name_is_no_path(name: str, place: Place) -> None:
    """`name` of model_config.yaml and general.name of a GGUF file: what is written stays below the folders that were named."""
    base = place.base()
    config = yaml.safe_load((base / "model_config.yaml").read_text())
    (base / "model_config.yaml").write_text(yaml.safe_dump({**config, "name": name, "hf_config": {"org": name, "name": name}}))
    metadata = {**worlds.gguf_metadata(place.world.base), "general.name": name}
    place.write("model.gguf", worlds.gguf_bytes(metadata, worlds.gguf_tensors()))
    around = tree(place.folder.parent)
    tuned = run(
        [
            "finetune_lora",
            base,
            "--data",
            "JSON",
            "--data.json_path",
            place.data(),
            "--out_dir",
            "out",
            "--max_steps",
            1,
            "--eval.max_new_tokens",
            0,
        ]
    )
    for words in (
        ["generate", base, "--max_new_tokens", 1],
        ["merge_lora", "out/final"],
        ["convert_to_litgpt", "model.gguf"],
        ["generate", "model.gguf", "--max_new_tokens", 1],
    ):
        ended = run(words)
        assert ended.code in (0, 1) and "Traceback" not in ended.err and "\x1b" not in ended.err.replace(name, ""), ended.err
    assert tuned.code == 0, tuned.err
    new = set(tree(place.folder.parent)) - set(around)
    roots = {Path(path).parts[1] for path in new}
    assert roots <= {"out", "checkpoints", "data.json"} and {
        Path(path).parts[2] for path in new if Path(path).parts[1:2] == ("checkpoints",) and len(Path(path).parts) > 2
    } <= {"model"}
    assert not Path("/tmp/escaped").exists() and not list(place.folder.rglob("sprung"))


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "sub/a.safetensors",
        "..\\a.safetensors",
        "a\0.safetensors",
        "",
        ".",
        "..",
        "~/a.safetensors",
        "file:///a.safetensors",
    ],
)
def test_an_index_names_files_of_its_folder_only(name: str, place: Place) -> None:
    folder = place.hf()
    shutil.move(folder / "model.safetensors", place.folder / "secret.safetensors")
    place.write("hf/model.safetensors.index.json", {"weight_map": {"a": name}})
    before = tree(place.folder)
    ended = run(["convert_to_litgpt", folder, "--checkpoint_dir", "lit"])
    assert ended.code == 1 and "model.safetensors.index.json" in ended.err and "Traceback" not in ended.err
    assert tree(place.folder) == before


def test_links_out_of_the_folder(place: Place) -> None:
    """A link in the folder is the user's own: the hub's cache is made of them. It is read as weights, which a foreign file is not."""
    folder = place.hf()
    shutil.move(folder / "model.safetensors", place.folder / "blob")
    os.symlink("../blob", folder / "model.safetensors")
    assert len(open_weights(folder)) == 20
    for target in ("/etc/passwd", "/dev/zero", "/proc/self/environ", "loop.safetensors", "/proc/self/mem"):
        (folder / "model.safetensors").unlink()
        os.symlink("model.safetensors" if target.startswith("loop") else target, folder / "model.safetensors")
        with pytest.raises(UserError) as caught:
            open_weights(folder)
        assert "root:" not in str(caught.value)


def test_a_manifests_names_stay_inside(tmp_path: Path) -> None:
    """A manifest that names other places is no manifest: nothing there is read, and no digest of it told."""
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("../secret", str(tmp_path / "secret"), "a/../../secret"):
        (folder / "manifest.json").write_text(json.dumps({"litgpt_manifest": 1, "files": {name: {"bytes": 1, "sha256": "0" * 64}}}))
        assert atomic.damages(folder, contents=True) == ["manifest.json is missing or broken"]


def test_leftovers_are_removed_only_where_they_are_ours(tmp_path: Path) -> None:
    """A name like that of a temporary folder, planted as a link, does not make anything behind it go."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    place = tmp_path / "place"
    place.mkdir()
    os.symlink(precious, place / ".out.litgpt-0123abcd.tmp")
    os.symlink(precious, place / ".out.litgpt-0123abcd.tmp.old")
    atomic.remove_leftovers(place)
    assert (precious / "file").read_text() == "x"


# Figures that claim too much


@pytest.mark.parametrize("key", ["n_layer", "n_embd", "vocab_size", "n_head", "intermediate_size", "block_size"])
@pytest.mark.parametrize("value", quick([10**6, 2**31 - 1, 2**40, 10**30], 2**40))
def test_a_config_that_claims_terabytes(key: str, value: int, place: Place) -> None:
    """A kilobyte of model_config.yaml makes no machine busy: `run` bounds time and memory."""
    base = place.base()
    config = yaml.safe_load((base / "model_config.yaml").read_text())
    derived = (
        {"padded_vocab_size": value} if key == "vocab_size" else {"head_size": None, "n_query_groups": None} if key == "n_head" else {}
    )
    (base / "model_config.yaml").write_text(yaml.safe_dump({**config, **derived, key: value}))
    ended = run(["generate", base, "--max_new_tokens", 2])
    if key == "block_size" and value < 2**31:
        assert ended.code in (0, 1) and "Traceback" not in ended.err
    else:
        check_message(ended, "base", "", 1)


@pytest.mark.parametrize("patch", [(8, 2**64 - 1), (16, 2**63), (24, 2**62), (16, 2**32), (8, 2**40)])
def test_a_gguf_header_that_claims_terabytes(patch: tuple[int, int], place: Place) -> None:
    file = place.gguf()
    content = bytearray(file.read_bytes())
    content[patch[0] : patch[0] + 8] = patch[1].to_bytes(8, "little")
    file.write_bytes(content)
    before = tree(place.folder)
    check_message(run(["convert_to_litgpt", file]), "model.gguf", "truncated or broken", 1)
    assert tree(place.folder) == before


@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "embedding_length", "feed_forward_length"])
def test_gguf_metadata_that_claims_terabytes(key: str, place: Place) -> None:
    """Sizes are compared with the shapes of the stored tensors before anything of those sizes is made."""
    metadata = gguf_metadata(place.base()) | {"llama.rope.dimension_count": 8, "llama.attention.key_length": 8}
    heads = {"llama.attention.value_length": 8, "llama.attention.head_count_kv": 2**31 - 8}
    file = place.folder / "model.gguf"
    file.write_bytes(gguf_bytes(metadata | heads | {"llama.attention.head_count": 2**31 - 8, f"llama.{key}": 2**31 - 8}, gguf_tensors()))
    check_message(
        run(["convert_to_litgpt", file]), "model.gguf", "impossible" if key == "embedding_length" else "does not fit the model", 1
    )


def test_an_adapter_that_claims_terabytes(place: Place) -> None:
    folder = place.adapter()
    settings = yaml.safe_load((folder / "hyperparameters.yaml").read_text())
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump({**settings, "lora_r": 2**40}))
    check_message(run(["generate", folder]), "lora_r is 1099511627776", "from 0 to 65536", 1)
    weights = torch.load(folder / "lit_model.pth.lora", weights_only=True)
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(settings))
    torch.save({"model": {name: torch.zeros(1).expand(2**20, 2**20) for name in weights["model"]}}, folder / "lit_model.pth.lora")
    check_message(run(["generate", folder]), "has more elements than numbers are stored", "ordinary tensor", 1)


def catastrophic(place: Place, pattern: str) -> Path:
    """The tiny checkpoint with another pattern to cut texts by."""
    base = place.base()
    content: dict[str, Any] = json.loads((base / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    (base / "tokenizer.json").write_text(json.dumps(content))
    return base


def test_a_pattern_that_backtracks(place: Place) -> None:
    """Reported, not bounded by us: tokenizers' own engine gives up after a while, and matches what it has so far. See docs/security.md."""
    base = catastrophic(place, "(x+x+)+y")
    start = time.monotonic()
    ended = run(["generate", base, "--prompt", "x" * 40, "--max_new_tokens", 1])
    assert ended.code in (0, 1) and "Traceback" not in ended.err and time.monotonic() - start < 30


COPIED = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
COMMANDS: dict[str, list[Any]] = {
    "convert_to_litgpt": ["hf", "--checkpoint_dir", "converted"],
    "convert_from_litgpt": ["base", "converted"],
    "convert_to_gguf": ["base", "model.gguf"],
    "convert_adapter": ["adapter", "converted"],
    "convert_pretrained_checkpoint": ["base", "converted"],
    "finetune": [
        "base",
        "--data",
        "JSON",
        "--data.json_path",
        "data.json",
        "--out_dir",
        "out",
        "--max_steps",
        1,
        "--eval.max_new_tokens",
        0,
    ],
}


@pytest.mark.parametrize(
    ("command", "name"),
    [(c, n) for c in COMMANDS for n in (["prompt_style.yaml"] if c.startswith(("convert_adapter", "convert_pre")) else COPIED)],
)
def test_a_link_is_not_copied_into_results(command: str, name: str, place: Place) -> None:
    """Not even if the secret is valid JSON or YAML: it is one message, and the results do not hold it."""
    folder = {"hf": place.hf, "base": place.base, "adapter": place.adapter}[COMMANDS[command][0]]()
    place.data()
    secret = place.write(
        "secret", b"{class_path: hunter2, hunter2: {% if %}}" if name.endswith(("yaml", "jinja")) else b'{"eos_token": "hunter2"}'
    )
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    ended = run([command, folder, *COMMANDS[command][1:]])
    assert ended.code == 1 and f"{folder / name} is a link to {secret}, outside its folder: put a copy" in ended.err
    for file in place.folder.rglob("*"):
        assert file in (secret, folder / name) or file.is_dir() or b"hunter2" not in file.read_bytes()


# Pipes, folders and sockets in the place of files

ODD = [
    ("adapter", "generate", "base.json"),
    ("adapter", "generate", "hyperparameters.yaml"),
    ("adapter", "generate", "lit_model.pth.lora"),
    ("adapter", "merge_lora", "lit_model.pth"),
    ("base", "generate", "model_config.yaml"),
    ("base", "generate", "generation_config.json"),
    ("base", "convert_from_litgpt", "hyperparameters.yaml"),
    ("base", "convert_from_litgpt", "config.json"),
    ("hf", "convert_to_litgpt", "config.json"),
    ("hf", "convert_to_litgpt", "model.safetensors"),
    ("hf", "convert_to_litgpt", "model_config.yaml"),
]


@pytest.mark.parametrize("kind", ["pipe", "folder", "socket"])
@pytest.mark.parametrize(("source", "command", "name"), ODD)
def test_something_else_than_a_file(source: str, command: str, name: str, kind: str, place: Place) -> None:
    """It is never waited for, and never taken for a file that is not there."""
    folder = getattr(place, source)()
    (folder / name).unlink(missing_ok=True)
    if kind == "socket":
        os.chdir(folder)  # a socket's path is short
        socket.socket(socket.AF_UNIX).bind(name)
    else:
        (os.mkfifo if kind == "pipe" else os.mkdir)(folder / name)
    ended = run([command, folder, *([place.folder / "out"] if command == "convert_from_litgpt" else [])])
    check_message(ended, name, "a folder" if kind == "folder" else "a pipe or a device", 1)
