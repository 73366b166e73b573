"""`litgpt convert_to_litgpt`: a Hugging Face folder, a GGUF file or LitGPT's own weights into a checkpoint folder."""

from pathlib import Path
from typing import Literal, Optional

from litgpt.errors import UserError


def convert_to_litgpt(
    source: Optional[Path] = None,
    checkpoint_dir: Optional[Path] = None,
    *,
    model_name: Optional[str] = None,
    dtype: Optional[Literal["float32", "bfloat16", "float16"]] = None,
) -> None:
    """Convert a Hugging Face folder, a GGUF file or LitGPT's own weights into a LitGPT checkpoint folder.

    Args:
        source: A folder with config.json and weights, a .gguf file, or a .pth file that LitGPT wrote (of any version, or in pretraining).
        checkpoint_dir: The new folder. Without it a Hugging Face folder is converted in place, and a GGUF file into checkpoints/<its name>.
            Given alone it is the folder to convert in place, LitGPT's habit.
        model_name: Take the settings of this named model (such as Llama-3.2-1B) and refuse weights of another.
        dtype: The number format of the stored weights. Without it: the source's; bfloat16 where the source is quantised.
    """
    from litgpt.convert.resolve import HOME, convert, locate

    given = source or checkpoint_dir
    if given is None:
        raise UserError("there is nothing to convert: name a Hugging Face folder, a .gguf file or a .pth file")
    if is_own(given) and checkpoint_dir is not None and checkpoint_dir != given:
        import torch

        from litgpt.convert.litgpt import convert_own

        target = checkpoint_dir
        config = convert_own(given, target, model_name, None if dtype is None else getattr(torch, dtype))
    elif given.is_file() and is_own(given):
        raise UserError(f"{given} is LitGPT's own file: give --checkpoint_dir, the folder to make")
    else:
        given = locate(given)
        target = (source and checkpoint_dir) or (given if given.is_dir() else HOME / given.stem)
        config = convert(given, target, model_name, dtype, replace=target.resolve() == given.resolve())
    print(f"Converted {given} to {target} (model {config.name}).")


def is_own(source: Path) -> bool:
    """Whether the source is a LitGPT `.pth` file, or a folder with one and no Hugging Face model."""
    from litgpt.checkpoint import WEIGHTS
    from litgpt.convert.resolve import is_hf_folder

    return source.suffix == ".pth" if source.is_file() else (source / WEIGHTS).is_file() and not is_hf_folder(source)
