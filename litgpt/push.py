"""`litgpt push`: upload a model or an adapter to the Hugging Face hub, in a form that other libraries load."""

import glob
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from fnmatch import fnmatch
from pathlib import Path
from typing import Optional

from litgpt.atomic import scratch_folder
from litgpt.checkpoint import ADAPTER_WEIGHTS, FOREIGN_ADAPTERS, HUB_NAME, TOKENIZER_FILES, WEIGHTS
from litgpt.convert.resolve import is_hf_folder, open_checkpoint
from litgpt.download import hub
from litgpt.errors import UserError
from litgpt.files import require_own
from litgpt.streams import drawing, without_secrets
from litgpt.text import counted, first_line, size
from litgpt.values import checked

PUBLIC = (  # the files of a model or an adapter; nothing else leaves the machine
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json", "*.gguf", "Modelfile"),
    *("config.json", *FOREIGN_ADAPTERS, *TOKENIZER_FILES, "*.jinja", "additional_chat_templates/*.jinja", "prompt_style.yaml"),
    *("README.md", "LICENSE*"),
)


@checked
def push(
    folder: Path, repo_id: str, *, private: bool = False, access_token: Optional[str] = None, commit_message: str = "Upload with litgpt"
) -> None:
    """Upload a model or an adapter to the Hugging Face hub, with its model card.

    A Hugging Face folder, a PEFT adapter and a portable Skip2-LoRA adapter are uploaded as they are. A run, an adapter or a checkpoint of
    litgpt is converted first: LoRA to PEFT's format, Skip2-LoRA to the portable one, a model to Hugging Face's. Merged LoRA goes up as a
    model after `litgpt convert_from_litgpt`.

    Args:
        folder: The folder.
        repo_id: The repository on the hub, ORG/NAME. It is created if it does not exist.
        private: Make a new repository private.
        access_token: Hugging Face token that may write. Default: HF_TOKEN in the environment, or the saved login.
        commit_message: Title of the commit.
    """
    if not HUB_NAME.fullmatch(repo_id):
        raise UserError(f"{repo_id!r} is not the name of a repository on the hub: give ORG/NAME, such as your-name/my-model")
    with _public_form(folder, repo_id.partition("/")[2]) as public:
        names = sorted({path.relative_to(public).as_posix() for pattern in PUBLIC for path in public.glob(pattern) if path.is_file()})
        if not any(fnmatch(name, pattern) for pattern in PUBLIC[:5] for name in names):
            raise UserError(f"{public} has no weights to upload")
        for name in names:
            require_own(public / name, public)
        total = sum((public / name).stat().st_size for name in names)
        listed = ", ".join(names).replace("\n", "\\n")
        print(f"Uploading {counted(len(names), 'file')}, {size(total)}, to {repo_id}: {listed}", file=sys.stderr)
        print(without_secrets(_upload(public, names, repo_id, private, access_token, commit_message)))


@contextmanager
def _public_form(folder: Path, name: str) -> Iterator[Path]:
    """Yield the folder, or a temporary one named `name` with its converted form."""
    is_gguf = folder.is_dir() and any(folder.glob("*.gguf")) and not (folder / WEIGHTS).is_file()
    if is_hf_folder(folder) or any((folder / file).is_file() for file in FOREIGN_ADAPTERS) or is_gguf:
        yield folder
        return
    source = open_checkpoint(folder)
    writable = os.access(source.parent, os.W_OK)
    with scratch_folder(source.parent if writable else Path(tempfile.gettempdir())) as place:
        from litgpt.convert.adapter import convert_adapter
        from litgpt.convert.from_litgpt import convert_from_litgpt

        print(f"Converting {source} ...", file=sys.stderr)
        with redirect_stdout(io.StringIO()):  # a temporary path is of no use
            (convert_adapter if (source / ADAPTER_WEIGHTS).is_file() else convert_from_litgpt)(source, place / name)
        yield place / name


def _upload(folder: Path, names: list[str], repo_id: str, private: bool, token: Optional[str], message: str) -> str:
    """Upload the files and return the address of the model's page. Raises UserError if the hub refuses or is not reached."""
    api = hub(token)
    from huggingface_hub import errors

    page = without_secrets(f"{api.endpoint}/{repo_id}")
    try:
        with drawing():
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            patterns = list(map(glob.escape, names))
            api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=patterns, commit_message=message)
    except (OSError, RuntimeError, ValueError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"{page} may not be written to (HTTP status {status}): give --access_token, or HF_TOKEN in the environment, "
                "a token that may write there"
            ) from None
        *_, last = str(error).strip().splitlines() or [""]
        reason = without_secrets(f"HTTP status {status}: {last}" if status else first_line(error))
        raise UserError(f"{page}: the upload failed ({reason[:300]}). Try again: what was uploaded is not sent again") from None
    return page
