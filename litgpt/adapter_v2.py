"""LLaMA-Adapter V2 (arXiv 2304.15010): the prompts of `litgpt.adapter`; a scale and a bias on every linear layer; norms that learn.

y = s (W x + b + c)      s = 1 and c = 0 at first
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from litgpt import adapter, lora
from litgpt.adapter import CausalSelfAttention, mark_only_adapter_as_trainable
from litgpt.adapters.base import Adapter, Wrapper
from litgpt.model import Block

__all__ = ["GPT", "AdapterV2Linear", "Block", "CausalSelfAttention", "Config", "adapter_filter", "mark_only_adapter_as_trainable"]

mark_only_adapter_v2_as_trainable = mark_only_adapter_as_trainable  # its older name


@dataclass
class Config(adapter.Config):
    """The config of a model and its prompts."""

    adapter_file: ClassVar[str] = "lit_model.pth.adapter_v2"

    @property
    def cut(self) -> int | None:
        """0: every block is trained, the embedding is not."""
        return 0

    def make_model(self) -> lora.GPT:
        return GPT(self)


class AdapterV2Linear(Wrapper):
    """A linear layer, quantised or not, with a scale and a bias for each output."""

    kept_outputs = 1

    def __init__(self, in_features: int, out_features: int, linear: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.linear = linear if linear is not None else nn.Linear(in_features, out_features, **kwargs)
        self.adapter_bias = nn.Parameter(torch.zeros(out_features))
        self.adapter_scale = nn.Parameter(torch.ones(out_features))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.adapter_bias)
        nn.init.ones_(self.adapter_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)"""
        y = self.linear(x)
        return self.adapter_scale.to(y.dtype) * (y + self.adapter_bias.to(y.dtype))


class GPT(adapter.GPT):
    """A GPT with learned prompts, scales and biases, and trainable norms."""

    config_class = Config

    def adapt(self, config: adapter.Config) -> None:  # type: ignore[override]
        super().adapt(config)
        for parent in [module for module in self.modules() if not isinstance(module, AdapterV2Linear)]:
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, AdapterV2Linear(child.in_features, child.out_features, child))
        norms: list[Any] = [norm for block in self.blocks for norm in (block.norm_1, block.norm_2)]
        for norm in (*norms, self.transformer["ln_f"]):
            if norm is not None and any(True for _ in norm.parameters()):
                norm.__class__ = tuned(norm.__class__)


class TunedNorm(Adapter):
    """A norm of the base with trainable weight and bias, in fp32."""

    tunes_base = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self, nn.LayerNorm):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), bias, self.eps)
        return super().forward(x).to(x.dtype)


@cache
def tuned(kind: Any) -> Any:
    """Return a norm's class with `TunedNorm` mixed in."""
    return type(kind.__name__, (TunedNorm, kind), {})


def adapter_filter(key: str, value: Any = None) -> bool:
    """Return True if a state dict's key belongs to an adapter. LitGPT's function; `litgpt.adapters.base` asks the modules instead."""
    names = ("adapter_scale", "adapter_bias", "norm_1", "norm_2", "ln_f")
    return adapter.adapter_filter(key) or any(name in key for name in names)
