"""`litgpt convert_to_gguf`: convert a checkpoint folder into a GGUF file, for llama.cpp and everything built on it."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Literal, Optional

from litgpt.atomic import put_file, scratch_folder
from litgpt.convert.gguf.ollama import write_modelfile
from litgpt.convert.resolve import open_full_model
from litgpt.errors import UserError
from litgpt.files import require_place
from litgpt.values import checked

QUANTIZER = "llama-quantize"  # llama.cpp's program, for formats that the gguf library only reads
Formats = Literal[
    "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0",
    "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k",
]  # fmt: skip


@checked
def convert_to_gguf(
    checkpoint_dir: Path,
    gguf_file: Path,
    *,
    dtype: Optional[Formats] = None,
    overwrite: bool = False,
) -> None:
    """Convert a checkpoint folder, base, fully tuned or merged, into a GGUF file, with a Modelfile for Ollama next to it.

    Args:
        checkpoint_dir: The checkpoint folder.
        gguf_file: The new file.
        dtype: The number format of the matrices. Default: their own. q8_0 takes half the bytes of bf16 with nearly the same answers, q4_0 a
            quarter. Formats with k (q4_k_m ...) are more accurate at the same size, and need llama.cpp's llama-quantize on the PATH.
        overwrite: Replace an existing file.
    """
    from litgpt.convert.gguf.writer import BLOCKS, unwindowed, write_gguf

    target = gguf_file
    if target.suffix.lower() != ".gguf":
        raise UserError(f"{target} is not the name of a GGUF file, which ends in .gguf")
    require_place(target)
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists already: name another file, or add --overwrite to replace it")
    program = None  # that quantises
    if dtype is not None and "_k" in dtype and (program := shutil.which(QUANTIZER)) is None:
        others = ", ".join(name.lower() for name in BLOCKS)
        raise UserError(
            f"dtype {dtype} needs llama.cpp's program {QUANTIZER} on the PATH: build or install llama.cpp, or choose one of {others}"
        )
    source = open_full_model(checkpoint_dir, "a GGUF file")
    if program:
        architecture = _quantise(program, source, target, str(dtype), overwrite)
    else:
        architecture = write_gguf(source, target, dtype, overwrite)
    if window := unwindowed(architecture, source):
        print(f"Note: llama.cpp applies no sliding window in files of this architecture: up to {window} tokens the model is the same.")
    print(f"Converted {source} to {target} (architecture {architecture}, {target.stat().st_size / 1e9:.2f} GB).")
    if modelfile := write_modelfile(source, target, overwrite):
        name = re.sub(r"[^a-z0-9_.]+", "-", target.stem.lower()).strip("-.") or "model"
        print(f"For Ollama: ollama create {name} -f {shlex.quote(str(modelfile))}")
    else:
        print(f"No Modelfile for Ollama is written: Modelfile and {target.stem}.Modelfile exist already in {target.parent}")


def _quantise(program: str, source: Path, target: Path, dtype: str, overwrite: bool) -> str:
    """Write the file in the weights' own format, and let llama.cpp's program convert it to the wanted one. Returns the architecture."""
    from litgpt.convert.gguf.writer import write_gguf

    with scratch_folder(target.parent) as folder:
        plain, made = folder / "plain.gguf", folder / "made.gguf"
        architecture = write_gguf(source, plain)
        done = subprocess.run([program, str(plain), str(made), dtype.upper()], capture_output=True, text=True, errors="replace")
        if done.returncode or not made.is_file():
            reason = (done.stderr or done.stdout).strip().splitlines()
            raise UserError(f"{program} cannot make {dtype} of {source}: {reason[-1][:300] if reason else f'exit code {done.returncode}'}")
        put_file(made, target, overwrite)
    print(f"Quantised to {dtype} by {program}.")
    return architecture
