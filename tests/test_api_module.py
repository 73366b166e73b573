"""`LLM` as a module: forward and loss, saving, fresh weights, a Trainer, names on the hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer

import litgpt
from litgpt import LLM, adapter, adapter_v2, atomic, lora
from litgpt.__main__ import main
from litgpt.data import JSON
from litgpt.errors import UserError
from tests.helpers import fake_hub, runs, tiny
from tests.helpers.fake_hub import Hub

SCRIPT = """
import json, os, sys
from litgpt import LLM
llm = LLM.load(sys.argv[1], distribute=None)
llm.distribute("cpu", devices=2, precision="32-true", generate_strategy="tensor_parallel")
answer, drawn = llm.generate("add", temperature=0), llm.generate("add", temperature=1.0)
os.write(1, json.dumps({"rank": os.environ.get("RANK", "0"), "answer": answer, "drawn": drawn}).encode() + b"\\n")
"""
IDS = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def llm(base: Path) -> LLM:
    return LLM.load(base, precision="32-true")


def test_forward(llm: LLM) -> None:
    logits = llm(IDS)
    assert torch.equal(logits, llm.model(IDS)) and set(llm.state_dict()) == set(llm.model.state_dict())
    targets = IDS.clone()
    targets[0, :4] = -100
    again, loss = llm(IDS, targets)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    assert torch.equal(again, logits) and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert llm(IDS, targets, lambda scores, wanted: scores.sum() * 0 + wanted.size(-1))[1].item() == 8


def test_save_and_load(llm: LLM, base: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        llm.model.lm_head.weight.mul_(1.5)
    llm.save(tmp_path / "saved")
    again = LLM.load(tmp_path / "saved", precision="32-true")
    assert torch.equal(again(IDS), llm(IDS)) and again.generate("add", temperature=0) == llm.generate("add", temperature=0)
    again.load_state_dict(LLM.load(base, precision="32-true").state_dict())
    assert not torch.equal(again(IDS), llm(IDS))
    again.distribute("cpu", precision="32-true", quantize="int8")
    assert torch.allclose(again(IDS), llm(IDS), atol=0.3) and not torch.equal(again(IDS), llm(IDS))
    with pytest.raises(UserError, match="save: only a whole model without adapters"):
        again.save(tmp_path / "quantised")


def test_saving_replaces_only_what_was_saved_before(llm: LLM, base: Path, tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str]:
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}

    before = digests(base)
    (tmp_path / "link").symlink_to(base)
    for own in (base, tmp_path / "link", base / ".." / base.name):
        with pytest.raises(UserError, match="is the folder that the model was read from: name another one"):
            llm.save(own)
    assert digests(base) == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "lit_model.pth").write_text("mine")
    with pytest.raises(UserError, match="foreign exists already"):
        llm.save(tmp_path / "foreign")
    assert (tmp_path / "foreign" / "lit_model.pth").read_text() == "mine"
    with pytest.raises(UserError, match="null is a file, a folder is needed"):
        llm.save("/dev/null")
    llm.save(tmp_path / "saved")
    first = digests(tmp_path / "saved")
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    with torch.no_grad():
        llm.model.lm_head.weight.mul_(1.5)
    llm.save(tmp_path / "saved")
    changed = {name for name, digest in digests(tmp_path / "saved").items() if first.get(name) != digest}
    assert changed == {"lit_model.pth", "manifest.json", "notes.txt"} and (tmp_path / "saved" / "notes.txt").read_text() == "mine"
    assert atomic.damages(tmp_path / "saved", contents=True) == []


def test_distribute(llm: LLM) -> None:
    expected = llm.generate("add", temperature=0)
    llm.distribute("cpu", generate_strategy="sequential", precision="32-true", fixed_kv_cache_size=100)
    assert llm.generate("add", temperature=0) == expected
    with pytest.raises(UserError, match="the model reads at most 100"):
        llm.generate("add", max_new_tokens=100)
    for settings, message in (
        ({"devices": 2}, "2 devices need a generate_strategy"),
        ({"devices": 2, "generate_strategy": "sequential"}, "has 1 of type cpu"),
        ({"generate_strategy": "parallel"}, "one of sequential, tensor_parallel"),
        ({"generate_strategy": "tensor_parallel", "quantize": "int8"}, "parts of a quantised model"),
        ({"fixed_kv_cache_size": 0}, "from 1 to 256 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            llm.distribute("cpu", **settings)


def test_the_base_that_was_given_stays(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    base, settings = tiny.write_base(tmp_path / "base", write_tiny_tokenizer), {"lora_r": 4, "lora_query": True}
    folder = tiny.write_adapter(tmp_path / "adapter", base, tiny.move_adapters(tiny.tiny(**tiny.SPEAKING, **settings)), **settings)
    llm = LLM.load(folder, base=base.rename(tmp_path / "moved"), precision="32-true", device="cpu")
    expected = llm.generate("add", temperature=0)
    llm.distribute("cpu", precision="32-true")
    assert llm.generate("add", temperature=0) == expected
    llm.trainer_setup()
    assert llm.generate("add", temperature=0) == expected


@pytest.mark.slow
def test_tensor_parallel(llm: LLM, base: Path, tmp_path: Path) -> None:
    """A script runs in two processes; both draw the same answer, and the most probable one is that of one process."""
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [sys.executable, str(tmp_path / "script.py"), str(base)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, sorted(done.stdout.splitlines()))
    assert (first["rank"], second["rank"]) == ("0", "1") and first["drawn"] == second["drawn"]
    assert first["answer"] == second["answer"] == llm.generate("add", temperature=0)
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(base)], capture_output=True, text=True)
    assert "litgpt generate_tp" in done.stderr


def test_preprocessor_and_benchmark(llm: LLM) -> None:
    ids = llm.preprocessor.encode("add 1 and 2")
    assert ids.tolist() == llm.tokenizer.encode("add 1 and 2").tolist() and llm.preprocessor.decode(ids) == "add 1 and 2"
    text, figures = llm.benchmark(num_iterations=2, prompt="add 1 and 2", max_new_tokens=5, temperature=0)
    assert text == llm.generate("add 1 and 2", max_new_tokens=5, temperature=0)
    names = {
        "Seconds total",
        "Seconds to first token",
        "Tokens generated",
        "Inference speed in tokens/sec",
        "Total GPU memory allocated in GB",
    }
    assert set(figures) == names and all(len(values) == 2 for values in figures.values())


def test_random_weights(base: Path) -> None:
    torch.manual_seed(3)
    first = LLM.load("pythia-14m", init="random", tokenizer_dir=base, precision="32-true")
    torch.manual_seed(3)
    second = LLM.load("pythia-14m", init="random", tokenizer_dir=base, precision="32-true")
    assert torch.equal(first(IDS), second(IDS)) and first.config.name == "pythia-14m" and first.checkpoint_dir is None
    assert isinstance(first.generate("hello", max_new_tokens=3), str)
    with pytest.raises(UserError, match="tokenizer_dir"):
        LLM.load("pythia-14m", init="random")
    with pytest.raises(UserError, match="random weights"):
        first.distribute()


class Tuned(LightningModule):
    """LitGPT's example of an LLM in a Trainer."""

    def __init__(self, folder: Path, checkpoint: Path | None = None) -> None:
        super().__init__()
        self.llm = LLM.load(folder, distribute=None)
        self.checkpoint, self.losses = checkpoint, list[float]()

    def setup(self, stage: str) -> None:
        self.llm.trainer_setup(trainer_ckpt=self.checkpoint)

    def training_step(self, batch: Any) -> torch.Tensor:
        _, loss = self.llm(batch["input_ids"], target_ids=batch["labels"])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.llm.model.parameters(), lr=0.005)


def test_trainer(base: Path, tmp_path: Path) -> None:
    model = Tuned(base)
    data = JSON(json_path=runs.write_data(tmp_path / "data.json"), num_workers=0)
    data.connect(model.llm.tokenizer, batch_size=4, max_seq_length=128)
    off: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, **off)
    trainer.fit(model, data.train_dataloader())
    assert sum(model.losses[-4:]) < sum(model.losses[:4])
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    again = Tuned(base, tmp_path / "trained.ckpt")
    again.setup("fit")
    state = model.llm.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.llm.state_dict().items())
    for other in (tmp_path / "missing", tmp_path / "data.json", base / "lit_model.pth"):
        with pytest.raises(UserError, match="not a file that a Trainer saved"):
            again.llm.trainer_setup(trainer_ckpt=other)
    model.llm.save(tmp_path / "saved")
    assert main(["generate", str(tmp_path / "saved"), "--max_new_tokens", "2"]) == 0


@pytest.mark.parametrize("module", [litgpt, lora, adapter, adapter_v2])
def test_models_by_name(module: Any) -> None:
    built = module.GPT.from_name("pythia-14m", n_layer=3)
    assert type(built) is module.GPT and len(built.blocks) == 3 and built.config.name == "pythia-14m"


def test_names_on_the_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is not on this machine is downloaded, once, after saying so; what looks like a path is not."""
    assert main(["convert_from_litgpt", str(base), str(tmp_path / "hub")]) == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (tmp_path / "runs").mkdir()
    with fake_hub.serve(Hub({"org/model": tmp_path / "hub"})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        capsys.readouterr()
        assert main(["generate", "org/model", "--max_new_tokens", "2"]) == 0
        assert "org/model is not on this machine: downloading it from the hub into checkpoints/org/model" in capsys.readouterr().err
        hub.requests.clear()
        assert isinstance(LLM.load("org/model").generate("hello", max_new_tokens=2), str)
        for path in ("runs/model", "out/model", "checkpoints/model"):
            assert main(["validate", path]) == 1 and not hub.requests
        assert main(["finetune_lora", "org/other", "--data", str(runs.write_data(tmp_path / "d.json")), "--dry_run", "true"]) == 1
        assert not hub.requests, "a dry run downloads nothing"
        assert main(["chat", "org/other"]) == 1
        assert "does not exist, or is private" in capsys.readouterr().err
