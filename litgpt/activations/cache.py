"""What the frozen prefix makes of each sample: computed for every batch, or once for all epochs.

The prefix (`litgpt.model`: everything before the cut) never changes, so its output x and its taps for a training sample never change
either. `Recompute` runs it for every batch; `ActivationCache` runs it once and keeps the results (Skip-Cache, arXiv 2410.21073). Both
give the same `Features`, from which the tail and the loss go on.

Letters: N rows of a packed batch (`litgpt.packing`), n of them with loss, P shared by all its samples, d `n_embd`, S taps, R rows of the
cache. Where the tail treats positions independently (cut at `ln_f` or `lm_head`) only those with loss are kept; elsewhere all, the first
positions that all samples share only once.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch

from litgpt.activations.store import Contents, forget, open_store
from litgpt.loss import Features
from litgpt.model import GPT
from litgpt.packing import loss_targets, pack, shared_head
from litgpt.rope import is_long
from litgpt.sample import Sample
from litgpt.text import gib

FORMAT = 2
MEMORY_SHARE = 0.5
"""of the free memory that a cache may take"""
FILL_TOKENS = {"cpu": 1024, "cuda": 16384}
"""in a batch of the filling pass: on a CPU its activations should stay in the processor's cache"""
HEAD_SHARE = 8
"""so many times the tokens that all samples begin with are in a batch of the filling pass, in which those are computed once"""

TRIED_BATCHES, TRIED_SAMPLES = 3, 8
"""read and computed, to see which is faster"""

WHERE = {"memory": "in memory", "disk": "on disk"}
Progress = Callable[[int, int], None]


class Activations(Protocol):
    """`Recompute` or `ActivationCache`: features of a batch of sample numbers."""

    samples: Sequence[Sample]

    def __call__(self, indices: Sequence[int]) -> Features: ...


def is_flat(model: GPT) -> bool:
    """Whether the tail treats positions independently."""
    return model.cut is not None and model.cut >= model.config.n_layer


def common_head(model: GPT, samples: Sequence[Sample]) -> int:
    """P: the tokens that all samples begin with, which a batch computes once. 0 where a router is trained to balance the load of tokens."""
    return 0 if model.config.router_aux_loss_coef else shared_head(samples)


class Recompute:
    """The prefix, run for every batch."""

    def __init__(self, model: GPT, samples: Sequence[Sample], device: torch.device) -> None:
        self.model, self.samples, self.device = model, samples, device
        self.head = common_head(model, samples)

    def __call__(self, indices: Sequence[int]) -> Features:
        batch = pack([self.samples[i] for i in indices], self.device, self.head)
        pos = self.model.packed_positions(batch.packing)
        if is_flat(self.model):
            return Features(*self.model.prefix(batch.ids, pos, batch.at), batch.targets)
        return Features(*self.model.prefix(batch.ids, pos), batch.targets, batch.at, pos)


@dataclass(frozen=True)
class Plan:
    """Which rows a cache has and how large it is, known before anything is computed."""

    indices: list[int]
    """the samples, as the caller numbers them"""
    head: int
    """P"""
    first: int
    """rows that serve all samples, the first of the cache: P, or 0 where only positions with loss are kept"""
    counts: list[int]
    """rows per sample"""
    width: tuple[int, int]
    """(S + 1, d): x, then the taps"""
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """(R, S + 1, d)"""
        return self.first + sum(self.counts), *self.width

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def slices(self) -> dict[int, slice]:
        """Where each sample's rows are."""
        ends = list(itertools.accumulate(self.counts, initial=self.first))
        return {i: slice(*ends[k : k + 2]) for k, i in enumerate(self.indices)}


def plan(model: GPT, samples: Sequence[Sample], indices: Sequence[int], dtype: torch.dtype) -> Plan:
    """The cache that these samples need."""
    width, head = (len(model.tapped_blocks) + 1, model.config.n_embd), common_head(model, samples)
    if is_flat(model):
        return Plan(list(indices), head, 0, [samples[i].n_targets for i in indices], width, dtype)
    return Plan(list(indices), head, head, [samples[i].n_inputs - head for i in indices], width, dtype)


class ActivationCache:
    """Rows (R, S + 1, d) in memory or in a memory-mapped file, and where each sample's rows are. Features have the model's dtype."""

    def __init__(self, store: torch.Tensor, plan: Plan, samples: Sequence[Sample], model: GPT, device: torch.device) -> None:
        self.store, self.plan, self.samples, self.model, self.device = store, plan, samples, model, device
        self.slices = plan.slices
        self.parts: torch.Tensor | None = None
        """what is read of a row: x, which is 0, and taps from 1 on; None: all"""

    def __call__(self, indices: Sequence[int]) -> Features:
        chosen = [self.samples[i] for i in indices]
        slabs = [self._read(self.slices[i]) for i in indices]
        if is_flat(self.model):
            return Features(*self._split(slabs), loss_targets(chosen).to(self.device))
        batch = pack(chosen, self.device, self.plan.head)
        split = self._split([self._read(slice(self.plan.first)), *slabs])
        return Features(*split, batch.targets, batch.at, self.model.packed_positions(batch.packing))

    def _read(self, rows: slice) -> torch.Tensor:
        """(n, S + 1, d)"""
        return self.store[rows] if self.parts is None else self.store[rows].index_select(1, self.parts)

    def _split(self, slabs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.cat(slabs).to(self.device, self.model.dtype, non_blocking=True)  # (N, S + 1, d)
        return rows[:, 0], rows[:, 1:]

    def narrowed(self, taps: Sequence[int]) -> ActivationCache:
        """The same cache, of which x and these of the S taps alone, counted from 0, are read."""
        view = copy.copy(self)
        view.parts = torch.tensor([0, *(1 + tap for tap in taps)])
        return view


@dataclass
class CacheSettings:
    """How and where to keep activations."""

    mode: str
    """auto, memory, disk or off"""
    folder: Path
    """for caches on disk, one folder each"""
    dtype: torch.dtype
    say: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int], AbstractContextManager[Progress]] = lambda title, begun: nullcontext(lambda done, total: None)
    """shows under a title how far the filling has come, so many samples being there before"""


def activations(
    model: GPT,
    samples: Sequence[Sample],
    indices: Sequence[int],
    name: str,
    settings: CacheSettings,
    device: torch.device,
) -> Activations:
    """A cache of the samples' activations, filled or found on disk; `Recompute` where the settings or the machine do not allow one.

    "auto" takes memory if the cache fits `MEMORY_SHARE` of what is free, else disk, and there only if reading is faster than computing. A
    disk that is too full is said and not fatal.
    """
    if settings.mode == "off" or model.cut in (None, 0) or not indices:
        return Recompute(model, samples, device)
    layout = plan(model, samples, indices, settings.dtype)
    need, free = layout.nbytes, psutil.virtual_memory().available
    kind = settings.mode
    if kind == "auto":
        kind = "memory" if need <= MEMORY_SHARE * free else "disk"
    rows = f"{layout.shape[0]:,} positions x {layout.width[0]} x {layout.width[1]}"
    settings.say(f"{name} cache: {gib(need)} for {rows}, {WHERE[kind]}; free memory {gib(free)}")
    if kind == "memory":
        if need > free:
            settings.say(f"{name} cache: not enough memory, activations are computed again for every batch")
            return Recompute(model, samples, device)
        try:
            store = torch.empty(layout.shape, dtype=layout.dtype)
        except (RuntimeError, MemoryError):
            settings.say(f"{name} cache: not enough memory, activations are computed again for every batch")
            return Recompute(model, samples, device)
        with settings.progress(f"{name} cache", 0) as progress:
            fill(model, samples, layout, store, device, progress)
        return ActivationCache(store, layout, samples, model, device)
    try:
        store = _on_disk(model, samples, layout, settings, device, name)
    except OSError as error:
        reason = error.strerror or error
        settings.say(f"{name} cache: {settings.folder} cannot hold it ({reason}), activations are computed again for every batch")
        return Recompute(model, samples, device)
    cache = ActivationCache(store, layout, samples, model, device)
    return _faster(cache, Recompute(model, samples, device), settings, name) if settings.mode == "auto" else cache


def _faster(cache: ActivationCache, recompute: Recompute, settings: CacheSettings, name: str) -> Activations:
    """The one that gives a few batches in less time. They are read from the disk itself, not from memory that still holds the file."""
    rows = cache.plan.indices[: TRIED_BATCHES * TRIED_SAMPLES]
    seconds = []
    for source in (cache, recompute):
        start = time.perf_counter()
        for first in range(0, len(rows), TRIED_SAMPLES):
            source(rows[first : first + TRIED_SAMPLES]).x.sum().item()
        seconds.append((time.perf_counter() - start) / len(rows))
    chosen = cache if seconds[0] <= seconds[1] else recompute
    told = f"reading takes {1000 * seconds[0]:.2f} ms a sample, computing {1000 * seconds[1]:.2f} ms"
    settings.say(f"{name} cache: {told}: activations are {'read' if chosen is cache else 'computed again for every batch'}")
    return chosen


@torch.no_grad()
def fill(
    model: GPT, samples: Sequence[Sample], layout: Plan, store: torch.Tensor, device: torch.device, progress: Progress, done: int = 0
) -> None:
    """Run the prefix over all samples but the first `done`, in large batches, and write the rows into `store` (R, S + 1, d)."""
    was_training, slices, order = model.training, layout.slices, fill_order(samples, layout)
    model.eval()
    for indices in fill_batches(samples, order[done:], layout.head, device):
        rows = _rows(model, [samples[i] for i in indices], layout, device)
        start = layout.first
        store[:start] = rows[:start]
        for i in indices:
            own = store[slices[i]]
            own.copy_(rows[start : start + len(own)])
            start += len(own)
        done += len(indices)
        progress(done, len(order))
    model.train(was_training)


def fill_order(samples: Sequence[Sample], layout: Plan) -> list[int]:
    """The samples of the cache, longest first."""
    return sorted(layout.indices, key=lambda i: -len(samples[i].input_ids))


def _rows(model: GPT, samples: Sequence[Sample], layout: Plan, device: torch.device) -> torch.Tensor:
    """x and the taps of a batch, (n, S + 1, d) or (N, S + 1, d), on the CPU in the cache's dtype."""
    batch = pack(samples, device, layout.head)
    x, taps = model.prefix(batch.ids, model.packed_positions(batch.packing), batch.at if is_flat(model) else None)
    return torch.cat((x[:, None], taps), dim=1).to(layout.dtype).cpu()


def fill_batches(samples: Sequence[Sample], order: Sequence[int], head: int, device: torch.device) -> Iterator[list[int]]:
    """Batches of so many tokens that what is the same in all of them weighs little, none larger than one sample needs."""
    limit = max(FILL_TOKENS["cpu" if device.type == "cpu" else "cuda"], HEAD_SHARE * head)
    batch: list[int] = []
    tokens = 0
    for i in order:
        own = samples[i].n_inputs - head
        if batch and tokens + own > limit:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += own
    if batch:
        yield batch


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


def _on_disk(model: GPT, samples: Sequence[Sample], layout: Plan, settings: CacheSettings, device: torch.device, name: str) -> torch.Tensor:
    """The store in the cache's folder: found there, or filled. Raises OSError if it cannot be written."""

    def complete(store: torch.Tensor, done: int, advance: Callable[[int], None]) -> None:
        with settings.progress(f"{name} cache", done) as show:

            def progress(count: int, total: int) -> None:
                advance(count)
                show(count, total)

            fill(model, samples, layout, store, device, progress, done)

    slices = layout.slices
    spans = [slices[i] for i in fill_order(samples, layout)]
    contents = Contents(fingerprint(model, samples, layout, device), layout.shape, layout.dtype, spans, slice(layout.first))
    store = open_store(settings.folder, contents, complete, lambda text: settings.say(f"{name} cache: {text}"))
    if settings.mode == "auto":
        forget(settings.folder, contents)
    return store
