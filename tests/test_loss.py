"""The chunked head loss against torch's cross-entropy, its gradient against finite differences, and the memory that it must not take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litgpt import loss as loss_module
from litgpt.lora import LoRALinear
from litgpt.loss import HeadLoss
from tests.helpers.cases import quick

N, D, V = 7, 5, 11


def problem(n: int = N, d: int = D, v: int = V, dtype: torch.dtype = torch.float32, bias: bool = False, seed: int = 0) -> tuple[Any, ...]:
    """Hidden states that want a gradient, a frozen head, targets."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(d, v, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in head.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    return hidden, head, torch.randint(v, (n,), generator=generator)


def set_rows(monkeypatch: pytest.MonkeyPatch, chunk: int, block: int, v: int = V, itemsize: int = 4) -> None:
    """Chunks of `chunk` rows, whose softmax is taken `block` rows at a time."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk * v * itemsize)
    monkeypatch.setattr(loss_module, "BLOCK_ELEMENTS", block * v)


def reference(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden), targets, reduction="sum")


def gradients(loss: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, tensors))


# --- the frozen head ---


@pytest.mark.parametrize("block", quick([0, 1, 2, 100], 0, 2))
@pytest.mark.parametrize("chunk", quick([0, 1, 3, 7, 100], 0, 3))
def test_gradient_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch, chunk: int, block: int) -> None:
    hidden, head, targets = problem(dtype=torch.float64, bias=True)
    set_rows(monkeypatch, chunk, block, itemsize=8)
    assert torch.autograd.gradcheck(lambda h: HeadLoss(head)(h, targets) * 0.37, hidden)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (3, 2), (100, 100)])
def test_value_and_gradient_are_torchs(monkeypatch: pytest.MonkeyPatch, rows: tuple[int, int], bias: bool) -> None:
    hidden, head, targets = problem(n=50, d=16, v=33, bias=bias)
    set_rows(monkeypatch, *rows, v=33)
    loss, expected = HeadLoss(head)(hidden, targets), reference(hidden, head, targets)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_close(gradients(loss / 17, hidden), gradients(expected / 17, hidden), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_bf16_is_close_to_fp32_on_the_same_numbers(bias: bool) -> None:
    hidden, head, targets = problem(n=64, d=32, v=97, dtype=torch.bfloat16, bias=bias)
    hidden.data *= 0.2
    wide = hidden.detach().float().requires_grad_()
    expected = reference(wide, _float(head), targets)
    loss = HeadLoss(head)(hidden, targets)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=2e-3, atol=0)
    (gradient,), (exact,) = gradients(loss, hidden), gradients(expected, wide)
    assert gradient.dtype == torch.bfloat16
    assert (gradient.float() - exact).norm() < 1e-2 * exact.norm()


def _float(head: nn.Linear) -> nn.Linear:
    wide = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None).requires_grad_(False)
    wide.load_state_dict({name: value.float() for name, value in head.state_dict().items()})
    return wide


def test_autocast_runs_the_products_in_bf16_and_gives_fp32_gradients() -> None:
    hidden, head, targets = problem(n=64, d=32, v=97)
    hidden.data *= 0.2
    expected = reference(hidden, head, targets)
    seen = Recorder()
    with torch.autocast("cpu", dtype=torch.bfloat16), seen:
        loss = HeadLoss(head)(hidden, targets)
    assert torch.bfloat16 in {dtype for name, dtype in seen.outputs if name == "aten.mm.out"}
    assert_close(loss, expected, rtol=2e-3, atol=0)
    (gradient,), (exact,) = gradients(loss, hidden), gradients(expected, hidden)
    assert gradient.dtype == torch.float32
    assert (gradient - exact).norm() < 1e-2 * exact.norm()


def test_a_frozen_head_gets_no_gradient_and_none_is_computed() -> None:
    hidden, head, targets = problem(n=20, bias=True)
    seen = Recorder()
    with seen:
        HeadLoss(head)(hidden, targets).backward()
    assert head.weight.grad is None and head.bias.grad is None
    assert hidden.grad is not None
    assert (V, D) not in seen.shapes


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    hidden, head, targets = problem()
    seen = Recorder()
    with seen:
        loss = HeadLoss(head)(hidden.detach(), targets)
    assert not loss.requires_grad
    assert (N, D) not in seen.shapes
    assert_close(loss, reference(hidden, head, targets).detach())


def test_one_buffer_serves_batches_of_any_size_and_losses_that_wait_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    set_rows(monkeypatch, 4, 2)
    _, head, _ = problem()
    loss = HeadLoss(head)
    batches = [problem(n=n, seed=n) for n in (9, 2, 14, 1)]
    total = sum(loss(hidden, targets) for hidden, _, targets in batches)
    expected = sum(reference(hidden, head, targets) for hidden, _, targets in batches)
    states = [hidden for hidden, _, _ in batches]
    assert_close(total, expected)
    assert_close(gradients(total, *states), gradients(expected, *states))


# --- logits that are divided and capped ---

FINISHES = [(2.5, None), (1.0, 1.5), (2.5, 1.5)]


def finished(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, divisor: float, cap: float | None) -> torch.Tensor:
    logits = head(hidden) / divisor
    return F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets, reduction="sum")


@pytest.mark.parametrize("chunk", quick([1, 3, 100], 3))
@pytest.mark.parametrize(("divisor", "cap"), FINISHES)
def test_gradient_through_divisor_and_cap_is_that_of_finite_differences(
    monkeypatch: pytest.MonkeyPatch, divisor: float, cap: float | None, chunk: int
) -> None:
    hidden, head, targets = problem(dtype=torch.float64, bias=True)
    set_rows(monkeypatch, chunk, 2, itemsize=8)
    assert torch.autograd.gradcheck(lambda h: HeadLoss(head, divisor, cap)(h, targets) * 0.37, hidden)


@pytest.mark.parametrize("kind", ["frozen", "trained", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("divisor", "cap"), FINISHES)
def test_divisor_and_cap_are_plain_autograds(divisor: float, cap: float | None, dtype: torch.dtype, kind: str) -> None:
    """bf16 is compared with fp32 on the same numbers."""
    torch.manual_seed(0)
    hidden, head, targets = problem(n=50, d=16, v=33, dtype=dtype, bias=True)
    head.requires_grad_(kind == "trained")
    wide, exact = hidden.detach().float().requires_grad_(), _float(head)
    expected = finished(wide, exact, targets, divisor, cap)
    adapted = LoRALinear(16, 33, r=2, linear=head) if kind == "lora" else head  # B is zero
    loss = HeadLoss(adapted, divisor, cap)(hidden, targets)
    (gradient,), (wanted,) = gradients(loss, hidden), gradients(expected, wide)
    precision = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close(loss, expected, rtol=precision, atol=0)
    assert (gradient.float() - wanted).norm() < precision * wanted.norm()
    assert (wanted - gradients(reference(wide, exact, targets), wide)[0]).norm() > 0.1 * wanted.norm()


# --- weights, and targets that are ignored ---


@pytest.mark.parametrize("kind", ["frozen", "trained"])
@pytest.mark.parametrize(("divisor", "cap"), [(1.0, None), (2.0, 1.5)])
def test_weights_and_ignored_targets_against_finite_differences_and_torch(
    monkeypatch: pytest.MonkeyPatch, divisor: float, cap: float | None, kind: str
) -> None:
    hidden, head, targets = problem(dtype=torch.float64, bias=True)
    set_rows(monkeypatch, 3, 2, itemsize=8)
    head.requires_grad_(kind == "trained")
    weights = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 3.0, 0.25], dtype=torch.float64)
    targets[4] = loss_module.IGNORED
    loss = HeadLoss(head, divisor, cap)
    assert torch.autograd.gradcheck(lambda h: loss(h, targets, weights) * 0.37, hidden)
    logits = head(hidden) / divisor
    each = F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets, reduction="none")
    assert each[4] == 0
    assert_close(loss(hidden, targets, weights), (each * weights).sum())
    assert_close(loss(hidden, targets), each.sum())
    assert_close(gradients(loss(hidden, targets, weights), hidden), gradients((each * weights).sum(), hidden))
    assert torch.equal(gradients(loss(hidden, targets), hidden)[0][4], torch.zeros(D, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["frozen", "trained"])
@pytest.mark.parametrize(("divisor", "cap"), [(1.0, None), (2.0, 1.5)])
def test_several_targets_of_a_position_against_finite_differences_and_torch(
    monkeypatch: pytest.MonkeyPatch, divisor: float, cap: float | None, kind: str
) -> None:
    """torch takes targets that are probabilities of all V tokens. One of ours occurs twice, and one position counts double."""
    hidden, head, _ = problem(dtype=torch.float64, bias=True)
    set_rows(monkeypatch, 3, 2, itemsize=8)
    head.requires_grad_(kind == "trained")
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(V, (N, 4), generator=generator)
    targets[2, 3] = targets[2, 0]
    weights = torch.rand(N, 4, generator=generator, dtype=torch.float64)
    weights[5] *= 2
    loss = HeadLoss(head, divisor, cap)
    assert torch.autograd.gradcheck(lambda h: loss(h, targets, weights) * 0.37, hidden)
    logits = head(hidden) / divisor
    shares = torch.zeros(N, V, dtype=torch.float64).scatter_add_(1, targets, weights)
    each = F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), shares, reduction="none")
    assert_close(loss(hidden, targets, weights, is_sum=False), each)
    assert_close(gradients(loss(hidden, targets, weights), hidden), gradients(each.sum(), hidden))


def test_a_batch_whose_targets_are_all_ignored_has_no_loss() -> None:
    hidden, head, targets = problem()
    loss = HeadLoss(head)(hidden, torch.full_like(targets, loss_module.IGNORED))
    assert loss == 0 and not gradients(loss, hidden)[0].any()


# --- a head that is trained ---


def trained_head() -> nn.Linear:
    return nn.Linear(16, 33)


def lora_head() -> LoRALinear:
    head = LoRALinear(16, 33, r=3, lora_alpha=5, bias=True)
    nn.init.normal_(head.lora_B)
    head.linear.requires_grad_(False)
    return head


@pytest.mark.parametrize("rows", [1, 7, 100])
@pytest.mark.parametrize("make", [trained_head, lora_head])
def test_a_trained_head_gets_the_gradients_of_plain_autograd(monkeypatch: pytest.MonkeyPatch, make: Any, rows: int) -> None:
    torch.manual_seed(0)
    head = make()
    hidden, _, targets = problem(n=50, d=16, v=33)
    set_rows(monkeypatch, rows, rows, v=33)
    trained = [p for p in head.parameters() if p.requires_grad]
    loss, expected = HeadLoss(head)(hidden, targets), reference(hidden, head, targets)
    assert len(trained) == 2
    assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_close(gradients(loss / 17, hidden, *trained), gradients(expected / 17, hidden, *trained), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize(("divisor", "cap"), [(1.0, None), (2.0, 1.5)])
def test_a_trained_head_without_bias_gets_the_gradients_of_plain_autograd(
    monkeypatch: pytest.MonkeyPatch, divisor: float, cap: float | None, rows: int, several: bool
) -> None:
    """Weighted targets, one of them ignored or some positions with several; the second of two losses adds to the first one's gradient."""
    hidden, head, targets = problem(dtype=torch.float64)
    head.requires_grad_(True)
    set_rows(monkeypatch, rows, 2, itemsize=8)
    weights = torch.rand(N, dtype=torch.float64)
    targets[4] = loss_module.IGNORED
    if several:
        targets, weights = torch.stack((targets.clamp(min=0), targets.flip(0).clamp(min=0)), 1), torch.rand(N, 2, dtype=torch.float64)
    logits = head(hidden) / divisor
    each = (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)
    columns = loss_module.as_columns(targets)
    counted = loss_module.as_columns(weights) * (columns != loss_module.IGNORED)
    expected = -(each.gather(1, columns.clamp(min=0)) * counted).sum()
    wanted = gradients(expected * 0.37, hidden, head.weight)
    for times in (1, 2):
        loss = HeadLoss(head, divisor, cap)(hidden, targets, weights)
        assert_close(loss, expected)
        (loss * 0.37).backward()
        assert_close([hidden.grad, head.weight.grad], [times * gradient for gradient in wanted])


@pytest.mark.parametrize("mixed", [False, True])
def test_a_trained_head_in_bf16(mixed: bool) -> None:
    """Against fp32 on the same numbers; under autocast the weight and its gradient are fp32."""
    hidden, head, targets = problem(n=50, d=16, v=33, dtype=torch.bfloat16)
    wide, exact = hidden.detach().float().requires_grad_(), _float(head).requires_grad_(True)
    wanted = gradients(reference(wide, exact, targets), wide, exact.weight)
    head = exact if mixed else head.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = gradients(HeadLoss(head)(hidden, targets), hidden, head.weight)
    assert found[1].dtype == head.weight.dtype
    assert all((one.float() - other).norm() < 2e-2 * other.norm() for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("rows", quick([1, 3, 100], 3))
def test_a_trained_heads_gradient_is_that_of_finite_differences(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    hidden, head, targets = problem(dtype=torch.float64, bias=True)
    head.requires_grad_(True)
    set_rows(monkeypatch, rows, rows, itemsize=8)
    loss = HeadLoss(head)(hidden, targets)
    assert loss.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda h, *_: HeadLoss(head)(h, targets), (hidden, head.weight, head.bias))


# --- memory ---


class Recorder(TorchDispatchMode):
    """What every operation returned, and the most bytes of tensors made meanwhile that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[tuple[str, torch.dtype]] = []
        self.shapes: set[tuple[int, ...]] = set()
        self.largest = self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.outputs.append((str(func), value.dtype))
                storage = value.untyped_storage()
                if storage.data_ptr() not in given:
                    self.shapes.add(tuple(value.shape))
                    self.largest = max(self.largest, storage.nbytes())
                    reference = StorageWeakRef(storage)
                    self._live[reference.cdata] = (reference, storage.nbytes())
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def most_memory(head: nn.Module, n: int) -> tuple[int, int]:
    """Bytes of the largest tensor and of all at once, forward and backward, for n positions."""
    hidden, _, targets = problem(n=n, d=4, v=1000)
    seen = Recorder()
    with seen:
        HeadLoss(head)(hidden, targets).backward()
    return seen.largest, seen.peak


@pytest.mark.parametrize("kind", quick(["frozen", "trained", "lora"], "trained"))
def test_memory_for_logits_does_not_grow_with_the_positions(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    rows, d, v = 8, 4, 1000
    set_rows(monkeypatch, rows, 2, v=v)
    head: nn.Module = LoRALinear(d, v, r=2) if kind == "lora" else nn.Linear(d, v)
    if kind == "frozen":
        head.requires_grad_(False)
    few, many = 64, 1024
    (largest, peak), (largest_of_many, peak_of_many) = most_memory(head, few), most_memory(head, many)
    assert largest == largest_of_many == rows * v * 4
    assert peak_of_many - peak <= 4 * (many - few) * d * 4  # a few (N, d) tensors, no (N, V)
    assert peak_of_many < many * v * 4 / 10


def test_the_recorder_sees_what_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets = problem(n=64, d=4, v=1000)
    seen = Recorder()
    with seen:
        reference(hidden, head, targets).backward()
    assert seen.largest == 64 * 1000 * 4 and seen.peak >= 2 * seen.largest


# --- edges ---


@pytest.mark.parametrize("trained", [False, True])
def test_vanishing_probabilities_give_no_inf(trained: bool) -> None:
    hidden, head, targets = problem(n=20, d=16, v=33)
    head.requires_grad_(trained)
    hidden.data *= 1e4
    loss = HeadLoss(head)(hidden, targets)
    wide = hidden.detach().double().requires_grad_()
    exact = F.cross_entropy(F.linear(wide, head.weight.detach().double()), targets, reduction="sum")
    assert exact > 1e5 and loss.isfinite()
    assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    assert_close(gradients(loss, hidden)[0].double(), gradients(exact, wide)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", ["frozen", "trained", "lora"])
def test_no_positions_cost_nothing(make: str) -> None:
    hidden, head, targets = problem(n=0)
    if make == "trained":
        head.requires_grad_(True)
    loss = HeadLoss(LoRALinear(D, V, r=2) if make == "lora" else head)(hidden, targets)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None and hidden.grad.shape == (0, D)
