"""The critic's targets, loss and figures, each against its definition."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from litgpt import checkpoint
from litgpt.__main__ import main
from litgpt.api import LLM
from litgpt.generate.base import Generate
from litgpt.objectives.critic import quality, returns
from tests.helpers.cases import quick
from tests.helpers.runs import finetune
from tests.objectives.test_commands import assert_two_processes_train_like, curve, rewound, write_rated

CRITIC: dict[str, Any] = {"objective": "critic", "value_head": "mlp", "lora_query": False, "lora_value": False}
FEW: dict[str, Any] = {"eval__max_new_tokens": 0}


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rated(tmp_path_factory.mktemp("data") / "rated.jsonl", " ")


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.95, 1.0])
def test_lambda_returns_are_the_mean_of_n_step_returns(decay: float) -> None:
    """G_t = (1 - lambda) sum over n of lambda^(n-1) v_{t+n}, and the rest of the weight is the reward's (Sutton and Barto 12.2)."""
    v, T, reward = torch.rand(7, generator=torch.Generator().manual_seed(1)), 7, 0.8
    steps = [[(v[t + n].item() if t + n < T else reward) for n in range(1, T + 1)] for t in range(T)]
    wanted = [sum((1 - decay) * decay ** (n - 1) * g for n, g in enumerate(each, 1)) + decay**T * reward for each in steps]
    wanted[-1] = reward
    assert_close(returns(v, reward, decay), torch.tensor(wanted))


def test_figures_by_brute_force() -> None:
    rng = random.Random(3)
    values = [round(rng.random(), 1) for _ in range(60)]  # with ties
    rewards = [float(rng.random() < v) for v in values]
    known = list(zip(values, rewards, strict=True))
    pairs = [(a > b) + 0.5 * (a == b) for a, r in known for b, s in known if r > s]
    bins: dict[int, list[int]] = {}
    for i, v in enumerate(values):
        bins.setdefault(min(int(v * 10 + 1e-9), 9), []).append(i)
    gap = (
        sum(abs(sum(values[i] for i in own) / len(own) - sum(rewards[i] for i in own) / len(own)) * len(own) for own in bins.values()) / 60
    )
    found = quality(values, rewards)
    assert_close(found["auc"], sum(pairs) / len(pairs))
    assert_close(found["calibration_error"], gap)
    assert_close(found["brier"], sum((v - r) ** 2 for v, r in known) / 60)
    assert "auc" not in quality([0.2, 0.3], [1.0, 1.0])


@pytest.mark.parametrize(
    "settings",
    quick([{}, {"critic_lambda": 0.5, "value_head": "linear"}, {"skip2lora_cache": "off"}], {"critic_lambda": 0.5, "value_head": "linear"}),
)
def test_a_run_learns_is_resumed_and_leaves_a_head(settings: dict[str, Any], base: Path, rated: Path, tmp_path: Path) -> None:
    settings = {**CRITIC, **FEW, **settings}
    run = finetune("finetune_lora", base, rated, tmp_path / "a" / "run", **settings)
    assert run.code == 0, run.err
    assert ("training cache" in run.err) == ("skip2lora_cache" not in settings)
    losses = [float(loss) for _, loss, _, _ in curve(run) if loss]
    assert losses[-1] < losses[0] and abs(losses[0] - 0.6931) < 1e-3
    again = finetune("finetune_lora", base, rated, rewound(run, tmp_path / "b" / "run", 2), resume=True, **settings)
    assert again.code == 0, again.err
    assert curve(again) == curve(run)
    weights = checkpoint.load_weights(run.final / "lit_model.pth.lora")
    assert set(weights) >= {"value_head.weight", "value_head.bias"} and all(name.startswith("value_head.") for name in weights)
    assert not (run.final / "lit_model.pth").exists()


def test_the_loss_is_that_of_the_saved_head(base: Path, rated: Path, tmp_path: Path) -> None:
    """The validation loss by hand: the cross-entropy of the values at an answer's tokens with its reward, by the records' weights."""
    run = finetune("finetune_lora", base, rated, tmp_path / "run", **CRITIC, **FEW)
    llm = LLM.load(run.final, precision="32-true", device="cpu")
    from litgpt.data import JSON

    val = JSON(json_path=rated, val_split_fraction=0.1).splits(llm.tokenizer, llm.prompt_style, 256).val
    total = weight = 0.0
    for sample in val:
        ids, first = list(sample.input_ids), sample.loss_mask.index(1)
        values = torch.tensor([llm.values([ids[:end]])[0] for end in range(first, len(ids))])
        own = 1.0 if sample.weights is None else max(sample.weights)
        total += own * F.binary_cross_entropy(values, torch.full_like(values, float(sample.reward or 0)), reduction="sum").item()
        weight += own * len(values)
    assert_close(run.report["final_val_loss"], total / weight, rtol=1e-4, atol=1e-5)


def test_value_evaluate_and_the_best_answer(base: Path, rated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finetune("finetune_lora", base, rated, tmp_path / "run", train__epochs=20, **CRITIC, **FEW)
    llm = LLM.load(run.final, precision="32-true", device="cpu")
    rows = [json.loads(line) for line in rated.read_text().splitlines()]
    values = [llm.value(row["prompt"], row["answer"]) for row in rows]
    assert 0 < llm.value("add 1") < 1
    assert main(["evaluate", str(run.final), "--data", str(rated), "--max_new_tokens", "0", "--dtype", "float32", "--batch_size", "3"]) == 0
    results = json.loads((run.final / "evaluate/results.json").read_text())
    wanted = quality(values, [float(row["correct"]) for row in rows])
    assert wanted["auc"] > 0.8 and results["rated"] == 20
    assert_close({name: results[name] for name in wanted}, wanted, rtol=1e-3, atol=1e-4)
    assert "value: AUC" in capsys.readouterr().out
    words = ["generate", str(run.final), "--prompt", "add 3", "--max_new_tokens", "5", "--precision", "32-true"]
    assert main([*words, "--best_of", "6", "--by", "value"]) == 0
    out, err = capsys.readouterr()
    assert "of 6 answers" in err
    text = llm.prompt_style.apply("add 3")
    prompt, answers = llm.prompt_ids(text), Generate(run.final, prompt="add 3", max_new_tokens=5).drawn(llm, [text], 6)
    assert len({tuple(answer) for answer in answers}) > 3
    assert out == llm.tokenizer.decode(max(([*prompt, *answer] for answer in answers), key=lambda ids: llm.values([ids]))) + "\n"
    assert main(["generate", str(base), "--best_of", "2"]) == 1
    assert "has no value head" in capsys.readouterr().err
    assert main([*words, "--best_of", "2", "--num_samples", "2"]) == 1
    assert main(["convert_adapter", str(run.final), str(tmp_path / "peft")]) == 1
    assert "value_head, which other formats cannot store" in capsys.readouterr().err
    assert main(["merge_lora", str(run.final)]) == 1
    assert "cannot be merged" in capsys.readouterr().err
    assert main(["finetune_lora", str(run.final), "--data", str(tmp_path), "--out_dir", str(tmp_path / "more")]) == 1
    assert "an adapter with heads" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_train_like_one(base: Path, rated: Path, tmp_path: Path) -> None:
    settings = {**CRITIC, **FEW, "train__global_batch_size": 8, "train__micro_batch_size": 4}
    assert_two_processes_train_like(finetune("finetune_lora", base, rated, tmp_path / "one", **settings), tmp_path / "two")


@pytest.mark.parametrize(
    ("command", "settings", "message"),
    [
        ("finetune_lora", {"lora_query": True}, "trains the value head alone"),
        ("finetune_lora", {"skip2lora_enabled": True}, "trains the value head alone"),
        ("finetune_lora", {"objective": "next_token"}, "value_head is not trained by objective next_token"),
        ("finetune_lora", {"critic_lambda": 1.5}, "critic_lambda is 1.5"),
        ("finetune_lora", {"train__replay": 3}, "no reward"),
        ("finetune_lora", {"value_head": "deep"}, "value_head"),
        ("finetune_full", {"value_head": None, "lora_query": None, "lora_value": None}, "use `litgpt finetune_lora`"),
    ],
)
def test_mistakes_are_one_line(command: str, settings: dict[str, Any], message: str, base: Path, rated: Path, tmp_path: Path) -> None:
    run = finetune(command, base, rated, tmp_path / "run", **{**CRITIC, **settings})
    assert run.code in (1, 2) and message in run.err and "Traceback" not in run.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "record 1 has no 'correct' (true or false) and no 'reward'"),
        ({"correct": "yes"}, "record 1 has no 'correct'"),
        ({"reward": 3}, "record 1 has the reward 3: numbers from 0 to 1"),
    ],
)
def test_answers_without_a_usable_reward(row: dict[str, Any], message: str, base: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"prompt": "add", "answer": "good", **row}) + "\n")
    run = finetune("finetune_lora", base, file, tmp_path / "run", **CRITIC, data__val_split_fraction=0)
    assert run.code == 1 and message in run.err


@pytest.mark.parametrize(
    ("own", "named"),
    [({"correct": True}, "reward 1 ('correct' true)"), ({"reward": 0}, "reward 0 ('correct' false)"), ({"reward": 0.5}, "reward 0.5")],
)
def test_equal_rewards_are_refused(own: dict[str, Any], named: str, base: Path, tmp_path: Path) -> None:
    """The validation set's other reward does not help: it is not learned."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"prompt": f"add {i}", "answer": f"good {i}", **own} for i in range(6)]
    for name, content in (("train", rows), ("val", [{"prompt": "add", "answer": "task", "reward": 0.25}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    run = finetune("finetune_lora", base, folder, tmp_path / "run", **CRITIC, data__val_split_fraction=None)
    assert run.code == 1 and f"{folder}: each of the 6 training answers has the {named}, so" in run.err and "Traceback" not in run.err
    assert not (tmp_path / "run").exists()
