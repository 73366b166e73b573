"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of all heads come from one narrow vector per position.

    c = norm(W_a x)      k_i = (W_k,i c, r)      v_i = W_v,i c      q_i = (n_i, p_i)      for each head i

r and p_i are rotated by position, and all heads share r. The key/value cache holds c instead of keys and r instead of values.
Letters in shapes: as in `litgpt.model`, with h = nope + rope the size of q and k; C the size of c, R of r, V' of v.
"""

import torch
from torch import nn

from litgpt.attention import CausalSelfAttention, Positions, RMSNorm
from litgpt.config import Config
from litgpt.rope import rotate

NORM_EPS = 1e-6  # of the two norms, whatever norm_eps says, as in transformers


class MultiheadLatentAttention(CausalSelfAttention):
    """Latent attention with LitGPT's names. q has a narrow vector of its own, or comes from x (`q_lora_rank` null)."""

    def make_layers(self, config: Config) -> None:
        q_rank, C, R, nope, v = config.latent_sizes
        d, H = config.n_embd, config.n_head
        if q_rank is None:
            self.q_proj = nn.Linear(d, H * (nope + R), bias=False)
        else:
            self.q_a_proj = nn.Linear(d, q_rank, bias=False)
            self.q_a_norm = RMSNorm(q_rank, NORM_EPS)
            self.q_b_proj = nn.Linear(q_rank, H * (nope + R), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(d, C + R, bias=False)
        self.kv_a_norm = RMSNorm(C, NORM_EPS)
        self.kv_b_proj = nn.Linear(C, H * (nope + v), bias=False)
        self.proj = nn.Linear(H * v, d, bias=False)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., H h + C + R)"""
        q = self.q_proj(x) if self.config.latent_sizes[0] is None else self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))
        return torch.cat((q, self.kv_a_proj_with_mqa(x)), dim=-1)

    def _heads(self, qkv: torch.Tensor, pos: Positions) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, H h + C + R) -> q (B, H, T, h), c (B, 1, T, C), r (B, 1, T, R)"""
        _, C, R, nope, _ = self.config.latent_sizes
        q, c, r = qkv.split((qkv.size(-1) - C - R, C, R), dim=-1)
        q = q.unflatten(-1, (-1, nope + R)).transpose(1, 2)
        n, p = q.split((nope, R), dim=-1)
        return torch.cat((n, self._turned(p, pos)), dim=-1), self.kv_a_norm(c)[:, None], self._turned(r[:, None], pos)

    def _turned(self, x: torch.Tensor, pos: Positions) -> torch.Tensor:
        """Return x (..., T, R) rotated by position; with `rope_interleave` the pairs are neighbours in x and halves in the result."""
        if self.config.rope_interleave:
            x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rotate(x, *pos.rotary[0])

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pos: Positions) -> torch.Tensor:
        """q (B, H, T, h), c (B, 1, K, C) for k and r (B, 1, K, R) for v -> (B, T, H V')"""
        _, _, _, nope, size = self.config.latent_sizes
        each = self.kv_b_proj(k[:, 0]).unflatten(-1, (-1, nope + size)).transpose(1, 2)  # (B, H, K, nope + V')
        own, values = each.split((nope, size), dim=-1)
        return super()._attend(q, torch.cat((own, v.expand(-1, own.size(1), -1, -1)), dim=-1), values, pos)
