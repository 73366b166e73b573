"""All experts of a block in one tensor, as some files have them: E experts, d in and m features, `gate_up_proj` and `down_proj`.

joined        (E, 2 m, d), the rows of the gate first; (E, d, m): what transformers 5 has in memory
interleaved   (E, d, 2 m), columns gate, up, gate, up ...; (E, m, d); biases (E, 2 m) and (E, d): gpt-oss
MXFP4         the same as *_blocks (E, out, in / 32, 16), bytes of two numbers of 4 bits, and *_scales (E, out, in / 32), exponents of 2
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch

from litgpt.errors import UserError

ALL = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)(_bias|_blocks|)")
ONE = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight|bias)")
DIMENSIONS = {"": 3, "_bias": 2, "_blocks": 4}
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and, with the fourth bit, their negatives


class Stored(NamedTuple):
    """A tensor in a file, not yet read."""

    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]


def separated(tensors: Mapping[str, Stored], interleaved: bool = False) -> dict[str, Stored]:
    """Return the tensors; one that holds all experts of a block is split into one per expert.

    Raise UserError for MXFP4 without its scales.
    """
    separate: dict[str, Stored] = {}
    for name, stored in tensors.items():
        if name.endswith("_scales") and f"{name.removesuffix('_scales')}_blocks" in tensors:
            continue
        match = ALL.fullmatch(name)
        if match is None or len(stored.shape) != DIMENSIONS[match[3]]:
            separate[name] = stored
            continue
        (base, layer, kind), (experts, *shape), scales = match.groups(), stored.shape, None
        if kind == "_blocks":
            shape, scales = [shape[0], 2 * shape[1] * shape[2]], tensors.get(f"{base}.{layer}_scales")
            if scales is None or scales.shape != stored.shape[:-1] or stored.shape[-1] != 16:
                raise UserError(f"{name} {stored.shape} is not MXFP4 with its {layer}_scales: download the model again")
        elif interleaved:
            shape = shape[::-1]
        parts = ("gate_proj", "up_proj") if layer == "gate_up_proj" else ("down_proj",)
        for expert, (number, part) in product(range(experts), enumerate(parts)):
            load = partial(_part, stored, scales, expert, number, len(parts), interleaved)
            parameter = "bias" if kind == "_bias" else "weight"
            separate[f"{base}.{expert}.{part}.{parameter}"] = stored._replace(shape=(shape[0] // len(parts), *shape[1:]), load=load)
    return separate


def _part(stored: Stored, scales: Stored | None, expert: int, number: int, count: int, interleaved: bool) -> torch.Tensor:
    """Return part `number` of `count` of an expert's layer, (out, in) or (out,)."""
    tensor = stored.load()[expert]
    if scales is not None:
        tensor = from_mxfp4(tensor, scales.load()[expert])
    elif interleaved:
        tensor = tensor.t()
    return tensor[number::count] if interleaved else tensor.chunk(count)[number]


def from_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Decode bytes (out, n, 16), the low half of each first, times 2^(scale - 127) for scales (out, n), to numbers (out, 32 n), bf16.

    MXFP4 of the OCP's microscaling formats: bf16 holds every product exactly, as its exponents are fp32's.
    """
    values = torch.tensor((*FP4, *(-value for value in FP4)))
    pairs = torch.stack((blocks & 15, blocks >> 4), dim=-1).long()
    return torch.ldexp(values[pairs].flatten(-2), scales.int()[..., None] - 127).flatten(1).bfloat16()


def interleaved(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors, of `litgpt.convert.write.Pending`, with all experts of a block in one, as gpt-oss has them."""
    together: dict[str, Any] = {}
    groups: dict[str, dict[tuple[int, bool], Any]] = {}
    for name, pending in tensors.items():
        if match := ONE.fullmatch(name):
            layer, suffix = "down_proj" if match[3] == "down" else "gate_up_proj", "_bias" if match[4] == "bias" else ""
            groups.setdefault(f"{match[1]}.{layer}{suffix}", {})[int(match[2]), match[3] == "up"] = pending
        else:
            together[name] = pending
    for name, group in groups.items():
        parts = [group[key] for key in sorted(group)]  # by expert, up after gate
        count, (out, *others) = 2 if "gate_up_proj" in name else 1, parts[0].shape
        shape = (len(parts) // count, *others, count * out)
        together[name] = parts[0]._replace(shape=shape, load=partial(_interleave, parts, count))
    return together


def _interleave(parts: list[Any], count: int) -> torch.Tensor:
    """Return the layers (out, in) or (out,) of experts, `count` each: (E, in, count out) or (E, count out)."""
    stacked = torch.stack([part.load() for part in parts]).unflatten(0, (-1, count))  # (E, count, out, in)
    return stacked.movedim(1, -1).flatten(-2) if stacked.dim() == 3 else stacked.permute(0, 3, 2, 1).flatten(-2).contiguous()
