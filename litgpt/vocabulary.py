"""An embedding and output layer whose rows are spread over all ranks. No rank holds all of them, or of their gradients, at any time.

    wte(ids)     each id is sent to the rank that has its row, and the row is sent back; in the backward pass its gradient to the rank
    lm_head      y_v = W_v h: W is gathered a piece at a time, some rows of every rank's. A loss reads all pieces for log sum exp y_v,
                 and the backward pass once more for dz_v = w (softmax(y)_v - [v = target]) dy/dz, dh = sum_v dz_v W_v, and
                 dW_v = dz_v h, which are summed into the rank that has the row

All ranks must call them, and their backward pass, equally often, with any number of tokens. Letters in shapes: as in `litgpt.model`, and
P rows of a piece.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from litgpt.model import GPT, finish_logits

PIECE_BYTES, CPU_PIECE_BYTES = 32 * 2**20, 8 * 2**20
BLOCK_BYTES = 8 * 2**20  # of a piece's logits
IGNORED = -100  # a target without loss, as in `torch.nn.functional.cross_entropy`


def spread(model: GPT, mesh: Any) -> None:
    """Spread a meta-device model's embedding and output layer over a mesh, if they have no adapter and no trained bias."""
    tied, embedding, head = model.is_tied, model.transformer["wte"], model.lm_head
    is_plain = {nn.Embedding: SpreadEmbedding, nn.Linear: SpreadHead}
    chosen: list[Any] = [module for module in (embedding, head) if type(module) in is_plain]
    if getattr(head, "bias", None) is not None and head.bias.requires_grad:
        chosen.remove(head)
    if mesh.size() == 1 or not chosen or (tied and len(chosen) == 1):  # the other needs all of a tied weight
        return
    for module in chosen:
        module.__class__ = is_plain[type(module)]
        module.weight = nn.Parameter(of_mesh(module.weight, mesh), requires_grad=module.weight.requires_grad)
    if tied:
        model.tie_head()


def as_columns(values: torch.Tensor) -> torch.Tensor:
    """Return (N, K) values, or (N, 1) for (N,)."""
    return values if values.dim() > 1 else values[:, None]


def own_chunk(value: torch.Tensor, mesh: Any) -> torch.Tensor:
    """Return this rank's rows of a tensor whose rows are spread over a mesh."""
    chunks = value.chunk(mesh.size())
    return chunks[mesh.get_local_rank()] if mesh.get_local_rank() < len(chunks) else value[:0]


def of_mesh(weight: torch.Tensor, mesh: Any) -> torch.Tensor:
    """Return a tensor on the meta device as one whose rows are spread over a mesh."""
    from torch.distributed.tensor import DTensor, Shard

    own = own_chunk(weight, mesh)
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=weight.shape, stride=weight.stride())


def as_sharded(own: torch.Tensor, like: Any) -> Any:
    """Return the whole tensor of a sharded parameter's shape, of which this rank has these rows."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def gather(out: torch.Tensor, own: torch.Tensor, group: Any, async_op: bool = False) -> Any:
    """Fill `out` with the tensors of all ranks, each as long as `own`. gloo's own gathering holds a copy of `out`."""
    if out.device.type != "cpu":
        return torch.distributed.all_gather_into_tensor(out, own, group, async_op)
    parts = out.view(group.size(), -1)
    if parts[group.rank()].data_ptr() != own.data_ptr():
        parts[group.rank()].copy_(own.flatten())
    for work in [torch.distributed.broadcast(part, group=group, group_src=rank, async_op=True) for rank, part in enumerate(parts)]:
        work.wait()
    return True  # no work is left; FSDP2 frees the buffer at once, not after the next gathering


class SpreadEmbedding(nn.Embedding):
    """The embedding."""

    weight: Any

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., d)"""
        return _Lookup.apply(self.weight, ids)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Any, ids: torch.Tensor) -> torch.Tensor:
        mesh, local = weight.device_mesh, weight.to_local()
        size = -(-len(weight) // mesh.size())  # rows of a rank
        owners = ids.flatten() // size
        order = owners.argsort(stable=True)
        asked = owners.bincount(minlength=mesh.size())
        wanted = _exchange(asked, [1] * mesh.size(), [1] * mesh.size(), mesh)
        here, there = asked.tolist(), wanted.tolist()
        rows = (_exchange(ids.flatten()[order], here, there, mesh) - size * mesh.get_local_rank()).to(local.device)
        found = _exchange(local[rows].to(ids.device), there, here, mesh)  # (N, d)
        ctx.weight, ctx.sizes = weight, (here, there)
        ctx.save_for_backward(order, rows)
        return torch.empty_like(found).index_copy_(0, order, found).unflatten(0, ids.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, None]:
        order, rows = ctx.saved_tensors
        here, there = ctx.sizes
        sent = _exchange(grad.flatten(0, -2)[order], here, there, ctx.weight.device_mesh)
        own = ctx.weight.to_local()
        total = torch.zeros_like(own, dtype=torch.promote_types(own.dtype, torch.float32))
        return as_sharded(total.index_add_(0, rows, sent.to(total)).to(own), ctx.weight), None


def _exchange(values: torch.Tensor, sizes: list[int], received: list[int], mesh: Any) -> torch.Tensor:
    """Send `sizes` of the values to each rank in turn, and return those `received` from each."""
    out = values.new_empty(sum(received), *values.shape[1:])
    torch.distributed.all_to_all_single(out, values.contiguous(), received, sizes, group=mesh.get_group())
    return out


class SpreadHead(nn.Linear):
    """The output layer."""

    weight: Any

    def pieces(self, like: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Yield one piece after the other: which rows of each rank it has, and their indices (P,), weights (P, d) and biases (P,).

        They have the dtype and the device of `like`, and increasing indices. The weights are overwritten by the next piece's.
        """
        mesh, local = self.weight.device_mesh, self.weight.to_local()
        ranks, V, d = mesh.size(), self.out_features, self.in_features
        size = -(-V // ranks)
        nbytes = CPU_PIECE_BYTES if like.device.type == "cpu" else PIECE_BYTES
        step = min(size, max(1, nbytes // (ranks * d * like.element_size())))
        buffer = like.new_empty(ranks * step, d)
        for start in range(0, size, step):
            stop = min(start + step, size)
            own = local[start:stop].to(like)
            own = F.pad(own, (0, 0, 0, stop - start - len(own)))
            rows = buffer[: ranks * len(own)]
            gather(rows, own, mesh.get_group())
            indices = torch.arange(start, stop, device=like.device) + size * torch.arange(ranks, device=like.device)[:, None]
            indices = indices.flatten()
            if stop + size * (ranks - 1) > V:
                rows, indices = rows[indices < V], indices[indices < V]
            yield slice(start, stop), indices, rows, None if self.bias is None else self.bias[indices].to(like)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., V), without gradients"""
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for _, indices, rows, bias in self.pieces(x):
            y[..., indices] = F.linear(x, rows, bias)
        return y

    def reduce(self, gradient: torch.Tensor, here: slice, own: torch.Tensor) -> None:
        """Add all ranks' gradients (P, d) of the piece that has the rows `here` of each rank to `own`, the gradient of this rank's rows."""
        mesh, step = self.weight.device_mesh, here.stop - here.start
        group, part = mesh.get_group(), own[here]
        parts = F.pad(gradient, (0, 0, 0, mesh.size() * step - len(gradient))).split(step)  # the last ranks may have fewer rows
        for work in [torch.distributed.reduce(rows, group=group, group_dst=rank, async_op=True) for rank, rows in enumerate(parts)]:
            work.wait()
        part += parts[mesh.get_local_rank()][: len(part)]

    def losses(self, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, divisor: float, cap: float | None) -> Any:
        """Return -w log softmax(y)[target] of `litgpt.loss.HeadLoss`, (N,), for targets and weights (N,) or (N, K)."""
        return _Losses.apply(hidden, self.weight, targets, weights, self, divisor, cap)


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: Any,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        head: SpreadHead,
        divisor: float,
        cap: float | None,
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weights = (targets != IGNORED).to(wide) if weights is None else torch.where(targets == IGNORED, 0, weights).to(wide)
        targets, weights = as_columns(targets), as_columns(weights)
        top = torch.full((len(targets), 1), -torch.inf, dtype=wide, device=hidden.device)  # max y
        total = torch.zeros_like(top)  # sum exp(y - top)
        chosen = torch.zeros_like(weights)
        for _, indices, rows, bias in head.pieces(hidden):
            for here, y, at in _blocks(hidden, targets, indices, rows, bias, head.out_features, divisor, cap):
                highest = torch.maximum(top[here], y.amax(-1, keepdim=True))
                total[here] = total[here] * (top[here] - highest).exp_() + (y - highest).exp_().sum(-1, keepdim=True)
                top[here] = highest
                chosen[here] += torch.where(at < 0, 0, y.gather(1, at.clamp(min=0)))
        ctx.head, ctx.divisor, ctx.cap = head, divisor, cap
        ctx.save_for_backward(hidden, targets, weights, top, total)
        return ((top - chosen + total.log()) * weights).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        head, cap, (hidden, targets, weights, top, total) = ctx.head, ctx.cap, ctx.saved_tensors
        weights = weights * grad[:, None]
        gradient = torch.zeros_like(hidden, dtype=top.dtype)
        local = head.weight.to_local()
        of_rows = torch.zeros_like(local, dtype=top.dtype, device=hidden.device) if ctx.needs_input_grad[1] else None
        for part, indices, rows, bias in head.pieces(hidden):
            of_piece = torch.zeros_like(rows, dtype=top.dtype) if of_rows is not None else None
            for here, y, at in _blocks(hidden, targets, indices, rows, bias, head.out_features, ctx.divisor, cap):
                each = weights[here]
                p = (y - top[here]).exp_().mul_(each.sum(1, keepdim=True) / total[here])
                p.scatter_add_(1, at.clamp(min=0), torch.where(at < 0, 0, -each))
                if cap is not None:
                    p.mul_(1 - (y / cap).square_())
                dz = p.div_(ctx.divisor).to(rows.dtype)
                gradient[here] += dz @ rows
                if of_piece is not None:
                    of_piece += dz.t() @ hidden[here]
            if of_piece is not None:
                head.reduce(of_piece, part, of_rows)
        return gradient.to(hidden.dtype), None if of_rows is None else as_sharded(of_rows.to(local), head.weight), *(None,) * 5


def _blocks(
    hidden: torch.Tensor, targets: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, bias: Any, V: int, divisor: float, cap: Any
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield rows of `hidden`, their logits y for a piece, and the targets' places (rows, K) in it or -1."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    place = torch.full((V,), -1, device=indices.device)  # of each token in the piece
    place.index_copy_(0, indices, torch.arange(len(indices), device=indices.device))
    step = max(1, BLOCK_BYTES // (len(indices) * wide.itemsize))
    for start in range(0, len(targets), step):
        here = slice(start, start + step)
        y = finish_logits(F.linear(hidden[here], rows, bias).to(wide), divisor, cap)  # (rows of a block, P)
        yield here, y, place[targets[here].clamp(min=0)]
