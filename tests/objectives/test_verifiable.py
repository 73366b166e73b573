"""Adapters from right answers, weighted by the value's temporal difference: the loss by its definition, runs, and what is refused."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from litgpt import checkpoint
from litgpt.activations.cache import Recompute
from litgpt.api import LLM
from litgpt.lora import mark_only_lora_as_trainable
from litgpt.loss import HeadLoss
from litgpt.objectives.base import View
from litgpt.objectives.named import objective_of
from litgpt.sample import Sample
from tests.helpers import tiny
from tests.helpers.runs import call, finetune
from tests.helpers.training import CPU
from tests.objectives.test_commands import METHODS, assert_two_processes_train_like, curve, rewound, write_rated

BOTH: dict[str, Any] = {"objective": "verifiable", "value_head": "mlp", "lora_r": 4, "critic_lambda": 0.9, "lr_ratios.value_head": 2}
FEW: dict[str, Any] = {"eval__max_new_tokens": 0, "data__val_split_fraction": 0.2}
REWARDS = (1.0, 0.0, 0.4, 0.0)


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rated(tmp_path_factory.mktemp("data") / "rated.jsonl", " is ")


def samples() -> list[Sample]:
    made = []
    for i, reward in enumerate(REWARDS):
        ids, mask = array("i", tiny.ids(1, 9 + i, seed=i)[0].tolist()), bytearray([0] * 4 + [1] * (5 + i))
        weights = array("f", [w * (1 + i % 2) for w in mask]) if i else None
        made.append(Sample(ids, mask, weights, reward=reward))
    return made


def by_hand(model: Any, settings: Any, every: list[Sample]) -> torch.Tensor:
    """The formula of the docs, token by token; the values' loss does not reach the adapters."""
    tokens = right = values_loss = total = torch.zeros(())
    n = len(model.mtp_heads)
    for sample in every:
        ids, T = torch.tensor(sample.input_ids).long(), sample.n_targets
        first, R, u = len(ids) - T, float(sample.reward or 0), max(sample.weights or [1.0])
        h = model.tail(*model.prefix(ids[None, :-1]))[0][first - 1 :]  # (T, d)
        v = model.value_head(h.detach()).sigmoid()
        known = [*v.detach().tolist(), R]
        d = [known[t + 1] - known[t] for t in range(T)]
        advantages = [sum(settings.critic_lambda ** (s - t) * d[s] for s in range(t, T)) for t in range(T)]
        w = [R * min(max(1 + settings.verifiable_beta * a, 0), settings.verifiable_cap) for a in advantages]
        for t in range(T):
            token = ids[first + t]
            tokens = tokens + u * w[t] * F.cross_entropy(model.lm_head(h[t]), token)
            target = torch.tensor(advantages[t] + known[t]).clamp(0, 1)
            values_loss = values_loss + u * F.binary_cross_entropy(v[t], target)
            for k in range(1, n + 1):
                if t + k < T:
                    z = model.mtp_heads[k - 1](h[t], model.transformer["wte"].weight[token])
                    tokens = tokens + settings.mtp_weight / n * u * w[t + k] * F.cross_entropy(model.lm_head(z), ids[first + t + k])
        right, total = right + u * R * T, total + u * T
    return tokens / right + values_loss / total


def ours(model: Any, settings: Any, every: list[Sample], size: int) -> torch.Tensor:
    """The loss of a global batch in micro-batches, as the loop adds it up."""
    objective, view = objective_of(settings), View(model, Recompute(model, every, CPU), HeadLoss.of(model), size)
    objective.begin(view, range(len(every)), SimpleNamespace(sum=lambda x: x, device=CPU))
    parts = [objective.loss(view, range(i, min(i + size, len(every)))) for i in range(0, len(every), size)]
    return torch.stack(parts).sum() / sum(sample.weight for sample in every)


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(("decay", "beta", "cap"), [(0.9, 1.0, 2.0), (1.0, 3.0, 1.5), (0.0, 20.0, 4.0)])
def test_loss_and_gradients_are_those_of_the_formula(heads: int, size: int, decay: float, beta: float, cap: float) -> None:
    model: Any = tiny.move_adapters(tiny.tiny(lora_r=2, lora_mlp=True, value_head="mlp", mtp_heads=heads))
    mark_only_lora_as_trainable(model.train())
    for head in (model.value_head, *model.mtp_heads):
        for parameter in head.parameters():
            parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(3))
    settings = SimpleNamespace(
        objective="verifiable", critic_lambda=decay, verifiable_beta=beta, verifiable_cap=cap, mtp_weight=0.3, mtp_heads=heads
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    mine, wanted = ours(model, settings, samples(), size), by_hand(model, settings, samples())
    assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
    gradients, expected = (dict(zip(trained, torch.autograd.grad(x, trained.values()), strict=True)) for x in (mine, wanted))
    assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_wrong_answers_alone_teach_the_value_head_only() -> None:
    model: Any = tiny.move_adapters(tiny.tiny(lora_r=2, lora_mlp=True, value_head="linear", mtp_heads=1))
    mark_only_lora_as_trainable(model.train())
    settings = SimpleNamespace(objective="verifiable", critic_lambda=1, verifiable_beta=1, verifiable_cap=2, mtp_weight=0.3, mtp_heads=1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wrong = [sample for sample in samples() if not sample.reward]
    gradients = torch.autograd.grad(ours(model, settings, wrong, 2), trained.values(), allow_unused=True)
    learns = {name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None and gradient.abs().max() > 0}
    assert learns == {"value_head.weight", "value_head.bias"}


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("LoRA", {}),
        ("LoRA", {"mtp_heads": 2}),
        ("lm_head", {"lr_ratios.skip2lora": 0.5}),
        pytest.param("alora", {}, marks=pytest.mark.slow),
        pytest.param("lm_head", {"mtp_heads": 2, "lr_ratios.mtp_heads": 3}, marks=pytest.mark.slow),
        pytest.param("dora", {"critic_lambda": 1.0, "value_head": "linear"}, marks=pytest.mark.slow),
        pytest.param("warm-up", {}, marks=pytest.mark.slow),
    ],
)
def test_a_run_learns_and_is_resumed_bit_for_bit(method: str, settings: dict[str, Any], base: Path, rated: Path, tmp_path: Path) -> None:
    settings = {**BOTH, **FEW, **METHODS[method][1], **settings}
    run = finetune("finetune_lora", base, rated, tmp_path / "a" / "run", **settings)
    assert run.code == 0, run.err
    losses = [float(loss) for _, _, loss, _ in curve(run) if loss]
    assert losses[-1] < losses[0]
    again = finetune(
        "finetune_lora", base, rated, rewound(run, tmp_path / "b" / "run", 2 + 2 * (method == "warm-up")), resume=True, **settings
    )
    assert again.code == 0, again.err
    assert curve(again) == curve(run)
    names = set(checkpoint.load_weights(run.final / "lit_model.pth.lora"))
    assert {"value_head.weight", "value_head.bias"} < names and any("lora_B" in name for name in names)
    assert ("mtp_heads.1.up" in names) == ("mtp_heads" in settings)
    assert not (run.final / "lit_model.pth").exists()


def test_the_validation_loss_is_that_of_right_answers_and_values_are_read(base: Path, rated: Path, tmp_path: Path) -> None:
    run = finetune("finetune_lora", base, rated, tmp_path / "run", **{**BOTH, **FEW}, train__epochs=20, train__max_norm=1.0)
    llm = LLM.load(run.final, precision="32-true", device="cpu")
    from litgpt.data import JSON

    settings = SimpleNamespace(objective="verifiable", mtp_heads=0)
    data = JSON(json_path=rated, val_split_fraction=0.2)
    val = data.splits(llm.tokenizer, llm.prompt_style, 256, objective_of(settings).units).val
    total = weight = 0.0
    for sample in val:
        ids, first = torch.tensor(sample.input_ids).long(), sample.loss_mask.index(1)
        with torch.no_grad():
            losses = F.cross_entropy(llm.model(ids[None, :-1])[0], ids[1:], reduction="none")[first - 1 :]
        own = float(sample.reward or 0) * max(sample.weights or [1.0])
        total, weight = total + own * losses.sum().item(), weight + own * len(losses)
    assert_close(run.report["final_val_loss"], total / weight, rtol=1e-4, atol=1e-5)
    values = {bool(i % 2): llm.value(f"add {i}", f"{'good' if i % 2 else 'task'} is {i}") for i in range(2)}
    assert values[True] > 0.5 > values[False]


def test_without_the_advantage_it_is_the_next_token_of_right_answers(base: Path, rated: Path, tmp_path: Path) -> None:
    """With beta 0 a global batch of all answers has the gradients of the right ones alone, so the validation losses are equal."""
    rows = [json.loads(line) for line in rated.read_text().splitlines()]
    for name, part in (("all", rows), ("right", [row for row in rows if row["correct"]])):
        (tmp_path / name).mkdir()
        for split in ("train", "val"):
            own = [{key: row[key] for key in row if name == "all" or key != "correct"} for row in part]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    common = {"lora_r": 4, "lora_dropout": 0.0, "eval__interval": 1, "eval__max_new_tokens": 0, "data__mask_prompt": True}
    common |= {"train__global_batch_size": 20, "train__micro_batch_size": 5, "train__epochs": 3, "data__val_split_fraction": None}
    mine = finetune("finetune_lora", base, tmp_path / "all", tmp_path / "a", objective="verifiable", verifiable_beta=0, **common)
    plain = finetune("finetune_lora", base, tmp_path / "right", tmp_path / "b", **common)
    losses = [[float(loss) for _, _, loss, _ in curve(run) if loss] for run in (mine, plain)]
    assert losses[0][-1] < 0.95 * losses[0][0]
    assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)


def test_a_sweep_and_a_dry_run(base: Path, rated: Path, tmp_path: Path) -> None:
    settings = {**BOTH, **FEW, "lora_block_indices": "last:1", "verifiable_beta": None, "train__save_interval": None}
    run = finetune("finetune_lora", base, rated, tmp_path / "run", dry_run=True, **BOTH)
    assert run.code == 0 and list(tmp_path.iterdir()) == []
    words = ["--grid.verifiable_beta", "[0, 2]", "--grid.lr_ratios", '[{"value_head": 1}, {"value_head": 8}]']
    run = finetune("sweep", base, rated, tmp_path / "sweep", *words, **settings)
    assert run.code == 0, run.err
    losses = {row["best_val_loss"] for row in json.loads((tmp_path / "sweep/sweep.json").read_text())["runs"]}
    assert len(losses) > 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["LoRA", "lm_head"])
def test_two_processes_train_like_one(method: str, base: Path, rated: Path, tmp_path: Path) -> None:
    settings = {**BOTH, **FEW, **METHODS[method][1], "lora_dropout": 0.0, "train__global_batch_size": 8, "train__micro_batch_size": 4}
    assert_two_processes_train_like(finetune("finetune_lora", base, rated, tmp_path / "one", **settings), tmp_path / "two")


@pytest.mark.parametrize(
    ("command", "settings", "message"),
    [
        ("finetune_lora", {"lora_query": False, "lora_value": False}, "trains adapters alongside the value head"),
        ("finetune_lora", {"objective": "next_token"}, "value_head is not trained by objective next_token"),
        ("finetune_lora", {"modules_to_save": "[lm_head]"}, "does not work with value_head"),
        ("finetune_lora", {"verifiable_beta": -1}, "verifiable_beta is -1"),
        ("finetune_lora", {"verifiable_cap": 0}, "verifiable_cap is 0"),
        ("finetune_lora", {"lr_ratios.value_head": 0}, "lr_ratios.value_head is 0"),
        (
            "finetune_lora",
            {"lr_ratios.mtp_heads": 2},
            "lr_ratios names mtp_heads, which is not trained: these settings train lora, value_head",
        ),
        ("finetune_lora", {"train__replay": 3}, "no reward"),
        ("finetune_full", {"objective": "verifiable"}, "use `litgpt finetune_lora`"),
    ],
)
def test_mistakes_are_one_line(command: str, settings: dict[str, Any], message: str, base: Path, rated: Path, tmp_path: Path) -> None:
    own = BOTH if command == "finetune_lora" else {}
    run = finetune(command, base, rated, tmp_path / "run", **{**own, **settings})
    assert run.code in (1, 2) and message in run.err and "Traceback" not in run.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ([{"correct": True}, {}], [{"correct": True}], "record 2 has no 'correct' (true or false) and no 'reward'"),
        ([{"correct": True}, {"reward": 3}], [{"correct": True}], "record 2 has the reward 3: numbers from 0 to 1"),
        ([{"correct": True}] * 2, [{"correct": False}], "each of the 2 training answers has the reward 1"),
        ([{"correct": True}, {"correct": False}], [{"correct": False}], "none of the 1 validation answers that are measured"),
        ([{"correct": True}, {"correct": False}], [{"correct": False}, {"correct": True}], "none of the 1 validation answers that are"),
    ],
)
def test_answers_that_cannot_be_learned(train: list[Any], val: list[Any], message: str, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name, rows in (("train", train), ("val", val)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": "add", "answer": "good", **row}) + "\n" for row in rows))
    few = {"eval__max_iters": 1, "train__micro_batch_size": 1}
    run = finetune("finetune_lora", base, folder, tmp_path / "run", **BOTH, **few, data__val_split_fraction=None)
    assert run.code == 1 and message in run.err and "Traceback" not in run.err


def test_settings_that_are_not_given(base: Path, rated: Path, tmp_path: Path) -> None:
    """`litgpt finetune` with the objective alone: LoRA on every linear layer, and the value head at a rate of its own."""
    words = [
        "finetune",
        str(base),
        "--data",
        str(rated),
        "--objective",
        "verifiable",
        "--out_dir",
        str(tmp_path / "run"),
        "--dry_run",
        "true",
    ]
    run = call(words, tmp_path / "run")
    assert run.code == 0 and "value head, linear" in run.err and "'value_head': " in run.err and "lora_query ... lora_mlp" in run.err
