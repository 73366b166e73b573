"""Multi-token heads: their loss by the definition, runs, and what is refused."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from litgpt import checkpoint
from litgpt.__main__ import main
from litgpt.objectives.multi_token import ahead
from litgpt.sample import Sample
from tests.helpers.runs import finetune, greedy_words
from tests.objectives.test_commands import assert_two_processes_train_like, rewound

FROZEN: dict[str, Any] = {"mtp_heads": 2, "lora_query": False, "lora_value": False}
JOINT: dict[str, Any] = {"mtp_heads": 2, "lora_r": 4, "lora_dropout": 0.0, "mtp_weight": 0.5}
SKIP: dict[str, Any] = {**JOINT, "skip2lora_enabled": True}
FEW: dict[str, Any] = {"eval__max_new_tokens": 0}


def sample(ids: list[int], mask: list[int], weights: list[float] | None = None) -> Sample:
    return Sample(array("i", ids), bytearray(mask), None if weights is None else array("f", weights))


def test_labels_are_learned_tokens_further_ahead() -> None:
    """The reply of two turns: the last token of the first turn has nothing behind it that is learned."""
    turns, weighted = sample([9, 1, 2, 3, 8, 4, 5], [0, 0, 1, 1, 0, 1, 1]), sample([9, 6, 7], [0, 1, 1], [0, 2, 3])
    labels, weights = ahead([turns, weighted], 1)
    assert labels.tolist() == [3, -100, 5, -100, 7, -100] and weights.tolist() == [1, 0, 1, 0, 3, 0]
    labels, weights = ahead([turns, weighted], 2)
    assert labels.tolist() == [-100, 4, -100, -100, -100, -100] and weights.tolist() == [0, 1, 0, 0, 0, 0]
    labels, weights = ahead([turns, weighted], 0)
    assert labels.tolist() == [2, 3, 4, 5, 6, 7] and weights.tolist() == [1, 1, 1, 1, 2, 3]


def by_hand(model: Any, val: list[Sample]) -> float:
    """The mean over heads' tokens of -log softmax(lm_head(h + D silu(U [N(h), N(e)])))[token], by weights."""
    total = weight = 0.0
    for each in val:
        ids = torch.tensor(each.input_ids).long()
        x, taps = model.prefix(ids[None, :-1])
        h, taps = model.tail(x, taps)[0], taps[0]
        for k, head in enumerate(model.mtp_heads, 1):
            for p in range(1, len(ids) - k):
                if each.loss_mask[p] and each.loss_mask[p + k]:
                    chosen = [taps[p - 1, i] for i in (0, taps.size(1) // 2, -1)] if head.reads_taps else []
                    read = (h[p - 1], model.transformer["wte"].weight[ids[p]], *chosen)
                    a = torch.cat([F.rms_norm(x, (len(x),), eps=1e-5) for x in read])
                    logits = model.lm_head(h[p - 1] + head.down @ F.silu(head.up @ a))
                    own = 1.0 if each.weights is None else each.weights[p + k]
                    total += own * F.cross_entropy(logits, ids[p + k]).item()
                    weight += own
    return total / weight


@pytest.mark.parametrize(
    ("settings", "is_cached"),
    [
        (FROZEN, True),
        (JOINT, False),
        ({**FROZEN, "mtp_taps": True}, True),
        ({**SKIP, "mtp_taps": True, "skip2lora_block_indices": "[0, 1, 3]"}, True),
        pytest.param(SKIP, True, marks=pytest.mark.slow),
        pytest.param({**FROZEN, "skip2lora_cache": "off"}, False, marks=pytest.mark.slow),
        pytest.param({**JOINT, "alora_enabled": True}, True, marks=pytest.mark.slow),
    ],
)
def test_a_run_learns_and_is_resumed_bit_for_bit(settings: dict[str, Any], is_cached: bool, base: Path, data: Path, tmp_path: Path) -> None:
    settings = {**FEW, **settings, **({"data__prompt_style": "chatml", "data__mask_prompt": True} if "alora_enabled" in settings else {})}
    run = finetune("finetune_lora", base, data, tmp_path / "a" / "run", **settings)
    assert run.code == 0, run.err
    losses = run.column("train_loss")
    assert losses[-1] < losses[0]
    again = finetune("finetune_lora", base, data, rewound(run, tmp_path / "b" / "run", 2), resume=True, **settings)
    assert again.code == 0, again.err
    assert again.column("train_loss") == losses and again.column("val_loss") == run.column("val_loss")
    weights = checkpoint.load_weights(run.final / "lit_model.pth.lora")
    assert {"mtp_heads.0.up", "mtp_heads.1.down"} <= set(weights)
    assert ("training cache" in run.err) == is_cached


@pytest.mark.parametrize("reads_taps", [False, True])
def test_the_reported_loss_is_that_of_the_saved_heads(reads_taps: bool, base: Path, data: Path, tmp_path: Path) -> None:
    from litgpt.data import JSON
    from litgpt.prompts import resolve_prompt_style
    from litgpt.tokenizer import Tokenizer

    run = finetune("finetune_lora", base, data, tmp_path / "run", **FROZEN, **FEW, mtp_taps=reads_taps)
    tokenizer, model = Tokenizer(base), checkpoint.load_model(run.final, torch.float32)
    val = JSON(json_path=data, val_split_fraction=0.1).splits(tokenizer, resolve_prompt_style(None, base, tokenizer, "alpaca"), 256).val
    with torch.no_grad():
        assert_close(run.report["final_val_loss"], by_hand(model, val), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_beside_adapters_the_next_token_is_validated(base: Path, data: Path, tmp_path: Path) -> None:
    """With the weight 0 the heads change nothing: the losses are those of a run without them."""
    own = {key: value for key, value in JOINT.items() if not key.startswith("mtp")}
    plain = finetune("finetune_lora", base, data, tmp_path / "plain", **own, **FEW)
    zero = finetune("finetune_lora", base, data, tmp_path / "zero", **{**JOINT, "mtp_weight": 0}, **FEW)
    some = finetune("finetune_lora", base, data, tmp_path / "some", **JOINT, **FEW)
    assert_close(zero.column("train_loss"), plain.column("train_loss"), rtol=1e-4, atol=1e-5)
    assert_close(some.column("val_loss")[0], plain.column("val_loss")[0])
    assert some.column("train_loss")[0] > 1.2 * plain.column("train_loss")[0]


def test_generate_by_heads(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finetune("finetune_lora", base, data, tmp_path / "run", **JOINT, **FEW)
    words = greedy_words(run.final, "add 3 and 4", 12)
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert main([*words, "--speculate", "heads"]) == 0
    out, err = capsys.readouterr()
    assert out == plain and " tokens from " in err
    assert main(["generate", str(base), "--speculate", "heads"]) == 1
    assert "has no multi-token heads: train some with --mtp_heads 3" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "weights"), [(FROZEN, [1.0] * 16), (FROZEN, [1.0]), (JOINT, [1.0, 0.5])], ids=["alike", "one record", "a weight"]
)
def test_two_processes_train_like_one(settings: dict[str, Any], weights: list[float], base: Path, tmp_path: Path) -> None:
    """Also if one of them has no sample of a batch, or none with a weight."""
    records = [{"instruction": f"say {i}", "output": f"{i} and hello there", "weight": weight} for i, weight in enumerate(weights)]
    (data := tmp_path / "data.json").write_text(json.dumps(records))
    settings = {**settings, **FEW, "data__val_split_fraction": 0, "train__global_batch_size": 8, "train__micro_batch_size": 4}
    assert_two_processes_train_like(finetune("finetune_lora", base, data, tmp_path / "one", **settings), tmp_path / "two")


@pytest.mark.parametrize(
    ("command", "settings", "message"),
    [
        ("finetune_lora", {"mtp_heads": -1}, "mtp_heads is -1: a whole number from 0 to 16"),
        ("finetune_lora", {"mtp_weight": -1}, "mtp_weight is -1"),
        ("finetune_lora", {"mtp_taps": True, "lora_query": True}, "mtp_taps is for mtp_heads that are trained alone"),
        (
            "finetune_lora",
            {**SKIP, "lora_mlp": True, "skip2lora_warmup_steps": 2, "mtp_taps": True},
            "mtp_taps does not work with a warm-up",
        ),
        ("finetune_lora", {"objective": "dpo"}, "mtp_heads are not trained by objective dpo"),
        ("finetune_full", {"lora_query": None, "lora_value": None}, "mtp_heads is not a known key"),
    ],
)
def test_mistakes_are_one_line(command: str, settings: dict[str, Any], message: str, base: Path, data: Path, tmp_path: Path) -> None:
    run = finetune(command, base, data, tmp_path / "run", **{**FROZEN, **settings})
    assert run.code in (1, 2) and message in run.err and "Traceback" not in run.err
    assert not (tmp_path / "run").exists()
