"""Answer-only LoRA (aLoRA, arXiv 2504.12397) in training: replies with LoRA, behind prompts of the plain model.

LoRA is on from the tokens that open a reply, the *invocation*, to its end. Everything in front of a reply, earlier replies included, acts
on it through the plain model's keys and values, which training does not change. So one plain pass over a sample serves all its replies in
all epochs, and a step computes only the replies, forward and backward:

    plain pass    rows of the packed samples: x at the first block with LoRA, taps, keys and values of this and the later blocks    (N, W)
    replies       their rows of x through the blocks with LoRA; attention over the prompt's keys and values, then over their own

Letters as in `litgpt.model`; here B counts replies, C the longest prompt, W = (1 + S) d + 2 G h for each block from `first` on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch

from litgpt import model as base
from litgpt.attention import alibi
from litgpt.errors import UserError
from litgpt.lora import GPT
from litgpt.loss import Features
from litgpt.model import Positions
from litgpt.packing import Packing, loss_targets, pack, sent, take
from litgpt.rope import is_long
from litgpt.sample import Sample


def is_answer_only(model: base.GPT) -> TypeGuard[GPT]:
    """Return True if LoRA acts on replies only."""
    return model.switch is not None


def width(model: GPT) -> int:
    """Return W."""
    config, first = model.config, model.config.lora_blocks[0]
    taps = sum(block.skip2lora is not None for block in model.blocks[:first])
    return (1 + taps) * config.n_embd + (config.n_layer - first) * sum(heads * size for heads, size in config.cache_sizes)


def replies(sample: Sample, invocation: Sequence[int]) -> list[tuple[int, int]]:
    """Return the positions [start, stop) of the inputs of each learned reply, from its invocation on.

    Raises UserError if a reply does not follow the invocation.
    """
    found, n = [], len(invocation)
    for learned in re.finditer(b"\1+", sample.loss_mask):
        begin, end = learned.span()
        if begin < n or list(sample.input_ids[begin - n : begin]) != list(invocation):
            before = list(sample.input_ids[max(0, begin - n) : begin])
            raise UserError(
                f"alora_enabled: a reply follows the tokens {before}, not alora_invocation_tokens {list(invocation)}. LoRA on replies "
                "only needs prompts (data.mask_prompt true) and the same tokens in front of each reply"
            )
        found.append((begin - n, end - 1))
    return found


@dataclass(frozen=True)
class Rows:
    """The plain pass over a batch: rows (N, W), those of the stem first."""

    values: torch.Tensor
    samples: Sequence[Sample]
    stem: int  # P

    def numbers(self, sample: int, start: int, stop: int) -> torch.Tensor:
        """Return the row numbers of a sample's positions [start, stop)."""
        first = self.stem + sum(each.n_inputs - self.stem for each in self.samples[:sample])
        places = torch.arange(start, stop)
        return torch.where(places < self.stem, places, places + (first - self.stem))


@torch.no_grad()
def plain_rows(model: GPT, samples: Sequence[Sample], device: torch.device, stem: int) -> Rows:
    """Run the model without LoRA over samples whose first `stem` tokens are the same."""
    assert model.switch is not None
    first, batch = model.config.lora_blocks[0], pack(samples, device, stem)
    pos = model.packed_positions(batch.packing)
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with model.switch.off():
        x, taps = model.through(model.blocks[:first], model.embed(batch.ids, pos), pos)
        parts, keeping = [x, *taps], replace(pos, kept=kept)
        for block in model.blocks[first:-1]:
            x = block(x, keeping)
        model.blocks[-1].attend(x, keeping)
    parts += [part for i in range(first, model.config.n_layer) for part in kept[i]]
    return Rows(torch.cat([part.to(model.dtype) for part in parts], dim=1), samples, batch.packing.stem)


def reply_features(model: GPT, rows: Rows) -> Features:
    """Return the inputs of the tail, with LoRA, for the replies of a plain pass: x at the cut and taps.

    With the cut at `ln_f` or `lm_head` the blocks with LoRA, trained before, run here, and only positions with loss are returned.
    """
    config, switch, device = model.config, model.switch, rows.values.device
    assert switch is not None
    switch.mask = None
    first, d = config.lora_blocks[0], config.n_embd
    found = [(b, *span) for b, sample in enumerate(rows.samples) for span in replies(sample, switch.invocation)]
    starts = [start for _, start, _ in found]
    C = max(starts)
    own = sent(torch.cat([rows.numbers(*reply) for reply in found]), device)  # (N',)
    earlier = torch.zeros(len(found), C, dtype=torch.long)
    for i, (b, start, _) in enumerate(found):
        earlier[i, :start] = rows.numbers(b, 0, start)
    sizes = config.cache_sizes
    widths = [heads * size for heads, size in sizes]
    kv = rows.values.size(1) - (config.n_layer - first) * sum(widths)
    cached = rows.values[:, kv:].index_select(0, sent(earlier.flatten(), device)).view(len(found), C, -1, sum(widths))  # (B, C, L', w)
    context = {
        first + i: tuple(part.unflatten(-1, size).transpose(1, 2) for part, size in zip(block.split(widths, -1), sizes, strict=True))
        for i, block in enumerate(cached.unbind(2))
    }
    packing = Packing.of([stop - start for _, start, stop in found], 0, device, starts)
    pos = reply_positions(model, packing, [len(rows.samples[b].input_ids) for b, _, _ in found], context)
    at = torch.cat([torch.frombuffer(rows.samples[b].loss_mask, dtype=torch.bool)[start + 1 : stop + 1] for b, start, stop in found])
    at = sent(at.nonzero()[:, 0], device)
    x, taps = rows.values[own, :d], rows.values[own, d:kv].unflatten(1, (-1, d))
    targets = sent(loss_targets(rows.samples), device)
    cut = model.cut or 0
    if cut <= first:
        return Features(x, taps, targets, at, pos)
    with torch.no_grad():
        x, late = model.through(model.blocks[first:cut], x, pos)
        taps = torch.cat((taps, torch.stack(late, dim=1)), dim=1) if late else taps
        if cut < config.n_layer:
            return Features(x, taps, targets, at, pos)
        x = take(x, at) if cut == config.n_layer else model.transformer["ln_f"](take(x, at))
    return Features(x, take(taps, at), targets)


def reply_positions(
    model: GPT, packing: Packing, tokens: Sequence[int], context: dict[int, tuple[torch.Tensor, torch.Tensor]]
) -> Positions:
    """Return rotary tables and masks for packed replies (N,) that start at `packing.starts` (B,) in sequences of `tokens` tokens.

    A reply attends to its own part of `context`, up to its start, and to itself.
    """
    starts, device = packing.starts, packing.rows.device
    assert starts is not None
    C = next(iter(context.values()))[0].size(2)
    own = torch.arange(packing.width, device=device)
    before = torch.arange(C, device=device).expand(len(starts), C)
    places = starts[:, None] + own  # (B, T)
    keys = torch.cat((before, places), dim=1)  # (B, C + T)
    causal = torch.cat(
        ((before < starts[:, None])[:, None].expand(-1, packing.width, -1), (own <= own[:, None]).expand(len(starts), -1, -1)), dim=2
    )
    real = places.minimum(sent(torch.tensor(tokens), device)[:, None] - 1)  # padding gets the last place
    end = int(real.max()) + 1
    model.require_room(end)
    rotary = tuple(model.rotary(table, real, end, [is_long(model.config, length) for length in tokens]) for table in model.rope)
    window = model.config.sliding_window_size
    near = None if window is None else causal & (places[..., None] - keys[:, None] < window)
    mask = causal[:, None]
    if model.config.alibi:
        mask = alibi(model.config, mask, places[:, None], keys[:, None], model.compute_dtype(device))
    return Positions(rotary, mask, None if near is None else near[:, None], None, C + packing.width, packing, context=context)
