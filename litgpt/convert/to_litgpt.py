"""`litgpt convert_to_litgpt` and `convert_pretrained_checkpoint`: checkpoint folders from Hugging Face's, GGUF's and LitGPT's weights."""

from pathlib import Path
from typing import Literal, Optional

from litgpt.checkpoint import HOME, WEIGHTS, adapter_hint, load_weights
from litgpt.convert.gguf import stem
from litgpt.convert.resolve import convert, is_hf_folder, locate
from litgpt.errors import UserError
from litgpt.values import checked


@checked
def convert_to_litgpt(
    source: Optional[Path] = None,
    checkpoint_dir: Optional[Path] = None,
    *,
    model_name: Optional[str] = None,
    dtype: Optional[Literal["float32", "bfloat16", "float16"]] = None,
    debug_mode: bool = False,
) -> None:
    """Convert a Hugging Face folder, a GGUF file or LitGPT's own weights into a LitGPT checkpoint folder.

    Args:
        source: A folder with config.json and weights, a .gguf file, or a .pth file that LitGPT wrote (of any version, or in pretraining).
        checkpoint_dir: The new folder. Default: a Hugging Face folder is converted in place, a GGUF file into checkpoints/<its name>.
            Given alone, it is the folder to convert in place, as in LitGPT.
        model_name: Take the settings of this named model (such as Llama-3.2-1B) and refuse weights of another.
        dtype: The number format of the stored weights. Default: the source's; bfloat16 where the source is quantised.
        debug_mode: Print each tensor that was written.
    """
    from litgpt.convert.litgpt import convert_own

    path = source or checkpoint_dir
    if path is None:
        raise UserError("there is nothing to convert: name a Hugging Face folder, a .gguf file or a .pth file")
    is_own = path.suffix == ".pth" if path.is_file() else (path / WEIGHTS).is_file() and not is_hf_folder(path)
    if is_own and checkpoint_dir is not None and checkpoint_dir != path:
        import torch

        target = checkpoint_dir
        config = convert_own(path, target, model_name, None if dtype is None else getattr(torch, dtype))
    elif is_own and path.is_file():
        raise UserError(f"{path} is LitGPT's own file: give --checkpoint_dir, the folder to make")
    else:
        path = locate(path)
        if (hint := adapter_hint(path)) and not is_hf_folder(path):
            raise UserError(f"{path} is not a model{hint}")
        target = (source and checkpoint_dir) or (path if path.is_dir() else HOME / stem(path))
        config = convert(path, target, model_name, dtype)
    if debug_mode:
        for name, tensor in load_weights(target / WEIGHTS).items():
            print(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
    print(f"Converted {path} to {target} (model {config.name}).")


@checked
def convert_pretrained_checkpoint(checkpoint_dir: Path, output_dir: Path) -> None:
    """Make a checkpoint folder from a step of pretraining, ours or LitGPT's, without the optimizer's state.

    Args:
        checkpoint_dir: Folder of the step, with lit_model.pth.
        output_dir: Folder to make.
    """
    folder = locate(checkpoint_dir)
    if not (folder / WEIGHTS).is_file():
        hint = adapter_hint(folder) or ": name a step's folder of a training run"
        raise UserError(f"{folder} holds no {WEIGHTS}{hint}")
    convert_to_litgpt(folder / WEIGHTS, output_dir)
