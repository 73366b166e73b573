"""Modules of the base that are trained in full alongside LoRA, PEFT's `modules_to_save`: the embedding and the output layer.

Their weights are fp32 copies of the base's; the layer computes in the base's dtype. A head that is tied to the embedding stays tied if
both are trained: they are one parameter, with one gradient. If only one of them is trained, the other keeps the base's weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from litgpt.adapters.base import Adapter, own_copies


class Saved(Adapter):
    """A module of the base whose weights are trained."""

    tunes_base = True


class SavedEmbedding(Saved, nn.Embedding):
    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., d), in the base's dtype"""
        return nn.Embedding.forward(self, idx).to(self.base_dtype)


class SavedLinear(Saved, nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d) -> (..., V)"""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def save_modules(modules: dict[str, Any], chosen: list[str]) -> None:
    """Make the chosen modules trainable, in place, and no others."""
    for name, module in modules.items():
        plain, saved = (nn.Embedding, SavedEmbedding) if isinstance(module, nn.Embedding) else (nn.Linear, SavedLinear)
        module.__class__ = saved if name in chosen else plain
    own_copies([modules[name] for name in chosen])


def fuse_saved(model: nn.Module) -> None:
    """Turn the trained modules into plain ones of the base's dtype, in place."""
    for module in list(model.modules()):
        if isinstance(module, Saved):
            module.to(module.base_dtype).requires_grad_(False)
            save_modules({"": module}, [])
