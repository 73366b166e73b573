"""`litgpt convert_to_gguf`: a checkpoint folder into a GGUF file, for llama.cpp and everything built on it."""

from pathlib import Path
from typing import Literal, Optional

from litgpt.convert.gguf.writer import unwindowed, write_gguf
from litgpt.convert.resolve import open_full_model
from litgpt.errors import UserError


def convert_to_gguf(
    checkpoint_dir: Path,
    gguf_file: Path,
    *,
    dtype: Optional[Literal["f32", "f16", "bf16", "q8_0"]] = None,
    overwrite: bool = False,
) -> None:
    """Convert a checkpoint folder, base, fully tuned or merged, into a GGUF file.

    Args:
        checkpoint_dir: The checkpoint folder.
        gguf_file: The new file.
        dtype: The number format of the matrices. Default: their own.
        overwrite: Replace an existing file.
    """
    target = Path(gguf_file)
    if target.suffix.lower() != ".gguf":
        raise UserError(f"{target} is no name of a GGUF file: it ends in .gguf")
    if target.is_dir() or (target.exists() and not overwrite):
        raise UserError(f"{target} exists already: name another file, or add --overwrite to replace it")
    source = open_full_model(checkpoint_dir, "a GGUF file")
    architecture = write_gguf(source, target, dtype)
    if window := unwindowed(architecture, source):
        print(f"Note: llama.cpp applies no sliding window in files of this architecture: up to {window} tokens the model is the same.")
    print(f"Converted {source} to {target} (architecture {architecture}, {target.stat().st_size / 1e9:.2f} GB).")
