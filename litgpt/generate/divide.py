"""One model divided among several devices.

sequential         the blocks are divided among the GPUs of one process, and run one after the other
tensor parallel    each process holds a part of every block: of H query and G key and value heads, and of the MLP's m hidden features. Its
                   attention and its MLP compute a part of the sum that the residual stream gets (arXiv 1909.08053)
"""

import sys
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from litgpt.device import use
from litgpt.errors import UserError
from litgpt.lora import LoRALinear
from litgpt.model import GPT, Positions
from litgpt.train.parallel import Rank

TIMEOUT = 600.0  # seconds that the processes wait for each other


def places(device: torch.device, devices: int | str) -> list[torch.device]:
    """Return `devices` devices of a kind, all for "auto". Raises UserError if this machine does not have them."""
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    count = there if devices == "auto" else int(devices) if str(devices).isdecimal() else 0
    if not 1 <= count <= there:
        raise UserError(f"devices is {devices!r}: this machine has {there} of type {device.type} to divide the blocks among")
    return [torch.device("cuda", i) for i in range(count)] if device.type == "cuda" else [device]


def processes(device: torch.device, devices: int | str, precision: str, quantize: str | None) -> Rank:
    """Return the rank of this process among `devices` processes, one per device, after starting the others by the same command.

    All of them draw the same random numbers from then on. Raises UserError for a quantised model, which is not divided.
    """
    if quantize is not None:
        raise UserError("quantize: the parts of a quantised model are not divided: leave it out, or divide the blocks (sequential)")
    if not hasattr(sys.modules["__main__"], "__file__") and devices not in ("auto", 1):
        raise UserError("tensor parallelism starts this script again, but there is no script: write one, or use `litgpt generate_tp`")
    use(device.type)
    rank = Rank.start(precision, devices, 1, TIMEOUT)
    torch.manual_seed(rank.broadcast(torch.initial_seed()))
    return rank


def spread(model: GPT, devices: Sequence[torch.device]) -> None:
    """Divide the blocks of a model among devices, in place. Everything else is on the first one."""
    home, n_layer = devices[0], len(model.blocks)

    def moved(value: Any, device: torch.device) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, (tuple, list)):
            return tuple(moved(part, device) for part in value)
        if isinstance(value, Positions):
            return replace(value, **{name: moved(part, device) for name, part in vars(value).items()})
        return value

    model.to(home)
    for i, block in enumerate(model.blocks):
        device = devices[i * len(devices) // n_layer]
        block.to(device)
        block.register_forward_pre_hook(lambda _, inputs, device=device: moved(inputs, device))
        block.register_forward_hook(lambda _, inputs, output: output.to(home))


def shard(model: GPT, index: int, size: int, add: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Keep the part `index` of `size` of each block, in place; `add` returns the sum of all parts' tensors.

    LoRA is merged first. Raises UserError for sizes that cannot be divided, and for answer-only LoRA.
    """
    config = model.config
    undivided = {"latent attention": config.latent_attention, "ALiBi": config.alibi, "attention with sinks": config.attention_sinks}
    for kind in (kind for kind, found in undivided.items() if found):
        raise UserError(f"tensor parallelism: the {kind} of {config.name} cannot be divided: divide the blocks (sequential)")
    if model.switch is not None:
        raise UserError("tensor parallelism: answer-only LoRA cannot be merged into the parts of a model")
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.fuse())
    mlps: list[Any] = [module for block in model.blocks for module in block.mlp.modules() if hasattr(module, "proj")]
    widths = {mlp.proj.in_features for mlp in mlps}
    numbers = {"n_head": config.n_head, "n_query_groups": config.n_query_groups, **{f"an MLP of {width}": width for width in widths}}
    if odd := [f"{name} ({number})" for name, number in numbers.items() if not number or number % size]:
        raise UserError(f"tensor parallelism: {size} devices cannot divide {', '.join(odd)} of {config.name}")
    if config.norm_qk and config.norm_qk_type != "default":
        raise UserError(
            f"tensor parallelism: {config.name} normalises all heads together, which cannot be divided: divide the blocks (sequential)"
        )

    class Summed(nn.Module):
        """The product with some columns of a weight; the sum over all parts, and the bias."""

        def __init__(self, linear: Any) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(linear.weight.chunk(size, 1)[index].clone(), False), linear.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = add(nn.functional.linear(x, self.weight).float()).to(x.dtype)
            return y if self.bias is None else y + self.bias

    def keep(linear: Any, sizes: Sequence[int]) -> None:
        for name in ("weight", "bias"):
            if (value := getattr(linear, name)) is not None:
                rows = torch.cat([part.chunk(size)[index] for part in value.split(list(sizes))])
                setattr(linear, name, nn.Parameter(rows, False))

    local: Any = copy(config)
    local.n_head, local.n_query_groups = config.n_head // size, (config.n_query_groups or config.n_head) // size
    model.requires_grad_(False)
    for block in model.blocks:
        attention: Any = block.attn
        keep(attention.qkv, config.qkv_sizes)
        attention.config, attention.proj = local, Summed(attention.proj)
    for mlp in mlps:
        for linear in (part for name, part in mlp.named_children() if name.startswith("fc")):
            keep(linear, [linear.out_features])
        mlp.proj = Summed(mlp.proj)
    model.config = local
