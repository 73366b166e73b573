"""Where answer-only LoRA is on."""

import torch

from litgpt.adapters.switch import Switch


def test_the_reply_begins_at_the_last_invocation() -> None:
    switch = Switch([7, 8])
    assert switch.start_of([1, 7, 8, 2, 7, 8, 3]) == 4
    assert switch.start_of([1, 7]) == 2


def test_mask() -> None:
    """On from the last invocation; off without one at the start of a text, on behind earlier tokens."""
    switch = Switch([7, 8])
    switch.look(torch.tensor([[7, 8, 1, 7, 8, 2], [1, 2, 3, 4, 5, 6]]), None, torch.float32)
    assert switch.mask is not None
    assert switch.mask[..., 0].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]]
    assert switch.masked(torch.ones(2, 6, 4)).sum() == 12
    switch.look(torch.tensor([[5]]), torch.tensor([[6]]), torch.float32)
    assert switch.mask.tolist() == [[[1.0]]]
    switch.start = 8
    switch.look(torch.tensor([[5, 5, 5]]), torch.tensor([[6]]), torch.float32)
    assert switch.mask[..., 0].tolist() == [[0, 0, 1]]


def test_off() -> None:
    switch = Switch([7])
    with switch.off():
        assert switch.is_off
    assert not switch.is_off
