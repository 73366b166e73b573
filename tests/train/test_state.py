"""The training state: every optimizer of torch goes on from it bit for bit, it holds no code, and it tells one run from another."""

from __future__ import annotations

import json
import math
from array import array
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from litgpt import checkpoint
from litgpt.adapters.layers import Dropout
from litgpt.args import TrainArgs, marked
from litgpt.data import JSON
from litgpt.errors import UserError
from litgpt.finetune.lora import Lora
from litgpt.optim import UNUSABLE, make_optimizer
from litgpt.sample import Sample
from litgpt.train.resume import PhaseStart, State, Stopwatch, changes, compared_settings, identity, read, write

CPU = torch.device("cpu")
IDENTITY = {"settings": {}, "train": [1, ""], "val": [1, ""]}
FACTS: dict[str, Any] = {"identity": IDENTITY, "environment": {}, "cached": {}, "kept": True}
OPTIMIZERS = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name not in ("Optimizer", *UNUSABLE)
)
SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 0.1, "amsgrad": True},
    "RMSprop": {"momentum": 0.5},
}


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    torch.manual_seed(3)
    return [torch.nn.Parameter(torch.randn(4, 3).to(dtype)), torch.nn.Parameter(torch.randn(3, 5).to(dtype))]


def step(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """With dropout, so that the random state counts."""
    x = Dropout(0.3).train()(torch.ones(2, 4)).to(params[0].dtype)
    ((x @ params[0] @ params[1]) ** 2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def random_states() -> dict[str, torch.Tensor]:
    return {"cpu.0": torch.get_rng_state()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    spec = {"class_path": name, "init_args": SETTINGS.get(name, {})}
    params = parameters(dtype)
    optimizer = make_optimizer(spec, params)
    for _ in range(3):
        step(params, optimizer)
    write(tmp_path, State(step=3), optimizer.state_dict()["state"], random_states(), FACTS)
    values = [p.detach().clone() for p in params]
    for _ in range(3):
        step(params, optimizer)

    again = [torch.nn.Parameter(value) for value in values]
    later = make_optimizer(spec, again)
    torch.manual_seed(99)
    saved = read(tmp_path)
    saved.restore(later)
    saved.restore_random(0, CPU)
    for _ in range(3):
        step(again, later)
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))
    assert saved.state.step == 3


def test_nothing_in_it_can_run_code(tmp_path: Path) -> None:
    """JSON and safetensors, nothing else."""
    params = parameters(torch.float32)
    optimizer = make_optimizer("AdamW", params)
    step(params, optimizer)
    write(tmp_path, State(), optimizer.state_dict()["state"], random_states(), FACTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["training_state.json", "training_state.safetensors"]
    tensors = safetensors.torch.load_file(tmp_path / "training_state.safetensors")
    assert len(tensors) == 2 * 3 + 1 and torch.equal(tensors["random.cpu.0"], torch.get_rng_state())
    json.loads((tmp_path / "training_state.json").read_text())


def test_an_optimizer_that_keeps_other_objects_is_refused_by_name(tmp_path: Path) -> None:
    params = parameters(torch.float32)
    optimizer = make_optimizer("SGD", params)
    optimizer.state[params[0]] = {"odd": object()}
    with pytest.raises(UserError, match="optimizer: its state holds a object, which cannot be saved"):
        write(tmp_path, State(), optimizer.state_dict()["state"], {}, FACTS)


def test_how_far_a_run_is_comes_back_with_its_clocks_running(tmp_path: Path) -> None:
    state = State(step=7, tokens=99, seconds=1.25, losses=[(0, 3.5), (4, math.nan)], best=(4, 2.5), skipped=2)
    state.clock, state.phase = Stopwatch(earlier=100.0), PhaseStart(3, 40, Stopwatch(earlier=50.0))
    state.pending = {"train_loss": 0.1, "learning_rate": 1e-3}
    write(tmp_path, state, {}, {}, FACTS)
    back = read(tmp_path).state
    assert (back.step, back.tokens, back.seconds, back.best, back.skipped, back.pending) == (7, 99, 1.25, (4, 2.5), 2, state.pending)
    assert back.losses[0] == (0, 3.5) and math.isnan(back.losses[1][1])
    assert back.phase is not None and (back.phase.step, back.phase.tokens) == (3, 40)
    assert 100 <= back.clock.seconds < 110 and 50 <= back.phase.clock.seconds < 60
    assert back.clock.seconds < back.clock.seconds


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 99}', "{}"])
def test_a_state_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    (tmp_path / "training_state.json").write_text(content)
    with pytest.raises(UserError, match="training_state.json"):
        read(tmp_path)


def test_a_state_that_is_not_as_it_was_written(tmp_path: Path) -> None:
    """Each fact that is missing; tensors that are none."""
    write(tmp_path, State(), {}, random_states(), FACTS)
    whole = json.loads((tmp_path / "training_state.json").read_text())
    for key in ("identity", "environment", "cached", "progress", "optimizer"):
        (tmp_path / "training_state.json").write_text(json.dumps({name: value for name, value in whole.items() if name != key}))
        with pytest.raises(UserError, match="training_state.json is not as litgpt wrote it"):
            read(tmp_path)
    (tmp_path / "training_state.json").write_text(json.dumps(whole))
    (tmp_path / "training_state.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="training_state.safetensors is not a readable safetensors file"):
        read(tmp_path).restore_random(0, CPU)


@pytest.mark.parametrize(("best", "step", "loss", "better"), [(None, 1, 9.0, True), (None, 0, 1.0, False), ((1, 2.0), 3, 2.0, False)])
def test_what_counts_as_better(best: Any, step: int, loss: float, better: bool) -> None:
    assert State(step=step, best=best).add_loss(loss) is better
    assert not State(step=step, best=best).add_loss(math.nan)


# --- which run it is ---


def samples(change: int | None = None) -> list[Sample]:
    rows = [Sample(array("i", [1, 2, 3, 4]), bytearray([0, 0, 1, 1])), Sample(array("i", [5, 6]), bytearray([0, 1]))]
    if change == 0:
        rows[0].input_ids[1] = 9
    if change == 1:
        rows[0].loss_mask[1] = 1
    if change == 2:
        rows = [Sample(array("i", [1, 2, 3, 4, 5]), bytearray([0, 0, 1, 1, 0])), Sample(array("i", [6]), bytearray([1]))]
    if change in (4, 5):
        rows[1].reward = float(change - 4)
    return rows[::-1] if change == 3 else rows


def who(base: Path, train: list[Sample] | None = None, config: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    run = Lora(checkpoint_dir=base, out_dir=base, data=JSON(), lora_r=4, train=TrainArgs(**settings))
    compared = compared_settings(run.hyperparameters(), Lora)
    return identity({**compared, "precision": "32-true"}, base, config or {"n_layer": 2}, train or samples(), samples())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "lit_model.pth").write_bytes(bytes(range(256)) * 10)
    return tmp_path


def test_every_change_is_named(base: Path) -> None:
    before = json.loads(json.dumps(who(base)))
    assert changes(who(base), before) == []
    assert changes(who(base, epochs=9, max_norm=1.0), before) == ["train.epochs is 9, before 5", "train.max_norm is 1.0, before None"]
    assert changes(who(base, config={"n_layer": 3}), before) == ["the base model is another one (its weights or its config)"]
    for change in range(6):
        assert changes(who(base, samples(change)), before) == ["the training data are different (2 samples, before 2)"]
    assert who(base, samples(4))["train"] != who(base, samples(5))["train"]
    (base / "lit_model.pth").write_bytes(bytes(range(256)) * 9 + bytes(256))
    checkpoint.weights_file(base, now=True)
    assert changes(who(base), before) == ["the base model is another one (its weights or its config)"]


def test_a_run_of_an_earlier_version_is_resumed(base: Path) -> None:
    before = {key: value for key, value in who(base).items() if key not in ("config", "weights")}
    assert changes(who(base), {**before, "base": "a digest of its own"}) == []


def test_a_setting_that_an_earlier_version_did_not_have_counts_as_its_default(base: Path) -> None:
    before = who(base)
    before["settings"] = {key: value for key, value in before["settings"].items() if key not in ("train.word_dropout", "precision")}
    assert changes(who(base), before, Lora) == []
    assert changes(who(base, word_dropout=0.3), before, Lora) == ["train.word_dropout is 0.3, before 0.0"]


def test_settings_that_may_change_are_not_compared() -> None:
    names = set(marked(Lora, "may_change"))
    assert {"out_dir", "data", "precision", "skip2lora_cache", "train.save_interval", "train.max_time", "eval.patience"} <= names
    assert not names & {"seed", "lora_r", "optimizer", "train.epochs", "train.max_steps", "train.min_lr", "eval.interval", "eval.max_iters"}
    compared = compared_settings(Lora(checkpoint_dir=Path("base"), data=JSON()).hyperparameters(), Lora)
    assert not names & compared.keys() and {"lora_r", "train.epochs", "eval.interval"} <= compared.keys()
