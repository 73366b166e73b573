"""Activations of the frozen prefix for each sample: computed for every batch, or once for all epochs.

The prefix (`litgpt.model`: everything before the cut) never changes, so its output x and its taps for a training sample never change
either. `Recompute` runs it for every batch; `ActivationCache` runs it once and keeps the results (Skip-Cache, arXiv 2410.21073). Both
return the same `Features`, the inputs of the tail and the loss.

Letters: N rows of a packed batch (`litgpt.packing`), n of them with loss, P of the stem, d `n_embd`, S taps, R rows of the cache. If the
tail treats positions independently (cut at `ln_f` or `lm_head`) only those with loss are kept; else all, those of the stem once.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psutil
import torch

from litgpt.activations import prompts
from litgpt.activations.prompts import is_answer_only, plain_rows, reply_features
from litgpt.activations.store import Layout, Rows, open_store
from litgpt.errors import UserError
from litgpt.logs import Console
from litgpt.lora import lora_filter
from litgpt.loss import Features
from litgpt.model import GPT, evaluating
from litgpt.packing import loss_targets, pack, sent, shared_ends, shared_stem, thinned
from litgpt.rope import is_long
from litgpt.sample import Sample
from litgpt.sharding import is_sharded, whole
from litgpt.text import gib

FORMAT = 4
MEMORY_SHARE = 0.5  # of the free memory that a cache may take
FILL_TOKENS = {"cpu": 1024, "cuda": 16384}  # tokens per batch of the filling pass: on a CPU its activations should fit its cache
STEM_SHARE = 8  # a batch of the filling pass, which computes the stem once, has at least this many times the stem's tokens
TRIED_BATCHES, TRIED_SAMPLES = 3, 8  # to compare the speeds of reading and computing

WHERE = {"memory": "in memory", "disk": "on disk"}


def is_flat(model: GPT) -> bool:
    """Return True if the tail treats positions independently."""
    return model.cut is not None and model.cut >= model.config.n_layer


def is_cacheable(model: GPT) -> bool:
    """Return True if there are frozen layers that every epoch would run again."""
    return not (model.neftune_alpha or model.word_dropout) and (bool(model.cut) or is_answer_only(model))


def stem_length(model: GPT, samples: Sequence[Sample]) -> int:
    """Return P, the length of the stem, which a batch computes once.

    It is 0 if a router is trained to balance the load of tokens, if LongRoPE uses its long factors for only some of the samples, and if
    each sample gets its own noise.
    """
    mixed = len({is_long(model.config, len(sample.input_ids)) for sample in samples}) > 1
    return 0 if model.config.router_aux_loss_coef or mixed or model.neftune_alpha else shared_stem(samples)


def stem_rows(samples: Sequence[Sample], stem: int) -> int:
    """Return the number of rows of the stem that a flat tail gets once for all samples: P, or 0 if fewer rows of it carry loss."""
    return stem if sum(sum(sample.loss_mask[1 : 1 + stem]) for sample in samples) > stem else 0


def loss_rows(at: torch.Tensor, stem: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the rows of a batch with loss at `at` (n,) that a flat tail needs, and which of them carry loss; None: all of them, in order.

    The rows of the stem come first, then those of each sample.
    """
    if not stem:
        return at, None
    own = at >= stem
    rows = torch.cat((torch.arange(stem, device=at.device), at[own]))
    return rows, torch.where(own, stem - 1 + own.cumsum(0), at)


class Recompute:
    """The prefix, run for every batch."""

    def __init__(self, model: GPT, samples: Sequence[Sample], device: torch.device) -> None:
        self.model, self.samples, self.device = model, samples, device
        self.stem = stem_length(model, samples)
        self.first = stem_rows(samples, self.stem)
        begin, end = shared_ends(samples) if model.word_dropout else (0, 0)
        self.ends = max(begin, self.stem), end

    def __call__(self, indices: Sequence[int]) -> Features:
        chosen = [self.samples[i] for i in indices]
        if self.model.training and self.model.word_dropout:
            chosen = [thinned(sample, self.model.word_dropout, self.ends) for sample in chosen]
        if is_answer_only(self.model):
            return reply_features(self.model, plain_rows(self.model, chosen, self.device, self.stem))
        batch = pack(chosen, self.device, self.stem)
        pos = self.model.packed_positions(batch.packing)
        if is_flat(self.model):
            rows, at = loss_rows(batch.at, self.first)
            return Features(*self.model.prefix(batch.ids, pos, rows), batch.targets, at)
        return Features(*self.model.prefix(batch.ids, pos), batch.targets, batch.at, pos)


def plan(model: GPT, samples: Sequence[Sample], indices: Sequence[int], dtype: torch.dtype) -> Layout:
    """Return the layout of a cache for the samples at `indices`."""
    width, stem = (len(model.tapped_blocks) + 1, model.config.n_embd), stem_length(model, samples)
    if is_flat(model):
        first = 0 if is_answer_only(model) else stem_rows(samples, stem)
        return Layout({i: sum(samples[i].loss_mask[1 + first :]) for i in indices}, first, width, dtype, stem)
    width = (1, prompts.width(model)) if is_answer_only(model) else width
    return Layout({i: samples[i].n_inputs - stem for i in indices}, stem, width, dtype, stem)


class ActivationCache:
    """Rows (R, S + 1, d) in memory or in a file, by sample. Features have the model's dtype."""

    def __init__(self, store: torch.Tensor | Rows, layout: Layout, source: Recompute, indices: Sequence[int]) -> None:
        """`indices`: of the samples that may be read; a file may hold more. `source`: what computed the rows."""
        self.store, self.layout, self.samples, self.model, self.device = store, layout, source.samples, source.model, source.device
        self.blocks = [i for i, block in enumerate(self.model.blocks) if block.skip2lora is not None]  # the blocks whose taps it holds
        self.stem, self.slices = slice(0, layout.first), {i: layout.slices[i] for i in indices}
        self.parts: torch.Tensor | None = None  # parts of a row to read: 0 for x, taps from 1 on; None: all

    def __call__(self, indices: Sequence[int]) -> Features:
        chosen = [self.samples[i] for i in indices]
        slabs = [self._read(self.slices[i]) for i in indices]
        if is_flat(self.model) and not self.layout.first:
            return Features(*self._split(slabs), sent(loss_targets(chosen), self.device))
        if is_answer_only(self.model):
            values = torch.cat([self._read(self.stem), *slabs]).flatten(1).to(self.device, self.model.dtype)
            return reply_features(self.model, prompts.Rows(values, chosen, self.layout.stem))
        batch = pack(chosen, self.device, self.layout.stem)
        split = self._split([self._read(self.stem), *slabs])
        if is_flat(self.model):
            return Features(*split, batch.targets, loss_rows(batch.at, self.layout.first)[1])
        return Features(*split, batch.targets, batch.at, self.model.packed_positions(batch.packing))

    def _read(self, rows: slice) -> torch.Tensor:
        """(n, S + 1, d)"""
        return self.store[rows] if self.parts is None else self.store[rows].index_select(1, self.parts)

    def _split(self, slabs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = sent(torch.cat(slabs), self.device).to(self.model.dtype)  # (N, S + 1, d)
        return rows[:, 0], rows[:, 1:]

    def narrowed(self, blocks: Sequence[int]) -> ActivationCache:
        """Return a view of the cache for a model that taps only these blocks. Other blocks' taps are not read."""
        view = copy.copy(self)
        view.parts = None if list(blocks) == self.blocks else torch.tensor([0, *(1 + self.blocks.index(block) for block in blocks)])
        return view


Activations = Recompute | ActivationCache  # the features of a batch of sample indices


def shared(cache: Activations, samples: Sequence[Sample], indices: Sequence[int]) -> ActivationCache | None:
    """Return a view of the cache for samples that it holds under other indices; None if it lacks one."""
    if not isinstance(cache, ActivationCache) or not indices:
        return None
    held = {id(cache.samples[i]): rows for i, rows in cache.slices.items()}
    if not all(id(samples[i]) in held for i in indices):
        return None
    view = copy.copy(cache)
    view.samples, view.slices = samples, {i: held[id(samples[i])] for i in indices}
    return view


@dataclass
class CacheSettings:
    """Settings of where to keep activations."""

    mode: str  # auto, memory, disk or off
    folder: Path  # for caches on disk, each in a folder of its own
    dtype: torch.dtype
    console: Console = field(default_factory=lambda: Console(active=False))
    agreed: Callable[[bool], bool] = bool  # returns whether a flag is set in any rank of a sharded model, which must all do the same


def activations(
    model: GPT, samples: Sequence[Sample], indices: Sequence[int], name: str, settings: CacheSettings, device: torch.device
) -> Activations:
    """Return a cache of the samples' activations, filled or reused from disk; `Recompute` if the settings or the machine rule one out.

    "auto" uses memory if the cache fits into `MEMORY_SHARE` of the free memory, else disk if reading is faster than computing. The file has
    room for all samples, for other processes and other `indices`. A full disk is reported and is not fatal.
    """
    source = Recompute(model, samples, device)
    if settings.mode == "off" or not is_cacheable(model) or not indices:
        return source
    layout = plan(model, samples, indices, settings.dtype)
    need, free = layout.nbytes, psutil.virtual_memory().available
    kind = settings.mode
    if kind == "auto":
        kind = "memory" if need <= MEMORY_SHARE * free or is_sharded(model) else "disk"
    batches = list(fill_batches(samples, indices, layout.stem, device))
    settings.console.detail(f"{name} cache: {gib(need)} for {layout.shape[0]:,} positions, {WHERE[kind]}; free memory {gib(free)}")

    def complete(store: torch.Tensor | Rows, batches: Iterator[list[int]], done: int) -> None:
        with settings.console.progress(f"{name} cache", done) as progress:
            for batch in fill(source, layout, store, batches, settings.agreed):
                done = done + len(batch) if isinstance(store, torch.Tensor) else len(store.written(indices))  # others may fill the file too
                progress(done, len(indices))

    if kind == "memory":
        memory = None
        if need <= free:
            with suppress(RuntimeError, MemoryError):
                memory = torch.empty(layout.shape, dtype=layout.dtype)
        if settings.agreed(memory is None):
            settings.console.say(f"{name} cache: not enough memory, activations are computed again for every batch")
            return source
        assert memory is not None
        complete(memory, iter(batches), 0)
        return ActivationCache(memory, layout, source, indices)
    layout = plan(model, samples, range(len(samples)), settings.dtype)
    folder = settings.folder / fingerprint(model, samples, layout, device)[:32]
    try:
        store = open_store(folder, layout, batches, complete, lambda text: settings.console.say(f"{name} cache: {text}"), settings.agreed)
    except OSError as error:
        reason = error.strerror or error
        settings.console.say(f"{name} cache: {settings.folder} cannot hold it ({reason}), activations are computed again for every batch")
        return source
    cache = ActivationCache(store, layout, source, indices)
    if settings.mode != "auto":
        return cache
    store.forget()
    return _faster(cache, source, settings, name)


def filled(model: GPT, samples: Sequence[Sample], count: int, name: str, settings: CacheSettings, device: torch.device) -> ActivationCache:
    """Return the cache of the first `count` samples. Raises UserError if there is no room for it."""
    cache = activations(model, samples, range(count), name, settings, device)
    if not isinstance(cache, ActivationCache):
        raise UserError(
            "skip2lora_cache: there is no room for the activations, from which all settings of a sweep are trained. Free memory, "
            "name a larger disk with skip2lora_cache_dir, give skip2lora_cache_dtype bfloat16, or take fewer blocks or samples"
        )
    return cache


def _faster(cache: ActivationCache, recompute: Recompute, settings: CacheSettings, name: str) -> Activations:
    """Return the faster of the two, timed on a few batches. They are read from the disk itself, not from the page cache."""
    rows = list(cache.slices)[: TRIED_BATCHES * TRIED_SAMPLES]
    seconds = []
    for source in (cache, recompute):
        start = time.perf_counter()
        for first in range(0, len(rows), TRIED_SAMPLES):
            source(rows[first : first + TRIED_SAMPLES]).x.sum().item()
        seconds.append((time.perf_counter() - start) / len(rows))
    chosen = cache if seconds[0] <= seconds[1] else recompute
    times = f"reading takes {1000 * seconds[0]:.2f} ms a sample, computing {1000 * seconds[1]:.2f} ms"
    settings.console.detail(f"{name} cache: {times}: activations are {'read' if chosen is cache else 'computed again for every batch'}")
    return chosen


@torch.no_grad()
def fill(
    source: Recompute, layout: Layout, store: torch.Tensor | Rows, batches: Iterator[list[int]], agreed: Callable[[bool], bool]
) -> Iterator[list[int]]:
    """Run the prefix over batches of samples and write the rows into `store` (R, S + 1, d). Yield each batch that is written.

    The stem is computed with the longest of all samples, so that it does not depend on the batches. Filling ends when the ranks have
    `agreed` that none has samples left: a sharded model runs in all ranks at the same time.
    """
    model, samples, slices = source.model, source.samples, layout.slices
    longest = max(range(len(samples)), key=lambda i: len(samples[i].input_ids))
    with evaluating(model):
        if layout.first and agreed(isinstance(store, torch.Tensor) or not store.has_stem):
            stem = slice(0, layout.first)
            store[stem] = model.within(partial(_rows, source, [longest], layout.dtype))[stem]
        while agreed((indices := next(batches, [])) != []):
            rows = model.within(partial(_rows, source, indices or [longest], layout.dtype))
            start = layout.first
            for i in indices:
                own = slices[i]
                end = start + own.stop - own.start
                store[own] = rows[start:end]
                start = end
            yield indices


def _rows(source: Recompute, indices: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return x and the taps of a batch, (n, S + 1, d) or (N, S + 1, d), on the CPU in the cache's dtype."""
    if is_answer_only(source.model) and not is_flat(source.model):
        chosen = [source.samples[i] for i in indices]
        return plain_rows(source.model, chosen, source.device, source.stem).values[:, None].to(dtype).cpu()
    features = source(indices)
    return torch.cat((features.x[:, None], features.taps), dim=1).to(dtype).cpu()


def fill_batches(samples: Sequence[Sample], indices: Sequence[int], stem: int, device: torch.device) -> Iterator[list[int]]:
    """Yield batches of samples, the longest first, of up to `FILL_TOKENS` tokens, or `STEM_SHARE` times the stem if that is more."""
    limit = max(FILL_TOKENS["cpu" if device.type == "cpu" else "cuda"], STEM_SHARE * stem)
    batch: list[int] = []
    tokens = 0
    for i in sorted(indices, key=lambda i: -len(samples[i].input_ids)):
        own = samples[i].n_inputs - stem
        if batch and tokens + own > limit:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += own
    if batch:
        yield batch


def fingerprint(model: GPT, samples: Sequence[Sample], layout: Layout, device: torch.device) -> str:
    """Return a digest of everything that a cached value depends on: prefix weights, config, cut, taps, dtypes, tokens, masks, format."""
    digest = hashlib.sha256()
    norms = [block.skip2lora.norm_eps for block in model.tapped_blocks]
    taps = [i for i, block in enumerate(model.blocks) if block.skip2lora is not None]
    dtypes = [str(dtype) for dtype in (layout.dtype, model.dtype, model.compute_dtype(device))]
    facts = [FORMAT, torch.__version__, model.config.base_dict(), model.cut, taps, norms, dtypes, layout.shape]
    if is_flat(model) and layout.first:
        facts.append("stem once")
    trained = read = min(model.cut or 0, model.config.n_layer)
    if is_answer_only(model):
        facts.append(model.config.alora_invocation_tokens)
        read = model.config.n_layer  # number of blocks whose plain weights matter
    digest.update(json.dumps(facts, sort_keys=True).encode())
    parts = [module for name, module in model.transformer.items() if name != "h"]  # embeddings and ln_f
    for i, part in enumerate((*parts, *model.blocks[:read]), start=-len(parts)):
        for name, value in part.state_dict().items():
            if not name.startswith("skip2lora") and not (i >= trained and lora_filter(name)):
                digest.update(f"{name} {value.dtype}".encode())
                digest.update(whole(value.detach()).contiguous().cpu().view(torch.uint8).numpy().data)
    for i in layout.counts:
        digest.update(samples[i].input_ids)
        digest.update(samples[i].loss_mask)
    return digest.hexdigest()
