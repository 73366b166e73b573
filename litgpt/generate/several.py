"""`litgpt generate_sequentially` and `generate_tp`: one answer by several devices, as LitGPT has them.

sequentially    the blocks are divided among the GPUs of one process, and run one after the other
tp              each process holds a part of every block: of H query and G key and value heads, and of the MLP's m hidden features. Its
                attention and its MLP give a part of the sum that the residual stream gets (tensor parallelism, arXiv 1909.08053)
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

from litgpt.errors import UserError
from litgpt.generate.base import Answers, Checkpoint, open_model

if TYPE_CHECKING:
    import torch

    from litgpt.model import GPT

TIMEOUT = 600.0  # seconds that the processes wait for each other


@dataclass
class Several(Answers, Checkpoint):
    """Answers by several devices."""

    devices: Union[int, str] = "auto"
    """Number of devices. auto: all GPUs, or the CPU."""


@dataclass
class Sequentially(Several):
    """Answer a prompt by a model whose blocks are divided among GPUs."""

    def main(self) -> None:
        import torch

        there = torch.cuda.device_count() or 1
        count = there if self.devices == "auto" else int(self.devices) if str(self.devices).isdecimal() else 0
        if not 1 <= count <= there:
            raise UserError(f"devices is {self.devices!r}: this machine has {there} for generate_sequentially")
        llm = self.opened(self.checkpoint_dir, device="cpu")
        spread(llm.model, [torch.device("cuda", i) for i in range(count)] if torch.cuda.is_available() else [torch.device("cpu")])
        self.show(llm)


@dataclass
class TensorParallel(Several):
    """Answer a prompt by a model each of whose blocks is divided among processes, started by --devices or torchrun."""

    def main(self) -> None:
        if self.quantize is not None:
            raise UserError("quantize: the parts of a quantised model are not divided: leave it out, or use generate_sequentially")
        from litgpt.device import default_device, default_precision
        from litgpt.train.parallel import Rank, ends_together

        precision = self.precision or default_precision(default_device())
        rank = Rank.start(precision, self.devices, 1, TIMEOUT)
        with ends_together(rank), contextlib.nullcontext() if rank.is_first else _silence():
            llm = open_model(self.checkpoint_dir, precision, device="cpu")
            shard(llm.model, rank.index, rank.size, rank.sum)
            llm.model.to(rank.device)
            self.show(llm)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def spread(model: "GPT", devices: "Sequence[torch.device]") -> None:
    """Divide the blocks of a model among devices, in place. Everything else is on the first one."""
    import torch

    home, n_layer = devices[0], len(model.blocks)

    def moved(value: Any, device: torch.device) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, (tuple, list)):
            return tuple(moved(part, device) for part in value)
        if hasattr(value, "rotary"):
            value = copy(value)
            value.__dict__.update({name: moved(part, device) for name, part in vars(value).items()})
        return value

    model.to(home)
    for i, block in enumerate(model.blocks):
        device = devices[i * len(devices) // n_layer]
        block.to(device)
        block.register_forward_pre_hook(lambda _, inputs, device=device: moved(inputs, device))
        block.register_forward_hook(lambda _, inputs, output: output.to(home))


def shard(model: "GPT", index: int, size: int, add: "Callable[[torch.Tensor], torch.Tensor]") -> None:
    """Keep the part `index` of `size` of each block, in place; `add` returns the sum of all parts' tensors.

    LoRA is merged first. Raises UserError for sizes that cannot be divided, and for answer-only LoRA.
    """
    import torch
    from torch import nn

    from litgpt.lora import LoRALinear

    config = model.config
    undivided = {"latent attention": config.latent_attention, "ALiBi": config.alibi, "attention with sinks": config.attention_sinks}
    for kind in (kind for kind, found in undivided.items() if found):
        raise UserError(f"generate_tp: the {kind} of {config.name} cannot be divided: use generate_sequentially")
    if model.switch is not None:
        raise UserError("generate_tp: answer-only LoRA cannot be merged into the parts of a model: use generate")
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.fuse())
    mlps: list[Any] = [module for block in model.blocks for module in block.mlp.modules() if hasattr(module, "proj")]
    widths = {mlp.proj.in_features for mlp in mlps}
    numbers = {"n_head": config.n_head, "n_query_groups": config.n_query_groups, **{f"an MLP of {width}": width for width in widths}}
    if odd := [f"{name} ({number})" for name, number in numbers.items() if not number or number % size]:
        raise UserError(f"generate_tp: {size} devices cannot divide {', '.join(odd)} of {config.name}")
    if config.norm_qk and config.norm_qk_type != "default":
        raise UserError(f"generate_tp: {config.name} normalises all heads together, which cannot be divided: use generate_sequentially")

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
