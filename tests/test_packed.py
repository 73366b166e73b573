"""Packed weights give what plain ones give, up to rounding."""

from __future__ import annotations

import copy
import platform

import pytest
import torch

from litgpt.lora import GPT
from litgpt.loss import HeadLoss
from litgpt.packed import PackedHead, PackedLinear, pack
from tests.helpers import tiny
from tests.helpers.cases import quick
from tests.helpers.family_configs import FAMILIES, ours

pytestmark = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="x86 only")
IDX = tiny.ids(2, 9)


def packed(model: GPT) -> GPT:
    pack(model)
    assert isinstance(model.head, PackedHead) and any(isinstance(module, PackedLinear) for module in model.modules())
    return model


@torch.inference_mode()
def require_equal(model: GPT, plain: GPT) -> None:
    for idx in (IDX, IDX[:1, :1]):
        torch.testing.assert_close(model(idx), plain(idx), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", quick(FAMILIES, "llama", "gpt2", "mixtral", "deepseek_v2", "bloom"))
def test_every_family(family: str) -> None:
    require_equal(packed(ours(family)), ours(family))


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_adapters_around_packed_layers(variant: str) -> None:
    settings = {"lora_r": 3, "lora_variant": variant, **tiny.ALL_LORA}
    model, plain = (tiny.move_adapters(tiny.tiny(**settings)) for _ in range(2))
    require_equal(packed(model), plain)
    torch.testing.assert_close(model.blocks[0].mlp.fc_1.merged(), plain.blocks[0].mlp.fc_1.merged())


def test_an_adapted_copy_shares_the_blocks() -> None:
    base = packed(tiny.tiny())
    model = copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})
    config = tiny.tiny(lora_r=3, **tiny.ALL_LORA | {"lora_head": False}).config
    model.adapt(config)
    pack(model)
    assert model.blocks[0].mlp.proj.linear.packed is base.blocks[0].mlp.proj.packed and model.head.packed is base.head.packed
    require_equal(model, tiny.tiny())


def test_the_loss_reads_the_plain_weight() -> None:
    model, hidden, targets = packed(tiny.tiny()), torch.randn(5, 32), IDX[0, :5]
    torch.testing.assert_close(HeadLoss.of(model)(hidden, targets), HeadLoss.of(tiny.tiny())(hidden, targets))


def test_other_dtypes_stay_as_they_are() -> None:
    model = tiny.tiny().bfloat16()
    pack(model)
    assert not any(isinstance(module, PackedHead | PackedLinear) for module in model.modules())
