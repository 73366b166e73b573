"""Which tensor of another format is which part of which LitGPT tensor. Adding a family = adding one table.

A table maps the other format's module (`{}` stands for the block) to LitGPT's module and the part of it that is stored there. Every
part is a set of *rows* of the LitGPT tensor, so a table reads both ways: `lit[rows] = other` and `other = lit[rows]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from litgpt.config import Config
from litgpt.errors import UserError

if TYPE_CHECKING:
    import torch

Table = dict[str, tuple[str, str]]

HF_LLAMA: Table = {
    "model.embed_tokens": ("transformer.wte", "all"),
    "model.layers.{}.input_layernorm": ("transformer.h.{}.norm_1", "all"),
    "model.layers.{}.self_attn.q_proj": ("transformer.h.{}.attn.qkv", "q"),
    "model.layers.{}.self_attn.k_proj": ("transformer.h.{}.attn.qkv", "k"),
    "model.layers.{}.self_attn.v_proj": ("transformer.h.{}.attn.qkv", "v"),
    "model.layers.{}.self_attn.o_proj": ("transformer.h.{}.attn.proj", "all"),
    "model.layers.{}.post_attention_layernorm": ("transformer.h.{}.norm_2", "all"),
    "model.layers.{}.mlp.gate_proj": ("transformer.h.{}.mlp.fc_1", "all"),
    "model.layers.{}.mlp.up_proj": ("transformer.h.{}.mlp.fc_2", "all"),
    "model.layers.{}.mlp.down_proj": ("transformer.h.{}.mlp.proj", "all"),
    "model.norm": ("transformer.ln_f", "all"),
    "lm_head": ("lm_head", "all"),
}
HF_NEOX: Table = {
    "gpt_neox.embed_in": ("transformer.wte", "all"),
    "gpt_neox.layers.{}.input_layernorm": ("transformer.h.{}.norm_1", "all"),
    "gpt_neox.layers.{}.attention.query_key_value": ("transformer.h.{}.attn.qkv", "qkv by head"),
    "gpt_neox.layers.{}.attention.dense": ("transformer.h.{}.attn.proj", "all"),
    "gpt_neox.layers.{}.post_attention_layernorm": ("transformer.h.{}.norm_2", "all"),
    "gpt_neox.layers.{}.mlp.dense_h_to_4h": ("transformer.h.{}.mlp.fc", "all"),
    "gpt_neox.layers.{}.mlp.dense_4h_to_h": ("transformer.h.{}.mlp.proj", "all"),
    "gpt_neox.final_layer_norm": ("transformer.ln_f", "all"),
    "embed_out": ("lm_head", "all"),
}
HF_TABLES: dict[str, Table] = {"llama": HF_LLAMA, "mistral": HF_LLAMA, "gpt_neox": HF_NEOX}
"""By `model_type` of config.json."""
GGUF_LLAMA: Table = {
    "token_embd": ("transformer.wte", "all"),
    "blk.{}.attn_norm": ("transformer.h.{}.norm_1", "all"),
    "blk.{}.attn_q": ("transformer.h.{}.attn.qkv", "q by pair"),
    "blk.{}.attn_k": ("transformer.h.{}.attn.qkv", "k by pair"),
    "blk.{}.attn_v": ("transformer.h.{}.attn.qkv", "v"),
    "blk.{}.attn_output": ("transformer.h.{}.attn.proj", "all"),
    "blk.{}.ffn_norm": ("transformer.h.{}.norm_2", "all"),
    "blk.{}.ffn_gate": ("transformer.h.{}.mlp.fc_1", "all"),
    "blk.{}.ffn_up": ("transformer.h.{}.mlp.fc_2", "all"),
    "blk.{}.ffn_down": ("transformer.h.{}.mlp.proj", "all"),
    "output_norm": ("transformer.ln_f", "all"),
    "output": ("lm_head", "all"),
}

# Rotary tables and causal masks that older files carry: the model works them out itself.
BUFFERS = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd|.*\.rotary_emb\.inv_freq|.*\.attention\.(bias|masked_bias)")


class Stored(NamedTuple):
    """A tensor that lies in a file: its shape, and how to read it."""

    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]


class Slot(NamedTuple):
    """Where a tensor belongs: a LitGPT key, and the part of it."""

    key: str
    part: str


def rows(part: str, config: Config) -> torch.Tensor:
    """The rows of `qkv` (all q heads, all k heads, all v heads) that the rows of a stored tensor fill, in the stored order. H heads,
    G key/value heads, h head size.

    `q`, `k`, `v`             the heads one after the other, (H, h) or (G, h)
    `q by pair`, `k by pair`  (H, h/2, 2): llama.cpp rotates neighbours: row j of a head's first half lies next to row j of its second
    `qkv by head`             (H, 3, h): GPT-NeoX keeps the q, k and v of a head together
    """
    import torch

    assert config.head_size is not None
    h = config.head_size
    if part == "qkv by head":
        assert config.n_query_groups == config.n_head
        return torch.arange(sum(config.qkv_sizes)).view(3, -1, h).transpose(0, 1).reshape(-1)  # (3, H, h) -> (H, 3, h)
    names = ("q", "k", "v")
    of_part = torch.arange(sum(config.qkv_sizes)).split(config.qkv_sizes)[names.index(part[0])]
    if part.endswith("by pair"):
        return of_part.view(-1, 2, h // 2).transpose(1, 2).reshape(-1)  # (H, 2, h/2) -> (H, h/2, 2)
    return of_part


def slots(table: Table, config: Config, keys: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """For a model with the LitGPT tensors `keys`: each name in the other format and its place."""
    found = {}
    for name, (module, part) in table.items():
        for block in range(config.n_layer) if "{}" in name else (0,):
            for parameter in ("weight", "bias"):
                key = f"{module.format(block)}.{parameter}"
                if key in keys:
                    found[f"{name.format(block)}.{parameter}"] = Slot(key, part)
    return found


def shapes(config: Config, stored: int, source: str) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor of the LitGPT model. `stored`: how many tensors `source` has; a block takes six at the least."""
    import torch

    from litgpt.model import GPT

    if 6 * config.n_layer > stored:
        raise UserError(f"{source}: the model has {config.n_layer} blocks by its settings, but only {stored} tensors are stored")
    try:
        with torch.device("meta"):
            return {key: tuple(value.shape) for key, value in GPT(config).state_dict().items()}
    except RuntimeError as error:
        raise UserError(f"{source}: the model's settings are impossible: {str(error).splitlines()[0]}") from None


def assemble(
    tensors: Mapping[str, Stored],
    table: Table,
    config: Config,
    source: str,
    tied: bool,
    dtype: torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """The LitGPT state dict of the stored tensors, read one at a time; `dtype` None keeps each one's own.

    `tied`: the head is the embedding. Raises UserError that lists every missing, unknown and ill-shaped tensor, before any is read.
    """
    import torch

    expected = shapes(config, len(tensors), source)
    places = slots(table, config, expected)
    head = {name for name, slot in places.items() if slot.key.startswith("lm_head.")}
    if tied:
        places = {name: slot for name, slot in places.items() if name not in head}
    parts = {part: rows(part, config) for part in {slot.part for slot in places.values()} - {"all"}}

    problems = []
    if missing := [name for name in places if name not in tensors]:
        problems.append(f"missing: {summary(missing)}")
    if unknown := [name for name in tensors if name not in places and name not in head and not BUFFERS.fullmatch(name)]:
        problems.append(f"unknown: {summary(unknown)}")
    misshapen: dict[tuple[Any, Any], list[str]] = {}
    for name, slot in places.items():
        shape = expected[slot.key] if slot.part == "all" else (len(parts[slot.part]), *expected[slot.key][1:])
        if name in tensors and tensors[name].shape != shape:
            misshapen.setdefault((tensors[name].shape, shape), []).append(name)
    problems += [f"shape {got} where {want} is expected: {summary(names)}" for (got, want), names in misshapen.items()]
    if problems:
        raise UserError(f"{source} does not fit the model {config.name!r}:\n  " + "\n  ".join(problems))

    weights: dict[str, torch.Tensor] = {}
    for name, slot in places.items():
        tensor = tensors[name].load()
        tensor = tensor.to(dtype or tensor.dtype)
        if slot.part == "all":
            weights[slot.key] = tensor.contiguous()
        else:
            if slot.key not in weights:
                weights[slot.key] = torch.empty(expected[slot.key], dtype=tensor.dtype)
            weights[slot.key][parts[slot.part]] = tensor
    if tied:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def summary(names: list[str]) -> str:
    """Names in one line, those that differ in the block number alone put together: `blk.{0..29}.attn_q.weight`."""

    def split(name: str) -> tuple[str, int]:
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        return (name, -1) if number is None else (f"{name[: number.start()]}{{}}{name[number.end() :]}", int(number[0]))

    texts = []
    for pattern, group in groupby(sorted(split(name) for name in names), key=lambda item: item[0]):
        blocks = [block for _, block in group]
        if len(blocks) == 1:
            number = str(blocks[0])
        elif len(blocks) > 2 and blocks == list(range(blocks[0], blocks[-1] + 1)):
            number = f"{{{blocks[0]}..{blocks[-1]}}}"
        else:
            number = f"{{{','.join(map(str, blocks))}}}"
        texts.append(pattern.replace("{}", number))
    return ", ".join(texts)
