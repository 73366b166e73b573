"""Attention, its key/value cache, and the norms. Letters in shapes: as in `litgpt.model`."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from litgpt.config import Config
from litgpt.device import cpu_capabilities
from litgpt.fused import attention, exclusion, rms_norm
from litgpt.packing import Packing
from litgpt.rope import rotate

# Multiplications of queries and keys up to which torch's attention takes no longer than `litgpt.fused.attention`. On processors without
# AVX512-BF16 it takes a tenth to nine tenths of the time.
FEW = 2**21


@dataclass(frozen=True)
class Positions:
    """Rotary tables and masks of the T input positions, computed once per forward pass for all blocks."""

    # cos and sin, (T, n) each, or (B, 1, T, n) if samples have places of their own or take different factors of LongRoPE, in
    # attention's dtype: of `rope_base`, then of `rope_local_base_freq` if there is one
    rotary: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    mask: torch.Tensor | None  # (T, K) or (B, 1, T, K), true where attention is allowed; None: causal over T, or everything if T = 1;
    # with ALiBi numbers, (H, T, K) or (B, H, T, K), that are added to the scores
    window_mask: torch.Tensor | None  # the same within the sliding window
    index: torch.Tensor | None  # (T,) or (B, T), places in the key/value cache; None without a cache
    end: int  # K
    packing: Packing | None = None  # of x (N, d); the fields above are those of the samples' own T positions, with K = P + T
    stem: Positions | None = None  # of the stem's P positions, which attend to each other
    # keys and values by block: (N, G h) each of a packed batch, written while it runs; or (B, G, C, h) each, before the samples' own
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None
    context: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, arXiv 1910.07467; the quotient in fp32.

    With `unit_offset` (Gemma) the factor is 1 + weight, and the whole product is in fp32.
    """

    def __init__(self, size: int, eps: float, unit_offset: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.unit_offset = eps, unit_offset
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.unit_offset else 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., d)"""
        return rms_norm(x, 1 + self.weight.float() if self.unit_offset else self.weight, self.eps)


def alibi(config: Config, allowed: torch.Tensor, places: torch.Tensor, keys: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what is added to the scores of each head, -m_i (place - key) where attention is `allowed`, (T, K) or (B, 1, T, K), else
    -inf: (H, T, K) or (B, H, T, K), for places (T,) or (B, 1, T) and keys (K,) or (B, 1, K).

    ALiBi, arXiv 2108.12409: m_i = 2^(-8 i / P), i = 1 ... P, P the power of two from H on; if H is less, the even i come first. Falcon's
    is m_i key / sqrt(h), whose product was rounded to bf16 in training, and is so in transformers.
    """
    P = 2 ** (config.n_head - 1).bit_length()
    m = 2.0 ** (-8 / P * torch.arange(1, P + 1, device=places.device))
    m = (m if config.n_head == P else torch.cat((m[1::2], m[::2]))[: config.n_head])[:, None, None]
    if config.alibi_scaled:
        added = (m.bfloat16() * keys[..., None, :]).float() * config.head_size**-0.5  # (H, 1, K) or (B, H, 1, K)
    else:
        added = m * (keys[..., None, :] - places[..., None])
    return torch.where(allowed, added, -torch.inf).to(dtype)


def norm(config: Config, size: int | None = None) -> Any:
    """Return the norm that the config names, over `size` (default: d)."""
    size = size or config.n_embd
    if config.norm_class_name == "RMSNorm":
        return RMSNorm(size, config.norm_eps, config.unit_offset)
    return nn.LayerNorm(size, eps=config.norm_eps, elementwise_affine=config.norm_affine, bias=config.norm_bias)


class CausalSelfAttention(nn.Module):
    """Multi-head, grouped-query or multi-query attention, causal, optionally over a sliding window.

    The rows of `qkv` are all H query heads, then the G key heads, then the G value heads.
    """

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__()
        self.config, self.index = config, block_idx
        self.make_layers(config)
        windows = config.sliding_window_indices
        self.windowed = config.sliding_window_size is not None and windows is not None and bool(windows[block_idx])
        # index of the table in `Positions.rotary` that rotates q and k; -1: none
        self.rotary = -1 if not config.rotates else config.rope_indices[block_idx] if config.rope_indices else 0
        self.scale = (config.attention_scores_scalar or config.head_size) ** -0.5
        self.softcap = config.attention_logit_softcapping
        if config.attention_sinks:
            self.sinks = nn.Parameter(torch.zeros(config.n_head))
        self.kv_cache: KVCache | None = None

    def make_layers(self, config: Config) -> None:
        """Make the linear layers and the norms."""
        self.qkv = nn.Linear(config.n_embd, sum(config.qkv_sizes), bias=config.bias or config.attn_bias)
        self.proj = nn.Linear(config.qkv_sizes[0], config.n_embd, bias=config.bias)
        self.norm_q = self.norm_k = None
        if config.norm_qk:
            per_head, sizes = config.norm_qk_type == "default", config.qkv_sizes
            self.norm_q, self.norm_k = (norm(config, config.head_size if per_head else size) for size in sizes[:2])

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows that `_heads` divides, (..., d) -> (..., (H + 2 G) h)."""
        qkv, most = self.qkv(x), self.config.clip_qkv
        return qkv if most is None else qkv.clamp(-most, most)

    def forward(self, x: torch.Tensor, pos: Positions) -> torch.Tensor:
        """(B, T, d) -> (B, T, d), or packed (N, d) -> (N, d)"""
        qkv = self.project(x)
        if pos.packing is None:
            q, k, v = self._heads(qkv, pos)
            if pos.index is not None:
                if self.kv_cache is None:
                    raise ValueError("input_pos needs a key/value cache: call set_kv_cache first")
                k, v = self.kv_cache(pos.index, k, v, pos.end)  # (B, G, K, h)
            return self.proj(self._attend(q, k, v, pos))
        shared, own = pos.packing.spread(qkv)  # (1, P, ...), (B, T, ...)
        q, k, v = self._heads(own, pos)
        stem = None if pos.stem is None else self._heads(shared, pos.stem)
        if pos.kept is not None:
            pos.kept[self.index] = tuple(  # type: ignore[assignment]
                pos.packing.gather(None if stem is None else _rows(stem[i]), _rows(part)) for i, part in ((1, k), (2, v))
            )
        if pos.context is not None:
            k, v = (torch.cat((earlier.to(part.dtype), part), dim=2) for earlier, part in zip(pos.context[self.index], (k, v), strict=True))
        if stem is None or pos.stem is None:
            return self.proj(pos.packing.gather(None, self._attend(q, k, v, pos)))
        k, v = (torch.cat((first.expand(k.size(0), -1, -1, -1), rest), dim=2) for first, rest in zip(stem[1:], (k, v), strict=True))
        return self.proj(pos.packing.gather(self._attend(*stem, pos.stem), self._attend(q, k, v, pos)))

    def _heads(self, qkv: torch.Tensor, pos: Positions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, (H + 2 G) h) -> q (B, H, T, h), k and v (B, G, T, h), q and k normalised and rotated."""
        B, T, _ = qkv.shape
        h = self.config.head_size
        if self.norm_q is None and self.rotary >= 0:  # q and k are rotated together
            H, G = self.config.n_head, self.config.n_query_groups
            both, v = (part.view(B, T, -1, h).transpose(1, 2) for part in qkv.split(((H + G) * h, G * h), dim=-1))
            q, k = rotate(both, *pos.rotary[self.rotary]).split((H, G), dim=1)
            return q, k, v
        q, k, v = qkv.split(self.config.qkv_sizes, dim=-1)
        if self.norm_q is not None and self.norm_k is not None:  # over h or, "olmo2", over H h and G h
            q, k = (norm(part.view(B, T, -1, norm.weight.numel())) for norm, part in ((self.norm_q, q), (self.norm_k, k)))
        q, k, v = (part.view(B, T, -1, h).transpose(1, 2) for part in (q, k, v))
        if self.rotary >= 0:
            q, k = (rotate(part, *pos.rotary[self.rotary]) for part in (q, k))
        return q, k, v

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pos: Positions) -> torch.Tensor:
        """q (B, H, T, h), k and v (B, G, K, h) -> (B, T, H h)"""
        mask = pos.mask
        if self.windowed and pos.window_mask is not None:
            mask = pos.window_mask
        B, H, T, _ = q.shape
        if self.softcap is not None or self.config.attention_sinks:
            sinks = self.sinks if self.config.attention_sinks else None
            return _rows(plain_attention(q, k, v, mask, self.scale, self.softcap, sinks))
        bf16_on_cpu = q.dtype == torch.bfloat16 and q.device.type == "cpu"
        has_alibi = mask is not None and mask.is_floating_point()
        is_long = T > 1 and q.numel() * k.size(2) > FEW and not has_alibi
        if bf16_on_cpu and not torch.compiler.is_compiling() and is_long and cpu_capabilities().get("avx512_bf16"):
            return attention(q, k, v, mask, self.scale).flatten(2)
        how: dict[str, Any] = {"scale": self.scale}
        if mask is None and T > 1:  # torch.compile needs the branch: its sizes are symbolic
            how["is_causal"] = True
        if T == 1 and k.size(1) != H and not has_alibi:
            q = q.reshape(B, k.size(1), -1, q.size(3))  # the heads of a group as positions of one head, for a single product
        how["enable_gqa"] = q.size(1) != k.size(1)
        if bf16_on_cpu and (q.size(2) == 1 or q.requires_grad):  # in fp32 they take less time
            mask = mask.float() if mask is not None and has_alibi else mask
            with torch.autocast("cpu", enabled=False):
                y = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, **how).to(q.dtype)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, **how)
        return _rows(y.reshape(B, H, T, -1))


def _rows(heads: torch.Tensor) -> torch.Tensor:
    """(B, G, T, h) -> (B, T, G h)"""
    return heads.transpose(1, 2).flatten(2)


def plain_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return softmax(mask(cap tanh(scale q k^T / cap))) v, for q (B, H, T, h), k and v (B, G, K, h): (B, H, T, h).

    Everything but the products is in fp32. torch's fused attention supports neither the cap (Gemma 2, arXiv 2408.00118) nor sinks (H,),
    scores that take part of the softmax's mass (gpt-oss, arXiv 2508.10925).
    """
    grouped = q.unflatten(1, (k.size(1), -1)).flatten(2, 3)  # (B, G, H/G T, h): one product for the heads of a group
    scores = (grouped @ k.mT).unflatten(2, (-1, q.size(2)))  # (B, G, H/G, T, K)
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * (scale if cap is None else scale / cap)
    if cap is not None:
        scores = torch.tanh(scores) * cap
    if mask is not None:
        scores = scores + exclusion(mask, scores.dtype)[:, None]
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).view(k.size(1), -1, 1, 1).expand(*scores.shape[:-1], 1)), dim=-1)
    p = scores.softmax(-1).to(q.dtype)[..., : k.size(2)]
    return (p.flatten(2, 3) @ v).unflatten(2, (-1, q.size(2))).flatten(1, 2)


class KVCache:
    """Keys and values of the positions seen so far: (B, heads, length, size) each, with `Config.cache_sizes`."""

    def __init__(self, sizes: Sequence[tuple[int, int]], B: int, length: int, device: torch.device | str, dtype: torch.dtype) -> None:
        self.k, self.v = (torch.zeros(B, heads, length, size, device=device, dtype=dtype) for heads, size in sizes)

    def reset_parameters(self) -> None:
        """Set keys and values to zero."""
        self.k.zero_()
        self.v.zero_()

    def rows(self, index: int, count: int) -> KVCache:
        """Return the cache of `count` samples from `index` on, which shares this one's memory."""
        view = copy(self)
        view.k, view.v = self.k[index : index + count], self.v[index : index + count]
        return view

    def __call__(self, index: torch.Tensor, k: torch.Tensor, v: torch.Tensor, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, G, T, h) at `index`, (T,) or (B, T). Return the stored ones before `end`, (B, G, K, h) each."""
        if end > self.k.size(2):
            raise ValueError(f"position {end - 1} is beyond the key/value cache of {self.k.size(2)} positions")
        B = k.size(0)
        rows = None if index.dim() == 1 else torch.arange(B, device=index.device)[:, None]
        for stored, new in ((self.k[:B], k.to(self.k.dtype)), (self.v[:B], v.to(self.v.dtype))):
            if rows is None:
                stored.index_copy_(2, index, new)
            else:  # on a CPU `scatter_` takes 25 times as long in bf16
                stored[rows, :, index] = new.transpose(1, 2)
        return self.k[:B, :, :end].to(k.dtype), self.v[:B, :, :end].to(v.dtype)
