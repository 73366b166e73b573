"""`--dry_run true` touches nothing, whatever it is pointed at, and its report can be read and trusted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from litgpt import atomic
from tests.helpers import tiny
from tests.helpers.cases import quick
from tests.helpers.places import Place, run, tree

ROOT = Path(__file__).parents[3]
SKIP = ["--skip2lora_enabled", "true", "--lora_query", "false", "--lora_value", "false"]
WAYS: dict[str, list[Any]] = {
    "LoRA": ["finetune_lora"],
    "by its other name": ["finetune_lora"],
    "all weights": ["finetune_full"],
    "Skip2-LoRA": ["finetune_lora", *SKIP],
    "cache on disk": ["finetune_lora", *SKIP, "--skip2lora_cache", "disk"],
    "cache in a folder of its own": ["finetune_lora", *SKIP, "--skip2lora_cache", "disk", "--skip2lora_cache_dir", "cache"],
    "no cache": ["finetune_lora", *SKIP, "--skip2lora_cache", "off"],
    "a warm-up": ["finetune_lora", "--skip2lora_enabled", "true", "--skip2lora_warmup_steps", "2"],
    "a deep out_dir": ["finetune_lora", "--out_dir", "a/b/c/d"],
    "over an earlier run": ["finetune_lora", "--out_dir", "earlier", "--overwrite", "true"],
    "another logger": ["finetune_lora", "--logger_name", "tensorboard"],
    "saving often": ["finetune_lora", "--save_interval", 1],
    "fp32": ["finetune_lora", "--precision", "32-true"],
}


MASKED = ["--data", "JSON", "--data.json_path", "data.json", "--data.mask_prompt", "true", "--dry_run", "true"]


def words(place: Place, way: list[Any], *more: Any) -> list[Any]:
    command, *given = way
    return [
        command,
        place.base(),
        "--data",
        "JSON",
        "--data.json_path",
        place.data(),
        "--out_dir",
        "out",
        "--dry_run",
        "true",
        *given,
        *more,
    ]


@pytest.mark.parametrize("way", quick(WAYS, "all weights", "cache on disk", "a warm-up", "over an earlier run"))
def test_nothing_is_written(way: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, folders, links, permissions and times: all as before, here and in the folder for temporary files."""
    (place.folder / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(place.folder / "tmp"))
    atomic.write_manifest(place.write("earlier/final/lit_model.pth.lora", "precious").parent)
    argv = words(place, WAYS[way])
    before, times = tree(place.folder), {path: path.lstat().st_mtime_ns for path in place.folder.rglob("*")}
    ended = run(argv)
    assert ended.code == 0, ended.err
    assert tree(place.folder) == before and {path: path.lstat().st_mtime_ns for path in place.folder.rglob("*")} == times
    assert ended.out.endswith("nothing was written\n")
    for line in ("steps", "memory", "training"):
        assert re.search(rf"^ +{line} ", ended.out, re.MULTILINE), ended.out


def test_it_fails_as_the_run_would(place: Place) -> None:
    for more, message in (
        (["--lora_block_indices", "[9]"], "blocks 0 to 1"),
        (["--optimizer", "Nothing"], "is not an optimizer"),
        (["--out_dir", "data.json"], "is a file"),
    ):
        before = tree(place.folder) or None
        argv = words(place, ["finetune_lora"], *more)
        before = tree(place.folder)
        ended = run(argv)
        assert ended.code == 1 and message in ended.err and tree(place.folder) == before


def test_the_sample_can_be_read_without_colours(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piped, or with NO_COLOR: no escape sequences, and marks around what is learned; in a terminal colours besides."""
    place.data([{"instruction": f"question {i}", "output": f"answer {i}"} for i in range(4)])
    argv = ["finetune_lora", place.base(), *MASKED]
    monkeypatch.setenv("NO_COLOR", "1")
    out = run(argv).out
    assert "\x1b" not in out
    learned = re.findall(r"»(.*?)«", out.partition("\n\n")[2], re.DOTALL)
    assert len(learned) == 1 and re.match(r"answer \d", learned[0]) and re.search(r"question \d", out)
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")  # a dumb terminal has no colours
    coloured = run(argv).out
    assert "\x1b[2m" in coloured and re.sub(r"\x1b\[[\d;]*m", "", coloured).partition("what the run")[0] == out.partition("what the run")[0]


def test_data_cannot_steer_the_terminal(place: Place) -> None:
    place.data([{"instruction": "a\x1b]0;title\x07\x1b[2Jb", "output": "c\x1b[31md\r\x9b2Ke"}] * 4)
    out = run(["finetune_lora", place.base(), "--data", "JSON", "--data.json_path", "data.json", "--dry_run", "true"]).out
    assert "\\x1b[2Jb" in out and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out)


@pytest.mark.slow
def test_a_long_prompt_does_not_hide_the_answer(place: Place) -> None:
    place.data([{"instruction": "it was " * 300, "output": "the answer"}] * 4)
    base = place.base()
    config = base / "model_config.yaml"
    config.write_text(config.read_text().replace("block_size: 256", "block_size: 4096"))
    ended = run(["finetune_lora", base, *MASKED, "--epochs", 1])
    assert ended.code == 0 and "characters ...]" in ended.out and "»the answer" in ended.out and len(ended.out) < 6000


@pytest.mark.slow
@pytest.mark.parametrize("way", [["finetune_lora"], ["finetune_full"], ["finetune_lora", *SKIP]], ids=["LoRA", "full", "Skip2-LoRA"])
def test_the_estimate_of_memory(way: list[str], tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    """With the cache, between 0.65 and 1.5 times what a process of its own holds at most; the model's figures are above the program's."""
    sizes = {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_query_groups": 12, "intermediate_size": 2048, "block_size": 512}
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer, **sizes)
    (tmp_path / "data.jsonl").write_text('{"instruction": "%s", "output": "yes, it was"}\n' % ("was it " * 60) * 32)
    argv = [*way, base, "--data", "JSON", "--data.json_path", tmp_path / "data.jsonl", "--out_dir", tmp_path / "out", "--dry_run", "true"]
    argv += ["--precision", "32-true", "--train.micro_batch_size", 4, "--train.global_batch_size", 8, "--epochs", 2]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "litgpt", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr
    figures = [
        re.search(pattern, done.stdout)
        for pattern in (r"memory +about ([\d.]+) GiB", r"activation cache +([\d.]+) GiB", r"here +([\d.]+) GiB")
    ]
    estimated, cache, measured = (float(found[1]) if found else 0.0 for found in figures)
    assert 0.65 < (estimated + cache) / measured < 1.5, done.stdout
