"""The switch of answer-only LoRA (aLoRA, arXiv 2504.12397): prompts run on the plain backbone, replies on the adapted one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class Switch:
    """Switches a model's LoRA on and off by position."""

    def __init__(self, invocation: Sequence[int]) -> None:
        self.invocation = list(invocation)
        self.is_off = False
        self.mask: torch.Tensor | None = None  # (B, T, 1), 1 where LoRA is on; None: everywhere
        self.rows: torch.Tensor | None = None  # which of the B T rows an expert of a mixture gets; None: all
        self.start: int | torch.Tensor | None = None  # where replies begin, for all rows or (B, 1), for prompts that are read in parts

    def masked(self, update: torch.Tensor) -> torch.Tensor:
        """Return the update (..., out) where LoRA is on, 0 elsewhere."""
        if self.mask is None:
            return update
        return update * (self.mask if self.rows is None else self.mask.flatten(0, -2)[self.rows])

    @contextmanager
    def off(self) -> Iterator[None]:
        self.is_off = True
        try:
            yield
        finally:
            self.is_off = False

    @contextmanager
    def reply_at(self, start: int | torch.Tensor) -> Iterator[None]:
        """Let the reply begin at `start`, for all rows or (B, 1), while a prompt is read in parts."""
        self.start = start
        try:
            yield
        finally:
            self.start = None

    def start_of(self, tokens: Sequence[int]) -> int:
        """Return where the last invocation begins; the number of tokens if there is none."""
        n = len(self.invocation)
        starts = (i for i in range(len(tokens) - n, -1, -1) if list(tokens[i : i + n]) == self.invocation)
        return next(starts, len(tokens))

    def look(self, idx: torch.Tensor, first: torch.Tensor | None, dtype: torch.dtype) -> None:
        """Switch LoRA on from the last invocation in idx (B, T). `first` (B, 1): the position of the first token of idx; None: 0.

        Tokens that follow others and contain no invocation continue a reply, unless `start` says where it begins.
        """
        B, T = idx.shape
        first = torch.zeros(B, 1, dtype=torch.long, device=idx.device) if first is None else first
        places = torch.arange(T, device=idx.device)
        on = (first > 0).expand(B, T) if self.start is None else first + places >= self.start
        width = len(self.invocation)
        if self.start is None and width <= T:
            opens = (idx.unfold(1, width, 1) == torch.tensor(self.invocation, device=idx.device)).all(-1)  # (B, T - width + 1)
            last = opens.size(1) - 1 - opens.flip(1).int().argmax(1, keepdim=True)
            on = torch.where(opens.any(1, keepdim=True), places >= last, on)
        self.mask = on[..., None].to(dtype)
