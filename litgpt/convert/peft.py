"""LoRA adapters to and from PEFT's format (adapter_config.json, adapter_model.safetensors), without loss.

PEFT adapts the linear layers of a transformers model: y = W x + (alpha / R) B A x with A (R, in), B (out, R). LitGPT does the same, except
for the layers that one side stores joined. A *unit* is a part with an A (r, in) and a B (rows, r) of its own here:
`transformer.h.3.attn.qkv:q`, `transformer.h.3.mlp.fc_1`. A transformers layer consists of one unit, or of several stacked by rows:

    one unit             the same A and B
    several, joined      A = the units' A stacked, B block-diagonal, rank e r, alpha e alpha for e units
    several, with one A  that A, B = the units' B stacked, rank r: what PEFT itself trains on a joined layer

Ranks and alphas of layers are in PEFT's rank_pattern and alpha_pattern; for joined units with different factors, B contains the quotient.
Read backwards, the third form repeats A for each unit. Units that the settings here switch on (a complete MLP, every block) and PEFT's
adapter lacks get A = B = 0, and such units are left out on the way back.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import pad

from litgpt import files
from litgpt.adapters.patterns import PARTS, compact, matching, require_patterns, within_block
from litgpt.adapters.pissa import as_lora
from litgpt.adapters.settings import LAYER_FLAGS, MODULES, RANK
from litgpt.args import Range
from litgpt.atomic import write_bytes, write_text
from litgpt.checkpoint import PEFT_ADAPTER, WEIGHTS as BASE_WEIGHTS, load_weights
from litgpt.config import Config
from litgpt.convert import names
from litgpt.convert.hf import Reader, hf_settings
from litgpt.errors import UserError
from litgpt.families._rope import whole
from litgpt.lora import Config as LoRAConfig

CONFIG, WEIGHTS = PEFT_ADAPTER, "adapter_model.safetensors"
PREFIX = "base_model.model."
PARAMETERS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude": "lora_magnitude_vector"}  # here and in PEFT
FACTORS = ("lora_A", "lora_B")
FLAGS = dict(zip((*PARTS, "attn.proj", "mlp", "lm_head"), LAYER_FLAGS, strict=True))  # the setting that switches a kind of unit on
LATENT = {"q_proj": 0, "q_a_proj": 0, "q_b_proj": 0, "kv_a_proj_with_mqa": 2, "kv_b_proj": 2}  # layers of latent attention: its PARTS
FLAGS |= {f"attn.{layer}": LAYER_FLAGS[part] for layer, part in LATENT.items()}
ADAPTABLE = re.compile(rf"transformer\.h\.\{{\}}\.(attn\.(qkv|proj|{'|'.join(LATENT)})|mlp\.(fc|fc_1|fc_2|proj))|lm_head")
HARMLESS = {  # keys of adapter_config.json that are read here, or do not change what the adapter computes
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "use_dora", "init_lora_weights", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "peft_type", "task_type", "peft_version", "megatron_core", "qalora_group_size", "runtime_config"),
    *("modules_to_save", "alora_invocation_tokens", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying"),
}
KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # values of init_lora_weights that leave the base's weights unchanged

Unit = dict[str, "Tensor"]  # the parameters of a unit or a layer by their names here; all but lora_A have its rows


class Layer(NamedTuple):
    """A linear layer of the transformers model."""

    units: tuple[str, ...]
    order: Tensor | None  # its rows, as rows of the stacked units; None: the same order


class Layout(NamedTuple):
    """How a model's linear layers are divided in transformers and here."""

    layers: dict[str, Layer]  # by the layer's name in the transformers model
    sizes: dict[str, tuple[int, int]]  # (out, in) of each unit
    transposed: bool  # transformers stores the weights (in, out), as GPT-2 does


def layout(config: Config, model_type: str) -> Layout:
    """Return the layers that can have LoRA, in transformers' class for `model_type`.

    The MLPs of a mixture are not among them: transformers keeps the experts as one tensor, not as linear layers.
    """
    table = names.hf_table(model_type, config)
    shapes = names.shapes(config, "the adapter's model")
    adaptable = {
        name: slot for name, slot in table.items() if ADAPTABLE.fullmatch(slot[0]) and not (config.n_expert and ".mlp." in slot[0])
    }
    slots = names.slots(adaptable, config, shapes)
    sizes: dict[str, tuple[int, int]] = {}
    layers: dict[str, Layer] = {}
    for key, slot in slots.items():
        if key.endswith(".bias"):
            continue
        units = tuple(key.removesuffix(".weight") for key in slot.keys)
        size = shapes[slot.key][1]
        rows = [shapes[key][0] for key in slot.keys]
        if units[0].endswith(".qkv"):
            letters = slot.part[0] if slot.part[0] in PARTS and slot.part != "qkv grouped" else PARTS
            units, rows = tuple(f"{units[0]}:{part}" for part in letters), [config.qkv_sizes[PARTS.index(part)] for part in letters]
        sizes |= {unit: (out, size) for unit, out in zip(units, rows, strict=True)}
        order = names.rows(slot.part, config) if slot.part.endswith(("grouped", "pairs")) else None
        order = None if order is None else order - order.min()
        layers[in_memory(key.removesuffix(".weight"), slot.key.removesuffix(".weight"))] = Layer(units, order)
    return Layout(layers, sizes, any(part == "transposed" for _, part in table.values()))


def in_memory(name: str, module: str) -> str:
    """Return transformers' name of a module that is called `name` in files: it calls every output layer lm_head."""
    return "lm_head" if module == "lm_head" else name


def split(weights: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Unit]:
    """Return the units of a LoRA state dict. `attn.qkv` holds those of q, k and v that are switched on, stacked."""
    units: dict[str, Unit] = {}
    on = [part for part in PARTS if getattr(config, FLAGS[part])]
    rows = [config.qkv_sizes[PARTS.index(part)] for part in on]
    for module in (key.removesuffix(".lora_A") for key in weights if key.endswith(".lora_A")):
        unit = {parameter: weights[f"{module}.{parameter}"] for parameter in PARAMETERS if f"{module}.{parameter}" in weights}
        if module.endswith(".qkv"):
            ranks = [config.size_of(f"{module}:{part}")[0] for part in on]
            ranks = [rank * len(unit["lora_A"]) // sum(ranks) for rank in ranks]  # PiSSA has twice as many
            parts = {name: value.split(ranks if name == "lora_A" else rows) for name, value in unit.items()}
            if "lora_B" in parts:
                parts["lora_B"] = tuple(b[:, :rank] for b, rank in zip(parts["lora_B"], ranks, strict=True))
            units |= {f"{module}:{part}": {name: values[i] for name, values in parts.items()} for i, part in enumerate(on)}
        else:
            units[module] = unit
    return units


def join(units: Mapping[str, Unit]) -> dict[str, Tensor]:
    """Return the LoRA state dict of units, the reverse of `split`."""
    groups: dict[str, list[Unit]] = {}
    for name in sorted(units, key=lambda name: PARTS.index(name[-1]) if ":" in name else 0):
        groups.setdefault(name.partition(":")[0], []).append(units[name])
    for group in groups.values():
        widest = max(unit["lora_B"].size(1) for unit in group)
        group[:] = [{**unit, "lora_B": pad(unit["lora_B"], (0, widest - unit["lora_B"].size(1)))} for unit in group]
    return {
        f"{module}.{parameter}": torch.cat([unit[parameter] for unit in group])
        for module, group in groups.items()
        for parameter in group[0]
    }


def to_peft(config: LoRAConfig, weights: Mapping[str, Tensor], base: str, model_type: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return adapter_config.json and the tensors for the LoRA weights (not Skip2-LoRA's) of a model.

    `base` is the model's name, `model_type` its class in transformers. Raises UserError that lists the weights without a place there.
    """
    plan = layout(config, model_type)
    units = {name: unit for name, unit in split(as_lora(weights), config).items() if any(bool(unit[factor].any()) for factor in FACTORS)}
    if unknown := [name for name in units if name not in plan.sizes]:
        raise UserError(
            f"PEFT's format has no place for LoRA on {names.summary(unknown)}: transformers has no linear layers there. "
            "Leave lora_mlp off for a model with experts, or merge the adapter"
        )
    stacked = {name: _stack(name, units, plan, config) for name, layer in plan.layers.items() if any(unit in units for unit in layer.units)}
    if not stacked:
        raise UserError("the adapter has no LoRA weights, or only zeros: there is nothing to write")
    targets, blocks = _targets(list(stacked), plan, config.n_layer)
    alpha = config.lora_alpha * config.lora_r**0.5 if config.lora_rslora else config.lora_alpha  # the same scale without use_rslora
    ranks = {name: len(layer["lora_A"]) for name, layer in stacked.items()}
    alphas = {name: _alpha(name, rank, units, plan, config) for name, rank in ranks.items()}

    def kind_of(name: str) -> str:
        kind = within_block(name)
        return short(kind, plan, [kind])

    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora_r,
        "lora_alpha": alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets,
        "layers_to_transform": blocks,
        "rank_pattern": compact(ranks, config.lora_r, str, kind_of) or {},
        "alpha_pattern": compact(alphas, alpha, str, kind_of) or {},
        "bias": "none",
        "fan_in_fan_out": plan.transposed,
        "use_rslora": False,
        "use_dora": config.lora_variant == "dora",
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if config.alora_enabled:
        settings["alora_invocation_tokens"] = config.alora_invocation_tokens
    tensors = {f"{PREFIX}{name}.{PARAMETERS[key]}": value.contiguous() for name, layer in stacked.items() for key, value in layer.items()}
    places = saved_places(config, model_type)
    for name, key in places.items():
        if key in weights:
            tensors[f"{PREFIX}{name}"] = weights[key].clone()  # a head that is tied is a tensor of its own in the file
    if config.modules_to_save:
        saved = {name.rpartition(".")[0].rpartition(".")[2] for name, key in places.items() if key in weights}
        settings["modules_to_save"] = sorted(saved)
    return settings, tensors


def is_saved(key: str, settings: Mapping[str, Any]) -> bool:
    """Return True for the key of a tensor whose module PEFT's modules_to_save names, or that is tied to one."""
    module, named = key.rpartition(".")[0], settings.get("modules_to_save") or ()
    return any(f".{module}".endswith(f".{name}") for name in (MODULES if named and settings.get("ensure_weight_tying") else named))


def saved_places(config: Config, model_type: str) -> dict[str, str]:
    """Return the parameters of the embedding and the output layer by their names in transformers: model.embed_tokens.weight."""
    table = names.hf_table(model_type, config)
    modules = {in_memory(name, module): module for name, (module, _) in table.items() if module in ("transformer.wte", "lm_head")}
    modules.setdefault("lm_head", "lm_head")  # a tied one may be stored once
    return {f"{name}.{part}": f"{module}.{part}" for name, module in modules.items() for part in ("weight", "bias")}


def _alpha(name: str, rank: int, units: Mapping[str, Unit], plan: Layout, config: LoRAConfig) -> float:
    """Return PEFT's alpha of a layer: that of the first of its units that has one, times its rank divided by the unit's."""
    sizes = [config.size_of(unit) for unit in plan.layers[name].units if unit in units]
    r, alpha = next((size for size in sizes if size[1]), sizes[0])
    return whole(alpha * (r**0.5 if config.lora_rslora else 1) * (rank / r))


def _stack(name: str, units: Mapping[str, Unit], plan: Layout, config: LoRAConfig) -> Unit:
    """Return the parameters of a layer: A (R, in), B (out, R) and for DoRA m (out,), of which PEFT needs every row."""
    layer = plan.layers[name]
    scales = {unit: config.scale_of(unit) for unit in layer.units if unit in units}
    first = next(filter(None, scales.values()), 0.0)
    units = {
        unit: units[unit] if s == first else {**units[unit], "lora_B": units[unit]["lora_B"] * (s / first)} for unit, s in scales.items()
    }
    present = list(units.values())
    a, shared = present[0]["lora_A"], len(present) > 1 and all(torch.equal(present[0]["lora_A"], unit["lora_A"]) for unit in present)
    blocks = [units.get(unit, {"lora_B": a.new_zeros(plan.sizes[unit][0], len(a) if shared else 0)})["lora_B"] for unit in layer.units]
    rows = {"lora_B": torch.cat(blocks) if shared else torch.block_diag(*blocks)}
    if "lora_magnitude" in present[0]:
        if missing := [unit for unit in layer.units if unit not in units]:
            raise UserError(
                f"PEFT's DoRA needs all rows of {name}, and the adapter has none for {names.summary(missing)}: merge it instead"
            )
        rows["lora_magnitude"] = torch.cat([unit["lora_magnitude"] for unit in present])
    if layer.order is not None:
        rows = {key: value[layer.order] for key, value in rows.items()}
    return {"lora_A": a if shared else torch.cat([unit["lora_A"] for unit in present]), **rows}


def short(kind: str, plan: Layout, chosen: Collection[str]) -> str:
    """Return the last part of a layer's name, q_proj, if only layers of the chosen kinds have it; else the name within the block."""
    leaf = kind.rpartition(".")[2]
    return leaf if {within_block(name) for name in plan.layers if f".{name}".endswith(f".{leaf}")} <= set(chosen) else kind


def block_of(name: str) -> int:
    """Return the index of the block that a layer belongs to; -1 if it is in none."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _targets(layers: list[str], plan: Layout, n_layer: int) -> tuple[list[str], list[int] | None]:
    """Return target_modules and layers_to_transform that name exactly these layers, by short names if possible."""
    kinds = {within_block(name) for name in layers}
    blocks = sorted({block_of(name) for name in layers} - {-1})
    everywhere = blocks == list(range(n_layer))
    matched = {name for name in plan.layers if within_block(name) in kinds and block_of(name) in (*blocks, -1)}
    if matched != set(layers) or (blocks and not everywhere and any(block_of(name) == -1 for name in layers)):
        return layers, None
    return sorted({short(kind, plan, kinds) for kind in kinds}), None if everywhere or not blocks else blocks


def from_peft(
    settings: Mapping[str, Any], tensors: Mapping[str, Tensor], config: Config, source: Path, model_type: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return adapter settings and weights for an adapter of PEFT. Raises UserError that lists everything that has no equivalent here."""
    plan = layout(config, model_type)
    problems = unsupported(settings)
    places = saved_places(config, model_type)
    saved = {
        places[name]: value for key, value in tensors.items() if (name := key.removeprefix(PREFIX)) in places and is_saved(key, settings)
    }
    others = {key: value for key, value in tensors.items() if places.get(key.removeprefix(PREFIX)) not in saved}
    layers = _layers(others, plan, bool(settings.get("use_dora")), problems)
    by_layer = _alphas(settings, layers, problems)
    if problems:
        raise UserError(f"{source} cannot become a litgpt adapter of the model {config.name!r}:\n  " + "\n  ".join(problems))
    units: dict[str, Unit] = {}
    alphas: dict[str, float] = {}
    for name, layer in layers.items():
        parts = _unstack(plan.layers[name], layer, settings["r"], plan)
        units |= parts
        alphas |= {unit: whole(by_layer[name] * len(part["lora_A"]) / len(layer["lora_A"])) for unit, part in parts.items()}
    flags = {flag: any(_flag(unit) == flag for unit in units) for flag in FLAGS.values()}
    blocks = sorted({block_of(unit) for unit in units} - {-1})
    ranks = {name: len(unit["lora_A"]) for name, unit in units.items()}
    (r, _), (alpha, _) = Counter(ranks.values()).most_common(1)[0], Counter(alphas.values()).most_common(1)[0]
    a = next(iter(units.values()))["lora_A"]
    for unit, (out, size) in plan.sizes.items():
        if unit not in units and flags[_flag(unit)] and block_of(unit) in (-1, *blocks):
            if settings.get("use_dora"):
                raise UserError(f"{source}: DoRA here is on all layers of a kind, and the adapter has none on {unit}: merge it with PEFT")
            units[unit] = {"lora_A": a.new_zeros(r, size), "lora_B": a.new_zeros(out, r)}
            ranks[unit], alphas[unit] = r, alpha
    own = {
        "lora_r": r,
        "lora_alpha": alpha,
        "lora_dropout": settings.get("lora_dropout") or 0.0,
        **flags,
        "lora_block_indices": None if not blocks or blocks == list(range(config.n_layer)) else blocks,
        "lora_rank_pattern": compact(ranks, r),
        "lora_alpha_pattern": compact(alphas, alpha),
        "modules_to_save": sorted({MODULES[key.split(".")[-2]] for key in saved}, reverse=True) or None,
    }
    if settings.get("use_dora"):
        own["lora_variant"] = "dora"
    if invocation := settings.get("alora_invocation_tokens"):
        own |= {"alora_enabled": True, "alora_invocation_tokens": invocation}
    return own, join(units) | saved


def _flag(unit: str) -> str:
    """Return the setting that switches a unit on."""
    kind = unit.rpartition(":")[2] if ":" in unit else within_block(unit)
    return FLAGS["mlp" if kind.startswith("mlp.") else kind]


def unsupported(settings: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting of PEFT that has no equivalent here."""
    problems = []
    if settings.get("peft_type") != "LORA":
        problems.append(f"peft_type is {settings.get('peft_type')!r}: only LORA can be converted")
    if settings.get("task_type") not in ("CAUSAL_LM", None):
        problems.append(f"task_type is {settings['task_type']!r}: only CAUSAL_LM can be converted")
    if settings.get("bias", "none") != "none":
        problems.append(f"bias is {settings['bias']!r}: trained biases cannot be converted, only none")
    if settings.get("init_lora_weights") not in KEEPS_BASE:
        problems.append(f"init_lora_weights is {settings['init_lora_weights']!r}: it changes the base's weights, which ours do not")
    problems += [f"{key} is {str(value)[:100]}: it has no equivalent" for key, value in settings.items() if value and key not in HARMLESS]
    saved = settings.get("modules_to_save") or []
    if not isinstance(saved, list) or any(str(name).rpartition(".")[2] not in MODULES for name in saved):
        problems.append(f"modules_to_save is {str(saved)[:100]}: only the embedding and the output layer can be trained in full here")
    invocation = settings.get("alora_invocation_tokens") or []
    if not isinstance(invocation, list) or not all(isinstance(token, int) and token >= 0 for token in invocation):
        problems.append(f"alora_invocation_tokens is {str(invocation)[:100]}: a list of token ids is needed")
    dropout = settings.get("lora_dropout") or 0.0
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        problems.append(f"lora_dropout is {dropout!r}: a probability from 0 to below 1 is needed")
    return problems


def _layers(tensors: Mapping[str, Tensor], plan: Layout, use_dora: bool, problems: list[str]) -> dict[str, Unit]:
    """Return the parameters of each layer. Whatever does not fit is added to `problems`."""
    layers: dict[str, Unit] = {}
    unknown = []
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        parameter = next((key for key, theirs in PARAMETERS.items() if name.endswith(f".{theirs}")), "")
        module = name.removesuffix(f".{PARAMETERS.get(parameter)}")
        module = "lm_head" if module == "embed_out" else module
        if not parameter or name == key or module not in plan.layers:
            unknown.append(name)
        else:
            layers.setdefault(module, {})[parameter] = tensor
    if unknown:
        problems.append(f"it has weights that are not LoRA on a linear layer of this model: {names.summary(unknown)}")
    if alone := [name for name, layer in layers.items() if not layer.keys() >= set(FACTORS)]:
        problems.append(f"only one of lora_A and lora_B is there for {names.summary(alone)}")
    if not layers:
        problems.append("it has no LoRA weights")
    complete = {name: layer for name, layer in layers.items() if name not in alone}
    for name, layer in complete.items():
        a, b, units = layer["lora_A"], layer["lora_B"], plan.layers[name].units
        rank, size, out = len(a), plan.sizes[units[0]][1], sum(plan.sizes[unit][0] for unit in units)
        if a.shape != (rank, size) or b.shape != (out, rank) or not rank:
            problems.append(f"{name} has shapes {tuple(a.shape)} and {tuple(b.shape)}, the layer is (in, out) {(size, out)}")
        m = layer.get("lora_magnitude")
        if (m is not None) != use_dora or (m is not None and m.shape != (out,)):
            problems.append(f"{name}: with use_dora it needs a lora_magnitude_vector of {out} numbers, and without it none")
    return complete


def alpha_of(settings: Mapping[str, Any], name: str) -> Any:
    """Return alpha of a layer of transformers: that of the first of PEFT's patterns that matches, else the one for all."""
    own = settings.get("alpha_pattern") or {}
    return own.get(matching(own, name), settings.get("lora_alpha"))


def _alphas(settings: Mapping[str, Any], layers: Mapping[str, Unit], problems: list[str]) -> dict[str, float]:
    """Return alpha of each layer, with rsLoRA's times sqrt(rank). Problems with the settings are added to `problems`."""
    for key in ("rank_pattern", "alpha_pattern"):
        try:
            require_patterns(key, settings.get(key) or {}, RANK if key == "rank_pattern" else Range())
        except UserError as error:
            problems.append(str(error))
    r, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float):
        problems.append(f"r is {r!r} and lora_alpha {alpha!r}: numbers are needed")
    if problems:
        return {}
    factors = {name: len(layer["lora_A"]) ** 0.5 if settings.get("use_rslora") else 1 for name, layer in layers.items()}
    return {name: alpha_of(settings, name) * factor for name, factor in factors.items()}


def _unstack(layer: Layer, stacked: Unit, r: int, plan: Layout) -> dict[str, Unit]:
    """Return the units of a layer, the reverse of `_stack`; where their blocks cannot be told apart, each has the layer's A."""
    a, sizes = stacked["lora_A"], [plan.sizes[unit][0] for unit in layer.units]
    order = slice(None) if layer.order is None else torch.argsort(layer.order)
    rows = {key: value[order].split(sizes) for key, value in stacked.items() if key != "lora_A"}
    parts = {unit: {key: values[i] for key, values in rows.items()} for i, unit in enumerate(layer.units)}
    is_whole = "lora_magnitude" in rows  # DoRA, which has values for all units
    equal = (len(a) // e for e in range(len(parts), 1, -1) if len(a) % e == 0)
    for rank in dict.fromkeys((r, *equal)) if len(a) != r else ():
        columns = range(0, len(a), rank)
        owners = [[unit for unit, part in parts.items() if part["lora_B"][:, start : start + rank].any()] for start in columns]
        chosen = list(parts) if len(owners) == len(parts) else [unit for owner in owners for unit in owner]
        fits = len(a) % rank == 0 and len(chosen) == len(owners) == len(set(chosen)) and not (is_whole and len(chosen) < len(parts))
        if fits and all(owner in ([], [unit]) for owner, unit in zip(owners, chosen, strict=True)):
            return {
                unit: {**parts[unit], "lora_A": a[start : start + rank], "lora_B": parts[unit]["lora_B"][:, start : start + rank]}
                for unit, start in zip(chosen, columns, strict=True)
            }
    is_new = not stacked["lora_B"].any()
    return {unit: {"lora_A": a, **part} for unit, part in parts.items() if is_whole or is_new or part["lora_B"].any()}


def load(folder: Path, base: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return adapter settings and weights of a PEFT folder, for the checkpoint `base`."""
    settings = files.read_json(folder / CONFIG)
    older = folder / "adapter_model.bin"
    tensors = load_weights(older) if older.is_file() and not (folder / WEIGHTS).exists() else read_tensors(folder / WEIGHTS)
    config = Config.from_checkpoint(base)
    model_type = hf_settings(config, base)["model_type"]
    places, weights = saved_places(config, model_type), load_weights(base / BASE_WEIGHTS)

    def is_base(key: str, tensor: Tensor) -> bool:  # PEFT stores the head and the embedding too if one of them has LoRA
        weight = weights.get(places.get(key.removeprefix(PREFIX).replace(".base_layer.", "."), ""))
        return weight is not None and torch.equal(weight.to(tensor.dtype), tensor)

    tensors = {key: tensor for key, tensor in tensors.items() if is_saved(key, settings) or not is_base(key, tensor)}
    return from_peft(settings, tensors, config, folder, model_type)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the content of a safetensors file. Raises UserError if it is missing or broken."""
    files.require_file(file, "is missing: the adapter's weights")
    return {name: stored.load() for name, stored in Reader().stored(file).items()}


def write(folder: Path, settings: Mapping[str, Any], tensors: dict[str, Tensor], file_names: tuple[str, str] = (CONFIG, WEIGHTS)) -> None:
    """Write the JSON and the safetensors file of an adapter folder."""
    write_text(folder / file_names[0], json.dumps(settings, indent=2) + "\n")
    write_bytes(folder / file_names[1], save(tensors, metadata={"format": "pt"}))  # save_file's are private to their owner
