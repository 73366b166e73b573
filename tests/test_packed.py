"""Packed weights give what plain ones give, up to rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from litgpt import packed as packing
from litgpt.activations.cache import fingerprint, plan
from litgpt.lora import GPT, mark_only_lora_as_trainable
from litgpt.loss import HeadLoss
from litgpt.packed import ROWS, Packed, Packed8, PackedHead, PackedLinear, is_supported, multiplies_8_bits, pack, unpack
from litgpt.quantize import Int8Linear, is_quantised, quantise
from tests.helpers import tiny
from tests.helpers.cases import quick
from tests.helpers.family_configs import FAMILIES, ours
from tests.helpers.training import SKIP, make_model, make_samples

pytestmark = pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="x86 with AVX2 only")
IDX = tiny.ids(2, 9)
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not is_supported(torch.bfloat16), reason="no bf16 here"))]


def rounded(model: GPT) -> GPT:
    """Return the model with the weights of a bf16 checkpoint, frozen."""
    for parameter in model.requires_grad_(False).parameters():
        parameter.copy_(parameter.bfloat16())
    return model


def packed(model: GPT, backward: bool = False) -> GPT:
    pack(model, backward)
    assert isinstance(model.head, PackedHead) and any(isinstance(module, PackedLinear) for module in model.modules())
    return model


@torch.inference_mode()
def require_equal(model: GPT, plain: GPT) -> None:
    for idx in (IDX, IDX[:1, :1]):
        torch.testing.assert_close(model(idx), plain(idx), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def require_near(model: GPT, plain: GPT) -> None:
    """Both compute in bf16: neither is further from the same weights in fp32 than roundings are."""
    exact = copy.deepcopy(plain).float()(IDX)
    errors = [torch.linalg.vector_norm(each(IDX).float() - exact) / torch.linalg.vector_norm(exact) for each in (model, plain)]
    assert errors[0] <= 1.5 * errors[1] < 0.05


@pytest.mark.parametrize("family", quick(FAMILIES, "llama", "gpt2", "mixtral", "deepseek_v2", "bloom"))
def test_every_family(family: str) -> None:
    require_equal(packed(rounded(ours(family))), rounded(ours(family)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma", "bloom"])
@pytest.mark.skipif(not is_supported(torch.bfloat16), reason="no bf16 here")
def test_bf16(family: str) -> None:
    model, plain = rounded(ours(family)).bfloat16(), rounded(ours(family)).bfloat16()
    require_near(packed(model), plain)
    unpack(model)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_adapters_around_packed_layers(variant: str) -> None:
    settings = {"lora_r": 3, "lora_variant": variant, **tiny.ALL_LORA}
    model, plain = (rounded(tiny.move_adapters(tiny.tiny(**settings))) for _ in range(2))
    require_equal(packed(model), plain)
    torch.testing.assert_close(model.blocks[0].mlp.fc_1.merged(), plain.blocks[0].mlp.fc_1.merged())


def test_an_adapted_copy_shares_the_blocks() -> None:
    base = packed(rounded(tiny.tiny()))
    model = copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})
    config = tiny.tiny(lora_r=3, **tiny.ALL_LORA | {"lora_head": False}).config
    model.adapt(config)
    pack(model)
    assert model.blocks[0].mlp.proj.linear.packed is base.blocks[0].mlp.proj.packed and model.head.packed is base.head.packed
    require_equal(model, rounded(tiny.tiny()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", [{"lora_r": 3, **tiny.ALL_LORA}, {"lora_r": 3, "lora_variant": "dora", "lora_query": True}, SKIP])
def test_training_has_the_gradients_of_plain_weights(settings: dict[str, Any], dtype: torch.dtype) -> None:
    gradients, tolerance = [], (1e-4, 1e-6)
    if dtype == torch.bfloat16:  # in which only the layers in front of the cut are packed
        settings, tolerance = settings | ({} if settings is SKIP else {"lora_block_indices": [1]}), (0.05, 2e-3)
    for is_packed in (False, True):
        model = rounded(tiny.move_adapters(tiny.tiny(**settings)))
        mark_only_lora_as_trainable(model)
        for parameter in model.parameters():
            parameter.data = parameter if parameter.requires_grad else parameter.to(dtype)
        if is_packed:
            packed(model, backward=True)
        idx = IDX[:, :-1]
        hidden = model.tail(*model.prefix(idx), model.positions(idx))
        HeadLoss.of(model)(hidden.flatten(0, 1), IDX[:, 1:].flatten()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0] and gradients[1].keys() == gradients[0].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=tolerance[0], atol=tolerance[1])


def test_weights_come_back_bit_for_bit() -> None:
    model, plain = rounded(tiny.tiny(lora_r=3, **tiny.ALL_LORA)), rounded(tiny.tiny(lora_r=3, **tiny.ALL_LORA))
    for each in (model, plain):
        each.blocks[1].mlp.proj.linear.weight[0] *= 2.0**-20  # below what fp16 has
    packed(model)
    names = {name.replace("linear.", "") for name in plain.state_dict()}
    assert {name.replace("linear.", "") for name in model.state_dict()} == names
    unpack(model)
    assert type(model.head) is nn.Linear and not any(isinstance(module, PackedLinear) for module in model.modules())
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_cache_does_not_depend_on_packing() -> None:
    keys, samples = set(), make_samples(6)
    for prepare in (rounded, lambda model: packed(rounded(model))):
        model = prepare(make_model("block"))
        keys.add(fingerprint(model, samples, plan(model, samples, range(len(samples)), torch.float32), torch.device("cpu")))
    assert len(keys) == 1


@pytest.mark.parametrize("change", [1 + 2.0**-14, 1e5, float("nan")])
def test_weights_that_fp16_cannot_hold_stay_plain(change: float) -> None:
    model = rounded(tiny.tiny())
    weight = model.blocks[0].mlp.proj.weight
    weight *= change
    pack(model)
    assert type(model.blocks[0].mlp.proj) is nn.Linear and isinstance(model.blocks[0].mlp.fc_1, PackedLinear)
    with pytest.raises(ValueError):
        Packed(weight)


def test_what_is_trained_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes, blocks = rounded(tiny.tiny()), list[tuple[int, ...]](), packing._layout
    monkeypatch.setattr(packing, "_layout", lambda weight, bias=None: (shapes.append(tuple(weight.shape)), blocks(weight, bias))[1])
    model.head.weight.requires_grad_(True)
    model.blocks[0].mlp.fc_1.weight.requires_grad_(True)
    pack(model, backward=True)
    assert type(model.head) is nn.Linear and type(model.blocks[0].mlp.fc_1) is nn.Linear
    assert isinstance(model.blocks[0].mlp.fc_2, PackedLinear)
    assert shapes and not any(101 in shape for shape in shapes)  # no work for the head


@pytest.mark.skipif(not is_supported(torch.bfloat16), reason="no bf16 here")
def test_bf16_layers_that_learn_stay_plain() -> None:
    model = rounded(tiny.tiny(lora_r=3, **tiny.ALL_LORA, lora_block_indices=[1])).bfloat16()
    mark_only_lora_as_trainable(model)
    packed(model, backward=True)
    assert isinstance(model.blocks[0].mlp.proj, PackedLinear) and type(model.blocks[1].mlp.proj.linear) is nn.Linear


@pytest.mark.skipif(not is_supported(torch.bfloat16), reason="no bf16 here")
def test_a_large_output_layer_is_packed_for_its_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, blocks = list[tuple[int, ...]](), packing._layout
    monkeypatch.setattr(packing, "_layout", lambda weight, bias=None: (shapes.append(tuple(weight.shape)), blocks(weight, bias))[1])
    model, plain = (rounded(tiny.tiny()).bfloat16() for _ in range(2))
    shape, results = tuple(model.head.weight.shape), []
    monkeypatch.setattr(packing, "LARGE", model.head.weight.numel() - 1)
    pack(model, backward=True)
    assert shape not in shapes and shape[::-1] in shapes
    for each in (model, plain):
        hidden = torch.randn(7, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_(True)
        loss = HeadLoss.of(each)(hidden, IDX.flatten()[:7])
        loss.backward()
        results.append((loss.detach(), hidden.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0.02, atol=1e-4)
    unpack(model)
    assert torch.equal(model.head.weight, plain.head.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_stay_as_they_are(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = tiny.tiny().to(dtype)
    pack(model)
    assert not any(isinstance(module, PackedHead | PackedLinear) for module in model.modules())


@pytest.mark.skipif(not multiplies_8_bits(), reason="no exact products of 8 bits here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_8_bits_have_15_bits_of_x(dtype: torch.dtype, bias: bool) -> None:
    """Rows of very different sizes, outliers in a row, rows of zeros, and more rows than are multiplied at once."""
    layer = Int8Linear(nn.Linear(72, 40, bias, dtype=dtype).requires_grad_(False))
    both = PackedLinear(layer, Packed8(layer))
    for rows in (0, 1, 5, ROWS + 3):
        x = (torch.randn(2, rows, 72) * 10 ** torch.empty(2, rows, 1).uniform_(-6, 6)).to(dtype)
        x[:, :1, 7] *= 50
        x[1, 2:3] = 0
        exact = x.double() @ (layer.quantised.double() * layer.scales.double()[:, None]).t()
        exact += 0 if layer.bias is None else layer.bias.double()
        error = (both(x).double() - exact).abs() / exact.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        assert both(x).dtype == dtype and (not rows or error.max() < (5e-4 if dtype == torch.float32 else 5e-3))
    assert not both(torch.full((1, 72), float("nan"), dtype=dtype)).isfinite().any()
    x = torch.randn(3, 72, dtype=dtype, requires_grad=True)
    (found,), (expected,) = (torch.autograd.grad(each(x).square().sum(), x) for each in (both, layer))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-1 if dtype == torch.bfloat16 else 1e-2)
    assert torch.equal(both.dense(dtype), layer.dense(torch.float32).to(dtype))
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in both.state_dict().items())


@pytest.mark.skipif(not multiplies_8_bits(), reason="no exact products of 8 bits here")
def test_a_model_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large layers are packed, if the processor can and no gradients are needed. They stay quantised."""
    plain = ours("llama")
    quantise(plain, "int8")
    every = sum(isinstance(module, Int8Linear) for module in plain.modules())
    for able, backward, large, count in (
        (True, False, 1, 0),
        (True, True, 1, every),
        (False, False, 1, every),
        (True, False, 2**22, every),
    ):
        monkeypatch.setattr(packing, "multiplies_8_bits", lambda able=able: able)
        monkeypatch.setattr(packing, "LARGE8", large)
        pack(model := copy.deepcopy(plain), backward)
        assert sum(isinstance(module, Int8Linear) for module in model.modules()) == count
        torch.testing.assert_close(model(IDX), plain(IDX), rtol=1e-3, atol=1e-3)
        unpack(model)
        assert is_quantised(model) and model.state_dict().keys() == plain.state_dict().keys()
