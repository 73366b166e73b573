"""`litgpt download`: download the needed files of a model from the Hugging Face hub into `checkpoints/ORG/NAME`, and convert them."""

import difflib
import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Optional

from litgpt import families as catalog
from litgpt.atomic import digest, locked
from litgpt.checkpoint import HOME, HUB_NAME, TOKENIZER_FILES, WEIGHT_FILES, hf_weights, require_tokenizer
from litgpt.convert.resolve import convert, open_checkpoint
from litgpt.errors import UserError
from litgpt.files import open_regular, read_json
from litgpt.streams import drawing, without_secrets
from litgpt.text import first_line, printable, size
from litgpt.values import checked

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoSibling

SETTINGS = ("config.json", *TOKENIZER_FILES)  # fetched if the model has them
OPTIONAL = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
MORE_TEMPLATES = re.compile(r"additional_chat_templates/[\w.-]+\.jinja")
ADDRESS = re.compile(r"(?:https?://[^/]+/)?([\w.-]+)/([\w.-]+)(?:/.*)?")  # of a model's page
LOCAL = (str(HOME), "out", "data")  # folders of the commands, not organisations on the hub
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@checked
def download_from_hub(
    repo_id: str,
    access_token: Optional[str] = None,
    tokenizer_only: bool = False,
    convert_checkpoint: bool = True,
    dtype: Optional[Literal["float32", "bfloat16", "float16"]] = None,
    checkpoint_dir: Path = HOME,
    model_name: Optional[str] = None,
) -> None:
    """Download a model from the Hugging Face hub and convert it. An interrupted download is resumed.

    Args:
        repo_id: The model's name on the hub, ORG/NAME, or "list" for the models whose settings are known by name.
        access_token: Hugging Face token, for models that need one. Default: HF_TOKEN in the environment, or the saved login.
        tokenizer_only: Download the tokenizer and the settings, but no weights.
        convert_checkpoint: Add lit_model.pth and model_config.yaml, so that the folder is a checkpoint folder.
        dtype: Number format of the converted weights. Default: the model's own.
        checkpoint_dir: The folder in which ORG/NAME is created.
        model_name: Use the settings of this named model (such as Llama-3.2-1B) and refuse weights of another.
    """
    if repo_id == "list":
        print("\n".join(hub_names()))
        return
    if not HUB_NAME.fullmatch(repo_id):
        by_name = {name.partition("/")[2].lower(): name for name in hub_names()}
        near = [by_name[name] for name in difflib.get_close_matches(repo_id.lower(), by_name, n=3)]
        if not near and (match := ADDRESS.fullmatch(repo_id)) and HUB_NAME.fullmatch(meant := "/".join(match.groups())):
            near = [meant]
        hint = f", such as {', '.join(near)}" if near else ""
        raise UserError(f"{repo_id!r} is not a model's name on the hub: give ORG/NAME{hint} (`litgpt download list` prints those known)")
    folder = checkpoint_dir / repo_id
    fetch(repo_id, folder, access_token, tokenizer_only, convert_checkpoint, model_name)
    if tokenizer_only or not convert_checkpoint:
        print(f"{repo_id} is in {folder}")
        return
    if dtype or model_name:
        convert(folder, folder, model_name, dtype)
    else:
        open_checkpoint(folder)
    require_tokenizer(folder)
    print(f"{repo_id} is in {folder}, ready as a checkpoint_dir")


def fetch_named(name: str | Path, access_token: str | None = None) -> None:
    """Download the model ORG/NAME from the hub into `checkpoints`, after a notice, unless the name means a folder."""
    org = str(name).partition("/")[0]
    is_path = org in LOCAL or any(place.exists() for place in (Path(org), Path(name), HOME / name))
    if HUB_NAME.fullmatch(str(name)) and not is_path:
        print(f"{printable(str(name))} is not on this machine: downloading it from the hub into {HOME / name}", file=sys.stderr)
        fetch(str(name), HOME / name, access_token)


def hub_names() -> list[str]:
    """Return ORG/NAME of every named model, sorted."""
    rows = [(catalog.find(name) or {})["hf_config"] for name in catalog.names()]
    return sorted({f"{row['org']}/{row['name']}" for row in rows}, key=str.lower)


def fetch(
    repo_id: str,
    folder: Path,
    access_token: str | None = None,
    tokenizer_only: bool = False,
    will_convert: bool = True,
    model_name: str | None = None,
) -> None:
    """Download the files that a conversion needs into `folder`, unless they exist.

    Raises UserError with the missing files if the hub does not serve them or a file in the folder differs from the hub's, and before the
    weights are downloaded if they cannot be converted.
    """
    api = hub(access_token)
    from huggingface_hub import hf_hub_url

    with _explained(api, repo_id, folder, tokenizer_only):
        info = api.model_info(repo_id, files_metadata=True)
        files = {file.rfilename: file for file in info.siblings or []}
        names = [name for name in (*SETTINGS, *filter(MORE_TEMPLATES.fullmatch, files)) if name in files]
        weights = None if tokenizer_only else choose_weights(repo_id, list(files))

        def get(names: list[str]) -> None:
            wanted = [files[name] for name in names if not _exists(folder / name, files[name])]
            if (need := sum(file.size or 0 for file in wanted)) > (free := shutil.disk_usage(folder).free):
                raise UserError(
                    f"{folder} needs {size(need)}, but only {size(free)} are free there: make room, or name another --checkpoint_dir"
                )
            for file in wanted:
                url = hf_hub_url(repo_id, file.rfilename, revision=info.sha, endpoint=api.endpoint)
                _get(url, file, folder, access_token)

        with locked(folder):
            get(names)
            if weights is None:
                return
            if will_convert:
                from litgpt.convert.hf import choose_config

                choose_config(folder, model_name)
            get([weights])
            if weights.endswith(".index.json"):
                shards = _shards(folder / weights)
                missing = [name for name in shards if name not in files or "/" in name]
                if missing or not shards:
                    named = ", ".join(missing) or "no files"
                    raise UserError(f"{repo_id} on the hub is broken: its {weights} names {named}, which it lacks")
                get(shards)


def hub(access_token: str | None) -> "HfApi":
    """Return the hub's client."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub
    from huggingface_hub.utils import logging  # the package does not import it by itself

    logging.set_verbosity_error()
    return huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=access_token)


def _get(url: str, file: "RepoSibling", folder: Path, access_token: str | None) -> None:
    """Download a file under a temporary name, resuming an earlier try; compare its digest, and rename it.

    huggingface_hub's own download starts a file again in every process (as of 2.4).
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    announced = _hub_digest(file)
    path = folder / file.rfilename
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.{(announced or 'unknown')[:12]}.part")
    with open(open_regular(partial, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as content:
        headers = build_hf_headers(token=access_token)
        have = content.tell()
        if have != file.size or not have:
            with drawing():
                http_get(url, content, resume_size=have, headers=headers, expected_size=file.size, displayed_filename=printable(path.name))
        content.flush()
        os.fsync(content.fileno())
    if announced is not None and _digest(partial, file) != announced:
        partial.unlink()
        raise UserError(f"{without_secrets(url)} does not have the content that the hub announces (digest {announced}): try again")
    partial.replace(path)


def _exists(path: Path, file: "RepoSibling") -> bool:
    """Return True if the hub's file is at `path`, False if no file is. Raise UserError if another file is there."""
    if not path.exists():
        return False
    if path.stat().st_size == file.size and _hub_digest(file) in (None, _digest(path, file)):
        return True
    raise UserError(f"{path} differs from the hub's file: move it away to download, or leave the folder as it is and use it")


def _hub_digest(file: "RepoSibling") -> str | None:
    """Return the digest on the hub: SHA-256 of a large file, git's object name of a small one."""
    return file.lfs.sha256 if file.lfs is not None else file.blob_id


def _digest(path: Path, file: "RepoSibling") -> str:
    from huggingface_hub.utils.sha import git_hash

    return digest(path) if file.lfs is not None else git_hash(path.read_bytes())


def choose_weights(repo_id: str, names: list[str]) -> str:
    """Return the name of the weight file to download, or of its index. Raise UserError if there is none in a known format."""
    for name in WEIGHT_FILES:
        if name in names:
            return name
    others = sorted(name for name in names if name.endswith((".gguf", ".safetensors", ".bin", ".pth", ".h5", ".msgpack")))
    content = f"it holds {', '.join(others[:4])}{' and more' if len(others) > 4 else ''}" if others else "it holds no weights"
    has_gguf = any(name.endswith(".gguf") for name in others)
    by_hand = "; get one of the .gguf files by hand and give its path as checkpoint_dir" if has_gguf else ""
    raise UserError(f"{repo_id} has none of {', '.join(WEIGHT_FILES)}: {content}{by_hand}")


def _shards(index: Path) -> list[str]:
    """Return the names of the files in a `.index.json`."""
    weight_map = read_json(index).get("weight_map")
    return sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []


@contextmanager
def _explained(api: "HfApi", repo_id: str, folder: Path, tokenizer_only: bool) -> Iterator[None]:
    """Turn errors of the hub and the disk into one UserError with a remedy. If all files exist, an unreachable hub is only reported."""
    from huggingface_hub import errors

    page, secret = without_secrets(f"{api.endpoint}/{repo_id}"), "give --access_token, or HF_TOKEN in the environment"
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(f"{page} is gated: accept its terms there, then {secret}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{page} does not exist, or is private: check the name, or {secret}") from None
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise UserError(f"{folder} cannot be written to: {error.strerror}. Correct that and try again: the download resumes") from None
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"HTTP status {status}" if status else without_secrets(first_line(error))[:200]  # without the web library's advice
        if not (missing := missing_files(folder, tokenizer_only)):
            print(f"{page} cannot be reached ({reason}): the files in {folder} are used", file=sys.stderr)
            return
        raise UserError(
            f"{page} cannot be downloaded ({reason}). Try again, the download resumes; or get by hand, from a browser or another machine, "
            f"into {folder}: {', '.join(missing)}, and as far as it has them {', '.join(OPTIONAL)}"
        ) from None


def missing_files(folder: Path, tokenizer_only: bool) -> list[str]:
    """Return the names of the files that a checkpoint needs and the folder lacks."""
    needed, weights = ["config.json", "tokenizer.json"], None if tokenizer_only else hf_weights(folder)
    if weights is not None and weights.name.endswith(".index.json"):
        needed += _shards(weights)
    missing = [name for name in needed if not (folder / name).is_file()]
    if weights is None and not tokenizer_only:
        missing.append("model.safetensors (or model.safetensors.index.json and the files that it names)")
    return missing
