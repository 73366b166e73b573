"""The metrics file read back by the csv module, the events by TensorBoard, and what the terminal shows."""

from __future__ import annotations

import csv
import io
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.args import LogArgs
from litgpt.errors import UserError
from litgpt.logs import COLUMNS, PLAIN_LINES, Console, MetricLoggers, peak_memory_gb, rows_until

STEPS = {
    0: {"step": 0, "epoch": 0.0, "val_loss": 3.5, "val_ppl": 33.1},
    1: {"step": 1, "epoch": 0.5, "train_loss": 3.25, "learning_rate": 1e-4, "step_time": 0.5, "tokens_per_second": 90.0},
    2: {"step": 2, "epoch": 1.0, "train_loss": 3.0, "val_loss": 2.75, "val_ppl": 15.6, "peak_memory_gb": 0.5},
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """`logs/version_0` after three steps."""
    log = MetricLoggers(tmp_path / "out", "csv", LogArgs(), {})
    for step, row in STEPS.items():
        log(step, row)
    log.close()
    return tmp_path / "out" / "logs" / "version_0"


def test_metrics_file_has_the_columns_in_their_order_and_empty_cells_for_what_was_not_measured(written: Path) -> None:
    with (written / "metrics.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    names = ["step", "epoch", "train_loss", "val_loss", "val_ppl", "learning_rate", "step_time", "tokens_per_second", "peak_memory_gb"]
    assert head == names == list(COLUMNS)
    assert len(rows) == 3
    for cells, row in zip(rows, STEPS.values(), strict=True):
        assert {name: float(cell) for name, cell in zip(head, cells, strict=True) if cell} == row
        assert len(cells) == len(names)


def test_rows_are_on_disk_at_once(tmp_path: Path) -> None:
    log = MetricLoggers(tmp_path, "csv", LogArgs(), {})
    for done, (step, row) in enumerate(STEPS.items(), 1):
        log(step, row)
        assert len((tmp_path / "logs/version_0/metrics.csv").read_text().splitlines()) == 1 + done


def test_tensorboard_reads_the_same_values(written: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(written)).Reload()
    for name in ("train_loss", "val_loss", "learning_rate"):
        expected = [(step, row[name]) for step, row in STEPS.items() if name in row]
        assert [(e.step, pytest.approx(e.value)) for e in events.Scalars(name)] == expected


def test_nothing_is_written_before_the_first_row(tmp_path: Path) -> None:
    MetricLoggers(tmp_path / "out", "tensorboard", LogArgs(), {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["wandb", "mlflow", "litlogger"])
def test_a_logger_without_its_package_says_which(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch import loggers

    def missing(*args: Any, **kwargs: Any) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    cls = {"wandb": "WandbLogger", "mlflow": "MLFlowLogger", "litlogger": "LitLogger"}[name]
    monkeypatch.setattr(loggers, cls, missing)
    with pytest.raises(UserError, match=f"logger_name '{name}' needs a package that is not installed .*pip install"):
        MetricLoggers(tmp_path / "out", name, LogArgs(), {})
    assert not (tmp_path / "out").exists()


def test_a_remote_logger_gets_the_settings_and_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch import loggers

    calls: list[Any] = []

    class Fake:
        def __init__(self, **settings: Any) -> None:
            calls.append(settings)

        def log_hyperparams(self, values: dict[str, Any]) -> None:
            calls.append(values)

        def log_metrics(self, row: dict[str, float], step: int) -> None:
            calls.append((step, row))

        def finalize(self, status: str) -> None:
            calls.append(status)

    monkeypatch.setattr(loggers, "WandbLogger", Fake)
    log = MetricLoggers(tmp_path, "wandb", LogArgs(project="p", run="r", group="g"), {"seed": 1})
    log(1, STEPS[1])
    log.close()
    settings, hyperparameters, row, status = calls
    assert {key: settings[key] for key in ("project", "name", "group")} == {"project": "p", "name": "r", "group": "g"}
    assert (hyperparameters, row, status) == ({"seed": 1}, (1, STEPS[1]), "success")


def test_a_logger_that_fails_in_the_run_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lightning.pytorch import loggers

    class Gone(loggers.CSVLogger):
        def __init__(self, **settings: Any) -> None:
            super().__init__(tmp_path / "theirs")

        def log_metrics(self, *args: Any) -> None:
            raise ConnectionError("the server is gone\nand more")

    monkeypatch.setattr(loggers, "WandbLogger", Gone)
    log = MetricLoggers(tmp_path, "wandb", LogArgs(), {"seed": 1})
    for step, row in STEPS.items():
        log(step, row)
    log.close()
    assert len((tmp_path / "logs/version_0/metrics.csv").read_text().splitlines()) == 1 + len(STEPS)
    assert capsys.readouterr().err.count("Gone failed and gets no more metrics, ") == 1


def test_a_logger_that_cannot_start_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch import loggers

    def refuse(**settings: Any) -> None:
        assert settings["tracking_uri"] == "sqlite:///mlflow.db"
        raise RuntimeError("no such database.\nSee elsewhere")

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(loggers, "MLFlowLogger", refuse)
    with pytest.raises(UserError, match=r"^logger_name 'mlflow' cannot start: no such database\. --logger_name csv"):
        MetricLoggers(tmp_path, "mlflow", LogArgs(), {})


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = MetricLoggers(tmp_path, "wandb", LogArgs(project="facts", run="first"), {"seed": 17})
    for step, row in STEPS.items():
        log(step, row)
    log.close()
    __import__("wandb").finish()
    [run] = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = run.read_bytes()
    assert all(text in content for text in (b"facts", b"first", b"train_loss", b"3.25", b"val_loss", b"2.75"))


@pytest.mark.slow
def test_mlflow_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri := f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log = MetricLoggers(tmp_path, "mlflow", LogArgs(project="facts", run="first"), {"seed": 17})
    for step, row in STEPS.items():
        log(step, row)
    log.close()
    client = mlflow.MlflowClient(uri)
    [run] = client.search_runs([client.get_experiment_by_name("facts").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["seed"]) == ("first", "FINISHED", "17")
    assert [(value.step, value.value) for value in client.get_metric_history(run.info.run_id, "train_loss")] == [(1, 3.25), (2, 3.0)]


# --- a run that goes on ---


def test_rows_of_later_steps_are_dropped_and_the_run_goes_on_in_the_same_files(written: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    head, *rows = (written / "metrics.csv").read_text().splitlines(keepends=True)
    time.sleep(1 - time.time() % 1)  # TensorBoard orders its files by the second in their names
    log = MetricLoggers(written.parents[1], "csv", LogArgs(), {}, resumed_at=1)
    assert (written / "metrics.csv").read_text() == "".join((head, *rows[:2]))
    log(2, {**STEPS[2], "train_loss": 2.5})
    log.close()
    again = (written / "metrics.csv").read_text().splitlines(keepends=True)
    assert again[:3] == [head, *rows[:2]] and again[3].startswith("2,1.0,2.5,") and len(again) == 4
    events = EventAccumulator(str(written)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(1, 3.25), (2, 2.5)]


@pytest.mark.parametrize("tail", ["", "2", "2,1.0,3", "2,1.0,3.0,,,,,,", "x,1,1,1,1,1,1,1,1\n", "2,1.0\n", "\n"])
def test_a_row_that_was_half_written_is_dropped(tail: str) -> None:
    rows = ["step," + "x," * 7 + "peak_memory_gb\n", "0,0.0,,3.5,33.1,,,,\n", "1,0.5,3.25,,,0.1,0.5,90.0,\n"]
    assert rows_until("".join(rows) + tail, 2) == "".join(rows)
    assert rows_until("".join(rows) + "2,1.0,3.0,,,,,,\n", 2).endswith("\n2,1.0,3.0,,,,,,\n")
    assert rows_until("", 2) == ""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_rows_are_flushed_to_disk_when_a_checkpoint_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MetricLoggers(tmp_path, "csv", LogArgs(), {})
    log.flush()
    assert not list(tmp_path.iterdir()), "nothing was written yet"
    log(1, STEPS[1])
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    log.flush()
    assert str(log.csv) in flushed


def test_nobody_left_to_read_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Gone())
    Console().say("hello")


# --- the terminal ---


def test_progress_without_a_terminal_is_a_few_plain_lines_and_the_last_is_among_them(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().progress("training") as progress:
        for done in range(1, 1001):
            progress(done, 1000, f"loss {done}")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out
    assert PLAIN_LINES / 2 <= len(lines) <= PLAIN_LINES + 1
    assert lines[-1].startswith("training 1000 of 1000") and lines[-1].endswith("loss 1000")
    assert all(" s left" in line for line in lines)


def test_the_time_left_of_a_run_that_goes_on_counts_from_where_it_went_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    with Console().progress("training", begun=900) as progress:
        progress(950, 1000)
    assert "training 950 of 1000  10 s, 10 s left" in capsys.readouterr().err


def test_progress_towards_an_unknown_end_is_plain_too(capsys: pytest.CaptureFixture[str]) -> None:
    with Console().progress("training") as progress:
        for done in range(1, 101):
            progress(done, None)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and "left" not in lines[0] and "of" not in lines[0]


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(active=False)
    console.say("hello")
    with console.progress("training") as progress:
        progress(1, 1)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_and_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    console = Console()
    with console.progress("training") as progress:
        progress(3, 7, "loss 1.25")
        console.say("step 3: [b]brackets[/b] stay")
        console.say("answered: at 10:100:20 :smile:")
        progress(7, 7, "loss 1.00")
    console.say("after")
    text = terminal.getvalue()
    assert "3/7" in text.replace(" ", "") or "7/7" in text.replace(" ", "")
    assert "loss 1.00" in text and "step 3: [b]brackets[/b] stay" in text and "at 10:100:20 :smile:\n" in text
    assert text.endswith("after\n")


def test_no_bar_is_shown_before_its_length_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    console = Console()
    with console.progress("training") as progress:
        console.say("a line")
        assert "training" not in terminal.getvalue()
        progress(0, 7)
    assert "0/7" in terminal.getvalue() and "?" not in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue())


def test_times_are_whole_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar gives way to a note of a training step."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    note = "epoch 10.45  loss 0.124 " + "▁█" * 8
    with Console().progress("training") as progress:
        progress(116, 330, note)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", terminal.getvalue())
    assert re.search(rf"116/330 \d:\d\d:\d\d \S:\S\S:\S\S {note}", text) and "…" not in text


def test_a_bar_that_ends_in_an_error_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    console = Console()
    with pytest.raises(UserError), console.progress("training"):
        raise UserError("stop")
    hidden, shown = (terminal.getvalue().rindex(f"\x1b[?25{code}") for code in "lh")
    assert hidden < shown, "the cursor is visible again"
    console.say("[b]after[/b] " + "x" * 300)
    assert terminal.getvalue().endswith("[b]after[/b] " + "x" * 300 + "\n"), "the line is not wrapped by the bar"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_peak_memory_is_what_the_kernel_counts() -> None:
    block = bytearray(b"1") * (64 * 2**20)
    measured = peak_memory_gb(torch.device("cpu"))
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    assert measured == pytest.approx(int(line.split()[1]) / 2**20, rel=0.02)
    assert measured > len(block) / 2**30
