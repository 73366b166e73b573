"""The switch of answer-only LoRA (aLoRA, arXiv 2504.12397): prompts run on the plain backbone, replies on the adapted one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class Switch:
    """Turns the LoRA of a model on and off, by position."""

    def __init__(self, invocation: Sequence[int]) -> None:
        self.invocation = list(invocation)
        self.is_off = False
        self.mask: torch.Tensor | None = None  # (B, T, 1), 1 where LoRA is on; None: everywhere
        self.rows: torch.Tensor | None = None  # those of the B T rows that an expert of a mixture gets; None: all
        self.start: int | torch.Tensor | None = None  # where replies begin, of all or (B, 1), for prompts that are read in parts

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
        """Let the reply begin at `start`, of all rows or (B, 1), while a prompt is read in parts."""
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
        """Turn LoRA on from the last invocation in idx (B, T) on. `first` (B, 1): the place of its first token; None: 0.

        Tokens behind others, without an invocation among them, continue a reply, unless `start` says where it begins.
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
