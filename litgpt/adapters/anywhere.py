"""LoRA on any torch model: which of its layers get it, and the file that holds it."""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from litgpt.adapters.base import Adapter, is_transposed
from litgpt.atomic import write_bytes
from litgpt.errors import UserError
from litgpt.files import expand_path, require_file

ALL, SQUARE = "all-linear", "square"
VERSION = 1  # of the file format


class Entry(NamedTuple):
    """The entries of a file that describe one layer."""

    r: int
    alpha: float
    dropout: float


def sizes(linear: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer, quantised or not."""
    layer: Any = linear
    return (layer.nx, layer.nf) if is_transposed(linear) else (layer.in_features, layer.out_features)


def target_layers(model: nn.Module, targets: str | Collection[str]) -> dict[str, nn.Module]:
    """Return the linear layers that `targets` names (`litgpt.lora.apply_lora`) by their names. Raises UserError for one without a layer."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, (Adapter, nn.MultiheadAttention)))
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name
        and not isinstance(module, Adapter)
        and not name.startswith(inside)
        and (is_transposed(module) or hasattr(module, "in_features"))
    }
    if targets == SQUARE:
        chosen = {name for name, linear in linears.items() if len({*sizes(linear)}) == 1}
        missing = [] if chosen else [SQUARE]
    elif targets == ALL:
        vocabularies = {module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)}
        places = {name: re.sub(r"\d+", "#", name) for name, linear in linears.items() if sizes(linear)[1] in vocabularies}
        repeated = Counter(places.values())  # layers of several blocks are not output layers, even if as wide as the number of positions
        chosen = {name for name in linears if name not in places or repeated[places[name]] > 1}
        missing = [] if chosen else [ALL]
    else:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        fits = {target: {name for name in linears if f".{name}".endswith(f".{target}")} for target in wanted}
        chosen, missing = set[str]().union(*fits.values()), [target for target in wanted if not fits[target]]
        if not wanted:
            raise UserError("targets names no layer: give names of linear layers, or leave it out for all of them")
    if missing:
        kinds = sorted({name.rpartition(".")[2] for name in linears})
        rest = f"its linear layers are called {', '.join(kinds[:20])}" if kinds else "it has no linear layers without an adapter"
        raise UserError(f"targets names {', '.join(map(repr, missing))}, which fits no linear layer of the model: {rest}")
    return {name: linear for name, linear in linears.items() if name in chosen}


def write_lora(file: Path | str, entries: Mapping[str, Entry], weights: dict[str, torch.Tensor]) -> None:
    """Write the layers' entries and tensors."""
    layers = {name: entry._asdict() for name, entry in entries.items()}
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    write_bytes(expand_path(file), save(tensors, metadata={"format": "pt", "lora": json.dumps({"version": VERSION, "layers": layers})}))


def read_lora(file: Path | str) -> tuple[dict[str, Entry], dict[str, torch.Tensor]]:
    """Return the layers' entries and tensors. Raises UserError for a file that is not ours, or of another version."""
    path = expand_path(file)
    require_file(path, "does not exist: name a file that save_lora wrote")
    try:
        with safe_open(path, "pt") as content:
            header = json.loads((content.metadata() or {}).get("lora", "{}"))
            weights = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        if header.get("version") == VERSION:
            return {name: Entry(int(e["r"]), float(e["alpha"]), float(e["dropout"])) for name, e in header["layers"].items()}, weights
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a readable file of save_lora (truncated?): {error}") from None
    form = f"has the form {header['version']!r}: this version reads {VERSION}" if "version" in header else "is not a file of save_lora"
    raise UserError(f"{path} {form}")


def require_fit(
    file: Path | str, model: nn.Module, entries: Mapping[str, Entry], weights: Mapping[str, torch.Tensor], present: Mapping[str, Entry]
) -> None:
    """Raise UserError that lists what of a file does not fit the model, whose layers with LoRA are `present`."""
    linears = {name: getattr(module, "linear", module) for name, module in model.named_modules(remove_duplicate=False)}
    problems = [f"the file lacks {name}, which has LoRA" for name in present if name not in entries]
    expected: dict[str, tuple[int, int]] = {}
    for name, entry in entries.items():
        if name not in linears or not (is_transposed(linears[name]) or hasattr(linears[name], "in_features")):
            problems.append(f"the model has no linear layer {name}")
            continue
        size, out = sizes(linears[name])
        expected |= {f"{name}.lora_A": (entry.r, size), f"{name}.lora_B": (out, entry.r)}
        if (other := present.get(name, entry))[:2] != entry[:2]:
            problems.append(f"{name} has r {other.r} and alpha {other.alpha:g}, in the file {entry.r} and {entry.alpha:g}")
    for name, shape in expected.items():
        if name not in weights:
            problems.append(f"the file lacks {name}")
        elif tuple(weights[name].shape) != shape:
            problems.append(f"{name} is {tuple(weights[name].shape)}, the model needs {shape}")
    if problems:
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise UserError(f"{file} does not fit the model:\n  " + "\n  ".join(problems[:12]) + more)
