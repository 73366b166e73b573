"""Precisions by name, the default by what the processor can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.device import backbone_dtype, default_device, default_precision, find_device
from litgpt.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("16-true", torch.float16),
        ("bf16-mixed", torch.float32),
        ("16-mixed", torch.float32),
    ],
)
def test_weights_have_the_dtype_of_the_precision(name: str, dtype: torch.dtype) -> None:
    assert backbone_dtype(name) is dtype


@pytest.mark.parametrize("name", ["bf16", "fp8", "64-true", "", "BF16-true"])
def test_an_unknown_precision_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match="precision .* is unknown: choose one of 32-true, bf16-true, 16-true, bf16-mixed, 16-mixed"):
        backbone_dtype(name)


@pytest.mark.parametrize(
    ("able", "expected"),
    [
        ({"avx512_bf16": True}, "bf16-true"),
        ({"amx_bf16": True}, "bf16-true"),
        ({"bf16": True}, "bf16-true"),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, "32-true"),
        ({}, "32-true"),
    ],
)
def test_the_default_is_bf16_where_the_processor_multiplies_it(
    able: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert default_precision(CPU) == expected


def test_the_default_here_agrees_with_the_kernels_flags() -> None:
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("needs Linux")
    flags = Path("/proc/cpuinfo").read_text().split()
    if "avx512_bf16" not in flags and "amx_bf16" not in flags and "vendor_id" in flags:
        assert default_precision(CPU) == "32-true"
    elif "avx512_bf16" in flags:
        assert default_precision(CPU) == "bf16-true"


def test_the_default_device_is_the_one_there_is() -> None:
    assert default_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "device", ["foo", "cuda:99", "cuda:x", "gpu", "meta", "", 99, "xpu", "hpu:3", "mps:7", torch.device("cuda", 99), 1.5]
)
def test_a_device_that_the_machine_lacks_is_refused_with_those_it_has(device: Any) -> None:
    with pytest.raises(UserError) as error:
        find_device(device)
    assert str(error.value).startswith(f"device '{device}' does not exist on this machine: choose one of cpu")


def test_devices_that_exist() -> None:
    assert find_device("cpu") == find_device(CPU) == CPU and find_device(None) == default_device()
