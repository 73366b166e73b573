"""Activations that many runs share: the prefix is run once over all samples, for every block that any of the runs taps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from litgpt.activations.cache import ActivationCache
from litgpt.errors import UserError
from litgpt.train.session import fill_or_recompute

if TYPE_CHECKING:
    from litgpt.train.run import Prepared


@dataclass(frozen=True)
class SharedActivations:
    """The filled caches and whose taps they hold."""

    blocks: tuple[int, ...]
    caches: dict[str, ActivationCache]
    """of the training and of the validation samples"""

    @classmethod
    def fill(cls, ready: Prepared, validated: int) -> SharedActivations:
        """Run the prefix over all training samples and the first `validated` of the others. UserError if there is no room for that."""
        caches = {}
        counts = {"training": len(ready.splits.train), "validation": validated}
        for name, samples in (("training", ready.splits.train), ("validation", ready.splits.val)):
            made = fill_or_recompute(ready, samples, list(range(counts[name])), name, ready.job.cache_mode)
            if not isinstance(made, ActivationCache):
                raise UserError(
                    "skip2lora_cache: there is no room for the activations, from which all settings of a sweep are trained. Free memory, "
                    "name a larger disk with skip2lora_cache_dir, give skip2lora_cache_dtype bfloat16, or take fewer blocks or samples"
                )
            caches[name] = made
        return cls(ready.model.config.taps, caches)

    def view(self, name: str, taps: Sequence[int]) -> ActivationCache:
        """A cache for a model that taps these blocks alone; what belongs to others is not read."""
        whole = self.caches[name]
        return whole if tuple(taps) == self.blocks else whole.narrowed([self.blocks.index(block) for block in taps])
