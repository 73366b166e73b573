"""Heads beside the output layer, against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from litgpt.adapters.base import adapter_parameters
from litgpt.errors import UserError
from litgpt.lora import mark_only_lora_as_trainable, merge_lora_weights
from tests.helpers import tiny


def randomised(head: torch.nn.Module) -> None:
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_value_head(kind: str) -> None:
    model = tiny.tiny(value_head=kind)
    head, h = model.value_head, torch.randn(2, 3, 32)
    assert_close(head(h).sigmoid(), torch.full((2, 3), 0.5))
    randomised(head)
    a = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    if kind == "mlp":
        z = a @ head.up.T + head.shift
        a = z * z.sigmoid()
    assert_close(head(h), (a * head.weight).sum(-1) + head.bias)


def test_multi_token_head() -> None:
    head, h, e = tiny.tiny(mtp_heads=1).mtp_heads[0], torch.randn(5, 32), torch.randn(5, 32)
    assert torch.equal(head(h, e), h)
    randomised(head)
    a = torch.cat([x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() for x in (h, e)], -1) @ head.up.T
    assert_close(head(h, e), h + (a * a.sigmoid()) @ head.down.T)
    assert head(h.bfloat16(), e.bfloat16()).dtype == torch.bfloat16


def test_a_multi_token_head_with_taps() -> None:
    """The first, middle and last of the tapped blocks' outputs, normalised; of a frozen model three blocks, and nothing is added."""
    model = tiny.tiny(mtp_heads=1, mtp_taps=True, n_layer=8)
    head, h, e, taps = model.mtp_heads[0], torch.randn(5, 32), torch.randn(5, 32), torch.randn(5, 4, 32)
    assert torch.equal(head(h, e, taps), h)
    randomised(head)
    read = (h, e, taps[:, 0], taps[:, 2], taps[:, 3])
    a = torch.cat([x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() for x in read], -1) @ head.up.T
    assert_close(head(h, e, taps), h + (a * a.sigmoid()) @ head.down.T)
    outputs: list[torch.Tensor] = []
    for i in (2, 4, 5):
        model.blocks[i].register_forward_hook(lambda block, args, x: outputs.append(x))
    idx = tiny.ids(1, 9)
    _, tapped = model.prefix(idx)
    assert_close(tapped, torch.stack([x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() for x in outputs], dim=-2))
    assert torch.equal(model(idx), tiny.tiny(n_layer=8)(idx))


def test_a_head_alone_is_trained_behind_a_frozen_model() -> None:
    model = tiny.tiny(value_head="mlp")
    mark_only_lora_as_trainable(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter_parameters(model)) == {f"value_head.{name}" for name in ("up", "shift", "weight", "bias")}
    assert model.cut == model.config.n_layer + 1


def test_a_head_leaves_the_logits_alone_and_cannot_be_merged() -> None:
    plain, model, idx = tiny.tiny(), tiny.tiny(value_head="linear"), tiny.ids(1, 9)
    assert torch.equal(plain(idx), model(idx))
    with pytest.raises(UserError, match="value_head or mtp_heads cannot be merged"):
        merge_lora_weights(model)


def test_wrong_settings() -> None:
    with pytest.raises(
        UserError, match="mtp_taps needs heads that read them: set mtp_heads to 1 or more, also in a sweep with grid.mtp_heads"
    ):
        tiny.tiny(mtp_taps=True, lora_r=2, skip2lora_enabled=True)
    with pytest.raises(UserError, match="mtp_taps is for mtp_heads that are trained alone or with Skip2-LoRA"):
        tiny.tiny(mtp_taps=True, mtp_heads=1, lora_r=2, lora_query=True)
    with pytest.raises(UserError, match="mtp_heads is 99: a whole number from 0 to 16"):
        tiny.tiny(mtp_heads=99)
    with pytest.raises(UserError, match="value_head is 'deep': choose 'linear' or 'mlp'"):
        tiny.tiny(value_head="deep")
