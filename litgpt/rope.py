"""Rotary position embedding: RoFormer, arXiv 2104.09864, in the half-split form of GPT-NeoX and Llama.

n is `rope_n_elem`, T positions, h the head size.
"""

from __future__ import annotations

import math

import torch

from litgpt.config import Config


def frequencies(config: Config) -> torch.Tensor:
    """theta_j = rope_base^(-2j/n), fp32, (n/2,); with `rope_adjustments` scaled as Llama 3.1 does.

    Waves longer than original_max_seq_len / low_freq_factor positions are slowed by `factor`, those shorter than
    original_max_seq_len / high_freq_factor stay, in between the two are mixed linearly in the frequency.
    """
    n = config.rope_n_elem
    theta = config.rope_base ** -(torch.arange(0, n, 2, dtype=torch.float32) / n)
    scaling = config.rope_adjustments
    if scaling is None:
        return theta
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_seq_len"] * theta / (2 * math.pi)  # full turns over the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * theta + (1 - keep) * theta / scaling["factor"]


class RotaryTable:
    """cos and sin of position * frequency, made once per device and grown on demand. Not a module: checkpoints do not hold it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._cos = self._sin = torch.empty(0, 0)

    def __call__(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for the positions 0 ... length-1, fp32, (length, n/2) each."""
        if self._cos.size(0) < length or self._cos.device != device:
            size = max(length, min(2 * self._cos.size(0), self.config.block_size))
            with torch.inference_mode(False):  # a table made while generating must serve training too
                positions = torch.arange(size, dtype=torch.float32) / self.config.rope_condense_ratio
                angles = torch.outer(positions, frequencies(self.config))
                self._cos, self._sin = angles.cos().to(device), angles.sin().to(device)
        return self._cos[:length], self._sin[:length]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the first n dimensions of x (..., T, h) by the angles of (T, n/2), in x's dtype if cos and sin have it; the rest passes."""
    half = cos.size(-1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
