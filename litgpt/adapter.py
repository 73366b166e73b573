"""LLaMA-Adapter (arXiv 2303.16199): blocks attend to a learned prompt besides the text.

    y = attention(q, k, v) + g attention(q, k', v')      k', v' from qkv(P), P (prompt length, d) learned

The gate g, one number per head, is 0 at first, so training starts from the base model. k' and v' are not rotated, and are computed
once for all tokens that a model generates. Letters in shapes: as in `litgpt.model`, and A positions of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from litgpt import lora, model as base_model
from litgpt.adapters.base import Adapter
from litgpt.args import POSITIVE, setting
from litgpt.errors import UserError
from litgpt.lora import mark_only_lora_as_trainable as mark_only_adapter_as_trainable
from litgpt.model import Block, Positions

__all__ = ["GPT", "Block", "CausalSelfAttention", "Config", "adapter_filter", "mark_only_adapter_as_trainable"]


@dataclass
class Config(lora.Config):
    """The config of a model and its learned prompts."""

    adapter_prompt_length: int = setting(10, POSITIVE)
    adapter_start_layer: int = 2

    adapter_file: ClassVar[str] = "lit_model.pth.adapter"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_attention:
            raise UserError("LLaMA-Adapter does not go with latent attention, which has no keys of its own for prompts: use LoRA")
        if not isinstance(self.adapter_start_layer, int) or not 0 <= self.adapter_start_layer < self.n_layer:
            raise UserError(f"adapter_start_layer is {self.adapter_start_layer!r}: the model has blocks 0 to {self.n_layer - 1}")

    @property
    def cut(self) -> int | None:
        """The first block with a prompt: those before it run frozen."""
        return self.adapter_start_layer

    def make_model(self) -> lora.GPT:
        return GPT(self)


class GPT(lora.GPT):
    """A GPT whose blocks attend to prompts, from `adapter_start_layer` on."""

    config: Config
    config_class = Config

    def adapt(self, config: Config) -> None:  # type: ignore[override]
        self.config, self.cut = config, config.cut
        for index in range(config.adapter_start_layer, config.n_layer):
            self.blocks[index].attn = CausalSelfAttention(config, index)


class Prompt(nn.Embedding, Adapter):
    """The learned prompt P (A, d) of a block."""


class CausalSelfAttention(base_model.CausalSelfAttention, Adapter):
    """Attention over the text, and over the block's prompt."""

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__(config, block_idx)
        self.adapter_wte = Prompt(config.adapter_prompt_length, config.n_embd)
        self.gating_factor = nn.Parameter(torch.zeros(1, 1, config.n_head, 1))
        self.adapter_kv_cache: tuple[torch.Tensor, torch.Tensor] | None = None

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gating_factor)

    def train(self, mode: bool = True) -> CausalSelfAttention:
        self.adapter_kv_cache = None  # the weights may change
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.adapter_kv_cache = None
        gate = state_dict.get(f"{prefix}gating_factor")
        if gate is not None and gate.shape == (1, self.config.n_head, 1, 1):  # older files of LitGPT
            state_dict[f"{prefix}gating_factor"] = gate.transpose(1, 2)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pos: Positions) -> torch.Tensor:
        y = super()._attend(q, k, v, pos)  # (B, T, H h)
        key, value = (part.expand(q.size(0), -1, -1, -1) for part in self._prompt(q))  # (B, G, A, h)
        everything = torch.ones(q.size(2), key.size(2), dtype=torch.bool, device=q.device)
        added = super()._attend(q, key, value, replace(pos, mask=everything, window_mask=None))
        gates = self.gating_factor.to(y.dtype).expand(-1, -1, -1, self.config.head_size).flatten(2)  # (1, 1, H h)
        return y + gates * added

    def _prompt(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of the prompt, (1, G, A, h) each; kept while the model only runs.

        They are the rows of qkv(P) that LitGPT uses. It reads all rows as groups of queries, key and value, the layout of its older
        checkpoints, so its adapters are trained for these rows.
        """
        kept = self.adapter_kv_cache
        if kept is not None and kept[0].dtype == like.dtype and kept[0].device == like.device:
            return kept
        rows = self.project(self.adapter_wte.weight.to(like.dtype)[None])  # (1, A, (H + 2 G) h)
        groups = rows.unflatten(-1, (self.config.n_query_groups, -1, self.config.head_size)).transpose(1, 2)  # (1, G, A, H/G + 2, h)
        made = groups[..., -2, :].to(like.dtype), groups[..., -1, :].to(like.dtype)
        if not torch.is_grad_enabled() and not self.training:
            self.adapter_kv_cache = made
        return made


def adapter_filter(key: str, value: Any = None) -> bool:
    """Return True if a state dict's key belongs to an adapter. LitGPT's function; `litgpt.adapters.base` asks the modules instead."""
    return "adapter_wte" in key or "gating_factor" in key
