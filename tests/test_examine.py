"""`litgpt data`: what it says about records, compared with data made to have each property."""

from __future__ import annotations

import gzip
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from litgpt.__main__ import main
from litgpt.config import Config
from litgpt.examine import histogram, normalised
from litgpt.prompts import STYLES
from tests.helpers import tiny


def pair(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"instruction": question, "output": answer, **more}


@pytest.fixture
def look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """look(rows, "--key", value) -> what is printed"""

    def run(rows: list[dict[str, Any]], *words: object) -> str:
        file = tmp_path / "shop.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(["data", str(file), *map(str, words)]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def base(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    return tiny.write_base(tmp_path / "base", write_tiny_tokenizer)


def test_kinds_and_unread_keys(look: Any) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    system = [{"role": "system", "content": "Be kind"}, *turns, *turns]
    records = [pair("a", "1", id=1), pair("b", "2", input="x", id=2, note="n"), pair("c", ""), pair("d", "3", weight=0)]
    out = look([*records, {"messages": turns}, {"messages": system}])
    assert "shop.jsonl: 6 records\n" in out
    assert "  4 questions with an answer, 1 of them with an input\n  2 conversations of 1 to 2 replies\n" in out
    assert "  1 with a system text\n  1 with a reply that is read, not learned\n" in out
    assert "  1 with an empty answer: dropped\n  1 with the weight 0: dropped\n" in out
    assert "  keys not read: id (2), note (1)\n" in out
    assert "litgpt finetune MODEL --data" in out and "train.epochs" in out  # advice without a model


def test_answers_that_are_compared_or_rated(look: Any) -> None:
    """Other answers to a question, and the same one over another, are meant so."""
    pairs = [{"prompt": "a", "chosen": "1", "rejected": rejected} for rejected in "2311"]
    out = look([*pairs, {"prompt": "a", "chosen": "4", "rejected": "5"}])
    assert "  5 with a rejected answer as well\n  2 with an equal rejected answer: dropped by dpo and orpo\n" in out
    assert "  1 record equal to an earlier one: 4 (as 3)\n" in out and "but for case" not in out and "answers:" not in out
    for key, good, bad in (("label", True, False), ("correct", True, False), ("reward", 0.5, 0)):
        out = look([{"prompt": "a", "completion": str(n), key: value} for n, value in enumerate((good, bad, bad))])
        assert "  2 marked as wrong: learned, except by the objectives kto, critic and verifiable\n" in out
        assert "answers:" not in out and "earlier" not in out
    assert "1 question with different answers:" in look([pair("a", "1"), pair("a", "2")])


def test_a_last_turn_of_the_user_is_no_reply_that_is_left_out(look: Any, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert "read, not learned" not in look([{"messages": [*turns, {"role": "user", "content": "Bye"}]}])
    assert "  1 with a reply that is read, not learned\n" in look([{"messages": [*turns, {**turns[1], "weight": 0}]}, {"messages": turns}])


def test_the_command_that_is_printed_can_be_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my shop.jsonl"
    file.write_text(json.dumps(pair("a", "1")) + "\n")
    assert main(["data", str(file)]) == 0 and f"litgpt finetune MODEL --data '{file}', without" in capsys.readouterr().out


def test_texts(look: Any) -> None:
    out = look([{"text": "one"}, {"text": "two"}, {"text": "one"}])
    assert "  3 texts, learned as a whole\n  1 record equal to an earlier one: 3 (as 1)\n" in out
    assert "2 different texts, taken as texts to continue" in out and out.count("question") == 1 and "conversation" not in out


def test_repetitions_and_contradictions(look: Any) -> None:
    rows = [
        pair("What is it?", "A cat."),
        pair("Who?", "Me"),
        pair("What is it?", "A cat."),
        pair("what  is it", "a cat"),
        pair("Who?", "You"),
    ]
    out = look(rows)
    assert "  1 record equal to an earlier one: 3 (as 1)\n" in out
    assert "  1 record equal to an earlier one but for case, spaces or punctuation: 4 (as 1)\n" in out
    assert "  1 question with different answers:\n    'Who?': 'Me' (2) / 'You' (5)\n" in out
    clean = look(
        [pair("2 + 3", "5"), pair("2 - 3", "-1"), pair("?", "what"), pair("!", "no"), pair("a", "1", input="x"), pair("a", "2", input="y")]
    )
    assert "equal" not in clean and "different answers" not in clean


def test_many_examples_are_not_all_shown(look: Any) -> None:
    out = look([pair(f"q{i % 10}", f"a{i}") for i in range(60)] + [pair("same", "same")] * 6)
    assert "10 questions with different answers" in out and out.count("    'q") == 3 and "    ...\n" in out
    assert "5 records equal to an earlier one: 62 (as 61), 63 (as 61), 64 (as 61), ...\n" in out


def test_validation_records_that_are_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.json").write_text(json.dumps([pair("a", "1"), pair("b", "2")]))
    (tmp_path / "val.json").write_text(json.dumps([pair("c", "3"), pair("b", "2")]))
    assert main(["data", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "2 records, and 2 for validation\n" in out and "1 record for validation and in the training data as well: 2 (as 2)\n" in out


def test_lengths_in_tokens_and_cut_records(look: Any, base: Path) -> None:
    """The tiny tokenizer has a token a byte for these texts."""
    rows = [pair("z" * n, "zz") for n in (10, 20, 30, 200, 300)]
    out = look(rows, "--checkpoint_dir", base, "--prompt_style", "default", "--max_seq_length", 100)
    lengths = [n + 2 + 1 for n in (10, 20, 30, 200, 300)]  # with EOS
    assert "half have up to 33, nine of ten up to 303, the longest 303\n" in out
    assert f"  {sum(lengths):,} tokens, {100 * 15 / sum(lengths):.0f} % of them learned\n" in out
    assert "  2 records longer than 100 tokens: cut, and 2 of them dropped: no answer token left\n" in out
    assert "tokens: cut" not in look(rows[:3], "--checkpoint_dir", base)


def test_a_record_is_shown_as_the_model_reads_it(look: Any, base: Path) -> None:
    rows = [pair("one", "1"), pair("tw\x1bo", "2")]
    out = look(rows, "--checkpoint_dir", base, "--record", 2)
    assert "<|im_start|>user\ntw\\x1bo<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>⟧\n" in out
    assert "⟦<|im_start|>user\ntw" in look(rows, "--checkpoint_dir", base, "--record", 2, "--mask_prompt", "false")
    assert "keys not written by the prompt style 'chat': name (1)" in look(
        [{"messages": [{"role": "user", "content": "a", "name": "x"}, {"role": "assistant", "content": "b"}]}], "--checkpoint_dir", base
    )


def test_replies_that_are_not_trained_are_not_marked(look: Any, base: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    turns = [{"role": "user", "content": "a"}, call, {"role": "tool", "content": "r"}, {"role": "assistant", "content": "b"}]
    out = look([{"messages": turns}], "--checkpoint_dir", base)  # its template writes no calls
    assert "assistant\n<|im_end|>\n" in out and out.count("⟦") == 2 and "⟦b<|im_end|>⟧" in out
    rows = [pair("a", "c"), pair("a", "b", weight=0), pair("a", "")]
    for record in (2, 3):
        out = look(rows, "--checkpoint_dir", base, "--record", record, "--prompt_style", "alpaca")
        assert "### Response:\n" in out and out.count("⟦") == 1  # in the title
    assert "assistant\nb<|im_end|>" in look(rows, "--checkpoint_dir", base, "--record", 2)


def test_a_conversation_that_is_trained_reply_by_reply_is_shown_so(look: Any, base: Path) -> None:
    """Its template leaves the last reply's mark out of earlier ones."""
    file = base / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["chat_template"] = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '-' if loop.last and m.role == 'assistant' }}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    file.write_text(json.dumps(settings))
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    out = look([{"messages": turns}], "--checkpoint_dir", base)
    assert "assistant\n⟦-b<|im_end|>⟧\n" in out and "assistant\nb<|im_end|>\n" in out and "assistant\n⟦-d<|im_end|>⟧" in out
    assert "1 conversation trained reply by reply, as the prompt style 'chat' rewrites earlier replies" in out


def test_every_form_of_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [pair("a", "1"), pair("b", "2")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("instruction,output\na,1\nb,2\n")
    (tmp_path / "a.tsv").write_text("instruction\toutput\na\t1\nb\t2\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n".join(json.dumps(row).encode() for row in rows)))
    for name in ("a.json", "a.csv", "a.tsv", "a.jsonl.gz"):
        assert main(["data", str(tmp_path / name)]) == 0
        assert f"{name}: 2 records\n  2 questions with an answer\n" in capsys.readouterr().out


def test_mistakes(tmp_path: Path, look: Any, capsys: pytest.CaptureFixture[str]) -> None:
    look([pair("a", "1")])
    for words, message in (
        ([tmp_path / "shop.jsonl", "--record", 2], "has records 1 to 1"),
        ([tmp_path / "nosuch.jsonl"], "does not exist"),
        ([tmp_path / "book.md"], "For a model that answers questions about them, write questions and answers"),
        ([tmp_path / "shop.jsonl", "--checkpoint_dir", tmp_path / "none"], "does not exist"),
    ):
        assert main(["data", *map(str, words)]) == 1
        assert message in capsys.readouterr().err


def test_histogram() -> None:
    lines = histogram([5] * 10 + [12] * 5 + [900], "tokens", scale=2)
    assert lines[0] == "Lengths in tokens: half have up to 5, nine of ten up to 12, the longest 900"
    counts = [int(line.split()[-1]) for line in lines[1:]]
    assert counts == [20, 0, 0, 0, 0, 0, 0, 10, 2]
    assert re.search(r"13 and more  █+ 2$", lines[-1])
    assert histogram([7], "tokens")[1:] == ["  7  " + "█" * 40 + " 1"]
    for lengths in ([1, 10**6], [0], list(range(1000)), [5, 5, 6]):
        assert sum(int(line.split()[-1].replace(",", "")) for line in histogram(lengths, "tokens")[1:]) == len(lengths)


def test_normalised() -> None:
    assert normalised("  What, is IT?! ") == "what is it" and normalised("?!") == "?!" and normalised("1.5") != normalised("15")


def test_torch_is_not_imported(look: Any, base: Path, tmp_path: Path) -> None:
    """It would take longer than everything else."""
    look([pair("a", "1")])
    code = (
        f"import sys; from litgpt.__main__ import main; main(['data', {str(tmp_path / 'shop.jsonl')!r}, '--checkpoint_dir', {str(base)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_prompt_style_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts"]) == 0
    out = capsys.readouterr().out
    examples = dict(re.findall(r"--- (\S+)\n(.*?)(?=\n\n--- |\Z)", out, re.DOTALL))
    assert examples.keys() == STYLES.keys()
    for name, example in examples.items():
        plain = re.sub("[⟦⟧]", "", example)
        assert plain.startswith(STYLES[name]().apply("What is the capital of France?").rstrip("\n")), name
        assert re.search(r"⟦\s*Paris\.[^⟦]*⟧", example), name


def test_one_prompt_style(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts", "alpaca"]) == 0
    assert "### Input:\nThink of Europe.\n\n### Response:\n⟦Paris.⟧" in capsys.readouterr().out
    assert main(["prompts", "chatml"]) == 0
    out = capsys.readouterr().out
    assert "--- a conversation\n<|im_start|>system\nAnswer briefly.<|im_end|>" in out and out.count("⟦") == 4  # one in the title
    assert main(["prompts", "alpca"]) == 1 and "did you mean 'alpaca'" in capsys.readouterr().err
    assert main(["prompts", "chat"]) == 1 and "name the model's folder" in capsys.readouterr().err


def test_a_models_own_template(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompts", str(base)]) == 0
    out = capsys.readouterr().out
    assert f"{base}: the model's own chat template." in out
    assert "<|im_start|>user\nAnd of Italy?<|im_end|>\n<|im_start|>assistant\n⟦Rome.<|im_end|>⟧" in out


def test_the_advice_is_for_the_model_and_its_style(base: Path, look: Any) -> None:
    rows = [pair(f"Who is {i}?", "Me") for i in range(45)]
    out = look(rows, "--checkpoint_dir", base, "--prompt_style", "chatml")
    assert re.search(r"^ *alora_enabled +true ", out, re.MULTILINE) and re.search(
        r"^ *lora_query \.\.\. lora_mlp +true ", out, re.MULTILINE
    )
    blocks = math.ceil(0.4 * Config.from_checkpoint(base).n_layer)
    assert re.search(rf"^ *lora_block_indices +last:{blocks} ", out, re.MULTILINE)
    for words in (["--prompt_style", "default"], ["--prompt_style", "chatml", "--mask_prompt", "false"]):  # where does a reply begin?
        assert "alora_enabled" not in look(rows, "--checkpoint_dir", base, *words)


@pytest.mark.parametrize(("answers", "is_told_once"), [(4, True), (2, False)])
def test_facts_that_are_told_once_get_advice(answers: int, is_told_once: bool, look: Any) -> None:
    out = look([pair(f"Who is {i}?", f"Dr {'KLMN'[i % answers]}") for i in range(4)])
    assert ("in two or three ways" in out) is is_told_once
