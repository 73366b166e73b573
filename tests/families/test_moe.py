"""The mixture of experts equals the dense form; experts in groups; the router's training loss equals transformers'."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from litgpt.activations.cache import Recompute
from litgpt.config import Config
from litgpt.lora import mark_only_lora_as_trainable
from litgpt.loss import HeadLoss, loss_of
from litgpt.mlp import LLaMAMoE, load_balance, route
from litgpt.sample import Sample
from tests.helpers import family_configs as configs, tiny

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "qwen3_moe not normalised"]
CPU = torch.device("cpu")


def mixture(**settings: Any) -> Any:
    experts = {"mlp_class_name": "LLaMAMoE", "n_expert": 6, "n_expert_per_token": 3, "moe_intermediate_size": 20}
    return tiny.randomise(LLaMAMoE(Config(**{**tiny.TINY, **experts, **settings})))


@pytest.mark.parametrize("normalised", [True, False])
def test_each_token_gets_the_weighted_sum_of_its_experts(normalised: bool) -> None:
    """Outputs and gradients of the dense form, in which every expert sees every token and most weigh nothing."""
    moe = mixture(norm_topk_prob=normalised)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    p = moe.gate(x).softmax(-1)
    weights = torch.where(p >= p.topk(3).values[..., -1:], p, 0.0)
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    want = (torch.stack([expert(x) for expert in moe.experts], dim=-1) * weights[..., None, :]).sum(-1)
    got = moe(x)
    assert_close(got, want, rtol=1e-5, atol=1e-5)
    inputs = [x, *moe.parameters()]
    for a, b in zip(torch.autograd.grad(got.square().sum(), inputs), torch.autograd.grad(want.square().sum(), inputs), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


def best_within_groups(scores: list[float], ranked: list[float], config: Config) -> dict[int, float]:
    """Return the weight of each chosen expert of one token, by plain loops."""
    assert config.n_expert_groups and config.n_topk_groups and config.n_topk_scores_per_group
    size = config.n_expert // config.n_expert_groups
    groups = [list(range(start, start + size)) for start in range(0, config.n_expert, size)]
    rank = lambda group: sum(sorted((ranked[e] for e in group), reverse=True)[: config.n_topk_scores_per_group])  # noqa: E731
    allowed = [e for group in sorted(groups, key=rank, reverse=True)[: config.n_topk_groups] for e in group]
    chosen = sorted(allowed, key=lambda e: ranked[e], reverse=True)[: config.n_expert_per_token]
    total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
    return {e: config.routed_scaling_factor * scores[e] / total for e in chosen}


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("normalised", [False, True])
def test_experts_in_groups(softmax: bool, normalised: bool) -> None:
    """The bias decides which experts are taken, some against their scores, and never what they weigh."""
    groups = {"n_expert": 12, "n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 2, "n_expert_per_token": 4}
    settings = {"mlp_class_name": "LLaMAMoE", "routed_scaling_factor": 2.5, "norm_topk_prob": normalised, "router_softmax": softmax}
    config = Config(**{**tiny.TINY, **groups, **settings})
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(50, 12, generator=generator), torch.randn(12, generator=generator) * 0.3
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    weights, chosen = route(logits, config, None if softmax else bias)
    ranked, differ = scores if softmax else scores + bias, 0
    for n in range(50):
        want = best_within_groups(scores[n].tolist(), ranked[n].tolist(), config)
        assert dict(zip(chosen[n].tolist(), weights[n].tolist(), strict=True)) == pytest.approx(want, rel=1e-5)
        differ += set(want) != set(scores[n].topk(4).indices.tolist())
    assert differ > 20


def test_each_expert_runs_once_over_its_own_tokens() -> None:
    moe, seen = mixture(), []
    for expert in moe.experts:
        expert.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    moe(torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0)))
    assert len(seen) <= 6 and sum(shape[0] for shape in seen) == 2 * 7 * 3


def test_balance_in_closed_form() -> None:
    """k where every expert serves alike; E for one expert that serves all with certainty."""
    even = torch.eye(4).repeat(3, 1) * 50  # token t: expert t mod 4
    assert_close(load_balance(even, 1), torch.tensor(1.0))
    assert_close(load_balance(torch.tensor([[50.0, 0, 0, 0]]).repeat(5, 1), 1), torch.tensor(4.0))


def make_samples() -> list[Sample]:
    """Of different lengths, so that batches are padded."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in (19, 7, 12):
        ids = torch.randint(101, (length,), generator=generator).tolist()
        samples.append(Sample(array("i", ids), bytearray([0] * (length // 2) + [1] * (length - length // 2))))
    return samples


def training_loss(model: Any, samples: list[Sample]) -> torch.Tensor:
    """Return the training loop's loss over all samples in one batch."""
    return loss_of(model, Recompute(model, samples, CPU)(range(len(samples))), HeadLoss.of(model))


@pytest.mark.parametrize("family", MIXTURES)
def test_training_loss_against_transformers(family: str) -> None:
    """Cross-entropy and the router's loss, without the padding; and the gradients for embedding, routers and experts."""
    hf, _, _ = configs.pair(family)
    model = configs.ours(family, lora_r=0).train()
    samples = make_samples()
    rows = [torch.tensor(sample.input_ids) for sample in samples]
    ids, real = (pad_sequence(part, batch_first=True) for part in ([row[:-1] for row in rows], [torch.ones(len(row) - 1) for row in rows]))
    masks = [torch.tensor(list(sample.loss_mask)).bool() for sample in samples]
    at = pad_sequence([mask[1:] for mask in masks], batch_first=True)
    targets = torch.cat([row[mask] for row, mask in zip(rows, masks, strict=True)]).long()
    theirs = hf(ids, attention_mask=real.long(), output_router_logits=True)
    auxiliary = hf.config.router_aux_loss_coef * theirs.aux_loss
    want = F.cross_entropy(theirs.logits[at], targets) + auxiliary
    got = training_loss(model, samples) / len(targets)
    assert auxiliary > 0.3
    assert_close(got, want, rtol=1e-5, atol=1e-6)

    own = dict(model.named_parameters())
    names = ["transformer.wte.weight", *(f"transformer.h.{i}.mlp.gate.weight" for i in range(3))]
    given = [hf.get_input_embeddings().weight, *(block.mlp.gate.weight for block in hf.model.layers)]
    mine = torch.autograd.grad(got, [own[name] for name in names], retain_graph=True)
    for a, b in zip(mine, torch.autograd.grad(want, given, retain_graph=True), strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-6)
    without = torch.autograd.grad(F.cross_entropy(theirs.logits[at], targets), given)
    assert (without[1] - mine[1]).abs().max() > 1e-3  # the router's loss has a part in it


def test_only_routers_behind_the_cut_have_a_part() -> None:
    """Their inputs depend on what is trained; routers before the cut are frozen, and so is what they read."""
    settings = {"skip2lora_enabled": True, "lora_r": 3, "skip2lora_block_indices": [0], **tiny.ALL_LORA}
    model = configs.ours("mixtral", skip2lora_output_layer="transformer.h.1", **settings).train()
    mark_only_lora_as_trainable(tiny.move_adapters(model))
    idx, routed = tiny.ids(2, 20), {}
    for number, block in enumerate(model.blocks):
        block.mlp.gate.register_forward_hook(lambda module, args, output, number=number: routed.update({number: output}))
    model(idx)
    assert model.blocks[0].mlp.router_logits is None
    behind = torch.cat([routed[number].flatten(0, 1) for number in (1, 2)])
    auxiliary = model.auxiliary_loss()
    assert_close(auxiliary, 0.2 * load_balance(behind, 2))
    assert torch.autograd.grad(auxiliary, model.blocks[0].skip2lora.lora_B)[0].abs().max() > 0
    assert model.auxiliary_loss() is None  # taken once

    flat = configs.ours("mixtral", skip2lora_enabled=True, lora_r=3).train()
    flat(idx)
    assert flat.auxiliary_loss() is None  # cut at lm_head


def test_no_router_loss_outside_training_or_without_a_weight() -> None:
    idx = tiny.ids(1, 9)
    model = configs.ours("mixtral")
    model(idx)
    assert model.auxiliary_loss() is None
    with torch.no_grad():
        model.train()(idx)
    assert model.auxiliary_loss() is None
    model.config.router_aux_loss_coef = 0.0
    model(idx)
    assert model.auxiliary_loss() is None
    assert configs.ours("llama").auxiliary_loss() is None
