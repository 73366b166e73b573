"""Conversion between LitGPT's tensors and those of another format, by a family's table of names.

A table maps the other format's module (`{}` stands for the block, a second one for the expert) to LitGPT's module and the part of it
that is stored there. `fit` gathers LitGPT tensors from stored ones, `stored_form` makes stored ones.

    all                 the complete tensor
    transposed          its transpose, for a matrix: GPT-2 keeps (in, out)
    q, k, v             these rows of `attn.qkv`, which are all H query heads, then the G key heads, then the G value heads
    q pairs, k pairs    the same, each head's rotated rows as neighbouring pairs: rows 2j and 2j+1 of n are rows j and n/2 + j here
    qkv grouped         all its rows as (G, H/G + 2, h): each key/value head behind its query heads. GPT-NeoX has H = G, old Falcon G = 1
    gate up             the rows of `mlp.fc_1`, then those of `mlp.fc_2`; the table names fc_1
"""

import re
from collections.abc import Callable, Container, Mapping
from functools import partial
from itertools import groupby, product
from typing import Any, NamedTuple

import torch

from litgpt import families
from litgpt.config import CORRECTION, Config
from litgpt.convert.experts import Stored as Stored, separated
from litgpt.device import on_meta
from litgpt.errors import UserError
from litgpt.families import Table
from litgpt.model import GPT
from litgpt.text import first_line

# The model computes these itself: rotary tables and causal masks that older files hold.
BUFFERS = re.compile(
    "|".join((r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd|.*\.rotary_emb\.inv_freq", *(row.ignored for row in families.HF.values())))
)
IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\..*")  # left out when a multimodal model is read as a text model
SPELLINGS = [spelling for row in families.HF.values() for spelling in row.spellings]


class Slot(NamedTuple):
    """The place of a stored tensor: a LitGPT key, and the part of that tensor."""

    key: str
    part: str

    @property
    def keys(self) -> tuple[str, ...]:
        """The LitGPT keys whose values the stored tensor holds: two for `gate up`."""
        return (self.key, self.key.replace(".fc_1.", ".fc_2.")) if self.part == "gate up" else (self.key,)


Load = Callable[[], torch.Tensor]
Plan = dict[tuple[str, ...], Load]  # LitGPT keys that share one tensor, and how to load it


def hf_table(model_type: str, config: Config) -> Table:
    """Return the table of a Hugging Face model type."""
    row = families.architecture(model_type)
    assert row is not None, model_type
    return row.variant.names if row.variant and row.variant.applies(config.base_dict()) else row.names


def rows(part: str, config: Config) -> torch.Tensor:
    """Return the rows of `attn.qkv` that the rows of a stored tensor fill, in the stored order, (rows,)."""
    every = torch.arange(sum(config.qkv_sizes))
    parts = every.split(config.qkv_sizes)
    if part == "qkv grouped":
        return torch.cat([rows.view(config.n_query_groups, -1) for rows in parts], dim=1).reshape(-1)  # (G, (H/G + 2) h)
    if part.endswith(" pairs"):
        n, within = config.rope_n_elem, torch.arange(config.head_size)
        within[:n] = within[:n].view(2, -1).t().flatten()
        return parts["qkv".index(part[0])].view(-1, len(within))[:, within].flatten()
    return parts["qkv".index(part)] if part in ("q", "k", "v") else every


def slots(table: Table, config: Config, keys: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """Return each name in the other format and its place, for a model with the LitGPT tensors `keys`."""
    places = {}
    for name, (module, part) in table.items():
        counts = (config.n_layer, config.n_expert)[: name.count("{}")]
        for numbers in product(*map(range, counts)):
            for parameter in ("weight", "bias", "sinks", CORRECTION):
                key = f"{module.format(*numbers)}.{parameter}"
                if key in keys:
                    places[f"{name.format(*numbers)}.{parameter}"] = Slot(key, part)
    return places


def shapes(config: Config, source: str, stored: int | None = None) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the LitGPT model. `stored` is the number of tensors in a file, which may have wrong settings.

    A block has at least five tensors, an expert three: a model that no file can hold is not built.
    """
    experts = config.n_expert * (config.n_layer - (config.first_k_dense_replace or 0))
    for least, parts in ((5 * config.n_layer, f"{config.n_layer} blocks"), (3 * experts, f"{config.n_expert} experts a block")):
        if stored is not None and least > stored:
            raise UserError(f"{source}: the model has {parts} by its settings, but only {stored} tensors are stored")
    try:
        with on_meta():
            return {key: tuple(value.shape) for key, value in GPT(config).state_dict().items()}
    except RuntimeError as error:
        raise UserError(f"{source}: the model's settings are impossible: {first_line(error)}") from None


def stored_shape(slot: Slot, config: Config, keys: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of a stored tensor; `keys` has the shapes of the LitGPT tensors."""
    shape = keys[slot.key]
    if slot.part == "all":
        return shape
    if slot.part == "transposed":
        return shape[::-1]
    counts = {"gate": 2 * shape[0], "qkv": sum(config.qkv_sizes), **dict(zip("qkv", config.qkv_sizes, strict=True))}
    return (counts[slot.part.split()[0]], *shape[1:])


def stored_form(slot: Slot, config: Config, loads: Mapping[str, Load]) -> torch.Tensor:
    """Return a stored tensor, made from the LitGPT tensors that `loads` load."""
    tensors = [loads[key]() for key in slot.keys]
    if slot.part == "gate up":
        return torch.cat(tensors)
    if slot.part == "transposed":
        return tensors[0].t().contiguous()
    return tensors[0] if slot.part == "all" else tensors[0][rows(slot.part, config)]


def fit(tensors: Mapping[str, Stored], table: Table, config: Config, source: str, tied: bool, dtype: torch.dtype | None = None) -> Plan:
    """Return how to load each LitGPT tensor, in the order of the stored ones; nothing is read yet. `tied`: the head is the embedding.

    Without `dtype` each tensor keeps its own. Raise UserError that lists every missing and unknown tensor and every wrong shape.
    """
    tensors = separated(tensors, interleaved=config.swiglu_limit is not None)
    expected = shapes(config, source, len(tensors))
    names = slots(table, config, expected)
    tensors = respelled(tensors, names)
    called = {slot.key: name for name, slot in names.items()}
    embedding, head = called.get("transformer.wte.weight", ""), called.get("lm_head.weight")
    if tied and embedding not in tensors and head in tensors:  # stored under the other of its two names
        tensors[embedding] = tensors.pop(head)
    if tied and embedding in tensors and head in tensors:  # a head of its own counts more than the flag, as in transformers
        first, other = tensors[embedding], tensors[head]
        tied = first.shape == other.shape and torch.equal(first.load(), other.load())
    shared = {key: (key, "lm_head.weight") if tied and key == "transformer.wte.weight" else (key,) for key in expected}
    places = {name: slot for name, slot in names.items() if not (tied and slot.key == "lm_head.weight")}

    problems = _misfits(tensors, names, {name: stored_shape(slot, config, expected) for name, slot in places.items()})
    if homeless := sorted(expected.keys() - {key for slot in names.values() for key in slot.keys}):
        problems.insert(0, f"such a file cannot store these tensors of the model: {summary(homeless)}")
    if problems:
        raise UserError(f"{source} does not fit the model {config.name!r}:\n  " + "\n  ".join(problems))

    pieces: dict[str, list[tuple[Stored, Slot]]] = {}
    for name in (name for name in tensors if name in places):
        for key in places[name].keys:
            pieces.setdefault(key, []).append((tensors[name], places[name]))
    return {shared[key]: partial(_gather, key, parts, expected[key], config, dtype) for key, parts in pieces.items()}


def _misfits(tensors: Mapping[str, Stored], known: Container[str], required: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return the missing, unknown and misshapen among stored tensors. `known` names may be there, `required` ones have these shapes."""
    problems = []
    if missing := [name for name in required if name not in tensors]:
        problems.append(f"missing: {summary(missing)}")
    if unknown := [name for name in tensors if name not in known and not BUFFERS.fullmatch(name) and not IMAGES.fullmatch(name)]:
        problems.append(f"unknown: {summary(unknown)}")
    misshapen: dict[tuple[Any, Any], list[str]] = {}
    for name, shape in required.items():
        if name in tensors and tensors[name].shape != shape:
            misshapen.setdefault((tensors[name].shape, shape), []).append(name)
    return problems + [f"shape {got} where {want} is expected: {summary(names)}" for (got, want), names in misshapen.items()]


def _gather(key: str, pieces: list[tuple[Stored, Slot]], shape: tuple[int, ...], config: Config, dtype: torch.dtype | None) -> torch.Tensor:
    """Return the LitGPT tensor `key` from the stored tensors that hold it, read one after the other."""
    joined: torch.Tensor | None = None
    for stored, slot in pieces:
        tensor = stored.load()
        if not tensor.is_floating_point():
            raise UserError(f"the tensor for {key} holds {tensor.dtype}, not floating-point numbers: convert the unquantised model")
        if slot.part == "gate up":
            tensor = tensor.chunk(2)[slot.keys.index(key)]
        dtype = torch.float32 if key.endswith(CORRECTION) else dtype
        if slot.part in ("all", "transposed", "gate up"):
            return _cast(tensor.t() if slot.part == "transposed" else tensor, dtype or tensor.dtype, key).contiguous()
        if joined is None:
            joined = torch.empty(shape, dtype=dtype or tensor.dtype)
        joined[rows(slot.part, config)] = _cast(tensor, joined.dtype, key)
    assert joined is not None
    return joined


def _cast(tensor: torch.Tensor, dtype: torch.dtype, key: str) -> torch.Tensor:
    """Return the tensor in another format. Raises UserError for a finite number that becomes infinite."""
    cast = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and not torch.equal(cast.isfinite(), tensor.isfinite()):
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"the tensor for {key} holds numbers that {kind} cannot hold: choose bfloat16 or float32 with --dtype")
    return cast


def respelled(tensors: Mapping[str, Stored], names: Container[str]) -> dict[str, Stored]:
    """Return the tensors; a name that the table's `names` lack is replaced by a spelling that they have, if any."""

    def known(name: str) -> str:
        others = (re.sub(pattern, replacement, name, count=1) for pattern, replacement in SPELLINGS)
        return name if name in names else next((other for other in others if other in names and other not in tensors), name)

    return {known(name): stored for name, stored in tensors.items()}


MOST_NAMED = 12  # names in a message: experts can be hundreds


def summary(names: list[str]) -> str:
    """Return names in one line, with those that differ in the block number alone joined: `blk.{0..29}.attn_q.weight`."""

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
    more = [f"and {len(texts) - MOST_NAMED} more"] if len(texts) > MOST_NAMED + 1 else []
    return ", ".join([*texts[: MOST_NAMED if more else None], *more])
