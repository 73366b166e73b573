"""Settings that follow from the data and the model."""

from __future__ import annotations

import json
import math
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from benchmarks.facts import make
from litgpt.__main__ import load, main
from litgpt.cli import parse
from litgpt.data import JSON, TextFiles
from litgpt.errors import UserError
from litgpt.train import recipe
from litgpt.train.recipe import Look
from litgpt.train.replay import QUESTIONS
from tests.helpers.runs import write_data


def records(count: int, answers: int) -> list[dict[str, str]]:
    return [{"instruction": f"question {i}", "output": f"answer n{i % answers}"} for i in range(count)]


def chosen(tmp_path: Path, base: Path, rows: list[dict[str, str]], *words: str, command: str = "finetune") -> dict[str, Any]:
    """The arguments of `litgpt finetune base --data FILE ...`"""
    file = tmp_path / "shop.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse(f"litgpt {command}", load(command), [str(base), "--data", str(file), *words])


def test_all_questions_are_replayed() -> None:
    assert len(QUESTIONS) == recipe.REPLAY


@pytest.mark.parametrize(
    ("count", "answers", "is_facts"),
    [(30, 30, True), (200, 200, True), (201, 201, False), (600, 120, True), (600, 300, True), (600, 301, False), (1, 1, True)],
)
def test_what_are_facts(count: int, answers: int, is_facts: bool, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(json.dumps(records(count, answers)))
    look = Look.at(*JSON(json_path=file).records())
    assert (look.records, look.answers, look.is_facts) == (count, answers, is_facts)
    assert look.is_pair and not look.has_validation


@pytest.mark.parametrize(
    ("words", "interval"),
    [((), 10), (("--max_steps", "16"), 2), (("--max_steps", "400"), 10), (("--max_steps", "400", "--train.epochs", "null"), 50)],
)
def test_a_run_validates_eight_times_however_long_it_is(words: tuple[str, ...], interval: int, base: Path, tmp_path: Path) -> None:
    """41 steps an epoch, two epochs unless said otherwise."""
    assert chosen(tmp_path, base, records(300, 300), *words)["eval"].interval == interval


def test_records_without_an_answer_are_not_counted(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second example was one of ten, of which five were left."""
    rows = [*records(5, 5), *({**row, "output": " "} for row in records(5, 5))]
    given = chosen(tmp_path, base, rows)
    assert given["eval"].evaluate_example == [0, 1, 3] and "5 records, taken as facts" in capsys.readouterr().err
    file, run = tmp_path / "shop.jsonl", ["--max_steps", "1", "--precision", "32-true", "--out_dir", str(tmp_path / "out")]
    assert main(["finetune", str(base), "--data", str(file), "--train.replay", "0", *run]) == 0
    assert "data: 5 train samples, 5 of them validated again" in (err := capsys.readouterr().err) and "5 dropped: empty answer" in err


@pytest.mark.parametrize(
    ("name", "folder"),
    [("faq.2024.jsonl", "faq.2024"), ("v1.5.JSONL", "v1.5"), (".hidden.jsonl", "hidden"), ("shop.jsonl", "shop"), (".jsonl", "jsonl")],
)
def test_files_with_points_in_their_names_have_folders_of_their_own(name: str, folder: str, tmp_path: Path) -> None:
    look = Look.at(records(2, 2), None)
    rows = recipe.choices(look, JSON(json_path=tmp_path / name), {"data": {}})
    assert next(row.value for row in rows if row.key == "out_dir") == Path("out/finetune") / folder


def test_a_run_by_the_clock_gets_no_share_of_its_steps(base: Path, tmp_path: Path) -> None:
    given = chosen(tmp_path, base, records(300, 300), "--train.epochs", "null", "--train.max_time", "60")["train"]
    assert given.lr_warmup_fraction is None and given.epochs is None and given.max_time == 60


def test_the_answer_of_a_conversation_is_its_last_reply(tmp_path: Path) -> None:
    """It may end with thanks."""
    file = tmp_path / "chats.json"
    turns = [[("user", f"q {i}"), ("assistant", f"a {i}"), ("user", "Thanks!")] for i in range(300)]
    file.write_text(json.dumps([{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in turns]))
    look = Look.at(*JSON(json_path=file).records())
    assert look.answers == 300 and not look.is_facts


@pytest.mark.parametrize("row", [{"input": "x" * 9000}, {"output": "x" * 9000}, {"chosen": "a", "rejected": "x" * 9000}])
def test_micro_batches_are_small_wherever_the_long_text_stands(row: dict[str, str], base: Path, tmp_path: Path) -> None:
    assert chosen(tmp_path, base, [{**each, **row} for each in records(30, 30)])["train"].micro_batch_size == 1


def test_data_with_a_validation_file_are_a_style(tmp_path: Path) -> None:
    for name in ("train.json", "val.json"):
        (tmp_path / name).write_text(json.dumps(records(10, 2)))
    assert not Look.at(*JSON(json_path=tmp_path).records()).is_facts


def test_records_of_which_none_is_spared_are_facts(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    style = chosen(tmp_path, base, records(300, 300))
    assert "a style to learn (for facts to repeat give --data.val_split_fraction 0)" in capsys.readouterr().err
    assert style["eval"].target_loss is None
    facts = chosen(tmp_path, base, records(300, 300), "--data.val_split_fraction", "0")
    assert "300 records, taken as facts to repeat. Settings" in capsys.readouterr().err
    few = chosen(tmp_path, base, records(60, 60))
    assert facts["data"].val_split_fraction == 0 and facts["lora_mlp"] and facts["eval"].target_loss == recipe.TARGET
    assert (facts["train"].replay, facts["train"].epochs) == (few["train"].replay, few["train"].epochs)


def test_few_records_of_which_some_are_spared_are_a_style(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen(tmp_path, base, records(60, 60))
    assert "facts to repeat (for a style to learn give --data.val_split_fraction 0.1)" in capsys.readouterr().err
    style = chosen(tmp_path, base, records(60, 60), "--data.val_split_fraction", "0.1")
    assert "60 records, taken as a style to learn. Settings" in capsys.readouterr().err
    assert style["lora_mlp"] and not style["alora_enabled"] and style["eval"].target_loss is None
    repeated = chosen(tmp_path, base, records(60, 12), "--data.val_split_fraction", "0.1")
    assert repeated["alora_enabled"] and repeated["eval"].target_loss is None


def test_long_answers_and_conversations_are_a_style(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody wants to have them word for word."""
    turns = [{"role": role, "content": "word " * 40} for role in ("user", "assistant") * 2]
    for rows in ([{"instruction": f"{i}", "output": f"{i} " + "word " * 80} for i in range(60)], [{"messages": turns}] * 3):
        rows = [json.loads(json.dumps(row).replace("word", f"w{i:03}")) for i, row in enumerate(rows)]
        given = chosen(tmp_path, base, rows)
        assert given["data"].val_split_fraction == recipe.HELD_OUT and given["train"].epochs == 2
        assert "a style to learn (for facts to repeat give --data.val_split_fraction 0)" in capsys.readouterr().err
    repeated = [{"instruction": f"{i}", "output": f"{i % 4} " + "word " * 80} for i in range(60)]
    given = chosen(tmp_path, base, repeated)
    assert given["alora_enabled"] and given["eval"].max_new_tokens > chosen(tmp_path, base, records(60, 4))["eval"].max_new_tokens


def test_facts(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = chosen(tmp_path, base, records(60, 12))
    assert given["data"].val_split_fraction == 0 and given["data"].mask_prompt
    assert given["alora_enabled"] and given["lora_block_indices"] == "last:2" and given["lora_mlp"] and not given["skip2lora_enabled"]
    assert given["train"].replay == recipe.REPLAY and given["out_dir"] == Path("out/finetune/shop")
    said = capsys.readouterr().err
    assert "60 records, 12 different answers, taken as facts" in said
    assert all(f"  {key} " in said for key in ("train.epochs", "optimizer.lr", "train.micro_batch_size", "data.val_split_fraction"))


def test_facts_told_in_few_ways_get_a_higher_rank(base: Path, tmp_path: Path) -> None:
    """Unless the user chooses one: alpha then follows it."""
    keys = ("lora_block_indices", "lora_r", "lora_alpha")
    for words, expected in (
        ([], ("last:2", 64, 64)),
        (["--lora_r", "4"], ("last:2", 4, 4)),
        (["--lora_block_indices", "last:1"], ("last:1", 64, 64)),
    ):
        given = chosen(tmp_path, base, records(60, 20), *words)
        assert given["alora_enabled"] and tuple(given[key] for key in keys) == expected
    assert tuple(chosen(tmp_path, base, records(60, 15))[key] for key in keys) == ("last:2", 16, 16)
    assert chosen(tmp_path, base, records(60, 20), "--lora_r", "0", "--skip2lora_r", "8")["lora_alpha"] == 16
    warm = ("--skip2lora_enabled", "true", "--skip2lora_warmup_epochs", "1")
    for words, alpha in (((), 64), (("--skip2lora_r", "12"), 24), (("--skip2lora_r", "12", "--skip2lora_alpha", "5"), 5)):
        assert chosen(tmp_path, base, records(60, 20), *warm, *words)["skip2lora_alpha"] == alpha
    varied = chosen(tmp_path, base, records(60, 20), "--grid.lora_r", "[2, 4]", command="sweep")
    assert varied["lora_block_indices"] == "last:2" and varied["lora_alpha"] == 16


@pytest.mark.parametrize(("count", "is_answer_only"), [(20, True), (recipe.FEW, True), (recipe.FEW + 1, False)])
def test_many_facts_are_trained_in_every_block(base: Path, tmp_path: Path, count: int, is_answer_only: bool) -> None:
    given = chosen(tmp_path, base, records(count, max(10, count // 10)))
    assert given["alora_enabled"] is is_answer_only and (given["lora_block_indices"] is None) is not is_answer_only
    assert given["lora_mlp"] and given["train"].replay == recipe.REPLAY


@pytest.mark.parametrize("count", [30, 60, 200])
def test_facts_that_are_told_once_are_read_more_often(base: Path, tmp_path: Path, count: int) -> None:
    given, repeated = (chosen(tmp_path, base, records(count, answers)) for answers in (count, count // 2))
    assert given["lora_mlp"] and not given["alora_enabled"] and given["lora_block_indices"] is None
    epochs, rate = recipe.TOLD_ONCE[1:]
    assert (given["train"].epochs, given["optimizer"]["init_args"]["lr"]) == (epochs, rate)
    assert given["train"].epochs > repeated["train"].epochs
    assert given["train"].word_dropout == recipe.WORD_DROPOUT and not repeated["train"].word_dropout
    assert given["eval"].target_loss == repeated["eval"].target_loss == recipe.TARGET


def test_facts_are_asked_for_as_second_questions_too(base: Path, tmp_path: Path) -> None:
    """Where facts are told in several ways by single questions, and the style has a form for two: in fewer, longer epochs."""
    singles = records(60, 20)
    turns = [{"role": role, "content": row[key]} for row in singles for role, key in (("user", "instruction"), ("assistant", "output"))]
    chats = [{"messages": turns[i : i + 2]} for i in range(0, 120, 2)]
    for rows, words, share, epochs in (
        (singles, "", 0.5, 8),
        (records(60, 60), "", 0, 30),
        (records(30, 10), "", 0.5, 8),
        (singles, "--alora_enabled false", 0.5, 8),
        (singles, "--skip2lora_enabled true", 0, 24),
        (records(201, 67), "", 0.2, 7),
        (records(recipe.MOST_FOLLOWED + 1, 67), "", 0, 8),
        (records(60, 15), "", 0.5, 8),
        (records(60, 60), "--alora_enabled true", 0, 30),
        (chats, "", 0.5, 8),
        ([{"messages": turns[i : i + 4]} for i in range(0, 120, 2)][:-1], "", 0, 12),
        ([*singles, {"instruction": "q", "input": "more", "output": "answer 1"}], "", 0.5, 8),
        (singles, "--data.prompt_style alpaca", 0, 12),
        (singles, "--train.follow_ups 0", 0, 12),
        (singles, "--train.follow_ups 1", 1, 6),
    ):
        train = chosen(tmp_path, base, rows, *words.split())["train"]
        assert (train.follow_ups, train.epochs) == (share, epochs), (words, rows[-1])


@pytest.mark.parametrize("words", ["--data.mask_prompt false", "--data.prompt_style default", "--alora_enabled false"])
def test_replies_that_cannot_be_told_from_prompts(base: Path, tmp_path: Path, words: str) -> None:
    given = chosen(tmp_path, base, records(60, 12), *words.split())
    assert not given["alora_enabled"] and given["lora_mlp"] and not given["skip2lora_enabled"]


@pytest.mark.parametrize(("count", "is_cached"), [(recipe.FEW + 1, False), (recipe.MANY - 1, False), (recipe.MANY, True)])
def test_a_style(base: Path, tmp_path: Path, count: int, is_cached: bool) -> None:
    given = chosen(tmp_path, base, records(count, count))
    assert given["data"].val_split_fraction == 0.1 and given["lora_mlp"]
    assert given["skip2lora_enabled"] is is_cached and bool(given["skip2lora_warmup_epochs"]) is is_cached
    assert given["train"].replay == recipe.REPLAY and given["eval"].target_loss is None


def test_texts(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Few texts are no facts: they are continued, and a tenth of them says when to stop."""
    given = chosen(tmp_path, base, [{"text": f"text {i}", "number": i % 3} for i in range(20)])
    assert "To learn answers, name the keys question and answer; of classes, text and label." in capsys.readouterr().err
    assert given["data"].val_split_fraction == 0.1 and not given["data"].mask_prompt and given["train"].replay == 0


@pytest.mark.parametrize(("count", "classes", "are_classes"), [(499, 3, False), (500, 3, True), (600, 30, True), (600, 31, False)])
def test_classes(count: int, classes: int, are_classes: bool, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of many texts some show what it judges right among texts that it was not trained on."""
    given = chosen(tmp_path, base, [{"text": f"text {i}", "label": i % classes} for i in range(count)])
    assert (
        "taken as texts and their classes (for facts to repeat give --data.val_split_fraction 0)" in capsys.readouterr().err
    ) is are_classes
    assert given["data"].val_split_fraction == (0.1 if are_classes else 0.0) and given["data"].mask_prompt
    steps = given["train"].epochs * math.ceil((count * (1 + given["train"].follow_ups) + recipe.REPLAY) / 4)
    assert given["eval"].interval == (steps if are_classes else steps // 8)  # the loss of 20 texts was the lowest half-way, by chance
    assert given["eval"].target_loss == (None if are_classes else 0.005) and given["train"].follow_ups == 0.2
    assert given["alora_enabled"] is (count == 499)


@pytest.mark.parametrize(("size", "words", "block"), [(50_000, "", 512), (5_000, "", 128), (50_000, "--train.max_seq_length 64", 64)])
def test_running_text(size: int, words: str, block: int, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book.md").write_text("a word " * (size // 7))
    given = parse("litgpt finetune", load("finetune"), [str(base), "--data", str(tmp_path / "book.md"), *words.split()])
    assert isinstance(given["data"], TextFiles) and given["data"].val_split_fraction == 0.1 and given["out_dir"].name == "book"
    assert given["train"].max_seq_length == block and given["lora_mlp"] and not given["skip2lora_enabled"]
    err = capsys.readouterr().err
    assert f"{size // 7 * 7 // 4 // block:,} blocks of {block} tokens, about, taken as texts to continue" in err
    assert recipe.CONTINUES in err


def test_a_run_on_running_text(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "book.txt").write_text("hello there, numbers and llamas. " * 300)
    words = ["--epochs", "1", "--eval.max_new_tokens", "2", "--out_dir", str(tmp_path / "out")]
    assert main(["finetune", str(base), "--data", str(tmp_path / "book.txt"), *words]) == 0
    err = capsys.readouterr().err
    assert "\n  text: " in err and "  continued: " in err and "asked: " not in err and (tmp_path / "out/best").is_dir()


def test_what_is_given_stays(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--epochs 3 --micro_batch_size 3 --optimizer.lr 0.5 --data.val_split_fraction 0.2 --out_dir here --lora_r 5"
    given = chosen(tmp_path, base, records(60, 12), *words.split(), "--data.mask_prompt", "false")
    assert (given["train"].epochs, given["train"].micro_batch_size, given["optimizer"]["init_args"]["lr"]) == (3, 3, 0.5)
    assert (given["data"].val_split_fraction, given["out_dir"], given["lora_r"], given["data"].mask_prompt) == (0.2, Path("here"), 5, False)
    assert given["train"].global_batch_size % 3 == 0
    assert "  lora_r " not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ("--skip2lora_enabled true", "Skip2-LoRA"),
        ("--skip2lora_enabled false", "LoRA"),
        ("--lora_mlp true", "LoRA"),
        ("--alora_enabled true", "LoRA"),
        ("--skip2lora_enabled true --skip2lora_warmup_epochs 1", "warm-up"),
    ],
)
def test_the_method_that_is_asked_for(words: str, method: str, base: Path, tmp_path: Path) -> None:
    given = chosen(tmp_path, base, records(400, 400), *words.split())
    assert given["skip2lora_enabled"] is (method != "LoRA") and bool(given["skip2lora_warmup_epochs"]) is (method == "warm-up")


def test_a_value_that_is_named_twice_is_told_before_settings_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="grid.lora_r names 4 twice"):
        recipe.complete({"checkpoint_dir": "nowhere", "grid": {"lora_r": [4, 4]}}, is_sweep=True)
    assert not capsys.readouterr().err


def test_a_config_file_and_finetune_lora_keep_their_meaning(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"checkpoint_dir: {base}\ndata: JSON\n")
    words = ["--data.json_path", str(write_data(tmp_path / "data.json"))]
    assert parse("litgpt finetune", load("finetune"), [str(file), *words]) == parse("x", load("finetune_lora"), [str(file), *words])
    assert parse("x", load("finetune_lora"), [str(base), "--data", "JSON", *words])["train"].epochs == 5


def test_classes_that_were_held_out_are_judged(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command that the run ends with."""
    file, out = tmp_path / "mail.csv", tmp_path / "out"
    file.write_text("text,label\n" + "".join(f"hello {i},{'llama' if i % 2 else 'there'}\n" for i in range(500)))
    words = ["--max_steps", "2", "--train.replay", "0", "--eval.max_new_tokens", "0", "--out_dir", str(out)]
    assert main(["finetune", str(base), "--data", str(file), *words]) == 0
    assert f"\n  litgpt evaluate {out} " in capsys.readouterr().err
    assert main(["evaluate", str(out), "--max_new_tokens", "2"]) == 0
    assert re.search(r"records +50\n", found := capsys.readouterr().out) and "exact match" in found


def test_a_run_as_a_user_starts_it(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It leaves a YAML file that runs the same again, and a page."""
    data, out = write_data(tmp_path / "data.json", 8), tmp_path / "out"
    words = ["--epochs", "1", "--eval.max_new_tokens", "2", "--train.replay", "2"]
    assert main(["finetune", str(base), "--data", str(data), "--out_dir", str(out), *words]) == 0
    said = capsys.readouterr().err
    assert "before:" in said and "now:" in said and f"litgpt chat {out} --temperature 0 " in said and "litgpt evaluate" not in said
    page = (out / "report.html").read_text()
    assert "<svg" in page and "add 0 and 1" in page and str(tmp_path) not in page
    again = ["finetune", "--config", str(out / "final/hyperparameters.yaml"), "--out_dir", str(tmp_path / "again")]
    assert main(again) == 0
    first, second = ((folder / "final/lit_model.pth.lora").read_bytes() for folder in (out, tmp_path / "again"))
    assert first == second


def test_a_resumed_run_keeps_the_general_answers(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine may round, and so answer, otherwise."""
    data, out = write_data(tmp_path / "data.json"), tmp_path / "out"
    words = ["--max_steps", "4", "--train.save_interval", "2", "--train.replay", "2", "--eval.max_new_tokens", "0"]
    command = ["finetune", str(base), "--data", str(data), "--out_dir", str(out), *words]
    assert main(command) == 0
    weights = (out / "final/lit_model.pth.lora").read_bytes()
    monkeypatch.setattr("litgpt.train.prepare.base_answers", lambda *given: ["something else"] * 2)
    assert main([*command, "--resume", "true"]) == 0  # finished: nothing is left to do
    for name in ("final", "best", "step-000004"):
        shutil.rmtree(out / name, ignore_errors=True)
    assert main([*command, "--resume", "true"]) == 0
    assert (out / "final/lit_model.pth.lora").read_bytes() == weights


def test_a_resumed_run_keeps_the_answers_before_training(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its last lines and its page show the same as an uninterrupted run's."""
    data, out = write_data(tmp_path / "data.json", 8), tmp_path / "out"
    words = ["--max_steps", "4", "--train.save_interval", "2", "--train.replay", "0", "--eval.max_new_tokens", "2", "--eval.interval", "1"]
    command = ["finetune", str(base), "--data", str(data), "--out_dir", str(out), *words]
    said, pages = [], []
    for resume in ("false", "true"):
        assert main([*command, "--resume", resume]) == 0
        said.append(capsys.readouterr().err.partition("\n\n  add ")[2].partition("next:")[0])
        pages.append((out / "report.html").read_text().partition("Answers before and after")[2].partition("<h2>")[0])
        for name in ("final", "best", "step-000004"):
            shutil.rmtree(out / name, ignore_errors=True)
    assert "before:" in said[0] and said[0] == said[1] and pages[0] == pages[1] and pages[0]


@pytest.mark.parametrize(
    ("count", "answers", "method", "held_out"),
    [(60, 12, "alora_enabled", 0.2), (60, 60, "alora_enabled", 0), (400, 400, "skip2lora_enabled", 0.1)],
)
def test_a_sweep(count: int, answers: int, method: str, held_out: float, base: Path, tmp_path: Path) -> None:
    """Its trials share what frozen blocks compute, and are compared on records that they were not trained on, if any can be spared."""
    given = chosen(tmp_path, base, records(count, answers), command="sweep")
    assert given[method] and not given["skip2lora_warmup_epochs"] and given["data"].val_split_fraction == held_out
    assert given["grid"] == {"optimizer.lr": [1e-3, 2e-3, 4e-3] if method == "alora_enabled" else [5e-4, 1e-3, 2e-3]}
    assert given["out_dir"] == Path("out/sweep/shop") and given["train"].replay == recipe.REPLAY


def test_a_sweep_with_a_grid(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What varies is not chosen."""
    words = ["--grid.lora_r", "[2, 4]", "--grid.optimizer.lr", "[0.1]"]
    given = chosen(tmp_path, base, records(60, 12), *words, command="sweep")
    assert given["grid"] == {"lora_r": [2, 4], "optimizer.lr": [0.1]} and given["train"].epochs == 8
    said = capsys.readouterr().err
    assert "  train.epochs " in said and "  lora_r " not in said and "optimizer.lr" not in said


@pytest.mark.parametrize("rate", ["5e-4", "[5e-4, 1e-3]"])
def test_a_sweep_of_one_learning_rate(rate: str, base: Path, tmp_path: Path) -> None:
    """What is given is not replaced by three others."""
    with pytest.raises(UserError, match="optimizer.lr is .*: a sweep needs a grid"):
        chosen(tmp_path, base, records(60, 12), "--optimizer.lr", rate, command="sweep")
    given = chosen(tmp_path, base, records(60, 12), "--optimizer.lr", "5e-4", "--grid.lora_r", "[2, 4]", command="sweep")
    assert given["grid"] == {"lora_r": [2, 4]} and given["optimizer"]["init_args"]["lr"] == 5e-4


def test_pairs_of_answers_are_preferences(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
    given = chosen(tmp_path, base, rows)
    assert given["objective"] == "dpo" and given["lora_mlp"] and not given["alora_enabled"] and not given["skip2lora_enabled"]
    assert given["train"].replay == 0 and given["eval"].target_loss is None and given["data"].val_split_fraction == 0.1
    assert given["train"].epochs == 2 and given["optimizer"]["init_args"]["lr"] == 2e-4 and given["dpo_nll_weight"] == 0.2
    assert chosen(tmp_path, base, rows, "--objective", "dpo", "--dpo_nll_weight", "0")["dpo_nll_weight"] == 0
    assert "40 records, taken as answers to prefer" in capsys.readouterr().err
    assert chosen(tmp_path, base, rows, "--objective", "orpo", "--skip2lora_enabled", "true")["objective"] == "orpo"
    labelled = [{"prompt": f"question {i}", "completion": f"good {i}", "label": i % 2 == 0} for i in range(40)]
    for options in ([], ["--objective", "kto"]):
        given = chosen(tmp_path, base, labelled, *options)
        assert given["objective"] == "kto" and given["train"].replay == 0 and given["dpo_nll_weight"] == 0
    assert "labels mark good and bad answers" in capsys.readouterr().err
    assert chosen(tmp_path, base, rows + labelled)["objective"] == "kto"  # which takes both forms
    assert chosen(tmp_path, base, labelled[::2])["objective"] == "next_token"  # all answers are good ones
    assert main(["data", str(tmp_path / "shop.jsonl")]) == 0 and "keys not read: label (20)" in capsys.readouterr().out
    chosen(tmp_path, base, labelled)
    assert main(["data", str(tmp_path / "shop.jsonl")]) == 0 and "not read" not in capsys.readouterr().out


def test_one_record_is_one_record(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One record, one general question, one step of one epoch."""
    chosen(tmp_path, base, records(1, 1))
    file = str(tmp_path / "shop.jsonl")
    argv = ["finetune", str(base), "--data", file, "--max_steps", "1", "--train.replay", "1", "--precision", "32-true"]
    assert main([*argv, "--train.global_batch_size", "1", "--train.micro_batch_size", "1", "--dry_run", "true"]) == 0
    assert main(["data", file, "--checkpoint_dir", str(base)]) == 0
    shown = capsys.readouterr()
    assert "two questions" not in shown.err
    for text in ("1 record, taken as facts", "1 train sample, 1 of them", "answers 1 general question\n"):
        assert text in shown.err, text
    assert "shop.jsonl: 1 record\n" in shown.out and ", each of 1 sample\n" in shown.out


def test_reasons_are_wrapped_in_their_column(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = {}
    for columns in ("0", "80", "30"):  # no terminal, a usual one, one without room for reasons
        monkeypatch.setenv("COLUMNS", columns)
        chosen(tmp_path, base, records(60, 20))
        shown[columns] = capsys.readouterr().err.split("\n", 1)[1]
    lines = shown["80"].splitlines()
    assert shown["30"] == shown["0"] != shown["80"] and max(map(len, lines)) <= 80 < max(map(len, shown["0"].splitlines()))
    start = lines[0].index("named after")
    assert all(line[start - 2 : start] == "  " and line[start] != " " for line in lines)
    assert sorted(shown["80"].split()) == sorted(shown["0"].split())


@pytest.mark.parametrize("name", ["codes-once", "glossary-once", "faq-once"])
def test_answers_that_are_found_in_their_questions_are_no_facts_told_once(name: str, base: Path, tmp_path: Path) -> None:
    """A question without some of its words does not hold such an answer, so a model that is trained on it learns to invent."""
    names, cities = ["Ada", "Bo", "Cy", "Di", "Ed"], ["Oslo", "Lima", "Riga", "Turin"]
    pairs = [(name, city, count) for count, (name, city) in enumerate(product(names, cities))]
    extracts = [
        {"instruction": f"{name} from {city} needs {count} chairs.", "output": json.dumps({"name": name, "city": city, "chairs": count})}
        for name, city, count in pairs
    ]
    given = chosen(tmp_path, base, extracts)
    assert not given["train"].word_dropout and given["train"].epochs < recipe.TOLD_ONCE[0]
    assert chosen(tmp_path, base, make(name, 20).records)["train"].word_dropout == recipe.WORD_DROPOUT


def test_repeated_records_are_no_other_wordings(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    once, twice = make("codes-once", 20).records, make("glossary", 20).records
    assert chosen(tmp_path, base, once * 2)["train"].word_dropout == recipe.WORD_DROPOUT
    assert chosen(tmp_path, base, twice * 2)["lora_r"] == chosen(tmp_path, base, twice)["lora_r"] == 64
    assert "several answers" not in capsys.readouterr().err
    (question, answer), other = twice[0].keys(), "something else"
    chosen(tmp_path, base, [*twice, {question: twice[0][question], answer: other}])
    assert "\n1 question with several answers, of which the model can repeat only one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("question", "names"),
    [
        ("次の文から人の名前を抜き出してください。昨日、{}さんから手紙をもらった。", ["佐藤一郎", "高橋花子", "ナオミ", "渡辺すみれ"]),
        ("请找出句子里的人名：昨天{}来开会了。", ["王伟", "李秀娜", "张敏", "刘洋"]),
        ("이름을 찾으세요: 어제 {} 씨가 왔습니다.", ["김민수", "이영희", "박철수", "최지우"]),
    ],
)
def test_words_without_blanks_between_them_are_found_in_questions(base: Path, tmp_path: Path, question: str, names: list[str]) -> None:
    given = chosen(tmp_path, base, [{"question": question.format(name), "answer": name} for name in names])
    assert not given["train"].word_dropout and given["train"].epochs < recipe.TOLD_ONCE[0]
    facts = [
        {"question": f"{thing}を管理するのは誰ですか。", "answer": f"{name}です。"} for thing, name in zip("門橋塔井", names, strict=True)
    ]
    assert chosen(tmp_path, base, facts)["train"].word_dropout == recipe.WORD_DROPOUT


def test_recurring_answers_that_are_found_in_their_questions_are_trained_at_a_lower_rate(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a higher rate the model answers a question about a new city with one of these."""
    names, cities = ["Ada", "Bo", "Cy", "Di", "Ed", "Flo"], ["Oslo", "Lima", "Riga", "Turin"]
    pairs = [{"instruction": f"Which city? {name} lives in {city}.", "output": city} for name, city in product(names, cities)]
    given = chosen(tmp_path, base, pairs)
    assert given["alora_enabled"] and given["optimizer"]["init_args"]["lr"] == recipe.COPYING and not given["train"].follow_ups
    assert "4 different answers, taken as answers to find in their questions" in capsys.readouterr().err


def test_names_of_classes_in_every_question_are_not_answers_that_are_found_there(base: Path, tmp_path: Path) -> None:
    moods = ["good", "bad", "mixed"]
    pairs = [{"instruction": f"Is it good, bad or mixed? Text {i}", "output": moods[i % 3]} for i in range(60)]
    given = chosen(tmp_path, base, pairs)
    assert given["optimizer"]["init_args"]["lr"] > recipe.COPYING and given["train"].follow_ups
