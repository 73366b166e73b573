"""Skip2-LoRA adapters in a folder that can be used without litgpt: safetensors, and a JSON that states the formula.

skip2lora_config.json           the inputs, the formula and the place of the sum, with transformers' module names
skip2lora_adapter.safetensors   transformer.h.{i}.skip2lora.lora_A (r, d) and .lora_B (d, r) for each tapped block i; ordinary LoRA that
                                was trained too (behind the output layer, or in a warm-up) under the names of PEFT's format
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from litgpt import families, files
from litgpt.adapters.settings import WarmupSettings, model_settings
from litgpt.checkpoint import PORTABLE_ADAPTER, load_adapter
from litgpt.config import Config
from litgpt.convert import names, peft
from litgpt.device import on_meta
from litgpt.errors import UserError
from litgpt.lora import GPT, Config as LoRAConfig

CONFIG, WEIGHTS = PORTABLE_ADAPTER, "skip2lora_adapter.safetensors"
FORMAT = {"format": "skip2lora", "version": 1}
SHAPE = (  # fields that must be equal in the model that an adapter was trained on and the one that it is attached to
    *("n_layer", "n_embd", "n_head", "n_query_groups", "head_size", "intermediate_size"),
    *("parallel_residual", "norm_class_name", "mlp_class_name"),
)
RMS, PLAIN = "t_i = x_(i+1) / sqrt(mean(x_(i+1)^2) + norm_eps), the mean over the features, in float32", "t_i = x_(i+1)"


def modules(config: Config, model_type: str) -> tuple[str, str]:
    """Return transformers' names of a block (with {} for its index) and of the last norm."""
    table = names.hf_table(model_type, config)
    block = next(name.split("{}")[0] for name, (module, _) in table.items() if module.startswith("transformer.h.{}"))
    norm = next((name for name, (module, _) in table.items() if module == "transformer.ln_f"), "model.norm")  # OLMo stores none
    return f"{block}{{}}", norm


def lora_in_peft(
    config: LoRAConfig, weights: dict[str, Tensor], base: str, model_type: str
) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Return the ordinary LoRA among an adapter's weights in PEFT's format, without its settings if there is none.

    Raises UserError for LoRA on layers that transformers does not have, for DoRA and for answer-only LoRA.
    """
    lora = {name: value for name, value in weights.items() if ".skip2lora." not in name}
    if lora and (config.lora_variant == "dora" or config.alora_enabled or config.modules_to_save):
        kind = "alora_enabled" if config.alora_enabled else "modules_to_save" if config.modules_to_save else "lora_variant dora"
        raise UserError(f"{kind} with Skip2-LoRA has no portable form: use the folder that `litgpt finetune` wrote in litgpt")
    return peft.to_peft(config, lora, base, model_type) if lora else (None, {})


def write(folder: Path, config: LoRAConfig, weights: dict[str, Tensor], base: str, model_type: str) -> None:
    """Write the two files. `base` is the base's name, `model_type` its architecture in transformers."""
    lora, tensors = lora_in_peft(config, weights, base, model_type)
    tensors = {name: value.contiguous() for name, value in weights.items() if ".skip2lora." in name} | tensors
    peft.write(folder, describe(config, lora, base, model_type), tensors, (CONFIG, WEIGHTS))


def describe(config: LoRAConfig, lora: dict[str, Any] | None, base: str, model_type: str) -> dict[str, Any]:
    """Return the content of skip2lora_config.json."""
    assert config.skip2lora_r and config.skip2lora_alpha is not None
    block, norm = modules(config, model_type)
    place = config.skip2lora_output_layer
    module = {"lm_head": "lm_head", "transformer.ln_f": norm}.get(place) or block.format(place.rpartition(".")[2])
    formula = [
        "x_(i+1) = output of block i, the residual stream behind it",
        RMS if config.skip2lora_norm == "rms" else PLAIN,
        "s = sum over the tapped blocks i of scale * B_i A_i t_i, at every position by itself, in float32",
        f"input of the output layer = its input in the base model + s. The output layer is {module}"
        + (f", its input in the base model is what {norm} returns" if place == "lm_head" else ""),
    ]
    if lora:
        formula.append("in the modules of `lora`: y = W x + bias + (lora_alpha / r) * B A x, with alpha_pattern and rank_pattern")
    return {
        **FORMAT,
        "base_model_name_or_path": base,
        "model_type": model_type,
        "formula": formula,
        "taps": [{"block": i, "module": block.format(i), "weights": f"transformer.h.{i}.skip2lora"} for i in config.taps],
        "norm": config.skip2lora_norm,
        "norm_eps": config.norm_eps,
        "r": config.skip2lora_r,
        "alpha": config.skip2lora_alpha,
        "scale": config.skip2lora_alpha / config.skip2lora_r,
        "output_layer": {"module": module, "litgpt": place},
        "lora": lora,
        "settings": adapter_settings(config),
        "model_config": config.base_dict(),
    }


def adapter_settings(config: LoRAConfig) -> dict[str, Any]:
    """Return the adapters' settings in a config as plain values, in the order of its fields."""
    own = type(config).adapter_fields()
    values = {key: getattr(config, key) for key in type(config).__dataclass_fields__ if key in own}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def read(folder: Path, model: Config, where: str) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Return config and litgpt's weights of a portable folder, for the model `model`, which messages call `where`.

    Raises UserError for broken files, unknown settings and another model.
    """
    file = folder / CONFIG
    content = files.read_json(file)
    if {key: content.get(key) for key in FORMAT} != FORMAT:
        raise UserError(f"{file} has an unknown format: only skip2lora, version {FORMAT['version']}, is supported")
    fields, settings, model_type = content.get("model_config"), content.get("settings"), content.get("model_type")
    if not isinstance(fields, dict) or not isinstance(settings, dict):
        raise UserError(f"{file} has no settings and model_config")
    if not isinstance(model_type, str) or families.architecture(model_type) is None:
        raise UserError(f"{file} has model_type {model_type!r}: only {', '.join(families.architectures())} are supported")
    known = LoRAConfig.__dataclass_fields__ | WarmupSettings.__dataclass_fields__
    if unknown := [key for key in (*fields, *settings) if key not in known]:
        raise UserError(f"{file} has unknown settings: {', '.join(unknown)}")
    try:
        config = LoRAConfig(**{**fields, **model_settings(settings)})
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: {error}") from None
    require_fit(config, model, folder, where)
    tensors = peft.read_tensors(folder / WEIGHTS)
    weights = {name: value for name, value in tensors.items() if not name.startswith(peft.PREFIX)}
    if rest := {name: value for name, value in tensors.items() if name not in weights}:
        lora = content.get("lora")
        own, read = peft.from_peft(lora if isinstance(lora, dict) else {}, rest, config, folder, model_type)
        weights |= read
        if config.lora_variant != "lora" or config.lora_rank_pattern or config.lora_alpha_pattern:  # PEFT has other ranks for them
            sizes = {key: own[key] for key in ("lora_r", "lora_alpha", "lora_rank_pattern", "lora_alpha_pattern")}
            config = replace(config, lora_variant="lora", lora_rslora=False, **sizes)
    require_all(config, weights, folder / WEIGHTS)
    return config, weights


def load(folder: Path, base: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return adapter settings and weights of a portable folder, for the checkpoint `base`. Raises UserError if it has another shape."""
    config, weights = read(folder, Config.from_checkpoint(base), f"the model in {base}")
    return adapter_settings(config), weights


def require_all(config: LoRAConfig, weights: dict[str, Tensor], source: Path) -> None:
    """Raise UserError that lists every missing, unknown and misshapen weight of an adapter with these settings."""
    with on_meta():
        model = GPT(config)
    load_adapter(model, weights, source)


def require_fit(config: Config, model: Config, source: Path, where: str) -> None:
    """Raise UserError that lists the sizes in which the adapter's model and another differ."""
    pairs = {key: (getattr(model, key), getattr(config, key)) for key in SHAPE}
    if differing := [f"{key} is {one}, the adapter's {other}" for key, (one, other) in pairs.items() if one != other]:
        raise UserError(f"the adapter {source} was trained on {config.name!r} and does not fit {where}: {'; '.join(differing)}")
