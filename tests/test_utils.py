"""LitGPT's helpers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning import Fabric

from litgpt import utils
from litgpt.args import LogArgs
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.quantize import quantise
from tests.helpers import tiny


@pytest.mark.parametrize("chunk_size", [0, 4, 7, 128])
@pytest.mark.parametrize("parts", [False, True])
def test_chunked_cross_entropy(chunk_size: int, parts: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, targets = torch.randn(2, 11, 13, generator=generator), torch.randint(0, 13, (2, 11), generator=generator)
    targets[0, :5] = -100
    given = list(logits.split(3, dim=1)) if parts else logits
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(utils.chunked_cross_entropy(given, targets, chunk_size), expected)
    assert utils.chunked_cross_entropy(logits, torch.full_like(targets, -100), chunk_size) == 0
    expected = F.cross_entropy(logits.flatten(0, 1), targets.clamp(min=0).flatten(), ignore_index=5)
    torch.testing.assert_close(utils.chunked_cross_entropy(logits, targets.clamp(min=0), chunk_size, 5), expected)


def test_num_parameters() -> None:
    model = torch.nn.Linear(3, 4)
    model.bias.requires_grad_(False)
    assert (utils.num_parameters(model), utils.num_parameters(model, True), utils.num_parameters(model, False)) == (16, 12, 4)
    gpt = tiny.tiny()
    before = utils.num_parameters(gpt)
    quantise(gpt, "int8")
    assert utils.num_parameters(gpt) == before


def test_folders(
    write_tiny_tokenizer: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tiny.write_base(tmp_path / "checkpoints/org/model", write_tiny_tokenizer)
    assert utils.extend_checkpoint_dir(Path("org/model")) == Path("checkpoints/org/model")
    assert utils.extend_checkpoint_dir(Path("org/none")) == Path("org/none") and utils.extend_checkpoint_dir(base) == base
    utils.check_valid_checkpoint_dir(base)
    assert utils.auto_download_checkpoint("org/model") == Path("checkpoints/org/model")
    utils.copy_config_files(base, tmp_path / "copy")
    assert {"model_config.yaml", "tokenizer.json"} <= {path.name for path in (tmp_path / "copy").iterdir()}
    with pytest.raises(FileNotFoundError, match="lacks lit_model.pth"):
        utils.check_valid_checkpoint_dir(tmp_path / "copy", raise_error=True)
    with pytest.raises(SystemExit) as end:
        utils.check_valid_checkpoint_dir(tmp_path / "none")
    assert end.value.code == 1 and "does not exist" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        utils.copy_config_files(tmp_path / "none", tmp_path / "x")
    utils.save_config(Config(**tiny.TINY), tmp_path / "copy")
    assert Config.from_checkpoint(tmp_path / "copy").n_embd == 32


def test_validate_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = tiny.tiny(), tmp_path / "lit_model.pth"
    state = {**model.state_dict(), "more": torch.zeros(1)}
    torch.save({"model": model.state_dict()}, file)
    assert utils.validate_checkpoint(file, model, verbose=False).is_valid and capsys.readouterr().err == ""
    state["lm_head.weight"] = torch.zeros(2, 2)
    del state["transformer.wte.weight"]
    torch.save(state, file)
    found = utils.validate_checkpoint(file, model)
    assert (found.missing_keys, found.unexpected_keys, found.errors) == (["transformer.wte.weight"], ["more"], [])
    assert found.shape_mismatches[0].endswith("checkpoint=(2, 2)") and "Missing keys (1): transformer.wte" in capsys.readouterr().err
    file.write_text("no checkpoint")
    assert "Failed to load" in utils.validate_checkpoint(file, model, verbose=False).errors[0]
    assert "not found" in utils.validate_checkpoint(tmp_path / "no.pth", model, verbose=False).summary()


def test_cycle_iterator() -> None:
    iterator = utils.CycleIterator(range(3))
    assert iterator.epoch == 0 and [next(iterator) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0] and iterator.epoch == 2


def test_the_rest() -> None:
    assert utils.parse_devices(2) == 2 and utils.parse_devices("auto") >= 1 and utils.init_out_dir(Path("a")) == Path("a")
    with pytest.raises(UserError, match="devices is 0: a number of devices from 1 on, or auto"):
        utils.parse_devices(0)
    assert utils.get_default_supported_precision(training=False) in ("bf16-true", "32-true")
    layer = torch.nn.Linear(2, 2)
    before = layer.weight.clone()
    utils.reset_parameters(torch.nn.Sequential(layer))
    assert not torch.equal(layer.weight, before)


def test_hyperparameters_of_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(out_dir: Path, rate: float = 0.1, epochs: int = 1) -> None:
        utils.save_hyperparameters(train, out_dir)

    for words in (["train.py"], ["/bin/litgpt", "finetune"]):
        monkeypatch.setattr(sys, "argv", [*words, str(tmp_path), "--rate", "0.5"])
        if len(words) == 1:
            utils.CLI(train)
        else:
            utils.save_hyperparameters(train, tmp_path)
        assert yaml.safe_load((tmp_path / "hyperparameters.yaml").read_text()) == {"out_dir": str(tmp_path), "rate": 0.5, "epochs": 1}


def test_captured_hyperparameters() -> None:
    number, path, settings, layer = 1, Path("x"), LogArgs(run="a"), torch.nn.Identity()
    captured = utils.capture_hparams()
    assert captured == {"number": number, "path": path, "settings": asdict(settings), "layer": str(layer)}


def test_resume_path(tmp_path: Path) -> None:
    assert utils.find_resume_path(False, tmp_path) is None and utils.find_resume_path("auto", tmp_path) is None
    assert utils.find_resume_path(Path("a/b.pth"), tmp_path) == Path("a/b.pth")
    with pytest.raises(FileNotFoundError, match="holds no step-.* to resume from"):
        utils.find_resume_path(True, tmp_path)
    for step in (9, 10):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "lit_model.pth").touch()
    assert utils.find_resume_path(True, tmp_path) == utils.find_resume_path("auto", tmp_path) == tmp_path / "step-10/lit_model.pth"


def test_parts_of_a_training_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    torch.save({"model": model.state_dict()}, tmp_path / "a.pth")
    utils.load_checkpoint(Fabric(accelerator="cpu", devices=1), other, tmp_path / "a.pth")
    assert torch.equal(other.weight, model.weight)
    optimizer = utils.instantiate_torch_optimizer({"class_path": "torch.optim.Adam", "init_args": {"lr": 1.0}}, model.parameters(), lr=0.5)
    assert type(optimizer).__name__ == "Adam" and optimizer.param_groups[0]["lr"] == 0.5
    for name in ("csv", "tensorboard"):
        assert Path(utils.choose_logger(name, tmp_path, "x").log_dir).is_relative_to(tmp_path / "logs" / name)
    with pytest.raises(ValueError, match="logger_name is 'none': choose csv"):
        utils.choose_logger("none", tmp_path, "x")
    monkeypatch.setenv("LIGHTNING_ARTIFACTS_DIR", "/a")
    assert (utils.init_out_dir(Path("b")), utils.init_out_dir(Path("/b"))) == (Path("/a/b"), Path("/b"))
