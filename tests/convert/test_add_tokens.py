"""`litgpt add_tokens`: the tokenizer, the rows of the new tokens, and a run that trains them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch.testing import assert_close

from litgpt import checkpoint
from litgpt.__main__ import main
from litgpt.config import Config
from litgpt.tokenizer import Tokenizer
from tests.helpers import runs, tiny

NEW = ["<tool>", "</tool>"]
TEXT = "call <tool>add</tool> now"


@pytest.fixture
def base(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> Path:
    """A tied base with as many rows as tokens."""
    n = Tokenizer(write_tiny_tokenizer(tmp_path / "base")).vocab_size
    folder = tiny.write_base(tmp_path / "base", write_tiny_tokenizer, vocab_size=n, padded_vocab_size=n)
    weights = checkpoint.load_weights(folder / "lit_model.pth", mapped=False)
    checkpoint.save_weights({**weights, "lm_head.weight": weights["transformer.wte.weight"]}, folder / "lit_model.pth")
    return folder


@torch.no_grad()
def test_rows_tokens_and_what_stays(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = tmp_path / "new"
    assert main(["add_tokens", str(base), str(new), "--tokens", *NEW]) == 0
    before, after = Tokenizer(base), Tokenizer(new)
    n = before.vocab_size
    assert f"ids {n} to {n + 1}" in capsys.readouterr().out and n + 2 == Config.from_checkpoint(new).V
    ids = after.ids(TEXT, bos=False)
    assert [i for i in ids if i >= n] == [n, n + 1] and len(ids) < len(before.ids(TEXT, bos=False))
    assert "<tool>" not in after.decode(torch.tensor(ids)) and after.ids("plain words") == before.ids("plain words")
    old, weights = (checkpoint.load_weights(folder / "lit_model.pth") for folder in (base, new))
    assert checkpoint.is_tied(weights)
    wte = weights["transformer.wte.weight"]
    assert torch.equal(wte[:n], old["transformer.wte.weight"]) and all(torch.equal(row, wte[n]) for row in wte[n:])
    assert_close(wte[n], wte[:n].mean(0))
    idx = torch.randint(n, (1, 9))
    one, other = (checkpoint.load_model(folder, torch.float32)(idx) for folder in (base, new))
    assert_close(one, other[..., :n])


def test_a_run_trains_the_new_rows_and_transformers_reads_them(base: Path, tmp_path: Path) -> None:
    new, hf = tmp_path / "new", tmp_path / "hf"
    assert main(["add_tokens", str(base), str(new), "--tokens", *NEW, "--special", "false"]) == 0
    assert "<tool>" in Tokenizer(new).decode(torch.tensor(Tokenizer(new).ids(TEXT)))
    data = tmp_path / "data.json"
    data.write_text(str([{"instruction": f"add {i}", "output": f"<tool>{i}</tool>"} for i in range(20)]).replace("'", '"'))
    run = runs.finetune("finetune_lora", new, data, tmp_path / "run", "--modules_to_save", "[wte, lm_head]")
    assert run.code == 0, run.err
    first, merged = (checkpoint.load_weights(folder / "lit_model.pth")["lm_head.weight"] for folder in (new, run.final))
    assert all((merged[-2:] != first[-2:]).any(1)) and checkpoint.is_tied(checkpoint.load_weights(run.final / "lit_model.pth"))
    assert main(["convert_from_litgpt", str(run.final), str(hf)]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(hf)
    ids = Tokenizer(run.final).ids(TEXT, bos=False)
    assert theirs(TEXT, add_special_tokens=False).input_ids == ids
    model = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    with torch.no_grad():
        want, found = model(torch.tensor([ids])).logits, checkpoint.load_model(run.final, torch.float32)(torch.tensor([ids]))
    assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_rows_that_pad_the_vocabulary_are_used_first(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    n = Tokenizer(base).vocab_size
    assert main(["add_tokens", str(base), str(tmp_path / "new"), "--tokens", "<tool>"]) == 0
    old, new = (checkpoint.load_weights(folder / "lit_model.pth")["lm_head.weight"] for folder in (base, tmp_path / "new"))
    assert len(new) == max(len(old), n + 1) and torch.equal(new[:n], old[:n]) and torch.equal(new[n + 1 :], old[n + 1 :])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(["<a>", "<a>"], "named twice"), (["e"], "has already"), ([" "], "texts of 1 to"), (["x" * 201], "texts of 1 to"), ([], "give 1 to")],
)
def test_mistakes_leave_nothing(tokens: list[str], message: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tokens or ["[]"]
    assert main(["add_tokens", str(base), str(tmp_path / "new"), "--tokens", *words]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "new").exists()
