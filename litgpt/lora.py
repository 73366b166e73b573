"""Skip2-LoRA (arXiv 2410.21073), the extended Config, the GPT that carries the adapters, and LoRA on any model.

    D_i = (alpha / r) B_i A_i dropout(N(x_{i+1})),  s = sum over S of D_i   from block i's output to the output layer's input

`litgpt.adapters.layers` has LoRA's layers. Letters in shapes: as in `litgpt.model`, and r the rank of an adapter.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from litgpt import config as base, model as base_model
from litgpt.adapters.anywhere import Entry, read_lora, require_fit, sizes, target_layers, write_lora
from litgpt.adapters.base import adapter_parameters, adapter_state, adapters, renew_adapters as renew_adapters
from litgpt.adapters.blocks import DEFAULT_TAPS, auto_count, listed, resolve_blocks as resolve_blocks
from litgpt.adapters.dora import DoRA
from litgpt.adapters.heads import Head, MultiTokenHead, Tap, ValueHead
from litgpt.adapters.layers import LoRALayer as LoRALayer, LoRALinear as LoRALinear, LoRAQKVLinear as LoRAQKVLinear
from litgpt.adapters.patterns import PARTS, require_used
from litgpt.adapters.pissa import OLoRA, PiSSA
from litgpt.adapters.saved import fuse_saved, save_modules
from litgpt.adapters.settings import DROPOUT, LAYER_RANK, AdapterSettings
from litgpt.adapters.switch import Switch
from litgpt.args import Range
from litgpt.errors import UserError
from litgpt.mlp import LLaMAMoE
from litgpt.model import Block as Block, CausalSelfAttention as CausalSelfAttention, Positions

LM_HEAD, LN_F = "lm_head", "transformer.ln_f"
VARIANTS: dict[str, type[LoRALinear]] = {"dora": DoRA, "pissa": PiSSA, "olora": OLoRA}  # mixed into LoRA's layers


@dataclass
class Config(base.Config, AdapterSettings):
    """The config of a model and its adapters."""

    skip2lora_warmup: bool = False
    """LoRA on every block was trained before Skip2-LoRA, and remains, frozen, in front of the cut."""

    adapter_file: ClassVar[str] = "lit_model.pth.lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        AdapterSettings.__post_init__(self)
        self.skip2lora_r = self.lora_r if self.skip2lora_r is None else self.skip2lora_r
        self.skip2lora_alpha = self.lora_alpha if self.skip2lora_alpha is None else self.skip2lora_alpha
        self.skip2lora_dropout = self.lora_dropout if self.skip2lora_dropout is None else self.skip2lora_dropout
        if self.latent_attention and self.alora_enabled and (self.lora_key or self.lora_value):
            raise UserError(
                "alora_enabled does not go with lora_key and lora_value on latent attention, whose kv_b_proj computes prompts' keys and "
                "values anew in every pass: set both to false"
            )
        if self.skip2lora_warmup:
            self.require_warmup("a warm-up")
        _ = self.taps, self.lora_blocks  # a wrong block index is reported here, not later

    def make_model(self) -> GPT:
        """Return a model with the adapters of this config."""
        return GPT(self)

    @property
    def cut(self) -> int | None:
        """Number of the first layer that an adapter reaches (see `litgpt.model`); None without adapters, and for the embedding."""
        if self.skip2lora_enabled:
            return self._output_layer
        if "wte" in (self.modules_to_save or ()):
            return None
        if self.has_lora_in_blocks and self.lora_blocks:
            return self.lora_blocks[0]
        return self.n_layer + 1 if (self.lora_r and self.lora_head) or self.heads or self.modules_to_save else None

    @property
    def _output_layer(self) -> int:
        name = self.skip2lora_output_layer
        if name in (LM_HEAD, LN_F):
            return self.n_layer + (name == LM_HEAD)
        match = re.fullmatch(r"transformer\.h\.([0-9]{1,9})", str(name))
        if match is None or not 1 <= int(match[1]) < self.n_layer:
            blocks = f"'transformer.h.1' to 'transformer.h.{self.n_layer - 1}'"
            raise UserError(f"skip2lora_output_layer is {name!r}: choose '{LM_HEAD}', '{LN_F}' or {blocks} for this model")
        return int(match[1])

    @property
    def taps(self) -> tuple[int, ...]:
        """S, sorted; empty without Skip2-LoRA and `mtp_taps`. Every candidate for "auto" until `keep_taps` keeps the chosen blocks."""
        if not self.skip2lora_enabled:
            last = self.n_layer - 1
            return tuple(sorted({min(2, last), self.n_layer // 2, max(last - 2, 0)})) if self.mtp_taps else ()
        prefix = min(self._output_layer, self.n_layer)
        spec = self.skip2lora_block_indices
        if spec is None:
            spec = f"last:{min(DEFAULT_TAPS, prefix)}"
        elif self.taps_to_choose:
            spec = "all"
        blocks = resolve_blocks(spec, self.n_layer, range(prefix), "skip2lora_block_indices")
        if late := [block for block in blocks if block >= prefix]:
            raise UserError(
                f"skip2lora_block_indices names {listed(late)}, which does not run before skip2lora_output_layer "
                f"{self.skip2lora_output_layer!r}: its output cannot be added there. Name blocks 0 to {prefix - 1}, or a later output layer"
            )
        return blocks

    @property
    def taps_to_choose(self) -> int | None:
        """The number of taps that training chooses ("auto"); None where they are named."""
        return auto_count(self.skip2lora_block_indices, min(self._output_layer, self.n_layer)) if self.skip2lora_enabled else None

    @property
    def lora_blocks(self) -> tuple[int, ...]:
        """The sorted blocks whose linear layers get LoRA: `lora_block_indices`; only those behind the cut, unless LoRA was warmed up."""
        first = min(self._output_layer, self.n_layer) if self.skip2lora_enabled and not self.skip2lora_warmup else 0
        behind = range(first, self.n_layer)
        if self.lora_block_indices is None:
            return tuple(behind) if self.has_lora_in_blocks else ()
        blocks = resolve_blocks(self.lora_block_indices, self.n_layer, behind, "lora_block_indices")
        if frozen := [block for block in blocks if block < first]:
            raise UserError(
                f"lora_block_indices names {listed(frozen)}, which runs before skip2lora_output_layer {self.skip2lora_output_layer!r}: "
                "blocks before it are frozen and get no gradient, so LoRA there would learn nothing. Name later blocks"
            )
        return blocks if self.has_lora_in_blocks else ()

    @classmethod
    def adapter_fields(cls) -> set[str]:
        """Return the names of the adapters' settings."""
        return {field.name for field in fields(cls)} - {field.name for field in fields(base.Config)}  # no ClassVar


class Skip2LoRA(LoRALayer, Tap):
    """The adapter from a block's output to the output layer: D = (alpha / r) dropout(t) A^T B^T, fp32, for A (r, in) and B (out, r)."""

    skips_cut = True

    def __init__(
        self, in_features: int, out_features: int, r: int, lora_alpha: float = 1, lora_dropout: float = 0.0, norm_eps: float | None = None
    ) -> None:
        super().__init__(r, lora_alpha, lora_dropout)
        if r == 0:
            raise ValueError("a Skip2-LoRA adapter needs a rank of 1 or more")
        self.norm_eps = norm_eps
        self.make((r, in_features), (out_features, r))
        self.reset_parameters()

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out), fp32"""
        return skip_sum([self], t.unsqueeze(-2))


def skip_sum(layers: Sequence[Skip2LoRA], taps: torch.Tensor) -> torch.Tensor:
    """Return s = sum over S of D_i for taps (..., S, d): (..., d), fp32. All adapters in two matrix products."""
    a = torch.stack([layer.lora_A for layer in layers])  # (S, r, d)
    b = torch.cat([layer.lora_B for layer in layers], dim=1) * layers[0].scaling  # (d, S r)
    with torch.autocast(taps.device.type, enabled=False):
        t = layers[0].lora_dropout(taps).to(a.dtype).flatten(0, -3)  # (N, S, d)
        low = torch.bmm(t.transpose(0, 1), a.transpose(1, 2))  # (S, N, r)
        return F.linear(low.transpose(0, 1).flatten(1), b).unflatten(0, taps.shape[:-2])


class GPT(base_model.GPT):
    """A GPT with the adapters in its config; everything else is the base model's."""

    config: Config
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.adapt(config)

    def adapt(self, config: Config) -> None:
        """Attach the adapters of `config`, replacing the present ones. The layers below them are not changed."""
        self.config, self.cut = config, config.cut
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, LoRALinear):
                    setattr(parent, name, child.linear)
        for block in self.blocks:
            block.skip2lora = None
        for index in config.lora_blocks:
            attach_lora(self.blocks[index], config, f"transformer.h.{index}")
        if config.lora_r and config.lora_head:
            self.lm_head = _adapted(self.lm_head, config, LM_HEAD)  # type: ignore[assignment]
        save_modules({"wte": self.transformer["wte"], "lm_head": self.head}, config.modules_to_save or [])
        units = [unit for name, module in self.named_modules() if isinstance(module, LoRALinear) for unit in module.units(name)]
        for key in ("lora_rank_pattern", "lora_alpha_pattern"):
            require_used(key, getattr(config, key) or (), units)
        self.switch = Switch(config.alora_invocation_tokens or ()) if config.alora_enabled and config.lora_blocks else None
        for module in self.modules():
            if isinstance(module, LoRALinear | LLaMAMoE):
                module.switch = self.switch
        self.value_head = ValueHead(config.n_embd, config.value_head) if config.value_head else None
        self.mtp_heads = nn.ModuleList(MultiTokenHead(config.n_embd, config.mtp_taps) for _ in range(config.mtp_heads))
        d, eps = config.n_embd, config.norm_eps if config.skip2lora_norm == "rms" else None
        how: dict[str, Any] = {"r": config.skip2lora_r, "lora_alpha": config.skip2lora_alpha, "lora_dropout": config.skip2lora_dropout}
        for index in config.taps:
            self.blocks[index].skip2lora = Skip2LoRA(d, d, **how, norm_eps=eps) if config.skip2lora_enabled else Tap()

    def sharing(self, config: Config) -> GPT:
        """Return a model with the adapters of `config` instead of these. It shares all other weights with this one."""
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*self.parameters(), *self.buffers())}
        model = copy.deepcopy(self, shared)
        model.adapt(config)
        return model

    def prefix(
        self, idx: torch.Tensor, pos: Positions | None = None, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.switch is not None:
            pos = pos or self.positions(idx)
            self.switch.mask = None
            if pos.packing is None:
                first = None if pos.index is None else pos.index.reshape(-1, pos.index.size(-1))[:, :1]
                self.switch.look(idx, first, self.compute_dtype(idx.device))
        return super().prefix(idx, pos, rows)

    def skip_sum(self, taps: torch.Tensor) -> torch.Tensor:
        if not self.config.skip2lora_enabled:
            return taps.new_zeros(())
        total = skip_sum([block.skip2lora for block in self.tapped_blocks], taps)
        return total if self.switch is None else self.switch.masked(total)


def attach_lora(block: Block, config: Config, name: str) -> None:
    """Wrap the linear layers of the block called `name` that the config names."""
    attention: Any = block.attn
    parts = (config.lora_query, config.lora_key, config.lora_value)
    if config.latent_attention:  # keys and values come from the same layers
        for child, layer in list(attention.named_children()):
            wanted = parts[0] if child.startswith("q_") else child.startswith("kv_") and any(parts[1:])
            if wanted and hasattr(layer, "in_features"):
                setattr(attention, child, _adapted(layer, config, f"{name}.attn.{child}"))
    elif any(parts):
        heads = {"head_size": config.head_size, "n_head": config.n_head, "n_query_groups": config.n_query_groups}
        sizes = [config.size_of(f"{name}.attn.qkv:{part}") for part in PARTS]
        if config.lora_variant in ("pissa", "olora") and len({size for size, on in zip(sizes, parts, strict=True) if on}) > 1:
            raise UserError(f"lora_variant {config.lora_variant} needs one rank and alpha for attn.qkv: name attn.qkv, not parts of it")
        attention.qkv = _adapted(attention.qkv, config, f"{name}.attn.qkv", LoRAQKVLinear, enable_lora=parts, sizes=sizes, **heads)
    if config.lora_projection:
        attention.proj = _adapted(attention.proj, config, f"{name}.attn.proj")
    if config.lora_mlp:  # a mixture's router and experts included
        for above, parent in list(block.mlp.named_modules(prefix=f"{name}.mlp")):
            for child, layer in list(parent.named_children()):
                if hasattr(layer, "in_features"):  # linear, quantised or not
                    setattr(parent, child, _adapted(layer, config, f"{above}.{child}"))


def _adapted(linear: Any, config: Config, name: str, kind: type[LoRALinear] = LoRALinear, **settings: Any) -> LoRALinear:
    layer, (rank, alpha) = _with_variant(kind, config.lora_variant), config.size_of(name)  # type: ignore[arg-type]
    how = {"r": rank, "lora_alpha": alpha, "lora_dropout": config.lora_dropout, "rslora": config.lora_rslora, **settings}
    return layer(linear.in_features, linear.out_features, linear=linear, **how)


@cache
def _with_variant(kind: type[LoRALinear], variant: str) -> type[LoRALinear]:
    """Return the layer class `kind` with a variant of LoRA mixed in."""
    if variant == "lora":
        return kind
    mixin = VARIANTS[variant]
    return type(kind.__name__.replace("LoRA", mixin.__name__), (mixin, kind), {})


def lora_filter(key: str, value: Any = None) -> bool:
    """Return True if a state dict's key belongs to an adapter. LitGPT's function; `litgpt.adapters.base` asks the modules instead."""
    return key.rpartition(".")[2].startswith("lora_")


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Freeze everything but the adapters that gradients reach. LoRA in front of the cut, trained in a warm-up, stays frozen.

    With `lora_freeze_a` B is trained alone (LoRA-FA, arXiv 2308.03303).
    """
    freezes_a = isinstance(model, GPT) and model.config.lora_freeze_a
    model.requires_grad_(False)
    prefix = {module for block in model.blocks[: model.cut or 0] for module in block.modules()} if isinstance(model, GPT) else set()
    for _, adapter in adapters(model):
        for name, parameter in adapter.named_parameters(recurse=False):
            is_frozen = name in adapter.constant or (freezes_a and name == "lora_A")
            parameter.requires_grad_((adapter.skips_cut or adapter not in prefix) and not is_frozen)


def start_warmup(model: GPT) -> None:
    """Move the cut to the first block with LoRA and train LoRA everywhere, without Skip2-LoRA's adapters."""
    model.cut = model.config.lora_blocks[0]
    mark_only_lora_as_trainable(model)
    for block in model.blocks:
        if block.skip2lora is not None:
            block.skip2lora.requires_grad_(False)


def end_warmup(model: GPT) -> None:
    """Move the cut to the config's place. LoRA in front of it is frozen from now on, without dropout, as part of the backbone."""
    model.cut = model.config.cut
    mark_only_lora_as_trainable(model)
    for block in model.blocks[: model.cut]:
        for layer in block.modules():
            if isinstance(layer, LoRALinear):
                layer.lora_dropout.p = 0.0


def keep_taps(model: GPT, blocks: Sequence[int]) -> None:
    """Tap only these of the model's blocks from now on, and name them in its config."""
    model.config = replace(model.config, skip2lora_block_indices=list(blocks))
    for index, block in enumerate(model.blocks):
        if index not in model.config.taps:
            block.skip2lora = None


def merge_lora_weights(model: nn.Module) -> None:
    """Fold every LoRA into its linear layer, in place; the model becomes a plain GPT with the base's keys.

    Raises UserError if it cannot be merged.
    """
    require_mergeable(model)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.fuse())
    fuse_saved(model)


def require_mergeable(model: nn.Module) -> None:
    """Raise UserError for answer-only LoRA, heads and Skip2-LoRA, whose adapters read earlier blocks: the base has no weights for them."""
    use_it = "Use the adapter folder as it is: generate, chat, evaluate and LLM.load take it and find the base"
    if any(isinstance(module, Skip2LoRA) for module in model.modules()):
        raise UserError(
            "Skip2-LoRA cannot be merged: its adapters add functions of earlier blocks' outputs to the output layer's input, and no weight "
            f"of the base model computes that. {use_it}"
        )
    if any(isinstance(module, Head) for module in model.modules()):
        raise UserError(f"an adapter with value_head or mtp_heads cannot be merged: no weight of the base has room for a head. {use_it}")
    if getattr(model, "switch", None) is not None:
        raise UserError(
            f"answer-only LoRA (alora_enabled) cannot be merged: it leaves prompts to the base's weights. {use_it}; "
            "`litgpt convert_adapter` makes PEFT's format of it"
        )


def apply_lora(
    model: nn.Module,
    targets: str | Collection[str] = "all-linear",
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    rslora: bool = False,
) -> list[str]:
    """Put LoRA on linear layers of any model, in place, and freeze everything else; return the layers' names.

    `targets` are names of layers, in full or the part after a dot (`q_proj`, `attn.c_attn`), "all-linear" (all but the output layer) or
    "square" (as many outputs as inputs). `nn.Linear`, transformers' Conv1D and quantised layers are accepted. Layers that have LoRA keep
    it. Until it is trained, the model's output does not change. Raises UserError for numbers out of range and targets that fit no layer.
    """
    for name, value, numbers in (("r", r, LAYER_RANK), ("alpha", alpha, Range()), ("dropout", dropout, DROPOUT)):
        if not numbers.holds(value):
            raise UserError(f"{name} is {value!r}: {numbers} is needed")
    layers = target_layers(model, targets)
    _attach(model, layers.values(), r, alpha, dropout, rslora)
    return list(layers)


def _attach(model: nn.Module, linears: Iterable[nn.Module], r: int, alpha: float, dropout: float, rslora: bool = False) -> None:
    wrapped = {}
    for linear in linears:
        layer = LoRALinear(*sizes(linear), r, alpha, dropout, linear, rslora)
        wrapped[linear] = layer.to(next(linear.parameters()).device).train(linear.training)
    for name, module in list(model.named_modules(remove_duplicate=False)):  # a layer may have several places
        if module in wrapped:
            model.set_submodule(name, wrapped[module])
    mark_only_lora_as_trainable(model)


def get_lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the adapters, for an optimizer."""
    return list(adapter_parameters(model).values())


def save_lora(model: nn.Module, file: Path | str) -> None:
    """Save the LoRA that `apply_lora` made, in one safetensors file. Raises UserError for a model with other adapters, or none."""
    if not (entries := _entries(model, file)):
        raise UserError(f"{file}: the model has no LoRA to save: call apply_lora first")
    write_lora(file, entries, adapter_state(model))


def load_lora(model: nn.Module, file: Path | str) -> None:
    """Load a file of `save_lora`, after adding LoRA where the model lacks it. Raises UserError for a file that does not fit."""
    entries, weights = read_lora(file)
    present = _entries(model, file)
    require_fit(file, model, entries, weights, present)
    for name, entry in entries.items():
        if name not in present:
            _attach(model, [model.get_submodule(name)], *entry)
    model.load_state_dict(weights, strict=False)


def _entries(model: nn.Module, file: Path | str) -> dict[str, Entry]:
    found = {}
    for name, layer in adapters(model):
        if type(layer) is not LoRALinear:
            raise UserError(f"{file}: {name} has an adapter of another kind; save_lora and load_lora are for the LoRA of apply_lora alone")
        found[name] = Entry(layer.r, layer.scaling * layer.r, layer.lora_dropout.p)
    return found
