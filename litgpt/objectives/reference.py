"""The losses of samples under a reference model: computed once and kept in a file next to the activation caches."""

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from litgpt import checkpoint
from litgpt.activations.cache import CacheSettings, fill_batches
from litgpt.activations.store import Layout, Rows, open_store
from litgpt.atomic import digest
from litgpt.config import Config
from litgpt.convert.resolve import open_checkpoint
from litgpt.errors import UserError
from litgpt.model import GPT, evaluating
from litgpt.objectives.base import View
from litgpt.sample import Sample

FORMAT = 2


def refer(view: View, indices: Sequence[int], model: Sequence[str], name: str, settings: CacheSettings, device: torch.device) -> None:
    """Give the samples at `indices` their losses under the view's model, read from a file or computed.

    `model` identifies the model: digests of its weights, names of its number formats. A disk that cannot hold the file is reported.
    """
    samples, agreed = view.activations.samples, settings.agreed
    wanted = [i for i in indices if samples[i].reference is None]
    if not agreed(bool(wanted)):
        return
    wanted = wanted or list(view.spare)
    layout = Layout({i: sample.n_targets for i, sample in enumerate(samples)}, 0, (1, 1), torch.float32)
    batches = list(fill_batches(samples, wanted, 0, device))

    def fill(store: Rows | torch.Tensor, batches: Iterator[list[int]], done: int) -> None:
        with torch.no_grad(), evaluating(view.model), settings.console.progress(f"{name} reference", done) as show:
            for batch, losses in view.passes(batches, agreed):
                for i, own in zip(batch, losses.float().cpu().split([samples[i].n_targets for i in batch]), strict=True):
                    store[layout.slices[i]] = own[:, None, None]
                done += len(batch)
                show(done, len(wanted))

    store: Rows | torch.Tensor
    folder = settings.folder / _key(model, samples)[:32]
    try:
        store = open_store(folder, layout, batches, fill, lambda text: settings.console.say(f"{name} reference: {text}"), agreed)
    except OSError as error:
        settings.console.say(f"{name} reference: {settings.folder} cannot hold it ({error.strerror or error}), it is kept in memory")
        store = torch.empty(layout.shape)
        fill(store, iter(batches), 0)
    for i in wanted:
        samples[i].reference = array("f", store[layout.slices[i]].flatten().tolist())


def require_reference(path: Path, base: Path, longest: int, convert: bool = True) -> None:
    """Raise UserError if the folder holds no model or adapter, or one with another tokenizer than the base's.

    `longest`: tokens of the longest sample. `convert`: as in `litgpt.convert.resolve.open_checkpoint`.
    """
    try:
        folder = open_checkpoint(path, convert)
        checkpoint.require_checkpoint(_base_of(folder))
        room = Config.from_checkpoint(folder).block_size
    except UserError as error:
        raise UserError(f"rho1_reference: {error}") from None
    if room < longest:
        raise UserError(f"rho1_reference: {folder} reads {room} tokens, and a sample has {longest}: set train.max_seq_length")
    tokens = [file.read_bytes() if (file := each / "tokenizer.json").is_file() else b"" for each in (folder, base)]
    if tokens[0] != tokens[1]:
        raise UserError(f"rho1_reference: {folder} has another tokenizer.json than {base}, so its losses are of other tokens")


def reference_model(path: Path, dtype: torch.dtype, device: torch.device, sharded: bool = False) -> tuple[GPT, list[str]]:
    """Return the model of a checkpoint or adapter, and digests of its weights. `sharded`: over all ranks."""
    folder = open_checkpoint(path)
    model = checkpoint.load_model(folder, dtype, device, sharded=sharded)
    files = [file for name in (checkpoint.WEIGHTS, *checkpoint.ADAPTERS) if (file := folder / name).is_file()]
    if (base := _base_of(folder)) != folder:
        files.append(base / checkpoint.WEIGHTS)
    return model, [*map(digest, files), str(dtype)]


def _base_of(folder: Path) -> Path:
    return checkpoint.adapter_settings(folder)[0] if checkpoint.is_adapter_folder(folder) else folder


def reference_size(path: Path) -> int:
    """Return the number of parameters of a checkpoint, or of an adapter folder's base."""
    weights = checkpoint.load_weights(_base_of(open_checkpoint(path)) / checkpoint.WEIGHTS).values()
    return sum({value.data_ptr(): value.numel() for value in weights}.values())


def exchange(samples: Sequence[Sample], add: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> None:
    """Share the losses that each process has of its samples with all processes. `add` sums a tensor over the processes."""
    parts = [torch.zeros(s.n_targets) if s.reference is None else torch.tensor(s.reference) for s in samples]
    losses = add(torch.cat(parts).to(device)).cpu()
    for sample, own in zip(samples, losses.split([len(part) for part in parts]), strict=True):
        sample.reference = array("f", own.tolist())


def _key(model: Sequence[str], samples: Sequence[Sample]) -> str:
    key = hashlib.sha256(json.dumps([FORMAT, torch.__version__, *model]).encode())
    for sample in samples:
        key.update(len(sample.input_ids).to_bytes(8, "little"))
        key.update(sample.input_ids)
        key.update(sample.loss_mask)
    return key.hexdigest()
