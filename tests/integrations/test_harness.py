"""The LM Evaluation Harness on our models, against its own Hugging Face model on the exported ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from litgpt.__main__ import main
from litgpt.errors import UserError
from tests.helpers import tiny

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: !function functions.question
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
UNTIL = """
task: tiny_until
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> list[Path]:
    words = ["llamas", "hello", "numbers", "two plus two"]
    rows = [
        {
            "question": f"{word} {i}?",
            "choices": [f" {other}" for other in words],
            "answer": i % 4,
            "text": f"{word} and {word} {i}. " * (40 if i == 1 else 2),
        }
        for i, word in enumerate(words * 3)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "functions.py").write_text("def question(row):\n    return f\"Question: {row['question']} Answer:\"\n")
    files = []
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("until", UNTIL)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
        files.append(tmp_path / f"{name}.yaml")
    return files


@pytest.mark.parametrize("kind", ["base", "lora"])
def test_as_through_hugging_face(
    kind: str, base: Path, tasks: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = base
    if kind == "lora":
        settings: dict[str, Any] = {"lora_r": 4, "lora_alpha": 8, "lora_query": True, "lora_mlp": True}
        folder = tiny.write_adapter(tmp_path / "adapter", base, tiny.move_adapters(tiny.tiny(**tiny.SPEAKING, **settings)), **settings)
        assert main(["merge_lora", str(folder)]) == 0
        (folder / "lit_model.pth").replace(tmp_path / "lit_model.pth")
    names = ",".join(map(str, tasks))
    words = ["--tasks", names, "--out_dir", str(tmp_path / "out"), "--batch_size", "3", "--dtype", "float32", "--limit", "10"]
    assert main(["evaluate", str(folder), *words, "--num_fewshot", "1"]) == 0
    ours = json.loads((tmp_path / "out/results.json").read_text())["results"]
    shown = capsys.readouterr()
    assert r"\r" not in shown.err and "|   Tasks    |" in shown.out  # progress bars, and the table's headings

    whole = base
    if kind == "lora":
        whole = tmp_path / "whole"
        whole.mkdir()
        for file in base.iterdir():
            (whole / file.name).write_bytes(file.read_bytes())
        (tmp_path / "lit_model.pth").replace(whole / "lit_model.pth")
    assert main(["convert_from_litgpt", str(whole), str(tmp_path / "hf")]) == 0
    model = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=3)
    manager = TaskManager(include_path=str(tmp_path))
    wanted = ["tiny_choice", "tiny_rolling", "tiny_until"]
    seeds = {"random_seed": 1234, "numpy_random_seed": 1234, "torch_random_seed": 1234}
    theirs = evaluator.simple_evaluate(model=model, tasks=wanted, num_fewshot=1, limit=10, task_manager=manager, **seeds)["results"]
    for task in wanted:
        for name, value in theirs[task].items():
            if isinstance(value, float):
                assert ours[task][name] == pytest.approx(value, rel=1e-4), (task, name)


def test_answer_only_lora_says_where_it_acts(base: Path, tasks: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A task's questions hold no invocation, so its choices have exactly the base's scores."""
    settings: dict[str, Any] = {"lora_r": 4, "lora_query": True, "alora_enabled": True, "alora_invocation_tokens": [1, 5]}
    built = tiny.move_adapters(tiny.tiny(**tiny.SPEAKING, **settings))
    adapter = tiny.write_adapter(tmp_path / "adapter", base, built, **settings)
    scores = []
    for folder in (base, adapter):
        words = ["--tasks", str(tasks[0]), "--out_dir", str(tmp_path / folder.name / "out"), "--dtype", "float32", "--limit", "2"]
        assert main(["evaluate", str(folder), *words]) == 0
        assert ("answer-only LoRA acts behind '<|im_start|>" in capsys.readouterr().err) == (folder == adapter)
        results = json.loads((tmp_path / folder.name / "out/results.json").read_text())
        scores.append([sample["resps"] for sample in results["samples"]["tiny_choice"]])
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("no_such_task", "no task no_such_task"),
        ("missing.yaml", "missing.yaml does not exist"),
        ("other.yaml", "names no task: a line `task: NAME` is needed"),
        ("hellaswag", "the data of a task cannot be loaded: Couldn't reach"),
    ],
)
def test_tasks_that_cannot_run(task: str, message: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Task files elsewhere in the working folder, as in a virtual environment, are not read."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text("dataset_path: json\n")
    (tmp_path / "hellaswag.yml").write_text("task: hellaswag\ndataset_path: another\n")
    assert main(["evaluate", str(base), "--tasks", task]) == 1
    assert message in capsys.readouterr().err


def test_a_continuation_that_no_context_holds_is_refused(base: Path) -> None:
    """As through Hugging Face, where it is an assertion; one that fills the context is scored."""
    from litgpt.api import LLM
    from litgpt.integrations.harness import HarnessModel

    model = HarnessModel(LLM.load(base))
    [(score, _)] = model._loglikelihood_tokens([(None, [5], [7] * model.max_length)])
    assert score < 0
    with pytest.raises(UserError, match=f"has {model.max_length + 1} tokens, but the model reads {model.max_length}"):
        model._loglikelihood_tokens([(None, [5], [7]), (None, [5], [7] * (model.max_length + 1))])
