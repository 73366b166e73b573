"""`litgpt convert_from_litgpt`: a checkpoint folder into one that transformers loads."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

from litgpt import atomic, checkpoint, files
from litgpt import families as catalog
from litgpt.config import Config
from litgpt.errors import UserError

if TYPE_CHECKING:
    import torch

    from litgpt.convert.names import Slot
    from litgpt.convert.write import Pending

NOT_KEPT = ("torch_dtype", "_name_or_path", "auto_map")
"""keys of a config.json that are not so any more, or point to files that are not there"""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def convert_from_litgpt(
    checkpoint_dir: Path,
    output_dir: Path,
    *,
    dtype: Optional[Literal["float32", "bfloat16", "float16"]] = None,
    max_shard_size: str = "5GB",
) -> None:
    """Convert a checkpoint folder, base, fully tuned or merged, into a Hugging Face folder for transformers' AutoModelForCausalLM.

    Args:
        checkpoint_dir: The checkpoint folder.
        output_dir: The new folder.
        dtype: The number format of the weights. Without it: each weight's own.
        max_shard_size: The largest weight file, such as 500MB or 5GB; more than that becomes several files and their index.
    """
    largest = parse_size(max_shard_size)
    from litgpt.convert.resolve import open_checkpoint

    source, target = require_whole_model(open_checkpoint(checkpoint_dir)), Path(output_dir)
    import torch

    from litgpt.convert.card import write_card
    from litgpt.convert.write import write_sharded

    with atomic.new_folder(target, manifest=False) as folder:
        settings, tensors = model_to_hf(source, None if dtype is None else getattr(torch, dtype))
        checkpoint.copy_tokenizer_files(source, folder)
        _complete_tokenizer(source, folder, settings)
        atomic.write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
        write_sharded(tensors, folder, largest)
        write_card(folder, source, "model", target.name)
    size = sum(pending.nbytes for pending in tensors.values())
    print(f"Converted {source} to {target} ({settings['model_type']}, {size / 1e9:.2f} GB).")


def parse_size(text: str) -> int:
    """Bytes of a text such as 5GB, 500MB or 2000000. Raises UserError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(text), re.IGNORECASE)
    if match is None or not (size := int(float(match[1]) * UNITS[match[2].upper()])):
        raise UserError(f"max_shard_size is {text!r}: a size such as 5GB or 500MB is needed")
    return size


def require_whole_model(folder: Path, into: str = "a transformers model") -> Path:
    """The folder, if it holds a whole model; UserError that names the remedy for adapters, which cannot go `into` another form."""
    if (folder / checkpoint.ADAPTER_WEIGHTS).is_file():
        settings = checkpoint.read_adapter_settings(folder)[1]
        if settings.get("skip2lora_enabled"):
            raise UserError(
                f"{folder} holds a Skip2-LoRA adapter, which reads the outputs of earlier blocks and cannot be folded into {into}: "
                f"`litgpt convert_adapter {folder} OUTPUT_DIR` makes a folder that litgpt.integrations.transformers loads"
            )
        if not (folder / checkpoint.WEIGHTS).is_file():
            raise UserError(
                f"{folder} holds a LoRA adapter and no merged weights: run `litgpt merge_lora {folder}` first, "
                f"or convert the adapter alone with `litgpt convert_adapter {folder} OUTPUT_DIR`"
            )
    if not all((folder / name).is_file() for name in (checkpoint.WEIGHTS, "model_config.yaml")):
        checkpoint.require_checkpoint(folder)
    return folder


def model_to_hf(source: Path, dtype: "Optional[torch.dtype]" = None) -> "tuple[dict[str, Any], dict[str, Pending]]":
    """config.json of a checkpoint folder, and its tensors under transformers' names, not made yet.

    Raises UserError for a model that no class of transformers computes, and for weights that do not fit it.
    """
    from litgpt.convert.litgpt import is_tied, open_own
    from litgpt.convert.names import stored_form, stored_shape
    from litgpt.convert.write import Pending

    config, file = Config.from_checkpoint(source), source / checkpoint.WEIGHTS
    settings = hf_settings(config, source)
    loads = {key: load for keys, load in open_own(file, config, dtype).items() for key in keys}
    stored = checkpoint.load_weights(file)
    tied = is_tied(stored)
    kinds = {name.replace(".attn.attn.", ".attn.qkv."): dtype or tensor.dtype for name, tensor in stored.items()}
    shapes = {name.replace(".attn.attn.", ".attn.qkv."): tuple(tensor.shape) for name, tensor in stored.items()}

    def make(slot: "Slot") -> "torch.Tensor":
        return stored_form(slot, config, {key: loads[key]() for key in slot.keys})

    tensors = {
        name: Pending(stored_shape(slot, config, shapes), kinds[slot.key], partial(make, slot))
        for name, slot in hf_slots(config, settings["model_type"], tied).items()
    }
    settings = {key: value for key, value in settings.items() if key not in NOT_KEPT}
    return {**settings, "tie_word_embeddings": tied, "dtype": str(kinds["transformer.wte.weight"]).removeprefix("torch.")}, tensors


def to_hf_tensors(
    config: Config, weights: "Mapping[str, torch.Tensor]", model_type: Optional[str] = None
) -> "Iterator[tuple[str, torch.Tensor]]":
    """transformers' name and value of every tensor of a LitGPT state dict, one at a time. A head that is the embedding is left out.

    `model_type`: the architecture to name them for; default: the config's own. Raises UserError if there is none.
    """
    from litgpt.convert.litgpt import is_tied
    from litgpt.convert.names import stored_form

    for name, slot in hf_slots(config, model_type or hf_settings(config)["model_type"], is_tied(weights)).items():
        yield name, stored_form(slot, config, weights)


def hf_slots(config: Config, model_type: str, tied: bool) -> "dict[str, Slot]":
    """The name of every tensor that a transformers model of that type stores, and its place here."""
    from litgpt.convert.names import hf_table, shapes, slots, summary

    keys = shapes(config, 6 * config.n_layer, f"the model {config.name!r}")
    found = slots(hf_table(model_type, config), config, keys)
    if homeless := keys.keys() - {key for slot in found.values() for key in slot.keys}:
        raise UserError(f"a {model_type} model of transformers has no place for {summary(sorted(homeless))} of {config.name!r}")
    return {name: slot for name, slot in found.items() if not (tied and slot.key == "lm_head.weight")}


def hf_settings(config: Config, source: Optional[Path] = None) -> dict[str, Any]:
    """config.json for a model: that of the checkpoint folder `source` or of the base it was tuned from, if it says what `config` says;
    else a new one. Raises UserError if no architecture of transformers computes this model.
    """
    from litgpt.convert.hf import differences

    kept: dict[str, Any] = {}
    for file in _kept_configs(source) if source else []:
        kept = files.read_json(file)
        with suppress(UserError):
            if "text_config" not in kept and not differences(Config.from_hf(kept), config):
                return kept
    try:
        return catalog.to_hf(config, prefer=kept.get("model_type"))
    except ValueError as error:
        raise UserError(f"{source or config.name}: {error}") from None


def _kept_configs(source: Path) -> list[Path]:
    """The config.json files that may be the model's, the folder's own first."""
    folders = [source]
    if (source / "hyperparameters.yaml").is_file():
        settings = files.read_yaml(source / "hyperparameters.yaml")
        base = settings.get("checkpoint_dir") if isinstance(settings, dict) else None
        folders += [Path(base)] if isinstance(base, str) else []
    return [folder / "config.json" for folder in folders if (folder / "config.json").is_file()]


def _complete_tokenizer(source: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Say in `folder` and in `settings` what transformers would guess otherwise: the tokenizer's class, and the ids of BOS and EOS."""
    from litgpt.tokenizer import Tokenizer

    file = folder / "tokenizer_config.json"
    stated = files.read_json(file) if file.is_file() else {}
    if (folder / "tokenizer.json").is_file() and "tokenizer_class" not in stated:
        atomic.write_text(file, json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **stated}, indent=2, ensure_ascii=False) + "\n")
    if not (folder / "tokenizer.json").is_file():
        return
    tokenizer = Tokenizer(source)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    for key, value in ids.items():
        if settings.get(key) is None:
            settings[key] = value
    if not (folder / "generation_config.json").is_file():
        atomic.write_text(folder / "generation_config.json", json.dumps(ids, indent=2) + "\n")
