"""`skip2lora_block_indices: auto`: R2 against numpy, blocks that are known to matter, settings. Runs: finetune/test_auto_blocks.py."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from litgpt import lora
from litgpt.activations import choose as block_choice
from litgpt.activations.choose import DAMPING, RIDGES, Evidence, choose, forward_selection, gather
from litgpt.errors import UserError
from litgpt.sample import Sample
from tests.helpers import tiny
from tests.helpers.cases import quick

AUTO: dict[str, Any] = {"skip2lora_enabled": True, "skip2lora_block_indices": "auto:2", "lora_r": 4}
OUTPUT_LAYERS = ("lm_head", "transformer.ln_f", "transformer.h.3")


def parts(N: int = 60, S: int = 4, d: int = 6, seed: int = 0, needed: dict[int, float] | None = None) -> list[Any]:
    """Two halves of random taps, and gradients that are linear in the `needed` ones, with their weights, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    maps = {i: torch.randn(d, d, generator=generator) * weight for i, weight in (needed or {}).items()}
    made = []
    for _ in range(2):
        taps = torch.randn(N, S, d, generator=generator)
        g = 0.5 * torch.randn(N, d, generator=generator) + sum(taps[:, i] @ m for i, m in maps.items())
        made.append((taps, g))
    return made


# --- R2 ---


@pytest.mark.parametrize("blocks", [(2,), (0, 3), (3, 1, 0, 2)])
def test_explained_against_lstsq(blocks: tuple[int, ...]) -> None:
    """With all d directions kept: ridge regression as least squares with rows added, in coordinates in which F is the identity."""
    both = parts(needed={1: 0.3, 3: 1.0})
    taps, g = (np.concatenate([part[k].double().numpy() for part in both]) for k in (0, 1))
    taps /= np.sqrt((taps**2).sum(-1).mean())
    second = g.T @ g / len(g)
    values, U = np.linalg.eigh(second + DAMPING * np.trace(second) / 6 * np.eye(6))
    y = -g @ U @ np.diag(values**-0.5)
    z = taps[:, list(blocks)].reshape(len(taps), -1)
    found = []
    for ridge in RIDGES:
        shares = []
        for fit, held in ((slice(0, 60), slice(60, 120)), (slice(60, 120), slice(0, 60))):
            more = np.sqrt(60 * ridge) * np.eye(z.shape[1])
            M = np.linalg.lstsq(np.vstack((z[fit], more)), np.vstack((y[fit], np.zeros((len(more), 6)))), rcond=None)[0]
            shares.append(1 - ((y[held] - z[held] @ M) ** 2).sum() / (y[held] ** 2).sum())
        found.append(np.mean(shares))
    assert Evidence(both).explained(blocks) == pytest.approx(max(found), rel=1e-4)


def test_kept_directions_are_the_principal_ones() -> None:
    """Taps of rank 3 lose nothing in 3 directions, and something in 2."""
    both = [(taps[..., :3] @ torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), g) for taps, g in parts(needed={0: 1.0})]
    both = [(taps, taps[:, 0] + 0.1 * g) for taps, g in both]
    whole, three, two = (Evidence(both, k).explained((0,)) for k in (6, 3, 2))
    assert three == pytest.approx(whole, rel=1e-3) and two < 0.9 * whole


@pytest.mark.parametrize(("needed", "first"), [({2: 1.0}, (2,)), ({3: 1.0, 1: 0.3}, (3, 1)), ({0: 0.3, 1: 0.6, 2: 1.0}, (2, 1, 0))])
def test_needed_blocks_are_chosen_first(needed: dict[int, float], first: tuple[int, ...]) -> None:
    assert forward_selection(Evidence(parts(needed=needed, N=300)), 4, len(first)) == first


def test_a_copy_of_a_chosen_block_is_not_chosen() -> None:
    both = []
    for taps, g in parts(needed={2: 1.0, 1: 0.3}, N=300):
        taps[:, 3] = taps[:, 2] + 0.01 * taps[:, 3]
        both.append((taps, g))
    chosen = forward_selection(Evidence(both), 4, 2)
    assert 1 in chosen and len({2, 3} & set(chosen)) == 1


# --- the sample ---


def samples_of(ids: torch.Tensor, prompt: int) -> list[Sample]:
    """(B, T) -> samples that carry loss behind the prompt."""
    return [Sample(array("i", row), bytearray([0] * prompt + [1] * (len(row) - prompt))) for row in ids.tolist()]


def candidates(**settings: Any) -> Any:
    return tiny.tiny(**{**AUTO, **settings})


@pytest.mark.parametrize("output", OUTPUT_LAYERS)
def test_gradients_and_taps_against_autograd(output: str) -> None:
    """sum over rows of g t^T, for each block, from one plain pass per sample."""
    model = candidates(skip2lora_output_layer=output)
    samples = [*samples_of(tiny.ids(3, 9), 4), *samples_of(tiny.ids(2, 12, seed=8), 2)]
    want = 0
    for sample in samples:
        x, taps = model.prefix(torch.tensor(sample.input_ids)[None, :-1])
        x.requires_grad_()
        logits = model.logits(model.tail(x, taps[..., :0, :]))[0]
        at = torch.tensor(list(sample.loss_mask), dtype=torch.bool)[1:]
        F.cross_entropy(logits[at], torch.tensor(sample.input_ids)[1:].long()[at], reduction="sum").backward()
        want = want + torch.einsum("bti,btsj->sij", x.grad, taps)
    model.zero_grad(set_to_none=True)
    halves = gather(model, samples, micro_batch=2, seed=1, progress=lambda done, total: None)
    got = sum(torch.einsum("ni,nsj->sij", g, taps) for taps, g in halves)
    assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_large_sample_is_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_choice, "ROWS", 20)
    halves = gather(candidates(), samples_of(tiny.ids(10, 14), 4), 2, 1, lambda done, total: None)
    assert [len(g) for _, g in halves] == [len(taps) for taps, _ in halves] == [10, 10]


def taught(block: int) -> tuple[Any, list[Sample]]:
    """A base with all blocks as candidates, and sequences by the base with a strong adapter on `block` alone."""
    teacher = tiny.move_adapters(candidates(skip2lora_block_indices=[block], n_layer=5), size=0.5)
    ids = tiny.ids(96, 4)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(12):
            p = torch.softmax(teacher(ids)[:, -1], dim=-1)
            ids = torch.cat((ids, torch.multinomial(p, 1, generator=generator)), dim=1)
    return candidates(n_layer=5), samples_of(ids, 4)


@pytest.mark.parametrize("block", quick([0, 2, 4], 2))
def test_the_block_that_the_data_come_from_is_chosen(block: int) -> None:
    model, samples = taught(block)
    choice = choose(model, samples, 1, 8, 1, lambda done, total: None)
    assert choice.blocks == (block,) and choice.value > 0.005
    assert set(choice.rules) == {"last:1", "evenly spaced"} and choice.samples == 96 and choice.rows == 96 * 12


def test_a_choice_repeats_and_leaves_the_model_and_the_random_state() -> None:
    model, samples = taught(1)
    model.train()
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    one = choose(model, samples, 3, 8, 7, lambda done, total: None)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    torch.manual_seed(5)
    assert choose(model, samples, 3, 8, 7, lambda done, total: None) == one
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_simple_rules_stand_in_where_the_sample_tells_nothing() -> None:
    model, samples = taught(1)
    alone = choose(model, samples[:1], 2, 8, 1, lambda done, total: None)
    assert alone.blocks == (3, 4) and alone.value == 0
    model.lm_head.weight.data[0, 0] = torch.nan
    assert choose(model, samples, 2, 8, 1, lambda done, total: None).blocks == (3, 4)


# --- settings ---


def config(**settings: Any) -> Any:
    return lora.Config(**{**tiny.TINY, **AUTO, **settings})


def test_forms() -> None:
    assert config().taps_to_choose == 2 and config().taps == (0, 1, 2, 3, 4)
    assert config(skip2lora_block_indices="auto").taps_to_choose == 5  # 6, but there are 5
    assert config(skip2lora_block_indices="auto", n_layer=9).taps_to_choose == 6
    assert config(skip2lora_output_layer="transformer.h.3").taps == (0, 1, 2)
    assert config(skip2lora_block_indices=[0, 1]).taps_to_choose is None
    assert config(skip2lora_enabled=False).taps_to_choose is None


@pytest.mark.parametrize("spec", ["auto:0", "auto:6", "auto:", "auto:-1", "auto:x", "AUTO", "auto:²", "auto2", ["auto"]], ids=str)
def test_wrong_forms(spec: Any) -> None:
    with pytest.raises(UserError, match="skip2lora_block_indices"):
        config(skip2lora_block_indices=spec)
    with pytest.raises(UserError, match=r"'every:5' or 'auto:6', with a number from 1 to the 3 blocks"):
        config(skip2lora_block_indices="auto:4", skip2lora_output_layer="transformer.h.3")


def test_lora_blocks_are_not_chosen() -> None:
    with pytest.raises(UserError, match="lora_block_indices is 'auto'") as caught:
        config(lora_block_indices="auto", lora_query=True, skip2lora_enabled=False)
    assert "auto:6" not in str(caught.value)


def test_keep_taps_leaves_the_model_of_an_explicit_list() -> None:
    model, explicit = tiny.move_adapters(candidates()), candidates(skip2lora_block_indices=[1, 4])
    lora.keep_taps(model, [1, 4])
    assert model.config == explicit.config and model.state_dict().keys() == explicit.state_dict().keys()
    explicit.load_state_dict(model.state_dict())
    assert torch.equal(model(tiny.ids(2, 5)), explicit(tiny.ids(2, 5)))
