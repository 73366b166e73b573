"""ddp and fsdp in real processes: the losses and the files of one process, whatever the number of processes; and which is chosen."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from torch.torch_version import TorchVersion

from litgpt.__main__ import main
from litgpt.errors import UserError
from litgpt.finetune.adapter import Adapter
from litgpt.finetune.full import Full
from litgpt.finetune.lora import Lora
from litgpt.sample import Sample
from litgpt.sharding import LARGE
from litgpt.train import strategy
from litgpt.train.launch import Place
from litgpt.train.parallel import Rank
from litgpt.train.settings import Run
from tests.helpers import tiny
from tests.helpers.jobs import ROOT, Bench, environ
from tests.helpers.ranks import Ranks
from tests.helpers.runs import write_data
from tests.helpers.training import make_samples

ALL = {f"lora_{layer}": True for layer in ("query", "key", "value", "projection", "mlp", "head")}
SKIP: dict[str, Any] = {"skip2lora_enabled": True, "skip2lora_block_indices": "[0, 2]"}
TAIL: dict[str, Any] = {**SKIP, "lora_mlp": True, "skip2lora_output_layer": "transformer.h.3"}
METHODS: dict[str, dict[str, Any]] = {
    "lora": ALL,
    "late": {"lora_mlp": True, "lora_block_indices": "[2, 3]", "skip2lora_cache": "memory"},
    "skip": {**SKIP, "skip2lora_cache": "memory"},
    "full": {"command": "finetune_full", "lora_dropout": None, "optimizer.lr": 0.001},
    "uncached": {**SKIP, "skip2lora_cache": "off"},
    "tail": {**TAIL, **ALL},
    "warmup": {**TAIL, "skip2lora_warmup_steps": 2},
    "answers": {"alora_enabled": True, "lora_mlp": True, "data.mask_prompt": True, "data.prompt_style": "chatml", "train.replay": 3},
    "checkpointed": {**ALL, "train.activation_checkpointing": True},
    "dora": {**ALL, "lora_variant": "dora", "lora_rslora": True, "loraplus_lr_ratio": 4},
    "pissa": {**ALL, "lora_variant": "pissa", "lora_freeze_a": True},
    "olora": {**TAIL, "lora_variant": "olora"},
    "auto": {**SKIP, "skip2lora_block_indices": "auto:2", "skip2lora_cache": "memory"},
    "auto-tail": {**TAIL, "skip2lora_block_indices": "auto:2"},
    "mtp": {**SKIP, "mtp_heads": 2, "skip2lora_cache": "memory"},
    "saved": {"lora_mlp": True, "modules_to_save": "[wte, lm_head]", "optimizer.lr": 0.001},
    "saved-head": {"lora_mlp": True, "modules_to_save": "[lm_head]", "optimizer.lr": 0.001},
    "experts": {"lora_mlp": True},
    "int8": {**TAIL, "lora_key": True, "quantize": "int8"},
    "prompts": {"command": "finetune_adapter", "lora_dropout": None},
    "prompts-v2": {"command": "finetune_adapter_v2", "lora_dropout": None, "optimizer.lr": 0.001},
}
ANSWERS: dict[str, dict[str, Any]] = {
    "dpo": {**SKIP, "objective": "dpo", "skip2lora_cache": "memory"},
    "dpo-full": {"objective": "dpo", "command": "finetune_full", "lora_dropout": None, "optimizer.lr": 0.001},
    "dpo-dora": {**ALL, "objective": "dpo", "lora_variant": "dora"},
    "orpo": {**ALL, "objective": "orpo"},
    "kto": {**ALL, "objective": "kto"},
    "rho1": {**ALL, "objective": "rho1", "rho1_keep": 0.5},
    "critic": {"objective": "critic", "value_head": "mlp", "lora_query": False, "lora_value": False},
    "verifiable": {**ALL, "objective": "verifiable", "mtp_heads": 1, "lr_ratios.value_head": 2},
}
FAST = ("lora",)
SETTINGS = {
    "lora_dropout": 0,
    "eval.interval": 2,
    "eval.max_new_tokens": 0,
    "optimizer.lr": 0.01,
    "train.max_norm": 0.5,
    "train.keep_best": False,
}


@pytest.fixture(scope="module")
def bench(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """17 training samples and 3 others: the ranks do not have the same number."""
    return Bench(base, write_data(tmp_path_factory.mktemp("data") / "sums.json"))


def argv(bench: Bench, out_dir: Path, method: str, **settings: Any) -> list[str]:
    return [*bench.argv(out_dir, **{**SETTINGS, **(METHODS | ANSWERS)[method], **settings}), "--data.val_split_fraction", "0.15"]


RANKS: dict[str, Ranks] = {}


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    """End the processes that the tests of this module have started."""
    yield
    while RANKS:
        RANKS.popitem()[1].close()


def by_processes(commands: list[list[str]], timeout: float = 280) -> str:
    """Run commands that name the same `devices` in processes that later commands use again, and return their stderr."""
    devices = commands[0][commands[0].index("--devices") + 1]
    if devices not in RANKS:
        RANKS[devices] = Ranks(environ(), ROOT)
    return RANKS[devices].run(commands, timeout)


def curve(out_dir: Path) -> list[list[float]]:
    with (out_dir / "logs/version_0/metrics.csv").open(newline="") as file:
        return [[float(row[name] or 0) for name in ("step", "train_loss", "val_loss")] for row in csv.DictReader(file)]


def assert_alike(one: Path, other: Path) -> None:
    """The same losses to 1e-5, and the same final weights under the same names, as ordinary tensors."""
    for row, expected in zip(curve(other), curve(one), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert {file.name for file in (one / "final").iterdir()} - {"lit_model.pth"} <= {file.name for file in (other / "final").iterdir()}
    name = next((file.name for file in (one / "final").glob("lit_model.pth.*")), "lit_model.pth")
    expected, weights = (torch.load(folder / "final" / name, weights_only=True) for folder in (one, other))
    expected, weights = expected.get("model", expected), weights.get("model", weights)
    assert list(weights) == list(expected)
    for key, value in weights.items():
        assert type(value) is torch.Tensor and (value.shape, value.dtype) == (expected[key].shape, expected[key].dtype)
        # AdamW divides by the gradient's size: where that is next to nothing, rounding moves a single weight by some 3e-3 of the largest
        assert torch.allclose(value, expected[key], rtol=1e-3, atol=5e-3 * float(expected[key].abs().max())), key


def rewind(out_dir: Path, target: Path) -> None:
    """Copy a finished run as it was after two steps."""
    shutil.copytree(out_dir, target)
    for path in [*target.glob("step-*"), target / "final", target / "report.json", target / "report.html"]:
        if path.name != "step-000002":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def compare(bench: Bench, folder: Path, methods: list[str], devices: int, **settings: Any) -> None:
    """Run each method by one process and by several; then finish what each began."""
    commands = []
    for method in methods:
        assert main(argv(bench, folder / f"{method}-one", method, **settings)) == 0
        rewind(folder / f"{method}-one", folder / f"{method}-joined")
        for kind in ("ddp", "fsdp"):
            commands.append(argv(bench, folder / f"{method}-{kind}", method, devices=devices, strategy=kind, **settings))
        commands.append(argv(bench, folder / f"{method}-joined", method, devices=devices, strategy="fsdp", resume=True, **settings))
    output = by_processes(commands, 280 if devices == 2 else 560)
    assert f"{devices} processes, each with a part of the model" in output and output.count("resumed from") == len(methods)
    for method in methods:
        rewind(folder / f"{method}-fsdp", folder / f"{method}-left")
        assert main(argv(bench, folder / f"{method}-left", method, resume=True, **settings)) == 0
        for kind in ("ddp", "fsdp", "joined", "left"):
            assert_alike(folder / f"{method}-one", folder / f"{method}-{kind}")


def test_two_processes_train_like_one_and_finish_what_it_began(bench: Bench, tmp_path: Path) -> None:
    compare(bench, tmp_path, list(FAST), 2)


@pytest.mark.slow
def test_processes_fill_one_cache_on_disk_and_another_number_of_them_finds_it(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def words(name: str, **settings: Any) -> list[str]:
        cache = {"skip2lora_cache": "disk", "skip2lora_cache_dir": tmp_path / f"{name}-cache"}
        return argv(bench, tmp_path / name, "tail", **{**cache, **settings})

    assert main(words("one")) == 0
    by_processes([words(kind, devices=2, strategy=kind) for kind in ("ddp", "fsdp")])
    for kind in ("ddp", "fsdp"):
        assert_alike(tmp_path / "one", tmp_path / kind)
        rewind(tmp_path / kind, tmp_path / f"{kind}-left")
        capsys.readouterr()
        assert main(words(f"{kind}-left", resume=True, skip2lora_cache_dir=tmp_path / f"{kind}-cache")) == 0
        assert capsys.readouterr().err.count("is reused") == 2
        assert_alike(tmp_path / "one", tmp_path / f"{kind}-left")
        for file in (tmp_path / "one-cache").glob("*/activations.bin"):
            expected, values = (
                torch.from_file(str(folder / file.parent.name / file.name), size=file.stat().st_size // 4)
                for folder in (tmp_path / "one-cache", tmp_path / f"{kind}-cache")
            )
            assert torch.allclose(values, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_sharded_model_answers_replays_and_is_merged_as_one_process_does(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"eval.max_new_tokens": 6, "train.replay": 3, "lora_mlp": True, "lora_r": 2}
    assert main(argv(bench, tmp_path / "one", "late", **settings)) == 0
    said = capsys.readouterr().err
    sharded = by_processes([argv(bench, tmp_path / "fsdp", "late", devices=2, strategy="fsdp", **settings)])
    assert_alike(tmp_path / "one", tmp_path / "fsdp")
    answers = [[line for line in text.splitlines() if line.startswith("  answered: ")] for text in (said, sharded)]
    assert answers[0] == answers[1] and len(set(answers[0])) > 1
    kept = [json.loads((tmp_path / name / "final/identity.json").read_text())["general_answers"] for name in ("one", "fsdp")]
    assert kept[0] == kept[1] and any(kept[0])
    merged = [torch.load(tmp_path / name / "final/lit_model.pth", weights_only=True) for name in ("one", "fsdp")]
    base = torch.load(bench.base / "lit_model.pth", weights_only=True)
    assert list(merged[0]) == list(merged[1])
    assert all(torch.allclose(merged[1][key], value, rtol=1e-3, atol=1e-4) for key, value in merged[0].items())
    assert any(not torch.equal(merged[1][key], base[key]) for key in base)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_tied_head_stays_tied(method: str, bench: Bench, tmp_path: Path) -> None:
    base = shutil.copytree(bench.base, tmp_path / "tied")
    weights = torch.load(base / "lit_model.pth", weights_only=True)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    torch.save(weights, base / "lit_model.pth")
    tied, one, other = Bench(base, bench.data), tmp_path / "one", tmp_path / "other"
    assert main(argv(tied, one, method)) == 0
    by_processes([argv(tied, other, method, devices=2, strategy="fsdp")])
    assert_alike(one, other)
    if method == "full":
        saved = torch.load(other / "final/lit_model.pth", weights_only=True)
        assert saved["lm_head.weight"].data_ptr() == saved["transformer.wte.weight"].data_ptr()


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method not in FAST])
def test_every_method_in_two_processes(method: str, bench: Bench, tmp_path: Path) -> None:
    compare(bench, tmp_path, [method], 2)


@pytest.fixture(scope="module")
def answers(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Questions with two answers each, and a reward."""
    file = tmp_path_factory.mktemp("data") / "answers.jsonl"
    rows = [
        {"prompt": f"add {i} and {i + 1}", "chosen": f"{2 * i + 1} is the sum", "rejected": "no" + " idea" * (i % 3)} for i in range(20)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Bench(base, file)


@pytest.fixture(scope="module")
def rated(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    file = tmp_path_factory.mktemp("data") / "rated.jsonl"
    rows = [{"prompt": f"add {i} and {i + 1}", "response": "it is so " * (i % 4 + 1), "reward": i % 3 / 2} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Bench(base, file)


@pytest.mark.slow
def test_preferences_and_a_variant_of_lora_with_a_sharded_model(answers: Bench, tmp_path: Path) -> None:
    compare(answers, tmp_path, ["dpo-dora"], 2)


@pytest.mark.slow
def test_every_objective_with_a_sharded_model(answers: Bench, rated: Bench, bench: Bench, tmp_path: Path) -> None:
    assert main(argv(bench, tmp_path / "reference", "lora", seed=5)) == 0
    compare(bench, tmp_path, ["rho1"], 2, rho1_reference=tmp_path / "reference/final")
    for name in ANSWERS.keys() - {"dpo-dora", "rho1", "critic", "verifiable"}:
        compare(answers, tmp_path, [name], 2)
    compare(rated, tmp_path, ["critic", "verifiable"], 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["checkpointed", "int8"])
def test_large_layers_that_are_gathered_by_themselves(method: str, bench: Bench, tmp_path: Path, write_tiny_tokenizer: Any) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer, n_embd=256, intermediate_size=2049)
    assert LARGE < 4 * 256 * 2049
    words = {"train.max_steps": 3, "optimizer.lr": 0.001, **METHODS[method]}
    assert main(argv(Bench(base, bench.data), tmp_path / "one", method, **words)) == 0
    by_processes([argv(Bench(base, bench.data), tmp_path / "fsdp", method, devices=2, strategy="fsdp", **words)])
    assert_alike(tmp_path / "one", tmp_path / "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["tail", "full"])
def test_offloaded_rows_train_as_others(method: str, bench: Bench, tmp_path: Path) -> None:
    assert main(argv(bench, tmp_path / "one", method)) == 0
    assert main(argv(bench, tmp_path / "alone", method, cpu_offload=True)) == 0
    by_processes([argv(bench, tmp_path / "two", method, devices=2, cpu_offload=True)])
    for name in ("alone", "two"):
        assert_alike(tmp_path / "one", tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "groups"), [("full", None), ("experts", 2), ("skip", 2)])
def test_a_mixture_whose_ranks_do_not_use_the_same_experts(
    method: str, groups: int | None, bench: Bench, tmp_path: Path, write_tiny_tokenizer: Any
) -> None:
    sizes = {"n_expert_groups": groups, "n_topk_groups": 1, "n_topk_scores_per_group": 2} if groups else {}
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer, mlp_class_name="LLaMAMoE", n_expert=8, n_expert_per_token=2, **sizes)
    # small steps, so that rounding changes no choice of experts
    compare(Bench(base, bench.data), tmp_path, [method], 2, **{"optimizer": "SGD", "optimizer.lr": 0.01})


def steps_taken(folder: Path) -> dict[int, int]:
    """Return how often AdamW has updated each parameter that it has updated."""
    state = json.loads((folder / "training_state.json").read_text())["optimizer"]
    with safe_open(folder / "training_state.safetensors", "pt") as tensors:
        names = {number: dict(values["dict"])["step"]["tensor"] for number, values in state["dict"]}
        return {number: int(tensors.get_tensor(name)) for number, name in names.items()}


@pytest.mark.slow
def test_an_expert_without_tokens_stays_where_it_is(bench: Bench, tmp_path: Path, write_tiny_tokenizer: Any) -> None:
    """AdamW would move it by its momentum, and decay it, if it had a gradient of zero. One process is the oracle: its gradient is None."""
    sizes = {"mlp_class_name": "LLaMAMoE", "n_expert": 32, "n_expert_per_token": 2, "moe_intermediate_size": 16}
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer, **sizes)
    words = {"optimizer.lr": 0.001, "train.global_batch_size": 2, "train.max_steps": 4, "eval.interval": 4}
    runs = Bench(base, bench.data)
    assert main(argv(runs, tmp_path / "one", "experts", **words)) == 0
    by_processes([argv(runs, tmp_path / kind, "experts", devices=2, strategy=kind, **words) for kind in ("ddp", "fsdp")])
    taken = {name: steps_taken(tmp_path / name / "step-000004") for name in ("one", "ddp", "fsdp")}
    assert len(set(taken["one"].values())) > 2, "experts have taken part in different numbers of steps"
    expected = torch.load(tmp_path / "one/final/lit_model.pth.lora", weights_only=True)["model"]
    for kind in ("ddp", "fsdp"):
        assert taken[kind] == taken["one"]
        for row, wanted in zip(curve(tmp_path / kind), curve(tmp_path / "one"), strict=True):
            assert row == pytest.approx(wanted, rel=1e-5)
        weights = torch.load(tmp_path / kind / "final/lit_model.pth.lora", weights_only=True)["model"]
        for key in (key for key in expected if ".experts." in key):  # gates have gradients next to nothing, which AdamW magnifies
            assert torch.allclose(weights[key], expected[key], rtol=1e-3, atol=5e-3 * float(expected[key].abs().max())), key


@pytest.mark.slow
def test_three_and_four_processes(bench: Bench, tmp_path: Path) -> None:
    for devices in (3, 4):
        settings = {"train.global_batch_size": 12}
        one, more = tmp_path / f"{devices}-one", tmp_path / f"{devices}-more"
        assert main(argv(bench, one, "tail", **settings)) == 0
        by_processes([argv(bench, more, "tail", devices=devices, strategy="fsdp", **settings)])
        assert_alike(one, more)


# --- the choice ---


def settings_of(kind: type[Run], base: Path, data: Path, **values: Any) -> Any:
    from litgpt.data import JSON

    return kind(checkpoint_dir=base, data=JSON(json_path=data, val_split_fraction=0.1), **values)


@pytest.mark.parametrize(
    ("kind", "values", "what"),
    [
        (Lora, {"quantize": "bnb.nf4"}, r"quantize bnb.nf4 \(int8 works\)"),
        (Full, {"optimizer": "Adafactor"}, "optimizer Adafactor"),
        (Adapter, {"optimizer": "Muon", "cpu_offload": True}, "optimizer Muon"),
    ],
)
def test_what_does_not_work_with_a_sharded_model_is_refused(kind: type[Run], values: Any, what: str, base: Path, data: Path) -> None:
    settings = settings_of(kind, base, data, **values)
    if not settings.cpu_offload:
        strategy.require_shardable(settings, settings.method())
        settings.strategy = "fsdp"
    with pytest.raises(UserError, match=f"strategy fsdp does not work with {what}.*: leave it out, or give --strategy ddp"):
        strategy.require_shardable(settings, settings.method())


@pytest.mark.parametrize(("version", "is_refused"), [("2.10.0", True), ("2.11.0+cu130", True), ("2.12.0", False), ("2.13.0+cpu", False)])
def test_8_bits_are_refused_with_a_torch_that_cannot_shard_integers(
    version: str, is_refused: bool, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    settings = settings_of(Lora, base, data, quantize="int8")
    assert strategy.obstacles(settings, settings.method()) == [f"quantize int8 and torch {version} (2.12 works)"] * is_refused


class Memory:
    def __init__(self, available: int) -> None:
        self.available = available


class Joined:
    place = Place(0, 2, 0, 2, "", 0)


class OneOfTwo(Rank):
    def broadcast(self, value: Any) -> Any:
        return value


@pytest.mark.parametrize(("gib", "is_sharded"), [(100.0, False), (0.95, True)])
def test_auto_shards_a_model_of_which_a_copy_does_not_fit(
    gib: float, is_sharded: bool, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(int(gib * 2**30)))
    rank: Any = OneOfTwo(0, 2, group=Joined())  # type: ignore[arg-type]
    samples: list[Sample] = make_samples(8)
    settings = settings_of(Full, base, data)
    chosen, why = strategy.choose(settings, settings.method(), rank, samples, torch.float32)
    assert chosen == is_sharded
    assert why.startswith(f"strategy {'fsdp' if is_sharded else 'ddp'}: a copy of the model with gradients and optimizer takes about 0.")
    settings = settings_of(Lora, base, data, quantize="bnb.nf4")
    chosen, why = strategy.choose(settings, settings.method(), rank, samples, torch.float32)
    assert not chosen and ("fsdp does not work with quantize bnb.nf4" in why) == is_sharded


def test_the_reference_of_rho1_counts_until_it_is_freed(base: Path, data: Path, tmp_path: Path, write_tiny_tokenizer: Any) -> None:
    """Its numbers are those of its file, those of an adapter's base; training takes more than a small one."""
    sizes = {"n_embd": 512, "n_layer": 8, "intermediate_size": 2048}
    large = tiny.write_base(tmp_path / "large", write_tiny_tokenizer, **sizes)
    folder = tiny.write_adapter(tmp_path / "adapter", large, tiny.tiny(lora_r=2, lora_query=True), lora_r=2, lora_query=True)
    stored = sum(value.numel() for value in torch.load(large / "lit_model.pth", weights_only=True).values())

    def estimated(**values: Any) -> Any:
        settings = settings_of(Lora, base, data, **values)
        method = settings.method()
        return strategy.estimate_of(settings, method, method.config(base), make_samples(8), torch.bfloat16, False)[0]

    plain = estimated()
    for reference in (large, folder):
        need = estimated(objective="rho1", rho1_reference=reference)
        assert need.reference == 2 * stored > need.training + need.activations
        assert need.total == need.weights + 2 * stored == need.part(1) - need.gathered and need.part(4) == plain.part(4)
    need = estimated(objective="rho1", rho1_reference=base)
    assert plain.reference == 0 < need.reference and need.total == plain.total and need.part(4) == plain.part(4)


def test_cpu_offload_takes_fsdp_and_is_refused_with_ddp(base: Path, data: Path) -> None:
    settings = settings_of(Full, base, data, cpu_offload=True)
    chosen = strategy.choose(settings, settings.method(), Rank(), make_samples(8), torch.float32)
    assert chosen == (True, "strategy fsdp, as given (cpu_offload)")
    settings.strategy = "ddp"
    with pytest.raises(UserError, match=r"cpu_offload keeps parts of a sharded model, and strategy ddp has none: give --strategy fsdp"):
        strategy.require_shardable(settings, settings.method())


def test_one_process_is_not_sharded_and_more_processes_than_samples_are_refused(base: Path, data: Path) -> None:
    settings = settings_of(Full, base, data)
    assert not strategy.choose(settings, settings.method(), Rank(), make_samples(1), torch.float32)[0]
    settings.strategy = "fsdp"
    with pytest.raises(UserError, match="2 processes have only 1 training sample:"):
        strategy.choose(settings, settings.method(), Rank(0, 2), make_samples(1), torch.float32)
