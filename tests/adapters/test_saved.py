"""`modules_to_save`: the embedding and the head trained in full, tied or not, in runs and in PEFT's format."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.testing import assert_close

from litgpt import checkpoint, lora
from litgpt.__main__ import main
from litgpt.adapters.base import adapter_parameters, adapter_state, renew_adapters
from litgpt.api import LLM
from litgpt.convert import peft as ours
from litgpt.memory import estimate
from tests.helpers import family_configs as configs, jobs, runs, tiny
from tests.helpers.cases import first, quick

IDX = tiny.ids(2, 17)
BOTH = ["wte", "lm_head"]
CHOICES = pytest.mark.parametrize("chosen", [["wte"], ["lm_head"], BOTH], ids="-".join)
TIES = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def model_of(tied: bool, chosen: list[str], dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A tiny model with LoRA, loaded as commands load one."""
    source = tiny.tiny()
    if tied:
        source.tie_head()
    config = lora.Config(**tiny.TINY, **{"lora_r": 2, "lora_query": True, "modules_to_save": chosen, **settings})
    model = checkpoint.empty_model(config, source.state_dict(), "here")
    torch.manual_seed(1)
    checkpoint.load_base(model, source.state_dict(), dtype, "here")
    lora.mark_only_lora_as_trainable(model)
    return model.eval()


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    return tiny.write_base(tmp_path_factory.mktemp("base"), write_tiny_tokenizer)


@pytest.fixture(scope="module")
def base(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied one."""
    folder = shutil.copytree(untied, tmp_path_factory.mktemp("base") / "tied")
    weights = checkpoint.load_weights(folder / "lit_model.pth", mapped=False)
    checkpoint.save_weights({**weights, "lm_head.weight": weights["transformer.wte.weight"]}, folder / "lit_model.pth")
    return folder


@TIES
@CHOICES
def test_what_is_trained_and_its_gradient(tied: bool, chosen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Against autograd on a model without adapters, whose head is tied only if both are trained: a tied weight has one gradient."""
    model = model_of(tied, chosen)
    plain = tiny.tiny()
    if tied:
        plain.tie_head()
        if len(chosen) == 1:
            plain.untie_head()
    for one in (model, plain):
        F.cross_entropy(one(IDX)[:, :-1].flatten(0, 1), IDX[:, 1:].flatten()).backward()
    weights = {"wte": "transformer.wte.weight", "lm_head": "lm_head.weight"}
    own, theirs = (dict(m.named_parameters(remove_duplicate=False)) for m in (model, plain))
    trained = {name for name, p in own.items() if p.requires_grad and "lora_" not in name}
    assert trained == {weights[name] for name in chosen}
    for name in trained:
        assert_close(own[name].grad, theirs[name].grad)
    assert model.is_tied == (tied and chosen == BOTH)
    unique = {id(p): p for p in model.parameters() if p.requires_grad}
    monkeypatch.setattr("litgpt.memory.is_supported", lambda dtype: False)
    assert estimate(model.config, 16, tied=tied).trained == sum(p.numel() for p in unique.values())
    assert estimate(model.config, 16, tied=tied, width=2).weights == 2 * sum(p.numel() for p in model.parameters() if id(p) not in unique)


@TIES
@CHOICES
@torch.no_grad()
def test_merging_gives_a_plain_model_of_the_base_s_dtype(tied: bool, chosen: list[str]) -> None:
    model = tiny.move_adapters(model_of(tied, chosen, torch.bfloat16), size=0.1)
    for name, parameter in adapter_parameters(model).items():
        if "lora_" not in name:
            assert parameter.dtype == torch.float32
            parameter += 0.01
    assert model.dtype == torch.bfloat16 and model.transformer["wte"](IDX).dtype == torch.bfloat16
    want = model(IDX)
    lora.merge_lora_weights(model)
    weights = model.state_dict()
    assert want.dtype == torch.bfloat16 and {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert checkpoint.is_tied(weights) == (tied and chosen == BOTH)
    plain = tiny.tiny().bfloat16()
    plain.load_state_dict(weights)
    assert_close(plain(IDX), want, atol=0.05, rtol=0.05)


def moved(family: str, chosen: list[str], tie: bool) -> Any:
    """A model of the family whose LoRA and saved modules have moved."""
    model = configs.ours(family, lora_r=3, lora_alpha=7, lora_query=True, lora_value=True, modules_to_save=chosen)
    if tie:
        model.tie_head()
    renew_adapters(model)
    tiny.move_adapters(model, size=0.1)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in {id(p): (name, p) for name, p in adapter_parameters(model).items() if "lora_" not in name}.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        assert name in ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")
    return model


@pytest.mark.parametrize("family", quick(["llama", "llama multi-query tied", "gpt2", "gpt_neox", "gemma2", "phi"], "llama", "gpt2"))
@CHOICES
def test_peft_computes_the_same_and_back(family: str, chosen: list[str], tmp_path: Path) -> None:
    hf, fields, stored = configs.pair(family)
    tied, kind = checkpoint.is_tied(stored), hf.config.model_type
    model = moved(family, chosen, tied and chosen == BOTH)
    settings, tensors = ours.to_peft(model.config, adapter_state(model), "org/base", kind)
    ours.write(tmp_path, settings, tensors)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(hf), tmp_path)
    with torch.no_grad():
        want = model(IDX)
        assert_close(theirs(IDX).logits, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
        assert (want - hf(IDX).logits).abs().max() > 0.05
    own, weights = ours.from_peft(settings, tensors, lora.Config(**fields), tmp_path, kind)
    assert own["modules_to_save"] == chosen
    state = adapter_state(model)
    assert weights.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in weights.items())


@pytest.mark.parametrize("tying", quick([False, True], True))
@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="-".join)
@pytest.mark.parametrize("family", ["llama", "llama multi-query tied"])
def test_adapters_of_peft(family: str, modules: list[str], tying: bool, tmp_path: Path) -> None:
    """PEFT unties what it trains, unless it is told not to."""
    hf, fields, stored = configs.pair(family)
    base = tmp_path / "base"
    base.mkdir()
    checkpoint.save_config(lora.Config(**fields), base)
    hf.config.save_pretrained(base)
    checkpoint.save_weights(stored, base / "lit_model.pth")
    chosen = {"modules_to_save": list(modules), "ensure_weight_tying": tying}
    made: Any = peft.get_peft_model(copy.deepcopy(hf), peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **chosen))
    generator = torch.Generator().manual_seed(5)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    made.save_pretrained(tmp_path / "theirs")
    settings, weights = ours.load(tmp_path / "theirs", base)
    config = lora.Config(**fields, **settings)
    model = checkpoint.build_model(config, base, torch.float32)
    checkpoint.load_adapter(model, weights, "here")
    with torch.no_grad():
        assert_close(model.eval()(IDX), made.eval()(IDX).logits, rtol=1e-5, atol=1e-5)
    again, tensors = ours.to_peft(config, weights, "base", "llama")
    kept = load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert tensors.keys() == kept.keys() and all(torch.equal(value, kept[name]) for name, value in tensors.items())
    assert set(again["modules_to_save"]) == {name.split(".")[-2] for name in kept if "lora_" not in name}


@pytest.mark.parametrize(
    ("kind", "chosen"),
    quick([("untied", BOTH), ("base", BOTH), ("base", ["wte"]), ("base", ["lm_head"])], ("base", BOTH)),
)
def test_a_run_learns_is_resumed_merged_and_used(
    kind: str, chosen: list[str], request: pytest.FixtureRequest, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = request.getfixturevalue(kind)
    words = ["--verbose", "true", "--modules_to_save", json.dumps(["embed_tokens" if name == "wte" else name for name in chosen])]
    run = runs.finetune("finetune_lora", base, data, tmp_path / "a" / "run", *words)
    assert run.code == 0, run.err
    losses = run.column("val_loss")
    tied = checkpoint.is_tied(checkpoint.load_weights(base / "lit_model.pth")) and chosen == BOTH
    assert losses[-1] < losses[0] and f"trained in full: {' and '.join(chosen)}{', which are one weight' if tied else ''}\n" in run.err
    adapted, whole = (checkpoint.load_model(folder, torch.float32) for folder in (run.out_dir / "step-000006", run.final))
    samples = runs.val_samples(base, data)
    assert abs(runs.plain_loss(adapted, samples) - losses[-1]) < 1e-5 and abs(runs.plain_loss(whole, samples) - losses[-1]) < 1e-4
    before = checkpoint.load_weights(base / "lit_model.pth")
    assert {
        name for name in ("transformer.wte.weight", "lm_head.weight") if not torch.equal(dict(whole.state_dict())[name], before[name])
    } == {{"wte": "transformer.wte.weight", "lm_head": "lm_head.weight"}[name] for name in chosen}
    resumed = tmp_path / "b" / "run"
    shutil.copytree(run.out_dir, resumed)
    for folder in (*sorted(resumed.glob("step-*"))[1:], resumed / "final", resumed / "best"):
        shutil.rmtree(folder)
    (resumed / "report.json").unlink()
    again = runs.finetune("finetune_lora", base, data, resumed, *words, "--resume", "true")
    assert again.code == 0, again.err
    assert jobs.curve(resumed) == jobs.curve(run.out_dir)
    mine, theirs = (checkpoint.load_weights(folder / "final/lit_model.pth.lora") for folder in (resumed, run.out_dir))
    assert mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())
    capsys.readouterr()
    assert main(runs.greedy_words(run.out_dir / "step-000006", "add 3 and 4", 5)) == 0
    text = capsys.readouterr().out
    assert main(runs.greedy_words(run.final, "add 3 and 4", 5)) == 0
    assert text == capsys.readouterr().out
    llm = LLM.load(run.out_dir / "step-000006", precision="bf16-true", device="cpu")
    assert llm.model.dtype == torch.bfloat16 and llm.generate("add 3 and 4", max_new_tokens=3) is not None


@pytest.mark.parametrize("settings", first([{"quantize": "int8"}, {"precision": "bf16-true"}, {**jobs.SKIP, "skip2lora_cache": "disk"}]))
def test_beside_quantised_blocks_and_the_cache(settings: dict[str, Any], base: Path, data: Path, tmp_path: Path) -> None:
    """The cache holds for a head that is trained: the features are its input."""
    chosen = "[lm_head]" if "skip2lora_enabled" in settings else "[wte, lm_head]"
    run = runs.finetune("finetune_lora", base, data, tmp_path / "run", "--modules_to_save", chosen, **settings)
    assert run.code == 0, run.err
    losses = run.column("val_loss")
    assert losses[-1] < losses[0] and ("training cache" in run.err) == ("skip2lora_enabled" in settings)


@pytest.mark.parametrize("group", BOTH)
def test_one_weight_has_the_rate_of_either_name(group: str, base: Path, data: Path, tmp_path: Path) -> None:
    """A step of SGD without a warm-up: the rate is in the difference."""
    plain = {"train__max_steps": 1, "train__lr_warmup_steps": 0, "optimizer": "SGD", "lora_dropout": 0.0}
    before = checkpoint.load_weights(base / "lit_model.pth")["lm_head.weight"]
    changes = []
    for name, words in {"one": [], "three": [f"--lr_ratios.{group}", "3"]}.items():
        run = runs.finetune("finetune_lora", base, data, tmp_path / name, "--modules_to_save", "[wte, lm_head]", *words, **plain)
        assert run.code == 0, run.err
        changes.append(checkpoint.load_weights(run.final / "lit_model.pth")["lm_head.weight"] - before)
    assert changes[0].abs().max() > 1e-4
    assert_close(changes[1], 3 * changes[0], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modules_to_save", "[ln_f]"], "modules_to_save names ln_f: wte (the embedding) and lm_head can be trained in full"),
        (["--modules_to_save", "[lm_head]", "--lora_head", "true"], "does not work with lora_head"),
        (
            ["--modules_to_save", "[wte, lm_head]", "--lr_ratios.wte", "2", "--lr_ratios.lm_head", "3"],
            "lr_ratios: transformer.wte.weight shares its weight with",
        ),
        (["--modules_to_save", "[wte]", "--skip2lora_enabled", "true"], "[wte] does not work with skip2lora_enabled, whose cache"),
        (["--modules_to_save", "[wte]", "--alora_enabled", "true"], "does not work with alora_enabled"),
        (["--modules_to_save", "[wte]", "--mtp_heads", "2"], "does not work with mtp_heads"),
        (["--modules_to_save", "[wte]", "--objective", "critic", "--lora_query", "false", "--lora_value", "false"], "modules_to_save"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, base: Path, data: Path, tmp_path: Path) -> None:
    run = runs.finetune("finetune_lora", base, data, tmp_path / "run", *words)
    assert run.code in (1, 2) and message in run.err and "Traceback" not in run.err and not (tmp_path / "run").exists()


def test_sweeps_and_other_formats_are_refused(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs.finetune("finetune_lora", base, data, tmp_path / "run", "--modules_to_save", "[lm_head]")
    capsys.readouterr()
    assert main(["convert_adapter", str(run.final), str(tmp_path / "out"), "--to", "gguf"]) == 1
    assert "llama.cpp has no modules_to_save" in capsys.readouterr().err
    words = [
        "sweep",
        str(base),
        "--data",
        str(data),
        "--modules_to_save",
        "[wte]",
        "--grid.lora_r",
        "[2, 4]",
        "--out_dir",
        str(tmp_path / "s"),
    ]
    assert main(words) == 1
    assert "modules_to_save trains weights of the base" in capsys.readouterr().err
