"""DPO, ORPO and KTO against their formulas on log-probabilities from a plain forward pass of the whole model."""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from litgpt.activations.cache import CacheSettings, activations
from litgpt.data import JSON
from litgpt.data.base import Splits, Unit
from litgpt.data.records import read_record
from litgpt.errors import UserError
from litgpt.objectives.named import objective_of
from litgpt.objectives.settings import ObjectiveSettings
from litgpt.prompts import ChatTemplate, PromptStyle, resolve_prompt_style
from litgpt.sample import Sample
from litgpt.tokenizer import Tokenizer
from litgpt.train.loop import Batches
from litgpt.train.resume import State
from tests.helpers import tiny
from tests.helpers.cases import quick
from tests.helpers.training import CLOSE, CPU, Rank, make_loop, make_model, make_samples, record_gradients, trained
from tests.train.test_parallel import in_processes

WEIGHTS, LABELS = (1.0, 0.5, 2.0, 1.0), (True, False, False, True)
LENGTHS: dict[str, Any] = {"global_batch_size": 4, "micro_batch_size": 1}


def log_p(model: Any, sample: Sample) -> torch.Tensor:
    """The sum of the log-probabilities of the tokens that carry loss."""
    ids, mask = torch.tensor(sample.input_ids).long(), torch.tensor(list(sample.loss_mask), dtype=torch.bool)
    logits = model(ids[None, :-1])[0].float()
    return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0][mask[1:]].sum()


def dpo(p: list[Any], q: list[Any], n: list[int], s: Any) -> torch.Tensor:
    total = torch.zeros(())
    for k, w in enumerate(WEIGHTS):
        c, d = 2 * k, 2 * k + 1
        sizes = (n[c], n[d]) if s.dpo_length_normalised else (1, 1)
        z = s.dpo_beta * ((p[c] - q[c]) / sizes[0] - (p[d] - q[d]) / sizes[1])
        total = total - w * ((1 - s.dpo_label_smoothing) * torch.sigmoid(z).log() + s.dpo_label_smoothing * torch.sigmoid(-z).log())
        total = total - w * s.dpo_nll_weight * p[c] / n[c]
    return total / sum(WEIGHTS)


def orpo(p: list[Any], q: list[Any], n: list[int], s: Any) -> torch.Tensor:
    total = torch.zeros(())
    for k, w in enumerate(WEIGHTS):
        good, bad = (torch.exp(p[i] / n[i]) for i in (2 * k, 2 * k + 1))
        ratio = (good / (1 - good)) / (bad / (1 - bad))
        total = total + w * (-good.log() - s.orpo_lambda * torch.sigmoid(ratio.log()).log())
    return total / sum(WEIGHTS)


def kto(p: list[Any], q: list[Any], n: list[int], s: Any) -> torch.Tensor:
    total, z_0 = torch.zeros(()), sum((p[k] - q[k]).item() for k in (1, 3, 5, 7)) / 4
    z_0 = max(z_0, 0.0)
    for k, (w, label) in enumerate(zip(WEIGHTS, LABELS, strict=True)):
        r = p[2 * k] - q[2 * k]
        v = s.kto_desirable_weight if label else s.kto_undesirable_weight
        total = total + w * v * (1 - torch.sigmoid(s.kto_beta * (r - z_0 if label else z_0 - r)))
    return total / sum(WEIGHTS)


CASES: dict[str, tuple[Callable[..., torch.Tensor], dict[str, Any]]] = {
    "dpo": (dpo, {"dpo_beta": 0.3}),
    "dpo smoothed": (dpo, {"dpo_beta": 0.3, "dpo_label_smoothing": 0.2}),
    "dpo with the answers' loss": (dpo, {"dpo_beta": 0.3, "dpo_nll_weight": 0.7}),
    "dpo by length": (dpo, {"dpo_beta": 2.0, "dpo_length_normalised": True}),
    "orpo": (orpo, {"orpo_lambda": 0.7}),
    "kto": (kto, {"kto_beta": 0.2, "kto_undesirable_weight": 0.5}),
}


def settings_of(case: str) -> ObjectiveSettings:
    return ObjectiveSettings(objective=case.split()[0], **CASES[case][1])  # type: ignore[arg-type]


def compared_samples(base: Any) -> list[Sample]:
    """Four units, with weights and labels, and the base model's losses in them."""
    samples = make_samples(8)
    for i, sample in enumerate(samples):
        sample.weights = array("f", [WEIGHTS[i // 2] * mask for mask in sample.loss_mask])
        sample.label = LABELS[i // 2]
        sample.reference = array("f", [-log_p(base, sample).item() / sample.n_targets] * sample.n_targets)
    return samples


@pytest.mark.parametrize("case", quick(CASES, "dpo", "orpo", "kto"))
@pytest.mark.parametrize("method", quick(["LoRA", "lm_head", "block", "full"], "lm_head", "full"))
def test_a_step_is_that_of_the_formula(method: str, case: str) -> None:
    """Accumulated in micro-batches of a pair; from the cache where there is one; loss and gradients."""
    base = make_model(method)
    if method != "full":
        base = tiny.tiny()
    with torch.no_grad():
        samples = compared_samples(base)
        reference = [log_p(base, sample) for sample in samples]
    model, other, settings = make_model(method), make_model(method), settings_of(case)
    for each in (model, other):  # a full model that is its own reference has no KL and no preference yet
        with torch.no_grad():
            for p in trained(each).values():
                p.mul_(1.1)
    loop = make_loop(model, samples, objective=objective_of(settings), **LENGTHS)
    if method == "lm_head":
        cache = CacheSettings("memory", Path(), torch.float32)
        loop.loop.activations = activations(model, samples, loop.batches.owned(0), "", cache, CPU)
    seen = record_gradients(loop)
    metrics = loop.loop.step(State(), next(loop.batches.after(0)))
    expected = CASES[case][0]([log_p(other, s) for s in samples], reference, [s.n_targets for s in samples], settings)
    gradients = torch.autograd.grad(expected, list(trained(other).values()))
    assert_close(metrics["train_loss"], expected.item(), **CLOSE)
    assert_close(seen[0], list(gradients), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("case", ["dpo", "kto"])
def test_processes_share_a_batch_and_a_validation(case: str) -> None:
    base = tiny.tiny()
    with torch.no_grad():
        samples = compared_samples(base)

    def work(rank: Rank) -> tuple[float, float, dict[str, float]]:
        loop = make_loop(make_model("lm_head"), samples, rank=rank, objective=objective_of(settings_of(case)), global_batch_size=4)
        loss = loop.loop.step(State(), next(loop.batches.after(0)))["train_loss"]
        return loss, loop.loop.validate(loop.val_activations, loop.val_batches, lambda: False), loop.loop.measured

    one = work(Rank())
    for each in in_processes(2, work):
        assert_close(each, one, **CLOSE)


def test_units_stay_together_in_every_order() -> None:
    samples = make_samples(22)
    for by_length, by_owner in itertools.product((False, True), repeat=2):
        everyone = []
        for rank in (Rank(0, 2), Rank(1, 2)):
            batches = Batches(samples, 8, rank, 1, by_length, by_owner, group=2)
            order = [i for batch in batches.epoch(3) for i in batch.indices]
            assert [i + 1 for i in order[::2]] == order[1::2] and set(order) <= set(batches.owned(rank.index))
            assert not by_owner or all(i // 2 % 2 == rank.index for i in order)
            everyone += order
        assert sorted(everyone) == list(range(22))


def test_validation_counts_the_pairs_whose_better_answer_is_likelier() -> None:
    base, model = tiny.tiny(), make_model("LoRA")
    with torch.no_grad():
        samples = compared_samples(base)
        gains = [(log_p(model, s) - log_p(base, s)).item() for s in samples]
    loop = make_loop(model, samples, objective=objective_of(settings_of("dpo")))
    loop.loop.validate(loop.val_activations, loop.val_batches, lambda: False)
    right = sum(w for w, c, d in zip(WEIGHTS, gains[::2], gains[1::2], strict=True) if c > d)
    assert_close(loop.loop.measured, {"val_accuracy": right / sum(WEIGHTS)}, **CLOSE)


# --- records ---


def units(name: str, *entries: dict[str, Any]) -> list[Unit]:
    objective = objective_of(SimpleNamespace(objective=name))
    return objective.units([(number, read_record(entry)) for number, entry in enumerate(entries, 1)])


def turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def texts(found: Sequence[Unit]) -> list[list[str]]:
    return [["/".join(message["content"] for message in record.messages) for record in unit] for _, unit in found]


def test_pairs_and_labels_as_units() -> None:
    pairs = [{"prompt": p, "chosen": f"good {p}", "rejected": f"bad {p}"} for p in "ab"]
    assert texts(units("dpo", *pairs)) == texts(units("orpo", *pairs)) == [["a/good a", "a/bad a"], ["b/good b", "b/bad b"]]
    mixed = units("kto", *pairs)
    assert texts(mixed) == [["a/good a", "a/good b"], ["a/bad a", "a/bad b"], ["b/good b", "b/good a"], ["b/bad b", "b/bad a"]]
    assert [unit[0].label for _, unit in mixed] == [True, False, True, False]
    labelled = [{"prompt": p, "completion": p.upper(), "label": p == "a"} for p in "abc"]
    found = units("kto", *labelled)
    assert texts(found) == [["a/A", "a/B"], ["b/B", "b/C"], ["c/C", "c/A"]]
    assert [unit[0].label for _, unit in found] == [True, False, False] and not any(record.unread for _, unit in found for record in unit)
    for nothing in ({"completion": " "}, {"weight": 0}):  # is dropped alone, with no other record
        assert texts(units("kto", labelled[0], {**labelled[1], **nothing}, labelled[2]))[:2] == [["a/A", "a/C"], ["c/C", "c/A"]]


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("next_token", {"prompt": "a", "chosen": "b", "rejected": "c"}, "record 1 holds 'chosen' and 'rejected' answers: set objective"),
        ("dpo", {"prompt": "a", "completion": "b"}, "objective dpo: record 1 has no 'chosen' and 'rejected'"),
        ("orpo", {"prompt": "a", "completion": "b", "label": True}, "objective orpo: record 1 has no 'chosen' and 'rejected'"),
        ("kto", {"prompt": "a", "completion": "b"}, "objective kto: record 1 has no 'label'"),
        ("kto", {"prompt": "a", "completion": "b", "label": True, "token_weights": [1]}, "kto: record 1 has 'token_weights'"),
        ("dpo", {"prompt": "a", "chosen": "b", "rejected": "c", "token_weights": [1]}, "dpo: record 1 has 'token_weights'"),
    ],
)
def test_records_of_another_objective(name: str, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        units(name, entry)


@pytest.mark.parametrize(
    ("labels", "keys"), [((True, False), "kto_undesirable_weight and kto_desirable_weight are"), ((True,), "kto_d.* is")]
)
def test_weights_that_leave_nothing_to_train_are_refused(labels: tuple[bool, ...], keys: str) -> None:
    samples = [replace(sample, label=label) for label in labels for sample in make_samples(2)]
    weights = {"kto_desirable_weight": 0, "kto_undesirable_weight": int(labels == (True,))}
    with pytest.raises(UserError, match=f"pairs: nothing would be trained, as {keys} 0"):
        objective_of(ObjectiveSettings(objective="kto", **weights)).check(samples, samples, "pairs")
    objective_of(ObjectiveSettings(objective="kto", **{**weights, "kto_desirable_weight": 0.5})).check(samples, samples, "pairs")


def test_a_pair_that_is_dropped_is_counted_once(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "weight": weight} for weight in (1, 0, 1, 1, 1)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    data = JSON(json_path=tmp_path / "pairs.json", val_split_fraction=0.4)
    report = data.splits(
        tokenizer, resolve_prompt_style("chatml", tiny_tokenizer_dir, tokenizer), units=objective_of(settings_of("dpo")).units
    ).report
    assert report.startswith(("2 train and 2", "3 train and 1")) and report.endswith(", 1 dropped: weight 0"), report


PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def split(tokenizer_dir: Path, style: PromptStyle, rows: list[dict[str, Any]], file: Path, case: str, limit: int | None = None) -> Splits:
    """Return the samples of records, all of them for training."""
    file.write_text(json.dumps(rows))
    data = JSON(json_path=file, val_split_fraction=0)
    return data.splits(Tokenizer(tokenizer_dir), style, limit, objective_of(settings_of(case)).units)


def test_pairs_whose_answers_are_equal_are_dropped(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    """Also those that differ only behind the cut. The label of KTO says how good an answer is, so equal answers tell something."""
    style = ChatTemplate(PLAIN)
    rows = [{"prompt": "a", "chosen": chosen, "rejected": rejected} for chosen, rejected in ("bc", "bb", ("d" * 50 + "a", "d" * 50 + "b"))]
    for case, limit, expected in (("dpo", None, 2), ("orpo", None, 2), ("dpo", 20, 1)):
        splits = split(tiny_tokenizer_dir, style, rows, tmp_path / "pairs.json", case, limit)
        assert len(splits.train) == 2 * expected
        assert f", {3 - expected} dropped: chosen and rejected are equal" in splits.report, splits.report
    assert len(split(tiny_tokenizer_dir, style, rows, tmp_path / "pairs.json", "kto").train) == 2 * 6
    with pytest.raises(UserError, match="none of the 1 training records is left: in each, 'chosen' and 'rejected' are equal$"):
        split(tiny_tokenizer_dir, style, rows[1:2], tmp_path / "pairs.json", "dpo")
    with pytest.raises(UserError, match="'chosen' and 'rejected' are equal in 20 tokens$"):
        split(tiny_tokenizer_dir, style, rows[2:], tmp_path / "pairs.json", "dpo", 20)


@pytest.mark.parametrize("key", ["label", "correct"])
def test_wrong_answers_that_are_imitated_are_counted(key: str, tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": answer, key: answer == "b"} for answer in "bcd"]
    (tmp_path / "rated.json").write_text(json.dumps(rows))
    data = JSON(json_path=tmp_path / "rated.json", val_split_fraction=0)
    for name in ("next_token", "kto" if key == "label" else "critic"):
        objective = objective_of(SimpleNamespace(objective=name))
        report = data.splits(Tokenizer(tiny_tokenizer_dir), ChatTemplate(PLAIN), units=objective.units).report
        assert ("2 answers marked as wrong but learned like the others" in report) is (name == "next_token"), report


@pytest.mark.parametrize("case", ["dpo", "orpo", "kto"])
def test_answers_of_several_replies_that_a_template_rewrites_are_compared_by_the_last(
    case: str, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """As Qwen3's template drops the reasoning of earlier replies: the last reply has loss behind what the model reads then."""
    style = ChatTemplate(PLAIN.replace("{{ m.content }}", "{{ m.content if not loop.last or m.role == 'user' else 'E' + m.content }}"))
    answers = [[turn("assistant", "b"), turn("user", "c"), turn("assistant", last)] for last in "de"] + [[turn("assistant", "f")]]
    row = {"prompt": [turn("user", "a")], "chosen": answers[0]}
    splits = split(tiny_tokenizer_dir, style, [{**row, "rejected": answers[k]} for k in (1, 2)], tmp_path / "pairs.json", case)
    tokenizer, found = Tokenizer(tiny_tokenizer_dir), []
    for sample in splits.train[::2] if case == "kto" else splits.train:
        first = sample.loss_mask.index(1)
        found.append(tuple(tokenizer.decode(list(ids), False) for ids in (sample.input_ids[:first], sample.input_ids[first:])))
    long, short = "<user>a</user><assistant>b</assistant><user>c</user><assistant>", "<user>a</user><assistant>"
    expected = [(long, "Ed</assistant>"), (long, "Ee</assistant>"), (long, "Ed</assistant>"), (short, "Ef</assistant>")]
    eos = tokenizer.decode([tokenizer.eos_id], False)
    assert found == [(prompt, answer + eos) for prompt, answer in expected]
    assert f"{4 if case == 'kto' else 2} comparisons of last replies alone, as the prompt style" in splits.report


def test_the_formulas_are_those_of_torch_for_one_pair() -> None:
    """The losses' values at a known margin: log 2 where nothing is learned yet."""
    samples = compared_samples(tiny.tiny())[:2]
    model = tiny.tiny(lora_r=2, **tiny.ALL_LORA)
    loop = make_loop(model, samples, objective=objective_of(settings_of("dpo")))
    assert_close(loop.loop.validate(loop.val_activations, loop.val_batches, lambda: False), F.softplus(torch.zeros(())).item(), **CLOSE)
