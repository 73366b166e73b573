"""LitGPT's functions that continue a prompt of ids, for scripts. The commands use `litgpt.generate.engine`, and these do as well."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from litgpt.generate.engine import Session
from litgpt.generate.sampling import Sampling, StopFilter, sample
from litgpt.model import GPT


def next_token(model: GPT, input_pos: torch.Tensor, x: torch.Tensor, input_pos_maxp1: int | None = None, **sampling: Any) -> torch.Tensor:
    """Return the id (1,) that follows x (1, T) at the places `input_pos` (T,) of the model's key/value cache. `sampling`: see `sample`."""
    return sample(model(x, input_pos, input_pos_maxp1), **sampling)


def generate_fn(
    model: GPT,
    prompt: torch.Tensor,
    max_returned_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    stop_tokens: Sequence[Sequence[int]] = (),
    include_prompt: bool = False,
    include_eos: bool = False,
) -> Iterator[torch.Tensor]:
    """Yield the prompt (T,) if it is included, then each id (1,) that follows, until there are `max_returned_tokens` with the prompt or a
    stop sequence appears, which is yielded if it is included.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    ids = Session(model).answer(prompt.tolist(), max_returned_tokens - prompt.numel(), sampling)
    if include_prompt:
        yield prompt
    stops = StopFilter(stop_tokens)
    for token in stops.free(ids):
        yield prompt.new_tensor([token])
    for token in (*stops.held, *(stops.stopped if include_eos else ())):
        yield prompt.new_tensor([token])


def generate(
    model: GPT, prompt: torch.Tensor, max_returned_tokens: int, *, eos_id: int | None = None, include_prompt: bool = True, **sampling: Any
) -> torch.Tensor:
    """Return the prompt (T,) and the ids that follow, `max_returned_tokens` at most, or up to and with `eos_id`; without the prompt if it
    is not included. `sampling`: temperature, top_k and top_p of `generate_fn`.
    """
    stops = () if eos_id is None else ([eos_id],)
    parts = generate_fn(model, prompt, max_returned_tokens, **sampling, stop_tokens=stops, include_prompt=include_prompt, include_eos=True)
    return torch.cat(list(parts))
