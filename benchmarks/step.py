"""Measure one configuration: parameters, the parts of a training step, filling the cache, peak memory, and their lower limits.

A step is a real one: sequences of T tokens with next-token loss at the last share of the positions, AdamW on the adapters. The frozen
head's gradient for its input is made together with the loss (`litgpt.loss`), so it counts as forward, for all configurations alike.

N loss positions of a batch, B sequences, T positions, d `n_embd`, V `padded_vocab_size`, C rows of a chunk of logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch

from litgpt import checkpoint
from litgpt.activations.cache import FILL_TOKENS, ActivationCache, Activations, CacheSettings, Recompute, activations
from litgpt.adapters.base import adapter_parameters
from litgpt.device import backbone_dtype
from litgpt.errors import UserError
from litgpt.logs import peak_memory_gb
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.loss import CHUNK_BYTES, HeadLoss, loss_of
from litgpt.model import GPT as BaseGPT
from litgpt.optim import make_optimizer
from litgpt.packed import Packed, pack
from litgpt.sample import Sample

BATCHES = 4  # different ones, in turn
FILLS = 2  # timed passes that fill the cache, after an untimed one
# Named models whose checkpoints share one weight between embedding and head. A checkpoint folder has this information itself.
TIED = ("SmolLM2", "Llama-3.2")


@dataclass(frozen=True)
class Settings:
    """The settings that all configurations share."""

    model: str
    batch_size: int
    seq_length: int
    loss_share: float
    iterations: int
    warmup: int
    precision: str
    device: str
    lora_r: int

    @property
    def loss_positions(self) -> int:
        """Return the number of positions with loss in a sequence."""
        return max(1, round(self.loss_share * self.seq_length))

    def autocast(self) -> AbstractContextManager[Any]:
        if not self.precision.endswith("-mixed"):
            return nullcontext()
        kind = torch.bfloat16 if self.precision.startswith("bf16") else torch.float16
        return torch.autocast(torch.device(self.device).type, dtype=kind)


def model_config(model: str, adapter: dict[str, Any] | None = None) -> Config:
    """Return the config of a named model or a checkpoint folder. Raise UserError if it is unknown or the adapters do not fit."""
    if Path(model).is_dir():
        return Config.from_checkpoint(model, **adapter or {})
    return Config.from_name(model, **adapter or {})


def count(settings: Settings, adapter: dict[str, Any]) -> dict[str, Any]:
    """Return `parameters` of a model without allocating its weights."""
    with torch.device("meta"):
        model = GPT(model_config(settings.model, adapter))
    if Path(settings.model).is_dir():
        weights = checkpoint.load_weights(Path(settings.model) / checkpoint.WEIGHTS)
        tied = checkpoint.is_tied(weights)
    else:
        tied = model.config.name.startswith(TIED)
    if tied:
        model.tie_head()
    return parameters(model)


def parameters(model: GPT) -> dict[str, Any]:
    """Return parameter counts; `ratio` is trainable over total, in percent."""
    mark_only_lora_as_trainable(model)
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = sum(p.numel() for p in adapter_parameters(model).values())
    return {"total": total, "trainable": trainable, "lora": lora, "ratio": 100 * trainable / total}


def build(settings: Settings, adapter: dict[str, Any]) -> GPT:
    """Return the model on its device, with the checkpoint's weights, or with random ones that are the same for every configuration."""
    config, dtype = model_config(settings.model, adapter), backbone_dtype(settings.precision)
    source = Path(settings.model) / checkpoint.WEIGHTS
    weights = checkpoint.load_weights(source) if Path(settings.model).is_dir() else random_weights(config, dtype, settings.device)
    with torch.device("meta"):
        model = GPT(config)
    checkpoint.load_base(model, weights, dtype, source)
    mark_only_lora_as_trainable(model)
    model.to(settings.device)
    if not settings.precision.endswith("-mixed"):
        pack(model, backward=True)
    return model


def random_weights(config: Config, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Return N(0, 0.02) matrices as of a bf16 checkpoint, norms of 1, biases of 0."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in BaseGPT(config).state_dict().items()}
    weights = {name: torch.full(shape, float(not name.endswith("bias")), dtype=dtype, device=device) for name, shape in shapes.items()}
    for value in weights.values():
        if value.dim() == 2:
            value.copy_(value.normal_(std=0.02).bfloat16())
    if config.name.startswith(TIED):
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def random_samples(settings: Settings, vocab_size: int) -> list[Sample]:
    """Return sequences with `seq_length` inputs each and loss at the last positions."""
    random, length = Random(0), settings.seq_length + 1
    mask = bytearray(length - settings.loss_positions) + bytearray(b"\1") * settings.loss_positions
    return [Sample(array("i", random.choices(range(vocab_size), k=length)), mask) for _ in range(BATCHES * settings.batch_size)]


def clock(device: str) -> float:
    """Return the time in seconds, after all pending work on the device is done."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter()


def time_steps(model: GPT, source: Activations, settings: Settings, beside: Callable[[], None] | None = None) -> dict[str, Any]:
    """Return milliseconds of training steps and their parts, and the loss of the first and the last step.

    `beside` is timed after each step.
    """
    optimizer = make_optimizer("AdamW", [p for p in model.parameters() if p.requires_grad])
    head_loss, device = HeadLoss.of(model), settings.device
    times: dict[str, list[float]] = {"forward_ms": [], "backward_ms": [], "step_ms": [], "products_ms": []}
    losses = []
    model.train()
    for i in range(settings.warmup + settings.iterations):
        first = i % BATCHES * settings.batch_size
        start = clock(device)
        with settings.autocast():
            features = source(range(first, first + settings.batch_size))
            loss = loss_of(model, features, head_loss) / len(features.targets)
        forward = clock(device)
        loss.backward()
        backward = clock(device)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end = clock(device)
        losses.append(loss.item())
        between = clock(device)
        if beside is not None:
            beside()
        parts = (forward - start, backward - forward, end - start, clock(device) - between)
        for values, seconds in zip(times.values(), parts, strict=True):
            values.append(1000 * seconds)
    if beside is None:
        del times["products_ms"]
    named = {name: summary(values[settings.warmup :]) for name, values in times.items()}
    return {**named, "first_loss": losses[0], "last_loss": losses[-1]}


def summary(values: Sequence[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    middle = {"mean": statistics.fmean(values), "median": statistics.median(values)}
    return {**middle, "min": min(values), "max": max(values), "std": spread}


def head_products(model: GPT, settings: Settings) -> Callable[[], None]:
    """Return a function that does the two matrix products of a cached step: N rows in the chunks of the loss."""
    with settings.autocast():
        dtype = model.compute_dtype(torch.device(settings.device))
    N = settings.batch_size * settings.loss_positions
    rows = max(1, min(N, CHUNK_BYTES // (model.config.V * dtype.itemsize)))
    runs = [frozen_products([model.head], min(rows, N - first), dtype) for first in range(0, N, rows)]

    def run() -> None:
        for products in runs:
            products()

    return run


def frozen_products(layers: Sequence[Any], rows: int, dtype: torch.dtype, backward: bool = True) -> Callable[[], None]:
    """Return a function that does the products of frozen linear layers for so many rows, and for their gradients, as training does them."""
    device = next(layers[0].parameters(), torch.empty(0)).device
    space = cache(lambda size, _: torch.randn(rows, size, device=device).to(dtype))
    forward, back = list[Callable[[], Any]](), list[Callable[[], Any]]()
    for layer in layers:
        x, grad = space(layer.in_features, "read"), space(layer.out_features, "read")
        if isinstance(packed := getattr(layer, "packed", None), Packed):
            forward.append(partial(packed.times, x))
            back.append(partial(packed.back, grad))
        else:
            weight = layer.weight.detach().to(dtype)
            forward.append(partial(torch.mm, x, weight.t(), out=space(layer.out_features, "written")))
            back.append(partial(torch.mm, grad, weight, out=space(layer.in_features, "written")))

    def run() -> None:
        for product in (*forward, *(reversed(back) if backward else ())):
            product()

    return run


@torch.no_grad()
def bare_forward(model: GPT, samples: Sequence[Sample], settings: Settings) -> None:
    """Run embedding, blocks and last norm in the batches of the filling pass, and keep nothing."""
    device = torch.device(settings.device)
    size = max(1, FILL_TOKENS["cpu" if device.type == "cpu" else "cuda"] // settings.seq_length)
    for first in range(0, len(samples), size):
        ids = torch.stack([torch.frombuffer(sample.input_ids, dtype=torch.int32)[:-1] for sample in samples[first : first + size]])
        ids = ids.long().to(device)  # (B, T), all of one length
        pos = model.positions(ids)
        x = model.embed(ids, pos)
        for block in model.blocks:
            x = block(x, pos)
        model.transformer["ln_f"](x)


def fill_cache(model: GPT, samples: list[Sample], settings: Settings) -> tuple[Activations, dict[str, Any]]:
    """Return a cache in memory, and the milliseconds per sample to fill it and of the bare forward pass."""
    keep = CacheSettings("memory", Path(), model.dtype)
    device, filled, bare = torch.device(settings.device), [], []
    for _ in range(1 + FILLS):
        with settings.autocast():
            start = clock(settings.device)
            cache = activations(model, samples, range(len(samples)), "", keep, device)
            middle = clock(settings.device)
            bare_forward(model, samples, settings)
        filled.append(1000 * (middle - start) / len(samples))
        bare.append(1000 * (clock(settings.device) - middle) / len(samples))
    if not isinstance(cache, ActivationCache):
        raise UserError("there is not enough memory for the activation cache: lower --batch_size or --seq_length")
    assert isinstance(cache.store, torch.Tensor)
    size = cache.store.nbytes / len(samples) / 1024
    return cache, {"fill_ms": summary(filled[1:]), "bare_forward_ms": summary(bare[1:]), "cache_kib_per_sample": size}


def measure(settings: Settings, adapter: dict[str, Any], cached: bool) -> dict[str, Any]:
    """Measure one configuration, with or without the cache in memory. Call it once per process: the peak of memory is the process's."""
    device = torch.device(settings.device)
    model = build(settings, adapter)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    samples = random_samples(settings, model.config.vocab_size)
    result = {"parameters": parameters(model), "loaded_memory_gb": held / 2**30, "threads": torch.get_num_threads()}
    if cached:
        cache, filled = fill_cache(model, samples, settings)
        result |= filled | time_steps(model, cache, settings, head_products(model, settings))
    else:
        result |= time_steps(model, Recompute(model, samples, device), settings)
    return {**result, "peak_memory_gb": peak_memory_gb(device)}


def main() -> None:
    """Print `measure`'s result as JSON, for the job that `benchmarks.process.in_worker` passes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", type=json.loads, required=True)
    job = parser.parse_args().worker
    try:
        print(json.dumps(measure(Settings(**job["settings"]), job["adapter"], job["cached"])))
    except UserError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
