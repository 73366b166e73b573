"""`litgpt generate_sequentially` and `generate_tp`: one answer by several devices, as LitGPT has them.

sequentially    the blocks are divided among the GPUs of one process, and run one after the other
tp              each process holds a part of every block: of H query and G key and value heads, and of the MLP's m hidden features. Its
                attention and its MLP give a part of the sum that the residual stream gets (tensor parallelism, arXiv 1909.08053)
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

from litgpt.args import Quantization
from litgpt.errors import UserError
from litgpt.generate.base import answer, open_model

if TYPE_CHECKING:
    import torch

    from litgpt.api import LLM
    from litgpt.model import GPT


def _command(how: str, load: "Callable[..., tuple[LLM, bool]]") -> Callable[..., None]:
    def main(
        checkpoint_dir: Path,
        prompt: str = "What food do llamas eat?",
        *,
        sys_prompt: Optional[str] = None,
        num_samples: int = 1,
        max_new_tokens: int = 50,
        top_k: Optional[int] = 50,
        top_p: float = 1.0,
        temperature: float = 0.8,
        quantize: Optional[Quantization] = None,
        precision: Optional[str] = None,
        devices: Union[int, str] = "auto",
        seed: int = 1234,
    ) -> None:
        """Answer a prompt by HOW.

        Args:
            checkpoint_dir: Folder of a base model, a merged model or an adapter.
            prompt: The question, without the prompt style's wrapping.
            sys_prompt: System text that replaces the prompt style's own.
            num_samples: How many answers to draw.
            max_new_tokens: Longest answer in tokens.
            top_k: Draw among this many of the most probable tokens. null: among all.
            top_p: Draw among the most probable tokens that hold this much probability together.
            temperature: Below 1 sharper, above 1 flatter probabilities; 0 always takes the most probable token.
            quantize: Keep the linear layers in 4 bits (bnb.nf4 and the like, by bitsandbytes) or 8 (int8).
            precision: Number format: bf16-true, 32-true or 16-true. Default: bf16-true where the processor has it, else 32-true.
            devices: Number of devices. auto: all GPUs, or the CPU.
            seed: Random seed. The same seed gives the same answers.
        """
        if num_samples < 1:
            raise UserError(f"num_samples is {num_samples}: at least 1 is needed")
        llm, speaks = load(checkpoint_dir, precision, quantize, devices)
        with contextlib.nullcontext() if speaks else _silence():
            answer(llm, prompt, sys_prompt, num_samples, max_new_tokens, seed, temperature=temperature, top_k=top_k, top_p=top_p)

    main.__doc__ = str(main.__doc__).replace("HOW", how)
    return main


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _load_sequentially(
    folder: Path, precision: Optional[str], quantize: Optional[Quantization], devices: Union[int, str]
) -> "tuple[LLM, bool]":
    import torch

    there = torch.cuda.device_count() or 1
    count = there if devices == "auto" else int(devices) if str(devices).isdecimal() else 0
    if not 1 <= count <= there:
        raise UserError(f"devices is {devices!r}: this machine has {there} for generate_sequentially")
    llm = open_model(folder, precision, quantize, device="cpu")
    spread(llm.model, [torch.device("cuda", i) for i in range(count)] if torch.cuda.is_available() else [torch.device("cpu")])
    return llm, True


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


def _load_tp(folder: Path, precision: Optional[str], quantize: Optional[Quantization], devices: Union[int, str]) -> "tuple[LLM, bool]":
    if quantize is not None:
        raise UserError("quantize: the parts of a quantised model are not divided: leave it out, or use generate_sequentially")
    from litgpt.device import default_device, default_precision
    from litgpt.train.parallel import Rank

    precision = precision or default_precision(default_device())
    rank = Rank.start(precision, devices, 1, TIMEOUT)
    with contextlib.nullcontext() if rank.is_first else _silence():
        llm = open_model(folder, precision, device="cpu")
    shard(llm.model, rank.index, rank.size, rank.sum)
    llm.model.to(rank.device)
    return llm, rank.is_first


def shard(model: "GPT", index: int, size: int, add: "Callable[[torch.Tensor], torch.Tensor]") -> None:
    """Keep the part `index` of `size` of each block, in place; `add` returns the sum of all parts' tensors.

    LoRA is merged first. Raises UserError for sizes that cannot be divided, and for answer-only LoRA.
    """
    import torch
    from torch import nn

    from litgpt.lora import LoRALinear

    config = model.config
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


TIMEOUT = 600.0  # seconds that the processes wait for each other
main_sequentially = _command("a model whose blocks are divided among GPUs", _load_sequentially)
main_tp = _command("a model each of whose blocks is divided among processes, started by --devices or torchrun", _load_tp)
