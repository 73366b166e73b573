"""The decoder: GPT, its blocks, attention and MLPs, with LitGPT's state-dict keys.

Letters in shapes: B batch, T positions of the input, K positions attended to, d `n_embd`, V `padded_vocab_size`, L `n_layer`,
H heads, G key/value heads, h head size, m `intermediate_size`, S the tapped blocks, E experts, N rows: B T, or those of a packed batch.

The layers are numbered as they run: blocks 0 ... L-1, then `ln_f` is L and `lm_head` is L+1. `GPT.cut` is a number of that kind:

    idx -> wte -> [ layers 0 ... cut-1 ]  x      -> ( + ) -> [ layers cut ... L ] -> lm_head -> logits
                     |       |                        ^
                     taps of the blocks in S -> adapters
           \\________ prefix: frozen ________/  \\________________ tail: gradients _____________/

Training packs a batch into N rows without padding (`litgpt.packing`): x is then (N, d) instead of (B, T, d), all the way to the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from litgpt.attention import CausalSelfAttention, KVCache, Positions, RMSNorm, alibi, norm
from litgpt.config import Config
from litgpt.latent import MultiheadLatentAttention
from litgpt.mlp import GemmaMLP, GptNeoxMLP, LLaMAMLP, LLaMAMoE, load_balance, mlp
from litgpt.packing import Packing, noise_like, take
from litgpt.rope import RotaryTable, is_long

__all__ = [
    "GPT", "Block", "CausalSelfAttention", "GemmaMLP", "GptNeoxMLP", "KVCache", "LLaMAMLP", "LLaMAMoE", "Positions", "RMSNorm",
    "evaluating", "finish_logits", "load_balance",
]  # fmt: skip


class GPT(nn.Module):
    """A causal language model. `GPT(config)` has fresh weights; `litgpt.lora.GPT` adds adapters."""

    config_class: ClassVar[type[Config]] = Config

    @classmethod
    def from_name(cls, name: str, **kwargs: Any) -> Self:
        """Return a named model with fresh weights; `kwargs` are fields of its config."""
        return cls(cls.config_class.from_name(name, **kwargs))

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.lm_head = nn.Linear(config.n_embd, config.V, bias=config.lm_head_bias)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.V, config.n_embd),
                "h": nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
                "ln_f": norm(config),
            }
        )
        if config.learned_positions:
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.max_seq_length = config.block_size
        if config.norm_embedding:
            self.transformer["norm_emb"] = norm(config)
        self.rope = [RotaryTable(config)] if config.rotates else []
        if config.rope_indices and 1 in config.rope_indices:
            self.rope.append(RotaryTable(config, local=True))
        self.switch: Any = None  # a `litgpt.adapters.switch.Switch` if LoRA acts on replies only
        self.value_head: Any = None  # a `litgpt.adapters.heads.ValueHead`
        self.cut: int | None = None  # the first layer that gradients reach; None: everything is trained, the embedding included
        self.neftune_alpha = 0.0  # noise on the embeddings in training
        self.word_dropout = 0.0  # share of the tokens of prompts that are left out in training
        self.activation_checkpointing = False  # keep only the inputs of the tail's blocks, and run each again in the backward pass

    @property
    def blocks(self) -> list[Block]:
        return list(cast("nn.ModuleList", self.transformer["h"]))  # type: ignore[arg-type]

    def forward(
        self, idx: torch.Tensor, input_pos: torch.Tensor | None = None, input_pos_maxp1: int | None = None, lm_head_chunk_size: int = 0
    ) -> Any:
        """Return logits (B, T, V) of token ids (B, T), or with `lm_head_chunk_size` a list of logits of that many positions each.

        With `input_pos` (T,) the key/value cache is used: keys and values are stored at those positions, and attention reaches all those
        before `input_pos_maxp1` (default: the largest position + 1). Raises ValueError if T exceeds `max_seq_length`.
        """
        return self._forward_impl(idx, self.positions(idx, input_pos, input_pos_maxp1), lm_head_chunk_size)

    def _forward_impl(self, idx: torch.Tensor, pos: Positions, chunk_size: int = 0) -> Any:
        x, taps = self.prefix(idx, pos)  # (B, T, d), (B, T, S, d)
        x = self.tail(x, taps, pos)  # (B, T, d)
        return [self.logits(part) for part in x.split(chunk_size, dim=1)] if chunk_size else self.logits(x)  # (B, T, V)

    def within(self, work: Callable[[], Any]) -> Any:
        """Return work(), which runs parts of the model. A sharded model gathers its weights for it (`litgpt.sharding`)."""
        return work()

    def embed(self, idx: torch.Tensor, pos: Positions) -> torch.Tensor:
        """(B, T) -> (B, T, d), or (N,) -> (N, d): the embeddings, scaled, or with learned positions added, in families that do so."""
        x, config = self.transformer["wte"](idx), self.config
        if config.scale_embeddings:
            x = x * torch.tensor(config.n_embd**0.5, dtype=x.dtype)  # rounded to the dtype, as in Gemma's own code
        if config.embedding_multiplier != 1:
            x = x * config.embedding_multiplier
        if config.norm_embedding:
            x = self.transformer["norm_emb"](x)
        if config.learned_positions:
            places = pos.index
            if places is None:
                places = torch.arange(idx.size(-1), device=idx.device) if pos.packing is None else pos.packing.positions
            x = x + self.transformer["wpe"](places)
        return x + noise_like(x, self.neftune_alpha, pos.packing) if self.training and self.neftune_alpha else x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Apply `lm_head` to the tail's output (..., d), scaled and capped in families that do so: (..., V)."""
        return finish_logits(self.lm_head(x), self.config.logits_scaling, self.config.final_logit_softcapping)

    def prefix(
        self, idx: torch.Tensor, pos: Positions | None = None, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run everything before the cut. Return its output (B, T, d), and the normalised outputs of the tapped blocks (B, T, S, d).

        A packed batch (N,) with positions `pos` gives (N, d) and (N, S, d); with `rows` (n,) only those rows, (n, d) and (n, S, d).
        In front of a cut nothing is trained: no graph is recorded and no activation is kept.
        """
        pos = pos or self.positions(idx)
        cut = self.cut or 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cut is None):
            x, taps = self.through(self.blocks[:cut], self.embed(idx, pos), pos, rows)
            x = x if rows is None else take(x, rows)
            if cut > self.config.n_layer:
                x = self.transformer["ln_f"](x)
        return x, torch.stack(taps, dim=-2) if taps else x.new_empty(*x.shape[:-1], 0, x.size(-1))

    def through(
        self, blocks: Sequence[Block], x: torch.Tensor, pos: Positions, rows: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run blocks. Return their output, and the normalised outputs of the tapped ones among them, of `rows` only if given."""
        taps = []
        for block in blocks:
            x = block(x, pos)
            if block.skip2lora is not None:
                taps.append(block.skip2lora.tap(x if rows is None else take(x, rows)))
        return x, taps

    def tail(self, x: torch.Tensor, taps: torch.Tensor, pos: Positions | None = None) -> torch.Tensor:
        """Add the adapters' sum to x and run everything from the cut up to `lm_head`'s input: (B, T, d) -> (B, T, d).

        x may be packed, (N, d) with taps (N, S, d) and positions `pos`. With the cut at `ln_f` or `lm_head` positions are independent,
        and any selection of rows may be given.
        """
        cut = self.cut or 0
        if taps.size(-2):
            x = (x + self.skip_sum(taps)).to(x.dtype)
        if cut < self.config.n_layer:
            pos = pos or self.positions(x[..., 0])
            again = self.activation_checkpointing and torch.is_grad_enabled()
            for block in self.blocks[cut:]:
                x = checkpoint(block, x, pos, use_reentrant=False) if again else block(x, pos)
        return x if cut > self.config.n_layer else self.transformer["ln_f"](x)

    def last(self, idx: torch.Tensor, pos: Positions) -> torch.Tensor:
        """Return `lm_head`'s input at the last of the positions: (B, T) -> (B, d)."""
        return self.tail(*self.prefix(idx, pos), pos)[:, -1]

    def skip_sum(self, taps: torch.Tensor) -> torch.Tensor:
        """Return the adapters' sum for taps (..., S, d)."""
        raise NotImplementedError

    @property
    def head(self) -> nn.Linear:
        """The output layer, without an adapter around it."""
        return getattr(self.lm_head, "linear", self.lm_head)

    @property
    def is_tied(self) -> bool:
        """True if the output layer and the embedding share their weight."""
        return self.head.weight is self.transformer["wte"].weight

    def tie_head(self) -> None:
        """Let the output layer share the embedding's weight."""
        self.head.weight = cast("nn.Parameter", self.transformer["wte"].weight)

    def untie_head(self) -> None:
        """Give the output layer its own copy of the embedding's weight."""
        self.head.weight = nn.Parameter(self.head.weight.detach().clone())

    @property
    def tapped_blocks(self) -> list[Block]:
        """The blocks in S, in order: those in front of the cut with a Skip2-LoRA adapter."""
        return [block for block in self.blocks[: self.cut or 0] if block.skip2lora is not None]

    def positions(self, idx: torch.Tensor, input_pos: torch.Tensor | None = None, end: int | None = None) -> Positions:
        """Return rotary tables and masks for input (B, T) at the places `input_pos`, (T,) or (B, T)."""
        T, device = idx.size(1), idx.device
        self.require_room(T)
        if input_pos is None:
            return self._at(torch.arange(T, device=device), T, [T])
        end = int(input_pos.max()) + 1 if end is None else end
        is_shared = input_pos.dim() == 1 or self.config.rope_kind != "longrope"  # a GPU would be waited for
        tokens = [end] if is_shared else (input_pos[:, -1] + 1).tolist()
        return replace(self._at(input_pos, end, tokens), index=input_pos)

    def packed_positions(self, packing: Packing) -> Positions:
        """Return rotary tables and masks for a packed batch (N,). Samples with different LongRoPE factors must not share a stem."""
        P, end, device = packing.stem, packing.stem + packing.width, packing.rows.device
        self.require_room(end)
        tokens = [P + length + 1 for length in packing.lengths]  # the last token is not an input
        stem = self._at(torch.arange(P, device=device), P, tokens[:1]) if P else None
        return replace(self._at(torch.arange(P, end, device=device), end, tokens), packing=packing, stem=stem)

    def require_room(self, T: int) -> None:
        if self.max_seq_length < T:
            raise ValueError(f"a sequence of {T} tokens is longer than max_seq_length, {self.max_seq_length}")

    def _at(self, places: torch.Tensor, end: int, tokens: Sequence[int]) -> Positions:
        """Return the positions of inputs at `places`, (T,) or (B, T), each of which attends to itself and earlier ones of the first `end`.

        `tokens` are the lengths of the sequences, or one for all, which determine LongRoPE's factors.
        """
        T = places.size(-1)
        long = [is_long(self.config, length) for length in tokens]
        rotary = tuple(self.rotary(table, places, end, long) for table in self.rope)
        mask = None
        if self.config.alibi:
            at, keys = _for_heads(places), torch.arange(end, device=places.device)
            mask = alibi(self.config, keys <= at[..., None], at, keys, self.compute_dtype(places.device))
        elif places.dim() == 2 or (T > 1 and (end != T or self.config.needs_mask)):
            mask = torch.arange(end, device=places.device) <= _for_heads(places)[..., None]
        window, within = self.config.sliding_window_size, None
        if window is not None and end > window:  # else the window hides nothing
            distance = _for_heads(places)[..., None] - torch.arange(end, device=places.device)
            within = (distance >= 0) & (distance < window)  # (T, K) or (B, 1, T, K)
        return Positions(rotary, mask, within, None, end)

    def rotary(self, table: RotaryTable, places: torch.Tensor, end: int, long: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
        dtype, kinds = self.compute_dtype(places.device), sorted(set(long))
        pairs = [table(end, places.device, kind) for kind in kinds]
        at = _for_heads(places)
        cos, sin = (torch.stack([part[at] for part in parts]).to(dtype) for parts in zip(*pairs, strict=True))  # (kinds, ..., T, n)
        if len(kinds) == 1:
            return cos[0], sin[0]
        chosen = torch.tensor(long, device=places.device).long()
        if places.dim() == 2:
            samples = torch.arange(len(chosen), device=places.device)
            return cos[chosen, samples], sin[chosen, samples]
        return cos[chosen, None], sin[chosen, None]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the backbone. Adapters are always fp32."""
        wte: Any = self.transformer["wte"]
        return wte.base_dtype if hasattr(wte, "base_dtype") else wte.weight.dtype

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype of linear layers' outputs: autocast's, or the weights'."""
        return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else self.dtype

    def auxiliary_loss(self) -> torch.Tensor | None:
        """Return `router_aux_loss_coef` times `load_balance` over all tokens and routers of the tail's last training pass.

        Returns None on the second call after a pass, without routers in the tail, and for a coefficient of 0. Routers in the prefix are
        frozen, and so are their inputs: they do not count.
        """
        logits: list[torch.Tensor] = []
        for moe in (block.mlp for block in self.blocks):
            if isinstance(moe, LLaMAMoE) and moe.router_logits is not None:
                logits.append(moe.router_logits.flatten(0, -2))
                moe.router_logits = None  # the graph is not kept
        return self.config.router_aux_loss_coef * load_balance(torch.cat(logits), self.config.n_expert_per_token) if logits else None

    def set_kv_cache(
        self,
        batch_size: int,
        max_seq_length: int | None = None,
        rope_cache_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Allocate room for the keys and values of `max_seq_length` positions (default: the model's own) in every block.

        `rope_cache_length` is accepted for LitGPT's callers and has no effect.
        """
        length = max_seq_length or self.max_seq_length
        for block in self.blocks:
            where = device or next(block.parameters()).device
            block.attn.kv_cache = KVCache(self.config.cache_sizes, batch_size, length, where, dtype or self.dtype)

    def clear_kv_cache(self) -> None:
        """Free the keys and values."""
        for block in self.blocks:
            block.attn.kv_cache = None


def _for_heads(places: torch.Tensor) -> torch.Tensor:
    """Return places (T,) as they are, and (B, T) as (B, 1, T)."""
    return places if places.dim() == 1 else places[:, None]


class Block(nn.Module):
    """One decoder block, with c = `residual_multiplier` (1 except in Granite).

    Sequential residual:  y = x + c attn(norm_1(x));  out = y + c mlp(norm_2(y))
    Parallel residual:    out = x + c attn(norm_1(x)) + c mlp(norm_2(x)),  with norm_1 for both if the norm is shared

    In some families norm_1 or norm_2 is the identity, and `post_attention_norm` or `post_mlp_norm` follows attn or mlp.
    """

    def __init__(self, config: Config, block_idx: int) -> None:
        super().__init__()
        self.parallel_residual, self.residual_multiplier = config.parallel_residual, config.residual_multiplier
        self.norm_1 = norm(config) if config.norm_1 else nn.Identity()
        self.attn = (MultiheadLatentAttention if config.latent_attention else CausalSelfAttention)(config, block_idx)
        self.post_attention_norm = norm(config) if config.post_attention_norm else None
        self.norm_2 = None if config.shared_attention_norm else norm(config) if config.norm_2 else nn.Identity()
        self.mlp = mlp(config, block_idx)
        self.post_mlp_norm = norm(config) if config.post_mlp_norm else None
        self.skip2lora: Any = None  # a `litgpt.lora.Skip2LoRA` if this block's output is tapped

    def forward(self, x: torch.Tensor, pos: Positions) -> torch.Tensor:
        """(B, T, d) -> (B, T, d)"""
        normed = self.norm_1(x)
        attended = self._branch(self.attn(normed, pos), self.post_attention_norm)
        if not self.parallel_residual:
            x = x + attended
        if self.norm_2 is not None:
            normed = self.norm_2(x)
        changed = self._branch(self.mlp(normed), self.post_mlp_norm)
        return x + attended + changed if self.parallel_residual else x + changed

    def attend(self, x: torch.Tensor, pos: Positions) -> torch.Tensor:
        """Return attention's output alone, (B, T, d)."""
        return self.attn(self.norm_1(x), pos)

    def _branch(self, x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        """Return the term that attention's or the MLP's output x adds to the residual stream."""
        x = x if norm is None else norm(x)
        return x if self.residual_multiplier == 1 else x * self.residual_multiplier


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block without dropout."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def finish_logits(logits: torch.Tensor, divisor: float, cap: float | None) -> torch.Tensor:
    """Return cap tanh(logits / divisor / cap); without a cap, logits / divisor."""
    if divisor != 1:
        logits = logits / divisor
    return logits if cap is None else torch.tanh(logits / cap) * cap
