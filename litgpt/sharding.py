"""Sharded models: each rank holds a part of every parameter, and a block's parameters are gathered while it runs (FSDP2, arXiv 2304.11277).

Each block is a group, its adapters among its parameters; what is trained of embedding, final norm and head is the last one. What is frozen
of them, and Skip2-LoRA's adapters, which are read outside of their blocks, are copied to every rank. The optimizer sees the rank's rows of
a parameter as an ordinary tensor (`part_of`), so that its update must treat every number by itself.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from litgpt.model import GPT


M_MMAP_THRESHOLD = -3  # of <malloc.h>


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """Return the values of all ranks, which must all ask for them; a tensor that is not sharded as it is."""
    gather = getattr(parameter, "full_tensor", None)
    return parameter if gather is None else gather()


def part_of(parameter: nn.Parameter) -> nn.Parameter:
    """Return this rank's rows of a parameter, in its memory; all of one that is not sharded."""
    part: nn.Parameter = getattr(parameter, "part", parameter)
    return part


def rows_of(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Return the rows of a tensor that this rank holds of a parameter of its shape."""
    if not hasattr(parameter, "device_mesh"):
        return value
    mesh = parameter.device_mesh
    chunks = value.chunk(mesh.size(), dim=0)
    return chunks[mesh.get_local_rank()] if mesh.get_local_rank() < len(chunks) else value[:0]


@torch.no_grad()
def assign(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Copy a tensor, or this rank's rows, into a parameter."""
    part_of(parameter).copy_(rows_of(value, parameter))


def gathered(optimizer: dict[str, Any], parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """Return an optimizer's state dict with the tensors of all ranks, on the CPU. `parameters` are those that it updates, in its order."""
    return _of_each(optimizer, parameters, lambda value, like: whole(_sharded(value, like)).cpu())


def scattered(state: dict[int, dict[str, Any]], parameters: Sequence[nn.Parameter]) -> dict[int, dict[str, Any]]:
    """Return the state of each parameter with this rank's rows."""
    return _of_each({"state": state}, parameters, rows_of)["state"]


def _of_each(optimizer: dict[str, Any], parameters: Sequence[nn.Parameter], change: Callable[[torch.Tensor, Any], torch.Tensor]) -> Any:
    """Return an optimizer's state dict with the tensors of sharded parameters changed."""
    state = dict(optimizer["state"])
    for i, parameter in enumerate(parameters):
        if i in state and part_of(parameter) is not parameter:
            values = state[i].items()
            state[i] = {
                name: change(value, parameter) if isinstance(value, torch.Tensor) and value.dim() else value for name, value in values
            }
    return {**optimizer, "state": state}


def _sharded(value: torch.Tensor, like: Any) -> torch.Tensor:
    """Return the tensor of which this rank has the rows `value`."""
    if not hasattr(like, "device_mesh"):
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(value, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all parameters of a sharded model on the CPU, as `state_dict` would of one process. Every rank must call it."""
    known: dict[int, torch.Tensor] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in known:
            known[id(parameter)] = whole(parameter.detach()).cpu()
    return {name: known[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "reshard")


Load = Callable[[Iterable[str]], Mapping[str, torch.Tensor]]


def shard(model: GPT, device: torch.device, load: Load, dtype: torch.dtype) -> None:
    """Shard a model whose base weights are on the meta device over all ranks, and load this rank's rows of them.

    `load` returns the weights of so many names, mapped into memory. It is called for each group, so that no more of the file is held.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if device.type == "cpu":
        with suppress(AttributeError, OSError):  # glibc: gathered weights that are freed go back to the system
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**18)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    copied = {p for block in model.blocks if block.skip2lora is not None for p in block.skip2lora.parameters()}
    copied |= {p for p in _outside(model) if not p.requires_grad}  # needed in every pass
    for parameter in model.parameters():
        if not parameter.is_meta:  # an adapter's
            parameter.data = parameter.data.to(device)
    how: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32), "ignored_params": copied}
    for block in model.blocks:
        fully_shard(block, **how)
        register_fsdp_forward_method(block, "attend")
    fully_shard(model, **how)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the sum: the loss is divided by the weight of all ranks' tokens
            module.set_force_sum_reduction_for_comms(True)
    for group in _names(model):
        model.load_state_dict(_own_rows(model, load(group), device, dtype), strict=False, assign=True)
    model.to(device)  # pads rows
    for parameter in model.parameters():
        if hasattr(parameter, "to_local"):
            parameter.part = nn.Parameter(parameter.to_local().detach())  # type: ignore[attr-defined]
    register_fsdp_forward_method(model, "within")
    _free_root(model)


def _own_rows(model: GPT, weights: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Return parameters with this rank's rows of the weights. Names of one parameter, such as a tied head's, get one."""
    own: dict[int, nn.Parameter] = {}
    for name, value in weights.items():
        parameter = model.get_parameter(name)
        if id(parameter) not in own:
            rows = rows_of(value, parameter).to(device, dtype, copy=True)
            own[id(parameter)] = nn.Parameter(_sharded(rows, parameter), parameter.requires_grad)
    return {name: own[id(model.get_parameter(name))] for name in weights}


def _names(model: GPT) -> list[list[str]]:
    """Return the names of the parameters on the meta device, by block, then those of no block."""
    groups: list[list[str]] = [[] for _ in range(len(model.blocks) + 1)]
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta:
            groups[int(name.split(".")[2]) if name.startswith("transformer.h.") else -1].append(name)
    return groups


def _outside(model: GPT) -> list[nn.Parameter]:
    """Return the parameters of no block: of embedding, final norm and head."""
    return [p for name, p in model.named_parameters() if not name.startswith("transformer.h.")]


def _free_root(model: GPT) -> None:
    """Free what is trained of embedding and head after a pass without gradients, too: the optimizer reads the sharded parameters."""
    root: Any = model
    within = model.within

    def resharding(work: Callable[[], Any]) -> Any:
        result = within(work)
        if not torch.is_grad_enabled():
            root.reshard()
        return result

    if any(p.requires_grad for p in _outside(model)):
        model.within = resharding  # type: ignore[method-assign]
