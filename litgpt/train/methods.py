"""The ways to fine-tune: how each builds the model, what it trains and what it saves."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from litgpt import checkpoint
from litgpt.activations.choose import Choice
from litgpt.adapters.base import adapter_parameters, adapter_state, renew_adapters
from litgpt.adapters.settings import LAYER_FLAGS, WarmupSettings, model_settings
from litgpt.convert.merge import write_merged
from litgpt.convert.write import write_pth
from litgpt.device import on_meta
from litgpt.errors import UserError
from litgpt.logs import Console
from litgpt.lora import GPT, Config as LoRAConfig, mark_only_lora_as_trainable, merge_lora_weights
from litgpt.packed import unpack
from litgpt.quantize import count, is_quantised, quantise
from litgpt.sharding import all_called, assign, is_sharded, loads, on_cpu
from litgpt.text import counted


@dataclass(frozen=True)
class Method:
    """A fine-tuning method. The rest of the package sees no other difference between methods."""

    config: Callable[[Path], LoRAConfig]  # the model's config, adapters included, for a checkpoint folder
    trains_base: bool = False  # train every weight instead of adapters
    tie_embeddings: bool | None = None  # with `trains_base`: share one weight between embedding and head, or not; None: as the checkpoint
    merges: bool = False  # adapters are merged into the base at the end, if they can be
    warmup: WarmupSettings = field(default_factory=WarmupSettings)
    cache: str = "off"  # where the frozen blocks' activations are kept: the `skip2lora_cache*` settings
    cache_dir: Path | None = None
    cache_dtype: str | None = None
    quantize: str | None = None  # how frozen weights are stored
    lr_ratio_of: Callable[[str], float] = lambda name: 1.0  # returns the learning rate of a parameter as a multiple of the optimizer's

    def build(self, checkpoint_dir: Path, dtype: torch.dtype, device: torch.device | None = None, offload: bool = False) -> GPT:
        """Return the model on the CPU, or sharded on `device`, with the backbone in `dtype` and trainable parameters marked.

        `offload`: as in `litgpt.sharding.shard`. Raises UserError if it does not fit.
        """
        if device is not None:
            return checkpoint.build_sharded(self.config(checkpoint_dir), checkpoint_dir, dtype, device, self.prepare, offload)
        model = checkpoint.build_model(self.config(checkpoint_dir), checkpoint_dir, dtype, mapped=self.quantize is not None)
        self.prepare(model)
        return model

    def rebuild(self, model: GPT, checkpoint_dir: Path) -> None:
        """Give a model that was built by a method of this kind new adapters, as `build` would; its frozen weights are kept."""
        config = self.config(checkpoint_dir)
        with on_meta():
            model.adapt(config)
        if self.quantize is None or config.lora_variant == "lora":
            renew_adapters(model)
        else:  # the other variants start from the weights before quantisation
            plain = checkpoint.build_model(config, checkpoint_dir, model.dtype, mapped=True)
            model.load_state_dict(adapter_parameters(plain), strict=False, assign=True)
        self.prepare(model)

    def save(self, model: GPT, folder: Path | None) -> None:
        """Gather the trained weights of all ranks, which must all call this, and write them into a folder if one is given."""
        if not self.trains_base:
            state: Any = {"model": adapter_state(model)}
            if folder is not None:
                checkpoint.save_weights(state, folder / self._file(model))
            return
        with all_called(loads(model.state_dict(keep_vars=True))) as plan:
            if folder is not None:
                write_pth(plan, folder / self._file(model))

    def load(self, model: GPT, folder: Path) -> None:
        """Load the trained weights that `save` wrote to a folder into the model."""
        file = folder / self._file(model)
        weights = checkpoint.load_weights(file)
        if not self.trains_base:
            checkpoint.load_adapter(model, weights, file)
        elif is_sharded(model):
            for name, parameter in model.named_parameters():
                assign(parameter, weights[name])
        else:
            model.load_state_dict(weights)

    def finish(self, model: GPT, folder: Path) -> bool:
        """Add the merged model to the final folder, if there is one. Return True if the model's own weights are now merged and rounded."""
        if not self.merges or not model.config.is_mergeable:
            return False
        unpack(model)
        if is_quantised(model) or is_sharded(model):
            try:
                write_merged(folder, model.dtype)  # in the base's precision
            except UserError as error:  # the base was changed or removed in the run
                Console().say(f"warning: the adapter is not merged: {error}".replace(str(folder), str(folder.parent / "final")))
            return False
        merge_lora_weights(model)
        checkpoint.save_weights(on_cpu(model.state_dict(keep_vars=True)), folder / checkpoint.WEIGHTS)
        return model.dtype.itemsize < 4

    def _file(self, model: GPT) -> str:
        return checkpoint.WEIGHTS if self.trains_base else model.config.adapter_file

    def prepare(self, model: GPT) -> None:
        """Quantise the frozen weights of a model with its base weights, as `quantize` says, and mark the trained parameters."""
        if self.quantize is not None:
            quantise(model, self.quantize)
        if not self.trains_base:
            mark_only_lora_as_trainable(model)
        elif self.tie_embeddings:
            model.tie_head()
        elif self.tie_embeddings is False and model.is_tied:
            model.untie_head()
        if not any(p.requires_grad for p in model.parameters()):
            raise UserError("nothing would be trained: set lora_query, lora_value, ... or skip2lora_enabled to true")


def adapters(settings: Any) -> Method:
    """Return the method of a `litgpt.finetune.lora.Lora`: LoRA and Skip2-LoRA."""
    config = model_settings(vars(settings))
    return Method(
        config=lambda folder: LoRAConfig.from_checkpoint(folder, **config),
        merges=True,
        warmup=settings,
        cache=settings.skip2lora_cache,
        cache_dir=settings.skip2lora_cache_dir,
        cache_dtype=settings.skip2lora_cache_dtype,
        quantize=settings.quantize,
        lr_ratio_of=settings.lr_ratio_of,
    )


def prompts(settings: Any) -> Method:
    """Return the method of a `litgpt.finetune.adapter.Adapter`: LLaMA-Adapter, of the kind of its `module`."""
    config = importlib.import_module(settings.module).Config
    values = {name: getattr(settings, name) for name in checkpoint.PROMPT_SETTINGS}
    return Method(lambda folder: config.from_checkpoint(folder, **values), quantize=settings.quantize)


def full(settings: Any) -> Method:
    """Return the method that trains every weight, in the dtype in which it is loaded."""
    return Method(LoRAConfig.from_checkpoint, trains_base=True, tie_embeddings=settings.train.tie_embeddings)


def describe(model: GPT, warmup: WarmupSettings) -> list[str]:
    """Return lines that say what is trained and what runs frozen."""
    config, total = model.config, count(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [f"parameters: {trained:,} trainable of {total:,} ({100 * trained / total:.3f} %)"]
    if config.value_head:
        lines.append(f"value head, {config.value_head}: {count(model.value_head):,} parameters")
    if config.modules_to_save:
        lines.append(f"trained in full: {' and '.join(config.modules_to_save)}" + (", which are one weight" if model.is_tied else ""))
    if config.mtp_heads:
        where = "and the adapters" if config.changes_text else "on the frozen model"
        read = f", which read blocks {ranges(config.taps)}" if config.mtp_taps and not config.skip2lora_enabled else ""
        lines.append(f"multi-token heads: {config.mtp_heads} {where}{read}, {count(model.mtp_heads):,} parameters")
    if model.cut is None:
        return lines
    frozen = min(model.cut, config.n_layer)
    taps, behind = config.taps, tuple(block for block in config.lora_blocks if block >= frozen)
    if warmup.has_warmup:
        steps, epochs = warmup.skip2lora_warmup_steps, warmup.skip2lora_warmup_epochs
        length = counted(steps, "step") if steps else counted(epochs or 0.0, "epoch")
        lines.append(f"LoRA warm-up: {length} on blocks {ranges(config.lora_blocks)}")
    if taps and config.skip2lora_enabled:
        norm = "" if config.skip2lora_norm == "none" else ", normalised"
        lines.append(f"Skip2-LoRA: outputs of blocks {ranges(taps)}{norm}, rank {config.skip2lora_r}, to {config.skip2lora_output_layer}")
        layers = [f"blocks {ranges(behind)}"] if behind else []
        layers += ["lm_head"] if config.lora_head and config.lora_r else []
        where = " and ".join(layers) if layers else "none there"
        flags = [flag for flag in LAYER_FLAGS if getattr(config, flag)]
        if flags and not config.skip2lora_warmup:
            lines.append(f"LoRA ({', '.join(flags)}) applies to layers behind {config.skip2lora_output_layer}'s input only: {where}")
    if frozen:
        lines.append(f"frozen, run without gradients: the embedding and blocks 0-{frozen - 1} of {config.n_layer}")
    return lines


def describe_choice(choice: Choice, candidates: tuple[int, ...], seconds: float) -> str:
    """Return a line that says which blocks `auto` chose, and why."""
    found = f"skip2lora_block_indices auto: blocks {ranges(choice.blocks)} of {ranges(candidates)}"
    looked_at = f"{choice.samples:,} samples, {choice.rows:,} positions, {seconds:.0f} s"
    if choice.value <= 0:
        return f"{found}, the last ones, as the sample does not show which are better; {looked_at}"
    others = ", ".join(f"{name} {100 * value:.2f} %" for name, value in choice.rules.items())
    return f"{found}, which predict {100 * choice.value:.2f} % of the loss's gradient on held-out samples ({others}); {looked_at}"


def ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2, 5" """
    runs = [[number for _, number in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
