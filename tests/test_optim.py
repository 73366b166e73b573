"""The learning rate against torch's own schedulers, and which optimizers a name can and cannot make."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import litgpt
from litgpt.errors import UserError
from litgpt.optim import MasterWeights, learning_rate, make_optimizer

PEAK, LOW = 1e-3, 1e-4


def weights() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,))]


# --- the schedule ---


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (1, 10), (4, 20), (19, 20)])
def test_rate_is_that_of_torchs_schedulers(warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD(weights(), lr=PEAK)
    rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / max(1, warmup))
    fall = torch.optim.SGD(weights(), lr=PEAK)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(fall, T_max=total - warmup, eta_min=LOW)
    for step in range(total):
        expected = rise.get_last_lr()[0] if step < warmup else cosine.get_last_lr()[0]
        assert learning_rate(step, PEAK, warmup, total, LOW) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        fall.step()
        rise.step()
        if step >= warmup:
            cosine.step()


def test_landmarks_of_the_schedule() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, PEAK, 10, 110, LOW)

    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([PEAK / 10, PEAK / 2, PEAK])
    assert rate(10) == PEAK
    assert rate(60) == pytest.approx((PEAK + LOW) / 2)
    assert rate(35) == pytest.approx(LOW + (PEAK - LOW) * (2 + math.sqrt(2)) / 4)
    assert rate(110) == pytest.approx(LOW)
    assert rate(1000) == pytest.approx(LOW)


def test_a_run_shorter_than_its_warmup_never_falls() -> None:
    rates = [learning_rate(step, PEAK, 10, 5, LOW) for step in range(5)]
    assert rates == pytest.approx([PEAK * n / 10 for n in (1, 2, 3, 4, 5)])


def test_a_minimum_above_the_peak_does_not_raise_the_rate() -> None:
    assert [learning_rate(step, PEAK, 0, 5, 10 * PEAK) for step in range(6)] == pytest.approx([PEAK] * 6)


# --- the optimizer ---


@pytest.mark.parametrize(
    ("spec", "cls", "expected"),
    [
        ("AdamW", torch.optim.AdamW, {"lr": 1e-3}),
        ("torch.optim.SGD", torch.optim.SGD, {"momentum": 0}),
        ({"class_path": "Adam", "init_args": {"lr": 2e-3}}, torch.optim.Adam, {"lr": 2e-3}),
        (
            {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.0002, "weight_decay": 0.1, "betas": [0.9, 0.95]}},
            torch.optim.AdamW,
            {"lr": 2e-4, "weight_decay": 0.1, "betas": (0.9, 0.95)},
        ),
        ({"class_path": "torch.optim.adamw.AdamW"}, torch.optim.AdamW, {}),
        ({"class_path": "RMSprop", "init_args": None}, torch.optim.RMSprop, {"alpha": 0.99}),
    ],
)
def test_names_and_mappings_make_the_optimizer_that_they_say(spec: Any, cls: type, expected: dict[str, Any]) -> None:
    parameters = weights()
    optimizer = make_optimizer(spec, iter(parameters))
    assert cls in type(optimizer).__mro__[:2]  # itself, or without_dynamo of it
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in expected} == expected
    assert [id(p) for p in group["params"]] == [id(p) for p in parameters]


def test_the_callers_mapping_stays_as_it_was() -> None:
    spec = {"class_path": "AdamW", "init_args": {"lr": 1e-2, "betas": [0.8, 0.9]}}
    make_optimizer(spec, weights())
    assert spec == {"class_path": "AdamW", "init_args": {"lr": 1e-2, "betas": [0.8, 0.9]}}


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_the_fused_step_is_the_plain_one(name: str) -> None:
    fused = make_optimizer({"class_path": name, "init_args": {"lr": 0.05, "weight_decay": 0.1}}, weights())
    plain = getattr(torch.optim, name)(weights(), lr=0.05, weight_decay=0.1, foreach=False, fused=False)
    assert fused.param_groups[0]["fused"] is True
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for one, other in zip(fused.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        fused.step()
        plain.step()
    assert_close(fused.param_groups[0]["params"], plain.param_groups[0]["params"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"fused": False}, {"foreach": True}, {"differentiable": True}])
def test_a_form_that_the_user_chose_is_kept(settings: dict[str, bool]) -> None:
    group = make_optimizer({"class_path": "AdamW", "init_args": settings}, weights()).param_groups[0]
    assert not group["fused"] and all(group[key] is value for key, value in settings.items())


def test_a_differentiable_optimizer_takes_steps() -> None:
    """Nothing differentiates them: torch's own step of such an optimizer refuses parameters that learn."""
    chosen, plain = (make_optimizer({"class_path": "AdamW", "init_args": {"differentiable": kind}}, weights()) for kind in (True, False))
    for optimizer in (chosen, plain):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert_close(chosen.param_groups[0]["params"], plain.param_groups[0]["params"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("os.system", "not allowed"),
        ("subprocess.Popen", "not allowed"),
        ("torch.save", "not allowed"),
        ("torch.optimus.AdamW", "not allowed"),
        ("torch.optim.os.system", "torch.optim.os"),
        ("torch.optim.AdamW.__init__", "torch.optim.AdamW"),
        ("torch.optim.lr_scheduler.StepLR", "is not an optimizer"),
        ("torch.optim.AdanW", "do you mean AdamW?"),
        ("", "optimizer"),
        ({}, "optimizer"),
        ({"init_args": {"lr": 1.0}}, "optimizer"),
        ({"class_path": "AdamW", "init_args": {"lrr": 1.0, "beta": 2}}, "AdamW has no argument lrr, beta; it has lr, betas"),
        ({"class_path": "AdamW", "init_args": {"lr": -1.0}}, "AdamW refuses its arguments: Invalid learning rate"),
        ({"class_path": "AdamW", "init_args": {"betas": 3}}, "AdamW refuses its arguments"),
        ({"class_path": "AdamW", "init_args": {"lr": "fast"}}, "AdamW refuses its arguments"),
        ("torch.optim.Optimizer", "refuses its arguments"),
        ("LBFGS", "LBFGS"),
        ("SparseAdam", "SparseAdam"),
    ],
)
def test_what_is_no_usable_optimizer_is_refused_by_name(spec: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_optimizer(spec, weights())
    assert message in str(caught.value) and "optimizer" in str(caught.value)


def test_a_forbidden_class_is_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "harmful_optimizer.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nclass Harm: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for path in ("harmful_optimizer.Harm", "torch.optim.AdamW.harmful_optimizer.Harm", "torch.optim..harmful_optimizer.Harm"):
        with pytest.raises(UserError):
            make_optimizer(path, weights())
    assert not (tmp_path / "imported").exists() and "harmful_optimizer" not in sys.modules


# --- fp32 copies of bf16 weights ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_below_the_resolution_of_a_dtype_add_up(dtype: torch.dtype) -> None:
    """Each weight is a neighbour of an fp32 run's, and their means agree, also after few steps."""
    start = torch.linspace(0.5, 1.0, 4096).to(dtype)
    weights = [torch.nn.Parameter(start.to(kind).clone()) for kind in (dtype, torch.float32)]
    optimizers = [make_optimizer({"class_path": "AdamW", "init_args": {"lr": 1e-5, "weight_decay": 0.0}}, [w]) for w in weights]
    for step in range(1, 101):
        for w, optimizer in zip(weights, optimizers, strict=True):
            w.grad = torch.ones_like(w)
            optimizer.step()
            optimizer.zero_grad()
        if step in (3, 30, 100):
            errors = weights[0].double() - weights[1].double()
            assert errors.abs().max() <= torch.finfo(dtype).eps / 2 and abs(errors.mean()) < 0.1 * step * 1e-5
    assert isinstance(optimizers[0], MasterWeights) and not isinstance(optimizers[1], MasterWeights)
    assert weights[0].grad is None and len(set((weights[0] - start).tolist())) > 1


def test_zeros_and_exact_weights_are_not_rounded() -> None:
    weight = torch.nn.Parameter(torch.tensor([0.0, -0.0, 0.5, -3.0, 2.0**-130], dtype=torch.bfloat16))
    optimizer, before = make_optimizer({"class_path": "SGD", "init_args": {"lr": 0.1}}, [weight]), weight.detach().clone()
    for _ in range(20):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert torch.equal(weight, before)


def test_a_restored_optimizer_rounds_as_the_first() -> None:
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 999).to(torch.bfloat16)) for _ in range(2)]
    first, second = (make_optimizer({"class_path": "SGD", "init_args": {"lr": 1e-4}}, [w]) for w in weights)
    for i in range(8):
        if i == 4:
            weights[1].data.copy_(weights[0])
            second.load_state_dict(first.state_dict())
        for w, optimizer in list(zip(weights, (first, second), strict=True))[: 1 if i < 4 else 2]:
            w.grad = torch.ones_like(w)
            optimizer.step()
    assert torch.equal(*weights)


def test_a_state_without_copies_is_that_of_the_present_weights() -> None:
    """Runs that an earlier version stopped have none."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = make_optimizer("SGD", [weight])
    optimizer.load_state_dict({"state": {}, "param_groups": optimizer.state_dict()["param_groups"]})
    assert isinstance(optimizer, MasterWeights) and torch.equal(optimizer.masters[0], torch.ones(3))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])
def test_steps_without_dynamo_are_those_of_torch(name: str) -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.01}
    mine = make_optimizer({"class_path": name, "init_args": settings}, [ours])
    reference = getattr(torch.optim, name)([theirs], **settings, **({} if name == "RMSprop" else {"fused": True}))
    assert isinstance(mine, getattr(torch.optim, name))
    for _ in range(3):
        for p, optimizer in ((ours, mine), (theirs, reference)):
            p.grad = torch.arange(12.0).view(3, 4) / 10
            optimizer.step()
        assert torch.equal(ours, theirs) and not ours.grad_fn
    assert mine.state_dict().keys() == reference.state_dict().keys()
    mine.zero_grad()
    assert ours.grad is None


@pytest.mark.slow
def test_torch_dynamo_is_not_imported() -> None:
    """It takes as long to import as torch itself."""
    code = """import sys, torch
from litgpt.device import on_meta
from litgpt.lora import GPT, Config
from litgpt.optim import make_optimizer
with on_meta():
    model = GPT(Config(name="x", n_layer=1, n_head=2, n_embd=32, vocab_size=8, padded_vocab_size=8, lora_r=2, lora_query=True))
assert all(p.is_meta for p in model.parameters())
p = torch.nn.Parameter(torch.ones(2))
optimizer = make_optimizer("AdamW", [p])
p.sum().backward()
optimizer.step()
optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert "torch._dynamo" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_waiting_threads_do_not_spin_for_long_beside_another_program() -> None:
    code = "import os, litgpt; print(os.environ.get('GOMP_SPINCOUNT'))"
    plain = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}

    def count(**given: str) -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**plain, **given}).stdout.strip()

    assert count() in ("1000", "10000")  # other tests may run meanwhile
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        assert count() == "1000"
        busy.kill()
    assert count(GOMP_SPINCOUNT="7") == "7" and count(OMP_WAIT_POLICY="active") == "None"


def test_few_compiled_products_are_kept_unless_the_user_says_how_many() -> None:
    name, code = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "import os, litgpt; print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    plain = {key: value for key, value in os.environ.items() if key != name}
    for given, kept in (({}, "128"), ({name: "1024"}, "1024")):
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**plain, **given}).stdout.strip() == kept


@pytest.mark.parametrize(("running", "idle"), [([1], True), ([3, 2, 2, 1], True), ([2] * 10, False)])
def test_a_program_that_ends_at_once_leaves_the_machine_idle(running: list[int], idle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter(running)
    monkeypatch.setattr(litgpt, "open", lambda path: io.StringIO(f"ctxt 7\nprocs_running {next(counts)}\nprocs_blocked 0\n"), raising=False)
    assert litgpt._is_idle() is idle and not list(counts)
