"""Any form of a checkpoint as a checkpoint folder. Hugging Face folders and GGUF files are converted on first use.

    path                                             checkpoint folder
    a checkpoint folder or an adapter folder         itself
    a Hugging Face folder                            itself, with lit_model.pth and model_config.yaml added, as in LitGPT
      without write permission                       checkpoints/<the folder's name>
    a GGUF file, or a folder that holds one          checkpoints/<the file's name without .gguf>
    the folder of a run                              its best or final folder, whichever has the lower validation loss
      that was stopped                               its best folder, else its last step
    ORG/NAME or another relative path                checkpoints/ORG/NAME, in any of these forms

`checkpoints` is in the current folder. `conversion.json` next to the weights records the sizes and times of the source's files: a changed
source is converted again. Only an unmodified earlier conversion is overwritten.
"""

import glob
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from litgpt import checkpoint
from litgpt.atomic import MANIFEST, locked, new_folder, remove_leftovers, write_text
from litgpt.checkpoint import HOME, HUB_NAME, TOKENIZER_FILES, WEIGHTS
from litgpt.config import Config
from litgpt.convert.gguf import SPLIT, stem
from litgpt.errors import UserError
from litgpt.files import expand_path, is_inside, json_if_there, json_in, read_bytes, require_utf8

RECORD = "conversion.json"
CONFIG = "model_config.yaml"
STAGE = ".conversion.litgpt.tmp"  # folder in which a conversion in place is made
DTYPES = ("float32", "bfloat16", "float16")


def open_checkpoint(path: str | Path, convert: bool = True) -> Path:
    """Return the checkpoint or adapter folder that `path` stands for, after converting it if needed (one line on standard error).

    Several processes may call it at once. Raises UserError for a path that does not exist or cannot be converted, for a conversion whose
    target is taken and, without `convert`, for a path that needs conversion. A folder without weights is returned as it is, for
    `checkpoint.require_checkpoint` to judge.
    """
    source = locate(expand_path(path))
    conversion = Conversion(source, target_of(source))
    if conversion.is_fresh():
        conversion.remove_leftovers()
        return conversion.target
    if not convert:
        raise UserError(f"{source} must be converted first: run `litgpt convert_to_litgpt {source}`")
    with conversion.locked():
        if not conversion.is_fresh():
            conversion.run_again()
    return conversion.target


def open_full_model(path: str | Path, form: str) -> Path:
    """Return the folder of a full model, converted if needed. Raises UserError for an adapter, which cannot be converted into `form`."""
    folder = open_checkpoint(path)
    if checkpoint.adapter_file(folder).is_file():
        settings = checkpoint.read_adapter_settings(folder)[1]
        to = " --to gguf" if "GGUF" in form and not settings.get("skip2lora_enabled") else ""
        alone = f"convert the adapter alone with `litgpt convert_adapter {folder} OUTPUT_DIR{to}`"
        if kind := checkpoint.unmergeable(folder, settings):
            why = "reads the outputs of earlier blocks and " if settings.get("skip2lora_enabled") else ""
            remedy = alone if why or settings.get("alora_enabled") else "use the adapter folder as it is"
            raise UserError(f"{folder} holds {kind}, which {why}cannot be folded into {form}: {remedy}")
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder} holds a LoRA adapter and no merged weights: run `litgpt merge_lora {folder}` first, or {alone}")
    if not all((folder / name).is_file() for name in (WEIGHTS, CONFIG)):
        checkpoint.require_checkpoint(folder)
    return folder


def locate(path: Path) -> Path:
    """Return the folder or GGUF file: `path` itself or below `checkpoints`. Raises UserError if it is neither, or ambiguous."""
    place = path if path.exists() or path.is_absolute() else HOME / path
    require_utf8(place, "the readers of weights and tokenizers")
    if not place.exists():
        remedy = "check the path; `litgpt download list` names models to get"
        if HUB_NAME.fullmatch(str(path)):
            remedy = f"nor does {place}; `litgpt download {path}` gets the model of that name"
        elif same := [str(model.relative_to(HOME)) for model in HOME.glob("*/*") if model.name.lower() == str(path).lower()]:
            remedy = f"is {same[0]} meant?"
        raise UserError(f"checkpoint folder {path} does not exist: {remedy}")
    if place.is_file():
        if place.suffix.lower() != ".gguf":
            raise UserError(f"{place} is a file: name its folder, a Hugging Face folder or a .gguf file")
        first = place.with_name(SPLIT.sub(r"\1-00001-of-\3.gguf", place.name))  # of a split file
        return first if first.is_file() else place
    if not place.is_dir():
        raise UserError(f"{place} is a pipe or a device: name a folder or a .gguf file")
    if is_hf_folder(place) or has_weights(place):
        return place
    if result := result_of(place):
        return result
    files = sorted(place.glob("*.gguf"))
    if len({stem(file) for file in files}) > 1:
        raise UserError(f"{place} holds {len(files)} GGUF files: name one of them, such as {files[0]}")
    return files[0] if files else place


def result_of(run: Path) -> Path | None:
    """Return `best` of a run's folder if its validation loss is lower than that of `final`, else `final`; None for other folders.

    A run that was stopped has no `final`: `best`, else the last `step-*`.
    """
    if not has_weights(run / "final"):
        steps = sorted(run.glob("step-*"), key=lambda folder: (len(folder.name), folder.name), reverse=True)
        return next(filter(has_weights, (run / "best", *steps)), None)
    best, final = (json_if_there(run / name / "report.json") for name in ("best", "final"))
    before, after = best.get("val_loss"), final.get("final_val_loss")
    is_better = isinstance(before, float) and isinstance(after, float) and before < after and has_weights(run / "best")
    return run / ("best" if is_better else "final")


def adapter_folder(path: Path) -> Path:
    """Return the folder of an adapter: for the folder of a run, its result; else `path` itself."""
    return path if has_weights(path) else result_of(path) or path


def has_weights(folder: Path) -> bool:
    """Return True if the folder holds a LitGPT model or adapter."""
    return any(os.path.lexists(folder / name) for name in (WEIGHTS, *checkpoint.ADAPTERS))


def is_hf_folder(folder: Path) -> bool:
    """Return True if the folder has a Hugging Face model's config and weights."""
    return os.path.lexists(folder / "config.json") and checkpoint.hf_weights(folder) is not None


def target_of(source: Path) -> Path:
    """Return the folder for the conversion of `source`: `source` itself if it needs none or is converted in place."""
    if source.is_file():
        return HOME / stem(source)
    if has_weights(source) or not is_hf_folder(source) or os.access(source, os.W_OK):
        return source
    target = HOME / source.resolve().name
    if target.resolve() == source.resolve():
        raise UserError(
            f"{source} must be converted and cannot be written to: run `litgpt convert_to_litgpt {source} --checkpoint_dir DIR`"
        )
    return target


def convert(source: Path, target: Path, model_name: str | None = None, dtype: str | None = None) -> Config:
    """Convert a Hugging Face folder or a GGUF file into `target`, or in place if both are one folder, and keep a record.

    `model_name` and `dtype` ("bfloat16" ...) default to what the source states. The result appears completely or not at all. Raises
    UserError if something is in its place; an unmodified conversion in place is overwritten.
    """
    conversion = Conversion(source, target)
    with conversion.locked():
        return conversion.run(model_name, dtype, replace=conversion.in_place)


class Conversion:
    """The conversion of a Hugging Face folder or a GGUF file into the folder `target`, or in place if both are one folder."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self.folder = source if source.is_dir() else source.parent
        self.in_place = source.resolve() == target.resolve()
        self.name = "." if self.in_place else str(source.resolve())  # in the record; "." stays true if the folder is moved

    def is_fresh(self) -> bool:
        """Return True if there is nothing to do: `target` holds the conversion of `source` as it is now, or `source` needs none.

        Weights in the source's own folder that were changed, copied or made elsewhere are the user's: never stale. Deleted sources do not
        count. Raises UserError if another `target` holds something else.
        """
        record = self._record()
        if self.in_place:
            if not is_hf_folder(self.source):
                return True
            if not (self.source / WEIGHTS).is_file():
                return checkpoint.adapter_file(self.source).is_file()
            if record is None or self._changed(record):
                return True
        elif not self.target.exists() or (self.target.is_dir() and not any(self.target.iterdir())):
            return False
        elif record is None:
            other = read_record(self.target)
            content = f"the conversion of {other['source']}" if other else "something else"
            raise UserError(
                f"{self.source} would be converted to {self.target}, which exists and holds {content}: name {self.target} if that is what "
                f"you want, or choose a place with `litgpt convert_to_litgpt {self.source} --checkpoint_dir DIR`"
            )
        now = stamps([self.folder / name for name in record["files"]], self.folder)
        return all(record["files"][name] == stamp for name, stamp in now.items())

    def remove_leftovers(self) -> None:
        """Remove what a conversion leaves if it is killed after it is complete."""
        if not self.in_place:
            remove_leftovers(self.target.parent)
        elif (self.source / STAGE).is_dir():
            with self.locked():
                shutil.rmtree(self.source / STAGE, ignore_errors=True)

    def run_again(self) -> None:
        """Convert as the last time, if there was one, and report it on standard error."""
        start, changed = time.perf_counter(), (self.target / WEIGHTS).exists()
        last = self._record() or {}
        self.run(last.get("model_name"), last.get("dtype"), replace=True)
        place, again = (self.target / WEIGHTS if self.in_place else self.target), ", which has changed," if changed else ""
        print(f"converted {self.source}{again} to {place} (once, {time.perf_counter() - start:.1f} s)", file=sys.stderr)

    def run(self, model_name: str | None, dtype: str | None, replace: bool) -> Config:
        """Convert; the caller holds the lock. `replace`: an earlier conversion may be overwritten if it was not modified."""
        record = {"source": self.name, "model_name": model_name, "dtype": dtype, "files": stamps(self._source_files(), self.folder)}
        last = self._record() if replace else None
        if last and (changed := self._changed(last)):
            files = f"{', '.join(changed)} in {self.target} {'were' if len(changed) > 1 else 'was'}"
            place = "that" if self.in_place else self.target
            raise UserError(
                f"{self.source} must be converted again, but {files} changed or added after its conversion: move {place} away first"
            )
        if self.in_place:
            return self._run_in_place(record, overwrite=last is not None)
        with new_folder(self.target, overwrite=last is not None, manifest=False) as folder:  # the conversion's own manifest is in it
            config = self._convert(folder, record)
            write_record(folder, record, stamps(files_of(folder), folder))
        return config

    def _run_in_place(self, record: dict[str, Any], overwrite: bool) -> Config:
        """Convert into a folder inside `source`, then move the two new files out of it, the weights last.

        Wherever the process is killed, either the weights are missing and are made again, or the record of their source is there.
        """
        config_file, weights, stage = (self.source / name for name in (CONFIG, WEIGHTS, STAGE))
        if weights.exists() and not overwrite:
            raise UserError(f"{weights} exists already: move it away to convert again")
        shutil.rmtree(stage, ignore_errors=True)  # left by a killed process
        try:
            config = self._convert(stage, record)
            if config_file.exists() and not overwrite and read_bytes(config_file) != (stage / CONFIG).read_bytes():
                raise UserError(f"{config_file} exists and does not match {self.source / 'config.json'}: move it away to convert")
            for old in (weights, config_file):
                old.unlink(missing_ok=True)
            write_record(self.source, record, stamps([stage / CONFIG, stage / WEIGHTS], stage))
            for new in (config_file, weights):
                (stage / new.name).rename(new)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
        return config

    def _convert(self, folder: Path, record: dict[str, Any]) -> Config:
        import torch

        from litgpt.convert.gguf.convert import convert_gguf
        from litgpt.convert.hf import convert_hf

        dtype = None if record["dtype"] is None else getattr(torch, record["dtype"])
        return (convert_hf if self.source.is_dir() else convert_gguf)(self.source, folder, record["model_name"], dtype)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of the folder in which the conversion is made. A full or read-only disk raises UserError."""
        place = self.target if self.in_place else self.target.parent
        missing = [folder for folder in (place, *place.absolute().parents) if not os.path.lexists(folder)]
        try:
            with locked(place):
                yield
        except OSError as error:
            raise UserError(f"{self.source} cannot be converted to {self.target}: {error.strerror or error}") from None
        finally:
            with suppress(OSError):  # not empty: the conversion is there
                for folder in missing:
                    folder.rmdir()

    def _source_files(self) -> list[Path]:
        """Return the files that the conversion reads. In place, the tokenizer's files are used as they are."""
        from litgpt.convert.hf import read_index

        if self.source.is_file():
            match = SPLIT.fullmatch(self.source.name)
            return sorted(self.source.parent.glob(f"{glob.escape(match[1])}-*-of-{match[3]}.gguf")) if match else [self.source]
        weights = checkpoint.hf_weights(self.source)
        files = [self.source / name for name in ("config.json", *(() if self.in_place else TOKENIZER_FILES))]
        if weights is not None:
            files.append(weights)
            if weights.name.endswith(".index.json"):
                files += [self.source / name for name in read_index(weights)]
        return files

    def _record(self) -> dict[str, Any] | None:
        """Return the target's record if it is of a conversion of `source`."""
        record = read_record(self.target)
        return record if record is not None and record["source"] == self.name else None

    def _changed(self, record: dict[str, Any]) -> list[str]:
        """Return the files of the conversion that were changed or added since."""
        files = [self.target / name for name in (CONFIG, WEIGHTS)] if self.in_place else files_of(self.target)
        return sorted(name for name, stamp in stamps(files, self.target).items() if record["made"].get(name) != stamp)


def files_of(folder: Path) -> list[Path]:
    """Return the files of a conversion in a folder of its own."""
    return [file for file in folder.rglob("*") if file.is_file() and file.name not in (RECORD, MANIFEST)]


def stamps(files: Iterable[Path], below: Path) -> dict[str, list[int]]:
    """Return [size, time of the last change in ns] of each file that exists, by its name in the folder `below`."""
    facts = {file.relative_to(below).as_posix(): file.stat() for file in files if file.is_file()}
    return {name: [fact.st_size, fact.st_mtime_ns] for name, fact in facts.items()}


def write_record(folder: Path, record: dict[str, Any], made: dict[str, list[int]]) -> None:
    """Write a folder's conversion.json, with the stamps of the files that the conversion made."""
    write_text(folder / RECORD, json.dumps({**record, "made": made}, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's conversion.json; None if it is missing or invalid."""
    record = json_in(folder / RECORD)
    valid = isinstance(record.get("source"), str) and record.get("dtype") in (None, *DTYPES)
    tables = [record.get(key) for key in ("files", "made")]
    whole = all(isinstance(table, dict) and all(map(is_inside, table)) for table in tables)
    return record if valid and whole else None
