"""benchmarks/peers: its pure parts. The peers themselves take minutes: `python -m benchmarks.peers --samples 16 --epochs 2`."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers import __main__ as script, evaluate, measure, report, stored, who
from benchmarks.peers.job import Job, orders, prepare, require_same
from benchmarks.report import Part, Table
from litgpt.checkpoint import load_model
from litgpt.cli import parse
from litgpt.errors import UserError
from litgpt.finetune.lora import Lora
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
JOB = Job("a machine, 2 cores", "/models/base", "32-true", samples=20, val_samples=8, epochs=10, tokens=1400, digest="abc")
MACHINE = {
    "processor": "a machine",
    "cores": 2,
    "memory_gb": 24.0,
    "gpu": None,
    "system": "Linux",
    "python": "3",
    "torch": "2",
    "litgpt": "0",
}


def record(total: float, speed: float, losses: list[float], done: float = 10, first: float = 3.0, memory: float = 1.0) -> dict[str, Any]:
    """A measured peer whose checkpoints came every 10 seconds."""
    curve = [
        {"step": 3 * i, "epoch": i, "wall_seconds": 10.0 * i, "training_seconds": 8.0 * i, "val_loss": x} for i, x in enumerate(losses, 1)
    ]
    return {
        "status": "completed",
        "error": None,
        "date": "2026-01-01T00:00:00+00:00",
        "versions": {},
        "epochs": 10,
        "measured_epochs": done,
        "wall_seconds": 30.0,
        "total_seconds": total,
        "training_seconds": 20.0,
        "median_epoch_seconds": 2.0,
        "steps_per_second": speed,
        "tokens_per_second": 70 * speed,
        "peak_memory_gb": memory,
        "own_memory_gb": None,
        "first_loss": first,
        "curve": curve,
    }


@pytest.fixture
def content() -> dict[str, Any]:
    records = {
        "upstream": record(1000.0, 0.5, [2.9, 2.7], done=1, memory=4.0),
        "peft_all": record(400.0, 1.0, [2.6, 2.5, 2.55]),
        "skip2lora": record(40.0, 10.0, [2.8, 2.65]),
        "broken": {"status": "failed", "error": "exit code 1: out of paper", "date": "2026-01-02T00:00:00+00:00"},
    }
    return {"format": 1, "job": vars(JOB), "environment": MACHINE, "base_loss": 3.5, "records": records}


def cells(part: Part) -> dict[str, list[str]]:
    assert isinstance(part, Table)
    return {row[0]: row[1:] for row in part.rows}


# --- times ---


def test_extrapolation_spends_start_and_end_once_and_epochs_in_proportion() -> None:
    assert measure.extrapolate(wall=30, training=20, done=1, epochs=10) == 30 - 20 + 200
    assert measure.extrapolate(wall=30, training=20, done=2.5, epochs=2.5) == 30


def test_figures_of_a_run_that_was_cut_short() -> None:
    seconds = [2.0, 1.0, 1.0, 4.0, 1.0, 1.0]  # two epochs of three steps
    process = measure.Process(0, began=0.0, seconds=15.0, peak_gb=1.5, own_gb=1.0)
    found = measure.figures(replace(who.PEERS[0], own_schedule=False), JOB, process, seconds)
    assert found["epoch_seconds"] == [4.0, 6.0]
    assert found["median_epoch_seconds"] == 5.0
    assert (found["epochs"], found["measured_epochs"]) == (10, 2.0)
    assert found["total_seconds"] == 5.0 + 10 * 5.0
    assert found["steps_per_second"] == 0.6
    assert found["tokens_per_second"] == 2 * 1400 / 10.0
    own = measure.figures(replace(who.PEERS[0], own_schedule=True), JOB, process, seconds)
    assert (own["epochs"], own["total_seconds"]) == (2.0, 15.0)


def test_a_process_is_measured(tmp_path: Path) -> None:
    code = "import time; block = b'x' * 2**27; print('done'); time.sleep(0.5); raise SystemExit(3)"
    process = measure.run([sys.executable, "-c", code], tmp_path / "log", dict(os.environ))
    assert process.code == 3
    assert (tmp_path / "log").read_text() == "done\n"
    if process.own_gb is not None:  # Linux
        assert 1 / 8 < process.own_gb < 1 / 4
        assert process.peak_gb >= process.own_gb


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["step-000003/lit_model.pth.lora", "step-000006/lit_model.pth.lora", "final/lit_model.pth.lora"], ["step-000003", "step-000006"]),
        (["step-000003/lit_model.pth.lora", "final/lit_model.pth.lora"], ["step-000003", "final"]),
        (["checkpoint-6/adapter_model.safetensors", "checkpoint-3/adapter_model.safetensors"], ["checkpoint-3", "checkpoint-6"]),
    ],
)
def test_checkpoints_have_the_times_at_which_they_were_written(files: list[str], expected: list[str], tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000.0, 1000.0))
    found = measure.checkpoints(tmp_path, 900.0, [2.0] * 6)
    assert [Path(point["folder"]).name for point in found] == expected
    assert [point["step"] for point in found] == [3, 6]
    assert [(point["wall_seconds"], point["training_seconds"]) for point in found] == [(100.0, 6.0), (100.0, 12.0)]


def test_a_run_without_checkpoints_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        measure.checkpoints(tmp_path, 0.0, [1.0])


# --- who takes part, and with what ---


def test_peers_are_chosen_by_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.touch()
    assert [peer.name for peer in who.choose(None, [])] == [peer.name for peer in who.PEERS]
    chosen = who.choose(["upstream", "upstream"], [f"mine={file} --epochs 3"])
    assert [peer.name for peer in chosen] == ["upstream", "mine"]
    assert chosen[1].words == (str(file), "--epochs", "3")
    assert chosen[1].own_schedule


def test_every_wrong_name_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    presets = ["upstream=README.md", "x=missing.yaml", "noname"]
    words = ["--peers", "nobody", *(word for preset in presets for word in ("--preset", preset))]
    assert script.main(words) == 1
    said = capsys.readouterr().err
    for culprit in ("nobody", "upstream is the name", "missing.yaml does not exist", "'noname'"):
        assert culprit in said


@pytest.mark.parametrize("words", [["--epochs", "0"], ["--samples", "many"], ["--measured", "1"]])
def test_wrong_arguments_end_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(words)


@pytest.mark.parametrize("peer", [peer for peer in who.PEERS if peer.kind == "litgpt"], ids=lambda peer: peer.name)
def test_our_own_peers_get_the_settings_of_the_others(peer: who.Peer, tmp_path: Path) -> None:
    values = parse("litgpt finetune", Lora, who.own_words(peer, JOB, tmp_path, tmp_path / "x", epochs=2))
    train = values["train"]
    assert (train.epochs, train.global_batch_size, train.micro_batch_size, train.min_lr) == (2, 8, 8, 0)
    assert (train.save_interval, train.lr_warmup_steps) == (3, 1)
    assert (values["precision"], values["checkpoint_dir"], values["data"].json_path) == ("32-true", Path("/models/base"), tmp_path / "data")
    assert values["data"].mask_prompt
    assert not values["eval"].final_validation
    assert values["skip2lora_enabled"] == peer.name.startswith("skip2lora")
    if peer.layers:
        assert [values[f"lora_{name}"] for name in ("query", "value")] == [True, True]
        assert [values[f"lora_{name}"] for name in ("key", "projection", "mlp")] == [peer.layers == "all"] * 3
        assert values["optimizer"]["init_args"]["lr"] == who.RATES[peer.layers]


def test_a_preset_keeps_its_epochs_and_loses_its_data(tmp_path: Path) -> None:
    (peer,) = who.choose([], [f"mine={shlex.quote(str(who.SKIP2LORA))}"])
    values = parse("litgpt finetune", Lora, who.own_words(peer, JOB, tmp_path, tmp_path / "x", epochs=99))
    assert (values["train"].epochs, values["train"].lr_warmup_steps) == (4, 20)
    assert values["data"].json_path == tmp_path / "data"


def test_other_peers_read_the_same_settings(tmp_path: Path) -> None:
    who.command(who.PEERS[1], JOB, tmp_path, tmp_path, epochs=2)
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["rate"], run["epochs"], run["batch"], run["save_interval"], run["warmup"]) == (2e-4, 2, 8, 3, 1)


# --- data ---


def test_a_single_batch_is_too_little(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--samples 8"):
        prepare(tmp_path, tmp_path, samples=8, epochs=2, precision=None)


def test_orders_go_through_every_sample_anew() -> None:
    first, second = orders([{"input_ids": [1, 2], "loss_mask": [0, 1]}] * 20, epochs=2)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    sampler = stored.Orders([first, second])
    assert (list(sampler), list(sampler)) == (first, second)


def test_batches_are_padded_and_labelled() -> None:
    samples = stored.Samples([{"input_ids": [5, 6, 7], "loss_mask": [0, 0, 1]}, {"input_ids": [8, 9], "loss_mask": [0, 1]}])
    batch = stored.collate([samples[0], samples[1]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, 9, -100]]


def test_the_loss_is_that_of_single_samples(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in (5, 9, 7):
        ids = torch.randint(0, 100, (length,), generator=generator).tolist()
        samples.append({"input_ids": ids, "loss_mask": [0, 0, 0] + [1] * (length - 3)})
    model = load_model(base, torch.float32)
    total = sum(
        F.cross_entropy(model(torch.tensor([s["input_ids"][:-1]]))[0, 2:], torch.tensor(s["input_ids"][3:]), reduction="sum")
        for s in samples
    )
    assert evaluate.loss(base, base, "32-true", samples) == pytest.approx(total.item() / 12, rel=1e-5)


# --- tables ---


def test_tables_follow_from_the_figures(content: dict[str, Any]) -> None:
    parts = report.sections(content, None)
    times = cells(parts["Time and memory"][0])
    assert times["upstream"][:3] == ["1 of 10 measured", "1,000.0", "10.0"]
    assert times["skip2lora"][:2] == ["10", "40.0"]
    assert "1 of 10 epochs measured" in str(parts["Time and memory"][1])
    runs, steps, memory = (cells(part) for part in parts["Compared"][1::2])
    assert runs["skip2lora"] == ["25.00x", "10.00x"]
    assert steps["skip2lora"] == ["20.00x", "10.00x"]
    assert memory["skip2lora"] == ["25 %", "100 %"]


def test_losses_tell_who_was_there_first(content: dict[str, Any]) -> None:
    table = cells(report.sections(content, None)["Validation loss"][1])
    assert table["peft_all"] == ["3.0000", "2.5000", "2", "20.0", "2.5500", "10.0 s (0.50x)", "20.0 s (1.00x)"]
    assert table["skip2lora"][-2:] == ["20.0 s (1.00x)", "-"]


def test_failures_and_disagreement_are_told(content: dict[str, Any]) -> None:
    text = report.as_text(report.sections(content, None))
    assert "broken failed: exit code 1: out of paper" in text
    assert "do not read the same data" not in text
    content["records"]["peft_all"]["first_loss"] = 3.2
    document = report.as_document(report.sections(content, None))
    assert "do not read the same data" in document
    assert "| upstream | 1 of 10 measured |" in document


def test_nothing_measured_is_still_a_report(content: dict[str, Any]) -> None:
    content["records"] = {"broken": content["records"]["broken"]}
    assert list(report.sections(content, None)) == ["What was done"]


# --- results ---


def test_results_are_kept_and_failures_tried_again(content: dict[str, Any], tmp_path: Path) -> None:
    script.save(content, tmp_path)
    back = script.restore(tmp_path / "peers.json", JOB, MACHINE, None)
    del content["records"]["broken"]
    assert back == content
    assert "peft_all" in (tmp_path / "peers.md").read_text()


def test_again_forgets_what_is_named(content: dict[str, Any], tmp_path: Path) -> None:
    script.save(content, tmp_path)
    assert list(script.restore(tmp_path / "peers.json", JOB, MACHINE, ["peft_all"])["records"]) == ["upstream", "skip2lora"]


def test_another_job_is_refused_or_starts_anew(content: dict[str, Any], tmp_path: Path) -> None:
    script.save(content, tmp_path)
    other = replace(JOB, epochs=2)
    with pytest.raises(UserError, match="epochs was 10 and is 2.*--again"):
        script.restore(tmp_path / "peers.json", other, MACHINE, None)
    assert script.restore(tmp_path / "peers.json", other, MACHINE, ["upstream"])["records"] == {}
    require_same(JOB, vars(JOB), tmp_path)


def test_a_failing_peer_is_noted(content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise UserError("no room")

    monkeypatch.setattr(script, "measure", fail)
    script.attempt(who.PEERS[3], JOB, tmp_path, None, content)
    assert content["records"]["lora_qv"]["error"] == "no room"
    assert content["records"]["lora_qv"]["status"] == "failed"
