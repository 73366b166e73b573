"""Skip2-LoRA adapters as a folder that needs no litgpt: safetensors, and a JSON that states the formula.

skip2lora_config.json           what is read where, what is added where, in words, symbols and transformers' module names
skip2lora_adapter.safetensors   transformer.h.{i}.skip2lora.lora_A (r, d) and .lora_B (d, r) for each tapped block i; ordinary LoRA that
                                was trained besides (behind the output layer, or in a warm-up) under the names of PEFT's format
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt import files
from litgpt.adapters.settings import WarmupSettings, model_settings
from litgpt.checkpoint import load_adapter
from litgpt.convert import names, peft
from litgpt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from litgpt.config import Config
    from litgpt.lora import Config as LoRAConfig

CONFIG, WEIGHTS = "skip2lora_config.json", "skip2lora_adapter.safetensors"
FORMAT = {"format": "skip2lora", "version": 1}
SHAPE = (
    *("n_layer", "n_embd", "n_head", "n_query_groups", "head_size", "intermediate_size"),
    *("parallel_residual", "norm_class_name", "mlp_class_name"),
)
"""What must agree between the model that an adapter was trained on and the one that it is put on."""
RMS, PLAIN = "t_i = x_(i+1) / sqrt(mean(x_(i+1)^2) + norm_eps), the mean over the features, in float32", "t_i = x_(i+1)"


def modules(config: Config, model_type: str) -> tuple[str, str, str]:
    """transformers' names of a block (with {} for its number), of the last norm and of the head."""
    table = names.hf_table(model_type, config)
    block = next(name.split("{}")[0] for name, (module, _) in table.items() if module.startswith("transformer.h.{}"))
    norm = next((name for name, (module, _) in table.items() if module == "transformer.ln_f"), "model.norm")  # OLMo stores none
    return f"{block}{{}}", norm, "lm_head"


def own_lora(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ordinary LoRA among an adapter's weights."""
    return {name: value for name, value in weights.items() if ".skip2lora." not in name}


def write(folder: Path, config: LoRAConfig, weights: dict[str, Tensor], base: str, model_type: str) -> None:
    """The two files. `base`: the base's name; `model_type`: its architecture in transformers.

    Raises UserError for LoRA on layers that transformers does not have.
    """
    from safetensors.torch import save_file

    tensors = {name: value.contiguous() for name, value in weights.items() if ".skip2lora." in name}
    lora: dict[str, Any] | None = None
    if own_lora(weights):
        if config.lora_variant != "lora":
            raise UserError("lora_variant dora beside Skip2-LoRA has no portable form: use the folder that `litgpt finetune` wrote")
        lora, extra = peft.to_peft(config, own_lora(weights), base, model_type)
        tensors |= extra
    (folder / CONFIG).write_text(json.dumps(describe(config, lora, base, model_type), indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def describe(config: LoRAConfig, lora: dict[str, Any] | None, base: str, model_type: str) -> dict[str, Any]:
    """The content of skip2lora_config.json."""
    assert config.skip2lora_r and config.skip2lora_alpha is not None
    block, norm, head = modules(config, model_type)
    place = config.skip2lora_output_layer
    module = {"lm_head": head, "transformer.ln_f": norm}.get(place) or block.format(place.rpartition(".")[2])
    formula = [
        "x_(i+1) = output of block i, the residual stream behind it",
        RMS if config.skip2lora_norm == "rms" else PLAIN,
        "s = sum over the tapped blocks i of scale * B_i A_i t_i, at every position by itself, in float32",
        f"input of the output layer = its input in the base model + s. The output layer is {module}"
        + (f", its input in the base model is what {norm} returns" if place == "lm_head" else ""),
    ]
    if lora:
        formula.append("in the modules of `lora`: y = W x + bias + (lora_alpha / r) * B A x")
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
        "settings": {key: _plain(getattr(config, key)) for key in config.__dataclass_fields__ if key in type(config).adapter_fields()},
        "model_config": config.base_dict(),
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def read(folder: Path, other: Config, where: str) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Config and our weights of a portable folder, for the model `other`, which messages call `where`.

    Raises UserError for what is broken, unknown or does not fit.
    """
    from litgpt.lora import Config

    file = folder / CONFIG
    content = files.read_json(file)
    if {key: content.get(key) for key in FORMAT} != FORMAT:
        raise UserError(f"{file} is not of a format that is known here: format skip2lora, version {FORMAT['version']}")
    model, settings = content.get("model_config"), content.get("settings")
    if not isinstance(model, dict) or not isinstance(settings, dict):
        raise UserError(f"{file} has no settings and model_config")
    model_type = content.get("model_type")
    if model_type not in names.HF_TABLES:
        raise UserError(f"{file} has model_type {model_type!r}: only {', '.join(sorted(names.HF_TABLES))} are supported")
    if unknown := [key for key in (*model, *settings) if key not in (*Config.__dataclass_fields__, *WarmupSettings.__dataclass_fields__)]:
        raise UserError(f"{file} has unknown settings: {', '.join(unknown)}")
    try:
        config = Config(**{**model, **model_settings(settings)})
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{file}: {error}") from None
    require_fit(config, other, folder, where)
    tensors = peft.read_tensors(folder / WEIGHTS)
    weights = {name: value for name, value in tensors.items() if not name.startswith(peft.PREFIX)}
    rest = {name: value for name, value in tensors.items() if name.startswith(peft.PREFIX)}
    if rest:
        lora = content.get("lora")
        weights |= peft.from_peft(lora if isinstance(lora, dict) else {}, rest, config, folder, model_type)[1]
    require_all(config, weights, folder / WEIGHTS)
    return config, weights


def require_all(config: LoRAConfig, weights: dict[str, Tensor], source: Path) -> None:
    """UserError that lists every weight that is missing, unknown or of another shape than the settings make it."""
    import torch

    from litgpt.lora import GPT

    with torch.device("meta"):
        model = GPT(config)
    load_adapter(model, weights, source)


def load(folder: Path, base: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Adapter settings and weights of a portable folder, for the checkpoint `base`. Raises UserError if its shape is another."""
    from litgpt.config import Config

    config, weights = read(folder, Config.from_checkpoint(base), f"the model in {base}")
    return {key: _plain(getattr(config, key)) for key in sorted(type(config).adapter_fields())}, weights


def require_fit(config: Config, other: Config, source: Path, where: str) -> None:
    """UserError that names the sizes in which the adapter's model and another differ."""
    differing = [
        f"{key} is {getattr(other, key)}, the adapter's {getattr(config, key)}"
        for key in SHAPE
        if getattr(other, key) != getattr(config, key)
    ]
    if differing:
        raise UserError(f"the adapter {source} was trained on {config.name!r} and does not fit {where}: {'; '.join(differing)}")
