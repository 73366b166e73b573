"""What the frozen prefix makes of each sample: computed for every batch, or once for all epochs.

The prefix (`litgpt.model`: everything before the cut) never changes, so its output x and its taps for a training sample never change
either. `Recompute` runs it for every batch; `ActivationCache` runs it once and keeps the results (Skip-Cache, arXiv 2410.21073). Both
give the same `Features`, from which the tail and the loss go on.

Letters: B samples of a batch, T positions, d `n_embd`, S taps, R rows of the cache. A sample of n tokens has n - 1 inputs. Where
the tail treats positions independently (cut at `ln_f` or `lm_head`) only those whose next token carries loss are kept, N of them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch

from litgpt.checkpoint import new_folder, remove_leftovers, write_text
from litgpt.data.base import Sample
from litgpt.errors import UserError
from litgpt.files import read_json
from litgpt.model import GPT, KVCache
from litgpt.rope import is_long

FORMAT = 1
MEMORY_SHARE = 0.5
"""of the free memory that a cache may take"""
FILL_TOKENS = {"cpu": 1024, "cuda": 16384}
"""in a batch of the filling pass: on a CPU its activations should stay in the processor's cache"""
SHORTEST_HEAD = 8
"""tokens that all samples must share for their keys and values to be computed once"""

WHERE = {"memory": "in memory", "disk": "on disk"}
Progress = Callable[[int, int], None]


@dataclass
class Features:
    """What the tail needs of a batch: x (N, d) and taps (N, S, d), or (B, T, d) and (B, T, S, d); targets (N,).

    `at` (B, T) marks the N positions; None where only they are there.
    """

    x: torch.Tensor
    taps: torch.Tensor
    targets: torch.Tensor
    at: torch.Tensor | None


class Activations(Protocol):
    """`Recompute` or `ActivationCache`: features of a batch of sample numbers."""

    samples: Sequence[Sample]

    def __call__(self, indices: Sequence[int]) -> Features: ...


def is_flat(model: GPT) -> bool:
    """Whether the tail treats positions independently."""
    return model.cut is not None and model.cut >= model.config.n_layer


def collate(samples: Sequence[Sample], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs (B, T), padded on the right, which causal attention never looks at; loss positions (B, T); their targets (N,)."""
    T = max(len(sample.input_ids) for sample in samples) - 1
    ids = torch.zeros(len(samples), T, dtype=torch.long)
    at = torch.zeros(len(samples), T, dtype=torch.bool)
    targets = []
    for row, sample in enumerate(samples):
        tokens = torch.frombuffer(sample.input_ids, dtype=torch.int32)
        mask = torch.frombuffer(sample.loss_mask, dtype=torch.bool)[1:]
        ids[row, : len(tokens) - 1] = tokens[:-1]
        at[row, : len(mask)] = mask
        targets.append(tokens[1:][mask])
    return ids.to(device), at.to(device), torch.cat(targets).long().to(device)


class Recompute:
    """The prefix, run for every batch."""

    def __init__(self, model: GPT, samples: Sequence[Sample], device: torch.device) -> None:
        self.model, self.samples, self.device = model, samples, device

    def __call__(self, indices: Sequence[int]) -> Features:
        ids, at, targets = collate([self.samples[i] for i in indices], self.device)
        x, taps = self.model.prefix(ids)
        if is_flat(self.model):
            return Features(x[at], taps[at], targets, None)
        return Features(x, taps, targets, at)


@dataclass(frozen=True)
class Plan:
    """Which rows a cache has and how large it is, known before anything is computed."""

    indices: list[int]
    """the samples, as the caller numbers them"""
    counts: list[int]
    """rows per sample"""
    width: tuple[int, int]
    """(S + 1, d): x, then the taps"""
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """(R, S + 1, d)"""
        return sum(self.counts), *self.width

    @property
    def nbytes(self) -> int:
        rows, parts, d = self.shape
        return rows * parts * d * self.dtype.itemsize


def plan(model: GPT, samples: Sequence[Sample], indices: Sequence[int], dtype: torch.dtype) -> Plan:
    """The cache that these samples need."""
    flat = is_flat(model)
    counts = [sum(samples[i].loss_mask) if flat else len(samples[i].input_ids) - 1 for i in indices]
    return Plan(list(indices), counts, (len(model.tapped_blocks) + 1, model.config.n_embd), dtype)


class ActivationCache:
    """Rows (R, S + 1, d) in memory or in a memory-mapped file, and where each sample's rows are. Features have the model's dtype."""

    def __init__(self, store: torch.Tensor, plan: Plan, samples: Sequence[Sample], model: GPT, device: torch.device) -> None:
        self.store, self.samples, self.flat, self.device = store, samples, is_flat(model), device
        self.dtype = model.dtype
        self.parts: torch.Tensor | None = None
        """what is read of a row: x, which is 0, and taps from 1 on; None: all"""
        ends = torch.tensor(plan.counts).cumsum(0).tolist()
        self.rows = {i: (end - count, end) for i, count, end in zip(plan.indices, plan.counts, ends, strict=True)}

    def __call__(self, indices: Sequence[int]) -> Features:
        slabs = [self._read(slice(*self.rows[i])) for i in indices]
        chosen = [self.samples[i] for i in indices]
        if self.flat:
            rows = torch.cat(slabs).to(self.device, self.dtype, non_blocking=True)  # (N, S + 1, d)
            return Features(rows[:, 0], rows[:, 1:], _targets(chosen).to(self.device), None)
        _, at, targets = collate(chosen, self.device)
        rows = torch.nn.utils.rnn.pad_sequence(slabs, batch_first=True).to(self.device, self.dtype, non_blocking=True)  # (B, T, S + 1, d)
        return Features(rows[:, :, 0], rows[:, :, 1:], targets, at)

    def _read(self, rows: slice) -> torch.Tensor:
        """(n, S + 1, d)"""
        return self.store[rows] if self.parts is None else self.store[rows].index_select(1, self.parts)

    def narrowed(self, taps: Sequence[int]) -> ActivationCache:
        """The same cache, of which x and these of the S taps alone, counted from 0, are read."""
        view = copy.copy(self)
        view.parts = torch.tensor([0, *(1 + tap for tap in taps)])
        return view


def _targets(samples: Sequence[Sample]) -> torch.Tensor:
    parts = [
        torch.frombuffer(s.input_ids, dtype=torch.int32)[torch.frombuffer(s.loss_mask, dtype=torch.bool)] for s in samples
    ]  # the first token never carries loss
    return torch.cat(parts).long()


@dataclass
class CacheSettings:
    """How and where to keep activations."""

    mode: str
    """auto, memory, disk or off"""
    folder: Path
    """for caches on disk, one folder each"""
    dtype: torch.dtype
    say: Callable[[str], None]


def activations(
    model: GPT,
    samples: Sequence[Sample],
    indices: Sequence[int],
    name: str,
    settings: CacheSettings,
    device: torch.device,
    progress: Progress,
) -> Activations:
    """A cache of the samples' activations, filled or found on disk; `Recompute` where the settings or the machine do not allow one.

    "auto" takes memory if the cache fits `MEMORY_SHARE` of what is free, else disk. A disk that is too full is said and not fatal.
    """
    if settings.mode == "off" or model.cut in (None, 0) or not indices:
        return Recompute(model, samples, device)
    layout = plan(model, samples, indices, settings.dtype)
    need, free = layout.nbytes, psutil.virtual_memory().available
    kind = settings.mode
    if kind == "auto":
        kind = "memory" if need <= MEMORY_SHARE * free else "disk"
    rows = f"{layout.shape[0]:,} positions x {layout.width[0]} x {layout.width[1]}"
    settings.say(f"{name} cache: {_gib(need)} for {rows}, {WHERE[kind]}; free memory {_gib(free)}")
    if kind == "memory":
        if need > free:
            settings.say(f"{name} cache: not enough memory, activations are computed again for every batch")
            return Recompute(model, samples, device)
        try:
            store = torch.empty(layout.shape, dtype=layout.dtype)
        except (RuntimeError, MemoryError):
            settings.say(f"{name} cache: not enough memory, activations are computed again for every batch")
            return Recompute(model, samples, device)
        fill(model, samples, layout, store, device, progress)
        return ActivationCache(store, layout, samples, model, device)
    try:
        store = _on_disk(model, samples, layout, settings, device, progress, name)
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", None) or error
        settings.say(f"{name} cache: {settings.folder} cannot hold it ({reason}), activations are computed again for every batch")
        return Recompute(model, samples, device)
    return ActivationCache(store, layout, samples, model, device)


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


@torch.no_grad()
def fill(model: GPT, samples: Sequence[Sample], layout: Plan, store: torch.Tensor, device: torch.device, progress: Progress) -> None:
    """Run the prefix over all samples, longest first, in large batches, and write the rows into `store` (R, S + 1, d).

    A head of tokens that all samples share (the prompt template's) is run once; its keys and values serve all of them.
    """
    flat, was_training = is_flat(model), model.training
    model.eval()
    starts = [0, *torch.tensor(layout.counts).cumsum(0).tolist()]
    order = sorted(range(len(layout.indices)), key=lambda k: -len(samples[layout.indices[k]].input_ids))
    head = shared_head([samples[i] for i in layout.indices])
    head_rows, head_cache = _run_head(model, samples[layout.indices[0]], head, device) if head else (None, [])
    tokens = FILL_TOKENS["cpu" if device.type == "cpu" else "cuda"]
    done = 0
    while done < len(order):
        width = len(samples[layout.indices[order[done]]].input_ids) - 1 - head
        batch = order[done : done + max(1, tokens // width)]
        ids, at, _ = collate([samples[layout.indices[k]] for k in batch], device)
        for block, cache in zip(model.blocks, head_cache, strict=False):
            block.attn.kv_cache = cache.repeat(len(batch), ids.size(1))
        rows = _stack(model, ids[:, head:], head)  # (B, T - head, S + 1, d)
        for b, k in enumerate(batch):
            keep = at[b] if flat else torch.arange(at.size(1), device=device) < layout.counts[k]
            whole = rows[b] if head_rows is None else torch.cat((head_rows, rows[b]))
            store[starts[k] : starts[k + 1]] = whole[keep].to(store.dtype).cpu()
        done += len(batch)
        progress(done, len(order))
    model.clear_kv_cache()
    model.train(was_training)


def shared_head(samples: Sequence[Sample]) -> int:
    """How many first tokens all samples have in common, each keeping at least one input after them; 0 if too few to be worth it."""
    first, last = min(s.input_ids for s in samples), max(s.input_ids for s in samples)
    limit = min(len(s.input_ids) for s in samples) - 2
    common = 0
    while common < limit and first[common] == last[common]:
        common += 1
    return common if common >= SHORTEST_HEAD and len(samples) > 1 else 0


def _stack(model: GPT, ids: torch.Tensor, start: int) -> torch.Tensor:
    """x and the taps of inputs (B, T) that stand at `start` and after: (B, T, S + 1, d)."""
    place = None
    if model.blocks[0].attn.kv_cache is not None:
        place = torch.arange(start, start + ids.size(1), device=ids.device)
    x, taps = model.prefix(ids, model.positions(ids, place))
    return torch.cat((x[:, :, None], taps), dim=2)


def _run_head(model: GPT, sample: Sample, head: int, device: torch.device) -> tuple[torch.Tensor, list[KVCache]]:
    """The rows (head, S + 1, d) of the shared first tokens, and their keys and values in every frozen block."""
    model.set_kv_cache(1, head, device, model.compute_dtype(device))
    ids = torch.tensor(sample.input_ids[:head], device=device)
    rows = _stack(model, ids[None], 0)[0]
    return rows, [block.attn.kv_cache for block in model.blocks[: model.cut] if block.attn.kv_cache is not None]


def fingerprint(model: GPT, samples: Sequence[Sample], layout: Plan, device: torch.device) -> str:
    """Everything that a cached value depends on: prefix weights and config, cut, taps, dtypes, tokens, masks, format."""
    digest = hashlib.sha256()
    norms = [block.skip2lora.norm_eps for block in model.tapped_blocks]
    taps = [i for i, block in enumerate(model.blocks) if block.skip2lora is not None]
    dtypes = [str(dtype) for dtype in (layout.dtype, model.dtype, model.compute_dtype(device))]
    long = is_long(model.config, model.reach)
    facts = [FORMAT, torch.__version__, model.config.base_dict(), model.cut, taps, norms, dtypes, layout.shape, long]
    digest.update(json.dumps(facts, sort_keys=True).encode())
    first_trained = min(model.cut or 0, model.config.n_layer)
    parts = [module for name, module in model.transformer.items() if name != "h"]  # embeddings and ln_f
    for part in (*parts, *model.blocks[:first_trained]):
        for name, value in part.state_dict().items():
            if not name.startswith("skip2lora"):
                digest.update(f"{name} {value.dtype}".encode())
                digest.update(value.detach().contiguous().cpu().view(torch.uint8).numpy())
    for i in layout.indices:
        digest.update(samples[i].input_ids)
        digest.update(samples[i].loss_mask)
    return digest.hexdigest()


def _on_disk(
    model: GPT, samples: Sequence[Sample], layout: Plan, settings: CacheSettings, device: torch.device, progress: Progress, name: str
) -> torch.Tensor:
    """The store in `folder/<fingerprint>/`: used if it is there and whole, else filled. Raises OSError if it cannot be written."""
    key = fingerprint(model, samples, layout, device)
    folder = settings.folder / key[:32]
    data, index = folder / "activations.bin", folder / "index.json"
    remove_leftovers(settings.folder)
    if _is_whole(data, index, key, layout.nbytes):
        settings.say(f"{name} cache: {folder} is reused")
        return _map(data, layout)
    if folder.exists():
        settings.say(f"{name} cache: {folder} is damaged and is made again")
    settings.folder.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(settings.folder).free < layout.nbytes:
        raise OSError(28, f"{_gib(layout.nbytes)} are needed and {_gib(shutil.disk_usage(settings.folder).free)} are free")
    with new_folder(folder, overwrite=True, manifest=False) as temporary:  # index.json is its manifest
        file = temporary / data.name
        with file.open("wb") as handle:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle.fileno(), 0, layout.nbytes)  # a full disk shows here, not as a crash in the mapped file
            else:
                handle.truncate(layout.nbytes)
        store = _map(file, layout)
        fill(model, samples, layout, store, device, progress)
        write_text(temporary / index.name, json.dumps({"fingerprint": key, "bytes": layout.nbytes, "sha256": _digest(file)}))
        del store
    return _map(data, layout)


def _map(file: Path, layout: Plan) -> torch.Tensor:
    rows, parts, d = layout.shape
    return torch.from_file(str(file), shared=True, size=rows * parts * d, dtype=layout.dtype).view(layout.shape)


def _is_whole(data: Path, index: Path, key: str, nbytes: int) -> bool:
    try:
        facts = read_json(index)
        same = facts["fingerprint"] == key and facts["bytes"] == nbytes == data.stat().st_size
        return same and facts["sha256"] == _digest(data)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(2**22):
            digest.update(block)
    return digest.hexdigest()
