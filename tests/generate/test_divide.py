"""One answer by several devices equals that of one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.__main__ import main
from litgpt.errors import UserError
from litgpt.generate.divide import shard, spread
from tests.helpers import tiny
from tests.helpers.cases import quick
from tests.helpers.family_configs import ours
from tests.train.test_parallel import in_processes

PROMPT = tiny.ids(1, 9)[0]


def greedy(model: Any) -> list[int]:
    return list(tiny.generate(model, PROMPT, 30, temperature=0.0))


# Rotary, learned positions, parallel residual with biases, windows, experts; adapters of both kinds.
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: ours("llama"),
    "gpt2": lambda: ours("gpt2"),
    "gpt_neox": lambda: ours("gpt_neox"),
    "gemma3": lambda: ours("gemma3"),
    "mixtral": lambda: ours("mixtral"),
    "skip2lora": lambda: tiny.move_adapters(tiny.tiny(lora_r=3, skip2lora_enabled=True, skip2lora_block_indices=[0, 2])),
    "lora": lambda: tiny.move_adapters(tiny.tiny(lora_r=3, **{**tiny.ALL_LORA, "lora_head": False})),
}


@pytest.mark.parametrize("kind", quick(MODELS, "gpt2", "gemma3", "skip2lora"))
def test_parts_of_every_block(kind: str) -> None:
    expected = greedy(MODELS[kind]())

    def work(rank: Any) -> tuple[list[int], int]:
        model = MODELS[kind]()
        shard(model, rank.index, rank.size, rank.sum)
        return greedy(model), sum(p.numel() for block in model.blocks for p in block.parameters())

    whole = sum(p.numel() for block in MODELS[kind]().blocks for p in block.parameters())
    for answer, size in in_processes(2, work):
        assert answer == expected and size < 0.7 * whole


@pytest.mark.parametrize("kind", ["llama", "gemma3", "skip2lora"])
def test_divided_blocks(kind: str) -> None:
    model, expected = MODELS[kind](), greedy(MODELS[kind]())
    spread(model, [torch.device("cpu")] * 2)
    assert greedy(model) == expected


def test_what_cannot_be_divided() -> None:
    with pytest.raises(UserError, match=r"3 devices cannot divide n_head \(4\)"):
        shard(MODELS["llama"](), 0, 3, lambda tensor: tensor)
    with pytest.raises(UserError, match="normalises all heads together"):
        shard(ours("olmo2"), 0, 2, lambda tensor: tensor)
    with pytest.raises(UserError, match="answer-only LoRA"):
        shard(tiny.tiny(lora_r=2, lora_query=True, alora_enabled=True, alora_invocation_tokens=[1]), 0, 2, lambda tensor: tensor)


def test_commands(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """generate_sequentially gives the answer of generate."""
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    words = [str(base), "--prompt", "why?", "--max_new_tokens", "20", "--temperature", "0", "--precision", "32-true"]
    assert main(["generate", *words]) == 0
    expected = capsys.readouterr().out
    assert main(["generate_sequentially", *words]) == 0
    assert capsys.readouterr().out == expected
    assert main(["generate_sequentially", *words, "--devices", "7"]) == 1
    assert "this machine has" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """generate_tp gives the answer of generate."""
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    words = [str(base), "--prompt", "why?", "--max_new_tokens", "20", "--temperature", "0", "--precision", "32-true"]
    assert main(["generate", *words]) == 0
    expected = capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "litgpt", "generate_tp", *words, "--devices", "2"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected and done.stderr.count("tokens/s") == 1
