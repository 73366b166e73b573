"""LoRA and answer-only LoRA as a GGUF file, which llama.cpp applies to the GGUF file of the base: `llama-cli -m base.gguf --lora FILE`.

A tensor of the base, `blk.3.attn_q.weight`, is changed by `.lora_a` (R, in) and `.lora_b` (rows, R): W + (alpha / R) b a. R is the rank, or
that of all units that the tensor joins; b then contains the factor, and the ranks and alphas of single layers. Rows are in the base
file's order. llama.cpp's server switches answer-only LoRA on one token before its invocation.
"""

from collections.abc import Mapping
from contextlib import closing
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from litgpt.adapters.patterns import PARTS
from litgpt.atomic import new_file
from litgpt.convert.gguf.writer import Group, describe, stored
from litgpt.convert.names import Slot, shapes, summary
from litgpt.convert.peft import split
from litgpt.errors import UserError
from litgpt.lora import Config


def write_gguf_adapter(target: Path, config: Config, weights: Mapping[str, Tensor], base: Path) -> None:
    """Write the LoRA of a model whose base is the checkpoint folder `base`. Raises UserError for what llama.cpp cannot apply."""
    if config.skip2lora_enabled:
        raise UserError(
            f"{target}: llama.cpp adds adapters to single layers, but Skip2-LoRA reads several blocks and adds to the output layer. "
            "Use `litgpt serve`, or transformers (`litgpt convert_adapter` without --to gguf)"
        )
    if config.lora_variant != "lora" or config.modules_to_save:
        kind = "modules_to_save" if config.modules_to_save else config.lora_variant
        raise UserError(f"{target}: llama.cpp has no {kind}: run `litgpt merge_lora`, then `litgpt convert_to_gguf`")
    described, groups = describe(base, target)
    sizes, units = shapes(config, str(base)), split(weights, config)
    if missing := units.keys() - {unit for group in groups.values() for slot in group.slots for unit in places_of(slot, config)}:
        tied = " The base's head is its embedding, which llama.cpp keeps once." if "lm_head" in missing else ""
        raise UserError(
            f"{target}: llama.cpp's file of this model has no place for LoRA on {summary(sorted(missing))}.{tied} "
            "Run `litgpt merge_lora`, then `litgpt convert_to_gguf`"
        )

    def factors(name: str, slot: Slot) -> tuple[Tensor, Tensor] | None:
        """Return a and b of a tensor of the file; None if no unit of it has LoRA."""
        places = {unit: place for unit, place in places_of(slot, config).items() if unit in units}
        if not places:
            return None
        a = torch.cat([units[unit]["lora_A"] for unit in places])
        ours = {key: torch.zeros(sizes[key][0], len(a)) for key in slot.keys}
        column = 0
        for unit, (key, start) in places.items():
            b = units[unit]["lora_B"] * (config.scale_of(unit) * len(a) / _alpha(config))
            ours[key][start : start + len(b), column : column + b.size(1)] = b
            column += b.size(1)
        loads = {key: lambda tensor=tensor: tensor for key, tensor in ours.items()}
        return a, stored(name, Group([slot], (-1, len(a))), described.architecture, config, loads)

    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, group in groups.items():
        if pairs := [pair for slot in group.slots if (pair := factors(name, slot))]:
            widest = max(len(a) for a, _ in pairs)  # of experts with ranks of their own; the file's factor is alpha / widest
            padded = [(pad(a, (0, 0, 0, widest - len(a))), pad(b * (widest / len(a)), (0, widest - len(a)))) for a, b in pairs]
            a, b = map(torch.stack, zip(*padded, strict=True))
            tensors[name] = (a, b) if "_exps." in name else (a[0], b[0])
    _write(target, described.architecture, config, tensors)


def places_of(slot: Slot, config: Config) -> dict[str, tuple[str, int]]:
    """Return the units that a tensor of the file joins, each with the tensor of ours that has it and its first row there."""
    places: dict[str, tuple[str, int]] = {}
    for key in slot.keys:
        module = key.removesuffix(".weight")
        if module.endswith(".attn.qkv"):
            starts = zip(PARTS, accumulate(config.qkv_sizes, initial=0), strict=False)
            places |= {f"{module}:{part}": (key, start) for part, start in starts if slot.part not in PARTS or slot.part == part}
        else:
            places[module] = (key, 0)
    return places


def _alpha(config: Config) -> float:
    """Return the file's alpha: LoRA's, with rsLoRA times sqrt(r)."""
    return (config.lora_alpha or 1) * (config.lora_r**0.5 if config.lora_rslora else 1)


def _write(target: Path, architecture: str, config: Config, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    from gguf import GGUFType, GGUFValueType, GGUFWriter, Keys

    with new_file(target, replace=False) as file, closing(GGUFWriter(file.name, architecture)) as writer:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, float(_alpha(config)))
        if config.alora_enabled:
            key, tokens = Keys.Adapter.ALORA_INVOCATION_TOKENS, config.alora_invocation_tokens
            writer.add_key_value(key, tokens, GGUFValueType.ARRAY, GGUFValueType.UINT32)
        for name, (a, b) in tensors.items():
            writer.add_tensor(f"{name}.lora_a", a.float().contiguous().numpy())
            writer.add_tensor(f"{name}.lora_b", b.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
