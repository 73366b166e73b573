"""What differs between the ways to fine-tune: how the model is built, what is trained, what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from litgpt import checkpoint
from litgpt.activations.choose import Choice
from litgpt.adapters.base import adapter_state, renew_adapters
from litgpt.adapters.settings import WarmupSettings, model_settings, warmup_settings
from litgpt.errors import UserError
from litgpt.lora import GPT, Skip2LoRA, mark_only_lora_as_trainable
from litgpt.lora import Config as LoRAConfig
from litgpt.quantize import count, is_quantised, quantise


@dataclass(frozen=True)
class Method:
    """A way to fine-tune: all that differs between the methods."""

    config: Callable[[Path], LoRAConfig]
    """the model's config, adapters included, for a checkpoint folder"""
    prepare: Callable[[GPT], None]
    """sets what is trained, on a model with its base weights"""
    save: Callable[[GPT, Path], None]
    """writes the trained weights into a folder"""
    load: Callable[[GPT, Path], None]
    """gives a model the trained weights of a folder that `save` wrote"""
    finish: Callable[[GPT, Path], None]
    """adds to the final folder what only it has; may change the model"""
    warmup: WarmupSettings = field(default_factory=WarmupSettings)

    def build(self, checkpoint_dir: Path, dtype: torch.dtype) -> GPT:
        """Return the model on the CPU, the backbone in `dtype`, its trained parameters marked. Raises UserError if they do not fit."""
        model = checkpoint.build_model(self.config(checkpoint_dir), checkpoint_dir, dtype)
        self._mark(model)
        return model

    def rebuild(self, model: GPT, checkpoint_dir: Path) -> None:
        """Put new adapters on the frozen weights of a model built by a method of this kind, as `build` would."""
        with torch.device("meta"):
            model.adapt(self.config(checkpoint_dir))
        renew_adapters(model)
        self._mark(model)

    def _mark(self, model: GPT) -> None:
        self.prepare(model)
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError("nothing would be trained: set lora_query, lora_value, ... or skip2lora_enabled to true")


def adapters(settings: dict[str, Any], quantize: str | None = None) -> Method:
    """Return LoRA and Skip2-LoRA as a method, by a command's settings. `quantize`: how frozen weights are stored."""
    config = model_settings(settings)

    def prepare(model: GPT) -> None:
        if quantize is not None:
            quantise(model, quantize)
        mark_only_lora_as_trainable(model)

    def save(model: GPT, folder: Path) -> None:
        checkpoint.save_weights({"model": adapter_state(model)}, folder / checkpoint.ADAPTER_WEIGHTS)  # type: ignore[dict-item]

    def load(model: GPT, folder: Path) -> None:
        file = folder / checkpoint.ADAPTER_WEIGHTS
        checkpoint.load_adapter(model, checkpoint.load_weights(file), file)

    def finish(model: GPT, folder: Path) -> None:
        if not any(isinstance(module, Skip2LoRA) for module in model.modules()):
            from litgpt.convert.merge import merged_weights

            whole = checkpoint.load_model(folder, model.dtype) if is_quantised(model) else model  # folded into the base as it was given
            checkpoint.save_weights(merged_weights(whole), folder / checkpoint.WEIGHTS)

    warmup = warmup_settings(settings)
    return Method(lambda folder: LoRAConfig.from_checkpoint(folder, **config), prepare, save, load, finish, warmup)


def full(tie_embeddings: bool | None = None) -> Method:
    """Every weight is trained, in the dtype that it is loaded in. The head shares the embedding as asked, or as the checkpoint has it."""

    def prepare(model: GPT) -> None:
        if tie_embeddings:
            model.tie_head()
        elif tie_embeddings is False and model.is_tied:
            model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())

    def save(model: GPT, folder: Path) -> None:
        checkpoint.save_weights(checkpoint.on_cpu(model.state_dict()), folder / checkpoint.WEIGHTS)

    def load(model: GPT, folder: Path) -> None:
        model.load_state_dict(checkpoint.load_weights(folder / checkpoint.WEIGHTS))

    return Method(LoRAConfig.from_checkpoint, prepare, save, load, lambda model, folder: None)


def describe(model: GPT, lora_flags: list[str], warmup: WarmupSettings) -> list[str]:
    """Lines that say what is trained and what runs frozen."""
    config, total = model.config, count(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [f"parameters: {trained:,} trainable of {total:,} ({100 * trained / total:.3f} %)"]
    if model.cut is None:
        return lines
    frozen = min(model.cut, config.n_layer)
    taps, behind = config.taps, tuple(block for block in config.lora_blocks if block >= frozen)
    if warmup.has_warmup:
        length = f"{warmup.skip2lora_warmup_steps} steps" if warmup.skip2lora_warmup_steps else f"{warmup.skip2lora_warmup_epochs:g} epochs"
        lines.append(f"LoRA warm-up: {length} on blocks {ranges(config.lora_blocks)}")
    if taps:
        norm = "" if config.skip2lora_norm == "none" else ", normalised"
        lines.append(f"Skip2-LoRA: outputs of blocks {ranges(taps)}{norm}, rank {config.skip2lora_r}, to {config.skip2lora_output_layer}")
        layers = [f"blocks {ranges(behind)}"] if behind else []
        layers += ["lm_head"] if config.lora_head and config.lora_r else []
        where = " and ".join(layers) if layers else "none there"
        if lora_flags and not config.skip2lora_warmup:
            lines.append(f"LoRA ({', '.join(lora_flags)}) applies to layers behind {config.skip2lora_output_layer}'s input only: {where}")
    if frozen:
        lines.append(f"frozen, run without gradients: the embedding and blocks 0-{frozen - 1} of {config.n_layer}")
    return lines


def describe_choice(choice: Choice, candidates: tuple[int, ...], seconds: float) -> str:
    """A line that says which blocks `auto` chose, and why."""
    found = f"skip2lora_block_indices auto: blocks {ranges(choice.blocks)} of {ranges(candidates)}"
    looked_at = f"{choice.samples:,} samples, {choice.rows:,} positions, {seconds:.0f} s"
    if choice.value <= 0:
        return f"{found}, the last, as the sample tells nothing about which are better; {looked_at}"
    others = ", ".join(f"{name} {100 * value:.2f} %" for name, value in choice.rules.items())
    return f"{found}, which predict {100 * choice.value:.2f} % of the loss's gradient on samples not fitted ({others}); {looked_at}"


def ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5" """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
