"""`litgpt pretrain`: against a plain loop in transformers, resumed, continued from a checkpoint, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from litgpt import families
from litgpt.__main__ import main
from litgpt.args import EvalArgs, TrainArgs
from litgpt.cli import parse
from litgpt.data import TextFiles
from litgpt.lora import Config
from litgpt.pretrain import Pretrain, fresh, setup
from tests.helpers import runs, tiny
from tests.helpers.runs import Run, load

PRESETS = Path(__file__).parent.parent / "config_hub" / "pretrain"
SHAPE = {
    **tiny.TINY,
    **tiny.SPEAKING,
    "n_layer": 2,
    "name": "Llama-tiny",
    "norm_eps": 1e-6,
    "rope_base": 10000,
    "block_size": 32,
}
SETTINGS = {
    "precision": "32-true",
    "devices": 1,
    "train.global_batch_size": 4,
    "train.micro_batch_size": 2,
    "train.max_steps": 7,
    "train.lr_warmup_steps": 2,
    "train.save_interval": 3,
    "eval.interval": 7,
    "eval.initial_validation": True,
    "optimizer.lr": 0.01,
}
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven", "llamas", "count"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for n in range(3):
        (folder / f"{n}.txt").write_text(" ".join(WORDS[(i * i + n * i) % len(WORDS)] for i in range(120)))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    return write_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def pretrain(text: Path, out_dir: Path, *words: str, scratch: Path | None = None, **settings: Any) -> Run:
    options: dict[str, Any] = {**SETTINGS, **{key.replace("__", "."): value for key, value in settings.items()}}
    argv = ["pretrain", "--data", str(text), "--out_dir", str(out_dir), *words]
    if scratch:
        argv += [
            "--tokenizer_dir",
            str(scratch),
            *(word for key, value in SHAPE.items() for word in (f"--model_config.{key}", str(value))),
        ]
    return runs.call(argv + [word for key, value in options.items() for word in (f"--{key}", str(value))], out_dir)


@pytest.fixture(scope="module")
def run(text: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    done = pretrain(text, tmp_path_factory.mktemp("runs") / "out", scratch=tokenizer)
    assert done.code == 0, done.err
    return done


def blocks(text: Path, tokenizer: Path, names: str) -> torch.Tensor:
    """Blocks of 33 tokens, by the tokenizer of transformers."""
    backend = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    ids: list[int] = []
    for name in names:
        own = backend.encode((text / f"{name}.txt").read_text(), add_special_tokens=False)
        if settings.get("bos_token"):
            ids += [backend.convert_tokens_to_ids(settings["bos_token"]), *own]
        else:
            ids += [*own, backend.convert_tokens_to_ids(settings["eos_token"])]
    return torch.tensor(ids[: len(ids) // 33 * 33]).view(-1, 33)


def test_as_in_transformers(run: Run, text: Path, tokenizer: Path, tmp_path: Path) -> None:
    """The same fresh weights, blocks, order and schedule give the same losses in a loop over a model of transformers."""
    assert main(["convert_from_litgpt", str(run.out_dir / "initial"), str(tmp_path / "hf")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, attn_implementation="eager")
    train, val = blocks(text, tokenizer, "12"), blocks(text, tokenizer, "0")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses, step = [], 0

    def loss_on(batch: torch.Tensor) -> torch.Tensor:
        return model(batch, labels=batch).loss

    with torch.no_grad():
        before = loss_on(val).item()
    while step < 7:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(42 + 1_000_003 * (step // math.ceil(len(train) / 4))))
        for batch in order.split(4):
            if step == 7:
                break
            rate = 0.01 * (step + 1) / 2 if step < 2 else 4e-5 + (0.01 - 4e-5) * 0.5 * (1 + math.cos(math.pi * (step - 2) / 5))
            optimizer.param_groups[0]["lr"] = rate
            loss = loss_on(train[batch])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            step += 1
    with torch.no_grad():
        after = loss_on(val).item()
    assert run.column("train_loss") == pytest.approx(losses, rel=1e-4)
    assert run.column("val_loss") == pytest.approx([before, after], rel=1e-4)
    assert after < before - 0.5 and before == pytest.approx(math.log(320), rel=0.1)


def test_resumed_in_mid_epoch_it_is_the_same(run: Run, text: Path, tokenizer: Path, tmp_path: Path) -> None:
    shutil.copytree(run.out_dir, tmp_path / "out")
    for folder in ("final", "best", "step-000006"):
        shutil.rmtree(tmp_path / "out" / folder)
    (tmp_path / "out/report.json").unlink()
    again = pretrain(text, tmp_path / "out", scratch=tokenizer, resume="auto")
    assert again.code == 0 and "resumed from" in again.err and "step-000003" in again.err, again.err
    before, after = load(run.final / "lit_model.pth"), load(again.final / "lit_model.pth")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_compiled(run: Run, text: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Blocks compiled by inductor learn the same."""
    done = pretrain(text, tmp_path / "out", scratch=tokenizer, compile="true")
    assert done.code == 0, done.err
    before, after = load(run.final / "lit_model.pth"), load(done.final / "lit_model.pth")
    assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)  # sums of compiled code round otherwise


def test_a_run_that_is_replaced_has_the_tokenizer_that_is_named_now(run: Run, text: Path, tokenizer: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tokenizer, tmp_path / "other")
    settings = json.loads((tokenizer / "tokenizer.json").read_text())
    settings["model"]["merges"] = []
    (other / "tokenizer.json").write_text(json.dumps(settings))
    shutil.copytree(run.out_dir, tmp_path / "out")
    again = pretrain(text, tmp_path / "out", scratch=other, overwrite="true")
    assert again.code == 0, again.err
    assert again.column("train_loss") != run.column("train_loss")
    assert (again.final / "tokenizer.json").read_bytes() == (other / "tokenizer.json").read_bytes()


def test_its_hyperparameters_start_it_again(run: Run, tmp_path: Path) -> None:
    again = runs.call(
        ["pretrain", "--config", str(run.final / "hyperparameters.yaml"), "--out_dir", str(tmp_path / "out")], tmp_path / "out"
    )
    assert again.code == 0, again.err
    assert again.column("train_loss") == run.column("train_loss")
    files = {path.name for path in again.final.iterdir()}
    assert {"lit_model.pth", "model_config.yaml", "hyperparameters.yaml", "tokenizer.json", "prompt_style.yaml"} <= files


def test_continued(run: Run, text: Path, tmp_path: Path) -> None:
    """From a checkpoint: its weights, tokenizer and losses. A step's folder becomes a checkpoint without the optimizer's state."""
    made = tmp_path / "made"
    assert main(["convert_pretrained_checkpoint", str(run.out_dir / "step-000006"), str(made)]) == 0
    assert not [path for path in made.iterdir() if path.name.startswith("training_state")]
    one = {"train__max_steps": 1, "train__lr_warmup_steps": 1, "train__save_interval": 100}
    whole = pretrain(text, tmp_path / "a", "--initial_checkpoint_dir", str(run.final), **one)
    assert whole.code == 0, whole.err
    assert whole.column("val_loss")[0] == pytest.approx(run.column("val_loss")[-1], rel=1e-6)
    assert not (tmp_path / "a/initial").exists()
    assert pretrain(text, tmp_path / "b", "--initial_checkpoint_dir", str(made), **one).code == 0
    words = [
        "finetune_lora",
        str(run.final),
        "--data",
        str(text),
        "--out_dir",
        str(tmp_path / "c"),
        "--max_steps",
        "1",
        "--precision",
        "32-true",
    ]
    tuned = runs.call([*words, "--eval.initial_validation", "true", "--eval.max_new_tokens", "3"], tmp_path / "c")
    assert tuned.code == 0, tuned.err
    assert tuned.column("val_loss")[0] == pytest.approx(run.column("val_loss")[-1], rel=1e-6)


def test_bf16_has_fp32_masters(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    done = pretrain(text, tmp_path / "out", scratch=tokenizer, precision="bf16-true", optimizer__lr=1e-5, train__max_steps=3)
    assert done.code == 0, done.err
    weights = load(done.final / "lit_model.pth")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    masters = [name for name in (done.out_dir / "step-000003").iterdir() if name.suffix == ".safetensors"]
    assert masters


def test_rehearsal_writes_nothing(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    done = pretrain(text, tmp_path / "out", scratch=tokenizer, dry_run=True)
    assert done.code == 0 and not (tmp_path / "out").exists(), done.err


@pytest.mark.parametrize("file", sorted(PRESETS.glob("[!_]*.yaml")), ids=lambda file: file.stem)
def test_presets(file: Path, tmp_path: Path) -> None:
    """They name models and data that exist, and state differences from the defaults only."""
    (tmp_path / "a.txt").write_text("text")
    values = yaml.safe_load(file.read_text())
    words = [] if "data" in values else ["--data", str(tmp_path)]
    settings = parse("litgpt pretrain", Pretrain, [str(file), *words])
    name, changes = settings["model_name"], settings["model_config"] or {}
    assert (Config.from_name(name) if name else Config(**changes)).V and settings["data"] is not None
    assert settings["train"].epochs is None and settings["optimizer"]["init_args"]["betas"] == [0.9, 0.95]
    plain = parse("litgpt pretrain", Pretrain, ["pythia-14m", *words])
    for name, value in values.get("train", {}).items():
        assert getattr(plain["train"], name) != value, name


def test_a_whole_config_beside_a_name(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    """As in LitGPT's config_hub: a model_config with a name is the whole config, whatever model_name says."""
    done = pretrain(text, tmp_path / "out", scratch=tokenizer, model_name="stories15M", train__max_steps=1)
    assert done.code == 0, done.err
    assert Config.from_checkpoint(done.out_dir / "final").base_dict() == Config(**SHAPE).base_dict()


def test_fresh_weights() -> None:
    """Deviations as GPT-NeoX has them, by the formulas; the seed decides all values."""
    config = Config(**{**SHAPE, "n_layer": 4, "n_embd": 256, "padded_vocab_size": 2000, "intermediate_size": 512})
    model = fresh(config, 1)
    deviations = {name: value.std().item() for name, value in model.state_dict().items() if value.dim() == 2}
    for name, deviation in deviations.items():
        expected = 1 / 16 / 4 if ".proj." in name else math.sqrt(2 / 5 / 256)
        assert deviation == pytest.approx(expected, rel=0.05), name
    state, again = model.state_dict(), fresh(config, 1).state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not torch.equal(state["lm_head.weight"], fresh(config, 2).lm_head.weight)


def test_another_model_than_the_one_to_start_from(run: Run, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["pythia-14m"], "holds a model with name 'Llama-tiny', and the command names 'pythia-14m'"),
        (["--model_config.n_layer", "3"], "holds a model with n_layer 2, and the command names 3"),
    ):
        options = ["--data", str(text), "--initial_checkpoint_dir", str(run.final), "--out_dir", str(tmp_path / "out")]
        assert main(["pretrain", *words, *options]) == 1
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
    one = {"train__max_steps": 1, "train__lr_warmup_steps": 1, "model_config__n_layer": 2}
    assert pretrain(text, tmp_path / "same", "--initial_checkpoint_dir", str(run.final), **one).code == 0


def test_another_name_for_the_model_to_start_from(run: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `pretrain Llama-3.2-1B --initial_checkpoint_dir meta-llama/Llama-3.2-1B-Instruct` of LitGPT."""
    base = replace(Config.from_checkpoint(run.final), name="base", hf_config={"org": "a", "name": "base"})
    monkeypatch.setattr(Config, "from_name", lambda name, **changes: replace(base, **changes))
    one = {"train__max_steps": 1, "train__lr_warmup_steps": 1, "model_name": "base"}
    done = pretrain(text, tmp_path / "same", "--initial_checkpoint_dir", str(run.final), **one)
    assert done.code == 0 and Config.from_checkpoint(done.final).name == "Llama-tiny"


def test_a_config_in_python(text: Path, tokenizer: Path, tmp_path: Path) -> None:
    """LitGPT's `setup` takes a `Config`."""
    shape = Config(block_size=16, n_layer=1, n_embd=16, n_head=2, padded_vocab_size=512)
    train = TrainArgs(max_steps=1, global_batch_size=1, micro_batch_size=1, lr_warmup_steps=1)
    setup("mine", shape, tmp_path / "out", tokenizer_dir=tokenizer, data=TextFiles(text), train=train, eval=EvalArgs(max_iters=1))
    assert Config.from_checkpoint(tmp_path / "out" / "final").base_dict() == shape.base_dict()


def test_names_and_mistakes(text: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", "list"]) == 0
    assert capsys.readouterr().out.split() == list(families.names())
    for words, said in (
        (["--data", str(text)], "there is no model to train: give model_name"),
        (["pythia-14m", "--data", str(text)], "tokenizer_dir is missing"),
        (["no-such-model", "--data", str(text), "--tokenizer_dir", str(tokenizer)], "no model is named"),
        (["pythia-14m", "--tokenizer_dir", str(tokenizer)], "no data"),
        (["pythia-14m", "--data", str(text), "--tokenizer_dir", str(tmp_path / "none")], "does not exist"),
    ):
        assert main(["pretrain", *words, "--out_dir", str(tmp_path / "out")]) in (1, 2)
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    for data in ("LitData", "TinyLlama"):
        words = ["pythia-14m", "--data", data, "--data.data_path", str(tmp_path / "none"), "--tokenizer_dir", str(tokenizer)]
        assert main(["pretrain", *words, "--out_dir", str(tmp_path / "none-out")]) == 1 and "missing" in capsys.readouterr().err
        assert not (tmp_path / "none-out").exists()  # no weights yet
    done = pretrain(text, tmp_path / "long", scratch=tokenizer, model_config__block_size=4096)
    assert done.code == 1 and "shorter than a block of 4,097 tokens" in done.err
