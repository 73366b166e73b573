"""LoRA adapters to and from PEFT's format (adapter_config.json, adapter_model.safetensors), exactly.

PEFT adapts the linear layers of a transformers model: y = W x + (alpha / R) B A x with A (R, in), B (out, R). Ours are the same, but for
the layers that one side stores joined. A *unit* is a piece that has an A (r, in) and a B (rows, r) of its own here:
`transformer.h.3.attn.qkv:q`, `transformer.h.3.mlp.fc_1`. A transformers layer holds one unit, or several one below the other:

    one unit            the same A and B
    several, joined     A = the units' A one below the other, B block-diagonal, rank e r, alpha e alpha for e units
    several, with one A that one A, B = the units' B one below the other, rank r: what PEFT itself trains on a joined layer

Read backwards, the third form repeats A for each unit. Units that ours must have (a whole MLP, every block) and PEFT's adapter has not
get A = B = 0, and such pairs are left out on the way back.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from litgpt import files
from litgpt.checkpoint import WEIGHTS as BASE_WEIGHTS
from litgpt.checkpoint import load_weights
from litgpt.convert import names
from litgpt.convert.from_litgpt import hf_settings
from litgpt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from litgpt.config import Config
    from litgpt.lora import Config as LoRAConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
WHOLE = ("transformer.wte", "lm_head")
PARTS = ("q", "k", "v")
FLAGS = {"q": "lora_query", "k": "lora_key", "v": "lora_value", "attn.proj": "lora_projection", "mlp": "lora_mlp", "lm_head": "lora_head"}
ADAPTABLE = re.compile(r"transformer\.h\.\{\}\.(attn\.(qkv|proj)|mlp\.(fc|fc_1|fc_2|proj))|lm_head")
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "peft_type", "task_type", "peft_version", "megatron_core", "qalora_group_size", "runtime_config"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
}
"""Keys of adapter_config.json that are read here, or that say nothing about what the adapter computes."""
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base's weights as they are."""

Pair = tuple["Tensor", "Tensor"]
"""A and B"""


class Layer(NamedTuple):
    """A linear layer of the transformers model."""

    units: tuple[str, ...]
    order: Tensor | None
    """its rows, as rows of the units one below the other; None: in that order"""


class Layout(NamedTuple):
    """How a model's linear layers are divided in transformers and here."""

    layers: dict[str, Layer]
    """by the layer's name in the transformers model"""
    sizes: dict[str, tuple[int, int]]
    """(out, in) of each unit"""
    transposed: bool
    """transformers stores the weights (in, out), as GPT-2 does"""


def layout(config: Config, model_type: str) -> Layout:
    """The layers that LoRA can be on, in transformers' class for `model_type`.

    Experts are not among them: transformers keeps them as one tensor, not as linear layers.
    """
    table = names.hf_table(model_type, config)
    shapes = names.shapes(config, 6 * config.n_layer, "the adapter's model")
    sizes: dict[str, tuple[int, int]] = {}
    layers: dict[str, Layer] = {}
    for name, (module, part) in table.items():
        if not ADAPTABLE.fullmatch(module):
            continue
        for block in range(config.n_layer) if "{}" in name else (0,):
            slot = names.Slot(f"{module.format(block)}.weight", part)
            if slot.key not in shapes:
                continue
            units: tuple[str, ...] = tuple(key.removesuffix(".weight") for key in slot.keys)
            sizes |= {unit: (shapes[key][0], shapes[key][1]) for unit, key in zip(units, slot.keys, strict=True)}
            if module.endswith("qkv"):
                _, size = sizes.pop(units[0])
                units = tuple(f"{units[0]}:{letter}" for letter in (part if part in PARTS else PARTS))
                rows = dict(zip(PARTS, config.qkv_sizes, strict=True))
                sizes |= {unit: (rows[unit[-1]], size) for unit in units}
            layers[in_memory(name.format(block), module)] = Layer(units, names.rows(part, config) if part == "qkv grouped" else None)
    return Layout(layers, sizes, any(part == "transposed" for _, part in table.values()))


def in_memory(name: str, module: str) -> str:
    """What transformers calls a module that has `name` in files: it calls every output head lm_head."""
    return "lm_head" if module == "lm_head" else name


def split(weights: dict[str, Tensor], config: LoRAConfig) -> dict[str, Pair]:
    """The units of our LoRA state dict. `attn.qkv` holds those of q, k and v that are switched on, one below the other."""
    units: dict[str, Pair] = {}
    on = [letter for letter in PARTS if getattr(config, FLAGS[letter])]
    rows = [rows for letter, rows in zip(PARTS, config.qkv_sizes, strict=True) if letter in on]
    for key in weights:
        module, _, parameter = key.rpartition(".")
        if parameter != "lora_A":
            continue
        a, b = weights[key], weights[f"{module}.lora_B"]
        if module.endswith(".qkv"):
            units |= {f"{module}:{part}": pair for part, *pair in zip(on, a.chunk(len(on)), b.split(rows), strict=True)}  # type: ignore[misc]
        else:
            units[module] = (a, b)
    return units


def join(units: dict[str, Pair]) -> dict[str, Tensor]:
    """The state dict of units, the other way."""
    import torch

    groups: dict[str, list[Pair]] = {}
    for unit in sorted(units, key=lambda name: PARTS.index(name[-1]) if ":" in name else 0):
        groups.setdefault(unit.partition(":")[0], []).append(units[unit])
    weights = {}
    for module, pairs in groups.items():
        weights[f"{module}.lora_A"] = torch.cat([a for a, _ in pairs])
        weights[f"{module}.lora_B"] = torch.cat([b for _, b in pairs])
    return weights


def to_peft(config: LoRAConfig, weights: dict[str, Tensor], base: str, model_type: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """adapter_config.json and the tensors, for the LoRA weights (not Skip2-LoRA's) of a model. `base`: its name; `model_type`: its class's.

    Raises UserError that lists what has no place in a transformers model.
    """
    plan = layout(config, model_type)
    units = {name: pair for name, pair in split(weights, config).items() if any(bool(tensor.any()) for tensor in pair)}
    if homeless := [name for name in units if name not in plan.sizes]:
        raise UserError(
            f"PEFT's format has no place for LoRA on {names.summary(homeless)}: transformers has no linear layers there. "
            "Leave lora_mlp off for a model with experts, or merge the adapter"
        )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in plan.layers.items():
        if any(unit in units for unit in layer.units):
            a, b = _stack(layer, units, plan)
            tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = a.contiguous(), b.contiguous()
            ranks[name] = len(a)
            if config.lora_variant == "dora":
                tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = _magnitude(name, layer, weights, units, config)
    if not tensors:
        raise UserError("the adapter has no LoRA weights, or only zeros: there is nothing to write")
    targets, blocks = _targets(list(ranks), plan, config.n_layer)
    joined = {name: rank // config.lora_r for name, rank in ranks.items() if rank != config.lora_r}
    factors = _by_short_name(joined, ranks, plan)
    alpha = config.lora_alpha * config.lora_r**0.5 if config.lora_rslora else config.lora_alpha  # the same scale without use_rslora
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora_r,
        "lora_alpha": alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets,
        "layers_to_transform": blocks,
        "rank_pattern": {name: factor * config.lora_r for name, factor in factors.items()},
        "alpha_pattern": {name: factor * alpha for name, factor in factors.items()},
        "bias": "none",
        "fan_in_fan_out": plan.transposed,
        "use_rslora": False,
        "use_dora": config.lora_variant == "dora",
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    return settings, tensors


def _magnitude(name: str, layer: Layer, weights: dict[str, Tensor], units: dict[str, Pair], config: LoRAConfig) -> Tensor:
    """Return DoRA's magnitudes for the rows of a transformers layer, (out,). Raises UserError if only part of the layer has any."""
    import torch

    if missing := [unit for unit in layer.units if unit not in units]:
        raise UserError(f"PEFT's DoRA needs all rows of {name}, and the adapter has none for {names.summary(missing)}: merge it instead")
    parts = []
    for unit in layer.units:
        module, _, letter = unit.partition(":")
        own = weights[f"{module}.lora_magnitude"]
        rows = [size if getattr(config, FLAGS[part]) else 0 for part, size in zip(PARTS, config.qkv_sizes, strict=True)]
        parts.append(own.split(rows)[PARTS.index(letter)] if letter else own)
    magnitude = torch.cat(parts)
    return magnitude if layer.order is None else magnitude[layer.order]


def _stack(layer: Layer, units: dict[str, Pair], plan: Layout) -> Pair:
    """A (R, in) and B (out, R) of a layer."""
    import torch

    present = [units[unit] for unit in layer.units if unit in units]
    a = present[0][0]
    if len(present) > 1 and all(torch.equal(a, other) for other, _ in present):
        b = torch.cat([units[unit][1] if unit in units else a.new_zeros(plan.sizes[unit][0], len(a)) for unit in layer.units])
    elif len(layer.units) == 1:
        b = present[0][1]
    else:
        a = torch.cat([a for a, _ in present])
        b = torch.block_diag(*(units[unit][1] if unit in units else a.new_zeros(plan.sizes[unit][0], 0) for unit in layer.units))
    return a, b if layer.order is None else b[layer.order]


def short(kind: str, plan: Layout, chosen: set[str]) -> str:
    """The last part of a layer's name, q_proj, if it names no layer but those of the chosen kinds; else the name in the block."""
    leaf = kind.rpartition(".")[2]
    return leaf if {path(name) for name in plan.layers if f".{name}".endswith(f".{leaf}")} <= chosen else kind


def path(name: str) -> str:
    """A layer's name within its block: model.layers.3.mlp.up_proj -> mlp.up_proj."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def block_of(name: str) -> int:
    """The block that a layer belongs to; -1: none."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _targets(layers: list[str], plan: Layout, n_layer: int) -> tuple[list[str], list[int] | None]:
    """target_modules and layers_to_transform that name exactly these layers: short names if they go, else the whole ones."""
    kinds = {path(name) for name in layers}
    blocks = sorted({block_of(name) for name in layers} - {-1})
    everywhere = blocks == list(range(n_layer))
    wanted = {name for name in plan.layers if path(name) in kinds and (block_of(name) in blocks or block_of(name) == -1)}
    if wanted != set(layers) or (blocks and not everywhere and any(block_of(name) == -1 for name in layers)):
        return layers, None
    return sorted({short(kind, plan, kinds) for kind in kinds}), None if everywhere or not blocks else blocks


def _by_short_name(values: dict[str, int], ranks: dict[str, int], plan: Layout) -> dict[str, int]:
    """The same values under short names, where all layers of a kind have the same one."""
    result: dict[str, int] = {}
    for name, value in values.items():
        kind = path(name)
        alike = {values.get(other, 1) for other in ranks if path(other) == kind}
        result[short(kind, plan, {kind}) if len(alike) == 1 else name] = value
    return result


def from_peft(
    settings: dict[str, Any], tensors: dict[str, Tensor], config: Config, source: Path, model_type: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our adapter settings and weights for an adapter of PEFT on a model. Raises UserError that lists all that ours cannot express."""
    problems = unsupported(settings)
    plan = layout(config, model_type)
    pairs = _pairs(tensors, plan, problems)
    r, alpha = _rank(settings, pairs, plan, problems)
    units: dict[str, Pair] = {}
    for name, pair in pairs.items() if not problems else ():
        found = _unstack(plan.layers[name], pair, r, plan)
        units |= found
        if not found:
            problems.append(f"the rank of {name} is {len(pair[0])}, that of others {r}: ours have the same rank everywhere")
    if problems:
        raise UserError(f"{source} cannot become a litgpt adapter of the model {config.name!r}:\n  " + "\n  ".join(problems))
    flags = dict.fromkeys(FLAGS.values(), False)
    flags |= {_flag(unit): True for unit in units}
    blocks = sorted({block_of(unit) for unit in units} - {-1})
    _fill(units, plan, flags, blocks)
    own = {
        "lora_r": r,
        "lora_alpha": alpha,
        "lora_dropout": settings.get("lora_dropout") or 0.0,
        **flags,
        "lora_block_indices": None if not blocks or blocks == list(range(config.n_layer)) else blocks,
    }
    return own, join(units)


def _flag(unit: str) -> str:
    """The setting that switches a unit on."""
    kind = unit.rpartition(":")[2] if ":" in unit else path(unit)
    return FLAGS["mlp" if kind.startswith("mlp.") else kind]


def _fill(units: dict[str, Pair], plan: Layout, flags: dict[str, bool], blocks: list[int]) -> None:
    """Give every unit that the settings switch on and the adapter does not have zeros for A and B."""
    a, _ = next(iter(units.values()))
    for unit, (out, size) in plan.sizes.items():
        if unit not in units and flags[_flag(unit)] and block_of(unit) in (-1, *blocks):
            units[unit] = (a.new_zeros(len(a), size), a.new_zeros(out, len(a)))


def unsupported(settings: dict[str, Any]) -> list[str]:
    """What the adapter's settings ask for that plain LoRA has not."""
    problems = []
    if settings.get("peft_type") != "LORA":
        problems.append(f"peft_type is {settings.get('peft_type')!r}: only LORA can be converted")
    if settings.get("task_type") not in ("CAUSAL_LM", None):
        problems.append(f"task_type is {settings['task_type']!r}: only CAUSAL_LM can be converted")
    if settings.get("bias", "none") != "none":
        problems.append(f"bias is {settings['bias']!r}: trained biases have no place, only none can be converted")
    if settings.get("init_lora_weights") not in KEEPS_BASE:
        problems.append(f"init_lora_weights is {settings['init_lora_weights']!r}: it changes the base's weights, on which ours stand")
    problems += [f"{key} is {str(value)[:100]}: it has no place" for key, value in settings.items() if value and key not in HARMLESS]
    dropout = settings.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout is {dropout!r}: a probability from 0 to below 1 is needed")
    return problems


def _pairs(tensors: dict[str, Tensor], plan: Layout, problems: list[str]) -> dict[str, Pair]:
    """A and B of each layer; what does not fit is added to `problems`."""
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_(A|B)\.weight", key)
        name = match and ("lm_head" if match[1] == "embed_out" else match[1])
        if match is None or name not in plan.layers:
            unknown.append(key.removeprefix(PREFIX))
        else:
            found.setdefault(str(name), {})[match[2]] = tensor
    if unknown:
        problems.append(f"it has weights that are not LoRA on a linear layer of this model: {names.summary(unknown)}")
    if alone := [name for name, pair in found.items() if len(pair) == 1]:
        problems.append(f"only one of lora_A and lora_B is there for {names.summary(alone)}")
    pairs = {name: (pair["A"], pair["B"]) for name, pair in found.items() if len(pair) == 2}
    for name, (a, b) in pairs.items():
        units = plan.layers[name].units
        rank, size, out = len(a), plan.sizes[units[0]][1], sum(plan.sizes[unit][0] for unit in units)
        if a.shape != (rank, size) or b.shape != (out, rank) or not rank:
            problems.append(f"{name} has shapes {tuple(a.shape)} and {tuple(b.shape)}, the layer is (in, out) {(size, out)}")
    if not found:
        problems.append("it has no LoRA weights")
    return pairs


def _rank(settings: dict[str, Any], pairs: dict[str, Pair], plan: Layout, problems: list[str]) -> tuple[int, float]:
    """Our r, which all units share, and our alpha; with rsLoRA's factor alpha / sqrt(r) it is alpha sqrt(r)."""
    ranks = {name: len(a) for name, (a, _) in pairs.items()}
    single = {rank for name, rank in ranks.items() if len(plan.layers[name].units) == 1}
    r, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float):
        problems.append(f"r is {r!r} and lora_alpha {alpha!r}: numbers are needed")
        return 1, 1
    if len(single) == 1:
        (own,) = single
    else:
        own = r
    if len(single) > 1:
        problems.append(f"it has ranks {', '.join(map(str, sorted(single)))}: ours have the same rank everywhere")
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        problems.append(f"alpha_pattern is {str(patterns)[:100]}: a mapping is needed")
        return own, alpha
    if odd := [key for key in patterns if not re.fullmatch(r"[\w.]+", key)]:
        problems.append(f"alpha_pattern has {', '.join(odd)}: only plain names are read, not expressions")
    factors: dict[float, list[str]] = {}
    for name, rank in ranks.items():
        value = next((patterns[key] for key in patterns if f".{name}".endswith(f".{key}")), alpha)
        if not isinstance(value, int | float):
            problems.append(f"alpha_pattern has {value!r} for {name}: a number is needed")
            return own, alpha
        factors.setdefault(value * own * (rank**0.5 if settings.get("use_rslora") else 1) / rank, []).append(name)
    if len(factors) > 1:
        told = "; ".join(f"{factor / own:g} on {names.summary(layers)}" for factor, layers in factors.items())
        problems.append(f"it has several factors alpha / r: {told}. Ours have the same everywhere")
    found = next(iter(factors), float(alpha))
    return own, int(found) if found == int(found) else found


def _unstack(layer: Layer, pair: Pair, r: int, plan: Layout) -> dict[str, Pair]:
    """The units of a layer's A and B, the reverse of `_stack`; {} if ours cannot express them."""
    import torch

    a, b = pair
    if layer.order is not None:
        b = b[torch.argsort(layer.order)]
    parts = dict(zip(layer.units, b.split([plan.sizes[unit][0] for unit in layer.units]), strict=True))
    if len(a) == r:
        used = {unit: (a, part) for unit, part in parts.items() if part.any()}
        return used or {unit: (a, part) for unit, part in parts.items()}
    columns = range(0, len(a), r)
    if len(a) % r or len(columns) > len(layer.units):
        return {}
    places = [[unit for unit, part in parts.items() if part[:, start : start + r].any()] for start in columns]
    if len(columns) == len(layer.units):
        chosen = list(layer.units)
    elif all(len(place) == 1 for place in places):
        chosen = [place[0] for place in places]
    else:
        return {}
    if any(place not in ([], [unit]) for place, unit in zip(places, chosen, strict=True)) or len(set(chosen)) < len(chosen):
        return {}
    return {unit: (a[start : start + r], parts[unit][:, start : start + r]) for unit, start in zip(chosen, columns, strict=True)}


def load(folder: Path, base: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Our adapter settings and weights of PEFT's folder, for the checkpoint `base`."""
    from litgpt.config import Config

    settings = files.read_json(folder / CONFIG)
    older = folder / "adapter_model.bin"
    tensors = load_weights(older) if older.is_file() and not (folder / WEIGHTS).exists() else read_tensors(folder / WEIGHTS)
    config = Config.from_checkpoint(base)
    model_type = hf_settings(config, base)["model_type"]
    return from_peft(settings, without_base(tensors, names.hf_table(model_type, config), base), config, folder, model_type)


def without_base(tensors: dict[str, Tensor], table: names.Table, base: Path) -> dict[str, Tensor]:
    """The adapter's own tensors. PEFT adds copies of the head and the embedding if LoRA is on one: those equal to the base's go."""
    import torch

    places = {in_memory(name, module): f"{module}.weight" for name, (module, _) in table.items() if module in WHOLE}
    kept, weights = {}, load_weights(base / BASE_WEIGHTS)
    for key, tensor in tensors.items():
        place = places.get(key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer"))
        if place is None or place not in weights or not torch.equal(weights[place].to(tensor.dtype), tensor):
            kept[key] = tensor
    return kept


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The content of a safetensors file. Raises UserError if it is missing or broken."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise UserError(f"{file} is missing: the adapter's weights")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file (truncated?): {error}") from None


def write(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """The two files of an adapter folder of PEFT."""
    from safetensors.torch import save_file

    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
