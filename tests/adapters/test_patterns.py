"""Patterns of ranks and alphas: the names that they match, what the layers then compute, and a run from the command line."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import peft.utils.other
import pytest
import torch
import yaml
from torch.testing import assert_close

from litgpt import checkpoint
from litgpt.adapters.patterns import compact, matching, names_of
from litgpt.errors import UserError
from litgpt.lora import merge_lora_weights
from litgpt.memory import estimate
from tests.helpers import jobs, runs, tiny

PATTERNS = ["--lora_rank_pattern.q_proj", "1", "--lora_rank_pattern.h.0.attn.v_proj", "5", "--lora_alpha_pattern", "{attn.qkv: 3}"]
UNITS = [f"transformer.h.{i}.{name}" for i in (0, 1, 11) for name in ("attn.qkv:q", "attn.qkv:v", "attn.proj", "mlp.fc", "mlp.fc_1")]
UNITS += ["transformer.h.2.mlp.experts.1.fc_1", "lm_head"]


@pytest.mark.parametrize(
    "pattern", ["q_proj", "attn.qkv", r"h\.[01]\.attn\..*", "layers.1.self_attn.v_proj", "fc", "lm_head", "mlp.fc_1", "proj", ".*"]
)
def test_names_match_as_in_peft(pattern: str) -> None:
    for unit in UNITS:
        theirs = [name for name in names_of(unit) if peft.utils.other.get_pattern_key([pattern], name) == pattern]
        assert (matching([pattern], *names_of(unit)) is not None) == bool(theirs)
    assert names_of("transformer.h.3.attn.qkv:q")[-1] == "model.layers.3.self_attn.q_proj"


def test_compact_patterns_give_the_values_back() -> None:
    values = {unit: (1 if ":q" in unit else 3 if unit.startswith("transformer.h.11.") else 2) for unit in UNITS}
    patterns = compact(values, 2)
    assert patterns is not None and patterns["attn.q_proj"] == 1 and "transformer.h.11.mlp.fc" in patterns
    assert {unit: patterns.get(matching(patterns, *names_of(unit)) or "", 2) for unit in UNITS} == values
    assert compact(dict.fromkeys(UNITS, 2), 2) is None


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_part_has_its_own_rank_and_factor(variant: str) -> None:
    """The first pattern wins. y = W x + (alpha_p / r_p) B_p A_p x on the rows of part p, by hand; and merged."""
    settings: dict[str, Any] = {"lora_rank_pattern": {"k_proj": 1, "attn.qkv": 5}, "lora_alpha_pattern": {"v_proj": 2.5, "mlp.proj": 9}}
    model = tiny.move_adapters(tiny.tiny(lora_r=3, lora_alpha=6, lora_variant=variant, **tiny.ALL_LORA, **settings))
    layer, x = model.blocks[1].attn.qkv, torch.randn(7, model.config.n_embd)
    sizes = [(5, 6.0), (1, 6.0), (5, 2.5)]
    if variant == "lora":
        y, row, column = layer.linear(x).clone(), 0, 0
        for (r, alpha), out in zip(sizes, model.config.qkv_sizes, strict=True):
            a, b = layer.lora_A[column : column + r], layer.lora_B[row : row + out, :r]
            y[:, row : row + out] += alpha / r * x @ a.T @ b.T
            row, column = row + out, column + r
        assert_close(layer(x), y)
        assert layer.lora_A.shape == (11, model.config.n_embd) and model.blocks[0].mlp.proj.scaling == 3
    idx = tiny.ids(2, 9)
    with torch.no_grad():
        want = model(idx)
        merge_lora_weights(model)
        assert_close(model(idx), want, rtol=1e-4, atol=1e-5)


def test_unused_columns_stay_zero_and_memory_is_counted() -> None:
    model = tiny.tiny(lora_r=3, lora_query=True, lora_value=True, lora_rank_pattern={"v_proj": 1})
    model(tiny.ids(2, 9)).sum().backward()
    b = model.blocks[0].attn.qkv.lora_B
    assert b.shape[1] == 3 and b.grad[: model.config.qkv_sizes[0]].any() and not b.grad[model.config.qkv_sizes[0] :, 1:].any()
    assert estimate(model.config, 16).trained == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def test_a_run_from_the_command_line(base: Path, data: Path, tmp_path: Path) -> None:
    """Trained, merged, resumed bit for bit, and started anew from its YAML."""
    run = runs.finetune("finetune_lora", base, data, tmp_path / "a" / "run", *PATTERNS)
    assert run.code == 0, run.err
    weights = checkpoint.load_weights(run.final / "lit_model.pth.lora")
    assert {i: len(weights[f"transformer.h.{i}.attn.qkv.lora_A"]) for i in (0, 1)} == {0: 6, 1: 9}
    adapted, whole = (checkpoint.load_model(folder, torch.float32) for folder in (run.out_dir / "step-000006", run.final))
    assert_close(adapted(tiny.ids(1, 9)), whole(tiny.ids(1, 9)), rtol=1e-4, atol=1e-5)
    kept = yaml.safe_load((run.final / "hyperparameters.yaml").read_text())
    assert kept["lora_rank_pattern"] == {"q_proj": 1, "h.0.attn.v_proj": 5} and kept["lora_alpha_pattern"] == {"attn.qkv": 3}
    resumed = tmp_path / "b" / "run"
    shutil.copytree(run.out_dir, resumed)
    for folder in (*sorted(resumed.glob("step-*"))[1:], resumed / "final", resumed / "best"):
        shutil.rmtree(folder)
    (resumed / "report.json").unlink()
    words = ["finetune_lora", "--config", str(run.final / "hyperparameters.yaml"), "--out_dir", str(resumed), "--resume", "true"]
    assert runs.call(words, resumed).code == 0
    assert jobs.curve(resumed) == jobs.curve(run.out_dir)
    other = runs.call([*words, "--lora_rank_pattern.q_proj", "2"], resumed)
    assert other.code != 0 and "lora_rank_pattern" in other.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_rank_pattern.k_proj", "2"], "lora_rank_pattern names 'k_proj', which fits no layer with LoRA"),
        (["--lora_rank_pattern", "{.*: 2, q_proj: 3}"], "lora_rank_pattern names 'q_proj', which fits no layer with LoRA, or none that an"),
        (["--lora_alpha_pattern", "{lm_head: 2}"], "lora_alpha_pattern names 'lm_head'"),
        (["--lora_rank_pattern.q_proj", "0"], "lora_rank_pattern.q_proj is '0': a whole number from 1 to 65536"),
        (["--lora_alpha_pattern.q_proj", "many"], "lora_alpha_pattern.q_proj is 'many': a number is needed"),
        (["--lora_rank_pattern", "{(a+)+: 2}"], "it repeats a group"),
        (["--lora_rank_pattern", "{'q(': 2}"], "not a regular expression"),
        (["--lora_rank_pattern", "[q_proj]"], "lora_rank_pattern"),
        (["--lora_rank_pattern.q_proj", "2", "--lora_variant", "pissa"], "lora_variant pissa needs one rank and alpha for attn.qkv"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, base: Path, data: Path, tmp_path: Path) -> None:
    run = runs.finetune("finetune_lora", base, data, tmp_path / "run", *words)
    assert run.code in (1, 2) and message in run.err and "Traceback" not in run.err and not (tmp_path / "run").exists()


def test_pissa_and_blocks_with_ranks_of_their_own() -> None:
    model = tiny.tiny(lora_variant="pissa", lora_r=3, lora_alpha=3, **tiny.ALL_LORA, lora_rank_pattern={r"h\.[12]\.attn\.qkv": 6})
    assert [len(block.attn.qkv.lora_A) for block in model.blocks[:3]] == [9, 18, 18]
    with pytest.raises(UserError, match=re.escape("lora_rank_pattern names 'h.9'")):
        tiny.tiny(lora_r=3, lora_query=True, lora_rank_pattern={"h.9": 1})
