"""The keys of a command, from its signature: names, types and merging. tests/test_cli.py has the commands' own."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest

from litgpt.args import Grid, TrainArgs, setting
from litgpt.data import JSON, PythonDocs
from litgpt.data.base import DataModule
from litgpt.keys import Keys, Setting, UsageError, known_classes


@dataclass(kw_only=True)
class Command:
    folder: Path
    rate: float = setting(0.5, older_names=("speed",))
    kind: Literal["a", "b"] = "a"
    names: Optional[list[str]] = None
    data: Optional[DataModule] = None
    train: TrainArgs = field(default_factory=TrainArgs)
    optimizer: Union[str, dict[str, Any]] = "AdamW"
    grid: Optional[Grid] = None


def function(folder: Path, count: int, rate: float = 0.5) -> None:
    pass


KEYS = Keys(Command)


def merged(*mappings: dict[str, Any]) -> dict[str, Any]:
    return KEYS.merge([KEYS.of_mapping(mapping, f"{number}.yaml") for number, mapping in enumerate(mappings)])


def test_four_kinds_of_parameter() -> None:
    assert KEYS.groups == ["train"] and KEYS.classes == {"data": DataModule, "optimizer": None} and KEYS.grids == ["grid"]
    assert KEYS.types["train.epochs"] == Optional[int] and KEYS.types["rate"] is float and "train" not in KEYS.types
    assert KEYS.bare == ["folder"] and KEYS.older == {"speed": "rate"}


def test_a_function_has_keys_too() -> None:
    keys = Keys(function)
    assert keys.bare == ["folder", "count"] and keys.defaults == {"rate": 0.5}
    assert keys.arguments(keys.merge([keys.of_mapping({"folder": "x", "count": "3"})])) == {"folder": Path("x"), "count": 3, "rate": 0.5}
    with pytest.raises(UsageError, match="^folder, count is missing"):
        keys.arguments({})


@pytest.mark.parametrize(
    ("written", "full"),
    [
        ("rate", "rate"),
        ("speed", "rate"),
        ("epochs", "train.epochs"),
        ("train.epochs", "train.epochs"),
        ("data.class_path", "data"),
        ("data.init_args.seed", "data.seed"),
        ("data.seed", "data.seed"),
        ("grid.speed", "grid.rate"),
        ("grid.epochs", "grid.train.epochs"),
        ("grid.optimizer.init_args.lr", "grid.optimizer.lr"),
        ("nothing.here", "nothing.here"),
    ],
)
def test_full_names(written: str, full: str) -> None:
    assert KEYS.full(written, short=True) == full
    assert KEYS.full("epochs", short=False) == "epochs"


def test_settings_know_their_places() -> None:
    settings = KEYS.of_mapping({"train": {"epochs": 3}, "data": {"class_path": "JSON", "init_args": {"seed": 1}}}, "f.yaml")
    assert [(setting.key, setting.place) for setting in settings] == [
        ("train.epochs", "f.yaml: train.epochs"),
        ("data", "f.yaml: data"),
        ("data.seed", "f.yaml: data.init_args.seed"),
    ]
    assert Setting("train.epochs", "3", "epochs").place == "--epochs"


def test_later_sources_override_earlier_ones() -> None:
    first = {"rate": 1, "train": {"epochs": 3, "max_steps": 4}, "data": {"class_path": "JSON", "init_args": {"seed": 1, "json_path": "x"}}}
    config = merged(first, {"train": {"epochs": 5}, "rate": 2}, {"data": "PythonDocs"})
    assert config == {"rate": 2.0, "train": {"epochs": 5, "max_steps": 4}, "data": {"class_path": PythonDocs, "init_args": {"seed": 1}}}
    arguments = KEYS.arguments({**config, "folder": Path("c")})
    assert arguments["data"] == PythonDocs(seed=1) and arguments["train"] == TrainArgs(epochs=5, max_steps=4)
    assert arguments["optimizer"] == "AdamW" and arguments["grid"] == {} and list(arguments) == list(KEYS.parameters)


def test_the_class_may_stand_behind_its_arguments() -> None:
    assert merged({"data.seed": 3, "data": "JSON"})["data"] == {"class_path": JSON, "init_args": {"seed": 3}}


def test_recipes() -> None:
    lr = {"optimizer": {"init_args": {"lr": 1}}}
    assert merged(lr)["optimizer"] == {"class_path": "AdamW", "init_args": {"lr": 1}}
    assert merged(lr, {"optimizer": "AdamW"})["optimizer"] == {"class_path": "AdamW", "init_args": {"lr": 1}}
    assert merged(lr, {"optimizer": "SGD"})["optimizer"] == {"class_path": "SGD"}


def test_values_of_a_grid_have_the_types_of_their_keys() -> None:
    grid = {"rate": [1, "2"], "train": {"epochs": [3, None]}, "data": ["JSON"], "optimizer": {"lr": [1]}}
    assert merged({"grid": grid})["grid"] == {"rate": [1.0, 2.0], "train.epochs": [3, None], "data": ["JSON"], "optimizer.lr": [1]}


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"rates": 1}, "0.yaml: rates is not a known key (did you mean rate?)"),
        ({"rate": "fast"}, "0.yaml: rate: 'fast' is not a number"),
        ({"kind": "c"}, "0.yaml: kind: 'c' is not one of a, b"),
        ({"rate": 1, "speed": 2}, "speed is the older name of rate: give one of them"),
        ({"train": 5}, "0.yaml: train needs keys below it, such as train.save_interval"),
        ({"data": {"seed": 1}}, "0.yaml: data takes a class_path and the mapping init_args, nothing else"),
        ({"data.seed": 1}, f"0.yaml: data.seed needs --data with one of {', '.join(known_classes(DataModule))}"),
        ({"grid": {"rate": 1}}, "0.yaml: grid.rate: 1 is not a list (each a number) to try, such as '[4, 8]'"),
        ({"grid": {"rate": []}}, "0.yaml: grid.rate: [] is not a list (each a number) to try, such as '[4, 8]'"),
        ({"grid": {"kind": ["a", None]}}, "0.yaml: grid.kind: null is not one of a, b"),
        ({"grid": {"grid": {"rate": [1]}}}, "0.yaml: grid.grid.rate is not a known key (did you mean grid.rate?)"),
        ({"folder": ""}, "0.yaml: folder is empty: name a file or a folder, or leave it out"),
        ({"rates": 1, "kind": 3}, "0.yaml: rates is not a known key (did you mean rate?)\n       0.yaml: kind: 3 is not one of a, b"),
    ],
)
def test_mistakes(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        merged(mapping)
    assert str(caught.value) == message


def test_a_class_that_is_made_later_does_not_take_a_name() -> None:
    """`data.connect` makes a subclass of the same name and module."""
    made = type("JSON", (JSON,), {"__module__": JSON.__module__})
    assert made.__name__ == "JSON" and known_classes(DataModule)["JSON"] is JSON


@pytest.mark.parametrize("style", ["litgpt.prompts.Alpaca", {"class_path": "litgpt.prompts.Alpaca"}])
def test_a_prompt_style_named_by_its_class(style: Any) -> None:
    """Both of LitGPT's forms; its styles take no arguments."""

    def of(value: Any) -> Any:
        return merged({"data": {"class_path": "litgpt.data.JSON", "init_args": {"prompt_style": value}}})["data"]

    assert of(style) == {"class_path": JSON, "init_args": {"prompt_style": "litgpt.prompts.Alpaca"}}
    with pytest.raises(UsageError, match="is not text or null"):
        of({"class_path": "litgpt.prompts.Alpaca", "init_args": {"a": 1}})
