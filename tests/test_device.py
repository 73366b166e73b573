"""Precisions by name, the default by what the processor can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt import device
from litgpt.__main__ import main
from litgpt.device import backbone_dtype, default_device, default_precision, find_device, is_finite
from litgpt.errors import UserError
from tests.helpers.runs import write_data

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
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)  # missing in torch 2.10
    assert default_precision(CPU) == expected


@pytest.mark.parametrize(("able", "expected"), [(True, "bf16-true"), (False, "32-true")])
def test_torch_2_10_has_no_table_of_what_the_processor_does(able: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
    assert default_precision(CPU) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_numbers_that_are_not_finite_are_found_wherever_they_are(dtype: torch.dtype) -> None:
    values = torch.randn(7, 33).to(dtype)
    assert is_finite(values) and is_finite(values[:0]) and is_finite(values.t()) and is_finite(values[0, 0])
    for value in (float("nan"), float("inf"), float("-inf")):
        for place in (0, 100, 230):
            spoilt = values.clone()
            spoilt.view(-1)[place] = value
            assert not is_finite(spoilt)


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


class Gpu:
    """A kind of GPU that this machine seems to have: the choice alone is tested."""

    def __init__(self, is_there: bool, has_bf16: bool = True) -> None:
        self.is_there, self.has_bf16 = is_there, has_bf16

    def is_available(self) -> bool:
        return self.is_there

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return self.has_bf16

    def is_macos_or_newer(self, major: int, minor: int) -> bool:
        assert (major, minor) == (14, 0)
        return self.has_bf16


@pytest.mark.parametrize(
    ("xpu", "mps", "working", "expected"),
    [
        (True, False, ("xpu",), "xpu"),
        (False, True, ("mps",), "mps"),
        (True, True, ("mps",), "mps"),
        (True, True, (), "cpu"),
        (False, False, ("xpu", "mps"), "cpu"),
    ],
)
def test_intels_and_apples_gpus_are_chosen_if_they_work(
    xpu: bool, mps: bool, working: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "xpu", Gpu(xpu))
    monkeypatch.setattr(torch.backends, "mps", Gpu(mps))
    monkeypatch.setattr(device, "_works", lambda kind: kind in working)
    assert default_device() == torch.device(expected)


def test_a_gpu_that_does_not_compute_is_said_once_and_the_cpu_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This torch has no XPU, whatever the mock says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "xpu", Gpu(True))
    device._works.cache_clear()
    assert default_device() == default_device() == CPU
    err = capsys.readouterr().err
    assert err.startswith("device xpu does not work (") and err.endswith("): the CPU is used\n") and err.count("\n") == 1


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16-true"), (False, "16-true")])
@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_these_gpus_compute_in_16_bits(kind: str, has_bf16: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "xpu", Gpu(True, has_bf16))
    monkeypatch.setattr(torch.backends, "mps", Gpu(True, has_bf16))
    assert default_precision(torch.device(kind)) == expected


@pytest.mark.parametrize(
    "device", ["foo", "cuda:99", "cuda:x", "gpu", "meta", "", 99, "xpu", "hpu:3", "mps:7", torch.device("cuda", 99), 1.5]
)
def test_a_device_that_the_machine_lacks_is_refused_with_those_it_has(device: Any) -> None:
    with pytest.raises(UserError) as error:
        find_device(device)
    assert str(error.value).startswith(f"device '{device}' does not exist on this machine: choose one of cpu")


def test_the_device_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_used", None)
    monkeypatch.setattr(torch, "xpu", Gpu(True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "_works", lambda kind: True)
    assert default_device().type == "xpu"
    assert device.use("cpu") == default_device() == find_device(None) == find_device("auto") == CPU
    assert device.use("auto") == default_device() == torch.device("xpu")


def test_devices_that_exist() -> None:
    assert find_device("cpu") == find_device(CPU) == CPU and find_device(None) == default_device()


@pytest.mark.parametrize("command", ["finetune", "sweep", "generate", "generate_tp"])
def test_commands_refuse_a_device_that_is_not_there(command: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", str(write_data(tmp_path / "data.json")), "--out_dir", str(tmp_path / "out")]
    assert main([command, str(base), "--accelerator", "xpu", *(data if command in ("finetune", "sweep") else [])]) == 1
    assert "device 'xpu' does not exist on this machine: choose one of cpu" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
