"""`litgpt evaluate --data`: the figures against plain computations, on every kind of folder."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

import litgpt.evaluate as module
from litgpt.__main__ import main
from litgpt.api import LLM
from litgpt.checkpoint import load_model, load_weights, save_weights
from litgpt.data import JSON, TextFiles
from litgpt.data.base import render
from litgpt.data.records import read_record
from litgpt.evaluate import rouge_l
from litgpt.prompts import ChatTemplate, PromptStyle, resolve_prompt_style
from litgpt.tokenizer import Tokenizer
from tests.helpers import runs, tiny
from tests.helpers.cases import quick

SKIP = {"lora_r": 4, "lora_alpha": 8, "skip2lora_enabled": True}
LORA = {"lora_r": 4, "lora_alpha": 8, "lora_query": True, "lora_value": True}


def evaluate(folder: Path, *words: str) -> dict[str, Any]:
    """The content of results.json."""
    out = folder.parent / "evaluated"
    assert main(["evaluate", str(folder), "--out_dir", str(out), "--dtype", "float32", *words]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("settings", [{}, SKIP, LORA])
@pytest.mark.parametrize("batch_size", quick(["1", "auto"], "auto"))
def test_loss(settings: dict[str, Any], batch_size: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss is that of each sample's answer, alone through the whole model; all records of a file count."""
    folder, data = tmp_path / "adapter", runs.write_data(tmp_path / "data.json", 6)
    if settings:
        built = tiny.move_adapters(tiny.tiny(**tiny.SPEAKING, **settings))
        tiny.write_adapter(folder, base, built, **settings)
    else:
        folder.symlink_to(base)
    results = evaluate(folder, "--data", str(data), "--batch_size", batch_size, "--max_new_tokens", "0")
    both = tmp_path / "both"
    both.mkdir()
    for name in ("train", "val"):
        (both / f"{name}.json").write_text(data.read_text())
    assert f"{results['loss']:.4f}" in capsys.readouterr().out
    with_prompts = evaluate(folder, "--data", str(data), "--batch_size", batch_size, "--max_new_tokens", "0", "--data.mask_prompt", "false")
    for found, is_masked in ((results, True), (with_prompts, False)):
        style = resolve_prompt_style(None, base, fallback="default")
        samples = JSON(json_path=both, mask_prompt=is_masked).splits(Tokenizer(base), style, 256).val
        assert found["loss"] == pytest.approx(runs.plain_loss(load_model(folder, torch.float32), samples), rel=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
        assert (found["records"], found["tokens"]) == (6, sum(sample.n_targets for sample in samples))


def test_answers(base: Path, tmp_path: Path) -> None:
    """A record that holds the model's own answer is an exact match."""
    llm = LLM.load(base, precision="32-true")
    own = llm.generate("hello there", max_new_tokens=8, temperature=0)
    assert own.split()
    records = [{"instruction": "hello there", "output": own}, {"instruction": "another", "output": "something else entirely"}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    folder = tmp_path / "model"
    folder.symlink_to(base)
    results = evaluate(folder, "--data", str(tmp_path / "data.json"), "--max_new_tokens", "8")
    assert [answer["exact_match"] for answer in results["answers"]] == [1.0, 0.0] and results["exact_match"] == 0.5
    assert results["answers"][0]["answer"] == own.strip() and results["answers"][0]["question"] == "hello there"
    one = ["--data", str(tmp_path / "data.json"), "--max_new_tokens", "0", "--limit", "1"]
    exact, rounded = evaluate(folder, *one), evaluate(folder, *one, "--quantize", "int8")
    assert exact["records"] == rounded["records"] == 1 and 0 < abs(exact["loss"] - rounded["loss"]) < 0.05 * exact["loss"]


@pytest.mark.parametrize("template", [tiny.THINKING, tiny.CHANNELS])
def test_the_content_of_an_answer_is_compared(template: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers as it is trained, with what its template writes around the content, is an exact match."""
    llm = LLM.load(base, precision="32-true")
    llm.prompt_style = ChatTemplate(template, eos_token="<|im_end|>")
    record = read_record({"instruction": "hello", "output": "a b"})
    learned = render(record, llm.prompt_style, llm.tokenizer)
    said = llm.tokenizer.ids(learned.text[len(learned.prompt) :].removesuffix("<|im_end|>"))
    monkeypatch.setattr(LLM, "complete", lambda *given, **settings: iter(said))
    answered = module._answered(llm, record, 50)
    assert (answered["answer"], answered["exact_match"], answered["rouge_l"]) == ("a b", 1.0, 1.0)


def test_a_run_is_measured_on_its_own_validation_records(base: Path, tmp_path: Path) -> None:
    data = runs.write_data(tmp_path / "data.json")
    run = runs.finetune("finetune_lora", base, data, tmp_path / "out")
    assert run.code == 0, run.err
    results = evaluate(run.final, "--max_new_tokens", "0")
    assert results["records"] == 2 and results["loss"] == pytest.approx(run.report["final_val_loss"], rel=1e-5)


def test_running_text(base: Path, tmp_path: Path) -> None:
    """Perplexity of a folder of text: all of its blocks."""
    (tmp_path / "text").mkdir()
    for name in ("a", "b"):
        (tmp_path / "text" / f"{name}.txt").write_text("hello there, numbers and llamas. " * 200)
    folder = tmp_path / "model"
    folder.symlink_to(base)
    results = evaluate(folder, "--data", str(tmp_path / "text"))
    tokenizer = Tokenizer(base)
    splits = TextFiles(train_data_path=tmp_path / "text").splits(tokenizer, PromptStyle.from_name("default"), 256)
    samples = [*splits.train, *splits.val]
    assert results["records"] == len(samples) > 2 and "answers" not in results
    assert results["loss"] == pytest.approx(runs.plain_loss(load_model(base, torch.float32), samples), rel=1e-5)


def test_blocks_are_as_long_as_in_training_and_fit_the_text(base: Path, tmp_path: Path) -> None:
    (file := tmp_path / "book.txt").write_text("hello there, numbers and llamas. " * 100)
    words = [
        "--train.max_seq_length",
        "64",
        "--precision",
        "32-true",
        "--epochs",
        "1",
        "--eval.max_new_tokens",
        "0",
        "--out_dir",
        str(tmp_path / "out"),
    ]
    assert main(["finetune", str(base), "--data", str(file), *words]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    own, again = evaluate(tmp_path / "out/final"), evaluate(tmp_path / "out/final", "--data", str(file))
    assert own["loss"] == pytest.approx(report["final_val_loss"], rel=1e-5) and again["records"] > own["records"]
    (short := tmp_path / "short.txt").write_text("hello there, numbers and llamas. " * 30)
    (folder := tmp_path / "model").symlink_to(base)
    assert (count := evaluate(folder, "--data", str(short))["records"]) > 0
    assert evaluate(folder, "--data", str(short), "--data.val_split_fraction", "0")["records"] == count, "each block once"


def test_records_of_text_have_a_loss_and_no_answers(base: Path, tmp_path: Path) -> None:
    records = [{"text": "hello there, numbers and llamas"}, {"instruction": "hello", "output": "there"}]
    (folder := tmp_path / "model").symlink_to(base)
    for name, count in (("both", 2), ("text", 1)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records[:count]))
        results = evaluate(folder, "--data", str(tmp_path / f"{name}.json"), "--max_new_tokens", "4")
        assert results["records"] == count and len(results.get("answers", ())) == count - 1


def test_mistakes(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = runs.write_data(tmp_path / "data.json", 3)
    for words, said in (
        ([], "give --data FILE, or --tasks NAMES"),
        (["--data", str(data), "--tasks", "x"], "tasks and data are both given"),
        (["--data", str(data), "--batch_size", "many"], "batch_size is 'many'"),
        (["--data", str(data), "--limit", "0.5"], "limit is 0.5"),
        (["--data", str(data), "--dtype", "int3"], "dtype is 'int3'"),
        (["--data", str(data), "--max_new_tokens", "-1"], "max_new_tokens is -1: a whole number of at least 0 is needed"),
    ):
        assert main(["evaluate", str(base), *words]) == 1
        assert said in (err := capsys.readouterr().err) and ("loaded in" in err) is ("0.5" in words)  # said before the model is loaded
    assert not (base / "evaluate").exists()


def test_a_file_that_holds_something_else_is_not_replaced(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = runs.write_data(tmp_path / "data.json", 3)
    (tmp_path / "results.json").write_text('{"mine": 1}')
    for words, said in (
        (["--save_filepath", str(data)], "data.json exists and holds no results of litgpt evaluate"),
        (["--out_dir", str(tmp_path)], "results.json exists and holds no results"),
        (["--save_filepath", str(tmp_path)], "it is a folder"),
        (["--save_filepath", f"{data}/a/b.json"], "data.json is a file"),
    ):
        before = data.read_bytes()
        assert main(["evaluate", str(base), "--data", str(data), *words]) == 1
        err = capsys.readouterr().err
        assert said in err and "answers" not in err and data.read_bytes() == before


def test_a_file_that_somebody_wrote_meanwhile_is_not_replaced(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"

    def meanwhile(*args: Any, **settings: Any) -> Any:
        out.write_text("theirs")
        return on_records(*args, **settings)

    on_records = module.on_records
    monkeypatch.setattr(module, "on_records", meanwhile)
    assert main(["evaluate", str(base), "--data", str(runs.write_data(tmp_path / "data.json", 3)), "--save_filepath", str(out)]) == 1
    printed = capsys.readouterr()
    assert "holds no results" in printed.err and "loss" in printed.out and out.read_text() == "theirs"


def test_weights_that_are_not_finite(
    write_tiny_tokenizer: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    weights = load_weights(base / "lit_model.pth")
    weights["transformer.h.2.attn.qkv.weight"][3, 3] = math.nan
    save_weights(weights, base / "lit_model.pth")
    data = runs.write_data(tmp_path / "data.json", 3)
    assert main(["evaluate", str(base), "--data", str(data), "--out_dir", str(tmp_path / "results")]) == 3
    assert "the loss is nan" in capsys.readouterr().err and not (tmp_path / "results").exists()
    for temperature in ("0", "0.8"):
        assert main(["generate", str(base), "--prompt", "hi", "--temperature", temperature]) == 1
        assert "the model's output is not finite" in capsys.readouterr().err


def test_without_the_harness(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "litgpt.integrations.harness", raising=False)
    assert main(["evaluate", str(base), "--tasks", "hellaswag"]) == 1
    assert 'pip install "litgpt[eval]"' in capsys.readouterr().err


PAIRS = [
    ("the cat sat on the mat", "the cat on a mat"),
    ("a b c", "x y"),
    ("Yes.", "yes"),
    ("", "a"),
    ("a a b", "b a a"),
    ("x_1 y-2", "1 2"),
]
SCORES = [8 / 11, 0.0, 1.0, 0.0, 2 / 3, 4 / 6]


@pytest.mark.parametrize(("pair", "score"), list(zip(PAIRS, SCORES, strict=True)))
def test_rouge_l(pair: tuple[str, str], score: float) -> None:
    assert rouge_l(*pair) == pytest.approx(score)


def test_rouge_l_against_rouge_score() -> None:
    scorer = RougeScorer(["rougeL"])
    for expected, answer in PAIRS:
        assert rouge_l(expected, answer) == pytest.approx(scorer.score(expected, answer)["rougeL"].fmeasure)
