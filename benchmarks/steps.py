"""The five-minute benchmark: LoRA and Skip2-LoRA side by side on this machine.

    python benchmark_skip2lora.py [--model NAME_OR_FOLDER] [--batch_size B] [--seq_length T] ...
    python benchmark_skip2lora.py --model Llama-2-7b-hf --count_only

Every configuration is measured in separate processes (`benchmarks.step.measure`), one without and one with the activation cache, so that
peaks of memory belong to one configuration. Comparisons use medians, which a single disturbed step does not change. The lower limit of a
cached step is the time of its two products with the frozen head at the same shapes, measured after every step. The lower limit of filling
the cache is the bare backbone's forward pass over the same batches.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.process import ROOT, in_worker
from benchmarks.report import bars, figure, less, percent
from benchmarks.runs import environment, finetune_arguments
from benchmarks.step import Settings, count, model_config
from litgpt import atomic, families as catalog
from litgpt.adapters.settings import model_settings
from litgpt.device import backbone_dtype, default_device, default_precision
from litgpt.errors import UserError
from litgpt.text import text_table

HUB = ROOT / "config_hub" / "finetune"
LORA = "Traditional LoRA (Query+Value)"
RECOMMENDED = "Skip2-LoRA (recommended)"
FIRST_BLOCKS = (2, 4, 6)
NOT_MEASURED: dict[str, Any] = {"uncached": None, "cached": None}
ON_CPU = ("SmolLM2-135M", 8, 128)  # model, batch size, sequence length
ON_CUDA = (  # GiB of memory from which on to use the model, batch size and sequence length
    (40, ("Llama-2-7b-hf", 8, 512)),
    (22, ("Llama-2-7b-hf", 4, 512)),
    (15, ("Llama-2-7b-hf", 2, 512)),
    (0, ("tiny-llama-1.1b", 4, 512)),
)
ITERATIONS = {"cpu": 5, "cuda": 10}


def configurations(model: str, lora_r: int) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return name -> adapter settings, and notes on configurations that do not fit the model.

    The settings are `litgpt finetune`'s defaults and those of config_hub's skip2lora.yaml.
    """
    # The state after a LoRA warm-up, if the preset has one: by then that LoRA is part of the backbone.
    preset = {**model_settings(finetune_arguments(_preset(model_config(model).name))), "skip2lora_warmup": False}
    wanted = {LORA: {**model_settings(finetune_arguments("DIR")), "lora_r": lora_r}}
    wanted |= {f"Skip2-LoRA ({n} blocks)": {**preset, "skip2lora_block_indices": list(range(n))} for n in FIRST_BLOCKS}
    wanted[RECOMMENDED] = preset
    possible, notes = {}, []
    for name, adapter in wanted.items():
        try:
            model_config(model, adapter)
            possible[name] = adapter
        except UserError as error:
            notes.append(f"{name} is left out: {error}")
    return possible, notes


def _preset(name: str) -> Path:
    """Return config_hub's skip2lora.yaml for a model; SmolLM2-135M's for a model that config_hub does not have."""
    for file in sorted(HUB.glob("*/skip2lora.yaml")):
        known = catalog.find(finetune_arguments(file)["checkpoint_dir"].name)
        if known and known["name"].removesuffix("-Instruct") == name.removesuffix("-Instruct"):
            return file
    return HUB / "smollm2-135m" / "skip2lora.yaml"


def isolated(settings: Settings, adapter: dict[str, Any], cached: bool) -> dict[str, Any]:
    """Run `measure` in a separate process. Return {"error": ...} if that fails."""
    return in_worker("benchmarks.step", {"settings": asdict(settings), "adapter": adapter, "cached": cached})


def run(settings: Settings, chosen: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Measure every configuration and print its block."""
    measured = []
    for name, adapter in chosen.items():
        row: dict[str, Any] = {
            "name": name,
            "adapter": adapter,
            "parameters": count(settings, adapter),
            "uncached": isolated(settings, adapter, False),
        }
        row["cached"] = isolated(settings, adapter, True) if model_config(settings.model, adapter).cut else None
        measured.append(row)
        print(f"\n{block(row)}", flush=True)
    return measured


def block(row: dict[str, Any]) -> str:
    """Return all figures of one configuration as text."""
    counts, plain, cached = row["parameters"], row["uncached"], row["cached"]
    lines = [
        f"total parameters      {counts['total']:,}",
        f"trainable parameters  {counts['trainable']:,}",
        f"LoRA parameters       {counts['lora']:,}",
        f"trainable ratio       {counts['ratio']:.4f} %",
    ]
    if "error" in plain:
        lines.append(f"FAILED without cache: {plain['error']}")
    else:
        lines += [f"forward pass          {_spread(plain['forward_ms'])}", f"backward pass         {_spread(plain['backward_ms'])}"]
        lines += [f"whole step            {_spread(plain['step_ms'])}", f"peak memory           {_memory(plain)}"]
    if cached and "error" in cached:
        lines.append(f"FAILED with cache: {cached['error']}")
    elif cached:
        lines += [f"cached: whole step    {_spread(cached['step_ms'])}", f"cached: peak memory   {_memory(cached)}"]
        lines.append(f"cache fill            {cached['fill_ms']['mean']:.2f} ms and {cached['cache_kib_per_sample']:.0f} KiB a sample")
    return "\n".join([row["name"], "-" * len(row["name"]), *(f"  {line}" for line in lines)])


def _spread(ms: dict[str, float]) -> str:
    return f"mean {ms['mean']:.2f} ms (min {ms['min']:.2f}, max {ms['max']:.2f}, std {ms['std']:.2f})"


def _memory(part: dict[str, Any]) -> str:
    return f"{part['peak_memory_gb']:.2f} GiB ({part['loaded_memory_gb']:.2f} GiB of it before the first step)"


def comparison(measured: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return name -> reductions in percent and speed-ups against LoRA, and the ratios to the limits. Unmeasured figures are missing."""
    base = measured[0]
    table = {}
    for row in measured:
        found = {"parameter_reduction_percent": less(base["parameters"]["trainable"], row["parameters"]["trainable"])}
        plain, cached, lora = (
            part if part and "error" not in part else None for part in (row["uncached"], row["cached"], base["uncached"])
        )
        if plain and lora:
            for part in ("forward", "backward", "step"):
                found |= _faster(part, lora[f"{part}_ms"]["median"], plain[f"{part}_ms"]["median"])
            found["memory_reduction_percent"] = less(lora["peak_memory_gb"], plain["peak_memory_gb"])
        if cached and lora:
            found |= _faster("cached_step", lora["step_ms"]["median"], cached["step_ms"]["median"])
            found["cached_memory_reduction_percent"] = less(lora["peak_memory_gb"], cached["peak_memory_gb"])
        if cached:
            found["cached_step_over_head_products"] = cached["step_ms"]["median"] / cached["products_ms"]["median"]
            found["fill_over_bare_forward"] = cached["fill_ms"]["median"] / cached["bare_forward_ms"]["median"]
        table[row["name"]] = found
    return table


def _faster(part: str, old: float, new: float) -> dict[str, float]:
    return {f"{part}_speedup": old / new, f"{part}_reduction_percent": less(old, new)}


def parameter_table(measured: list[dict[str, Any]], compared: dict[str, dict[str, float]]) -> str:
    rows = []
    for row in measured:
        counts = row["parameters"]
        change = percent(compared[row["name"]]["parameter_reduction_percent"]) if row is not measured[0] else ""
        millions, ratio = f"{counts['lora'] / 1e6:.2f} M", f"{counts['ratio']:.4f} %"
        rows.append([row["name"], f"{counts['total']:,}", f"{counts['trainable']:,}", f"{counts['lora']:,}", millions, ratio, change])
    return text_table([["", "total", "trainable", "LoRA", "LoRA", "trainable ratio", "against LoRA"], *rows])


def summary(measured: list[dict[str, Any]], compared: dict[str, dict[str, float]]) -> str:
    """Return the COMPARISON SUMMARY."""

    def timing(part: str, kind: str, key: str) -> str:
        rows = []
        for row in measured:
            found, figures = compared[row["name"]], row[kind] if row[kind] and "error" not in row[kind] else None
            if figures is None:
                rows.append([row["name"], "failed" if row[kind] else "none", *[""] * 6])
                continue
            gain = ["", ""]
            if f"{key}_speedup" in found and row is not measured[0]:
                gain = [_times(found[f"{key}_speedup"]), percent(found[f"{key}_reduction_percent"])]
            rows.append([row["name"], *(f"{figures[part][name]:.2f}" for name in ("mean", "min", "max", "std", "median")), *gain])
        return text_table([["milliseconds", "mean", "min", "max", "std", "median", "speed-up", "against LoRA"], *rows])

    sections = {
        "Parameter Count Comparison": parameter_table(measured, compared),
        "Forward Pass Benchmark": timing("forward_ms", "uncached", "forward"),
        "Backward Pass Benchmark": timing("backward_ms", "uncached", "backward"),
        "Whole Step": timing("step_ms", "uncached", "step"),
        "Cached Step (against LoRA's whole step: its gradients cross all blocks, so it has no cache)": timing(
            "step_ms", "cached", "cached_step"
        ),
        "Memory Usage": memory_table(measured, compared),
        "Against the Limit": limit_table(measured, compared),
    }
    return "\n\n".join(["COMPARISON SUMMARY\n==================", *(f"{title}\n{text}" for title, text in sections.items())])


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 100 else f"{ratio:,.0f}x"


def memory_table(measured: list[dict[str, Any]], compared: dict[str, dict[str, float]]) -> str:
    rows = []
    for row in measured:
        cells = [row["name"]]
        for kind, key in (("uncached", "memory_reduction_percent"), ("cached", "cached_memory_reduction_percent")):
            part, found = row[kind] or {"error": ""}, compared[row["name"]]
            cells.append("" if "error" in part else f"{part['peak_memory_gb']:.2f}")
            cells.append(percent(found[key]) if key in found and row is not measured[0] else "")
        rows.append(cells)
    return text_table([["peak GiB", "without cache", "against LoRA", "with cache", "against LoRA"], *rows])


def limit_table(measured: list[dict[str, Any]], compared: dict[str, dict[str, float]]) -> str:
    rows = []
    for row in measured:
        cached, found = row["cached"], compared[row["name"]]
        if cached and "error" not in cached:
            times = [f"{cached[key]['median']:.2f}" for key in ("step_ms", "products_ms", "fill_ms", "bare_forward_ms")]
            ratios = (found["cached_step_over_head_products"], found["fill_over_bare_forward"])
            rows.append([row["name"], *times[:2], f"{ratios[0]:.2f}x", *times[2:], f"{ratios[1]:.2f}x"])
    return text_table([["median ms", "cached step", "head products", "ratio", "fill a sample", "bare forward", "ratio"], *rows])


def picture(measured: list[dict[str, Any]], file: Path) -> None:
    """Draw bars for time, memory and parameters; nothing without matplotlib."""
    canvas = figure(15, 4.5)
    if canvas is None:
        return
    names = {row["name"]: row["name"].replace("Traditional ", "").replace("Skip2-LoRA", "Skip2") for row in measured}
    times, memory = {}, {}
    for row in measured:
        for kind in ("uncached", "cached"):
            if row[kind] and "error" not in row[kind]:
                label = names[row["name"]] + (", cached" if kind == "cached" else "")
                times[label], memory[label] = row[kind]["step_ms"]["median"], row[kind]["peak_memory_gb"]
    left, middle, right = canvas.subplots(1, 3)
    bars(left, "Training step", times, "ms")
    bars(middle, "Peak memory", memory, "GiB")
    bars(right, "Trainable parameters", {names[row["name"]]: row["parameters"]["trainable"] / 1e6 for row in measured}, "million")
    canvas.savefig(file, dpi=120)
    print(f"wrote {file}")


def settings_of(args: argparse.Namespace) -> Settings:
    """Return the settings of the command line, completed by what fits this machine. Raise UserError if they make no sense."""
    device = torch.device(args.device) if args.device else default_device()
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here. Leave --device out to use the CPU")
    model, batch_size, seq_length = ON_CPU
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory / 2**30
        model, batch_size, seq_length = next(choice for least, choice in ON_CUDA if memory >= least)
    settings = Settings(
        model=args.model or model,
        batch_size=args.batch_size or batch_size,
        seq_length=args.seq_length or seq_length,
        loss_share=args.loss_share,
        iterations=args.iterations or ITERATIONS[device.type],
        warmup=args.warmup,
        precision=args.precision or default_precision(device),
        device=str(device),
        lora_r=args.lora_r,
    )
    backbone_dtype(settings.precision)
    config = model_config(settings.model)
    if settings.seq_length > config.block_size:
        raise UserError(f"--seq_length {settings.seq_length} is longer than what {config.name} reads, {config.block_size}")
    return settings


def arguments() -> argparse.ArgumentParser:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise ValueError
        return int(text)

    def share(text: str) -> float:
        if not 0 < float(text) <= 1:
            raise ValueError
        return float(text)

    parser = argparse.ArgumentParser(description="LoRA and Skip2-LoRA side by side: parameters, time of a training step, memory.")
    parser.add_argument("--model", help="a named model (random weights) or a checkpoint folder. Default: by device and memory")
    parser.add_argument("--batch_size", type=positive, help="sequences in a step. Default: by device and memory")
    parser.add_argument("--seq_length", type=positive, help="tokens in a sequence. Default: 128 on a CPU, 512 on CUDA")
    parser.add_argument("--loss_share", type=share, default=0.25, help="share of the positions with loss, the answer's (default: 0.25)")
    parser.add_argument("--iterations", type=positive, help="timed steps. Default: 5 on a CPU, 10 on CUDA")
    parser.add_argument("--warmup", type=positive, default=2, help="steps before them (default: 2)")
    parser.add_argument("--precision", help="bf16-true, 32-true, ... Default: bf16-true where the device has it, else 32-true")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--lora_r", type=positive, default=8, help="rank of the traditional LoRA (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("out/benchmark"), help="folder for benchmark_results.json and a picture")
    parser.add_argument("--count_only", action="store_true", help="count parameters, measure nothing")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    try:
        settings = settings_of(args)
        chosen, notes = configurations(settings.model, settings.lora_r)
        if args.count_only:
            print("\n".join([settings.model, *notes]))
            measured = [{"name": name, "parameters": count(settings, adapter), **NOT_MEASURED} for name, adapter in chosen.items()]
            print(f"\nParameter Count Comparison\n{parameter_table(measured, comparison(measured))}")
            return 0
        print("\n".join([*(f"{key:<11} {value}" for key, value in asdict(settings).items()), *notes]))
        measured = run(settings, chosen)
        compared = comparison(measured)
        print(f"\n\n{summary(measured, compared)}\n")
        content = {
            "environment": environment(),
            "settings": asdict(settings),
            "configurations": measured,
            "comparison": compared,
        }
        atomic.write_text(args.out / "benchmark_results.json", json.dumps({"format": 1, **content}, indent=2) + "\n")
        print(f"wrote {args.out / 'benchmark_results.json'}")
        picture(measured, args.out / "benchmark_skip2lora.png")
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return int(any("error" in (row[kind] or {}) for row in measured for kind in ("uncached", "cached")))
