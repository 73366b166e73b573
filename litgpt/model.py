"""The decoder: GPT, its blocks, attention and MLPs, with LitGPT's state-dict keys.

Letters in shapes: B batch, T positions of the input, K positions attended to, d `n_embd`, V `padded_vocab_size`, L `n_layer`,
H heads, G key/value heads, h head size, m `intermediate_size`, S the tapped blocks.

The layers are numbered as they run: blocks 0 ... L-1, then `ln_f` is L and `lm_head` is L+1. `GPT.cut` is a number of that kind:

    idx -> wte -> [ layers 0 ... cut-1 ]  x      -> ( + ) -> [ layers cut ... L ] -> lm_head -> logits
                     |       |                        ^
                     taps of the blocks in S -> adapters
           \\________ prefix: frozen ________/  \\________________ tail: gradients _____________/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from litgpt.config import Config
from litgpt.rope import RotaryTable, rotate


@dataclass(frozen=True)
class Positions:
    """Where the T input positions stand, worked out once per forward pass and used by every block."""

    cos: torch.Tensor
    """(T, n/2), in the dtype that attention runs in"""
    sin: torch.Tensor
    mask: torch.Tensor | None
    """(T, K), true where attention is allowed; None: causal over exactly the T positions, or everything if T = 1"""
    window_mask: torch.Tensor | None
    """the same within the sliding window"""
    index: torch.Tensor | None
    """(T,), places in the key/value cache; None without a cache"""
    end: int
    """K"""


class GPT(nn.Module):
    """A causal language model. `GPT(config)` has fresh weights; `litgpt.lora.GPT` adds adapters."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.lm_head = nn.Linear(config.n_embd, config.V, bias=config.lm_head_bias)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.V, config.n_embd),
                "h": nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
                "ln_f": norm(config),
            }
        )
        self.max_seq_length = config.block_size
        self.rope = RotaryTable(config)
        self.cut: int | None = None
        """the first layer that gradients reach; None: everything is trained, the embedding included"""

    @property
    def blocks(self) -> list[Block]:
        return list(cast("nn.ModuleList", self.transformer["h"]))  # type: ignore[arg-type]

    def forward(self, idx: torch.Tensor, input_pos: torch.Tensor | None = None, input_pos_maxp1: int | None = None) -> torch.Tensor:
        """Logits (B, T, V) of token ids (B, T).

        With `input_pos` (T,) the key/value cache is used: keys and values are stored at those places and everything up to
        `input_pos_maxp1` (default: the largest place + 1) is attended to. Raises ValueError if T exceeds `max_seq_length`.
        """
        return self._forward_impl(idx, self.positions(idx, input_pos, input_pos_maxp1))

    def _forward_impl(self, idx: torch.Tensor, pos: Positions) -> torch.Tensor:
        x, taps = self.prefix(idx, pos)  # (B, T, d), (B, T, S, d)
        x = self.tail(x, taps, pos)  # (B, T, d)
        return self.lm_head(x)  # (B, T, V)

    def prefix(self, idx: torch.Tensor, pos: Positions | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Everything before the cut: its output (B, T, d), and the normalised outputs of the tapped blocks (B, T, S, d).

        Below a cut nothing is trained, so no graph is recorded and no activation is kept.
        """
        pos = pos or self.positions(idx)
        cut, taps = self.cut or 0, []
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cut is None):
            x = self.transformer["wte"](idx)
            for block in self.blocks[:cut]:
                x = block(x, pos)
                if block.skip2lora is not None:
                    taps.append(block.skip2lora.tap(x))
            if cut > self.config.n_layer:
                x = self.transformer["ln_f"](x)
        return x, torch.stack(taps, dim=-2) if taps else x.new_empty(*x.shape[:-1], 0, x.size(-1))

    def tail(self, x: torch.Tensor, taps: torch.Tensor, pos: Positions | None = None) -> torch.Tensor:
        """Everything from the cut up to `lm_head`'s input, (B, T, d): the adapters' sum joins x first.

        With the cut at `ln_f` or `lm_head` positions are independent: x may be (N, d) with taps (N, S, d), any N positions.
        """
        cut = self.cut or 0
        if taps.size(-2):
            x = (x + self.skip_sum(taps)).to(x.dtype)
        if cut < self.config.n_layer:
            pos = pos or self.positions(x[..., 0])
            for block in self.blocks[cut:]:
                x = block(x, pos)
        return x if cut > self.config.n_layer else self.transformer["ln_f"](x)

    def skip_sum(self, taps: torch.Tensor) -> torch.Tensor:
        """s of taps (..., S, d): `litgpt.lora.GPT` has adapters that make it."""
        raise NotImplementedError

    @property
    def tapped_blocks(self) -> list[Block]:
        """The blocks in S, in order: those before the cut that have an adapter."""
        return [block for block in self.blocks[: self.cut or 0] if block.skip2lora is not None]

    def positions(self, idx: torch.Tensor, input_pos: torch.Tensor | None = None, end: int | None = None) -> Positions:
        """Rotary tables and masks for input (B, T)."""
        T = idx.size(1)
        if self.max_seq_length < T:
            raise ValueError(f"a sequence of {T} tokens is longer than max_seq_length, {self.max_seq_length}")
        dtype = self.compute_dtype(idx.device)
        if input_pos is None:
            cos, sin = (table.to(dtype) for table in self.rope(T, idx.device))
            return Positions(cos, sin, None, self._window_mask(torch.arange(T, device=idx.device), T), None, T)
        end = int(input_pos.max()) + 1 if end is None else end
        cos, sin = (table[input_pos].to(dtype) for table in self.rope(end, idx.device))
        mask = None
        if T not in (1, end):
            mask = torch.arange(end, device=idx.device) <= input_pos[:, None]
        return Positions(cos, sin, mask, self._window_mask(input_pos, end), input_pos, end)

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's; adapters are fp32 whatever it is."""
        return cast("torch.Tensor", self.transformer["wte"].weight).dtype

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """What linear layers give: autocast's dtype, or the weights'."""
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.dtype

    def _window_mask(self, places: torch.Tensor, end: int) -> torch.Tensor | None:
        """(T, K): causal, and no further back than the window; None where the window hides nothing."""
        window = self.config.sliding_window_size
        if window is None or end <= window:
            return None
        distance = places[:, None] - torch.arange(end, device=places.device)
        return (distance >= 0) & (distance < window)

    def set_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make room for the keys and values of `max_seq_length` positions (default: the model's own) in every block."""
        weight = cast("torch.Tensor", self.transformer["wte"].weight)
        length = max_seq_length or self.max_seq_length
        config = self.config
        shape = (batch_size, config.n_query_groups, length, config.head_size)
        for block in self.blocks:
            block.attn.kv_cache = KVCache(shape, device or weight.device, dtype or weight.dtype)

    def clear_kv_cache(self) -> None:
        """Free the keys and values."""
        for block in self.blocks:
            block.attn.kv_cache = None


class Block(nn.Module):
    """One decoder block.

    Sequential residual:  y = x + attn(norm_1(x));  out = y + mlp(norm_2(y))
    Parallel residual:    out = x + attn(norm_1(x)) + mlp(norm_2(x)),  with norm_1 for both if the norm is shared
    """

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.norm_1 = norm(config)
        self.attn = CausalSelfAttention(config, block_idx)
        self.norm_2 = None if config.shared_attention_norm else norm(config)
        self.mlp: nn.Module = MLPS[config.mlp_class_name](config)
        self.skip2lora: Any = None
        """a `litgpt.lora.Skip2LoRA` where this block's output is tapped"""

    def forward(self, x: torch.Tensor, pos: Positions) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)"""
        normed = self.norm_1(x)
        attended = self.attn(normed, pos)
        if self.parallel_residual:
            return x + attended + self.mlp(normed if self.norm_2 is None else self.norm_2(x))
        x = x + attended
        return x + self.mlp(x if self.norm_2 is None else self.norm_2(x))


class CausalSelfAttention(nn.Module):
    """Multi-head, grouped-query or multi-query attention, causal, optionally over a sliding window.

    The rows of `qkv` are all H query heads, then the G key heads, then the G value heads.
    """

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.n_embd, sum(config.qkv_sizes), bias=config.bias or config.attn_bias)
        self.proj = nn.Linear(config.qkv_sizes[0], config.n_embd, bias=config.bias)
        windows = config.sliding_window_indices
        self.windowed = config.sliding_window_size is not None and windows is not None and bool(windows[block_idx])
        self.scale = (config.attention_scores_scalar or config.head_size or 1) ** -0.5
        self.kv_cache: KVCache | None = None

    def forward(self, x: torch.Tensor, pos: Positions) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)"""
        B, T, _ = x.shape
        h = self.config.head_size
        q, k, v = (part.view(B, T, -1, h).transpose(1, 2) for part in self.qkv(x).split(self.config.qkv_sizes, dim=-1))
        q, k = rotate(q, pos.cos, pos.sin), rotate(k, pos.cos, pos.sin)  # (B, H, T, h), (B, G, T, h)
        if pos.index is not None:
            if self.kv_cache is None:
                raise ValueError("input_pos needs a key/value cache: call set_kv_cache first")
            k, v = self.kv_cache(pos.index, k, v, pos.end)  # (B, G, K, h)
        mask = pos.mask
        if self.windowed and pos.window_mask is not None:
            mask = pos.window_mask
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale, enable_gqa=q.size(1) != k.size(1))
        return self.proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, H h) -> (B, T, d)


class KVCache:
    """Keys and values of the positions seen so far: (B, G, max_seq_length, h) each."""

    def __init__(self, shape: Sequence[int | None], device: torch.device | str, dtype: torch.dtype) -> None:
        self.k = torch.zeros(shape, device=device, dtype=dtype)  # type: ignore[arg-type]
        self.v = torch.zeros_like(self.k)

    def __call__(self, index: torch.Tensor, k: torch.Tensor, v: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, G, T, h) at `index` (T,); return what is stored up to `end`, (B, G, K, h) each."""
        if end > self.k.size(2):
            raise ValueError(f"position {end - 1} is beyond the key/value cache of {self.k.size(2)} positions")
        B = k.size(0)
        self.k[:B].index_copy_(2, index, k.to(self.k.dtype))
        self.v[:B].index_copy_(2, index, v.to(self.v.dtype))
        return self.k[:B, :, :end].to(k.dtype), self.v[:B, :, :end].to(v.dtype)

    def repeat(self, batch: int, length: int) -> KVCache:
        """A new cache of `batch` rows and `length` positions that begins with what this one (of one row) holds."""
        _, groups, filled, head_size = self.k.shape
        new = KVCache((batch, groups, length, head_size), self.k.device, self.k.dtype)
        new.k[:, :, :filled], new.v[:, :, :filled] = self.k, self.v
        return new


class GptNeoxMLP(nn.Module):
    """proj(gelu(fc(x)))"""

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.fc = nn.Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)
        self.approximate = config.gelu_approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (B, T, m) -> (B, T, d)"""
        return self.proj(F.gelu(self.fc(x), approximate=self.approximate))


class LLaMAMLP(nn.Module):
    """SwiGLU, arXiv 2002.05202: proj(silu(fc_1(x)) * fc_2(x))"""

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.fc_1 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.fc_2 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, d) -> (B, T, m) -> (B, T, d)"""
        return self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))


MLPS: dict[str, type[nn.Module]] = {"GptNeoxMLP": GptNeoxMLP, "LLaMAMLP": LLaMAMLP}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, arXiv 1910.07467; the quotient in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., d)"""
        return rms_normalise(x, self.eps) * self.weight


def rms_normalise(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x over its root mean square along the last dimension, computed in fp32, x's dtype returned."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def norm(config: Config) -> nn.Module:
    """The norm that the config names, over d."""
    if config.norm_class_name == "RMSNorm":
        return RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps)
