"""Bad places for results, and adapters' and caches' settings that name them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from litgpt import atomic
from tests.helpers.places import Case, Place, check


def out(make: Callable[[Place], Any], *more: Any) -> Callable[[Place], list[Any]]:
    """`litgpt finetune` into the place that `make` gives."""

    def words(place: Place) -> list[Any]:
        return [
            "finetune_lora",
            place.base(),
            "--data",
            "JSON",
            "--data.json_path",
            place.data(),
            "--out_dir",
            make(place),
            "--max_steps",
            1,
            *more,
        ]

    return words


def linked(place: Place) -> str:
    os.symlink("loop", place.folder / "loop")
    return "loop"


def dangling(place: Place) -> str:
    os.symlink("nowhere/at/all", place.folder / "dangling")
    return "dangling"


ROWS = [
    Case("a file", out(lambda place: place.write("f", "")), "out_dir", "is a file"),
    Case("below a file", out(lambda place: place.write("f", "") / "out"), "out_dir", "is a file"),
    Case("a loop of links", out(linked), "out_dir loop", "link"),
    Case("below a loop of links", out(lambda place: linked(place) + "/out"), "out_dir loop/out", "link"),
    Case("a link to nothing", out(dangling), "out_dir dangling", "link"),
    Case("a device", out(lambda place: "/dev/null"), "out_dir /dev/null", "is a file"),
    Case("a name too long", out(lambda place: "x" * 300), "out_dir", "too long", code=2),
    Case("a path too long", out(lambda place: "/".join(["x" * 80] * 20 + ["x" * 300])), "out_dir", "too long", code=2),
    Case("the kernel's files", out(lambda place: "/proc/litgpt"), "out_dir /proc/litgpt cannot be created", "another --out_dir"),
    Case("an earlier run", out(lambda place: place.write("out/final/x", "").parent.parent), "out_dir", "--overwrite true"),
    Case("half an earlier run", out(lambda place: place.write("out/step-000100/x", "").parent.parent), "out_dir", "--overwrite true"),
    Case(
        "the checkpoint's own run",
        lambda place: [
            atomic.write_manifest(place.base().rename(place.folder / "final")),
            ["finetune_lora", "final", "--data", "JSON", "--data.json_path", place.data(), "--out_dir", ".", "--overwrite", "true"],
        ][1],
        "checkpoint_dir",
        "give another --out_dir",
    ),
    Case(
        "merging what cannot be merged twice",
        lambda place: [place.write("adapter/lit_model.pth", "x") if place.adapter() else None, ["merge_lora", "adapter"]][1],
        "lit_model.pth exists already",
        "move it away",
    ),
]


@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_bad_places(case: Case, place: Place) -> None:
    check(case, place)
