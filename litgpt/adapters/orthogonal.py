"""LoRA whose A starts with orthogonal rows of length 1, so that the r directions it reads are distinct, also among q, k and v."""

import torch
from torch import nn

from litgpt.adapters.base import LinearAdapter


class Orthogonal(LinearAdapter):
    """A mixin for LoRA's layers, put before them."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.orthogonal_(self.lora_A)
