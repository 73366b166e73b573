"""`litgpt convert_adapter`: adapters between litgpt's folders, PEFT's format and GGUF (LoRA) and the portable one (Skip2-LoRA)."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

from litgpt import atomic, checkpoint, files
from litgpt.adapters.settings import readable_by_litgpt
from litgpt.convert.resolve import adapter_folder, open_checkpoint
from litgpt.errors import UserError
from litgpt.prompts import copy_prompt_style, resolve_prompt_style, save_prompt_style
from litgpt.tokenizer import Tokenizer
from litgpt.values import checked

if TYPE_CHECKING:
    from torch import Tensor

    from litgpt.lora import Config as LoRAConfig

LITGPT, PEFT, PORTABLE = FORMATS = (checkpoint.ADAPTER_WEIGHTS, *checkpoint.FOREIGN_ADAPTERS)  # the files that identify a folder's format


@checked
def convert_adapter(
    adapter_dir: Path, output_dir: Path, checkpoint_dir: Optional[Path] = None, *, to: Optional[Literal["gguf"]] = None
) -> None:
    """Convert an adapter: LoRA to and from PEFT's format, Skip2-LoRA to and from a portable one; LoRA to a GGUF file.

    A litgpt folder becomes a PEFT folder (LoRA) or safetensors with a JSON that states the formula (Skip2-LoRA); both convert
    back to a litgpt folder.

    Args:
        adapter_dir: The adapter: a folder that `litgpt finetune` wrote, a PEFT folder or a portable Skip2-LoRA folder.
        output_dir: The new folder.
        checkpoint_dir: Folder of the base model. Needed for a PEFT or portable folder; for litgpt's own if the base has moved.
        to: gguf writes LoRA for llama.cpp, to use with the base's GGUF: to output_dir/adapter.gguf, or to output_dir if it ends in .gguf.
    """
    from litgpt.convert import peft, portable
    from litgpt.convert.card import base_name, write_card
    from litgpt.convert.hf import hf_settings

    source, target = adapter_folder(adapter_dir), output_dir
    kind = kind_of(source)
    if kind != LITGPT and checkpoint_dir is None:
        raise UserError(f"{source} does not hold its base model: give the base's checkpoint folder as --checkpoint_dir")
    if checkpoint_dir is not None:
        checkpoint_dir = checkpoint.require_checkpoint(open_checkpoint(checkpoint_dir))
    if to == "gguf" or target.suffix == ".gguf":
        _to_gguf(source, target if target.suffix == ".gguf" else target / "adapter.gguf", kind, checkpoint_dir)
        return
    with atomic.new_folder(target, manifest=kind != LITGPT) as folder:
        if kind == LITGPT:
            config, weights = read_adapter(source, checkpoint_dir)
            base = base_name(source, checkpoint.read_hyperparameters(source))
            model_type = hf_settings(config, checkpoint_dir or source)["model_type"]
            if config.skip2lora_enabled:
                portable.write(folder, config, weights, base, model_type)
            else:
                peft.write(folder, *peft.to_peft(config, weights, base, model_type))
            write_card(folder, source, "skip2lora" if config.skip2lora_enabled else "lora", target.name)
        else:
            assert checkpoint_dir is not None
            write_adapter(folder, checkpoint_dir, *(peft if kind == PEFT else portable).load(source, checkpoint_dir))
        copy_prompt_style(source, folder)
    print(f"Converted {source} to {target}.")


def _to_gguf(source: Path, target: Path, kind: str, checkpoint_dir: Optional[Path]) -> None:
    from litgpt.convert.gguf.adapter import write_gguf_adapter

    if kind != LITGPT:
        raise UserError(f"{source} holds {kind}: convert it to a litgpt folder first, then to GGUF")
    files.require_place(target)
    if target.exists():
        raise UserError(f"{target} exists already: name another file, or remove it")
    base, _ = checkpoint.adapter_settings(source, checkpoint_dir)
    config, weights = read_adapter(source, base)
    write_gguf_adapter(target, config, weights, base)
    print(f"Converted {source} to {target}.")
    of_base, adapter = (shlex.quote(str(path)) for path in (base, target))
    print(f"Its base: litgpt convert_to_gguf {of_base} base.gguf. Then: llama-server -m base.gguf --lora {adapter}")


def kind_of(folder: Path) -> str:
    """Return the file that marks the folder as a litgpt, PEFT or portable adapter. Raises UserError if there is none, or several."""
    kinds = [name for name in FORMATS if os.path.lexists(folder / name)]
    if len(kinds) != 1:
        content = f"it has {' and '.join(kinds)}" if kinds else f"it has none of {LITGPT}, {PEFT} and {PORTABLE}"
        raise UserError(f"{folder} cannot be converted: {content}{checkpoint.adapter_hint(folder)}")
    return kinds[0]


def read_adapter(folder: Path, base: Optional[Path] = None) -> "tuple[LoRAConfig, dict[str, Tensor]]":
    """Return config and weights of a litgpt adapter folder. Its base is needed only if the folder has no model_config.yaml.

    Raises UserError for broken files, and weights that do not match the settings.
    """
    from litgpt.convert import portable
    from litgpt.lora import Config

    trained_on, settings = checkpoint.read_adapter_settings(folder, base)
    checkpoint.require_same_base(folder, trained_on)
    has_config = (folder / "model_config.yaml").is_file()
    config = Config.from_checkpoint(folder if has_config else checkpoint.adapter_settings(folder, base)[0], **settings)
    if config.heads:
        raise UserError(f"{folder} has {' and '.join(config.heads)}, which other formats cannot store: use the folder as it is")
    weights = checkpoint.load_weights(folder / LITGPT)
    portable.require_all(config, weights, folder / LITGPT)
    return config, weights


def write_adapter(folder: Path, base: Path, settings: dict[str, Any], weights: "dict[str, Tensor]") -> None:
    """Write an adapter of the checkpoint `base` as `litgpt finetune` does. It will be merged in the base's own precision.

    Raises UserError if it does not fit.
    """
    from litgpt.convert import portable
    from litgpt.device import PRECISIONS
    from litgpt.lora import Config

    config = Config.from_checkpoint(base, **settings)
    portable.require_all(config, weights, base)
    checkpoint.save_weights({"model": weights}, folder / LITGPT)  # type: ignore[dict-item]
    checkpoint.save_config(config, folder)
    checkpoint.save_base(base, folder)
    dtype = max(checkpoint.load_weights(base / checkpoint.WEIGHTS).values(), key=lambda weight: weight.numel()).dtype
    precision = next((name for name, kind in PRECISIONS.items() if kind == dtype), "32-true")
    hyperparameters = readable_by_litgpt({"checkpoint_dir": str(base.resolve()), "precision": precision, **settings})
    atomic.write_text(folder / "hyperparameters.yaml", files.dump_yaml(hyperparameters))
    checkpoint.copy_tokenizer_files(base, folder)
    save_prompt_style(resolve_prompt_style(None, base, Tokenizer(base)), folder)
