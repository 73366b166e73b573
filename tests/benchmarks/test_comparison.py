"""benchmarks/comparison.py on a tiny model, benchmarks/analysis.py on its results, and the commands of docs/evaluation.md."""

from __future__ import annotations

import argparse
import io
import json
import re
import runpy
import shlex
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from benchmarks import analysis, comparison, runs, steps
from litgpt.__main__ import load as command, main as litgpt
from litgpt.cli import parse
from litgpt.errors import UserError
from litgpt.logs import read_metrics
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
HUB = ROOT / "config_hub" / "finetune"


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
def compared(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder and exit code of a comparison of four runs, one of which fails."""
    out_dir = tmp_path_factory.mktemp("compared") / "out"
    names = [
        "lora_baseline",
        f"broken={shlex.quote(str(HUB / 'smollm2-135m' / 'lora.yaml'))} --lora_r -1",
        "skip2lora_4blocks",
        "skip2lora_6blocks",
    ]
    before, comparison.run_litgpt = comparison.run_litgpt, in_this_process
    code = comparison.main([*words, "--out_dir", str(out_dir), "--max_steps", "4", "--access_token", "hf_secret", "--runs", *names])
    comparison.run_litgpt = before
    return out_dir, code


def test_what_each_run_measured(compared: tuple[Path, int], words: list[str]) -> None:
    out_dir, code = compared
    text = (out_dir / "comparison_results.json").read_text()
    content = json.loads(text)
    assert code == 1 and "hf_secret" not in text and content["environment"]["cores"] > 0
    records = {run["name"]: run for run in content["runs"]}
    assert [run["status"] for run in records.values()] == ["completed", "failed", "completed", "completed"]
    assert (
        records["broken"]["error"].startswith("Error: lora_r is -1")
        and records["broken"]["exit_code"] != 0
        and records["broken"]["measured"] == {}
    )
    expected = {
        "lora_baseline": 7 * 8 * ((32 + 32) + (32 + 16)),
        "skip2lora_4blocks": 4 * 2 * 16 * 32,
        "skip2lora_6blocks": 6 * 2 * 16 * 32,
    }
    for name, trainable in expected.items():
        run, measured = records[name], records[name]["measured"]
        report = json.loads((out_dir / name / "report.json").read_text())
        assert {key: measured[key] for key in report} == report
        assert measured["trainable_parameters"] == trainable and measured["steps"] == 4
        assert measured["steps_per_second"] == pytest.approx(4 / report["train_seconds"])
        curve = dict(read_metrics(out_dir / name)["val_loss"])
        assert list(curve) == [0, 2, 4] and curve[0] == report["initial_val_loss"] and measured["best_val_loss"] == min(curve.values())
        assert run["settings"]["checkpoint_dir"] == words[3] and run["settings"]["train"]["max_steps"] == 4
        assert run["command"].startswith("litgpt finetune ") and "***" in run["command"]
        assert sorted(path.name for path in (out_dir / name).iterdir()) == ["best", "final", "logs", "report.html", "report.json"]


def test_wall_time_of_a_validation(compared: tuple[Path, int]) -> None:
    """The first one comes after loading, the last one when the run's clock stops, the steps lie in between."""
    run = compared[0] / "lora_baseline"
    report = json.loads((run / "report.json").read_text())
    curve = runs.val_curve(run, report["total_seconds"])
    times = [seconds for _, seconds, _ in curve if seconds is not None]
    assert [step for step, _, _ in curve] == [0, 2, 4] and times == sorted(times) and times[-1] == pytest.approx(report["total_seconds"])
    assert times[-1] - times[0] >= report["train_seconds"]
    assert [seconds for _, seconds, _ in runs.val_curve(run, None)] == [None] * 3


def test_the_report_of_real_runs(compared: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    out_dir, _ = compared
    assert analysis.main([str(out_dir)]) == 0
    text = (out_dir / "report" / "report.md").read_text()
    titles = ["Environment", "Runs", "Parameter efficiency", "Speed", "Memory", "Accuracy", "Convergence", "Pictures", "Conclusions"]
    assert re.findall("^## (.+)$", text, re.MULTILINE) == titles
    assert "| broken | 0 | 1 | Error: lora_r is -1" in text and "JSON (" in text
    assert "broken failed (1x): Error: lora_r is -1" in capsys.readouterr().out
    page = (out_dir / "report" / "report.html").read_text()
    assert page.count("<table>") == 7 and "http" not in page and set(re.findall('src="([a-z/:]+);', page)) <= {"data:image/png"}
    assert page.count("<img") == len(list((out_dir / "report").glob("*.png"))) == text.count("![")


@pytest.mark.slow
def test_runs_that_were_started_by_hand(compared: tuple[Path, int], tmp_path: Path) -> None:
    """The same figures without comparison_results.json, from the folders alone; a run without report.json did not finish."""
    for run in ("lora_baseline", "skip2lora_4blocks"):
        shutil.copytree(compared[0] / run, tmp_path / f"{run}_exp")
    shutil.copytree(compared[0] / "skip2lora_6blocks" / "logs", tmp_path / "stopped" / "logs")
    gathered = {run["name"]: run for run in runs.read_comparison(tmp_path)["runs"]}
    written = {run["name"]: run for run in runs.read_comparison(compared[0])["runs"]}
    for run in ("lora_baseline", "skip2lora_4blocks"):
        for key in ("measured", "settings", "status"):
            assert gathered[f"{run}_exp"][key] == written[run][key]
    assert gathered["stopped"]["status"] == "failed" and "report.json is missing" in gathered["stopped"]["error"]
    assert analysis.main([str(tmp_path), "--out", str(tmp_path / "r")]) == 0
    assert "| run | trainable |  | total | ratio | against lora_baseline_exp |" in (tmp_path / "r" / "report.md").read_text()


@pytest.mark.slow
def test_an_earlier_run_is_not_taken_for_this_one(
    words: list[str], compared: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "run_litgpt", in_this_process)
    shutil.copytree(compared[0] / "lora_baseline", tmp_path / "lora_baseline")
    assert comparison.main([*words, "--out_dir", str(tmp_path), "--max_steps", "2", "--runs", "lora_baseline"]) == 1
    (run,) = json.loads((tmp_path / "comparison_results.json").read_text())["runs"]
    assert run["measured"] == {} and "holds an earlier run" in run["error"]
    assert comparison.main([*words, "--out_dir", str(tmp_path), "--max_steps", "2", "--runs", "lora_baseline"]) == 1  # not replaced unasked
    again = [*words, "--out_dir", str(tmp_path), "--max_steps", "2", "--overwrite", "--repeats", "2", "--runs", "lora_baseline"]
    assert comparison.main(again) == 0
    both = json.loads((tmp_path / "comparison_results.json").read_text())["runs"]
    assert [(run["repeat"], run["settings"]["seed"], run["measured"]["steps"]) for run in both] == [(1, 1337, 2), (2, 1338, 2)]
    assert both[0]["measured"]["final_val_loss"] != both[1]["measured"]["final_val_loss"]


@pytest.mark.parametrize("model", sorted(path.name for path in HUB.iterdir()))
def test_the_guides_three_for_every_model(model: str) -> None:
    """Their own YAML files, or derived: the parser gives q + v, rank 8, and the first 4 and 6 blocks, on the same data for as long."""
    args = argparse.Namespace(max_steps=None, overwrite=False)
    planned = comparison.plan(list(comparison.GUIDE), HUB / model)
    lora, four, six = (parse("x", command("finetune_lora"), comparison.words_of(run, 1, Path("o"), args, [])[1:]) for run in planned)
    flags = {key for key in lora if key.startswith("lora_") and lora[key] is True}
    assert flags == {"lora_query", "lora_value"} and not lora["skip2lora_enabled"] and lora["skip2lora_block_indices"] is None
    assert (lora["lora_r"], lora["lora_alpha"], lora["lora_dropout"]) == (8, 16, 0.05)
    assert lora["optimizer"] == parse("x", command("finetune_lora"), [str(HUB / model / "lora.yaml")])["optimizer"]
    assert (four["skip2lora_block_indices"], six["skip2lora_block_indices"]) == ([0, 1, 2, 3], [0, 1, 2, 3, 4, 5])
    for run in (four, six):
        assert run["skip2lora_enabled"] and run["skip2lora_output_layer"] == "lm_head"
        assert all(run[key] == lora[key] for key in ("data", "train", "eval", "checkpoint_dir"))


def test_names_and_files_that_are_unknown() -> None:
    with pytest.raises(UserError) as caught:
        comparison.plan(["lora", "lora", "lara", "x=nowhere.yaml", "a/b=c.yaml", "y=it's.yaml"], HUB / "smollm2-135m")
    for part in (
        "'lora' is named twice",
        "'lara' is neither alora, critic, dpo, lora, lora_baseline",
        "nowhere.yaml does not exist",
        "'a/b=c.yaml' needs a plain",
    ):
        assert part in str(caught.value)
    assert '"y=it\'s.yaml": No closing quotation' in str(caught.value)


def test_the_model_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = HUB.resolve()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no model found: checkpoints/meta-llama/Llama-2-7b-hf, .*make demo"):
        comparison.hub_folder(None, [], hub)
    folder = Path("checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct")
    folder.mkdir(parents=True)
    (folder / "lit_model.pth").touch()
    assert comparison.hub_folder(None, [], hub).name == "smollm2-135m"
    assert comparison.hub_folder("tiny-llama", [], hub).name == "tiny-llama"
    with pytest.raises(UserError, match="--model gpt: config_hub/finetune has llama-2-7b, "):
        comparison.hub_folder("gpt", [], hub)


def test_the_guides_commands_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of docs/evaluation.md, as written: keys, files and runs exist."""
    monkeypatch.chdir(ROOT)
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
            steps.settings_of(steps.arguments().parse_args(rest))
        elif "benchmarks" in shlex.join([target, *rest]):
            assert target == "-m"
            module = ROOT / rest.pop(0).replace(".", "/")
            file = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
            flags = [word for word in rest if word.startswith("--")]
            assert file.is_file() and all(f'"{flag}"' in file.read_text() for flag in flags), command_line
        elif target == "analyze_results.py":
            assert rest in (["out/finetune"], ["out/finetune/llama-2-7b"])
        else:
            args, extra = comparison.arguments().parse_known_args(rest)
            for run in comparison.plan(args.runs, comparison.hub_folder(args.model, extra, HUB)):
                parse("x", command("finetune_lora"), comparison.words_of(run, 1, tmp_path, args, extra)[1:])


@pytest.mark.parametrize(
    ("script", "module"), [("benchmark_skip2lora", steps), ("evaluate_skip2lora_comparison", comparison), ("analyze_results", analysis)]
)
def test_the_scripts_at_the_root(script: str, module: Any) -> None:
    """They are fronts of these modules, and short."""
    file = ROOT / f"{script}.py"
    assert runpy.run_path(str(file))["main"] is module.main
    assert len(file.read_text().splitlines()) <= 40 and f"python {file.name}" in module.__doc__
