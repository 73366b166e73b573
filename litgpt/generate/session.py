"""A conversation's keys and values, kept between answers, so that each answer computes only the tokens that are new."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

import torch

from litgpt.generate.engine import check, sample, until_stop
from litgpt.model import GPT, KVCache
from litgpt.rope import is_long


class Session:
    """Answers that share a model's key/value cache. The model holds it during an answer only, so that it may be used otherwise between."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.ids: list[int] = []  # those whose keys and values are kept
        self.caches: list[KVCache] = []  # one a block
        self.computed = 0  # tokens that went through the model in the last answer

    def answer(
        self,
        prompt: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        stop_tokens: Sequence[Sequence[int]] = (),
        generator: torch.Generator | None = None,
    ) -> Generator[int, None, None]:
        """Yield the ids that follow `prompt`, as `engine.generate` does. What `prompt` shares with the last call's text is not computed."""
        length = len(prompt) + max_new_tokens
        check(self.model, torch.tensor(prompt), length, temperature, top_k, top_p)
        with closing(self._decode(list(prompt), length, temperature, top_k, top_p, generator)) as ids:
            yield from until_stop(ids, stop_tokens)

    @torch.inference_mode()
    def _decode(self, prompt: list[int], length: int, *sampling: Any) -> Generator[int, None, None]:
        model, config = self.model, self.model.config
        device = next(model.parameters()).device
        pairs = enumerate(zip(self.ids, prompt[:-1], strict=False))  # the logits of the last token are needed
        kept = next((n for n, (old, new) in pairs if old != new), min(len(self.ids), len(prompt) - 1))
        if (switch := model.switch) is not None:
            kept = min(kept, switch.start_of(self.ids))  # an earlier reply is read again, without LoRA
        if is_long(config, len(prompt)) != is_long(config, len(self.ids)):
            kept = 0  # LongRoPE turns the keys by other factors
        new, self.ids, self.computed = prompt[kept:], prompt[:kept], 0
        self._make_room(length)
        try:
            for end in range(len(prompt), length):
                if end > len(prompt) and is_long(config, end) and not is_long(config, end - 1):
                    new, self.ids = self.ids + new, []
                idx = torch.tensor([new], device=device)
                pos = model.positions(idx, torch.arange(end - len(new), end, device=device), end)
                x, taps = model.prefix(idx, pos)
                token = int(sample(model.logits(model.tail(x, taps, pos)[:, -1]), *sampling))
                self.ids += new
                self.computed += len(new)
                new = [token]
                yield token
        finally:
            model.clear_kv_cache()

    def _make_room(self, length: int) -> None:
        """Put the cache into the model, with room for `length` positions; it grows by doubling."""
        model, room = self.model, self.caches[0].k.size(2) if self.caches else 0
        if room < length:
            model.set_kv_cache(1, min(max(length, 2 * room), model.max_seq_length))
            for block, old in zip(model.blocks, self.caches, strict=False):
                assert block.attn.kv_cache is not None
                for name in ("k", "v"):
                    getattr(block.attn.kv_cache, name)[:, :, :room] = getattr(old, name)
            self.caches = [block.attn.kv_cache for block in model.blocks if block.attn.kv_cache is not None]
        for block, cache in zip(model.blocks, self.caches, strict=True):
            block.attn.kv_cache = cache
