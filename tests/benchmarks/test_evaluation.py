"""evaluate_skip2lora_comparison.py on a tiny model; analyze_results.py on its results, and on made-up ones whose figures are known."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from litgpt import results
from litgpt.__main__ import load as command
from litgpt.__main__ import main as litgpt
from litgpt.cli import parse
from litgpt.errors import UserError
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
HUB = ROOT / "config_hub" / "finetune"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def evaluate() -> Any:
    return load("evaluate_skip2lora_comparison")


@pytest.fixture(scope="module")
def analyze() -> Any:
    return load("analyze_results")


def in_this_process(words: list[str]) -> tuple[int, str]:
    """`litgpt WORDS`, without the seconds that a new process takes to import torch."""
    said = io.StringIO()
    with redirect_stderr(said):
        code = litgpt(words)
    return code, said.getvalue()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, write_tiny_tokenizer: Callable[[Path], Path]) -> list[str]:
    """Options that make any run a tiny one."""
    folder = tmp_path_factory.mktemp("tiny")
    base = tiny.write_base(folder / "base", write_tiny_tokenizer, n_layer=7)
    data = folder / "data.json"
    data.write_text(json.dumps([{"instruction": f"say {i}", "output": f"number {i}"} for i in range(20)]))
    model = ["--model", "smollm2-135m", "--checkpoint_dir", str(base), "--precision", "32-true"]
    return [*model, "--data", "JSON", "--data.json_path", str(data), "--eval.interval", "2"]


@pytest.fixture(scope="module")
def compared(evaluate: Any, words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder and exit code of a comparison of four runs, one of which fails."""
    out_dir = tmp_path_factory.mktemp("compared") / "out"
    runs = ["lora_baseline", f"broken={HUB / 'smollm2-135m' / 'lora.yaml'} --lora_r -1", "skip2lora_4blocks", "skip2lora_6blocks"]
    before, evaluate.litgpt = evaluate.litgpt, in_this_process
    code = evaluate.main([*words, "--out_dir", str(out_dir), "--max_steps", "4", "--access_token", "hf_secret", "--runs", *runs])
    evaluate.litgpt = before
    return out_dir, code


def test_what_each_run_measured(compared: tuple[Path, int], words: list[str]) -> None:
    out_dir, code = compared
    text = (out_dir / "comparison_results.json").read_text()
    content = json.loads(text)
    assert code == 1 and "hf_secret" not in text and content["environment"]["cores"] > 0
    runs = {run["name"]: run for run in content["runs"]}
    assert [run["status"] for run in runs.values()] == ["completed", "failed", "completed", "completed"]
    assert (
        runs["broken"]["error"].startswith("Error: lora_r is -1") and runs["broken"]["exit_code"] != 0 and runs["broken"]["measured"] == {}
    )
    expected = {
        "lora_baseline": 7 * 8 * ((32 + 32) + (32 + 16)),
        "skip2lora_4blocks": 4 * 2 * 16 * 32,
        "skip2lora_6blocks": 6 * 2 * 16 * 32,
    }
    for name, trainable in expected.items():
        run, measured = runs[name], runs[name]["measured"]
        report = json.loads((out_dir / name / "report.json").read_text())
        assert {key: measured[key] for key in report} == report
        assert measured["trainable_parameters"] == trainable and measured["steps"] == 4
        assert measured["steps_per_second"] == pytest.approx(4 / report["train_seconds"])
        curve = dict(results.read_metrics(out_dir / name)["val_loss"])
        assert list(curve) == [0, 2, 4] and curve[0] == report["initial_val_loss"] and measured["best_val_loss"] == min(curve.values())
        assert run["settings"]["checkpoint_dir"] == words[3] and run["settings"]["train"]["max_steps"] == 4
        assert run["command"].startswith("litgpt finetune ") and "***" in run["command"]
        assert sorted(path.name for path in (out_dir / name).iterdir()) == ["best", "final", "logs", "report.json"]


def test_wall_time_of_a_validation(compared: tuple[Path, int]) -> None:
    """The first one comes after loading, the last one when the run's clock stops, the steps lie in between."""
    run = compared[0] / "lora_baseline"
    report = json.loads((run / "report.json").read_text())
    curve = results.val_curve(run, report["total_seconds"])
    times = [seconds for _, seconds, _ in curve if seconds is not None]
    assert [step for step, _, _ in curve] == [0, 2, 4] and times == sorted(times) and times[-1] == pytest.approx(report["total_seconds"])
    assert times[-1] - times[0] >= report["train_seconds"]
    assert [seconds for _, seconds, _ in results.val_curve(run, None)] == [None] * 3


def test_the_report_of_real_runs(analyze: Any, compared: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    out_dir, _ = compared
    assert analyze.main([str(out_dir)]) == 0
    text = (out_dir / "report" / "report.md").read_text()
    titles = ["Environment", "Runs", "Parameter efficiency", "Speed", "Memory", "Accuracy", "Convergence", "Pictures", "Conclusions"]
    assert re.findall("^## (.+)$", text, re.MULTILINE) == titles
    assert "| broken | 0 | 1 | Error: lora_r is -1" in text and "JSON (" in text
    assert "broken failed (1x): Error: lora_r is -1" in capsys.readouterr().out
    page = (out_dir / "report" / "report.html").read_text()
    assert page.count("<table>") == 7 and "http" not in page and set(re.findall('src="([a-z/:]+);', page)) <= {"data:image/png"}
    assert page.count("<img") == len(list((out_dir / "report").glob("*.png"))) == text.count("![")


def test_runs_that_were_started_by_hand(analyze: Any, compared: tuple[Path, int], tmp_path: Path) -> None:
    """The same figures without comparison_results.json, from the folders alone; a run without report.json did not finish."""
    for run in ("lora_baseline", "skip2lora_4blocks"):
        shutil.copytree(compared[0] / run, tmp_path / f"{run}_exp")
    shutil.copytree(compared[0] / "skip2lora_6blocks" / "logs", tmp_path / "stopped" / "logs")
    gathered = {run["name"]: run for run in results.read_comparison(tmp_path)["runs"]}
    written = {run["name"]: run for run in results.read_comparison(compared[0])["runs"]}
    for run in ("lora_baseline", "skip2lora_4blocks"):
        for key in ("measured", "settings", "status"):
            assert gathered[f"{run}_exp"][key] == written[run][key]
    assert gathered["stopped"]["status"] == "failed" and "report.json is missing" in gathered["stopped"]["error"]
    assert analyze.main([str(tmp_path), "--out", str(tmp_path / "r")]) == 0
    assert "| run | trainable |  | total | ratio | against lora_baseline_exp |" in (tmp_path / "r" / "report.md").read_text()


def test_an_earlier_run_is_not_taken_for_this_one(
    evaluate: Any, words: list[str], compared: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "litgpt", in_this_process)
    shutil.copytree(compared[0] / "lora_baseline", tmp_path / "lora_baseline")
    assert evaluate.main([*words, "--out_dir", str(tmp_path), "--max_steps", "2", "--runs", "lora_baseline"]) == 1
    (run,) = json.loads((tmp_path / "comparison_results.json").read_text())["runs"]
    assert run["measured"] == {} and "holds an earlier run" in run["error"]
    assert evaluate.main([*words, "--out_dir", str(tmp_path), "--max_steps", "2", "--runs", "lora_baseline"]) == 1  # not replaced unasked
    again = [*words, "--out_dir", str(tmp_path), "--max_steps", "2", "--overwrite", "--repeats", "2", "--runs", "lora_baseline"]
    assert evaluate.main(again) == 0
    both = json.loads((tmp_path / "comparison_results.json").read_text())["runs"]
    assert [(run["repeat"], run["settings"]["seed"], run["measured"]["steps"]) for run in both] == [(1, 1337, 2), (2, 1338, 2)]
    assert both[0]["measured"]["final_val_loss"] != both[1]["measured"]["final_val_loss"]


def test_a_process_of_its_own(evaluate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = evaluate.litgpt(["finetune", "nowhere.yaml"])
    assert code == 2 and evaluate.error_line(f"{said}\nbye") == "Error: nowhere.yaml does not exist: check the path"
    assert "nowhere.yaml does not exist" in capsys.readouterr().out


@pytest.mark.parametrize("model", sorted(path.name for path in HUB.iterdir()))
def test_the_guides_three_for_every_model(evaluate: Any, model: str) -> None:
    """Their own YAML files, or derived: the parser gives q + v, rank 8, and the first 4 and 6 blocks, on the same data for as long."""
    args = argparse.Namespace(max_steps=None, overwrite=False)
    runs = evaluate.plan(list(evaluate.GUIDE), HUB / model)
    lora, four, six = (parse("x", command("finetune"), evaluate.words_of(run, 1, Path("o"), args, [])[1:]) for run in runs)
    flags = {key for key in lora if key.startswith("lora_") and lora[key] is True}
    assert flags == {"lora_query", "lora_value"} and not lora["skip2lora_enabled"] and lora["skip2lora_block_indices"] is None
    assert (lora["lora_r"], lora["lora_alpha"], lora["lora_dropout"]) == (8, 16, 0.05)
    assert lora["optimizer"] == parse("x", command("finetune"), [str(HUB / model / "lora.yaml")])["optimizer"]
    assert (four["skip2lora_block_indices"], six["skip2lora_block_indices"]) == ([0, 1, 2, 3], [0, 1, 2, 3, 4, 5])
    for run in (four, six):
        assert run["skip2lora_enabled"] and run["skip2lora_output_layer"] == "lm_head"
        assert all(run[key] == lora[key] for key in ("data", "train", "eval", "checkpoint_dir"))


def test_names_and_files_that_are_unknown(evaluate: Any) -> None:
    with pytest.raises(UserError) as caught:
        evaluate.plan(["lora", "lora", "lara", "x=nowhere.yaml", "a/b=c.yaml", "y=it's.yaml"], HUB / "smollm2-135m")
    for part in (
        "'lora' is named twice",
        "'lara' is neither lora, lora_baseline",
        "nowhere.yaml does not exist",
        "'a/b=c.yaml' needs a plain",
    ):
        assert part in str(caught.value)
    assert '"y=it\'s.yaml": No closing quotation' in str(caught.value)


def test_the_model_that_is_there(evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = HUB.resolve()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no model is there: checkpoints/meta-llama/Llama-2-7b-hf, .*make demo"):
        evaluate.hub_folder(None, [], hub)
    folder = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")
    folder.mkdir(parents=True)
    (folder / "lit_model.pth").touch()
    assert evaluate.hub_folder(None, [], hub).name == "smollm2-135m"
    assert evaluate.hub_folder("tiny-llama", [], hub).name == "tiny-llama"
    with pytest.raises(UserError, match="--model gpt: config_hub/finetune has llama-2-7b, "):
        evaluate.hub_folder("gpt", [], hub)


def test_the_guides_commands_are_understood(evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of docs/evaluation.md, as written: keys, files and runs exist."""
    monkeypatch.chdir(ROOT)
    benchmark = load("benchmark_skip2lora")
    text = (ROOT / "docs" / "evaluation.md").read_text()
    loop = re.search(r"for config in (.+); do (.+)\$\{config\}(.+); done", text)
    assert loop
    commands = [f"{loop[2]}{name}{loop[3]}" for name in loop[1].split()]
    commands += [line.strip() for line in text.splitlines() if re.match("    (litgpt|python) ", line)]
    assert len(commands) == 3 + 20
    for command_line in commands:
        program, target, *rest = shlex.split(command_line)
        if program == "litgpt":
            parse(target, command(target), rest)
        elif target == "benchmark_skip2lora.py":
            benchmark.settings_of(benchmark.arguments().parse_args(rest))
        elif "benchmarks" in shlex.join([target, *rest]):
            file = ROOT / target if target != "-m" else ROOT / rest.pop(0).replace(".", "/") / "__main__.py"
            flags = [word for word in rest if word.startswith("--")]
            assert file.is_file() and all(f'"{flag}"' in file.read_text() for flag in flags), command_line
        elif target == "analyze_results.py":
            assert rest in (["out/finetune"], ["out/finetune/llama-2-7b"])
        else:
            args, extra = evaluate.arguments().parse_known_args(rest)
            for run in evaluate.plan(args.runs, evaluate.hub_folder(args.model, extra, HUB)):
                parse("x", command("finetune"), evaluate.words_of(run, 1, tmp_path, args, extra)[1:])


def record(name: str, repeat: int = 1, loss: float = 2.5, seconds: float = 100.0, trainable: int = 4000, **settings: Any) -> dict[str, Any]:
    """A completed run of 50 steps: from 3.5 down to `loss`, a peak of a hundredth GiB for each second."""
    measured = {"steps": 50, "initial_val_loss": 3.5, "final_val_loss": loss, "best_val_loss": loss, "trainable_parameters": trainable}
    measured |= {"total_parameters": 100_000, "train_seconds": seconds / 2, "total_seconds": seconds, "peak_memory_gb": seconds / 100}
    about = {
        "name": name,
        "repeat": repeat,
        "folder": f"gone/{name}",
        "status": "completed",
        "settings": {"checkpoint_dir": "m", **settings},
    }
    return {**about, "measured": {**measured, "steps_per_second": 100 / seconds, "tokens_per_second": 10.0}}


def write(folder: Path, *runs: Any, **more: Any) -> Path:
    (folder / "comparison_results.json").write_text(json.dumps({"format": 1, "environment": {}, "runs": runs, **more}))
    return folder


def test_known_figures(analyze: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = {"name": "lost", "repeat": 1, "folder": "x", "status": "failed", "error": "Error: disk full", "measured": {}}
    write(tmp_path, record("skip", loss=2.75, seconds=25.0, trainable=1000), record("lora_baseline"), failed)
    assert analyze.main([str(tmp_path)]) == 0
    out, text = capsys.readouterr().out, (tmp_path / "report" / "report.md").read_text()
    for row in (
        "| skip | 1,000 | 0.00 M | 100,000 | 1.0000 % | -75.0 % |",
        "| skip | 50 | 4.00 | 10 | 12.5 | -75.0 % | 25.0 | -75.0 % |",
        "| skip | 0.25 | -75.0 % |",
        "| skip | 3.5000 | 2.7500 | 2.7500 | 0.7500 | +0.2500 | 75 % |",
        "| skip | 0.015000 | 0.030000 | - |",
        "| lora_baseline | 0.020000 | 0.010000 |  |",
        "| lost | 0 | 1 | Error: disk full |",
    ):
        assert row in text
    for line in (
        "lost failed (1x): Error: disk full",
        "skip trains 1,000 parameters, 4,000 in lora_baseline: 75.0 % fewer.",
        "skip took 25.0 s, 100.0 s in lora_baseline: 75.0 % less time.",
        "skip needed 0.25 GiB, 1.00 GiB in lora_baseline: 75.0 % less memory.",
        "skip ended at a validation loss of 2.7500, lora_baseline at 2.5000: 0.2500 worse. It gained 75 % of what lora_baseline gained.",
        "The lowest final validation loss: lora_baseline (2.5).",
        "The shortest run: skip (25).",
        "Fewer than three repetitions of skip, lora_baseline: small differences may be chance.",
    ):
        assert f"{line}\n" in out and f"- {line}\n" in text


def test_conclusions_turn_with_the_figures(analyze: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slower, larger and better is called so; what overlaps over the repetitions is no difference."""
    runs = [record("lora_baseline", n, 2.5 + n / 100, 100.0 + n) for n in (1, 2, 3)]
    runs += [record("skip", n, 2.4 + n / 100, 101.0 + n, 8000, data={"class_path": "other"}) for n in (1, 2, 3)]
    write(tmp_path, *runs)
    assert analyze.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "skip trains 8,000 parameters, 4,000 in lora_baseline: 100.0 % more.\n" in out
    assert "skip took 103.0 s, 102.0 s in lora_baseline: no clear difference, the repetitions overlap.\n" in out
    assert "skip ended at a validation loss of 2.4200, lora_baseline at 2.5200: 0.1000 better. It gained 110 %" in out
    assert "skip and lora_baseline differ in data too, so the adapter is not the only cause.\n" in out
    assert "Fewer than three" not in out
    assert "| skip | 3.5000 ± 0.0000 | 2.4200 ± 0.0100 |" in (tmp_path / "report" / "report.md").read_text()
    assert analyze.main([str(tmp_path), "--baseline", "skip"]) == 0
    assert "lora_baseline ended at a validation loss of 2.5200, skip at 2.4200: 0.1000 worse." in capsys.readouterr().out


def test_without_a_baseline_nothing_is_concluded(analyze: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = {**record("lora_baseline"), "status": "failed", "error": "Error: no", "measured": {}}
    write(tmp_path, lost, record("skip", skip2lora_enabled=True), record("tail", loss=2.0))
    assert analyze.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "no completed run to compare with" in out and "worse" not in out and "better" not in out and "fewer" not in out


def test_without_matplotlib(analyze: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert analyze.main([str(write(tmp_path, record("lora_baseline")))]) == 0
    assert capsys.readouterr().err == "matplotlib is not installed, so there are no pictures: pip install matplotlib\n"
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.html", "report.md"]


def test_a_benchmark_beside_it(analyze: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = {"forward_ms": {"median": 4.0}, "backward_ms": {"median": 8.0}, "step_ms": {"median": 13.0}}
    rows = [{"name": "L", "uncached": part, "cached": None}, {"name": "S", "uncached": part, "cached": {"step_ms": {"median": 1.5}}}]
    content = {"environment": {"date": "today"}, "configurations": rows, "comparison": {"L": {}, "S": {"backward_reduction_percent": 90.0}}}
    content["settings"] = {"model": "M", "batch_size": 2, "seq_length": 8, "precision": "32-true", "device": "cpu"}
    file = tmp_path / "b.json"
    file.write_text(json.dumps(content))
    words = [str(write(tmp_path, record("lora_baseline"))), "--benchmark", str(file)]
    assert analyze.main(words) == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| L | 4.00 | 8.00 |  | 13.00 | - |\n| S | 4.00 | 8.00 | -90.0 % | 13.00 | 1.50 |" in text
    file.write_text('{"settings": {}}')
    assert analyze.main(words) == 1
    assert "is not a benchmark's result" in capsys.readouterr().err


def damaged(**changes: Any) -> dict[str, Any]:
    good = record("a")
    return {**good, "measured": {**good["measured"], **changes}}


@pytest.mark.parametrize(
    ("runs", "part"),
    [
        ([], "holds no list of runs"),
        (["a"], "holds no list of runs"),
        ([{}], "name, repeat or folder is missing; run 1: status is None; run 1: measured or settings is no object"),
        ([damaged(final_val_loss=float("nan"))], "final_val_loss is nan"),
        ([damaged(total_seconds=-1)], "total_seconds is -1"),
        ([damaged(steps="many")], "steps is 'many'"),
        ([damaged(peak_memory_gb=True, steps=0)], "peak_memory_gb is True, steps is missing or 0"),
        ([damaged(trainable_parameters=200_000)], "more trainable parameters than parameters"),
        ([record("a"), record("a")], "a, repetition 1, is there twice"),
        ([record("a"), record("b", checkpoint_dir="other")], "runs of different models"),
    ],
)
def test_nonsense_is_refused(runs: list[Any], part: str, analyze: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze.main([str(write(tmp_path, *runs))]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Error: ") and part in err and err.count("\n") == 1
    assert not (tmp_path / "report").exists()


def test_files_that_are_no_results(analyze: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, metrics = tmp_path / "broken.json", tmp_path / "runs" / "a" / "logs" / "version_0" / "metrics.csv"
    broken.write_text("{")
    metrics.parent.mkdir(parents=True)
    metrics.write_text("step,train_loss\n1,2.5\nx,2.5\n")
    (tmp_path / "empty").mkdir()
    for words, part in (
        ([str(tmp_path / "none")], "does not exist"),
        ([str(broken)], "cannot be read as JSON"),
        ([str(tmp_path / "empty")], "holds neither comparison_results.json nor runs"),
        ([str(tmp_path / "runs")], "metrics.csv, line 3: not a row of a run's metrics"),
        ([str(write(tmp_path, record("a"))), "--baseline", "b"], "--baseline b: the runs are a"),
    ):
        assert analyze.main(words) == 1
        err = capsys.readouterr().err
        assert err.startswith("Error: ") and part in err and err.count("\n") == 1
