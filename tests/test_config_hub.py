"""Every YAML of config_hub: read by the real command line, short, without restated defaults, and with the parameter count it states."""

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from litgpt import data
from litgpt.__main__ import load
from litgpt.args import defaults
from litgpt.cli import parse
from litgpt.finetune.lora import Lora
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from tests.helpers.cases import quick

ROOT = Path(__file__).parent.parent / "config_hub" / "finetune"
FILES = sorted(ROOT.rglob("[!_]*.yaml"))
SHARED = sorted(ROOT.rglob("_base.yaml"))  # what the presets of a model share
NAMES = [str(file.relative_to(ROOT)) for file in FILES]
PRESETS = ("alora", "lora", "skip2lora", "skip2lora_tail", "skip2lora_warmup")
OBJECTIVES = ("critic", "dpo", "mtp", "rho1", "verifiable")
SMOLLM2 = (*OBJECTIVES, "minimind")  # presets of this model alone
LLAMA_2 = ("lora", "lora_baseline", "skip2lora", "skip2lora_4blocks", "skip2lora_6blocks", "skip2lora_warmup")
MODELS = ("llama-3.2-1B", "pythia-160m", "smollm2-135m", "tiny-llama")


class Shape(NamedTuple):
    """What a trainable count depends on: blocks, width, width of k and of v, layers of the MLP and their inner width."""

    blocks: int
    d: int
    kv: int
    mlp_layers: int
    inner: int


SHAPES = {
    "llama-2-7b": Shape(32, 4096, 4096, 3, 11008),
    "llama-3.2-1B": Shape(16, 2048, 512, 3, 8192),
    "pythia-160m": Shape(12, 768, 768, 2, 3072),
    "smollm2-135m": Shape(30, 576, 192, 3, 1536),
    "tiny-llama": Shape(22, 2048, 256, 3, 5632),
}


def test_the_files_that_are_promised_are_there() -> None:
    llama = [f"llama-2-7b/{name}.yaml" for name in LLAMA_2]
    own = [f"smollm2-135m/{name}.yaml" for name in SMOLLM2]
    assert sorted(llama + own + [f"{model}/{preset}.yaml" for model in MODELS for preset in PRESETS]) == NAMES
    assert [file.parent.name for file in SHARED] == sorted({file.parent.name for file in FILES})


@pytest.mark.parametrize("file", FILES + SHARED, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_short_and_says_what_it_is_for(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert len(lines) <= 25
    assert [line.startswith("#") for line in lines] == [True] + [False] * (len(lines) - 1)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"train.epochs": 2, ...}."""
    below = {f"{prefix}{key}": value for key, value in settings.items()}
    return {
        name: item
        for key, value in below.items()
        for name, item in (flat(value, f"{key}.") if isinstance(value, dict) else {key: value}).items()
    }


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_restates_nothing_of_its_base(file: Path) -> None:
    own, shared = (flat(yaml.safe_load(path.read_text())) for path in (file, file.with_name("_base.yaml")))
    assert own["base"] == "_base.yaml"
    assert not [key for key in own if own[key] == shared.get(key)]


@pytest.mark.parametrize("file", FILES + SHARED, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_restates_no_default(file: Path) -> None:
    settings = yaml.safe_load(file.read_text())
    default_settings = defaults(Lora)
    class_path = yaml.safe_load(file.with_name("_base.yaml").read_text())["data"]["class_path"]
    for key, value in settings.items():
        default = default_settings.get(key)
        if key in ("train", "eval", "log"):
            for name, item in value.items():
                assert item != getattr(default, name), f"{key}.{name}"
        elif key == "data":
            fields = {field.name: field.default for field in dataclasses.fields(getattr(data, class_path.rpartition(".")[2]))}
            for name, item in value.get("init_args", {}).items():
                assert item != fields[name], f"data.{name}"
        elif key not in ("base", "checkpoint_dir", "out_dir"):
            assert value != default, key


@pytest.mark.parametrize("file", quick(FILES, *FILES[::6]), ids=NAMES)
def test_trainable_parameters(file: Path) -> None:
    """Closed form: an adapter of rank r from a to b features has r (a + b) parameters; q, k and v each have their own."""
    model, preset = file.parent.name, file.stem
    blocks, d, kv, mlp_layers, inner = SHAPES[model]
    every_layer = 8 * ((d + d) + 2 * (d + kv) + (d + d) + mlp_layers * (d + inner))
    arguments = parse("litgpt finetune", load("finetune"), [str(file)])
    if preset == "critic":
        expected = d * (d + 1) + d + 1  # a hidden layer, and the value
    elif preset == "minimind":
        expected = blocks * 8 * 2 * (d + d)  # of all layers only query and output projections have as many inputs as outputs
    elif preset == "verifiable":
        expected = blocks * every_layer + d * (d + 1) + d + 1
    elif preset == "mtp":
        expected = 3 * 3 * d * d  # each from 2 d to d to d
    elif preset in ("lora", "alora", *OBJECTIVES):
        expected = blocks * every_layer
    elif preset == "lora_baseline":
        expected = blocks * 8 * ((d + d) + (d + kv))
    elif preset == "skip2lora_tail":
        cut = int(re.fullmatch(r"transformer\.h\.(\d+)", arguments["skip2lora_output_layer"])[1])
        every = int(re.fullmatch(r"every:(\d+)", arguments["skip2lora_block_indices"])[1])
        assert blocks / 2 < cut < blocks
        expected = (blocks - cut) * every_layer + -(-cut // every) * 2 * 8 * d
    else:
        taps = {"skip2lora_4blocks": 4, "skip2lora_6blocks": 6}.get(preset) or {"all": blocks, "last:6": 6, None: 6}[
            arguments["skip2lora_block_indices"]
        ]
        expected = taps * 2 * (32 if preset == "skip2lora_warmup" else 16) * d  # after the warm-up

    assert _trainable(arguments) == expected
    stated = re.search(r"([\d.]+) M trainable", file.read_text())[1]
    assert stated == f"{expected / 1e6:.{len(stated.partition('.')[2])}f}"


@pytest.mark.parametrize(("blocks", "count"), [("[0, 1, 2, 3]", 524_288), ("[0, 1, 2, 3, 4, 5]", 786_432)])
def test_the_evaluation_guide(blocks: str, count: int) -> None:
    """Its commands for 4 and 6 blocks, with the counts it states."""
    command = [str(ROOT / "llama-2-7b/skip2lora.yaml"), "--out_dir", "out/finetune/x", "--skip2lora_block_indices", blocks]
    arguments = parse("litgpt finetune", load("finetune"), [*command, "--max_steps", "10"])
    assert arguments["out_dir"] == Path("out/finetune/x") and arguments["train"].max_steps == 10
    assert _trainable(arguments) == count


def test_the_presets_compared_by_the_guide_differ_in_the_adapter_only() -> None:
    compared = [
        parse("litgpt finetune", load("finetune"), [str(ROOT / f"llama-2-7b/{name}.yaml")]) for name in ("lora_baseline", "skip2lora")
    ]
    for key in ("checkpoint_dir", "data", "train", "eval", "seed"):
        assert compared[0][key] == compared[1][key]


def _trainable(arguments: dict[str, Any]) -> int:
    adapters = {key: value for key, value in arguments.items() if key in Config.adapter_fields()}
    with torch.device("meta"):
        model = GPT(Config.from_name(arguments["checkpoint_dir"].name, **adapters))
    mark_only_lora_as_trainable(model)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
