"""Placement on a GPU, without one: on `tests.helpers.on_cuda` every part computes what it does on the CPU, and no tensor is left behind.

How often the CPU waits for the device is counted: until it goes on, the device has nothing to do.
"""

from __future__ import annotations

import csv
import json
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt.activations.cache import CacheSettings, Recompute, activations
from litgpt.api import LLM
from litgpt.args import TrainArgs
from litgpt.device import use
from litgpt.generate import drafts
from litgpt.generate.engine import Batch, Row, generate_batch
from litgpt.generate.sampling import Sampling
from litgpt.lora import mark_only_lora_as_trainable
from litgpt.loss import HeadLoss, loss_of
from litgpt.optim import make_optimizer
from litgpt.sample import Sample
from litgpt.train.loop import Batches, Loop
from litgpt.train.parallel import Rank
from litgpt.train.resume import State
from tests.helpers import tiny
from tests.helpers.cases import quick
from tests.helpers.on_cuda import CUDA, DeviceError, cuda
from tests.helpers.runs import finetune

LORA = {f"lora_{part}": True for part in ("query", "value", "mlp")} | {"lora_r": 2}
SKIP = {"skip2lora_enabled": True, "skip2lora_block_indices": [0, 2], "lora_r": 2}
MOE = {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "router_aux_loss_coef": 0.1}


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x + torch.ones(2, 3),
        lambda x: torch.ones(2, 3)[torch.zeros(1, dtype=torch.long, device=CUDA)],
        lambda x: x.index_select(0, torch.zeros(1, dtype=torch.long)),
        lambda x: torch.cat([x, torch.ones(2, 3)]),
        lambda x: x.numpy(),
        lambda x: x.bernoulli(generator=torch.Generator()),
    ],
)
def test_the_stand_in_refuses_what_cuda_refuses(work: Any) -> None:
    with cuda(), pytest.raises(DeviceError):
        work(torch.ones(2, 3, device=CUDA))


def test_the_stand_in_counts_waits() -> None:
    with cuda() as device:
        x = torch.ones(2, 3).to(CUDA, non_blocking=True)
        assert x.is_cuda and (x @ x.T).device == x.new_zeros(1).device == CUDA and not device.waits
        assert x.sum().item() == 6 and len(x[x > 0]) == 6 and x.cpu().is_cpu and torch.ones(1).to(CUDA).is_cuda
        assert device.waits.total() == 4


def samples(mask_from: int = 10) -> list[Sample]:
    """Three samples that begin with the same 9 tokens."""
    texts = [[5] * 9 + [(7 * i * i + n) % 101 for i in range(n - 9)] for n in (20, 14, 25)]
    return [Sample(array("i", text), bytearray(int(i >= mask_from) for i in range(len(text)))) for text in texts]


FAMILIES: dict[str, dict[str, Any]] = {
    "experts": MOE,
    "shared experts": {**MOE, "n_shared_expert": 1, "shared_expert_gate": True},
    "alibi": {"alibi": True, "rotary_percentage": 0.0},
    "window": {"sliding_window_size": 6, "sliding_window_indices": [1, 0, 1, 0, 1]},
    "cap": {"attention_logit_softcapping": 20.0, "final_logit_softcapping": 10.0, "scale_embeddings": True},
    "sinks": {"attention_sinks": True},
    "two rotary tables": {"rope_local_base_freq": 50.0, "rope_indices": [1, 0, 1, 0, 1]},
    "learned positions": {"learned_positions": True, "rotary_percentage": 0.0},
    "neox": {"norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "bias": True, "parallel_residual": True},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA": LORA,
    "DoRA": {**LORA, "lora_variant": "dora"},
    "PiSSA": {**LORA, "lora_variant": "pissa"},
    "Skip2-LoRA": SKIP,
    "head": {**LORA, "lora_head": True},
}


def trained(settings: dict[str, Any], adapters: dict[str, Any], device: torch.device) -> tuple[float, float, list[list[int]]]:
    """Return the loss, the gradients' sum of squares, and answers of different lengths."""
    model = tiny.tiny(**settings, **adapters)
    if adapters:
        mark_only_lora_as_trainable(tiny.move_adapters(model))
    model.to(device).train()
    loss = loss_of(model, Recompute(model, samples(), device)([0, 1, 2]), HeadLoss.of(model))
    loss.backward()
    squares = sum(p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None)
    return loss.item(), squares, generate_batch(model.eval(), [[1, 2, 3, 4, 5], [7] * 18, [1, 2]], 4, Sampling(temperature=0.0))


CASES = [*((name, "LoRA") for name in FAMILIES), *(("", name) for name in ADAPTERS)]


@pytest.mark.parametrize(("family", "adapter"), quick(CASES, ("experts", "LoRA"), ("alibi", "LoRA"), ("", "DoRA"), ("", "Skip2-LoRA")))
def test_models_train_and_answer(family: str, adapter: str) -> None:
    settings = FAMILIES.get(family, {}), ADAPTERS[adapter]
    loss, squares, answers = trained(*settings, torch.device("cpu"))
    with cuda():
        found: Any = trained(*settings, CUDA)
        assert found == (pytest.approx(loss, rel=1e-5), pytest.approx(squares, rel=1e-4), answers)


WEIGHTED = [{"prompt": f"add {i} and {i + 1}", "completion": f"{2 * i + 1} is the sum", "weight": 1 + i % 2} for i in range(20)]
RATED = [{"prompt": f"add {i}", "completion": f"{2 * i + 1} is the sum", "correct": bool(i % 2)} for i in range(20)]
PAIRS = [{"prompt": f"add {i}", "chosen": f"{2 * i + 1} is the sum", "rejected": "no" + " idea" * (i % 3)} for i in range(20)]
RUNS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "weighted": ("finetune_lora", WEIGHTED, LORA),
    "cached": ("finetune_lora", WEIGHTED, {**SKIP, "skip2lora_cache": "disk"}),
    "added": ("finetune_lora", WEIGHTED, {**LORA, "data__prompt_style": "chatml", "train__replay": 4, "train__follow_ups": 0.5}),
    "answer-only": ("finetune_lora", WEIGHTED, {**LORA, "alora_enabled": True, "data__prompt_style": "chatml", "data__mask_prompt": True}),
    "critic": ("finetune_lora", RATED, {"objective": "critic", "value_head": "linear", "lora_r": 0}),
    "verifiable": ("finetune_lora", RATED, {**SKIP, "objective": "verifiable", "value_head": "mlp", "mtp_heads": 1}),
    "dpo": ("finetune_lora", PAIRS, {**LORA, "objective": "dpo"}),
    "kto": ("finetune_lora", PAIRS, {**SKIP, "objective": "kto"}),
    "warm-up": ("finetune_lora", WEIGHTED, {**LORA, **SKIP, "skip2lora_output_layer": "transformer.h.3", "skip2lora_warmup_steps": 2}),
    "chosen blocks": ("finetune_lora", WEIGHTED, {**SKIP, "skip2lora_block_indices": "auto:2"}),
    "fp16": ("finetune_lora", WEIGHTED, {**LORA, "precision": "16-true"}),
    "8 bits": ("finetune_lora", WEIGHTED, {**LORA, "quantize": "bnb.int8"}),
    "adapter": ("finetune_adapter_v2", WEIGHTED, {}),
    "full": ("finetune_full", WEIGHTED, {}),
}


@pytest.mark.parametrize("name", quick(RUNS, "cached", "added"))
def test_a_run_is_that_of_the_cpu(name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, rows, settings = RUNS[name]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = {"train__epochs": 1, "eval__max_new_tokens": 2, "eval__interval": 2, "lora_dropout": 0.0 if command == "finetune_lora" else None}

    def losses(device: str) -> list[float]:
        run = finetune(command, base, data, tmp_path / device, accelerator=device, **{**few, **settings})
        use("auto")
        assert run.code == 0, run.err
        with (tmp_path / device / "logs/version_0/metrics.csv").open(newline="") as file:
            return [float(row[name]) for row in csv.DictReader(file) for name in ("train_loss", "val_loss") if row[name]]

    expected = losses("cpu")
    with cuda():
        assert losses("cuda") == pytest.approx(expected, rel=1e-4)


def test_answers_are_those_of_the_cpu(base: Path) -> None:
    def answers(device: str) -> list[Any]:
        llm = LLM.load(base, precision="32-true", device=device)
        many = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 1, "max_new_tokens": 6}
        penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1, "logit_bias": {3: 1.0}}
        found: list[Any] = [llm.generate(["add 1 and 2", "a"], **many, **penalties), llm.generate("add 1", temperature=0, max_new_tokens=4)]
        ids: list[int] = llm.prompt_ids("add 1 and 2", 8)
        for draft in ("prompt_lookup", llm.model):
            how = Sampling(temperature=1.0), 3, llm.generator(1)
            found.append(list(drafts.generate(draft, llm.model, ids, len(ids) + 8, *how)))
        return found

    expected = answers("cpu")
    with cuda():
        assert answers("cuda") == expected


STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LoRA": (LORA, {}),
    "LoRA, noise": (LORA, {"noise": 5.0}),
    "DoRA": (ADAPTERS["DoRA"], {}),
    "LoRA on the output layer": (ADAPTERS["head"], {}),
    "Skip2-LoRA": (SKIP, {}),
    "Skip2-LoRA, cached": (SKIP, {"cached": True}),
    "all weights, bf16": ({}, {"dtype": torch.bfloat16}),
    "weights": (LORA, {"weights": array("f", [0.0, 1.0] * 10)}),
}


def waits_of_a_step(
    adapters: dict[str, Any],
    cached: bool = False,
    dtype: torch.dtype = torch.float32,
    noise: float = 0.0,
    weights: Any = None,
    micro_batch: int = 1,
    loss_from: int = 10,
) -> dict[str, int]:
    with cuda() as device:
        model = tiny.tiny(**adapters)
        if adapters:
            mark_only_lora_as_trainable(model)
        model.to(CUDA, dtype).neftune_alpha = noise
        data = samples(loss_from)
        for sample in data[:1]:
            sample.weights = weights
        own = activations(model, data, range(3), "training", CacheSettings("memory" if cached else "off", Path(), dtype), CUDA)
        optimizer = make_optimizer("AdamW", [p for p in model.parameters() if p.requires_grad])
        train = TrainArgs(global_batch_size=3, micro_batch_size=micro_batch, lr_warmup_steps=0, max_steps=2, epochs=None)
        loop = Loop(model, optimizer, train, Batches(data, 3, rank := Rank(device=CUDA), 1), own, rank)
        state, batches = State(), loop.batches.after(0)
        loop.step(state, next(batches))
        device.waits.clear()
        loop.step(state, next(batches))
        return dict(device.waits)


@pytest.mark.parametrize("name", quick(STEPS, "DoRA", "Skip2-LoRA, cached", "all weights, bf16", "weights"))
def test_a_step_waits_for_the_device_once(name: str) -> None:
    """When loss and gradient norm are read, whatever the number of micro-batches."""
    adapters, how = STEPS[name]
    assert waits_of_a_step(adapters, **how) == {"copy to cpu, train/loop.py": 1}


def test_a_batch_with_loss_in_the_common_beginning_waits_for_its_equal_rows() -> None:
    waits = waits_of_a_step(LORA, micro_batch=3, loss_from=4)
    assert waits == {"copy to cpu, train/loop.py": 1, "_unique2, loss.py": 1, "copy to cpu, loss.py": 1}


def test_decoding_waits_for_the_tokens_alone() -> None:
    with cuda() as device:
        batch = Batch(tiny.tiny().to(CUDA))
        rows = [Row(tokens, Sampling(temperature=0.0)) for tokens in ([1, 2, 3], [4] * 9)]
        for row in rows:
            batch.add(row)
        for row, logits in batch.step():
            row.draw(logits)
        device.waits.clear()
        drawn = batch.step()
        assert {place for place in device.waits if not place.startswith("copy to cuda")} == set() and len(drawn) == 2
