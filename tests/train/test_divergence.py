"""Runs that diverge, runs that have ended, and training states that somebody else wrote."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from litgpt import atomic
from litgpt.errors import UserError
from litgpt.optim import make_optimizer
from litgpt.prompts import ChatTemplate
from litgpt.train import prepare as prepare_module
from litgpt.train.report import as_json
from litgpt.train.resume import State, read, write
from tests.helpers import tiny
from tests.helpers.cases import quick
from tests.helpers.jobs import Bench, curve, litgpt
from tests.helpers.runs import finetune

CPU = torch.device("cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("command", ["finetune_full", "finetune_lora"])
def test_a_base_with_numbers_that_are_not_finite_is_not_trained(
    command: str, value: float, base: Path, data: Path, tmp_path: Path, write_tiny_tokenizer: Any
) -> None:
    """In the row of a token that no sample has, so that no loss shows them: they would end up in the result."""
    broken = tiny.write_base(tmp_path / "base", write_tiny_tokenizer, n_layer=1)
    weights = torch.load(broken / "lit_model.pth", weights_only=True)
    weights["transformer.wte.weight"][319, 3] = value
    torch.save(weights, broken / "lit_model.pth")
    run = finetune(command, broken, data, tmp_path / "out", train__max_steps=1)
    assert run.code == 1 and "transformer.wte.weight holds non-finite numbers (`litgpt validate" in run.err
    assert not (tmp_path / "out" / "final").exists()


@pytest.mark.slow
def test_so_is_one_whose_broken_part_another_process_has(data: Path, tmp_path: Path, write_tiny_tokenizer: Any) -> None:
    """The message is that of one process, and comes at once."""
    broken = tiny.write_base(tmp_path / "base", write_tiny_tokenizer, n_layer=1)
    weights = torch.load(broken / "lit_model.pth", weights_only=True)
    weights["transformer.wte.weight"][-1, 3] = torch.nan
    torch.save(weights, broken / "lit_model.pth")
    ended = litgpt(Bench(broken, data).argv(tmp_path / "out", devices=2, strategy="fsdp"), timeout=60)
    message = f"Error: {broken / 'lit_model.pth'}: transformer.wte.weight holds non-finite numbers"
    assert ended.status == 1 and ended.err.splitlines()[-1].startswith(message), ended.err
    assert not (tmp_path / "out").exists()


def test_a_last_step_that_blows_the_weights_up_is_no_success(base: Path, data: Path, tmp_path: Path) -> None:
    run = finetune("finetune_lora", base, data, tmp_path / "out", optimizer__lr=1e38, train__lr_warmup_steps=0, train__max_steps=1)
    assert run.code == 3 and "lower the learning rate" in run.err, run.err
    assert not (tmp_path / "out" / "final").exists() and not (tmp_path / "out" / "report.json").exists()


# the loss, or the gradient alone, becomes non-finite after more or fewer ruined steps
@pytest.mark.parametrize("rate", quick([3e2, 3e3, 3e4], 3e3))
def test_a_run_that_diverges_keeps_the_checkpoint_from_before(base: Path, data: Path, tmp_path: Path, rate: float) -> None:
    settings = {"train__save_interval": None, "train__save_every_minutes": 1e-9, "train__epochs": 8, "eval__interval": 1000}
    settings |= {"optimizer": "SGD", "optimizer__lr": rate, "train__lr_warmup_steps": 60, "eval__initial_validation": False}
    settings |= {"skip2lora_enabled": True, "skip2lora_block_indices": "all", "skip2lora_cache": "off", "eval__max_new_tokens": 0}
    run = finetune("finetune_lora", base, data, tmp_path / "out", **settings)
    assert run.code == 3, run.err
    (folder,) = (tmp_path / "out").glob("step-*")
    assert f"{folder} is complete" in run.err
    weights = torch.load(folder / "lit_model.pth.lora", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in weights.values())
    losses = [float(row[2]) for row in curve(tmp_path / "out")]
    step = int(folder.name.removeprefix("step-"))
    assert step == 1 or losses[step] < 2 * losses[0], losses  # nothing but ruined weights followed
    resumed = finetune("finetune_lora", base, data, tmp_path / "out", resume=True, **settings)
    assert resumed.code == 3 and f"resumed from {folder}" in resumed.err and folder.is_dir()  # the same settings diverge again


def test_a_checkpoint_is_replaced_by_one_with_a_sound_loss(base: Path, data: Path, tmp_path: Path) -> None:
    settings = {"train__save_interval": None, "train__save_every_minutes": 1e-9, "train__max_steps": 4, "eval__interval": 1000}
    run = finetune("finetune_lora", base, data, tmp_path / "out", **settings)
    assert run.code == 0 and not list((tmp_path / "out").glob("step-00000[123]")), run.err


def test_json_has_no_nan() -> None:
    assert json.loads(as_json({"a": float("nan"), "b": float("inf"), "c": 1.5})) == {"a": None, "b": None, "c": 1.5}


# --- runs that have ended ---


def test_a_finished_run_is_another_one_with_other_settings_or_data(base: Path, data: Path, tmp_path: Path) -> None:
    out_dir, other = tmp_path / "out", tmp_path / "other.json"
    assert finetune("finetune_lora", base, data, out_dir).code == 0
    assert "nothing is left to do" in finetune("finetune_lora", base, data, out_dir, resume="auto").err
    other.write_text(json.dumps([{**record, "output": "something else"} for record in json.loads(data.read_text())]))
    run = finetune("finetune_lora", base, other, out_dir, resume="auto", optimizer__lr=0.5)
    assert run.code == 1 and "belongs to another run" in run.err
    assert "optimizer is" in run.err and "before" in run.err and "training data are different" in run.err, run.err


@pytest.mark.slow
def test_a_run_keeps_its_date(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that prints the date gives the same samples when the run is resumed on another day, and when it has ended."""
    dated = tmp_path / "dated"
    dated.mkdir()
    for file in base.iterdir():
        (dated / file.name).write_bytes(file.read_bytes())
    config = json.loads((dated / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ strftime_now('%d %b %Y') }}" + config["chat_template"]
    (dated / "tokenizer_config.json").write_text(json.dumps(config))
    (dated / "prompt_style.yaml").write_text(yaml.safe_dump({"class_path": "litgpt.prompts.ChatTemplate"}))
    settings: dict[str, Any] = {"data__prompt_style": "chat", "train__max_steps": 6}
    out_dir, seen = tmp_path / "out", list[datetime]()
    assert finetune("finetune_lora", dated, data, out_dir, **settings).code == 0
    real = ChatTemplate.render

    def render(style: ChatTemplate, *args: Any, **kwargs: Any) -> str:
        seen.append(style.now)
        return real(style, *args, **kwargs)

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2031, 2, 3)

    monkeypatch.setattr(prepare_module, "datetime", Tomorrow)
    monkeypatch.setattr(ChatTemplate, "render", render)
    run = finetune("finetune_lora", dated, data, out_dir, **settings, resume="auto")
    assert run.code == 0 and "nothing is left to do" in run.err, run.err
    assert seen and {when.year for when in seen} != {2031}


# --- training states ---


FACTS: dict[str, Any] = {
    "identity": {"settings": {}, "train": [1, ""], "val": [1, ""]},
    "environment": {},
    "cached": {},
    "kept": True,
}


def saved(folder: Path) -> tuple[Any, Any]:
    parameters = [torch.nn.Parameter(torch.ones(4, 3)), torch.nn.Parameter(torch.ones(5))]
    optimizer = make_optimizer("AdamW", parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    write(folder, State(step=1), optimizer.state_dict()["state"], {"cpu.0": torch.get_rng_state()}, FACTS)
    return parameters, optimizer


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.update({name: value[:1] for name, value in t.items() if value.dim() == 2}), "of parameter 0 is"),
        (lambda t: t.update({name: value.int() for name, value in t.items() if value.dim() == 2}), "int32 .*, not torch.float32"),
        (lambda t: t.update({name: value.double() for name, value in t.items() if value.dim() == 2}), "float64 .*, not torch.float32"),
        (lambda t: t.update({name: value.half() for name, value in t.items() if "optimizer" in name}), "float16 .*, not torch.float32"),
        (lambda t: t.update({name: value / 0 for name, value in t.items() if value.dim() == 2}), "of parameter 0 is not finite"),
        (lambda t: [t.pop(name) for name in list(t) if name.startswith("optimizer")], "not as litgpt wrote it"),
        (lambda t: t.update({"random.cpu.0": torch.zeros(3, dtype=torch.uint8)}), "no state of a random generator"),
        (lambda t: t.update({"random.cpu.0": torch.zeros(5056)}), "no state of a random generator"),
    ],
)
def test_tensors_that_do_not_fit_never_reach_the_optimizer(spoil: Any, message: str, tmp_path: Path) -> None:
    _, optimizer = saved(tmp_path)
    file = tmp_path / "training_state.safetensors"
    tensors = safetensors.torch.load_file(file)
    spoil(tensors)
    safetensors.torch.save_file(tensors, file)
    before = torch.get_rng_state()
    state = read(tmp_path)
    with pytest.raises(UserError, match=message):
        state.restore(optimizer)
        state.restore_random(0, CPU)
    torch.set_rng_state(before)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("progress.step", "x"),
        ("progress.step", 10**30),
        ("progress.tokens", None),
        ("progress.losses", [[1]]),
        ("progress.best", [1, "x"]),
        ("progress.pending", [1]),
        ("progress.pending", {"x": 1.0}),
        ("progress.phase", {"step": "a", "tokens": 1, "seconds": 2}),
        ("identity", {}),
        ("identity.train", None),
        ("environment", []),
        ("cached", [1]),
        ("date", "soon"),
    ],
)
def test_facts_that_litgpt_did_not_write_are_one_message(path: str, value: Any, tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "training_state.json"
    facts = json.loads(file.read_text())
    *above, last = path.split(".")
    part = facts
    for name in above:
        part = part[name]
    part[last] = value
    atomic.write_text(file, json.dumps(facts))
    with pytest.raises(UserError, match="is not as litgpt wrote it"):
        read(tmp_path)
