"""LoRA (arXiv 2106.09685) and Skip2-LoRA (arXiv 2410.21073): layers, the extended Config, and the GPT that carries them.

    LoRA          y = W x + (alpha / r) B A dropout(x)                                  inside a linear layer
    Skip2-LoRA    D_i = (alpha / r) B_i A_i dropout(N(x_{i+1})),  s = sum over S of D_i   from block i's output to the output layer's input

Letters in shapes: as in `litgpt.model`, and r the rank of an adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from litgpt import config as base
from litgpt import model as base_model
from litgpt.adapters.settings import AdapterSettings, BlockIndices, WarmupSettings
from litgpt.errors import UserError
from litgpt.model import Block, CausalSelfAttention, rms_normalise

__all__ = [
    "GPT",
    "Block",
    "CausalSelfAttention",
    "Config",
    "LoRALayer",
    "LoRALinear",
    "LoRAQKVLinear",
    "Skip2LoRA",
    "lora_filter",
    "mark_only_lora_as_trainable",
    "merge_lora_weights",
    "resolve_blocks",
]

LM_HEAD, LN_F = "lm_head", "transformer.ln_f"
DEFAULT_TAPS = 6
AUTO = re.compile("auto(?::([0-9]{1,9}))?")
ADAPTER_PARAMETERS = ("lora_A", "lora_B")


@dataclass
class Config(base.Config, AdapterSettings, WarmupSettings):
    """A model's config and its adapters'. `lora_r` 0 means no LoRA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        AdapterSettings.__post_init__(self)
        WarmupSettings.__post_init__(self)
        self.require_adapters(self)
        self.skip2lora_r = self.lora_r if self.skip2lora_r is None else self.skip2lora_r
        self.skip2lora_alpha = self.lora_alpha if self.skip2lora_alpha is None else self.skip2lora_alpha
        self.skip2lora_dropout = self.lora_dropout if self.skip2lora_dropout is None else self.skip2lora_dropout
        _ = self.taps, self.lora_blocks  # a wrong block index is reported here, not later

    @property
    def cut(self) -> int | None:
        """Number of the first layer that an adapter reaches (`litgpt.model` numbers them); None without adapters."""
        if self.skip2lora_enabled:
            return self._output_layer
        if self.has_lora_in_blocks and self.lora_blocks:
            return self.lora_blocks[0]
        return self.n_layer + 1 if self.lora_r and self.lora_head else None

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
        """S, sorted; empty without Skip2-LoRA."""
        if not self.skip2lora_enabled:
            return ()
        prefix = min(self._output_layer, self.n_layer)
        spec = self.skip2lora_block_indices
        if spec is None:
            spec = f"last:{min(DEFAULT_TAPS, prefix)}"
        elif self.taps_to_choose:
            spec = "all"
        blocks = resolve_blocks(spec, self.n_layer, range(prefix), "skip2lora_block_indices")
        late = [block for block in blocks if block >= prefix]
        if late:
            raise UserError(
                f"skip2lora_block_indices names {_blocks(late)}, which does not run before skip2lora_output_layer "
                f"{self.skip2lora_output_layer!r}: its output cannot be added there. Name blocks 0 to {prefix - 1}, or a later output layer"
            )
        return blocks

    @property
    def taps_to_choose(self) -> int | None:
        """How many taps training has to choose: N for "auto:N", 6 (or all, if there are fewer) for "auto"; None where they are named."""
        prefix = min(self._output_layer, self.n_layer)
        match = AUTO.fullmatch(str(self.skip2lora_block_indices)) if self.skip2lora_enabled else None
        count = int(match[1] or min(DEFAULT_TAPS, prefix)) if match else 0
        return count if 1 <= count <= prefix else None

    @property
    def lora_blocks(self) -> tuple[int, ...]:
        """The blocks whose linear layers get LoRA, sorted: `lora_block_indices`; behind the cut if Skip2-LoRA makes one from the start."""
        first = min(self._output_layer, self.n_layer) if self.skip2lora_enabled and not self.has_warmup else 0
        behind = range(first, self.n_layer)
        if self.lora_block_indices is None:
            return tuple(behind) if self.has_lora_in_blocks else ()
        blocks = resolve_blocks(self.lora_block_indices, self.n_layer, behind, "lora_block_indices")
        frozen = [block for block in blocks if block < first]
        if frozen:
            raise UserError(
                f"lora_block_indices names {_blocks(frozen)}, which runs before skip2lora_output_layer {self.skip2lora_output_layer!r}: "
                "what runs before it is frozen and gets no gradient, so LoRA there would learn nothing. Name later blocks"
            )
        return blocks if self.has_lora_in_blocks else ()

    @property
    def warmup_cut(self) -> int:
        """The cut while LoRA is warmed up: the first block that has it."""
        return self.lora_blocks[0]

    @classmethod
    def adapter_fields(cls) -> set[str]:
        """Names of the adapters' settings."""
        return cls.__dataclass_fields__.keys() - base.Config.__dataclass_fields__.keys()


def _blocks(indices: list[int]) -> str:
    return ("block " if len(indices) == 1 else "blocks ") + ", ".join(map(str, indices))


def resolve_blocks(spec: BlockIndices | tuple[int | str, ...], n_layer: int, available: range, key: str) -> tuple[int, ...]:
    """Block numbers, sorted, from any form of `skip2lora_block_indices`.

    Ints and names "transformer.h.3" count over the whole model, negative ints from its end. "all", "last:n" and "every:n" (which
    ends at the last block) count over `available`. Raises UserError, naming `key`, for anything else.
    """
    if isinstance(spec, str) and not spec.startswith("transformer.h."):
        last = list(available)
        form, _, count = spec.partition(":")
        number = int(count) if re.fullmatch("[0-9]{1,9}", count) else 0
        if spec == "all" and last:
            return tuple(last)
        if form == "last" and 1 <= number <= len(last):
            return tuple(last[-number:])
        if form == "every" and 1 <= number <= len(last):
            return tuple(sorted(last[::-1][::number]))
        auto = ", 'every:5' or 'auto:6'" if key == "skip2lora_block_indices" else " or 'every:5'"
        forms = f"a list such as [0, 1, -1], 'all', 'last:6'{auto}"
        raise UserError(f"{key} is {spec[:60]!r}: give {forms}, with a number from 1 to the {len(last)} blocks there are")
    if spec is not None and not isinstance(spec, int | str | list | tuple):
        raise UserError(f"{key} is {str(spec)[:60]}: give a list of block numbers such as [0, 1, -1]")
    entries = [spec] if isinstance(spec, int | str) else list(spec or ())
    blocks, wrong = [], []
    for entry in entries:
        match = re.fullmatch(r"transformer\.h\.([0-9]{1,9})", entry) if isinstance(entry, str) else None
        index = int(match[1]) if match else entry
        if not isinstance(index, int) or isinstance(index, bool) or not -n_layer <= index < n_layer:
            wrong.append(entry)
        else:
            blocks.append(index % n_layer)
    if wrong:
        named = ", ".join(repr(entry)[:60] for entry in wrong[:6]) + (", ..." if len(wrong) > 6 else "")
        raise UserError(f"{key} names {named}: this model has blocks 0 to {n_layer - 1} (-1 is the last)")
    if not blocks:
        raise UserError(f"{key} names no block: name at least one, such as [-1]")
    twice = sorted({block for block in blocks if blocks.count(block) > 1})
    if twice:
        raise UserError(f"{key} names {_blocks(twice)} twice")
    return tuple(sorted(blocks))


class Dropout(nn.Module):
    """Zero with probability p, else x / (1 - p). On a CPU 16 random bits decide for each element, p to the nearest 1/65536.

    torch draws a CPU's Bernoulli variables one by one, which takes longer than an adapter's matrix products; 64 bits at once do not.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or x.device.type != "cpu":
            return F.dropout(x, self.p, self.training)
        count, dropped = x.numel(), round(self.p * 2**16)
        bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), 2**63 - 1).view(torch.int16)[:count].view(x.shape)
        return x * (bits >= dropped - 2**15).to(x.dtype).mul_(2**16 / (2**16 - dropped))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class LoRALayer(nn.Module):
    """What every adapter has: A (r, in) Kaiming-uniform, B (out, r) zero, dropout on its input, and the factor alpha / r.

    A and B are fp32 whatever the backbone's dtype.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float) -> None:
        super().__init__()
        if r < 0:
            raise ValueError(f"a rank of {r} makes no sense")
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = Dropout(lora_dropout) if lora_dropout > 0 else nn.Identity()
        self.scaling = lora_alpha / r if r else 0.0

    def _make(self, a: tuple[int, int], b: tuple[int, int]) -> None:
        self.lora_A = nn.Parameter(torch.empty(a, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(b, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming-uniform as `nn.Linear` has it, B zero: the adapter adds nothing until it is trained."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)


class LoRALinear(LoRALayer):
    """A linear layer with LoRA: y = linear(x) + (alpha / r) B A dropout(x), A (r, in), B (out, r).

    `linear` is the layer to adapt, quantised or not; without it a new one is made. A state dict's `weight` and `bias` go to `linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        linear: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(r, lora_alpha, lora_dropout)
        self.linear: Any = linear if linear is not None else nn.Linear(in_features, out_features, **kwargs)
        self._make_adapter(in_features, out_features)

    def _make_adapter(self, in_features: int, out_features: int) -> None:
        if self.r:
            self._make((self.r, in_features), (out_features, self.r))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            if prefix + name in state_dict:
                state_dict[f"{prefix}linear.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def up(self) -> torch.Tensor:
        """(alpha / r) B as a matrix (out, columns of A x)."""
        return self.lora_B * self.scaling

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)"""
        y = self.linear(x)
        if not self.r:
            return y
        low = F.linear(self.lora_dropout(x), self.lora_A.to(x.dtype))  # (..., r)
        return y + F.linear(low, self.up().to(low.dtype))

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """The plain layer with W + (alpha / r) B A for its weight, added in fp32."""
        if self.r:
            weight = self.linear.weight
            merged = weight.float() + self.up() @ self.lora_A
            self.linear.weight = nn.Parameter(merged.to(weight.dtype), requires_grad=weight.requires_grad)
        return self.linear


class LoRAQKVLinear(LoRALinear):
    """The joined projection with LoRA on any of q, k and v, each with its own A and B.

    With e parts enabled A is (e r, d), one below the other; B (rows of the enabled parts, r), LitGPT's layout.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        head_size: int,
        n_head: int,
        n_query_groups: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: bool | tuple[bool, bool, bool] = False,
        linear: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        enabled = (enable_lora,) * 3 if isinstance(enable_lora, bool) else enable_lora
        self.sizes = (head_size * n_head, head_size * n_query_groups, head_size * n_query_groups)
        self.enable_lora = enabled
        super().__init__(in_features, out_features, r if any(enabled) else 0, lora_alpha, lora_dropout, linear, **kwargs)

    def _make_adapter(self, in_features: int, out_features: int) -> None:
        if self.r:
            rows = [size for size, on in zip(self.sizes, self.enable_lora, strict=True) if on]
            self._make((self.r * len(rows), in_features), (sum(rows), self.r))

    def up(self) -> torch.Tensor:
        """(alpha / r) B spread to (q + k + v rows, e r): block-diagonal over the enabled parts, zero rows for the others."""
        enabled = [size for size, on in zip(self.sizes, self.enable_lora, strict=True) if on]
        parts = iter((self.lora_B * self.scaling).split(enabled))
        empty = self.lora_B.new_zeros
        return torch.block_diag(*(next(parts) if on else empty(size, 0) for size, on in zip(self.sizes, self.enable_lora, strict=True)))


class Skip2LoRA(LoRALayer):
    """The adapter from a block's output to the output layer: D = (alpha / r) dropout(t) A^T B^T, A (r, in), B (out, r), computed in fp32.

    `norm_eps` makes the tap t = x / rms(x); None leaves t = x.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__(r, lora_alpha, lora_dropout)
        if r == 0:
            raise ValueError("a Skip2-LoRA adapter needs a rank of 1 or more")
        self.norm_eps = norm_eps
        self._make((r, in_features), (out_features, r))

    def tap(self, x: torch.Tensor) -> torch.Tensor:
        """t = N(x), (..., in) -> (..., in), x's dtype."""
        return x if self.norm_eps is None else rms_normalise(x, self.norm_eps)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out), fp32"""
        with torch.autocast(t.device.type, enabled=False):
            low = F.linear(self.lora_dropout(t).to(self.lora_A.dtype), self.lora_A)  # (..., r)
            return F.linear(low, self.lora_B) * self.scaling


class GPT(base_model.GPT):
    """A GPT with the adapters that its config asks for; everything else is the base model's."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.adapt(config)

    def adapt(self, config: Config) -> None:
        """Put on the adapters that `config` asks for, in place of those that are there. The layers below them stay what they are."""
        self.config, self.cut = config, config.cut
        for parent in list(self.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, LoRALinear):
                    setattr(parent, name, child.linear)
        for block in self.blocks:
            block.skip2lora = None
        adapter = {"r": config.lora_r, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
        for index in config.lora_blocks:
            attach_lora(self.blocks[index], config, adapter)
        if config.lora_r and config.lora_head:
            self.lm_head = _adapt(self.lm_head, adapter)  # type: ignore[assignment]
        for index in config.taps:
            assert config.skip2lora_r is not None and config.skip2lora_alpha is not None and config.skip2lora_dropout is not None
            self.blocks[index].skip2lora = Skip2LoRA(
                config.n_embd,
                config.n_embd,
                config.skip2lora_r,
                config.skip2lora_alpha,
                config.skip2lora_dropout,
                config.norm_eps if config.skip2lora_norm == "rms" else None,
            )

    def skip_sum(self, taps: torch.Tensor) -> torch.Tensor:
        """s = sum over S of D_i for taps (..., S, d): (..., d), fp32. All adapters in two matrix products."""
        adapters = [block.skip2lora for block in self.tapped_blocks]
        a = torch.stack([adapter.lora_A for adapter in adapters])  # (S, r, d)
        b = torch.cat([adapter.lora_B for adapter in adapters], dim=1) * adapters[0].scaling  # (d, S r)
        with torch.autocast(taps.device.type, enabled=False):
            t = adapters[0].lora_dropout(taps).to(a.dtype).flatten(0, -3)  # (N, S, d)
            low = torch.bmm(t.transpose(0, 1), a.transpose(1, 2))  # (S, N, r)
            return F.linear(low.transpose(0, 1).flatten(1), b).unflatten(0, taps.shape[:-2])


def _adapt(linear: Any, adapter: dict[str, Any]) -> LoRALinear:
    return LoRALinear(linear.in_features, linear.out_features, linear=linear, **adapter)


def attach_lora(block: Block, config: Config, adapter: dict[str, Any]) -> None:
    """Wrap the linear layers of a block that the config names."""
    attention: Any = block.attn
    mlp: Any = block.mlp
    parts = (config.lora_query, config.lora_key, config.lora_value)
    if any(parts):
        qkv = attention.qkv
        heads = (config.head_size, config.n_head, config.n_query_groups)
        attention.qkv = LoRAQKVLinear(qkv.in_features, qkv.out_features, *heads, enable_lora=parts, linear=qkv, **adapter)  # type: ignore[arg-type]
    if config.lora_projection:
        attention.proj = _adapt(attention.proj, adapter)
    if config.lora_mlp:  # a mixture's router and experts included
        for parent in list(mlp.modules()):
            for name, layer in list(parent.named_children()):
                if hasattr(layer, "in_features"):  # linear, quantised or not
                    setattr(parent, name, _adapt(layer, adapter))


def lora_filter(key: str, value: Any = None) -> bool:
    """Whether a parameter of this name belongs to an adapter: the one rule for what is trained, saved and counted."""
    return key.rpartition(".")[2] in ADAPTER_PARAMETERS


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Freeze everything but the adapters' A and B that gradients reach: not LoRA in front of the cut, which was trained in a warm-up."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(lora_filter(name))
    if isinstance(model, GPT):
        for block in model.blocks[: model.cut or 0]:
            block.attn.requires_grad_(False)
            block.mlp.requires_grad_(False)


def renew_adapters(model: nn.Module) -> None:
    """Give every adapter fresh fp32 values on the CPU, drawn in the order of the modules: a seed gives the same ones to equal models."""
    for module in model.modules():
        if isinstance(module, LoRALayer) and module.r:
            module.lora_A = nn.Parameter(torch.empty(module.lora_A.shape))
            module.lora_B = nn.Parameter(torch.empty(module.lora_B.shape))
            module.reset_parameters()


def start_warmup(model: GPT) -> None:
    """Move the cut to the first block with LoRA and train all LoRA, Skip2-LoRA's adapters not yet."""
    model.cut = model.config.warmup_cut
    mark_only_lora_as_trainable(model)
    for block in model.blocks:
        if block.skip2lora is not None:
            block.skip2lora.requires_grad_(False)


def end_warmup(model: GPT) -> None:
    """Put the cut where the config has it; LoRA in front of it is frozen from now on, without dropout, as if part of the backbone."""
    model.cut = model.config.cut
    mark_only_lora_as_trainable(model)
    for block in model.blocks[: model.cut]:
        for layer in (*block.attn.modules(), *block.mlp.modules()):
            if isinstance(layer, LoRALayer):
                layer.lora_dropout = nn.Identity()


def keep_taps(model: GPT, blocks: Sequence[int]) -> None:
    """Of a model that taps more, tap these blocks only; its config names them from now on."""
    model.config = replace(model.config, skip2lora_block_indices=list(blocks))
    for index, block in enumerate(model.blocks):
        if index not in model.config.taps:
            block.skip2lora = None


def merge_lora_weights(model: nn.Module) -> None:
    """Fold every LoRA into its linear layer, in place; the model becomes a plain GPT with the base's keys.

    Raises UserError for a model with Skip2-LoRA, whose adapters read earlier blocks and have no place in the base weights.
    """
    if any(isinstance(module, Skip2LoRA) for module in model.modules()):
        raise UserError(
            "Skip2-LoRA cannot be merged: its adapters add functions of earlier blocks' outputs to the output layer's input, and no weight "
            "of the base model computes that. Use the adapter folder as it is: generate, chat and LLM.load take it and find the base"
        )
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                setattr(parent, name, child.fuse())
