"""DoRA and rsLoRA against PEFT, from the base bit for bit to merged weights, and over quantised layers."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from litgpt import lora
from litgpt.adapters.base import adapter_parameters, renew_adapters
from litgpt.quantize import quantise
from tests.helpers import tiny
from tests.helpers.cases import quick
from tests.helpers.peft_names import PEFT_NAMES, PEFT_TO_LITGPT

PARAMETERS = {"lora_A": "lora_A", "lora_B": "lora_B", "lora_magnitude_vector": "lora_magnitude"}
IDX = tiny.ids(2, 20)


def under_our_names(model: Any, of: Any) -> dict[str, torch.Tensor]:
    """PEFT's parameters, or their gradients, under our names: q, k and v joined one below the other."""
    joined: dict[str, list[torch.Tensor]] = {}
    for name, value in model.named_parameters():
        parts = name.split(".")
        kind = next((part for part in parts if part in PARAMETERS), None)
        if kind is not None:
            layer = parts[parts.index(kind) - 1]
            block = f"transformer.h.{parts[parts.index('layers') + 1]}." if "layers" in parts else ""
            place = "lm_head" if layer == "lm_head" else block + PEFT_TO_LITGPT.get(layer, "attn.qkv")
            joined.setdefault(f"{place}.{PARAMETERS[kind]}", []).append(of(value))
    return {name: torch.cat(values) for name, values in joined.items()}


def pair(flags: tuple[str, ...], **settings: Any) -> tuple[Any, Any]:
    """PEFT's model and ours with the same weights, r 4 and alpha 10."""
    hf = tiny.hf_llama()
    ours = tiny.from_hf(hf, lora_r=4, lora_alpha=10, **dict.fromkeys(flags, True), **settings)
    renew_adapters(ours)
    lora.mark_only_lora_as_trainable(ours)
    targets = [name for flag in flags for name in PEFT_NAMES[flag]]
    kinds = {"use_dora": settings.get("lora_variant") == "dora", "use_rslora": settings.get("lora_rslora", False)}
    theirs: Any = peft.get_peft_model(hf, peft.LoraConfig(r=4, lora_alpha=10, target_modules=targets, lora_dropout=0.0, **kinds)).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in theirs.named_parameters():
        if "lora_magnitude" in name:
            parameter.data = parameter.data * (1 + 0.3 * torch.randn(parameter.shape, generator=generator))
        elif "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    given = under_our_names(theirs, lambda value: value.detach())
    own = adapter_parameters(ours)
    assert {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in given.items()}
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(value)
    return theirs, ours


def loss(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDX[:, 1:].flatten())


def curve(model: Any, optimizer: torch.optim.Optimizer, logits: Any, steps: int = 4) -> list[float]:
    """The losses of an optimizer's steps."""
    losses = []
    for _ in range(steps):
        value = loss(logits(model))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize(
    "flags", [("lora_query", "lora_value"), ("lora_key",), ("lora_projection", "lora_mlp"), tuple(PEFT_NAMES)], ids="+".join
)
@pytest.mark.parametrize("variant", quick(["dora", "rslora", "dora and rslora"], "dora and rslora"))
def test_logits_and_gradients_are_pefts(flags: tuple[str, ...], variant: str) -> None:
    theirs, ours = pair(flags, lora_variant="dora" if "dora" in variant else "lora", lora_rslora="rslora" in variant)
    want = theirs(IDX).logits
    assert_close(ours(IDX), want, rtol=1e-3, atol=1e-4)
    loss(want).backward()
    loss(ours(IDX)).backward()
    own = adapter_parameters(ours)
    for name, value in under_our_names(theirs, lambda value: value.grad).items():
        assert own[name].grad is not None and value.abs().max() > 0
        assert_close(own[name].grad, value, rtol=1e-3, atol=1e-5)


def test_a_layer_with_a_bias_is_pefts() -> None:
    """One layer, with its bias, in logits and gradients; and what PEFT starts its magnitude with."""
    torch.manual_seed(1)
    plain = torch.nn.Sequential(torch.nn.Linear(12, 9))
    ours = lora._with_variant(lora.LoRALinear, "dora")(12, 9, r=3, lora_alpha=5, linear=torch.nn.Linear(12, 9))
    ours.linear.load_state_dict(plain[0].state_dict())
    ours.reset_parameters()
    theirs: Any = peft.get_peft_model(plain, peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0"], use_dora=True))
    layer = theirs.base_model.model[0]
    assert torch.equal(ours.lora_magnitude, layer.lora_magnitude_vector["default"].weight)
    with torch.no_grad():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
        ours.lora_A.copy_(layer.lora_A["default"].weight)
        ours.lora_B.copy_(layer.lora_B["default"].weight)
    x = torch.randn(7, 12)
    assert_close(ours(x), theirs(x))
    for model in (ours, theirs):
        model(x).square().sum().backward()
    assert_close(ours.lora_magnitude.grad, layer.lora_magnitude_vector["default"].weight.grad)
    assert_close(ours.lora_A.grad, layer.lora_A["default"].weight.grad)
    assert_close(ours.lora_B.grad, layer.lora_B["default"].weight.grad)


def dora(**settings: Any) -> Any:
    model = tiny.tiny(lora_r=3, lora_alpha=5, lora_variant="dora", **settings)
    renew_adapters(model)
    return model


@pytest.mark.parametrize("flags", [tiny.ALL_LORA, {"lora_key": True}], ids=["all", "key"])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_it_starts_at_the_base_bit_for_bit_and_merges(flags: dict[str, bool], bias: bool) -> None:
    shape = {"mlp_class_name": "GptNeoxMLP", "norm_class_name": "LayerNorm", "bias": True} if bias else {}
    model, plain = dora(**shape, **flags), tiny.tiny(**shape)
    assert torch.equal(model(IDX), plain(IDX))
    tiny.move_adapters(model)
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("magnitude"):
            parameter.abs_().add_(1)
    moved = model(IDX)
    assert (moved - plain(IDX)).abs().max() > 0.05
    lora.merge_lora_weights(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert_close(model(IDX), moved, rtol=1e-4, atol=5e-5)


def test_the_norms_follow_every_change() -> None:
    """They are kept between passes without gradients, not beyond a step, a load or a new base."""
    model = dora(lora_query=True, lora_mlp=True)
    lora.mark_only_lora_as_trainable(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    layer = model.transformer.h[0].mlp.fc_1
    for _ in range(3):
        with torch.inference_mode():
            model(IDX)
            assert layer.norms() is layer.norms()
        loss(model(IDX)).backward()
        optimizer.step()
        with torch.no_grad():
            assert torch.equal(layer.norms(), torch.linalg.vector_norm(layer.linear.weight + layer.up() @ layer.lora_A, dim=1))
    other = dora(lora_query=True, lora_mlp=True, seed=2)
    with torch.no_grad():
        other(IDX)
        assert not torch.equal(other(IDX), model(IDX))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(IDX), model(IDX))
        layer.linear.weight.mul_(2)
        other.transformer.h[0].mlp.fc_1.linear.weight.data = layer.linear.weight.data.clone()
        assert torch.equal(other(IDX), model(IDX))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_over_quantised_layers(dtype: torch.dtype) -> None:
    """The rows of the dequantised weight take the lengths of the base's; gradients reach m, A and B."""
    model = dora(lora_query=True, lora_projection=True, lora_mlp=True)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if name in adapter_parameters(model) else parameter.data.to(dtype)
    quantise(model, "int8")
    lora.mark_only_lora_as_trainable(model)
    plain = tiny.tiny().to(dtype)
    quantise(plain, "int8")
    with torch.no_grad():
        apart = (model(IDX) - plain(IDX)).abs().mean() / plain(IDX).abs().mean()
    assert apart < 0.02
    model.train()
    loss(model(IDX).float()).backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(model).values())


def test_a_row_of_zeros_stays() -> None:
    """Many output layers have some, of tokens that are not used. They made every logit's probability, and the loss, nan."""
    ours, plain = tiny.tiny(lora_r=4, lora_variant="dora", **tiny.ALL_LORA), tiny.tiny()
    for layer in (ours.head, plain.head):
        layer.weight.data[7] = 0.0
    renew_adapters(ours)
    lora.mark_only_lora_as_trainable(ours)
    assert torch.equal(ours(IDX), plain(IDX))
    optimizer = torch.optim.SGD(lora.get_lora_parameters(ours), lr=0.1)
    for _ in range(3):
        F.cross_entropy(ours(IDX).flatten(0, 1), IDX.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        want = ours(IDX)
        assert want.isfinite().all() and not want[..., 7].any() and (want - plain(IDX)).abs().max() > 0.01
        lora.merge_lora_weights(ours)
        assert_close(ours(IDX), want, rtol=1e-4, atol=1e-4)
