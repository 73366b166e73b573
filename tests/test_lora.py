"""LoRA against PEFT, Skip2-LoRA against plain matrices, the frozen prefix, closed-form counts, and what each setting refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch.testing import assert_close

from litgpt import lora, model as base_model
from litgpt.errors import UserError
from litgpt.lora import LoRALinear, LoRAQKVLinear, Skip2LoRA, lora_filter, mark_only_lora_as_trainable, merge_lora_weights
from tests.helpers import tiny
from tests.helpers.cases import first, quick
from tests.helpers.peft_names import PEFT_NAMES, PEFT_TO_LITGPT

OUTPUT_LAYERS = ("lm_head", "transformer.ln_f", "transformer.h.3")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def skip(**settings: Any) -> Any:
    """A tiny Skip2-LoRA model with taps 0 and 2 unless said otherwise."""
    return tiny.tiny(**{"skip2lora_enabled": True, "skip2lora_block_indices": [0, 2], "lora_r": 3, "lora_alpha": 5, **settings})


def trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss(model: Any, idx: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(idx)[:, :-1].flatten(0, 1), idx[:, 1:].flatten())


# --- LoRA ---


def adapters_from_peft(model: Any) -> dict[str, torch.Tensor]:
    """PEFT's A and B under LitGPT's names: q, k and v joined one below the other."""
    found: dict[str, torch.Tensor] = {}
    for which in ("A", "B"):
        for name, value in model.named_parameters():
            parts = name.split(".")
            if f"lora_{which}" not in parts:
                continue
            layer = parts[parts.index(f"lora_{which}") - 1]
            block = f"transformer.h.{parts[parts.index('layers') + 1]}" if "layers" in parts else ""
            if layer == "lm_head":
                found[f"lm_head.lora_{which}"] = value
            elif layer in PEFT_TO_LITGPT:
                found[f"{block}.{PEFT_TO_LITGPT[layer]}.lora_{which}"] = value
            else:  # PEFT lists q, k, v in this order
                key = f"{block}.attn.qkv.lora_{which}"
                found[key] = torch.cat((found[key], value)) if key in found else value
    return found


@pytest.mark.parametrize(
    "flags",
    [
        ("lora_query", "lora_value"),
        ("lora_key",),
        ("lora_value",),
        ("lora_query", "lora_key", "lora_value"),
        ("lora_projection",),
        ("lora_mlp",),
        ("lora_head",),
        tuple(PEFT_NAMES),
    ],
    ids="+".join,
)
def test_lora_against_peft(flags: tuple[str, ...]) -> None:
    """Same logits, and the same gradients for A and B (and hence the same training)."""
    hf = tiny.hf_llama()
    ours = tiny.from_hf(hf, lora_r=4, lora_alpha=10, **dict.fromkeys(flags, True))
    plain = tiny.from_hf(hf)
    mark_only_lora_as_trainable(ours)
    targets = [name for flag in flags for name in PEFT_NAMES[flag]]
    theirs: Any = peft.get_peft_model(hf, peft.LoraConfig(r=4, lora_alpha=10, target_modules=targets, lora_dropout=0.0)).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    given = adapters_from_peft(theirs)
    own = trainable(ours)
    assert own.keys() == given.keys()
    for name, value in given.items():
        assert own[name].shape == value.shape
        own[name].data.copy_(value)

    idx = tiny.ids(2, 20)
    want = theirs(idx).logits
    assert_close(ours(idx), want, rtol=1e-3, atol=1e-4)
    assert (want - plain(idx)).abs().max() > 0.1
    F.cross_entropy(want[:, :-1].flatten(0, 1), idx[:, 1:].flatten()).backward()
    loss(ours, idx).backward()
    gradients = {}
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.grad
            gradients[name] = parameter
    for name, value in adapters_from_peft(theirs).items():
        assert own[name].grad is not None and value.abs().max() > 0
        assert_close(own[name].grad, value, rtol=1e-3, atol=1e-5)


def test_adapter_keys_and_shapes_are_litgpts() -> None:
    """d 32, q 32 rows, k and v 16, m 72, V 101, r 3."""
    model = tiny.tiny(n_layer=1, lora_r=3, **tiny.ALL_LORA)
    got = {name: tuple(value.shape) for name, value in model.state_dict().items() if lora_filter(name)}
    assert got == {
        "transformer.h.0.attn.qkv.lora_A": (3 * 3, 32),
        "transformer.h.0.attn.qkv.lora_B": (32 + 16 + 16, 3),
        "transformer.h.0.attn.proj.lora_A": (3, 32),
        "transformer.h.0.attn.proj.lora_B": (32, 3),
        "transformer.h.0.mlp.fc_1.lora_A": (3, 32),
        "transformer.h.0.mlp.fc_1.lora_B": (72, 3),
        "transformer.h.0.mlp.fc_2.lora_A": (3, 32),
        "transformer.h.0.mlp.fc_2.lora_B": (72, 3),
        "transformer.h.0.mlp.proj.lora_A": (3, 72),
        "transformer.h.0.mlp.proj.lora_B": (32, 3),
        "lm_head.lora_A": (3, 32),
        "lm_head.lora_B": (101, 3),
    }
    for flags, rows in {("query",): 32, ("key",): 16, ("query", "value"): 48, ("key", "value"): 32}.items():
        model = tiny.tiny(n_layer=1, lora_r=3, **{f"lora_{flag}": True for flag in flags})
        shapes = [tuple(value.shape) for name, value in model.named_parameters() if lora_filter(name)]
        assert shapes == [(3 * len(flags), 32), (rows, 3)]
    neox = tiny.tiny(n_layer=1, lora_r=3, lora_mlp=True, mlp_class_name="GptNeoxMLP", bias=True)
    assert {name for name in neox.state_dict() if lora_filter(name)} == {
        f"transformer.h.0.mlp.{layer}.lora_{which}" for layer in ("fc", "proj") for which in "AB"
    }


def test_skip2lora_keys_and_shapes() -> None:
    got = {name: tuple(value.shape) for name, value in skip().state_dict().items() if lora_filter(name)}
    assert got == {f"transformer.h.{i}.skip2lora.lora_{which}": shape for i in (0, 2) for which, shape in (("A", (3, 32)), ("B", (32, 3)))}


FLAG_SETS = [dict(zip(tiny.ALL_LORA, on, strict=True)) for on in product((True, False), repeat=6) if any(on)]


@pytest.mark.parametrize(
    "flags", quick(FLAG_SETS, *FLAG_SETS[::7]), ids=lambda flags: "+".join(name[5:] for name, on in flags.items() if on)
)
@torch.inference_mode()
def test_merged_equals_unmerged(flags: dict[str, bool]) -> None:
    model = tiny.move_adapters(tiny.tiny(lora_r=3, lora_alpha=5, n_layer=2, **flags))
    idx = tiny.ids(2, 12)
    before, plain = model(idx), tiny.tiny(n_layer=2)
    assert (before - plain(idx)).abs().max() > 0.05
    merge_lora_weights(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert_close(model(idx), before, **CLOSE)
    if not flags["lora_mlp"]:
        assert_close(model.transformer.h[0].mlp.fc_1.weight, plain.transformer.h[0].mlp.fc_1.weight, rtol=0, atol=0)


@torch.inference_mode()
def test_merge_with_biases_and_in_bf16() -> None:
    neox = {"mlp_class_name": "GptNeoxMLP", "norm_class_name": "LayerNorm", "bias": True, "parallel_residual": True, "n_query_groups": 4}
    model = tiny.move_adapters(tiny.tiny(lora_r=3, **neox, **tiny.ALL_LORA))
    idx = tiny.ids(2, 12)
    before = model(idx)
    merge_lora_weights(model)
    assert_close(model(idx), before, **CLOSE)
    one = LoRALinear(8, 8, r=2, lora_alpha=4, bias=False, dtype=torch.bfloat16)
    torch.nn.init.normal_(one.lora_B)
    want = (one.linear.weight.float() + 2.0 * one.lora_B @ one.lora_A).bfloat16()  # rounded once
    assert_close(one.fuse().weight, want, rtol=0, atol=0)


@torch.inference_mode()
def test_merging_a_tied_head_leaves_the_embedding() -> None:
    model = tiny.move_adapters(tiny.from_hf(tiny.hf_llama(tie_word_embeddings=True), lora_r=3, lora_head=True))
    model.lm_head.linear.weight = model.transformer.wte.weight
    idx, embedding = tiny.ids(1, 12), model.transformer.wte.weight.clone()
    before = model(idx)
    merge_lora_weights(model)
    assert_close(model(idx), before, **CLOSE)
    assert torch.equal(model.transformer.wte.weight, embedding) and not torch.equal(model.lm_head.weight, embedding)


def test_skip2lora_refuses_to_merge() -> None:
    model = skip(**tiny.ALL_LORA)
    with pytest.raises(UserError, match="Skip2-LoRA cannot be merged: its adapters add functions of earlier blocks"):
        merge_lora_weights(model)
    assert isinstance(model.lm_head, LoRALinear)  # nothing was touched


def test_layers_alone() -> None:
    """y = W x + (alpha / r) B A x, by hand; rank 0 is the plain layer; dropout acts in training only."""
    torch.manual_seed(0)
    layer = LoRALinear(6, 4, r=2, lora_alpha=8, bias=True)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 6)
    want = x @ layer.linear.weight.T + layer.linear.bias + 4.0 * x @ layer.lora_A.T @ layer.lora_B.T
    assert_close(layer(x), want)
    assert not list(LoRALinear(6, 4, r=0, bias=True).parameters())[2:]
    assert LoRAQKVLinear(8, 16, 4, 2, 1, r=2, enable_lora=False).r == 0
    with pytest.raises(ValueError, match="-1"):
        LoRALinear(6, 4, r=-1)
    dropped = LoRALinear(6, 4, r=2, lora_dropout=0.5)
    torch.nn.init.normal_(dropped.lora_B)
    assert not torch.equal(dropped(x), dropped.eval()(x))
    assert torch.equal(dropped(x), dropped(x))


def test_fresh_values() -> None:
    """A as nn.Linear starts (uniform within 1 / sqrt(in)), B zero."""
    layer = LoRALinear(400, 50, r=30)
    assert layer.lora_B.abs().max() == 0
    bound = 400**-0.5
    assert 0.95 * bound < layer.lora_A.abs().max() <= bound
    assert abs(layer.lora_A.std() / bound - 3**-0.5) < 0.03
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.manual_seed(1)
    assert torch.equal(layer.lora_A, torch.nn.init.kaiming_uniform_(torch.empty(30, 400), a=math.sqrt(5)))


def test_fresh_values_where_lightning_skips_those_of_a_base() -> None:
    with Fabric(accelerator="cpu", devices=1).init_module(empty_init=True):
        layer = LoRALinear(400, 50, r=30)
    assert layer.lora_B.abs().max() == 0 and 0.95 * 400**-0.5 < layer.lora_A.abs().max() <= 400**-0.5


@pytest.mark.parametrize("quantized", [False, True])
def test_other_adapters_on_the_same_layers(quantized: bool) -> None:
    """The adapters are those of a new model, the frozen weights are not even copied, and without adapters the base is left."""
    from litgpt.quantize import quantise

    settings: list[dict[str, Any]] = [
        {**tiny.ALL_LORA, "lora_r": 2, "mlp_class_name": "LLaMAMoE", "n_expert": 3, "n_expert_per_token": 1, "moe_intermediate_size": 64},
        {"skip2lora_enabled": True, "lora_r": 3, "lora_mlp": True, "skip2lora_output_layer": "transformer.h.2"},
        {"skip2lora_enabled": True, "lora_r": 1, "skip2lora_block_indices": "all"},
        {},
    ]
    shape = {key: value for key, value in settings[0].items() if not key.startswith("lora")}
    model = tiny.tiny(**settings[0])
    if quantized:
        quantise(model, "int8")
    frozen = {name.replace(".linear.", "."): value for name, value in model.state_dict().items() if not lora_filter(name)}
    for adapter in [*settings[1:], settings[0]]:
        model.adapt(lora.Config(**{**tiny.TINY, **shape, **adapter}))
        lora.renew_adapters(model)
        fresh = tiny.tiny(**{**shape, **adapter})
        if quantized:
            quantise(fresh, "int8")
        now, want = model.state_dict(), fresh.state_dict()
        assert {name: value.shape for name, value in now.items()} == {name: value.shape for name, value in want.items()}
        assert model.cut == fresh.cut and [type(module) for module in model.modules()] == [type(module) for module in fresh.modules()]
        kept = {name.replace(".linear.", "."): value for name, value in now.items() if not lora_filter(name)}
        assert all(value.data_ptr() == frozen[name].data_ptr() for name, value in kept.items()) and kept.keys() == frozen.keys()
    torch.manual_seed(5)
    lora.renew_adapters(model)
    torch.manual_seed(5)
    lora.renew_adapters(fresh)
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in model.state_dict().items() if lora_filter(name))


# --- Skip2-LoRA: what it computes ---


@torch.no_grad()
def by_plain_matrices(model: Any, idx: torch.Tensor, scale: float) -> torch.Tensor:
    """The equations of Skip2-LoRA, with the base model's layers and matrices only."""
    config, pos, h = model.config, model.positions(idx), model.transformer.h
    x, s = model.transformer.wte(idx), torch.zeros(())
    out: Any = config.skip2lora_output_layer
    for i in range(config.n_layer):
        if out == f"transformer.h.{i}":
            x = x + s
        x = h[i](x, pos)
        if i in config.skip2lora_block_indices:
            t = x * (x.pow(2).mean(-1, keepdim=True) + config.norm_eps) ** -0.5 if config.skip2lora_norm == "rms" else x
            s = s + scale * t @ h[i].skip2lora.lora_A.T @ h[i].skip2lora.lora_B.T
    if out == "transformer.ln_f":
        x = x + s
    x = model.transformer.ln_f(x)
    return model.lm_head(x + s if out == "lm_head" else x)


@pytest.mark.parametrize("taps", quick([[0], [0, 2], [2, 1, 0]], [2, 1, 0], [0]), ids=str)
@pytest.mark.parametrize("norm", ["rms", "none"])
@pytest.mark.parametrize("output", OUTPUT_LAYERS)
@pytest.mark.parametrize(
    ("ranks", "scale"), first([({"lora_r": 3, "lora_alpha": 5}, 5 / 3), ({"skip2lora_r": 4, "skip2lora_alpha": 2}, 0.5)]), ids=str
)
def test_output_against_plain_matrices(taps: list[int], norm: str, output: str, ranks: dict[str, int], scale: float) -> None:
    model = tiny.move_adapters(skip(skip2lora_block_indices=taps, skip2lora_norm=norm, skip2lora_output_layer=output, **ranks))
    idx = tiny.ids(2, 12)
    want = by_plain_matrices(model, idx, scale)
    with torch.no_grad():
        assert_close(model(idx), want, **CLOSE)
        assert (tiny.tiny()(idx) - want).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["rms", "none"])
@pytest.mark.parametrize("output", OUTPUT_LAYERS)
def test_fresh_adapters_leave_the_base_bit_for_bit(output: str, norm: str, dtype: torch.dtype) -> None:
    base, model = tiny.tiny(), skip(skip2lora_output_layer=output, skip2lora_norm=norm)
    for module in (base, model):
        for name, parameter in module.named_parameters():
            if not lora_filter(name):
                parameter.data = parameter.data.to(dtype)
    idx = tiny.ids(2, 12)
    with torch.no_grad():
        want = base(idx)
        assert torch.equal(model(idx), want)
        tiny.move_adapters(model)
        assert not torch.equal(model(idx), want)


def test_plain_lora_starts_at_the_base_bit_for_bit() -> None:
    idx = tiny.ids(2, 12)
    with torch.no_grad():
        assert torch.equal(tiny.tiny(lora_r=3, **tiny.ALL_LORA)(idx), tiny.tiny()(idx))


def test_dropout_acts_in_training_only() -> None:
    model = tiny.move_adapters(skip(skip2lora_dropout=0.5))
    idx = tiny.ids(1, 12)
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))
    without = tiny.move_adapters(skip(lora_dropout=0.5, skip2lora_dropout=0.0)).train()
    assert torch.equal(without(idx), without(idx))


def test_bf16_backbone_keeps_fp32_adapters() -> None:
    model = skip()
    for name, parameter in model.named_parameters():
        if not lora_filter(name):
            parameter.data = parameter.data.bfloat16()
    mark_only_lora_as_trainable(model)
    idx = tiny.ids(2, 12)
    assert model(idx).dtype == torch.bfloat16
    F.cross_entropy(model(idx).float().flatten(0, 1), idx.flatten()).backward()
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in trainable(model).values())  # type: ignore[union-attr]


def test_autocast_leaves_the_adapters_sum_in_fp32() -> None:
    adapter = tiny.move_adapters(Skip2LoRA(8, 8, r=2, lora_alpha=4))
    t = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        got = adapter(t)
    assert torch.equal(got, adapter(t))


@pytest.mark.parametrize("output", OUTPUT_LAYERS)
def test_prefix_and_tail_make_the_whole(output: str) -> None:
    """The cache stores what `prefix` returns; `tail` of it must be the forward pass. At ln_f and lm_head, of any positions."""
    model = tiny.move_adapters(skip(skip2lora_output_layer=output, **tiny.ALL_LORA))
    idx = tiny.ids(2, 12)
    with torch.no_grad():
        want = model(idx)
        x, taps = model.prefix(idx)
        assert x.shape == (2, 12, 32) and taps.shape == (2, 12, 2, 32)
        assert torch.equal(model.lm_head(model.tail(x, taps)), want)
        if output != "transformer.h.3":
            kept = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) < 0.4
            rows = model.lm_head(model.tail(x[kept], taps[kept]))
            assert_close(rows, want[kept], **CLOSE)


# --- The prefix is frozen ---


def saved_shapes(model: Any, idx: torch.Tensor) -> list[tuple[int, ...]]:
    """The shape of every activation that a training step keeps for its backward pass."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model, idx).backward()
    return shapes


def size(shapes: list[tuple[int, ...]]) -> int:
    return sum(int(torch.Size(shape).numel()) for shape in shapes)


CUTS: dict[str, dict[str, Any]] = {
    "skip2lora at lm_head": {"skip2lora_enabled": True},
    "skip2lora at ln_f": {"skip2lora_enabled": True, "skip2lora_output_layer": "transformer.ln_f"},
    "skip2lora at the last block": {"skip2lora_enabled": True, "skip2lora_output_layer": "transformer.h.{last}", **tiny.ALL_LORA},
    "lora in the last block": {"lora_block_indices": [-1], **tiny.ALL_LORA},
    "lora in the head": {"lora_head": True},
}


def cut_model(name: str, n_layer: int) -> Any:
    settings = {key: value.format(last=n_layer - 1) if isinstance(value, str) else value for key, value in CUTS[name].items()}
    if settings.get("skip2lora_enabled"):
        settings["skip2lora_block_indices"] = [0]
    model = tiny.move_adapters(tiny.tiny(n_layer=n_layer, lora_r=3, **settings))
    mark_only_lora_as_trainable(model)
    return model.train()


@pytest.mark.parametrize("name", CUTS)
def test_no_graph_and_no_saved_activations_before_the_cut(name: str) -> None:
    idx, m = tiny.ids(2, 12), 72
    model = cut_model(name, 4)
    x, taps = model.prefix(idx)
    assert x.grad_fn is None and not x.requires_grad
    assert taps.grad_fn is None and not taps.requires_grad
    assert model.tail(x, taps).requires_grad or name == "lora in the head"

    shallow, deep = saved_shapes(model, idx), saved_shapes(cut_model(name, 9), idx)
    assert size(shallow) == size(deep)  # five frozen blocks more keep nothing more
    in_mlp = [shape for shape in shallow if shape[-1:] == (m,)]
    blocks_behind = 1 if "last block" in name else 0
    assert bool(in_mlp) == bool(blocks_behind)
    for name_, parameter in model.named_parameters():
        assert (parameter.grad is not None) == lora_filter(name_)
        assert parameter.grad is None or parameter.grad.abs().max() > 0


@pytest.mark.parametrize("name", CUTS)
def test_the_prefix_is_frozen_whoever_asks(name: str) -> None:
    """Even where the backbone's weights are left requiring gradients."""
    model = cut_model(name, 4).requires_grad_(True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        x, taps = model.prefix(tiny.ids(2, 12))
    assert not saved
    assert all(tensor.grad_fn is None and not tensor.requires_grad for tensor in [x, *taps])


def test_without_a_cut_activations_grow_with_the_blocks() -> None:
    """The measurement above can tell: ordinary LoRA keeps more for every block."""

    def model(n_layer: int) -> Any:
        built = tiny.tiny(n_layer=n_layer, lora_r=3, lora_query=True)
        mark_only_lora_as_trainable(built)
        return built

    idx = tiny.ids(2, 12)
    assert size(saved_shapes(model(9), idx)) > 2 * size(saved_shapes(model(4), idx))


def test_gradients_equal_those_without_a_cut() -> None:
    """Running the prefix without gradients must not change those of the adapters."""
    idx = tiny.ids(2, 12)
    for name in CUTS:
        model = cut_model(name, 4)
        whole = copy.deepcopy(model)
        whole.forward = lambda idx, whole=whole: _uncut(whole, idx, whole.positions(idx))
        loss(model, idx).backward()
        loss(whole, idx).backward()
        for (key, ours), (_, theirs) in zip(trainable(model).items(), trainable(whole).items(), strict=True):
            assert_close(ours.grad, theirs.grad, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


def _uncut(model: Any, idx: torch.Tensor, pos: Any) -> torch.Tensor:
    """The forward pass in one piece, with gradients everywhere."""
    x, taps = model.transformer.wte(idx), []
    for block in model.blocks[: model.cut]:
        x = block(x, pos)
        if block.skip2lora is not None:
            taps.append(block.skip2lora.tap(x))
    if model.cut > model.config.n_layer:
        x = model.transformer.ln_f(x)
    taps = torch.stack(taps, dim=-2) if taps else x.new_empty(*x.shape[:-1], 0, x.size(-1))
    return model.lm_head(model.tail(x, taps, pos))


# --- What is trained ---


@pytest.mark.parametrize("name", [*CUTS, "lora everywhere"])
def test_a_step_moves_the_adapters_alone(name: str) -> None:
    if name == "lora everywhere":
        model = tiny.move_adapters(tiny.tiny(lora_r=3, **tiny.ALL_LORA))
        mark_only_lora_as_trainable(model)
    else:
        model = cut_model(name, 4)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    idx = tiny.ids(2, 12)
    first = loss(model, idx)
    first.backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != lora_filter(key), key
    assert loss(model, idx) < first


def test_one_predicate() -> None:
    model = skip(**tiny.ALL_LORA)
    mark_only_lora_as_trainable(model)
    assert set(trainable(model)) == {name for name in model.state_dict() if lora_filter(name)}
    assert not any(map(lora_filter, tiny.tiny().state_dict()))
    assert lora_filter("transformer.h.0.skip2lora.lora_A") and lora_filter("lm_head.lora_B")
    assert not lora_filter("transformer.h.0.lora_A.weight") and not lora_filter("my_lora_A")


# --- Counts ---


def count(**settings: Any) -> int:
    with torch.device("meta"):
        model = lora.GPT(lora.Config.from_name("Llama-2-7b-hf", **settings))
    mark_only_lora_as_trainable(model)
    return sum(parameter.numel() for parameter in trainable(model).values())


@pytest.mark.parametrize(
    ("settings", "want"),
    first(
        [
            ({"skip2lora_enabled": True, "lora_r": 16, "skip2lora_block_indices": [7]}, 131_072),
            ({"skip2lora_enabled": True, "lora_r": 16, "skip2lora_block_indices": [0, 1, 2, 3]}, 524_288),
            ({"skip2lora_enabled": True, "lora_r": 16, "skip2lora_block_indices": [0, 1, 2, 3, 4, 5]}, 786_432),
            ({"skip2lora_enabled": True, "lora_r": 16}, 786_432),  # the last six
            ({"skip2lora_enabled": True, "lora_r": 4, "skip2lora_r": 16, "skip2lora_block_indices": [0]}, 131_072),
            ({"lora_r": 16, "lora_query": True, "lora_value": True}, 32 * 2 * (16 * 4096 + 4096 * 16)),
            ({"lora_r": 16, "lora_query": True, "lora_value": True, "lora_block_indices": "last:8"}, 8 * 2 * 2 * 16 * 4096),
            ({"lora_r": 8, "lora_mlp": True}, 32 * 3 * 8 * (4096 + 11008)),
            ({"lora_r": 8, "lora_head": True}, 8 * (4096 + 32000)),
            ({"lora_r": 8, "lora_projection": True}, 32 * 8 * 2 * 4096),
            ({"lora_r": 0, "lora_query": True}, 0),
            ({"lora_r": 8}, 0),
            (
                {"skip2lora_enabled": True, "lora_r": 8, "skip2lora_output_layer": "transformer.h.30", "lora_query": True},
                6 * 2 * 8 * 4096 + 2 * 2 * 8 * 4096,
            ),
        ],
        6,
    ),
    ids=str,
)
def test_counts_of_llama_2_7b(settings: dict[str, Any], want: int) -> None:
    assert count(**settings) == want


# --- Settings ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"skip2lora_output_layer": "lm_heads"}, ["skip2lora_output_layer", "lm_heads", "transformer.ln_f", "transformer.h.4"]),
        ({"skip2lora_output_layer": "transformer.h.0"}, ["transformer.h.0", "transformer.h.1"]),
        ({"skip2lora_output_layer": "transformer.h.5"}, ["transformer.h.5", "transformer.h.4"]),
        ({"skip2lora_norm": "layer"}, ["skip2lora_norm", "layer", "'rms'", "'none'"]),
        ({"lora_r": 0}, ["skip2lora_enabled", "lora_r"]),
        ({"lora_r": -2}, ["lora_r", "-2"]),
        ({"skip2lora_r": -2}, ["skip2lora_r", "-2"]),
        ({"lora_r": "many"}, ["lora_r", "'many'"]),
        ({"lora_r": 2.5}, ["lora_r", "2.5"]),
        ({"lora_dropout": 1.0}, ["lora_dropout", "1.0"]),
        ({"lora_dropout": "half"}, ["lora_dropout", "'half'"]),
        ({"skip2lora_dropout": -0.1}, ["skip2lora_dropout", "-0.1"]),
        ({"skip2lora_block_indices": [5]}, ["skip2lora_block_indices", "5", "0 to 4"]),
        (
            {"skip2lora_output_layer": "transformer.h.3", "skip2lora_block_indices": [2, 3, 4]},
            ["skip2lora_block_indices", "blocks 3, 4", "transformer.h.3", "0 to 2"],
        ),
        (
            {"skip2lora_output_layer": "transformer.h.3", "lora_block_indices": [2, 4], "lora_query": True},
            ["lora_block_indices", "block 2,", "transformer.h.3", "frozen"],
        ),
        ({"lora_block_indices": [4], "lora_query": True}, ["lora_block_indices", "block 4,", "lm_head", "frozen"]),
        ({"lora_block_indices": "last:2", "lora_query": True}, ["lora_block_indices"]),
        ({"skip2lora_enabled": False, "lora_block_indices": [7], "lora_query": True}, ["lora_block_indices", "7", "0 to 4"]),
    ],
    ids=str,
)
def test_wrong_settings(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        lora.Config(**{**tiny.TINY, "skip2lora_enabled": True, "lora_r": 3, **settings})
    assert all(word in str(caught.value) for word in words), caught.value


def config(**settings: Any) -> lora.Config:
    return lora.Config(**{**tiny.TINY, "lora_r": 3, **settings})


def test_cut_taps_and_lora_blocks() -> None:
    """Layers 0 to 4 are the blocks, 5 is ln_f, 6 lm_head."""
    assert (config().cut, config().taps, config().lora_blocks) == (None, (), ())
    assert config(lora_head=True).cut == 6
    assert config(lora_query=True).cut == 0
    late = config(lora_query=True, lora_block_indices=[-1, 3])
    assert (late.cut, late.lora_blocks) == (3, (3, 4))
    assert config(skip2lora_enabled=True).taps == (0, 1, 2, 3, 4)  # six by default, or what there is
    assert config(skip2lora_enabled=True, n_layer=9).taps == (3, 4, 5, 6, 7, 8)
    assert config(skip2lora_enabled=True).cut == 6
    assert config(skip2lora_enabled=True, skip2lora_output_layer="transformer.ln_f").cut == 5
    tail = config(skip2lora_enabled=True, skip2lora_output_layer="transformer.h.3", **tiny.ALL_LORA)
    assert (tail.cut, tail.taps, tail.lora_blocks) == (3, (0, 1, 2), (3, 4))
    at_head = lora.GPT(config(skip2lora_enabled=True, **tiny.ALL_LORA))
    names = {name for name in at_head.state_dict() if lora_filter(name) and "skip2lora" not in name}
    assert names == {"lm_head.lora_A", "lm_head.lora_B"}  # ordinary LoRA only behind the cut


def test_rank_alpha_and_dropout_follow_loras() -> None:
    follows = config(lora_alpha=7, lora_dropout=0.1)
    assert (follows.skip2lora_r, follows.skip2lora_alpha, follows.skip2lora_dropout) == (3, 7, 0.1)
    own = config(lora_alpha=7, lora_dropout=0.1, skip2lora_r=5, skip2lora_alpha=2, skip2lora_dropout=0.0)
    assert (own.skip2lora_r, own.skip2lora_alpha, own.skip2lora_dropout) == (5, 2, 0.0)
    adapter = next(module for module in skip(skip2lora_r=5, skip2lora_alpha=2).modules() if isinstance(module, Skip2LoRA))
    assert (adapter.r, adapter.scaling) == (5, 0.4)


def test_adapter_settings_build_the_same_model() -> None:
    first = config(skip2lora_enabled=True, skip2lora_output_layer="transformer.h.3", skip2lora_norm="none", **tiny.ALL_LORA)
    settings = {key: getattr(first, key) for key in lora.Config.adapter_fields()}
    again = lora.Config(**first.base_dict(), **settings)
    assert again == first
    assert "lora_r" in settings and not set(settings) & set(first.base_dict())


def test_public_names() -> None:
    """`litgpt.lora` offers what LitGPT's module offers."""

    def names() -> Iterator[str]:
        yield from ("Config", "GPT", "Block", "CausalSelfAttention", "LoRALayer", "LoRALinear", "LoRAQKVLinear", "Skip2LoRA")
        yield from ("mark_only_lora_as_trainable", "lora_filter", "merge_lora_weights")

    assert all(hasattr(lora, name) for name in names())
    assert issubclass(lora.GPT, base_model.GPT)
    built = lora.GPT(config(skip2lora_enabled=True, skip2lora_block_indices=(0, 1, 2)))
    assert built(tiny.ids(1, 4)).shape == (1, 4, 101)


# --- torch.compile ---


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["lora", pytest.param("dora", marks=pytest.mark.slow)])
def test_compiled_model_is_one_graph(variant: str) -> None:
    """With dropout and gradients: a graph for the first length, and one for all others; the same draws as without it."""
    graphs: list[Any] = []

    def backend(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    model = tiny.tiny(n_layer=1, lora_r=3, lora_query=True, lora_mlp=True, lora_head=True, lora_dropout=0.3, lora_variant=variant).train()
    mark_only_lora_as_trainable(tiny.move_adapters(model))
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    for length in (9, 12, 30):
        idx = tiny.ids(2, length)
        torch.manual_seed(length)
        want = loss(model, idx)
        torch.manual_seed(length)
        got = loss(compiled, idx)
        assert_close(got, want)
        got.backward()
    assert len(graphs) <= 2
