"""`litgpt convert_from_litgpt`: convert a checkpoint folder into one that transformers loads."""

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional

from litgpt import atomic, checkpoint, files
from litgpt.config import CORRECTION, Config
from litgpt.convert.resolve import open_full_model
from litgpt.errors import UserError
from litgpt.tokenizer import Tokenizer
from litgpt.values import checked

if TYPE_CHECKING:
    import torch

    from litgpt.convert.names import Slot
    from litgpt.convert.write import Pending

# keys of config.json that no longer hold, or name files that are not copied
NOT_KEPT = ("torch_dtype", "_name_or_path", "auto_map", "quantization_config")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@checked
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
        dtype: The number format of the weights. Default: each weight's own.
        max_shard_size: The largest weight file, such as 500MB or 5GB. A larger model is written as several files and their index.
    """
    largest = parse_size(max_shard_size)
    import torch

    from litgpt.convert.card import write_card
    from litgpt.convert.write import write_sharded

    source, target = open_full_model(checkpoint_dir, "a transformers model"), Path(output_dir)

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
    """Return the bytes of a size such as 5GB, 500MB or 2000000. Raises UserError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([KMGT]?)B?\s*", str(text), re.IGNORECASE)
    if match is None or not (size := int(float(match[1]) * UNITS[match[2].upper()])):
        raise UserError(f"max_shard_size is {text!r}: a size such as 5GB or 500MB is needed")
    return size


def model_to_hf(source: Path, dtype: "Optional[torch.dtype]" = None) -> "tuple[dict[str, Any], dict[str, Pending]]":
    """Return the config.json of a checkpoint folder, and its tensors under transformers' names, not yet loaded.

    Raises UserError for a model that no class of transformers computes, and for weights that do not fit it.
    """
    import torch

    from litgpt.convert.experts import interleaved
    from litgpt.convert.hf import hf_settings
    from litgpt.convert.litgpt import open_own
    from litgpt.convert.names import stored_form, stored_shape
    from litgpt.convert.write import Pending

    config, file = Config.from_checkpoint(source), source / checkpoint.WEIGHTS
    settings = hf_settings(config, source)
    loads = {key: load for keys, load in open_own(file, config, dtype).items() for key in keys}
    weights = {name.replace(".attn.attn.", ".attn.qkv."): tensor for name, tensor in checkpoint.load_weights(file).items()}
    tied = checkpoint.is_tied(weights, by_value=True)
    sizes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    dtypes = {key: torch.float32 if key.endswith(CORRECTION) else dtype or tensor.dtype for key, tensor in weights.items()}

    tensors = {
        name: Pending(stored_shape(slot, config, sizes), dtypes[slot.key], partial(stored_form, slot, config, loads))
        for name, slot in hf_slots(config, settings["model_type"], tied).items()
    }
    if config.swiglu_limit is not None:
        tensors = interleaved(tensors)
    settings = {key: value for key, value in settings.items() if key not in NOT_KEPT}
    return {**settings, "tie_word_embeddings": tied, "dtype": str(dtypes["transformer.wte.weight"]).removeprefix("torch.")}, tensors


def hf_slots(config: Config, model_type: str, tied: bool) -> "dict[str, Slot]":
    """Return the name of every tensor that a transformers model of that type stores, and its place here.

    Raises UserError for a LitGPT tensor without a name there. A tied head is not stored.
    """
    from litgpt.convert.names import hf_table, shapes, slots, summary

    keys = shapes(config, f"the model {config.name!r}")
    by_name = slots(hf_table(model_type, config), config, keys)
    if unnamed := keys.keys() - {key for slot in by_name.values() for key in slot.keys}:
        raise UserError(f"a {model_type} model of transformers has no place for {summary(sorted(unnamed))} of {config.name!r}")
    return {name: slot for name, slot in by_name.items() if not (tied and slot.key == "lm_head.weight")}


def _complete_tokenizer(source: Path, folder: Path, settings: dict[str, Any]) -> None:
    """Write into `folder` and `settings` what transformers would otherwise guess: the tokenizer's class, and the ids of BOS and EOS."""
    if not (folder / "tokenizer.json").is_file():
        return
    file = folder / "tokenizer_config.json"
    stated = files.json_if_there(file)
    if "tokenizer_class" not in stated:
        atomic.write_text(file, json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **stated}, indent=2, ensure_ascii=False) + "\n")
    tokenizer = Tokenizer(source)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    settings.update({key: value for key, value in ids.items() if settings.get(key) is None})
    if not (folder / "generation_config.json").is_file():
        atomic.write_text(folder / "generation_config.json", json.dumps(ids, indent=2) + "\n")
