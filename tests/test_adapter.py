"""LLaMA-Adapter v1 and v2: LitGPT's logits and keys, the formulas, caching of prompts."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch

from litgpt import adapter, adapter_v2
from litgpt.adapters.base import adapter_parameters
from tests.helpers import tiny

IDS = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(7))
LITGPT: dict[Any, list[float]] = {  # logits [1, -1, :6] of LitGPT 0.5.13 for the weights of `named`
    adapter: [-0.55101, 0.09531, 0.54543, -0.59686, -0.03735, -0.69972],
    adapter_v2: [-0.14966, -0.11872, -0.00251, 0.12412, 0.01368, -0.00384],
}
LINEAR = ("attn.qkv", "attn.proj", "mlp.fc_1", "mlp.fc_2", "mlp.proj")


def named(built: torch.nn.Module) -> Any:
    """Give every parameter values that its name determines."""
    for name, parameter in built.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        scale = 1.2 * parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return built.eval()


@torch.no_grad()
@pytest.mark.parametrize("module", LITGPT)
def test_logits_are_litgpts(module: Any) -> None:
    built = named(module.GPT(module.Config(**tiny.TINY)))
    assert built(IDS)[1, -1, :6].tolist() == pytest.approx(LITGPT[module], abs=1e-4)


@pytest.mark.parametrize("module", LITGPT)
def test_keys_are_litgpts(module: Any) -> None:
    built = module.GPT(module.Config(**tiny.TINY))
    expected = {f"transformer.h.{i}.attn.{name}" for i in (2, 3, 4) for name in ("adapter_wte.weight", "gating_factor")}
    if module is adapter_v2:
        linear = ["lm_head", *(f"transformer.h.{i}.{name}" for i in range(5) for name in LINEAR)]
        expected |= {f"{name}.adapter_{part}" for name in linear for part in ("bias", "scale")}
        expected |= {f"transformer.h.{i}.norm_{n}.weight" for i in range(5) for n in (1, 2)} | {"transformer.ln_f.weight"}
    assert set(adapter_parameters(built)) == expected
    assert {name for name in built.state_dict() if module.adapter_filter(name, None)} == expected
    module.mark_only_adapter_as_trainable(built)
    assert {name for name, parameter in built.named_parameters() if parameter.requires_grad} == expected


@torch.no_grad()
@pytest.mark.parametrize("module", LITGPT)
def test_untrained_it_is_the_base(module: Any) -> None:
    """Gates, biases and scales add nothing at first, whatever the prompts are."""
    base = tiny.tiny()
    built = module.GPT(module.Config(**tiny.TINY)).eval()
    missing, unknown = built.load_state_dict(dict(base.state_dict()), strict=False)
    assert not unknown and all(module.adapter_filter(name) for name in missing)
    assert torch.equal(built(IDS), base(IDS))


@torch.no_grad()
def test_attention_over_the_prompt() -> None:
    """y = proj(attention(q, k, v) + g attention(q, k', v')), written out for one key/value head a query head."""
    settings = {**tiny.TINY, "n_query_groups": 4, "rotary_percentage": 0.0}
    built = named(adapter.GPT(adapter.Config(**settings, adapter_prompt_length=3, adapter_start_layer=0)))
    attention, x = built.blocks[1].attn, torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
    got = attention(x, built.positions(IDS[:1, :6]))
    q, k, v = ((x[0] @ part.T).view(6, 4, 8) for part in attention.qkv.weight.split(32))
    rows = (attention.adapter_wte.weight @ attention.qkv.weight.T).view(3, 4, 3, 8)  # as LitGPT reads them
    expected = torch.zeros(6, 4, 8)
    for head in range(4):
        for t in range(6):
            p = (k[: t + 1, head] @ q[t, head] / 8**0.5).softmax(0)
            g = (rows[:, head, 1] @ q[t, head] / 8**0.5).softmax(0)
            expected[t, head] = p @ v[: t + 1, head] + attention.gating_factor[0, 0, head, 0] * (g @ rows[:, head, 2])
    torch.testing.assert_close(got[0], expected.flatten(1) @ attention.proj.weight.T)


@torch.no_grad()
@pytest.mark.parametrize("module", LITGPT)
def test_prompts_are_computed_once(module: Any) -> None:
    built = named(module.GPT(module.Config(**tiny.TINY)))
    calls: list[int] = []
    qkv = built.blocks[3].attn.qkv
    qkv.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].size(-2)))
    whole = built(IDS)
    built.set_kv_cache(2)
    parts = [built(IDS[:, :5], torch.arange(5)), *(built(IDS[:, i : i + 1], torch.tensor([i])) for i in range(5, 9))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    assert calls.count(10) == 1, "the prompt of 10 positions went through qkv once"
    built.blocks[3].attn.adapter_wte.weight += 1
    built.train()
    built.eval()
    assert not torch.equal(built(IDS), whole), "changed weights are seen"


def test_gradients_reach_all_and_only_adapters() -> None:
    for module in LITGPT:
        built = named(module.GPT(module.Config(**tiny.TINY))).train()
        module.mark_only_adapter_as_trainable(built)
        built(IDS).logsumexp(-1).sum().backward()
        for name, parameter in built.named_parameters():
            assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == module.adapter_filter(name), name


def test_older_gates() -> None:
    built = adapter.GPT(adapter.Config(**tiny.TINY))
    state = dict(built.state_dict())
    gates = torch.randn(1, 4, 1, 1)
    state["transformer.h.3.attn.gating_factor"] = gates
    built.load_state_dict(state)
    assert torch.equal(built.blocks[3].attn.gating_factor.flatten(), gates.flatten())


@pytest.mark.parametrize(("setting", "value"), [("adapter_prompt_length", 0), ("adapter_start_layer", 5), ("adapter_start_layer", -1)])
def test_mistakes(setting: str, value: int) -> None:
    with pytest.raises(Exception, match=setting):
        adapter.Config(**tiny.TINY, **{setting: value})
