"""`litgpt convert_to_litgpt`: a Hugging Face folder or a GGUF file into a checkpoint folder."""

from pathlib import Path
from typing import Literal, Optional

from litgpt.errors import UserError


def convert_to_litgpt(
    source: Path,
    checkpoint_dir: Optional[Path] = None,
    *,
    model_name: Optional[str] = None,
    dtype: Optional[Literal["float32", "bfloat16", "float16"]] = None,
) -> None:
    """Convert a Hugging Face folder or a GGUF file into a LitGPT checkpoint folder.

    Args:
        source: A folder with config.json and weights (Llama, Mistral, GPT-NeoX), or a .gguf file of the llama architecture.
        checkpoint_dir: The new folder. Without it a Hugging Face folder is converted in place, and a GGUF file into checkpoints/<its name>.
        model_name: Take the settings of this named model (such as Llama-3.2-1B) and refuse weights of another.
        dtype: The number format of the stored weights. Without it: the source's; bfloat16 where the source is quantised.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source} does not exist: give a Hugging Face folder or a .gguf file")
    if source.is_dir() and not (source / "config.json").is_file() and (files := sorted(source.glob("*.gguf"))):
        raise UserError(f"{source} holds GGUF files: name one of them, such as {files[0]}")
    import torch

    number_format = None if dtype is None else getattr(torch, dtype)
    if source.is_dir():
        from litgpt.convert.hf import convert_hf

        in_place = checkpoint_dir is None or Path(checkpoint_dir).resolve() == source.resolve()
        config = convert_hf(source, None if in_place else checkpoint_dir, model_name, number_format)
        target = source if in_place else checkpoint_dir
    else:
        from litgpt.convert.gguf import convert_gguf

        target = checkpoint_dir or Path("checkpoints") / source.stem
        config = convert_gguf(source, target, model_name, number_format)
    print(f"Converted {source} to {target} (model {config.name}).")
