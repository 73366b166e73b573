"""Any form of a checkpoint as a checkpoint folder: Hugging Face folders and GGUF files are converted on first use, and remembered.

    given                                            becomes
    a checkpoint folder or an adapter folder         itself
    a Hugging Face folder                            itself, with lit_model.pth and model_config.yaml added, LitGPT's habit
      that may not be written to                     checkpoints/<the folder's name>
    a GGUF file, or a folder that holds one          checkpoints/<the file's name without .gguf>
    ORG/NAME or another name that is no path         checkpoints/ORG/NAME, in any of these forms

`checkpoints` is in the current folder. `conversion.json` beside the weights says what they were made of, by sizes and times: a source that
has changed since is converted again. Nothing is ever replaced but what stands there as made here and has not been changed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.atomic import MANIFEST, locked, new_folder, write_text
from litgpt.checkpoint import ADAPTER_WEIGHTS, TOKENIZER_FILES, WEIGHTS
from litgpt.convert.hf import WEIGHT_FILES, shard_files
from litgpt.errors import UserError
from litgpt.files import read_json

if TYPE_CHECKING:
    from litgpt.config import Config

HOME = Path("checkpoints")
RECORD = "conversion.json"
IN_PLACE = ("model_config.yaml", WEIGHTS)
"""what a conversion adds to a Hugging Face folder, besides the record"""
STAGE = ".conversion"
DTYPES = ("float32", "bfloat16", "float16")
HUB_NAME = re.compile(r"[a-zA-Z0-9_][\w.-]*/[a-zA-Z0-9_][\w.-]*")


def open_checkpoint(given: str | Path, convert: bool = True) -> Path:
    """The checkpoint or adapter folder that `given` means, made if need be: one line on standard error says so.

    Safe with several processes at once. Raises UserError for what does not exist or cannot be converted, and where the place for the
    conversion is taken, and without `convert` for what would have to be converted. A folder with weights of no kind is returned as it is,
    for `checkpoint.require_checkpoint` to judge.
    """
    source = locate(Path(given))
    target = target_of(source)
    if is_fresh(source, target):
        return target
    if not convert:
        raise UserError(f"{source} would be converted first, and a dry run writes nothing: run `litgpt convert_to_litgpt {source}`")
    with _locked(source, target):
        if not is_fresh(source, target):
            start, earlier, changed = time.perf_counter(), _record(target) or {}, (target / WEIGHTS).exists()
            _convert(source, target, earlier.get("model_name"), earlier.get("dtype"), replace=True)
            place, again = (target / WEIGHTS if target == source else target), ", which has changed," if changed else ""
            print(f"converted {source}{again} to {place} (once, {time.perf_counter() - start:.1f} s)", file=sys.stderr)
    return target


def locate(given: Path) -> Path:
    """The folder or GGUF file: `given` itself, else below `checkpoints`. UserError if it is neither, or holds several GGUF files."""
    found = given if given.exists() or given.is_absolute() else HOME / given
    if not found.exists():
        remedy = "check the path, or make it with `litgpt convert_to_litgpt`"
        if HUB_NAME.fullmatch(str(given)):
            remedy = f"nor does {found}; `litgpt download {given}` gets the model of that name"
        raise UserError(f"checkpoint folder {given} does not exist: {remedy}")
    if found.is_file():
        if found.suffix.lower() != ".gguf":
            raise UserError(f"{found} is a file: name its folder, a Hugging Face folder or a .gguf file")
        return found
    if not found.is_dir():
        raise UserError(f"{found} is a pipe or a device: name a folder or a .gguf file")
    if is_hf_folder(found) or any((found / name).is_file() for name in (WEIGHTS, ADAPTER_WEIGHTS)):
        return found
    files = sorted(found.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{found} holds {len(files)} GGUF files: name one of them, such as {files[0]}")
    return files[0] if files else found


def is_hf_folder(folder: Path) -> bool:
    """Whether the folder has a Hugging Face model's config and weights."""
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in WEIGHT_FILES)


def target_of(source: Path) -> Path:
    """Where the conversion of `source` belongs; `source` itself if in place, or if there is nothing to convert."""
    if source.is_file():
        return HOME / source.stem
    has_weights = any((source / name).is_file() for name in (WEIGHTS, ADAPTER_WEIGHTS))
    if has_weights or not is_hf_folder(source) or os.access(source, os.W_OK):
        return source
    target = HOME / source.resolve().name
    if target.resolve() == source.resolve():
        raise UserError(
            f"{source} must be converted and may not be written to: run `litgpt convert_to_litgpt {source} --checkpoint_dir DIR`"
        )
    return target


def is_fresh(source: Path, target: Path) -> bool:
    """Whether there is nothing to do: `target` holds the conversion of `source` as it is now, or no conversion is called for.

    Weights in the source's own folder that were not made here, or changed or copied since, are the user's: never stale. Sources that
    were deleted after the conversion do not count. Raises UserError for another `target` that is no conversion of `source`.
    """
    record, in_place = _record(target), target == source
    ours = record is not None and record["source"] == _name(source, in_place)
    if in_place:
        if not is_hf_folder(source):
            return True
        if not (source / WEIGHTS).is_file():
            return (source / ADAPTER_WEIGHTS).is_file()
        if record is None or not ours or _changed(source, record, in_place):
            return True
    elif not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    elif not ours:
        held = f"the conversion of {record['source']}" if record else "something else"
        raise UserError(
            f"{source} would be converted to {target}, which exists and holds {held}: name {target} if that is what you want, or choose a "
            f"place with `litgpt convert_to_litgpt {source} --checkpoint_dir DIR`"
        )
    assert record is not None
    folder = source if source.is_dir() else source.parent
    now = _stamps([folder / name for name in record["files"]], folder)
    return all(record["files"][name] == stamp for name, stamp in now.items())


def convert(source: Path, target: Path, model_name: str | None = None, dtype: str | None = None, replace: bool = False) -> Config:
    """Convert a Hugging Face folder or a GGUF file into `target`, or in place where both are one folder, and keep a record.

    `model_name` and `dtype` ("bfloat16" ...) None: what the source itself says. The result appears whole or not at all. `replace`: an
    earlier conversion of `source` may be there. Raises UserError if that was changed since it was made, or something else is there.
    """
    with _locked(source, target):
        return _convert(source, target, model_name, dtype, replace)


def _convert(source: Path, target: Path, model_name: str | None, dtype: str | None, replace: bool) -> Config:
    in_place = source.resolve() == target.resolve()
    folder = source if source.is_dir() else source.parent
    files = _stamps(source_files(source, in_place), folder)
    record = {"source": _name(source, in_place), "model_name": model_name, "dtype": dtype, "files": files}
    again = replace and _is_as_made(source, target, in_place)
    if in_place:
        return _convert_in_place(source, record, again)
    with new_folder(target, overwrite=again, manifest=False) as made:  # the conversion's own manifest is in it
        config = _into(source, made, record)
        _write_record(made, record, _files(made))
    return config


def source_files(source: Path, in_place: bool) -> list[Path]:
    """The files that a conversion reads. In place the tokenizer's are not converted: they are used as they are."""
    if source.is_file():
        return [source]
    weights = next((source / name for name in WEIGHT_FILES if (source / name).is_file()), None)
    files = [source / "config.json", *([] if in_place else (source / name for name in TOKENIZER_FILES))]
    if weights is not None:
        files += [weights, *(shard_files(weights) if weights.name.endswith(".index.json") else [])]
    return files


def _into(source: Path, folder: Path, record: dict[str, Any]) -> Config:
    import torch

    dtype = None if record["dtype"] is None else getattr(torch, record["dtype"])
    if source.is_dir():
        from litgpt.convert.hf import convert_hf

        return convert_hf(source, folder, record["model_name"], dtype)
    from litgpt.convert.gguf.convert import convert_gguf

    return convert_gguf(source, folder, record["model_name"], dtype)


def _convert_in_place(source: Path, record: dict[str, Any], again: bool) -> Config:
    """Convert into a folder inside `source`, then move the two new files out of it, the weights last."""
    config_file, weights = (source / name for name in IN_PLACE)
    if weights.exists() and not again:
        raise UserError(f"{weights} exists already: move it away to convert again")
    made = source / STAGE
    shutil.rmtree(made, ignore_errors=True)  # of a process that was killed
    try:
        config = _into(source, made, record)
        if config_file.exists() and not again and config_file.read_bytes() != (made / config_file.name).read_bytes():
            raise UserError(f"{config_file} exists, and is not what {source / 'config.json'} says: move it away to convert")
        for old in (weights, config_file, source / RECORD):  # in this order: whatever is left if it ends here is converted again
            old.unlink(missing_ok=True)
        for new in (config_file, weights):
            (made / new.name).rename(new)
        _write_record(source, record, [config_file, weights])
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return config


def _is_as_made(source: Path, target: Path, in_place: bool) -> bool:
    """Whether a conversion of `source` is there, each file as it was made. UserError if one of them was changed, or one added."""
    record = _record(target)
    if record is None or record["source"] != _name(source, in_place):
        return False
    if changed := _changed(target, record, in_place):
        what = f"{', '.join(changed)} in {target} {'were' if len(changed) > 1 else 'was'} changed or added after its conversion"
        raise UserError(f"{source} must be converted again, but {what}: move {'that' if in_place else target} away first")
    return True


def _changed(target: Path, record: dict[str, Any], in_place: bool) -> list[str]:
    """The files of a conversion that are not as they were made."""
    now = _stamps([target / name for name in IN_PLACE] if in_place else _files(target), target)
    return sorted(name for name, stamp in now.items() if record["made"].get(name) != stamp)


def _name(source: Path, in_place: bool) -> str:
    """The source in a record: the folder itself, wherever it is moved to, or a path."""
    return "." if in_place else str(source.resolve())


@contextmanager
def _locked(source: Path, target: Path) -> Iterator[None]:
    """One process at a time converts in the folder of `target`; a failure leaves nothing. A full or read-only disk is a UserError."""
    place = target if source.resolve() == target.resolve() else target.parent
    made = [folder for folder in (place, *place.absolute().parents) if not os.path.lexists(folder)]
    try:
        with locked(place):
            yield
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides the one behind the other
        if isinstance(cause, OSError):
            raise UserError(f"{source} cannot be converted to {target}: {cause.strerror or cause}") from None
        raise
    finally:
        with suppress(OSError):  # not empty: the conversion is there
            for folder in made:
                folder.rmdir()


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and file.name not in (RECORD, MANIFEST)]


def _stamps(files: Iterable[Path], below: Path) -> dict[str, list[int]]:
    """[size, time of the last change in ns] of each file that is there, by its name in the folder `below`."""
    facts = {file.relative_to(below).as_posix(): file.stat() for file in files if file.is_file()}
    return {name: [fact.st_size, fact.st_mtime_ns] for name, fact in facts.items()}


def _write_record(folder: Path, record: dict[str, Any], made: list[Path]) -> None:
    write_text(folder / RECORD, json.dumps({**record, "made": _stamps(made, folder)}, indent=1) + "\n")


def _record(folder: Path) -> dict[str, Any] | None:
    """What the folder's conversion.json says; None if there is none that makes sense."""
    try:
        record = read_json(folder / RECORD)
    except UserError:
        return None
    whole = isinstance(record.get("source"), str) and record.get("dtype") in (None, *DTYPES)
    return record if whole and all(isinstance(record.get(key), dict) for key in ("files", "made")) else None
