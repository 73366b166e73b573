from __future__ import annotations

import json
import weakref
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from litgpt.convert import write as writer
from litgpt.convert.write import Pending, write_pth, write_safetensors, write_sharded

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TENSORS = {
    f"{kind}.{size}": torch.arange(size, dtype=torch.float64).add(0.3).to(dtype).reshape(shape)
    for kind, dtype in zip(("f32", "bf16", "f16", "f64"), DTYPES, strict=True)
    for size, shape in ((7, (7,)), (12, (3, 4)), (1000, (10, 20, 5)))
}


def getter(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def pending(tensors: dict[str, torch.Tensor]) -> dict[str, Pending]:
    return {name: Pending(tuple(tensor.shape), tensor.dtype, getter(tensor)) for name, tensor in tensors.items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name])


@pytest.mark.parametrize("long", [False, True], ids=["plain", "zip64"])
@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mapped"])
def test_pth_is_what_torch_saves(mmap: bool, long: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if long:
        monkeypatch.setattr(writer, "ZIP64_LIMIT", 16)
    plan = {(name, *(["head"] if name == "f32.12" else [])): getter(tensor) for name, tensor in TENSORS.items()}
    with (tmp_path / "ours.pth").open("wb") as file:
        write_pth(plan, file)
    torch.save({**TENSORS, "head": TENSORS["f32.12"]}, tmp_path / "torch.pth")
    ours, theirs = (torch.load(tmp_path / name, weights_only=True, mmap=mmap) for name in ("ours.pth", "torch.pth"))
    assert_equal(ours, theirs)
    assert ours["head"].data_ptr() == ours["f32.12"].data_ptr()
    if mmap:
        assert not any(tensor.data_ptr() % 64 for tensor in ours.values())
    with zipfile.ZipFile(tmp_path / "ours.pth") as archive:
        assert archive.testzip() is None


def test_parts_of_a_tensor_are_written_without_the_rest(tmp_path: Path) -> None:
    whole = torch.randn(1000, 10)
    with (tmp_path / "x.pth").open("wb") as file:
        write_pth({("rows",): lambda: whole[3:5], ("turned",): lambda: whole[:4].t()}, file)
    assert (tmp_path / "x.pth").stat().st_size < 3000
    assert_equal(torch.load(tmp_path / "x.pth", weights_only=True), {"rows": whole[3:5], "turned": whole[:4].t()})


def test_safetensors_is_what_its_library_reads(tmp_path: Path) -> None:
    write_safetensors(pending(TENSORS), tmp_path / "ours.safetensors")
    assert_equal(load_file(tmp_path / "ours.safetensors"), TENSORS)
    save_file(TENSORS, tmp_path / "theirs.safetensors", {"format": "pt"})
    with safe_open(tmp_path / "ours.safetensors", "pt") as ours, safe_open(tmp_path / "theirs.safetensors", "pt") as theirs:
        assert ours.metadata() == theirs.metadata()
    raw = (tmp_path / "ours.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    starts = {name: 8 + length + entry["data_offsets"][0] for name, entry in json.loads(raw[8 : 8 + length]).items() if name in TENSORS}
    assert not any(start % TENSORS[name].itemsize for name, start in starts.items())


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_one_tensor_is_alive_at_a_time(kind: str, tmp_path: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def make() -> torch.Tensor:
        assert not any(reference() is not None for reference in alive)
        tensor = torch.zeros(10)
        alive.append(weakref.ref(tensor))
        return tensor

    if kind == "pth":
        with (tmp_path / "x").open("wb") as file:
            write_pth({(str(i),): make for i in range(5)}, file)
    else:
        write_safetensors({str(i): Pending((10,), torch.float32, make) for i in range(5)}, tmp_path / "x")
    assert len(alive) == 5


@pytest.mark.parametrize("write", ["pth", "safetensors"])
def test_a_full_disk_is_an_oserror(write: str) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    tensor = torch.zeros(100_000)
    with pytest.raises(OSError, match="No space left"):
        if write == "pth":
            with full.open("wb") as file:
                write_pth({("x",): lambda: tensor}, file)
        else:
            write_safetensors(pending({"x": tensor}), full)


def test_sharded_folder(tmp_path: Path) -> None:
    write_sharded(pending(TENSORS), tmp_path, 3000)
    names = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    sizes = [[tensor.nbytes for tensor in load_file(tmp_path / name).values()] for name in names]
    assert all(sum(size) <= 3000 or len(size) == 1 for size in sizes)
    assert_equal({name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}, TENSORS)
