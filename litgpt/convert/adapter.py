"""`litgpt convert_adapter`: adapters between litgpt's folders, PEFT's format (LoRA) and the portable one (Skip2-LoRA)."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import yaml

from litgpt import atomic, checkpoint
from litgpt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from litgpt.lora import Config as LoRAConfig

LITGPT = checkpoint.ADAPTER_WEIGHTS
PEFT = "adapter_config.json"
PORTABLE = "skip2lora_config.json"


def convert_adapter(adapter_dir: Path, output_dir: Path, checkpoint_dir: Optional[Path] = None) -> None:
    """Convert an adapter: LoRA to and from PEFT's format, Skip2-LoRA to and from a portable one.

    A litgpt folder becomes a PEFT folder (LoRA) or safetensors with a JSON that states the formula (Skip2-LoRA); either of them becomes
    a litgpt folder.

    Args:
        adapter_dir: The adapter: a folder that `litgpt finetune` wrote, a PEFT folder or a portable Skip2-LoRA folder.
        output_dir: The new folder.
        checkpoint_dir: Folder of the base model. Needed for a PEFT or portable folder; for litgpt's own if the base has moved.
    """
    from litgpt.convert import peft
    from litgpt.convert import portable as skip2lora
    from litgpt.convert.card import base_name, write_card
    from litgpt.convert.from_litgpt import hf_settings
    from litgpt.convert.resolve import open_checkpoint

    source, target = Path(adapter_dir), Path(output_dir)
    kind = kind_of(source)
    if kind != LITGPT and checkpoint_dir is None:
        raise UserError(f"{source} does not hold its base model: give --checkpoint_dir, a checkpoint folder of it")
    if checkpoint_dir is not None:
        checkpoint_dir = checkpoint.require_checkpoint(open_checkpoint(checkpoint_dir))
    with atomic.new_folder(target, manifest=kind != LITGPT) as folder:
        if kind == LITGPT:
            config, weights = read_adapter(source, checkpoint_dir)
            known = base_name(source), hf_settings(config, checkpoint_dir or source)["model_type"]
            if config.skip2lora_enabled:
                skip2lora.write(folder, config, weights, *known)
            else:
                peft.write(folder, *peft.to_peft(config, weights, *known))
            write_card(folder, source, "skip2lora" if config.skip2lora_enabled else "lora", target.name)
        else:
            assert checkpoint_dir is not None
            found = peft.load(source, checkpoint_dir) if kind == PEFT else skip2lora.load(source, checkpoint_dir)
            write_adapter(folder, checkpoint_dir, *found)
        if (source / "prompt_style.yaml").is_file():
            shutil.copyfile(source / "prompt_style.yaml", folder / "prompt_style.yaml")
    print(f"Converted {source} to {target}.")


def kind_of(folder: Path) -> str:
    """The file by which a folder is known as a litgpt, PEFT or portable adapter. Raises UserError if it is none."""
    kinds = [name for name in (LITGPT, PEFT, PORTABLE) if (folder / name).is_file()]
    if len(kinds) != 1:
        has = f"it has {' and '.join(kinds)}" if kinds else f"it has none of {LITGPT}, {PEFT} and {PORTABLE}"
        raise UserError(f"{folder} is not an adapter's folder: {has}")
    return kinds[0]


def read_adapter(folder: Path, base: Optional[Path] = None) -> "tuple[LoRAConfig, dict[str, Tensor]]":
    """Config and weights of a litgpt adapter folder; its base is needed only where the folder has no model_config.yaml.

    Raises UserError for broken files, and weights that are not those of the settings.
    """
    from litgpt.convert.portable import require_all
    from litgpt.lora import Config

    settings = checkpoint.read_adapter_settings(folder)[1]
    known = (folder / "model_config.yaml").is_file()
    config = Config.from_checkpoint(folder if known else checkpoint.adapter_settings(folder, base)[0], **settings)
    weights = checkpoint.load_weights(folder / LITGPT)
    require_all(config, weights, folder / LITGPT)
    return config, weights


def write_adapter(folder: Path, base: Path, settings: dict[str, Any], weights: "dict[str, Tensor]") -> None:
    """What `litgpt finetune` leaves: an adapter of the checkpoint `base`. Raises UserError if it does not fit."""
    from litgpt.convert.portable import require_all
    from litgpt.lora import Config
    from litgpt.prompts import resolve_prompt_style, save_prompt_style
    from litgpt.tokenizer import Tokenizer

    config = Config.from_checkpoint(base, **settings)
    require_all(config, weights, base)
    checkpoint.save_weights({"model": weights}, folder / LITGPT)  # type: ignore[dict-item]
    checkpoint.save_config(config, folder)
    hyperparameters = {"checkpoint_dir": str(base.resolve()), **settings}
    atomic.write_text(folder / "hyperparameters.yaml", yaml.safe_dump(hyperparameters, sort_keys=False))
    checkpoint.copy_tokenizer_files(base, folder)
    save_prompt_style(resolve_prompt_style(None, base, Tokenizer(base)), folder)
