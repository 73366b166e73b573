"""`litgpt merge_lora`: LoRA adapters folded into the base's weights, so that the result is an ordinary checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Optional

from litgpt import atomic, checkpoint
from litgpt.config import Config
from litgpt.convert.resolve import adapter_folder, open_checkpoint
from litgpt.errors import UserError
from litgpt.values import checked

if TYPE_CHECKING:
    import torch


@checked
def merge_lora(checkpoint_dir: Path, pretrained_checkpoint_dir: Optional[Path] = None, precision: Optional[str] = None) -> None:
    """Fold a LoRA adapter into its base and write lit_model.pth beside the adapter.

    Args:
        checkpoint_dir: Folder of the adapter (lit_model.pth.lora and hyperparameters.yaml), or of its run.
        pretrained_checkpoint_dir: Folder of the base model. Default: the one that hyperparameters.yaml names.
        precision: Number format of the merged weights. Default: the one that the adapter was trained in.
    """
    folder = adapter_folder(Path(checkpoint_dir))
    if not (folder / checkpoint.ADAPTER_WEIGHTS).is_file():
        if (other := checkpoint.adapter_file(folder)).is_file():
            raise UserError(f"{other} is a LLaMA-Adapter, which cannot be merged: generate and chat read the folder as it is")
        if hint := checkpoint.adapter_hint(folder):
            raise UserError(f"{folder} holds no {checkpoint.ADAPTER_WEIGHTS}{hint}")
        raise UserError(f"{folder} holds no adapter: {checkpoint.ADAPTER_WEIGHTS} is missing. Name a folder that `litgpt finetune` wrote")
    if (target := folder / checkpoint.WEIGHTS).exists():
        manifest = atomic.read_manifest(folder)  # LitGPT's folders have none
        is_whole = manifest is not None and checkpoint.WEIGHTS in manifest and not atomic.damages(folder, [checkpoint.WEIGHTS])
        if not (is_whole or (manifest is None and checkpoint.is_mappable(target))):
            raise UserError(f"{target} exists already: move it away to merge again")
        print(f"{folder} is merged already: {checkpoint.WEIGHTS} is there")
        return
    if pretrained_checkpoint_dir is not None:
        pretrained_checkpoint_dir = checkpoint.require_checkpoint(open_checkpoint(pretrained_checkpoint_dir))
    base, _ = checkpoint.adapter_settings(folder, pretrained_checkpoint_dir)

    from litgpt.device import backbone_dtype, default_device, default_precision

    precision = precision or checkpoint.read_hyperparameters(folder).get("precision") or default_precision(default_device())
    weights = merged_weights(checkpoint.load_model(folder, backbone_dtype(precision), base=base))
    if not (folder / "model_config.yaml").is_file():
        checkpoint.save_config(Config.from_checkpoint(base), folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        checkpoint.copy_tokenizer_files(base, folder)
    checkpoint.save_weights(weights, folder / checkpoint.WEIGHTS)
    if atomic.read_manifest(folder) is not None:
        atomic.write_manifest(folder, [checkpoint.WEIGHTS])
    print(f"wrote {folder / checkpoint.WEIGHTS}")


def merged_weights(model: "torch.nn.Module") -> "dict[str, torch.Tensor]":
    """Fold every LoRA of the model into its layer, in place, and return the base's state dict on the CPU. Tied weights stay one tensor.

    Raises UserError for Skip2-LoRA, before anything is changed.
    """
    from litgpt.lora import merge_lora_weights

    merge_lora_weights(model)
    return checkpoint.on_cpu(model.state_dict())
