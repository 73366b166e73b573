"""Sharded models: each rank holds a part of every parameter, and a block's parameters are gathered while it runs (FSDP2, arXiv 2304.11277).

Each block is a group that includes its adapters. A large frozen layer in it is gathered separately, so that less is gathered at once; on
a CPU, which does not prefetch, it is gathered for each of its products (`SpreadLinear`). An embedding and a head without adapters are
spread (`litgpt.vocabulary`). Their other trained parts and those of the final norm are the last group; frozen ones, and Skip2-LoRA's
adapters, which are read outside of their blocks, are copied to every rank. The optimizer sees the rank's rows of a parameter as an
ordinary tensor (`part_of`), so its update must be elementwise.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from litgpt.fused import multiply
from litgpt.mlp import LLaMAMoE
from litgpt.vocabulary import as_sharded, gather, of_mesh, own_chunk, spread

if TYPE_CHECKING:
    from litgpt.model import GPT

M_MMAP_THRESHOLD = -3  # of <malloc.h>
LARGE = 2 * 2**20  # bytes of a layer that is gathered separately


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """Return the values of all ranks, which must all call this; a tensor that is not sharded is returned unchanged."""
    gather = getattr(parameter, "full_tensor", None)
    return parameter if gather is None else gather()


def part_of(parameter: nn.Parameter) -> nn.Parameter:
    """Return this rank's rows of a parameter, in its memory; all of one that is not sharded."""
    return getattr(parameter, "part", parameter)


def rows_of(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Return the rows of a tensor that this rank would hold of a parameter of its shape."""
    return own_chunk(value, parameter.device_mesh) if hasattr(parameter, "device_mesh") else value


@torch.no_grad()
def assign(parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Copy a tensor, or this rank's rows, into a parameter."""
    part_of(parameter).copy_(rows_of(value, parameter))


def gathered(state: dict[int, dict[str, Any]], parameters: Sequence[nn.Parameter]) -> dict[int, dict[str, Any]]:
    """Return an optimizer's state for the parameters that it updates, in its order, with rows of a rank as tensors to be gathered."""
    return _of_each(state, parameters, _sharded)


def scattered(state: dict[int, dict[str, Any]], parameters: Sequence[nn.Parameter]) -> dict[int, dict[str, Any]]:
    """Return the state of each parameter with this rank's rows."""
    return _of_each(state, parameters, rows_of)


def _of_each(state: dict[int, dict[str, Any]], parameters: Sequence[nn.Parameter], change: Callable[[torch.Tensor, Any], Any]) -> Any:
    """Return the state of each parameter with the tensors of sharded parameters converted."""
    state = dict(state)
    for i, parameter in enumerate(parameters):
        if i in state and part_of(parameter) is not parameter:
            values = state[i].items()
            state[i] = {
                name: change(value, parameter) if isinstance(value, torch.Tensor) and value.dim() else value for name, value in values
            }
    return state


def _sharded(value: torch.Tensor, like: Any) -> torch.Tensor:
    """Return the whole tensor whose rows `value` this rank has."""
    return as_sharded(value, like) if hasattr(like, "device_mesh") else value


def loads(parameters: Mapping[str, torch.Tensor]) -> dict[tuple[str, ...], Callable[[], torch.Tensor]]:
    """Return functions that load parameters and buffers on the CPU, by the names of one tensor. All ranks must call each (`all_called`)."""
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    return {tuple(same): partial(_load, parameters[same[0]]) for same in names.values()}


def _load(parameter: torch.Tensor) -> torch.Tensor:
    return whole(parameter.detach()).cpu()


def on_cpu(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return parameters and buffers as tensors on the CPU, those of several names once. All ranks of a sharded model must call this."""
    values = {names: load() for names, load in loads(parameters).items()}
    return {name: value for names, value in values.items() for name in names}


Key = TypeVar("Key")


@contextmanager
def all_called(loads: Mapping[Key, Callable[[], torch.Tensor]]) -> Iterator[Mapping[Key, Callable[[], torch.Tensor]]]:
    """Yield functions that gather tensors, to be called in their order, and call at the end those that were not.

    So a rank that writes nothing, or can write no more, takes part in each gathering. A tensor is freed before the next is gathered.
    """
    left = dict(loads)

    def call(key: Key) -> torch.Tensor:
        load = left.pop(key)
        try:
            return load()
        except BaseException:
            left.clear()  # another rank is lost
            raise

    try:
        yield {key: partial(call, key) for key in loads}
    finally:
        while left:
            call(next(iter(left)))


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "reshard")


def reduces_unused_gradients() -> bool:
    """Return True if this torch's FSDP2 can sum the gradients of an expert that got no token in some process."""
    from torch.distributed.fsdp import FSDPModule

    return hasattr(FSDPModule, "set_reduce_scatter_unused_params")


Load = Callable[[Iterable[str]], Mapping[str, torch.Tensor]]


def shard(model: GPT, device: torch.device, load: Load, dtype: torch.dtype, offload: bool = False) -> None:
    """Shard a model whose base weights are on the meta device over all ranks, and load this rank's rows of them.

    `load` returns the weights of these names, mapped into memory. It is called for each group, so that no more of the file is held.
    `offload`: the rows of the groups, their gradients and their optimizer stay in the CPU's memory.
    """
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    if device.type == "cpu":
        with suppress(AttributeError, OSError):  # glibc: gathered weights and activations that are freed go back to the system
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    spread(model, mesh)
    copied = {p for block in model.blocks if block.skip2lora is not None for p in block.skip2lora.parameters()}
    copied |= {p for p in _outside(model) if not p.requires_grad}
    reads_weights = getattr(model.config, "lora_variant", "") == "dora"
    large = [layer for block in model.blocks for layer in _large_layers(block, dtype)] if not reads_weights else []
    for layer in large if device.type == "cpu" else ():
        layer.__class__ = SpreadLinear
        layer.weight = nn.Parameter(of_mesh(layer.weight, mesh), requires_grad=False)
        copied.add(layer.weight)
    for parameter in model.parameters():
        if not parameter.is_meta:  # an adapter's
            parameter.data = parameter.data.to(device)
    how: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": fsdp.MixedPrecisionPolicy(reduce_dtype=torch.float32),
        "offload_policy": fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda") if offload else fsdp.OffloadPolicy(),
        "ignored_params": copied | {p for p in _outside(model) if hasattr(p, "device_mesh")},  # spread, trained or not
    }
    apart, exact = [name for name, p in model.named_parameters() if p in copied], _exact(model, dtype)
    for layer in large if device.type != "cpu" else ():
        fsdp.fully_shard(layer, **how)
    for block in model.blocks:
        fsdp.fully_shard(block, **how)
        fsdp.register_fsdp_forward_method(block, "attend")
    fsdp.fully_shard(model, **how)
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the sum: the loss is divided by the weight of all ranks' tokens
            module.set_force_sum_reduction_for_comms(True)
            if device.type == "cpu":
                module.set_custom_all_gather(InPlace())  # type: ignore[arg-type]
            if any(isinstance(part, LLaMAMoE) for part in module.modules()) and reduces_unused_gradients():
                module.set_reduce_scatter_unused_params(True)  # of an expert that has no token of this rank
    home = torch.device("cpu") if offload else device
    for k, group in enumerate(_names(model)):
        model.load_state_dict(_own_rows(model, load(group), home, dtype, exact), strict=False, assign=True)
        if offload and k < len(model.blocks):
            model.blocks[k].to(home)
    model.to(home)  # pads rows
    if home != device:
        for tensor in (*map(model.get_parameter, apart), *model.buffers()):
            tensor.data = tensor.data.to(device)
    for parameter in model.parameters():
        if hasattr(parameter, "to_local"):
            parameter.part = nn.Parameter(parameter.to_local().detach(), parameter.is_floating_point())  # type: ignore[attr-defined]
    for module in model.modules():
        for expert in module.experts if isinstance(module, LLaMAMoE) else ():
            _note_tokens(expert)
    fsdp.register_fsdp_forward_method(model, "within")
    _free_root(model)


def _note_tokens(expert: nn.Module) -> None:
    """Record on an expert's parameters whether it has run with gradients: to one that has not, FSDP2 gives a zero gradient."""
    parameters: list[Any] = list(expert.parameters())

    def note(*_: Any) -> None:
        for parameter in parameters if torch.is_grad_enabled() else ():
            parameter.has_tokens = True

    for parameter in parameters:
        parameter.has_tokens = False
    expert.register_forward_pre_hook(note)


def take_used(parameters: Sequence[nn.Parameter]) -> list[bool]:
    """Return for each parameter whether this rank has used it in its step, and forget that experts have run."""
    used = [p.grad is not None and getattr(p, "has_tokens", True) for p in parameters]
    for p in parameters:
        if hasattr(p, "has_tokens"):
            p.has_tokens = False
    return used


class InPlace:
    """FSDP2's gathering on a CPU, by `litgpt.vocabulary.gather`."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool = False) -> Any:
        return gather(output_tensor, input_tensor, group, async_op)


class SpreadLinear(nn.Linear):
    """A frozen layer whose weight is gathered for each product, and freed after it: y = W x + b, dx = W^T dy."""

    weight: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)"""
        return multiply(x, self)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight, (out, in)."""
        mesh, own = self.weight.device_mesh, self.weight.to_local()
        size = -(-self.out_features // mesh.size())  # rows of a rank
        rows = own.new_empty(mesh.size() * size, self.in_features)
        part = rows[mesh.get_local_rank() * size :][:size]
        part[: len(own)] = own
        gather(rows, part, mesh.get_group())
        return rows[: self.out_features].to(dtype)


def _large_layers(block: nn.Module, dtype: torch.dtype) -> list[Any]:
    """Return the frozen layers that are gathered separately. Experts are not among them, as some ranks may not run them."""
    apart = {id(layer) for module in block.modules() if isinstance(module, LLaMAMoE) for layer in module.modules()}
    return [
        layer
        for layer in block.modules()
        if type(layer) is nn.Linear
        and id(layer) not in apart
        and not layer.weight.requires_grad
        and layer.weight.numel() * dtype.itemsize >= LARGE
    ]


def _exact(model: GPT, dtype: torch.dtype) -> set[str]:
    """Return the names of the base's parameters that do not get the backbone's dtype: those that an adapter tunes are fp32."""
    exact = set[str]()
    for prefix, module in model.named_modules():
        if getattr(module, "tunes_base", False):
            module.base_dtype = dtype
            exact |= {f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)}
        elif hasattr(module, "dense"):  # quantised
            exact |= {f"{prefix}.quantised", f"{prefix}.scales"}
    return exact


def _own_rows(
    model: GPT, weights: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype, exact: set[str]
) -> dict[str, torch.Tensor]:
    """Return this rank's rows of the weights as parameters. Names that share a parameter, such as a tied head's, get one."""
    buffers: dict[str, torch.Tensor] = dict(model.named_buffers())
    own: dict[str, torch.Tensor] = {}
    known: dict[int, nn.Parameter] = {}
    for name, value in weights.items():
        if name in buffers:  # of a router
            own[name] = value.to(device, torch.float32, copy=True)
            continue
        parameter = model.get_parameter(name)
        if id(parameter) not in known:
            kind = dtype if name not in exact else torch.float32 if parameter.is_floating_point() else parameter.dtype
            rows = rows_of(value, parameter).to(device, kind, copy=True)
            known[id(parameter)] = nn.Parameter(_sharded(rows, parameter), parameter.requires_grad)
        own[name] = known[id(parameter)]
    return own


def _names(model: GPT) -> list[list[str]]:
    """Return the names of the parameters and buffers on the meta device, by block, then those of no block."""
    groups: list[list[str]] = [[] for _ in range(len(model.blocks) + 1)]
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        if tensor.is_meta:
            groups[int(name.split(".")[2]) if name.startswith("transformer.h.") else -1].append(name)
    return groups


def _outside(model: GPT) -> list[nn.Parameter]:
    """Return the parameters of no block: of embedding, final norm and head."""
    return [p for name, p in model.named_parameters() if not name.startswith("transformer.h.")]


def _free_root(model: GPT) -> None:
    """Free the trained parameters of embedding and head also after a pass without gradients: the optimizer reads the sharded ones."""
    root: Any = model
    within = model.within

    def resharding(work: Callable[[], Any]) -> Any:
        result = within(work)
        if not torch.is_grad_enabled():
            root.reshard()
        return result

    if any(p.requires_grad for p in _outside(model)):
        model.within = resharding  # type: ignore[method-assign]
