"""`litgpt finetune --lora_variant dora`, from the command line to its folders, resumed, merged, quantised and beside Skip2-LoRA."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from litgpt import checkpoint
from litgpt.adapters.base import adapter_state
from litgpt.lora import VARIANTS, merge_lora_weights
from tests.helpers import jobs, runs, tiny

IDX = tiny.ids(2, 20)
DORA = {"lora_variant": "dora", "lora_rslora": True, "lora_mlp": True, "lora_dropout": 0.1}
WARM = {**jobs.WARM, "lora_variant": "dora"}


@pytest.mark.parametrize("variant", ["lora", *VARIANTS])
def test_each_variant_starts_as_the_base_is_saved_and_merged(variant: str) -> None:
    """The test of a variant whose file has none of its own, as well."""
    settings = {"lora_r": 4, "lora_alpha": 8, "lora_variant": variant, "lora_query": True, "lora_value": True, "lora_mlp": True}
    model, again = tiny.tiny(**settings), tiny.tiny(**settings)
    torch.testing.assert_close(model(IDX), tiny.tiny()(IDX))
    tiny.move_adapters(model)
    checkpoint.load_adapter(again, adapter_state(model), "a file")
    moved = model(IDX)
    assert torch.equal(again(IDX), moved) and (moved - tiny.tiny()(IDX)).abs().max() > 0.1
    merge_lora_weights(model)
    torch.testing.assert_close(model(IDX), moved, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def dora(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """A run with DoRA. Do not write into its folder."""
    return runs.finetune("finetune_lora", base, data, tmp_path_factory.mktemp("runs") / "run", **DORA)


def test_a_run_learns_is_saved_and_merged(dora: runs.Run, base: Path, data: Path) -> None:
    run = dora
    assert run.code == 0, run.err
    losses = run.column("val_loss")
    assert losses[-1] < losses[0]
    weights = runs.load(run.final / "lit_model.pth.lora")["model"]
    assert {name.rpartition(".")[2] for name in weights} == {"lora_A", "lora_B", "lora_magnitude"}
    whole, adapted = (checkpoint.load_model(folder, torch.float32) for folder in (run.final, run.out_dir / "step-000006"))
    samples = runs.val_samples(base, data)
    assert abs(runs.plain_loss(adapted, samples) - losses[-1]) < 1e-5
    assert abs(runs.plain_loss(whole, samples) - losses[-1]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(DORA, id="dora"),
        pytest.param({"loraplus_lr_ratio": 4.0, "train__neftune_noise_alpha": 5.0}, id="lora+ with noise"),
        pytest.param({"train__word_dropout": 0.3}, id="word dropout"),
        pytest.param({**jobs.SKIP, "lora_freeze_a": True}, id="lora-fa"),
        pytest.param({"lora_variant": "pissa", "lora_mlp": True, "lora_dropout": 0.1}, id="pissa"),
        pytest.param(WARM, id="warm-up"),
        pytest.param({**DORA, "quantize": "int8"}, id="int8"),
    ],
)
def test_a_resumed_run_is_the_same(settings: dict[str, object], dora: runs.Run, base: Path, data: Path, tmp_path: Path) -> None:
    """With the warm-up, DoRA is in the frozen prefix too, which is cached."""
    resumed = tmp_path / "other" / "run"
    whole = dora.out_dir if settings == DORA else runs.finetune("finetune_lora", base, data, tmp_path / "one" / "run", **settings).out_dir
    shutil.copytree(whole, resumed)
    for folder in (*sorted(resumed.glob("step-*"))[1:], resumed / "final", resumed / "best"):
        shutil.rmtree(folder)
    (resumed / "report.json").unlink()
    again = runs.finetune("finetune_lora", base, data, resumed, "--resume", "true", **settings)
    assert again.code == 0, again.err
    assert jobs.curve(resumed) == jobs.curve(whole)
    mine, theirs = jobs.results(resumed), jobs.results(whole)
    assert {name: mine[name] for name in theirs if name in mine} == {name: theirs[name] for name in mine}


@pytest.mark.slow
def test_the_prefix_with_dora_may_be_cached_or_not(base: Path, data: Path, tmp_path: Path) -> None:
    one, other = (
        runs.finetune("finetune_lora", base, data, tmp_path / cache, **{**WARM, "lora_dropout": 0.0, "skip2lora_cache": cache})
        for cache in ("memory", "off")
    )
    assert one.column("train_loss") == pytest.approx(other.column("train_loss"), rel=1e-5)
