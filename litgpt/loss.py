"""Cross-entropy at the positions that carry loss, in chunks, so that all logits never exist at once.

N positions, d `n_embd`, V `padded_vocab_size`, C rows of a chunk. z are the head's outputs, y = c tanh(z / (s c)) the logits, with the
divisor s and the cap c of `litgpt.model.finish_logits`; without them y = z.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from litgpt.model import GPT, Positions, finish_logits
from litgpt.packing import sent, take
from litgpt.vocabulary import IGNORED as IGNORED, SpreadHead, as_columns

CHUNK_BYTES = 32 * 2**20  # of a chunk's logits: fewer rows slow the matrix products down, more only take memory
BLOCK_ELEMENTS = 8 * 49152  # logits per softmax on a CPU: in fp32 they stay in its cache


@dataclass
class Features:
    """The tail's inputs for a batch: x (n, d) and taps (n, S, d) where only positions with loss are needed, else (N, d) and (N, S, d)."""

    x: torch.Tensor
    taps: torch.Tensor
    targets: torch.Tensor  # (n,)
    at: torch.Tensor | None = None  # (n,): the rows with loss; None if x has no others
    pos: Positions | None = None  # of the N rows


def loss_of(model: GPT, features: Features, head_loss: HeadLoss, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sum of the losses at the batch's loss positions, times weights (n,), which are 1 unless given.

    Targets and weights may be (n, K), as in `HeadLoss`. In training the routers' auxiliary loss is added with the same weights.
    """
    hidden, targets = model.tail(features.x, features.taps, features.pos), features.targets
    if (rows := features.at) is not None:
        packing = features.pos.packing if features.pos else None
        if targets.dim() == 1 and (packing is None or packing.stem):  # else no two samples share a row
            rows, targets, weights = merged(rows, targets, weights)
        hidden = take(hidden, rows)
    return loss_at(model, hidden, targets, head_loss, weights)


def loss_at(
    model: GPT, hidden: torch.Tensor, targets: torch.Tensor, head_loss: HeadLoss, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the loss of `loss_of` for the head's input at the loss positions, (n, d)."""
    if weights is not None:
        kept = as_columns(weights).any(1).nonzero()[:, 0]
        if len(kept) < len(weights):  # no logits are computed for the others
            weights, kept = weights[kept], sent(kept, hidden.device)
            hidden, targets = take(hidden, kept), targets[kept]
        weights = sent(weights, hidden.device)
    loss = head_loss(hidden, targets, weights)
    auxiliary = model.auxiliary_loss()
    if auxiliary is None:
        return loss
    return loss + (len(targets) if weights is None else weights.sum()) * auxiliary


def merged(
    rows: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return rows, targets and weights (m,) for (n,) of them: each pair of row and target occurs once, with the sum of its weights.

    Samples share the rows of the stem, whose logits are then computed only once.
    """
    pairs, place = torch.unique((rows << 32) + targets, return_inverse=True)
    if len(pairs) == len(rows):
        return rows, targets, weights
    first = torch.empty_like(pairs).scatter_(0, place, torch.arange(len(rows), device=rows.device))  # any of the equal rows
    each = torch.ones(len(rows)) if weights is None else weights
    return rows[first], targets[first], torch.zeros(len(pairs)).index_add_(0, place.cpu(), each.cpu())


def hidden_of(model: GPT, features: Features) -> torch.Tensor:
    """Return the head's input at the loss positions, (n, d)."""
    hidden = model.tail(features.x, features.taps, features.pos)
    return hidden if features.at is None else take(hidden, features.at)


def chunked_cross_entropy(
    logits: torch.Tensor | list[torch.Tensor], targets: torch.Tensor, chunk_size: int = 128, ignore_index: int = IGNORED
) -> torch.Tensor:
    """Return the mean cross-entropy of logits (B, T, V), or a list of parts of T, for targets (B, T). LitGPT's function.

    `chunk_size` rows at a time are converted to fp32; 0: all.
    """
    whole = torch.cat(logits, dim=1) if isinstance(logits, list) else logits
    rows, flat = whole.reshape(-1, whole.size(-1)), targets.reshape(-1)
    size = chunk_size or max(1, len(rows))
    sums = [
        F.cross_entropy(part.float(), target, ignore_index=ignore_index, reduction="sum")
        for part, target in zip(rows.split(size), flat.split(size), strict=True)
    ]
    return torch.stack(sums).sum() / (flat != ignore_index).sum().clamp(min=1)


class HeadLoss:
    """Sum over positions of -w log softmax(y)[target], fp32, for hidden states h (N, d), z = head(h), and targets (N,).

    The weights w (N,) are 1 unless given, and 0 where the target is `IGNORED`. A position may have several targets, with weights of
    their own: both are (N, K) then, and none is `IGNORED`.

    For a linear head the forward pass computes dz = w (softmax(y) - onehot) dy/dz and the gradients dh = dz W and, unless it is frozen,
    dW = dz^T h, chunk by chunk. Memory is C x V logits for any N. A head that has an adapter or a trained bias, or is trained by more
    than the sum, goes through autograd, and the backward pass computes each chunk's logits again.
    """

    def __init__(self, head: nn.Module, divisor: float = 1.0, cap: float | None = None) -> None:
        self.head, self.divisor, self.cap = head, divisor, cap
        self._logits = torch.empty(0)

    @classmethod
    def of(cls, model: GPT) -> HeadLoss:
        """Return the loss of a model's output layer."""
        return cls(model.lm_head, model.config.logits_scaling, model.config.final_logit_softcapping)

    def __call__(
        self, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None, is_sum: bool = True
    ) -> torch.Tensor:
        """Return a scalar, fp32 (fp64 for fp64 input): a sum, to be divided by the number of tokens or the sum of the weights.

        Without `is_sum` return its terms, (N,).
        """
        head, device = self.head, hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        if isinstance(head, SpreadHead):
            losses = head.losses(hidden.to(dtype), targets, weights, self.divisor, self.cap)
            return losses.sum() if is_sum else losses
        trains_bias = getattr(head, "bias", None) is not None and head.bias.requires_grad
        if isinstance(head, nn.Linear) and not trains_bias and (is_sum or not head.weight.requires_grad):
            return _LinearHead.apply(hidden.to(dtype), head.weight, head.bias, targets, weights, self, is_sum)
        width: Any = head.out_features
        rows = max(1, CHUNK_BYTES // (width * hidden.element_size()))
        each = torch.ones_like(targets) if weights is None else weights
        parts = zip(hidden.split(rows), targets.split(rows), each.split(rows), strict=True)
        losses = [checkpoint(self._chunk, *part, use_reentrant=False) for part in parts]
        return torch.stack([part.sum() for part in losses]).sum() if is_sum else torch.cat(losses)

    def _chunk(self, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        logits = finish_logits(self.head(hidden), self.divisor, self.cap)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if targets.dim() > 1:
            return -(wide.log_softmax(-1).gather(1, targets) * weights).sum(1)
        return F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="none") * weights

    def buffer(self, rows: int, like: torch.Tensor, width: int) -> torch.Tensor:
        """Return a buffer for logits (rows, V), allocated once: fresh pages would take as long as the matrix product that fills them."""
        have = self._logits
        if have.dtype != like.dtype or have.device != like.device or have.dim() != 2 or have.size(1) != width or have.size(0) < rows:
            self._logits = torch.empty(rows, width, dtype=like.dtype, device=like.device)
        return self._logits[:rows]

    def packed(self, like: torch.Tensor) -> Any:
        """Return the head's `litgpt.packed.Packed` for rows of this dtype; None if it has none."""
        return getattr(self.head, "packed", None) if like.dtype == self.head.weight.dtype else None


class _LinearHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: Any, targets: torch.Tensor, weights: Any, owner: HeadLoss, is_sum: bool
    ) -> torch.Tensor:
        N, V, own = hidden.size(0), weight.size(0), weight
        weight = weight.to(hidden.dtype)
        rows = max(1, min(N, CHUNK_BYTES // (V * hidden.element_size())))
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        wanted = of_hidden or of_weight
        gradient = torch.empty_like(hidden) if of_hidden else None
        kind = torch.float32 if own.dtype == torch.float16 else own.dtype  # the sum of many positions may exceed fp16
        of_rows = torch.zeros_like(own, dtype=kind) if of_weight else None
        targets, weights = as_columns(targets), None if weights is None else as_columns(weights)
        counted = targets[:, 0] != IGNORED
        targets = targets.clamp(min=0)
        inputs = hidden.masked_fill(~counted[:, None], 0) if of_weight else hidden
        total = torch.zeros(() if is_sum else (N,), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        packed = owner.packed(hidden)
        buffer = owner.buffer(rows, hidden, V) if packed is None else hidden
        for start in range(0, N, rows):
            here = slice(start, min(start + rows, N))
            if packed is None:
                logits = buffer[: here.stop - start]
                torch.mm(hidden[here], weight.t(), out=logits)  # (C, V)
                if bias is not None:
                    logits += bias
            else:
                logits = packed.times(hidden[here])
            each = None if weights is None else weights[here]
            losses = cross_entropy_(logits, targets[here], wanted, owner.divisor, owner.cap, each)
            losses = torch.where(counted[here], losses, 0)
            if is_sum:
                total += losses.sum()
            else:
                total[here] = losses
            if gradient is not None and packed is None:
                torch.mm(logits, weight, out=gradient[here])  # (C, d)
            elif gradient is not None:
                gradient[here] = packed.back(logits)
            if of_rows is not None and kind == logits.dtype:
                of_rows.addmm_(logits.t(), inputs[here])
            elif of_rows is not None:
                of_rows += logits.t() @ inputs[here]
        if gradient is not None:
            gradient.masked_fill_(~counted[:, None], 0)
        ctx.save_for_backward(gradient)
        ctx.of_weight, ctx.dtype = of_rows, own.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (of_hidden,), of_weight = ctx.saved_tensors, None
        if of_hidden is not None:
            of_hidden = of_hidden * grad.to(of_hidden.dtype).expand(len(of_hidden))[:, None]
        if ctx.needs_input_grad[1]:
            of_weight, ctx.of_weight = ctx.of_weight.mul_(grad).to(ctx.dtype), None  # it becomes the weight's gradient without a copy
        return of_hidden, of_weight, None, None, None, None, None


def cross_entropy_(
    logits: torch.Tensor, targets: torch.Tensor, gradient: bool, divisor: float, cap: float | None, weights: torch.Tensor | None
) -> torch.Tensor:
    """Return sum_k -w_k log softmax(y)[target_k], (C,) fp32 (fp64 for fp64), for z = `logits` (C, V), targets (C, K) and weights (C, K).

    One target has the weight 1 unless given. With `gradient` the gradient for z replaces z: sum_k w_k (softmax(y) - onehot(target_k))
    dy/dz, where dy/dz = (1 - (y / c)^2) / s.

    A CPU takes a few rows at a time, so that they stay in its cache.
    """
    C, V = logits.shape
    rows = C if logits.is_cuda else max(1, min(C, BLOCK_ELEMENTS // V))
    wide = torch.promote_types(logits.dtype, torch.float32)
    plain = divisor == 1 and cap is None
    in_place = gradient and plain and logits.dtype == wide
    block = logits if in_place else torch.empty(rows, V, dtype=wide, device=logits.device)
    losses = torch.empty(targets.shape, dtype=wide, device=logits.device)
    for start in range(0, C, rows):
        here = slice(start, start + rows)
        part, target = logits[here], targets[here]
        y = part.to(wide) if plain else finish_logits(part.to(wide), divisor, cap)
        chosen = y.gather(1, target)
        if not gradient:
            losses[here] = y.logsumexp(-1, keepdim=True) - chosen
            continue
        top = y.amax(-1, keepdim=True)
        p = torch.softmax(y, dim=-1, out=part if in_place else block[: part.size(0)])
        losses[here] = top - p.amax(-1, keepdim=True).log_() - chosen  # max p = 1 / sum exp(y - top)
        if weights is None:
            p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand_as(target))
        else:
            each = weights[here].to(wide)
            p.mul_(each.sum(1, keepdim=True)).scatter_add_(1, target, -each)
        if cap is not None:
            p.mul_(1 - (y / cap).square_())
        if not in_place:
            part.copy_(p if divisor == 1 else p.div_(divisor))
    return losses[:, 0] if weights is None else (losses * weights).sum(1)
