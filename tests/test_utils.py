"""LitGPT's helpers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from litgpt import utils
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


def test_cycle_iterator() -> None:
    iterator = utils.CycleIterator(range(3))
    assert iterator.epoch == 0 and [next(iterator) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0] and iterator.epoch == 2


def test_the_rest() -> None:
    assert utils.parse_devices(2) == 2 and utils.parse_devices("auto") >= 1 and utils.init_out_dir(Path("a")) == Path("a")
    with pytest.raises(UserError, match="devices"):
        utils.parse_devices(0)
    assert utils.get_default_supported_precision(training=False) in ("bf16-true", "32-true")
    layer = torch.nn.Linear(2, 2)
    before = layer.weight.clone()
    utils.reset_parameters(torch.nn.Sequential(layer))
    assert not torch.equal(layer.weight, before)
