"""Skip2-LoRA on Hugging Face's models: a trained adapter attached to a causal LM of transformers by forward hooks.

    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    with load_skip2lora(model, "out/skip2lora/final"):
        model.generate(...)

The hooks compute what `litgpt.lora.GPT` computes: s = sum over S of (alpha / r) B_i A_i N(x_{i+1}) is added to the output layer's input.
Each position is computed by itself, so key/value caches, padding and batches need no care. Ordinary LoRA that belongs to the adapter is
added by hooks on its linear layers. Letters in shapes: B batch, T positions, d features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litgpt import families
from litgpt.config import Config
from litgpt.convert import adapter, names, peft, portable
from litgpt.errors import UserError
from litgpt.fused import rms_norm

if TYPE_CHECKING:
    from litgpt.lora import Config as LoRAConfig


def load_skip2lora(model: nn.Module, folder: str | Path) -> Skip2LoRAHooks:
    """Attach the Skip2-LoRA adapter in `folder` (of `litgpt finetune`, or portable) to a transformers model, until `remove()`.

    Raises UserError if the folder holds none, or the model does not have the shape that it was trained on.
    """
    folder = Path(folder)
    kind = adapter.kind_of(folder)
    if kind == adapter.PEFT:
        raise UserError(f"{folder} is a LoRA adapter in PEFT's format: load it with peft.PeftModel.from_pretrained")
    settings: Any = getattr(model, "config", None)
    if families.architecture(getattr(settings, "model_type", "")) is None or not hasattr(settings, "to_dict"):
        raise UserError(f"{type(model).__name__} is not a causal LM of a supported family: {', '.join(families.architectures())}")
    own, where = Config.from_hf(settings.to_dict()), f"this {type(model).__name__}"
    if kind == adapter.PORTABLE:
        config, weights = portable.read(folder, own, where)
    else:
        config, weights = adapter.read_adapter(folder)
        portable.require_fit(config, own, folder, where)
    if not config.skip2lora_enabled:
        raise UserError(f"{folder} is a LoRA adapter, without Skip2-LoRA: `litgpt convert_adapter` converts it to a PEFT adapter")
    return Skip2LoRAHooks(model, config, weights, settings.model_type)


class Skip2LoRAHooks:
    """An attached adapter. `remove()`, or the end of a `with` block, detaches it."""

    def __init__(self, model: nn.Module, config: LoRAConfig, weights: dict[str, Tensor], model_type: str) -> None:
        self._sum: Tensor | None = None  # s so far in this forward pass, (B, T, d)
        self._handles: list[Any] = []
        block, norm = portable.modules(config, model_type)
        place = config.skip2lora_output_layer
        assert config.skip2lora_r and config.skip2lora_alpha is not None
        scale = config.skip2lora_alpha / config.skip2lora_r
        eps = config.norm_eps if config.skip2lora_norm == "rms" else None
        outputs: dict[str, Callable[..., Any]] = {}  # forward hooks by module
        inputs: dict[str, Callable[..., Any]] = {}  # forward pre-hooks
        for i in config.taps:
            a, b = (weights[f"transformer.h.{i}.skip2lora.lora_{letter}"] for letter in "AB")
            outputs[block.format(i)] = partial(self._tap, Factors(a, b, scale), eps)
        if place == "lm_head":  # after the norm: the input of lm_head may be the last positions only
            outputs[norm] = lambda module, args, output: self._add_sum(output)
        else:
            inputs[norm if place == "transformer.ln_f" else block.format(place.rpartition(".")[2])] = self._add_to_input
        lora, tensors = portable.lora_in_peft(config, weights, config.name, model_type)
        for key in tensors:
            if key.endswith(".lora_A.weight"):
                name = key.removeprefix(peft.PREFIX).removesuffix(".lora_A.weight")
                scale = peft.alpha_of(lora or {}, name) / len(tensors[key])
                outputs[name] = partial(_add_lora, Factors(tensors[key], tensors[key.replace("lora_A", "lora_B")], scale))
        known = {name for name, _ in model.named_modules()}
        if missing := [name for name in (*outputs, *inputs) if name not in known]:
            raise UserError(f"{type(model).__name__} has no modules {names.summary(missing)}: a plain causal LM of transformers is needed")
        self._handles.append(model.register_forward_pre_hook(self._begin))
        self._handles += [model.get_submodule(name).register_forward_hook(hook) for name, hook in outputs.items()]
        self._handles += [model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True) for name, hook in inputs.items()]

    def remove(self) -> None:
        """Detach the adapter: the model is the base again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Skip2LoRAHooks:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._sum = None  # a failed pass may have left one

    def _tap(self, factors: Factors, eps: float | None, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = output[0] if isinstance(output, tuple) else output  # (B, T, d)
        t = x if eps is None else rms_norm(x, None, eps)
        with torch.autocast(x.device.type, enabled=False):
            update = factors(t.float())
        self._sum = update if self._sum is None else self._sum.to(update.device) + update

    def _add_sum(self, x: Tensor) -> Tensor:
        """Return x + s in x's dtype."""
        s, self._sum = self._sum, None
        assert s is not None and s.shape == x.shape
        return (x + s.to(x.device)).to(x.dtype)

    def _add_to_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._add_sum(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._add_sum(kwargs["hidden_states"])}


class Factors:
    """scale * B A x, on the device of x."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        self.a, self.b = a.float(), b.float() * scale

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in x's dtype."""
        self.a, self.b = self.a.to(x.device), self.b.to(x.device)  # moved once
        return F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))


def _add_lora(factors: Factors, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + factors(args[0])
