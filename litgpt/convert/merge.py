"""`litgpt merge_lora`: LoRA adapters folded into the base's weights, so that the result is an ordinary checkpoint."""

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Optional

from litgpt import atomic, checkpoint
from litgpt.archive import is_mappable
from litgpt.config import CORRECTION, Config
from litgpt.convert.resolve import adapter_folder, open_checkpoint
from litgpt.errors import UserError
from litgpt.values import checked

if TYPE_CHECKING:
    import torch

    from litgpt.convert.names import Plan
    from litgpt.lora import Config as LoRAConfig


@checked
def merge_lora(checkpoint_dir: Path, pretrained_checkpoint_dir: Optional[Path] = None, precision: Optional[str] = None) -> None:
    """Fold a LoRA adapter into its base and write lit_model.pth next to the adapter.

    Args:
        checkpoint_dir: Folder of the adapter (lit_model.pth.lora and hyperparameters.yaml), or of its run.
        pretrained_checkpoint_dir: Folder of the base model. Default: the one that hyperparameters.yaml names.
        precision: Number format of the merged weights. Default: the one that the adapter was trained in.
    """
    folder = adapter_folder(checkpoint_dir)
    if not os.path.lexists(folder / checkpoint.ADAPTER_WEIGHTS):
        if hint := checkpoint.adapter_hint(folder):
            raise UserError(f"{folder} holds no {checkpoint.ADAPTER_WEIGHTS}{hint}")
        raise UserError(f"{folder} holds no adapter: {checkpoint.ADAPTER_WEIGHTS} is missing. Name a folder that `litgpt finetune` wrote")
    if (target := folder / checkpoint.WEIGHTS).exists():
        manifest = atomic.read_manifest(folder)  # LitGPT's folders have none
        is_whole = manifest is not None and checkpoint.WEIGHTS in manifest and not atomic.damages(folder, [checkpoint.WEIGHTS])
        if not (is_whole or (manifest is None and is_mappable(target))):
            raise UserError(f"{target} exists already: move it away to merge again")
        print(f"{folder} is merged already: {checkpoint.WEIGHTS} is there")
        return
    if pretrained_checkpoint_dir is not None:
        pretrained_checkpoint_dir = checkpoint.require_checkpoint(open_checkpoint(pretrained_checkpoint_dir))

    from litgpt.device import backbone_dtype, default_device, default_precision

    precision = precision or checkpoint.read_hyperparameters(folder).get("precision") or default_precision(default_device())
    base = write_merged(folder, backbone_dtype(precision), pretrained_checkpoint_dir)
    if not (folder / "model_config.yaml").is_file():
        checkpoint.save_config(Config.from_checkpoint(base), folder)
    if not checkpoint.has_tokenizer(folder):
        checkpoint.copy_tokenizer_files(base, folder)
    if atomic.read_manifest(folder) is not None:
        atomic.write_manifest(folder, [checkpoint.WEIGHTS])
    print(f"wrote {folder / checkpoint.WEIGHTS}")


def write_merged(folder: Path, dtype: "torch.dtype", base: Path | None = None) -> Path:
    """Write lit_model.pth, the base's weights with every LoRA of an adapter folder folded in, and return the base's folder.

    Weights are computed and written one by one. Raises UserError if the base is missing or changed, or the adapter cannot be merged.
    """
    from litgpt.convert.write import write_pth

    base, config = checkpoint.adapted(folder, base)
    plan = merged(folder, base, config, dtype)
    with atomic.new_file(folder / checkpoint.WEIGHTS, replace=False) as file:
        write_pth(plan, file)
        checkpoint.weights_file(base).require_unchanged()
    return base


def merged(folder: Path, base: Path, config: "LoRAConfig", dtype: "torch.dtype") -> "Plan":
    """Return how to compute each weight of the merged model. Tied weights stay one tensor, as long as no adapter changes one of them."""
    from torch import nn

    from litgpt.adapters.base import adapter_parameters
    from litgpt.convert.litgpt import open_own
    from litgpt.lora import LoRALinear, require_mergeable

    model, _ = checkpoint.open_base(config, base)
    require_mergeable(model)
    file = folder / checkpoint.ADAPTER_WEIGHTS
    learned = checkpoint.load_weights(file)
    checkpoint.load_adapter(model, learned, file)
    layers = {
        f"{name}.weight": layer for name, layer in model.named_modules(remove_duplicate=False) if isinstance(layer, LoRALinear) and layer.r
    }
    loads = {key: load for keys, load in open_own(base / checkpoint.WEIGHTS, config).items() for key in keys}
    added = adapter_parameters(model, added=True)
    names: dict[int, list[str]] = {}  # of one tensor
    for key, value in model.state_dict(keep_vars=True).items():
        if key not in added:
            name = key.replace(".linear.", ".")
            names.setdefault(id(layers.get(name, value)), []).append(name)

    def load(name: str) -> "torch.Tensor":
        if name in learned:  # of a module that was trained in full
            return learned[name].to(dtype)
        weight = loads[name]()
        if name.endswith(CORRECTION):
            return weight.float()
        if (layer := layers.get(name)) is None:
            return weight.to(dtype)
        layer.linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        weight, layer.linear = layer.fuse().get_parameter("weight"), None
        return weight.detach()

    return {tuple(keys): partial(load, keys[0]) for keys in names.values()}
