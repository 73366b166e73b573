"""LoRA and Skip2-LoRA on every family: nothing changes while B is zero, exact gradients, merge, cached decoding, cached activations."""

from __future__ import annotations

import copy
import itertools
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from litgpt.activations.cache import ActivationCache, CacheSettings, Recompute, activations
from litgpt.lora import LoRALinear, LoRAQKVLinear, lora_filter, mark_only_lora_as_trainable, merge_lora_weights
from litgpt.loss import HeadLoss
from litgpt.sample import Sample
from tests.helpers import family_configs as configs, tiny
from tests.helpers.cases import quick

CPU = torch.device("cpu")
LORA: dict[str, Any] = {"lora_r": 3, "lora_alpha": 5, **tiny.ALL_LORA}
SKIP: dict[str, Any] = {"skip2lora_enabled": True, "skip2lora_block_indices": [0, 1], "lora_r": 3, "lora_alpha": 5}
SKIPS: dict[str, dict[str, Any]] = {
    "lm_head": SKIP,
    "ln_f": {**SKIP, "skip2lora_output_layer": "transformer.ln_f", "skip2lora_norm": "none"},
    "block": {**SKIP, "skip2lora_output_layer": "transformer.h.2"},
}
TAILS: dict[str, dict[str, Any]] = {**SKIPS, "block": {**SKIPS["block"], **tiny.ALL_LORA}}
"""with LoRA behind the cut too"""
families = pytest.mark.parametrize("family", quick(configs.FAMILIES, "llama 3.1", "mixtral", "gemma2", "deepseek_v2", "gpt2"))
IDX = tiny.ids(2, 24)


def loss_of(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDX[:, 1:].flatten())


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the adapters, with values as if trained."""
    mark_only_lora_as_trainable(tiny.move_adapters(model, size=0.2))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(loss: torch.Tensor, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Zero where an expert got no token."""
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True), strict=True))


def decoded(model: Any) -> torch.Tensor:
    """IDX's logits through the key/value cache."""
    model.set_kv_cache(2, 24)
    ends = [0, 11, 15, 16, 17, 24]
    if model.config.rope_kind == "longrope":  # the key/value cache holds keys of either the short or the long factors
        ends = [0, 17, 18, 24]
    pieces = [model(IDX[:, start:end], torch.arange(start, end), end) for start, end in itertools.pairwise(ends)]
    model.clear_kv_cache()
    return torch.cat(pieces, dim=1)


# --- LoRA ---


@families
def test_lora_gradients_are_those_of_the_merged_weights(family: str) -> None:
    """With W' = W + s B A and G the loss's gradient for W': dA = s B^T G and dB = s G A^T, part by part for q, k and v."""
    model = configs.ours(family, **LORA)
    with torch.no_grad():
        assert torch.equal(model(IDX), configs.ours(family)(IDX))  # B is zero
    adapters = trained(model)
    logits = model(IDX)
    got = gradients(loss_of(logits), adapters)
    layers = {name: module for name, module in copy.deepcopy(model).named_modules() if isinstance(module, LoRALinear)}

    merge_lora_weights(model)
    assert model.state_dict().keys() == configs.pair(family)[2].keys()
    base = configs.ours(family)
    base.load_state_dict(model.state_dict())
    merged = base(IDX)
    assert (merged - logits).abs().max() < 1e-5 * merged.abs().max().clamp_min(1.0)
    assert (merged - configs.ours(family)(IDX)).abs().max() > 0.1

    weights = dict(base.named_parameters())
    kept = {name: weights[f"{name}.weight"] for name in layers}
    whole = gradients(loss_of(merged), kept)
    assert set(got) == {f"{name}.lora_{which}" for name in layers for which in "AB"}
    for name, layer in layers.items():
        parts = [size for size, _ in layer.parts] if isinstance(layer, LoRAQKVLinear) else (layer.linear.out_features,)
        a, b, g = layer.lora_A.split(layer.r), layer.lora_B.split(parts), whole[name].split(parts)
        want_a = torch.cat([layer.scaling * b.T @ g for b, g in zip(b, g, strict=True)])
        want_b = torch.cat([layer.scaling * g @ a.T for a, g in zip(a, g, strict=True)])
        for which, want in (("A", want_a), ("B", want_b)):
            assert want.abs().max() > 0 or ".experts." in name
            assert_close(got[f"{name}.lora_{which}"], want, rtol=1e-3, atol=1e-6 + 1e-4 * want.abs().max().item())


@families
@torch.no_grad()
def test_lora_cached_decoding(family: str) -> None:
    model = configs.ours(family, **LORA)
    trained(model)
    want = model(IDX)
    assert (decoded(model) - want).abs().max() < 1e-5 * want.abs().max().clamp_min(1.0)


# --- Skip2-LoRA ---


@contextmanager
def hooked(hf: Any, model: Any, adapters: dict[str, torch.nn.Parameter]) -> Iterator[None]:
    """Within it the transformers model has the same Skip2-LoRA adapters: hooks take blocks' outputs and add s to the cut's input."""
    config = model.config
    blocks = next(module for module in hf.modules() if isinstance(module, torch.nn.ModuleList))
    head = hf.get_output_embeddings()
    kind = type(next(m for m in hf.modules() if type(m).__name__.endswith("Norm")))
    norm = [module for module in hf.modules() if type(module) is kind or isinstance(module, torch.nn.LayerNorm)][-1]
    targets = {config.n_layer + 1: head, config.n_layer: norm, 2: blocks[2]}
    outputs: dict[int, torch.Tensor] = {}

    def keep(index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            outputs[index] = output[0] if isinstance(output, tuple) else output

        return hook

    def add(module: Any, args: Any) -> Any:
        s = torch.zeros(())
        for index in config.taps:
            x = outputs[index].detach()
            if config.skip2lora_norm == "rms":
                x = x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
            a, b = (adapters[f"transformer.h.{index}.skip2lora.lora_{which}"] for which in "AB")
            s = s + 5 / 3 * x @ a.T @ b.T
        return (args[0] + s, *args[1:])

    handles = [blocks[index].register_forward_hook(keep(index)) for index in config.taps]
    handles.append(targets[config.cut].register_forward_pre_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("cut", quick(SKIPS, "ln_f", "block"))
@families
def test_skip2lora_against_hooks_on_transformers(family: str, cut: str) -> None:
    """Logits and gradients, and nothing while B is zero."""
    hf, _, _ = configs.pair(family)
    model = configs.ours(family, **SKIPS[cut])
    with torch.no_grad():
        assert torch.equal(model(IDX), configs.ours(family)(IDX))
    adapters = trained(model)
    assert len(adapters) == 4
    logits = model(IDX)
    with hooked(hf, model, adapters):
        want = hf(IDX).logits
    spread = want.std().clamp_min(1.0)
    assert (logits - want).abs().max() < 2e-5 * spread
    assert (want - configs.ours(family)(IDX)).abs().max() > 0.1
    expected = gradients(loss_of(want), adapters)
    for name, gradient in gradients(loss_of(logits), adapters).items():
        assert expected[name].abs().max() > 0
        assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        assert (decoded(model) - logits).abs().max() < 1e-5 * spread


# --- cached activations ---


def make_samples() -> list[Sample]:
    """They begin with the same 9 tokens (more than a window) and carry loss at about half of the others."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randint(101, (9,), generator=generator).tolist()
    samples = []
    for number, length in enumerate((19, 30, 12)):
        rest = torch.randint(101, (length - 9,), generator=generator)
        rest[0] = number
        mask = torch.randint(2, (length,), generator=generator)
        mask[0], mask[length // 2] = 0, 1
        samples.append(Sample(array("i", common + rest.tolist()), bytearray(mask.tolist())))
    return samples


def batch_loss(model: Any, source: Any, rows: list[int]) -> torch.Tensor:
    """As in the training loop."""
    features = source(rows)
    hidden = model.tail(features.x, features.taps, features.pos)
    hidden = hidden if features.at is None else hidden[features.at]
    head = HeadLoss(model.lm_head, model.config.logits_scaling, model.config.final_logit_softcapping)
    return head(hidden, features.targets)


@pytest.mark.parametrize("cut", quick(TAILS, "block"))
@families
def test_a_cached_step_is_an_uncached_one(family: str, cut: str) -> None:
    """Loss and gradients from cached activations, from recomputed ones, and by torch's cross-entropy from the logits of one sample at a
    time."""
    model = configs.ours(family, **TAILS[cut])
    adapters, samples = trained(model), make_samples()
    cache = activations(model, samples, range(3), "", CacheSettings("memory", Path(), torch.float32), CPU)
    assert isinstance(cache, ActivationCache)
    expected = torch.zeros(())
    for i in (0, 2):
        ids, at = torch.tensor(samples[i].input_ids).long(), torch.tensor(list(samples[i].loss_mask[1:])).bool()
        expected = expected + F.cross_entropy(model(ids[None])[0, :-1][at], ids[1:][at], reduction="sum")
    wanted = gradients(expected, adapters)
    for source in (cache, Recompute(model, samples, CPU)):
        loss = batch_loss(model, source, [0, 2])
        assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        for name, gradient in gradients(loss, adapters).items():
            assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-6 + 1e-4 * wanted[name].abs().max().item())


# --- what there is to train ---


def test_adapter_keys_are_the_base_layers() -> None:
    """Linear layers of attention, MLP, experts, router and head have keys with lora_A and lora_B, as LitGPT names them."""
    for family in configs.FAMILIES:
        keys = configs.ours(family, **LORA).state_dict().keys()
        matrices = {
            name.removesuffix(".weight")
            for name, weight in configs.pair(family)[2].items()
            if weight.dim() == 2 and not name.startswith(("transformer.wte", "transformer.wpe"))
        }
        assert {key for key in keys if lora_filter(key)} == {f"{name}.lora_{which}" for name in matrices for which in "AB"}
    mixture = configs.ours("mixtral", **LORA).state_dict()
    assert mixture["transformer.h.0.mlp.experts.1.fc_1.lora_A"].shape == (3, 32)
    assert mixture["transformer.h.0.mlp.gate.lora_B"].shape == (4, 3)
