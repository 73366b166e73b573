"""The base class of adapters. `isinstance(module, Adapter)` decides what is trained, saved, counted and left unquantised."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from litgpt.config import CORRECTION
from litgpt.sharding import assign, on_cpu


class Adapter(nn.Module):
    """Parameters added to a frozen model: the module's own, not those of a layer that it wraps."""

    skips_cut = False  # True: the output joins the tail, so that gradients reach the adapter even in front of the cut

    constant: tuple[str, ...] = ()  # names of parameters that are never trained

    tunes_base = False  # True: the parameters are the base's own and start from its values
    base_dtype = torch.float32  # of those parameters in the base

    is_sharded = False  # True: the parameters are gathered for each pass, into reused memory

    def reset_parameters(self) -> None:
        """Set fresh values that leave the model's output as it is without the adapter."""
        raise NotImplementedError


class Wrapper(Adapter):
    """An adapter around a linear layer. A state dict's `weight`, `bias` and router's bias go to that layer."""

    linear: Any  # an `nn.Linear`, or quantised
    in_features: int
    out_features: int
    kept_outputs = 0  # tensors of the layer's output size that autograd keeps for the adapter

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weight", "bias", CORRECTION):
            if prefix + name in state_dict:
                state_dict[f"{prefix}linear.{name}"] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)


def is_transposed(linear: nn.Module) -> bool:
    """Return True for transformers' Conv1D, a linear layer whose weight is (in, out)."""
    return type(linear).__name__ == "Conv1D" and hasattr(linear, "nf")


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Yield the adapters of a model with their names, in the order of the modules."""
    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, Adapter))


def adapter_parameters(model: nn.Module, added: bool = False) -> dict[str, nn.Parameter]:
    """Return the adapters' parameters by their names in the model; with `added`, without those that the base also has."""
    return {
        f"{name}.{key}" if name else key: parameter
        for name, adapter in adapters(model)
        for key, parameter in adapter.named_parameters(recurse=False)
        if not (added and adapter.tunes_base)
    }


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapters' parameters as tensors on the CPU, to be saved. All ranks of a sharded model must call this."""
    return on_cpu(adapter_parameters(model))


def renew_adapters(model: nn.Module) -> None:
    """Give every adapter fresh fp32 values on the CPU, drawn in the order of the modules: a seed gives equal models the same values.

    Parameters of the base keep their values.
    """
    own_copies([adapter for _, adapter in adapters(model) if adapter.tunes_base])
    for _, adapter in adapters(model):
        _redraw(adapter)


def _redraw(adapter: Adapter) -> dict[str, nn.Parameter]:
    """Give an adapter fresh fp32 values on the CPU, unless they are the base's. Return the parameters that they replace."""
    former = {} if adapter.tunes_base else dict(adapter.named_parameters(recurse=False))
    for name, parameter in former.items():
        setattr(adapter, name, nn.Parameter(torch.empty(parameter.shape)))
    if former:
        adapter.reset_parameters()
    return former


def own_copies(tuned: Sequence[Adapter]) -> None:
    """Give adapters that tune the base's parameters fp32 copies of them. A parameter of two adapters becomes one copy."""
    copies: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for adapter in tuned:
        for name, parameter in list(adapter.named_parameters(recurse=False)):
            if id(parameter) not in copies:
                copies[id(parameter)] = parameter, nn.Parameter(parameter.detach().to(torch.float32, copy=True))
            adapter.base_dtype = parameter.dtype
            setattr(adapter, name, copies[id(parameter)][1])


@torch.no_grad()
def renew_sharded(model: nn.Module) -> None:
    """Give the adapters of a sharded model the values that `renew_adapters` gives in a single process: the first rank's."""
    for _, adapter in adapters(model):
        adapter.is_sharded = True
        for name, parameter in _redraw(adapter).items():
            value = getattr(adapter, name).detach().to(parameter.device)
            torch.distributed.broadcast(value, 0)
            adapter._parameters[name] = parameter
            assign(parameter, value)
