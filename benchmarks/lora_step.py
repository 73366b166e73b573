"""Training steps over the matrix products that they cannot do without, and the torch operators that they run.

    OMP_NUM_THREADS=1 taskset -c 1 python -m benchmarks.lora_step [--model NAME] [--precision 32-true] [--rounds 7] [--longer 120]

LoRA on all linear layers, a packed micro-batch: its frozen layers' products, forward and gradient for the input, and the head's. The bare
forward pass: the same products, forward alone. Answer-only LoRA from its cache: LoRA's products for the replies' rows alone. The cached
Skip2-LoRA step: the head's two products. Step and products alternate in one process, on one thread; times are CPU seconds, so that other
work on the machine counts less. Weights are random.

N rows of the packed micro-batch, n of them with loss. --longer adds tokens to each sample's prompt.
"""

from __future__ import annotations

import argparse
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.runs import environment
from benchmarks.step import Settings, build, frozen_products, head_products
from litgpt.activations.cache import Activations, CacheSettings, Recompute, activations, is_flat
from litgpt.activations.prompts import replies
from litgpt.lora import GPT
from litgpt.loss import HeadLoss, loss_of
from litgpt.optim import make_optimizer
from litgpt.packing import pack
from litgpt.sample import Sample
from litgpt.text import markdown_table

STEM, OWN, ANSWERS = 24, (20, 28, 33, 38, 41, 46, 55, 68), 0.55  # as 8 docstrings: N = 353, n = 184
LORA = {f"lora_{name}": True for name in ("query", "key", "value", "projection", "mlp")} | {"lora_r": 8, "lora_alpha": 16}
SKIP = {"skip2lora_enabled": True, "lora_r": 16, "lora_alpha": 16}
# operators that compute nothing: they make views, allocate, or call others
EMPTY = """
t transpose slice as_strided view expand unsqueeze split narrow reshape to detach select flatten split_with_sizes _unsafe_view alias
unflatten unbind squeeze permute matmul linear _to_copy view_as item _local_scalar_dense empty empty_like empty_strided new_empty resize_
new_zeros zeros zeros_like contiguous result_type resolve_conj resolve_neg
"""
INVOCATION = [1, 2, 3]  # opens each reply
CONFIGURATIONS: dict[str, tuple[dict[str, Any], bool]] = {  # name -> adapters, True if the cache is used
    "LoRA step": ({**LORA, "lora_dropout": 0.05}, False),
    "LoRA step, no dropout": (LORA, False),
    "answer-only LoRA step": ({**LORA, "lora_dropout": 0.05, "alora_enabled": True, "alora_invocation_tokens": INVOCATION}, True),
    "cached step, all taps": ({**SKIP, "skip2lora_block_indices": "all"}, True),
    "cached step, 6 taps": ({**SKIP, "skip2lora_block_indices": "last:6"}, True),
}


def samples(vocab_size: int, longer: int = 0) -> list[Sample]:
    """Return samples that share a stem, of the lengths above, with loss at the last share of their own tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (STEM + sum(OWN) + (1 + longer) * len(OWN),), generator=generator).tolist()
    stem, rest = ids[:STEM], ids[STEM:]
    result = []
    for length in OWN:
        answer, length = round(ANSWERS * length), length + longer
        own, rest = rest[: length + 1], rest[length + 1 :]
        mask = bytearray(STEM + length + 1 - answer) + bytearray(b"\1") * answer
        prompt = (stem + own)[: mask.index(1) - len(INVOCATION)]
        result.append(Sample(array("i", prompt + INVOCATION + (stem + own)[mask.index(1) :]), mask))
    return result


def training_step(model: GPT, source: Activations) -> Callable[[], None]:
    """Return a step of training on all samples of the source, as `litgpt.train.loop` takes it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, head_loss = make_optimizer({"class_path": "AdamW", "init_args": {"lr": 1e-4}}, trained), HeadLoss.of(model)
    indices = range(len(source.samples))
    model.train()

    def step() -> None:
        features = source(indices)
        (loss_of(model, features, head_loss) / len(features.targets)).backward()
        torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bare_forward(model: GPT, source: Recompute) -> Callable[[], None]:
    """Return the pass from the embedding to the last norm of the packed batch."""
    batch = pack(source.samples, source.device, source.stem)

    @torch.no_grad()
    def run() -> None:
        pos = model.packed_positions(batch.packing)
        x = model.embed(batch.ids, pos)
        for block in model.blocks:
            x = block(x, pos)
        model.transformer["ln_f"](x)

    return run


def block_products(model: GPT, rows: int, backward: bool) -> Callable[[], None]:
    """Return the products of the blocks' frozen linear layers for N rows, with the gradients' if `backward`."""
    layers = []
    for block in model.blocks:
        each = (getattr(layer, "linear", layer) for layer in (block.attn.qkv, block.attn.proj, *block.mlp.children()))
        layers += [layer for layer in each if hasattr(layer, "in_features")]
    return frozen_products(layers, rows, model.dtype, backward)


def run_both(first: Callable[[], None], second: Callable[[], None]) -> None:
    first()
    second()


def seconds(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def saved_bytes(run: Callable[[], None]) -> int:
    """Return the bytes that autograd keeps for the backward pass, each memory once, parameters excepted."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not (tensor._base is not None and isinstance(tensor._base, torch.nn.Parameter)):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = max(kept.get(storage.data_ptr(), 0), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept.values())


def counted(run: Callable[[], None]) -> tuple[dict[str, int], int]:
    """Return how often each operator of a run is called, and the most bytes that are allocated at once during it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    counts = {event.key.removeprefix("aten::"): event.count for event in profiler.key_averages() if event.key.startswith("aten::")}
    events: Any = profiler.profiler
    changes = sorted((event.start_ns(), event.nbytes()) for event in events.kineto_results.events() if event.name() == "[memory]")
    return counts, max(accumulate(change for _, change in changes))


def compare(run: Callable[[], None], products: Callable[[], None], rounds: int) -> list[str]:
    """Return the cells of a row: the least milliseconds of both and their ratio, operators, saved bytes, peak."""
    run()
    products()
    pairs = [(seconds(run), seconds(products)) for _ in range(rounds)]
    step, least = (min(column) for column in zip(*pairs, strict=True))
    counts, peak = counted(run)
    computing = sum(count for name, count in counts.items() if name not in EMPTY.split())
    sizes = [f"{size / 2**20:.0f}" for size in (saved_bytes(run), peak)]
    return [f"{1000 * step:.0f}", f"{1000 * least:.0f}", f"{step / least:.2f}x", f"{sum(counts.values()):,}", f"{computing:,}", *sizes]


def measure(settings: Settings, rounds: int, longer: int) -> list[list[str]]:
    """Return the rows of the table."""
    rows, every = [], STEM + sum(OWN) + longer * len(OWN)
    for name, (adapter, cached) in CONFIGURATIONS.items():
        model = build(settings, adapter)
        device, data = torch.device(settings.device), samples(model.config.vocab_size, longer)
        source: Activations = Recompute(model, data, device)
        loss_rows = sum(sample.n_targets for sample in data)
        head = head_products(model, replace(settings, batch_size=1, seq_length=loss_rows, loss_share=1.0))
        if cached:
            source = activations(model, data, range(len(data)), "", CacheSettings("memory", Path(), model.dtype), device)
        if is_flat(model):
            rows.append([name, *compare(training_step(model, source), head, rounds)])
            continue
        learned = sum(stop - start for sample in data for start, stop in replies(sample, INVOCATION)) if cached else every
        blocks = block_products(model, learned, True)
        rows.append([name, *compare(training_step(model, source), partial(run_both, blocks, head), rounds)])
        if adapter is LORA:
            plain = build(settings, {})
            source = Recompute(plain, data, device)
            forward = block_products(plain, every, False)
            rows.append(["bare forward", *compare(bare_forward(plain, source), forward, rounds)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="SmolLM2-135M")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--longer", type=int, default=0)
    args = parser.parse_args()
    settings = Settings(args.model, len(OWN), max(OWN), 1.0, 1, 0, args.precision, "cpu", 8)
    table = measure(settings, args.rounds, args.longer)
    machine = environment()
    print(f"{machine['date']}, {machine['processor']}, torch {machine['torch']}, {args.precision}, {args.model}\n")
    print(
        markdown_table(["", "CPU ms", "products, ms", "ratio", "operators", "that compute", "kept for backward, MiB", "peak, MiB"], table)
    )


if __name__ == "__main__":
    main()
