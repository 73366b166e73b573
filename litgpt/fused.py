"""Passes with backward passes by hand: they keep less for the backward pass than autograd would, and take fewer operators.

All are differentiable once. Letters in shapes: N rows, n inputs, r rank, m as in `litgpt.model`.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

SCORES = 2**21  # bytes of a thread's scores of attention, which stay in the processor's cache
KEYS = 256  # keys of a part are a multiple: oneDNN prepares a product for each shape, and keeps it


def draw(x: torch.Tensor, p: float) -> torch.Tensor:
    """Draw a dropout with probability p: on a CPU the places that become 0, elsewhere a mask that is true where x stays.

    A CPU draws the gaps between the places, which are geometric: p random numbers for an element in place of one. There are enough to reach
    the end, but for a chance of 1e-9; those beyond it become one place too far.
    """
    if x.device.type != "cpu":
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)
    expected = x.numel() * round(p * 2**16) // 2**16 + 1
    u = torch.rand(expected + expected // 16 + 160, dtype=torch.float32)  # 6 standard deviations more
    gaps = u.neg_().log1p_().mul_(1 / math.log1p(-p)).long().add_(1)  # `geometric_` takes three times as long
    return gaps.cumsum(0).sub_(1).clamp_(max=x.numel())


def zero(x: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Return x with 0 at the places that were drawn."""
    if drawn.dtype == torch.bool:
        return x * drawn
    y = x.new_empty(x.numel() + 1)
    y[:-1] = x.flatten()
    return y.index_fill_(0, drawn, 0)[:-1].view(x.shape)


def drop(x: torch.Tensor, drawn: torch.Tensor, p: float) -> torch.Tensor:
    """Return 0 at the places that were drawn, x / (1 - p) elsewhere."""
    return x * zero(x.new_full(x.shape, 1 / (1 - p)), drawn)


def thin(x: torch.Tensor, A: torch.Tensor, p: float = 0.0) -> torch.Tensor:
    """Return D(x) A^T, D a dropout: (N, n) and (r, n) -> (N, r), column by column: processors multiply so faster by narrow matrices."""
    return _Dropped.apply(x, A, draw(x, p), 1 / (1 - p)) if p else (A @ x.t()).t()


class _Dropped(torch.autograd.Function):
    """y = D(x) A^T       dx = D(dy A)       dA = dy^T D(x), with x kept in place of D(x): layers that read the same x share it.

    D(x) = s Z(x), Z with zeros at the places that were drawn. s scales y and dy, which are narrow.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, A: torch.Tensor, drawn: torch.Tensor, s: float) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, A, drawn)
        ctx.s = s
        return (A @ zero(x, drawn).t()).mul_(s).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, A, drawn = ctx.saved_tensors
        grad = grad.to(A.dtype) * ctx.s  # with autocast it is narrower
        dx = zero(grad @ A, drawn) if ctx.needs_input_grad[0] else None
        return dx, None if x is None else grad.t() @ zero(x, drawn), None, None


def multiply(x: torch.Tensor, layer: Any) -> torch.Tensor:
    """Return x W^T + b, (..., in) -> (..., out), for a frozen W that `layer.dense(dtype)` computes, or gathers."""
    y = _Multiplied.apply(x, layer)
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


class _Multiplied(torch.autograd.Function):
    """y = x W^T       dx = dy W, with W computed again in place of being kept"""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Any) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x.to(dtype), layer.dense(dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (grad @ ctx.layer.dense(grad.dtype)).to(ctx.dtype), None


def gated(gate: torch.Tensor, up: torch.Tensor, approximate: str | None = None) -> torch.Tensor:
    """Return silu(gate) * up, or gelu(gate) * up with an approximation of `F.gelu`: (..., m)."""
    return _Gated.apply(gate, up, approximate) if torch.is_grad_enabled() else _activate(gate, approximate).mul_(up)


class _Gated(torch.autograd.Function):
    """y = f(g) u       du = f(g) dy       dg = f'(g) u dy, with f(g) computed again"""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, approximate: str | None) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.approximate = approximate
        return _activate(gate, approximate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (gate, up), approximate, aten = ctx.saved_tensors, ctx.approximate, torch.ops.aten
        d_gate = grad * up
        d_gate = aten.silu_backward(d_gate, gate) if approximate is None else aten.gelu_backward(d_gate, gate, approximate=approximate)
        return d_gate, _activate(gate, approximate).mul_(grad), None


def _activate(x: torch.Tensor, approximate: str | None) -> torch.Tensor:
    return F.silu(x) if approximate is None else F.gelu(x, approximate=approximate)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Return softmax(mask(scale q k^T)) v for q (B, H, T, h), k and v (B, G, K, h): (B, T, H, h).

    The mask, (T, K) or (B, 1, T, K), is true where attention is allowed; None: causal over T = K. Scores and probabilities are rounded to
    q's dtype for the products; the softmax is in fp32.
    """
    return _Attention.apply(q, k, v, mask, scale)


class _Attention(torch.autograd.Function):
    """y = P v,  P = softmax(S),  S = scale q k^T       dv = P^T dy       dS = P (dP - sum(P dP)),  dP = dy v^T       dq = scale dS k

    and dk = scale dS^T q, with P computed again. A processor computes a few scores at a time, `SCORES` bytes for a thread, which stay in
    its cache: queries of some samples, or some queries of one sample with the keys that any of them may attend to.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        y = q.new_empty(q.size(0), q.size(2), q.size(1), v.size(3))
        for b, t, j, excluded in _parts(q, k, mask):
            queries, keys, values = _products(k.size(1), q[b, :, t], k[b, :, j], v[b, :, j])
            p = _probabilities(queries, keys, excluded, scale).to(q.dtype)
            y[b, t] = (p @ values).view(-1, *q[b, :, t].shape[1:3], v.size(3)).transpose(1, 2)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, mask = ctx.saved_tensors
        sums = torch.float32 if _room(q, k) < q.size(2) else q.dtype  # several parts of a sample are added up
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=sums), torch.zeros_like(v, dtype=sums)
        for b, t, j, excluded in _parts(q, k, mask):
            queries, keys, values, dy = _products(k.size(1), q[b, :, t], k[b, :, j], v[b, :, j], grad[b, t].transpose(1, 2))
            p = _probabilities(queries, keys, excluded, ctx.scale)
            ds = torch.ops.aten._softmax_backward_data((dy @ values.mT).float(), p, -1, torch.float32).to(q.dtype)
            dq[b, :, t] = (ds @ keys).mul_(ctx.scale).view(q[b, :, t].shape)
            dk[b, :, j] += (ds.mT @ queries).mul_(ctx.scale).view(k[b, :, j].shape)
            dv[b, :, j] += (p.to(q.dtype).mT @ dy).view(v[b, :, j].shape)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _products(groups: int, *heads: torch.Tensor) -> list[torch.Tensor]:
    """Return (B, H, T, h) with the heads of a group one below the other, as matrices of one product: (B G, H/G T, h)."""
    return [each.reshape(each.size(0) * groups, -1, each.size(3)) for each in heads]


def _room(q: torch.Tensor, k: torch.Tensor) -> int:
    """Return how many positions' scores fit into the cache."""
    return SCORES * torch.get_num_threads() // (4 * q.size(1) * k.size(2))


def _parts(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> Iterator[tuple[slice, slice, slice, torch.Tensor]]:
    """Yield samples, queries and keys whose scores fit into the cache, and what is added to them: 0, or -inf where the mask is false."""
    (B, _, T, _), K, room = q.shape, k.size(2), _room(q, k)
    if room >= T:
        every, n = slice(0, T), room // T
        excluded = exclusion(_causal(every, K) if mask is None else mask, torch.float32)
        for first in range(0, B, n):
            b = slice(first, first + n)
            yield b, every, slice(K), excluded[b] if len(excluded) > 1 else excluded
        return
    step = max(16, room)
    for i, start in product(range(B), range(0, T, step)):
        t = slice(start, min(start + step, T))
        rows = _causal(t, K) if mask is None else mask[t] if mask.dim() == 2 else mask[i, 0, t]  # (T', K)
        seen = rows.any(0).nonzero()
        j = slice(int(seen[0]) // KEYS * KEYS, int(seen[-1]) // KEYS * KEYS + KEYS)
        yield slice(i, i + 1), t, j, exclusion(rows[:, j], torch.float32)


def _causal(t: slice, K: int) -> torch.Tensor:
    """Return the mask of the positions t, (T', K)."""
    return torch.ones(t.stop - t.start, K, dtype=torch.bool).tril(t.start)


def exclusion(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return 0 where a mask (T, K) or (B, 1, T, K) is true, -inf elsewhere: (1 or B, 1, T, K)."""
    added = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    return added if mask.dim() == 4 else added[None, None]


def _probabilities(q: torch.Tensor, k: torch.Tensor, excluded: torch.Tensor, scale: float) -> torch.Tensor:
    """Return softmax(scale q k^T + excluded) in fp32, (B G, H/G T, K), for `_products` and (1 or B, 1, T, K)."""
    (groups, rows, _), (T, K) = q.shape, excluded.shape[2:]
    scores = (q @ k.mT).float().view(len(excluded), groups // len(excluded), rows // T, T, K)
    return torch.add(excluded[:, None], scores, alpha=scale, out=scores).softmax(-1).view(groups, rows, K)


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Return x over its root mean square along the last dimension, times the weight, in x's dtype.

    The quotient is computed in fp32 (fp64 for fp64) and rounded to x's dtype; a weight of a wider dtype multiplies it before rounding.
    """
    return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _normalised(x, weight, eps)[0]


def _normalised(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y and q of `_RMSNorm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    q = x.to(wide).square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
    y = x * q  # fp32
    if weight is None:
        return y.to(x.dtype), q
    return (y.mul_(weight).to(x.dtype) if weight.dtype == wide else y.to(x.dtype).mul_(weight)), q


class _RMSNorm(torch.autograd.Function):
    """y = w x q,  q = 1 / sqrt(mean(x^2) + eps)       dx = q (w dy - x q^2 mean(x w dy))       dw = sum over rows of dy x q"""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        y, q = _normalised(x, weight, eps)
        ctx.save_for_backward(x, q, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, q, weight = ctx.saved_tensors
        dx = dw = None
        if weight is not None and ctx.needs_input_grad[1]:
            dw = (x * q).mul_(grad).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            g = grad.to(q.dtype) if weight is None else grad * weight.to(q.dtype)  # (..., d)
            share = (g * x).sum(-1, keepdim=True).mul_(q).mul_(q).div_(x.size(-1))  # (..., 1)
            dx = torch.addcmul(g, x.to(q.dtype), share, value=-1).mul_(q).to(x.dtype)
        return dx, dw, None
