"""The model card says what the run's folders say, and nothing that is nobody's business."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from litgpt.__main__ import load
from litgpt.args import as_config
from litgpt.cli import parse
from litgpt.convert.card import command, write_card
from litgpt.data import TextFiles
from tests.helpers import tiny
from tests.helpers.runs import Run, finetune, write_data

README = "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [chat]\n---\n\n# The base\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> Run:
    """A run of 6 steps with checkpoints every 2 and validation at 0, 4 and 6."""
    folder = tmp_path_factory.mktemp("runs")
    base = tiny.write_base(folder / "base", write_tiny_tokenizer, hf_config={"org": "some-org", "name": "Tiny-1B"})
    (base / "README.md").write_text(README)
    settings: dict[str, Any] = {
        "data__mask_prompt": True,
        "lora_r": 4,
        "lora_key": True,
        "lora_mlp": True,
        "log__project": "secret project",
    }
    done = finetune(
        "finetune_lora", base, write_data(folder / "my data.json"), folder / "out" / "first", access_token="hf_" + 30 * "x", **settings
    )
    assert done.code == 0, done.err
    return done


def card(source: Path, target: Path, kind: Any = "lora") -> tuple[dict[str, Any], str]:
    target.mkdir(exist_ok=True)
    write_card(target, source, kind)
    _, front, text = (target / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_front_matter(run: Run, tmp_path: Path) -> None:
    front, text = card(run.final, tmp_path / "adapter")
    assert front == {
        "base_model": "some-org/Tiny-1B",
        "license": "apache-2.0",
        "language": ["en"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["litgpt", "lora"],
    }
    assert text.startswith("\n# A LoRA adapter in PEFT's format for some-org/Tiny-1B\n")
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "adapter")' in text
    front, text = card(run.final, tmp_path / "skip", "skip2lora")
    assert (front["library_name"], front["tags"]) == ("litgpt", ["litgpt", "lora", "skip2-lora"])
    assert 'load_skip2lora(model, "skip")' in text
    front, text = card(run.final, tmp_path / "model", "model")
    assert (front["library_name"], front["base_model"], front["tags"]) == ("transformers", "some-org/Tiny-1B", ["litgpt"])
    assert "tuned from some-org/Tiny-1B" in text and "prompt_style" not in text


def test_data_settings_and_losses(run: Run, tmp_path: Path) -> None:
    _, text = card(run.final, tmp_path / "adapter")
    assert "litgpt.data.JSON (my data.json); 10 % of it held out for validation; loss on the answers only." in text
    for line in ("| lora_r | 4 |", "| lora_mlp | True |", "| train.epochs | 2 |", "| optimizer.lr | 0.02 |"):
        assert line in text
    losses = run.column("val_loss")
    assert len(losses) == 3 and f"| before | {losses[0]:.4f} |" in text and f"| step 6 | {losses[-1]:.4f} |" in text
    _, text = card(run.out_dir / "step-000004", tmp_path / "middle")
    assert f"| step 4 | {losses[1]:.4f} |" in text and "step 6" not in text
    metrics = tmp_path / "run" / "logs" / "version_0" / "metrics.csv"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("step,val_loss\n0,3.0\n2,1.25\n4,1.5\n")
    shutil.copytree(run.final, tmp_path / "run" / "best")
    _, text = card(tmp_path / "run" / "best", tmp_path / "best")
    assert "| before | 3.0000 | 20.09 |" in text and "| step 2 | 1.2500 | 3.49 |" in text and "step 4" not in text


def test_the_command_is_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It parses, in a folder that has the named files, to the run's own settings."""
    settings = yaml.safe_load((run.final / "hyperparameters.yaml").read_text())
    words = shlex.split(command(settings).replace("\\\n", " "))
    assert words[:3] == ["litgpt", "finetune_lora", "base"] and "--out_dir" in words
    monkeypatch.chdir(run.out_dir.parents[1])
    again = as_config(parse("litgpt finetune", load("finetune_lora"), words[2:]))
    for values in (again, settings):
        values["data"]["init_args"]["json_path"] = Path(values["data"]["init_args"]["json_path"]).name
        values["checkpoint_dir"], values["out_dir"] = Path(values["checkpoint_dir"]).name, Path(values["out_dir"]).name
    again["log"] = settings["log"]  # names of projects are not the training's
    assert {key: value for key, value in again.items() if key in settings} == settings


def test_patterns_are_one_word_for_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "--lora_rank_pattern.h.1.attn.qkv").touch()  # what a shell would make of the first
    patterns = {"h.[01].attn.qkv": 2, "h.(2|3).mlp.proj": 3, "mlp.fc_1": 4}
    text = command({"checkpoint_dir": "base", "lora_r": 8, "lora_rank_pattern": patterns})
    script = f'litgpt() {{ for word; do echo "$word"; done; }}\n{text}'
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True)
    words = [word for key, rank in patterns.items() for word in (f"--lora_rank_pattern.{key}", str(rank))]
    assert done.stdout.split("\n")[:-1] == ["finetune_lora", "base", *words], done.stderr


def test_hub_data_is_named(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "final"
    source.mkdir()
    settings = yaml.safe_load((run.final / "hyperparameters.yaml").read_text())
    settings["data"] = {"class_path": "litgpt.data.alpaca_2k.Alpaca2k", "init_args": {"download_dir": "/data/x"}}
    (source / "hyperparameters.yaml").write_text(yaml.safe_dump(settings))
    front, text = card(source, tmp_path / "card")
    assert front["datasets"] == ["mhenrichsen/alpaca_2k_test"] and "--data Alpaca2k" in text
    settings["data"]["class_path"] = "os.system"
    (source / "hyperparameters.yaml").write_text(yaml.safe_dump(settings))
    assert "datasets" not in card(source, tmp_path / "other")[0]


def test_nothing_private(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/people/ann")
    source = tmp_path / "final"
    source.mkdir()
    settings = yaml.safe_load((run.final / "hyperparameters.yaml").read_text())
    settings |= {"access_token": "plain-word", "checkpoint_dir": "/people/ann/models/base", "out_dir": "~/runs/here"}
    settings["token"] = {"of": {"the": "deep one"}}
    settings["data"]["init_args"] |= {
        "json_path": "/people/ann/private/answers.json",
        "api_key": "k-123",
        "prompt_style": "see /people/ann/x, hf_abcdefghijklmnopqrst",
        "url": "https://ann:pass@example.org/set",
    }
    (source / "hyperparameters.yaml").write_text(yaml.safe_dump(settings))
    _, text = card(source, tmp_path / "card")
    for word in ("/people", "ann/", "private", "plain-word", "k-123", "deep one", "hf_abc", "pass@", str(run.out_dir), "secret project"):
        assert word not in text, word
    assert "answers.json" in text and "litgpt finetune_lora base" in text and "--out_dir here" in text


def test_a_readme_that_is_there_stays(run: Run, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    write_card(tmp_path, run.final, "lora")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_checkpoint_that_no_run_wrote(run: Run, tmp_path: Path) -> None:
    front, text = card(run.out_dir.parents[1] / "base", tmp_path / "model", "model")
    assert "base_model" not in front and front["library_name"] == "transformers"
    assert "## Command" not in text and "# A causal language model, some-org/Tiny-1B" in text
    assert json.dumps(front)


def test_settings_of_0_are_in_the_table(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "final"
    source.mkdir()
    settings = yaml.safe_load((run.final / "hyperparameters.yaml").read_text())
    settings |= {"seed": 0, "lora_dropout": 0.0, "lora_rslora": False, "precision": None}
    (source / "hyperparameters.yaml").write_text(yaml.safe_dump(settings))
    _, text = card(source, tmp_path / "card")
    assert "| seed | 0 |" in text and "| lora_dropout | 0.0 |" in text and "| lora_rslora" not in text and "| precision" not in text


def test_pretraining(run: Run, tmp_path: Path) -> None:
    """From scratch nothing is tuned, and the command is no fine-tuning; continued, the model is based on the first one."""
    base = run.out_dir.parents[1] / "base"
    source = shutil.copytree(base, tmp_path / "final")
    (base / "README.md").write_text(README.replace("license", "model_name: a---b\nlicense"))
    pretraining: Any = load("pretrain")
    for start, front_matter in ({"model_name": "pythia-14m"}, {}), ({"initial_checkpoint_dir": base}, {"base_model": "some-org/Tiny-1B"}):
        settings = pretraining(**start, tokenizer_dir=tmp_path / "words", data=TextFiles(train_data_path=tmp_path / "texts"))
        (source / "hyperparameters.yaml").write_text(yaml.safe_dump(settings.hyperparameters()))
        front, text = card(source, tmp_path / f"card of {len(start)}{next(iter(start))}", "model")
        license = {"license": "apache-2.0"} if front_matter else {}
        assert {key: front[key] for key in ("base_model", "license") if key in front} == {**front_matter, **license}
        words = shlex.split(command(settings.hyperparameters()).replace("\\\n", " "))
        assert words[:2] == ["litgpt", "pretrain"] and "--train.max_tokens" not in words
        assert f"--{next(iter(start))}" in words
        assert ("trained from scratch in the shape of some-org/Tiny-1B" in text) == (not front_matter)
    (base / "README.md").write_text(README)
