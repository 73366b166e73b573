"""A stand-in for a CUDA device on a machine without one: tensors that say `cuda:0` and compute on the CPU.

As on CUDA, an operation on tensors of both devices raises, and so does a random generator of the other device. `Device.waits` counts where
the CPU waits for the device: values that are read, results whose size depends on values, copies from ordinary memory that block. No CUDA
kernel is run, and memory, streams and autocast are not imitated.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import litgpt

PACKAGE = f"{Path(litgpt.__file__).parent}/"
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
COPIES = {torch.ops.aten.copy_.default}  # from one device to the other
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
WAITING = {"_local_scalar_dense", "nonzero", "_unique2", "masked_select", "bincount", "equal", "repeat_interleave"}
STRICT = {"index_select", "gather", "scatter_", "cat", "stack", "mm", "index_copy_", "index_fill_"}  # take no CPU scalar either


class DeviceError(RuntimeError):
    """What CUDA would refuse."""


@dataclass
class Device:
    """What happened since the last `clear`."""

    waits: Counter[str] = field(default_factory=Counter)  # by kind and file
    generators: list[Any] = field(default_factory=list)
    inside: int = 0  # calls into C++ with tensors on the device: what they create is there too


_now = Device()


def place() -> str:
    """Return the file of this package that is running."""
    frame: Any = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return frame.f_code.co_filename.removeprefix(PACKAGE) if frame else "tests"


class OnCuda(torch.Tensor):
    """A tensor on the device. To C++ it is one on the CPU, so that autograd works."""

    inner: torch.Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: Any, inner: torch.Tensor) -> Any:
        how: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **how)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return moved(self, CPU, False).tolist()

    def numpy(self, **_: Any) -> Any:
        raise DeviceError("numpy() of a tensor on the device")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cpu:
            return moved(args[0], CPU, False)
        if func is torch.Tensor.to:
            return to(*args, **(kwargs or {}))
        is_native = not hasattr(func, "__code__")
        _now.inside += is_native
        try:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        finally:
            _now.inside -= is_native

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return computed(func, args, kwargs or {})


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x.inner.clone() if isinstance(x, OnCuda) else OnCuda(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        return grad.inner if isinstance(grad, OnCuda) else OnCuda(grad)


def moved(x: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
    if device.type not in ("cpu", "cuda") or x.is_meta or x.device.type == device.type:
        return x
    if not non_blocking or device.type == "cpu":
        _now.waits[f"copy to {device.type}, {place()}"] += 1
    with torch._C.DisableTorchFunctionSubclass():
        return _Moved.apply(x)


def to(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`Tensor.to` in all its forms."""
    left, device, dtype = list(args), kwargs.pop("device", None), kwargs.pop("dtype", None)
    if left and isinstance(left[0], torch.Tensor):
        like = left.pop(0)
        device, dtype = like.device, like.dtype
    elif left and not isinstance(left[0], torch.dtype):
        device = left.pop(0)
    if left and (left[0] is None or isinstance(left[0], torch.dtype)):
        dtype = left.pop(0) or dtype
    non_blocking = bool(left.pop(0) if left else kwargs.pop("non_blocking", False))
    y = x if device is None else moved(x, torch.device(device), non_blocking)
    copy = bool(left.pop(0) if left else kwargs.pop("copy", False)) and y is x
    with torch._C.DisableTorchFunctionSubclass():
        return torch._C.TensorBase.to(y, dtype or y.dtype, copy=copy, **kwargs)


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return what an operation on tensors of either device gives. Raises DeviceError if CUDA would refuse it."""
    name, tensors = func._schema.name.split("::")[-1], [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on, off = [x for x in tensors if isinstance(x, OnCuda)], [x for x in tensors if not isinstance(x, OnCuda)]
    if on and off and func in INDEXING:
        values = args[2:3] if isinstance(args[0], OnCuda) else args[:1]
        if any(not isinstance(x, OnCuda) and x.dim() for x in values):
            raise DeviceError(f"{name} of a CPU tensor with one on the device in {place()}")
        _now.waits[f"copy to cuda, {place()}"] += 1
    elif on and off and func in COPIES:
        _now.waits[f"copy, {place()}"] += 1
    elif on and any(x.dim() or name in STRICT for x in off):
        raise DeviceError(f"{name} of tensors on both devices in {place()}: {[(x.device.type, tuple(x.shape)) for x in tensors][:5]}")
    by_mask = func in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
    if on and (name in WAITING or by_mask):
        _now.waits[f"{name}, {place()}"] += 1
    given = kwargs.get("device")
    in_autograd = torch._C._current_graph_task_id() != -1 and _is_called_by_autograd()
    is_there = bool(on) or (given is not None and given.type == "cuda") or (not off and (_now.inside > 0 or in_autograd))
    plain_args, plain = tree_map(lambda x: x.inner if isinstance(x, OnCuda) else x, (args, kwargs))
    if given is not None and given.type != "meta":
        plain["device"] = CPU
    result = func(*plain_args, **{**plain, **({"pin_memory": False} if plain.get("pin_memory") else {})})
    if "out" in kwargs:
        return kwargs["out"]
    if func._schema.is_mutable and tensors and result is plain_args[0]:
        return args[0]
    return tree_map(lambda x: OnCuda(x) if is_there and isinstance(x, torch.Tensor) and not x.is_meta else x, result)


def _is_called_by_autograd() -> bool:
    """Return True if C++ calls an operator in a backward pass, and no function in Python."""
    frame: Any = sys._getframe(2)
    while frame and any(part in frame.f_code.co_filename for part in (__file__, "_dynamo/eval_frame", "torch/_compile")):
        frame = frame.f_back
    return frame.f_code.co_filename.endswith("autograd/graph.py")


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or "cpu")
        is_there = device.type == "cuda" or any(isinstance(x, OnCuda) for x in args)
        if (own := kwargs.get("generator")) is not None and is_there != any(own is each for each in _now.generators):
            raise DeviceError(f"{func.__name__} with a generator of the other device in {place()}")
        if func is torch.tensor and device.type == "cuda":
            return moved(func(*args, **{**kwargs, "device": CPU}), CUDA, False)
        return to(*args, **kwargs) if func is torch.Tensor.to and not isinstance(args[0], OnCuda) else func(*args, **kwargs)


_PlainGenerator = torch.Generator


class _AnyGenerator(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _PlainGenerator)


class _Generator(metaclass=_AnyGenerator):
    """Makes torch's own generators, and notes which are the device's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = _PlainGenerator()
        _now.generators += [made] if torch.device(device).type == "cuda" else []
        return made


@contextmanager
def cuda() -> Iterator[Device]:
    """Let torch have the device in the block."""
    random = torch.zeros(16, dtype=torch.uint8)

    def enter(self: Any) -> None:  # a wrapped tensor cannot be an inference tensor
        self.before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(self.before and not self.mode)

    before = torch.__future__.get_swap_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        answers = {"is_available": True, "device_count": 1, "is_bf16_supported": True, "max_memory_allocated": 0, "get_rng_state": random}
        for name, value in {**answers, "_lazy_init": None, "set_rng_state": None, "reset_peak_memory_stats": None}.items():
            patch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        patch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: None)  # optimizers ask it for a stream that it captures
        patch.setattr(torch, "Generator", _Generator)
        patch.setattr(torch.inference_mode, "__enter__", enter)
        patch.setattr(torch.inference_mode, "__exit__", lambda self, *_: torch._C._set_grad_enabled(self.before))
        torch.__future__.set_swap_module_params_on_conversion(True)  # as `Module.to` cannot put another class of tensor in a parameter
        _now.waits.clear()
        try:
            with _Dispatch(), _Functions():
                yield _now
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)
            _now.generators.clear()
