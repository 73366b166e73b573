"""Which tensor of another format is which part of which LitGPT tensor. Adding a family = adding one table.

A table maps the other format's module (`{}` stands for the block, a second one for the expert) to LitGPT's module and the part of it
that is stored there. It reads both ways: `fit` gathers LitGPT tensors from stored ones, `stored_form` makes stored ones.

    all                 the whole tensor
    transposed          its transpose, for a matrix: GPT-2 keeps (in, out)
    q, k, v             these rows of `attn.qkv`, which are all H query heads, then the G key heads, then the G value heads
    qkv grouped         all its rows as (G, H/G + 2, h): each key/value head behind its query heads. GPT-NeoX has H = G, old Falcon G = 1
    gate up             the rows of `mlp.fc_1`, then those of `mlp.fc_2`; the table names fc_1
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from functools import partial
from itertools import groupby, product
from typing import TYPE_CHECKING, Any, NamedTuple

from litgpt.config import Config
from litgpt.errors import UserError

if TYPE_CHECKING:
    import torch

Table = dict[str, tuple[str, str]]

_ATTENTION: Table = {
    "model.layers.{}.self_attn.q_proj": ("transformer.h.{}.attn.qkv", "q"),
    "model.layers.{}.self_attn.k_proj": ("transformer.h.{}.attn.qkv", "k"),
    "model.layers.{}.self_attn.v_proj": ("transformer.h.{}.attn.qkv", "v"),
    "model.layers.{}.self_attn.o_proj": ("transformer.h.{}.attn.proj", "all"),
}
_MLP: Table = {
    "model.layers.{}.mlp.gate_proj": ("transformer.h.{}.mlp.fc_1", "all"),
    "model.layers.{}.mlp.up_proj": ("transformer.h.{}.mlp.fc_2", "all"),
    "model.layers.{}.mlp.down_proj": ("transformer.h.{}.mlp.proj", "all"),
}
_NORMS: Table = {
    "model.layers.{}.input_layernorm": ("transformer.h.{}.norm_1", "all"),
    "model.layers.{}.post_attention_layernorm": ("transformer.h.{}.norm_2", "all"),
}
_QK_NORMS: Table = {
    "model.layers.{}.self_attn.q_norm": ("transformer.h.{}.attn.norm_q", "all"),
    "model.layers.{}.self_attn.k_norm": ("transformer.h.{}.attn.norm_k", "all"),
}
_ENDS: Table = {
    "model.embed_tokens": ("transformer.wte", "all"),
    "model.norm": ("transformer.ln_f", "all"),
    "lm_head": ("lm_head", "all"),
}
HF_LLAMA: Table = {**_NORMS, **_ATTENTION, **_MLP, **_ENDS}
HF_QWEN3: Table = {**HF_LLAMA, **_QK_NORMS}
HF_MIXTRAL: Table = {
    **_NORMS,
    **_ATTENTION,
    "model.layers.{}.block_sparse_moe.gate": ("transformer.h.{}.mlp.gate", "all"),
    "model.layers.{}.block_sparse_moe.experts.{}.w1": ("transformer.h.{}.mlp.experts.{}.fc_1", "all"),
    "model.layers.{}.block_sparse_moe.experts.{}.w3": ("transformer.h.{}.mlp.experts.{}.fc_2", "all"),
    "model.layers.{}.block_sparse_moe.experts.{}.w2": ("transformer.h.{}.mlp.experts.{}.proj", "all"),
    **_ENDS,
}
HF_QWEN3_MOE: Table = {
    **_NORMS,
    **_ATTENTION,
    **_QK_NORMS,
    "model.layers.{}.mlp.gate": ("transformer.h.{}.mlp.gate", "all"),
    "model.layers.{}.mlp.experts.{}.gate_proj": ("transformer.h.{}.mlp.experts.{}.fc_1", "all"),
    "model.layers.{}.mlp.experts.{}.up_proj": ("transformer.h.{}.mlp.experts.{}.fc_2", "all"),
    "model.layers.{}.mlp.experts.{}.down_proj": ("transformer.h.{}.mlp.experts.{}.proj", "all"),
    **_ENDS,
}
HF_GEMMA_2: Table = {
    "model.layers.{}.input_layernorm": ("transformer.h.{}.norm_1", "all"),
    "model.layers.{}.post_attention_layernorm": ("transformer.h.{}.post_attention_norm", "all"),
    "model.layers.{}.pre_feedforward_layernorm": ("transformer.h.{}.norm_2", "all"),
    "model.layers.{}.post_feedforward_layernorm": ("transformer.h.{}.post_mlp_norm", "all"),
    **_ATTENTION,
    **_MLP,
    **_ENDS,
}
HF_GEMMA_3: Table = {**HF_GEMMA_2, **_QK_NORMS}
HF_OLMO: Table = {**_ATTENTION, **_MLP, "model.embed_tokens": _ENDS["model.embed_tokens"], "lm_head": _ENDS["lm_head"]}
"""OLMo 1 stores no norms: they have no weights."""
HF_OLMO_2: Table = {
    "model.layers.{}.post_attention_layernorm": ("transformer.h.{}.post_attention_norm", "all"),
    "model.layers.{}.post_feedforward_layernorm": ("transformer.h.{}.post_mlp_norm", "all"),
    **_ATTENTION,
    **_QK_NORMS,
    **_MLP,
    **_ENDS,
}
HF_PHI: Table = {
    "model.layers.{}.input_layernorm": ("transformer.h.{}.norm_1", "all"),
    **{name: slot for name, slot in _ATTENTION.items() if slot[1] != "all"},
    "model.layers.{}.self_attn.dense": ("transformer.h.{}.attn.proj", "all"),
    "model.layers.{}.mlp.fc1": ("transformer.h.{}.mlp.fc", "all"),
    "model.layers.{}.mlp.fc2": ("transformer.h.{}.mlp.proj", "all"),
    "model.embed_tokens": ("transformer.wte", "all"),
    "model.final_layernorm": ("transformer.ln_f", "all"),
    "lm_head": ("lm_head", "all"),
}
HF_PHI_3: Table = {
    **_NORMS,
    "model.layers.{}.self_attn.qkv_proj": ("transformer.h.{}.attn.qkv", "all"),
    "model.layers.{}.self_attn.o_proj": ("transformer.h.{}.attn.proj", "all"),
    "model.layers.{}.mlp.gate_up_proj": ("transformer.h.{}.mlp.fc_1", "gate up"),
    "model.layers.{}.mlp.down_proj": ("transformer.h.{}.mlp.proj", "all"),
    **_ENDS,
}
HF_NEOX: Table = {
    "gpt_neox.embed_in": ("transformer.wte", "all"),
    "gpt_neox.layers.{}.input_layernorm": ("transformer.h.{}.norm_1", "all"),
    "gpt_neox.layers.{}.attention.query_key_value": ("transformer.h.{}.attn.qkv", "qkv grouped"),
    "gpt_neox.layers.{}.attention.dense": ("transformer.h.{}.attn.proj", "all"),
    "gpt_neox.layers.{}.post_attention_layernorm": ("transformer.h.{}.norm_2", "all"),
    "gpt_neox.layers.{}.mlp.dense_h_to_4h": ("transformer.h.{}.mlp.fc", "all"),
    "gpt_neox.layers.{}.mlp.dense_4h_to_h": ("transformer.h.{}.mlp.proj", "all"),
    "gpt_neox.final_layer_norm": ("transformer.ln_f", "all"),
    "embed_out": ("lm_head", "all"),
}
HF_FALCON: Table = {
    "transformer.word_embeddings": ("transformer.wte", "all"),
    "transformer.h.{}.input_layernorm": ("transformer.h.{}.norm_1", "all"),
    "transformer.h.{}.self_attention.query_key_value": ("transformer.h.{}.attn.qkv", "qkv grouped"),
    "transformer.h.{}.self_attention.dense": ("transformer.h.{}.attn.proj", "all"),
    "transformer.h.{}.post_attention_layernorm": ("transformer.h.{}.norm_2", "all"),
    "transformer.h.{}.mlp.dense_h_to_4h": ("transformer.h.{}.mlp.fc", "all"),
    "transformer.h.{}.mlp.dense_4h_to_h": ("transformer.h.{}.mlp.proj", "all"),
    "transformer.ln_f": ("transformer.ln_f", "all"),
    "lm_head": ("lm_head", "all"),
}
_FALCON_NORMS = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}
HF_GPT2: Table = {
    "transformer.wte": ("transformer.wte", "all"),
    "transformer.wpe": ("transformer.wpe", "all"),
    "transformer.h.{}.ln_1": ("transformer.h.{}.norm_1", "all"),
    "transformer.h.{}.attn.c_attn": ("transformer.h.{}.attn.qkv", "transposed"),
    "transformer.h.{}.attn.c_proj": ("transformer.h.{}.attn.proj", "transposed"),
    "transformer.h.{}.ln_2": ("transformer.h.{}.norm_2", "all"),
    "transformer.h.{}.mlp.c_fc": ("transformer.h.{}.mlp.fc", "transposed"),
    "transformer.h.{}.mlp.c_proj": ("transformer.h.{}.mlp.proj", "transposed"),
    "transformer.ln_f": ("transformer.ln_f", "all"),
    "lm_head": ("lm_head", "all"),
}
HF_TABLES: dict[str, Table] = {
    **dict.fromkeys(("llama", "mistral", "gemma", "qwen2", "granite", "smollm3", "stablelm"), HF_LLAMA),
    "mixtral": HF_MIXTRAL,
    "gpt_neox": HF_NEOX,
    "falcon": HF_FALCON,
    "phi": HF_PHI,
    "phi3": HF_PHI_3,
    "gpt2": HF_GPT2,
    "gemma2": HF_GEMMA_2,
    "gemma3": HF_GEMMA_3,
    "gemma3_text": HF_GEMMA_3,
    "qwen3": HF_QWEN3,
    "qwen3_moe": HF_QWEN3_MOE,
    "olmo": HF_OLMO,
    "olmo2": HF_OLMO_2,
}
"""By `model_type` of config.json."""
TIED_BY_DEFAULT = ("falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "smollm3")
"""The model types whose head is the embedding where config.json does not say."""
LITGPT_BEFORE_0_5: Table = {"transformer.h.{}.attn.attn": ("transformer.h.{}.attn.qkv", "qkv grouped")}
"""LitGPT's older checkpoints keep the rows of q, k and v by group, under this name."""

# What the model works out itself: rotary tables and causal masks that older files carry.
BUFFERS = re.compile(
    r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd|.*\.rotary_emb\.inv_freq|.*\.attention\.(bias|masked_bias)"
    r"|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"
)
IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
"""What a text model leaves out of a multimodal one."""
SPELLINGS = (
    (r"^(?=(h|wte|wpe|ln_f)\.)", "transformer."),  # GPT-2 without its head
    (r"^lm_head\.", "embed_out."),  # GPT-NeoX in transformers 5's memory
    (r"^language_model\.", ""),  # Gemma 3 with images, in files
    (r"^model\.language_model\.", "model."),  # and in transformers 5's memory
    (r"\.mlp\.gate\.", ".block_sparse_moe.gate."),  # Mixtral in transformers 5's memory
    (r"\.mlp\.(experts\.\d+)\.gate_proj\.", r".block_sparse_moe.\1.w1."),
    (r"\.mlp\.(experts\.\d+)\.up_proj\.", r".block_sparse_moe.\1.w3."),
    (r"\.mlp\.(experts\.\d+)\.down_proj\.", r".block_sparse_moe.\1.w2."),
    *((rf"\.{two}\.", f".{one}.") for one, two in _FALCON_NORMS.items()),
)
"""Other names of a tensor, as pattern and replacement: for names that the table has not, where the outcome is one that it has."""
FUSED_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
"""All experts of a block in one tensor, (E, 2 m, d) or (E, d, m), as transformers 5 has them in memory."""


class Stored(NamedTuple):
    """A tensor that lies in a file: its shape, and how to read it."""

    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]


class Slot(NamedTuple):
    """Where a tensor belongs: a LitGPT key, and the part of it."""

    key: str
    part: str

    @property
    def keys(self) -> tuple[str, ...]:
        """The LitGPT keys whose values the tensor holds: two for `gate up`."""
        return (self.key, self.key.replace(".fc_1.", ".fc_2.")) if self.part == "gate up" else (self.key,)


Plan = dict[tuple[str, ...], "Callable[[], torch.Tensor]"]
"""LitGPT keys that share one tensor, and how to get it."""


def hf_table(model_type: str, config: Config) -> Table:
    """The table of a Hugging Face model type; Falcon names a block's norms otherwise where attention and the MLP have one each."""
    table = HF_TABLES[model_type]
    if model_type == "falcon" and config.parallel_residual and not config.shared_attention_norm:
        for old, new in _FALCON_NORMS.items():
            table = {name.replace(old, new): slot for name, slot in table.items()}
    return table


def rows(part: str, config: Config) -> torch.Tensor:
    """The rows of `attn.qkv` that the rows of a stored tensor fill, in the stored order, (rows,): the parts are at the top of this file."""
    import torch

    every = torch.arange(sum(config.qkv_sizes))
    if part in ("all", "transposed"):
        return every
    heads = [of_part.view(config.n_query_groups, -1) for of_part in every.split(config.qkv_sizes)]  # (G, h H/G), (G, h), (G, h)
    if part == "qkv grouped":
        return torch.cat(heads, dim=1).reshape(-1)  # (G, (H/G + 2) h)
    return heads[("q", "k", "v").index(part)].reshape(-1)


def slots(table: Table, config: Config, keys: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """For a model with the LitGPT tensors `keys`: each name in the other format and its place."""
    found = {}
    for name, (module, part) in table.items():
        counts = (config.n_layer, config.n_expert)[: name.count("{}")]
        for numbers in product(*map(range, counts)):
            for parameter in ("weight", "bias"):
                key = f"{module.format(*numbers)}.{parameter}"
                if key in keys:
                    found[f"{name.format(*numbers)}.{parameter}"] = Slot(key, part)
    return found


def shapes(config: Config, stored: int, source: str) -> dict[str, tuple[int, ...]]:
    """Key and shape of every tensor of the LitGPT model. `stored`: how many tensors `source` has; a block takes five at the least."""
    import torch

    from litgpt.model import GPT

    if 5 * config.n_layer > stored:
        raise UserError(f"{source}: the model has {config.n_layer} blocks by its settings, but only {stored} tensors are stored")
    try:
        with torch.device("meta"):
            return {key: tuple(value.shape) for key, value in GPT(config).state_dict().items()}
    except RuntimeError as error:
        raise UserError(f"{source}: the model's settings are impossible: {str(error).splitlines()[0]}") from None


def stored_shape(slot: Slot, config: Config, keys: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the tensor that belongs in a slot; `keys` has the shapes of the LitGPT tensors."""
    shape = keys[slot.key]
    if slot.part == "all":
        return shape
    if slot.part == "transposed":
        return shape[::-1]
    return (2 * shape[0] if slot.part == "gate up" else len(rows(slot.part, config)), *shape[1:])


def stored_form(slot: Slot, config: Config, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The tensor that belongs in a slot, made of LitGPT's."""
    import torch

    tensors = [weights[key] for key in slot.keys]
    if slot.part == "gate up":
        return torch.cat(tensors)
    if slot.part == "transposed":
        return tensors[0].t().contiguous()
    return tensors[0] if slot.part == "all" else tensors[0][rows(slot.part, config)]


def fit(tensors: Mapping[str, Stored], table: Table, config: Config, source: str, tied: bool, dtype: torch.dtype | None = None) -> Plan:
    """How to get each LitGPT tensor, in the order of the stored ones; nothing is read yet. `tied`: the head is the embedding.

    `dtype` None keeps each tensor's own. Raises UserError that lists every missing, unknown and ill-shaped tensor.
    """
    tensors = unfused(tensors)
    if 3 * config.n_layer * config.n_expert > len(tensors):
        raise UserError(
            f"{source}: the model has {config.n_expert} experts a block by its settings, but only {len(tensors)} tensors are stored"
        )
    expected = shapes(config, len(tensors), source)
    names = slots(table, config, expected)
    tensors = respelled(tensors, names)
    called = {slot.key: name for name, slot in names.items()}
    embedding, head = called.get("transformer.wte.weight", ""), called.get("lm_head.weight")
    if tied and embedding not in tensors and head in tensors:  # stored under the other of its two names
        tensors[embedding] = tensors.pop(head)
    shared = {key: (key, "lm_head.weight") if tied and key == "transformer.wte.weight" else (key,) for key in expected}
    places = {name: slot for name, slot in names.items() if not (tied and slot.key == "lm_head.weight")}

    problems = []
    if homeless := sorted(expected.keys() - {key for slot in names.values() for key in slot.keys}):
        problems.append(f"such a file has no place for these of the model: {summary(homeless)}")
    if missing := [name for name in places if name not in tensors]:
        problems.append(f"missing: {summary(missing)}")
    if unknown := [name for name in tensors if name not in names and not BUFFERS.fullmatch(name) and not IMAGES.fullmatch(name)]:
        problems.append(f"unknown: {summary(unknown)}")
    misshapen: dict[tuple[Any, Any], list[str]] = {}
    for name, slot in places.items():
        shape = stored_shape(slot, config, expected)
        if name in tensors and tensors[name].shape != shape:
            misshapen.setdefault((tensors[name].shape, shape), []).append(name)
    problems += [f"shape {got} where {want} is expected: {summary(names)}" for (got, want), names in misshapen.items()]
    if problems:
        raise UserError(f"{source} does not fit the model {config.name!r}:\n  " + "\n  ".join(problems))

    pieces: dict[str, list[tuple[Stored, Slot]]] = {}
    for name in (name for name in tensors if name in places):
        for key in places[name].keys:
            pieces.setdefault(key, []).append((tensors[name], places[name]))
    return {shared[key]: partial(_gather, key, found, expected[key], config, dtype) for key, found in pieces.items()}


def _gather(key: str, pieces: list[tuple[Stored, Slot]], shape: tuple[int, ...], config: Config, dtype: torch.dtype | None) -> torch.Tensor:
    """The LitGPT tensor `key` of the stored tensors that hold it, read one after the other."""
    import torch

    whole: torch.Tensor | None = None
    for stored, slot in pieces:
        tensor = stored.load()
        if not tensor.is_floating_point():
            raise UserError(f"the tensor for {key} holds {tensor.dtype}, not floating-point numbers: convert the unquantised model")
        if slot.part == "gate up":
            tensor = tensor.chunk(2)[slot.keys.index(key)]
        if slot.part in ("all", "transposed", "gate up"):
            return (tensor.t() if slot.part == "transposed" else tensor).to(dtype or tensor.dtype).contiguous()
        if whole is None:
            whole = torch.empty(shape, dtype=dtype or tensor.dtype)
        whole[rows(slot.part, config)] = tensor.to(whole.dtype)
    assert whole is not None
    return whole


def assemble(
    tensors: Mapping[str, Stored], table: Table, config: Config, source: str, tied: bool, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """The whole LitGPT state dict of the stored tensors, in memory; see `fit`."""
    plan = fit(tensors, table, config, source, tied, dtype)
    return {key: tensor for keys, load in plan.items() for tensor in [load()] for key in keys}


def unfused(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The same with a tensor for each expert, where a tensor holds all of a block."""
    found = {}
    for name, stored in tensors.items():
        match = FUSED_EXPERTS.fullmatch(name)
        if match is None or len(stored.shape) != 3:
            found[name] = stored
            continue
        experts, out, size = stored.shape
        parts = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
        for expert, (number, part) in product(range(experts), enumerate(parts)):
            get = partial(_slice, stored.load, expert, number, len(parts))
            found[f"{match[1]}.{expert}.{part}.weight"] = Stored((out // len(parts), size), get)
    return found


def _slice(load: Callable[[], torch.Tensor], expert: int, number: int, count: int) -> torch.Tensor:
    return load()[expert].chunk(count)[number]


def respelled(tensors: Mapping[str, Stored], names: Container[str]) -> dict[str, Stored]:
    """The same under the table's `names`, where a tensor has another that means one of them."""

    def known(name: str) -> str:
        others = (re.sub(pattern, replacement, name, count=1) for pattern, replacement in SPELLINGS)
        return name if name in names else next((other for other in others if other in names and other not in tensors), name)

    return {known(name): stored for name, stored in tensors.items()}


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
