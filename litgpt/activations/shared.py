"""Activations that many runs share: the prefix runs once over all samples, for every block that any of the runs taps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from litgpt.activations.cache import ActivationCache, CacheSettings, activations
from litgpt.errors import UserError
from litgpt.lora import GPT
from litgpt.sample import Sample


@dataclass(frozen=True)
class SharedActivations:
    """Filled caches, and the blocks whose taps they hold."""

    blocks: tuple[int, ...]
    caches: dict[str, ActivationCache]  # by the name of the samples

    @classmethod
    def fill(
        cls, model: GPT, samples: Mapping[str, Sequence[Sample]], counts: Mapping[str, int], settings: CacheSettings, device: torch.device
    ) -> SharedActivations:
        """Run the prefix over the first `counts[name]` of `samples[name]`. Raises UserError if there is no room for the activations."""
        caches = {}
        for name, own in samples.items():
            cache = activations(model, own, range(counts[name]), name, settings, device)
            if not isinstance(cache, ActivationCache):
                raise UserError(
                    "skip2lora_cache: there is no room for the activations, from which all settings of a sweep are trained. Free memory, "
                    "name a larger disk with skip2lora_cache_dir, give skip2lora_cache_dtype bfloat16, or take fewer blocks or samples"
                )
            caches[name] = cache
        return cls(model.config.taps, caches)

    def view(self, name: str, taps: Sequence[int]) -> ActivationCache:
        """Return a cache for a model that taps only these blocks; the taps of other blocks are not read."""
        cache = self.caches[name]
        return cache if tuple(taps) == self.blocks else cache.narrowed([self.blocks.index(block) for block in taps])
