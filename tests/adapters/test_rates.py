"""LoRA+ and LoRA-FA against PEFT's steps, NEFTune's noise against transformers'."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch.testing import assert_close
from transformers.integrations.neftune import neftune_post_forward_hook

from litgpt.activations.cache import Recompute, is_cacheable
from litgpt.errors import UserError
from litgpt.finetune.lora import Lora
from litgpt.lora import mark_only_lora_as_trainable
from litgpt.optim import make_optimizer, multiply_rates
from litgpt.packing import Packing, pack
from tests.adapters.test_dora import IDX, curve, loss, pair
from tests.helpers import tiny
from tests.helpers.training import CPU, SKIP, make_samples

FLAGS = ("lora_query", "lora_value", "lora_mlp")


def rated(model: Any, factor: float, **settings: Any) -> torch.optim.Optimizer:
    init_args = {"lr": 1e-2, "weight_decay": 0.0, **settings}
    optimizer = make_optimizer({"class_path": "AdamW", "init_args": init_args}, [p for p in model.parameters() if p.requires_grad])
    multiply_rates(optimizer, {id(p): factor for name, p in model.named_parameters() if name.endswith("lora_B")})
    return optimizer


def test_steps_of_lora_plus_are_pefts() -> None:
    theirs, ours = pair(FLAGS)
    plus = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=5.0, weight_decay=0.0)
    mine = curve(ours, rated(ours, 5.0), lambda model: model(IDX))
    assert_close(mine, curve(theirs, plus, lambda model: model(IDX).logits), rtol=1e-4, atol=1e-5)
    assert abs(mine[-1] - curve(pair(FLAGS)[1], rated(ours, 1.0), lambda model: model(IDX))[-1]) > 1e-3


def test_rates_are_kept_through_saving() -> None:
    model = tiny.tiny(lora_r=2, **tiny.ALL_LORA)
    mark_only_lora_as_trainable(model)
    optimizer = rated(model, 16.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2, 0.16])
    loss(model(IDX)).backward()
    optimizer.step()
    other = rated(model, 16.0)
    other.load_state_dict(optimizer.state_dict())
    assert [len(group["params"]) for group in other.param_groups] == [len(group["params"]) for group in optimizer.param_groups]


def test_lora_fa_trains_b_alone_and_keeps_less() -> None:
    theirs, ours = pair(FLAGS, lora_freeze_a=True)
    kept: dict[bool, int] = {}
    gradients = {}
    for freezes in (True, False):
        ours.config.lora_freeze_a = freezes
        mark_only_lora_as_trainable(ours)
        seen: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, seen=seen: (seen.update({t.data_ptr(): t.numel()}), t)[1], lambda t: t):
            value = loss(ours(IDX))
        kept[freezes] = sum(seen.values())
        names = [name for name, p in ours.named_parameters() if p.requires_grad]
        gradients[freezes] = dict(zip(names, torch.autograd.grad(value, [ours.get_parameter(name) for name in names]), strict=True))
    assert {name.rpartition(".")[2] for name in gradients[True]} == {"lora_B"}
    assert_close(gradients[True], {name: value for name, value in gradients[False].items() if name.endswith("lora_B")})
    assert kept[True] < kept[False]
    optimizer = rated(ours, 3.0)
    mark_only_lora_as_trainable(ours)
    assert len(optimizer.param_groups) == 2
    ours.config.lora_freeze_a = True
    mark_only_lora_as_trainable(ours)
    assert [group["lr"] for group in rated(ours, 3.0).param_groups] == pytest.approx([0.03])
    skip = tiny.tiny(lora_freeze_a=True, **SKIP)
    mark_only_lora_as_trainable(skip)
    assert {name.rpartition(".")[2] for name, p in skip.named_parameters() if p.requires_grad} == {"lora_B"}
    assert theirs is not None


def test_noise_is_that_of_transformers() -> None:
    model, ids = tiny.tiny(), tiny.ids(1, 20)
    model.neftune_alpha = 5.0
    plain = model.embed(ids, model.positions(ids))
    assert torch.equal(plain, model.transformer["wte"](ids)), "no noise in eval mode"
    model.train()
    torch.manual_seed(3)
    noisy = model.embed(ids, model.positions(ids))
    torch.manual_seed(3)
    hooked = neftune_post_forward_hook(SimpleNamespace(training=True, neftune_noise_alpha=5.0), None, plain)
    assert_close(noisy, hooked)


def test_each_packed_sample_has_noise_of_its_own_length() -> None:
    model, samples = tiny.tiny(**SKIP), make_samples(6)
    model.neftune_alpha = 4.0
    assert not is_cacheable(model) and Recompute(model, samples * 2, CPU).stem == 0
    batch = pack(samples, CPU, 0)
    pos = model.packed_positions(batch.packing)
    plain = model.embed(batch.ids, pos)
    model.train()
    noise = torch.stack([model.embed(batch.ids, pos) - plain for _ in range(40)])
    lengths = Packing.of([s.n_inputs for s in samples], 0, CPU).lengths
    for part, length in zip(noise.split(lengths, dim=1), lengths, strict=True):
        magnitude = 4.0 / (length * 32) ** 0.5
        assert part.abs().max() <= magnitude * 1.001
        assert part.std().item() == pytest.approx(magnitude / 3**0.5, rel=0.1)


def test_a_ratio_out_of_range(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="loraplus_lr_ratio is 0"):
        Lora(checkpoint_dir=tmp_path, data=object(), loraplus_lr_ratio=0)  # type: ignore[arg-type]
