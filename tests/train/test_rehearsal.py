"""`--dry_run true` says what the run then does, and leaves every file as it was."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from litgpt.__main__ import main
from litgpt.sample import Sample
from litgpt.tokenizer import Tokenizer
from litgpt.train.loop import Batch, Loop
from litgpt.train.rehearsal import show_sample
from litgpt.train.resume import State
from tests.helpers import runs as finetune_runs, tiny
from tests.helpers.cases import first
from tests.helpers.runs import files, finetune

SKIP2 = {"lora_r": 4, "lora_query": False, "lora_value": False, "skip2lora_enabled": True, "skip2lora_block_indices": "all"}
TAIL = {"lora_r": 4, "skip2lora_enabled": True, "skip2lora_output_layer": "transformer.h.1", "skip2lora_block_indices": "[0]"}


@pytest.mark.parametrize(
    ("command", "settings"),
    first(
        [
            ("finetune_lora", {}),
            ("finetune_lora", SKIP2),
            ("finetune_lora", {**SKIP2, "skip2lora_cache": "off"}),
            ("finetune_lora", TAIL),
            ("finetune_lora", {**SKIP2, "lora_query": True, "skip2lora_warmup_steps": 3}),
            ("finetune_full", {}),
        ],
        2,
    ),
    ids=["lora", "skip2lora", "no cache", "tail", "warm-up", "full"],
)
def test_writes_nothing(command: str, settings: dict[str, object], base: Path, data: Path, tmp_path: Path) -> None:
    before = files(base), files(data.parent)
    dry = finetune(command, base, data, tmp_path / "out", dry_run=True, **settings)
    assert dry.code == 0, dry.err
    assert (files(base), files(data.parent)) == before
    assert not list(tmp_path.iterdir())


def report(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def argv(base: Path, data: Path, out: Path, **settings: object) -> list[str]:
    options = {**finetune_runs.SETTINGS, **settings}
    given = [word for key, value in options.items() for word in (f"--{key}", str(value).lower() if isinstance(value, bool) else str(value))]
    words = ["--data", str(data), "--data.val_split_fraction", "0.1", "--out_dir", str(out)]
    return ["finetune_lora", str(base), *words, *given]


def test_steps_and_cache_are_those_of_the_run(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litgpt.train.rehearsal.gib", lambda count: f"{count:.0f} bytes")
    said = report([*argv(base, data, tmp_path / "out", **SKIP2), "--dry_run", "true"], capsys)
    assert said.endswith("dry run: nothing was written\n")
    run = finetune("finetune_lora", base, data, tmp_path / "out", skip2lora_cache="disk", **SKIP2)
    steps = re.search(r"steps +(\d+) \(", said)
    assert steps and int(steps[1]) == run.report["steps"] == 6
    size = sum(path.stat().st_size for path in (tmp_path / "activation_cache").rglob("activations.bin"))
    assert re.search(rf"activation cache +{size} bytes", said) and size > 0
    for line in ("a step", "a step from the cache", "memory", "memory measured here", "training"):
        assert re.search(rf"^ +{line} +(about )?\d", said, re.MULTILINE), said
    without = report([*argv(base, data, tmp_path / "other", skip2lora_cache="off", **SKIP2), "--dry_run", "true"], capsys)
    assert "from the cache" not in without


@pytest.mark.parametrize(("longest", "sizes"), [(1e9, {1, 6}), (0.0, {1})])
def test_a_long_step_is_not_measured_as_a_whole(
    longest: float,
    sizes: set[int],
    base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stepped, step = set(), Loop.step

    def counted(loop: Loop, state: State, batch: Batch) -> dict[str, float]:
        stepped.add(len(batch.indices))
        return {**step(loop, state, batch), "step_time": float(batch.tokens)}

    monkeypatch.setattr(Loop, "step", counted)
    monkeypatch.setattr("litgpt.train.rehearsal.LONG_STEP", longest)
    options = {"train.global_batch_size": 6, "train.micro_batch_size": 1}
    said = report([*argv(base, data, tmp_path / "out", **options), "--dry_run", "true"], capsys)
    assert stepped == sizes
    assert re.search(r"a step +about [1-9]\d+\.\d\d s", said)  # a second a token: as long as a whole step, in both cases


def test_products_of_both_kinds_of_lora(base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same line for LoRA and for answer-only LoRA; none where no prompt is masked, or Skip2-LoRA is trained."""
    options = {"lora_block_indices": "[2, -1]", "data.mask_prompt": True}
    (line,) = {
        match[0]
        for more in ({}, {"alora_enabled": True})
        for match in [
            re.search(
                "products of an epoch .*", report([*argv(base, data, tmp_path / "out", **options, **more), "--dry_run", "true"], capsys)
            )
        ]
        if match
    }
    numbers = re.fullmatch(
        r"products of an epoch +LoRA (\S+) TFLOP; answer-only LoRA (\S+), and (\S+) once for the prompts: (\S+) of (\S+) .*", line
    )
    assert numbers
    plain, answers, once, own, rows = (float(number.replace(",", "")) for number in numbers.groups())
    block, blocks = 32 * 64 + 32 * 32 + 3 * 32 * 72, 5
    assert once == pytest.approx(2 * blocks * block * rows / 1e12, rel=2e-2)
    assert plain - answers == pytest.approx(4 * (blocks - 2) * block * (rows - own) / 1e12, rel=2e-2)
    for others in ({}, {**SKIP2, "data.mask_prompt": True}):
        assert "products of" not in report([*argv(base, data, tmp_path / "out", **others), "--dry_run", "true"], capsys)


def test_the_sample_shows_what_carries_loss(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer(base)
    question, answer = tokenizer.ids("one two"), tokenizer.ids("three")
    show_sample(Sample(array("i", question + answer), bytearray([0] * len(question) + [1] * len(answer))), tokenizer)
    shown = capsys.readouterr().out
    assert shown.endswith(f"{tokenizer.decode(question)}»{tokenizer.decode(answer)}«\n")


def test_an_earlier_run_is_in_nobodys_way(base: Path, data: Path, tmp_path: Path) -> None:
    """The run would be refused; a rehearsal writes nothing there."""
    (tmp_path / "out" / "final").mkdir(parents=True)
    dry = finetune("finetune_lora", base, data, tmp_path / "out", dry_run=True)
    assert dry.code == 0, dry.err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "final"]


def test_nothing_is_converted(data: Path, tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    model = tmp_path / "model"
    tiny.hf_llama(vocab_size=512, max_position_embeddings=128).save_pretrained(model)
    write_tiny_tokenizer(model)
    before = files(tmp_path)
    dry = finetune("finetune_lora", model, data, tmp_path / "out", dry_run=True)
    assert dry.code == 1
    assert f"litgpt convert_to_litgpt {model}" in dry.err
    assert files(tmp_path) == before


def test_nothing_is_downloaded(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dry = finetune("finetune_lora", base, None, tmp_path / "out", "--data", "Alpaca", dry_run=True)
    assert dry.code == 1
    assert "would be downloaded" in dry.err
    assert not list(tmp_path.iterdir())


def test_the_measured_steps_are_real(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go through the loop's own step, with and without the cache."""
    from litgpt.activations.cache import ActivationCache

    taken = []
    real = Loop.step

    def step(self: Loop, *args: object) -> float:
        taken.append(isinstance(self.activations, ActivationCache))
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Loop, "step", step)
    assert finetune("finetune_lora", base, data, tmp_path / "out", dry_run=True, **SKIP2).code == 0
    assert taken == [False] * 3 + [True] * 2  # the first one is a micro-batch
    assert torch.is_grad_enabled()
