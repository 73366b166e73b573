"""`torch.compile` for the pass of a new token, and for training all weights."""

from collections.abc import Callable
from typing import Any

import torch

from litgpt.errors import UserError
from litgpt.model import GPT
from litgpt.packed import compilable
from litgpt.text import first_line


def compile_steps(model: GPT) -> None:
    """Compile the pass of a single new token, in place. It begins with the first answer, and takes up to a minute."""
    compilable(model)
    model.last = _compiled(model.last, lambda idx, pos: idx.size(1) == 1)  # type: ignore[method-assign]


def compile_training(model: GPT) -> None:
    """Compile the passes of the blocks with gradients, in place. It begins with the first step, and takes half a minute."""
    for block in model.blocks:
        block.forward = _compiled(block.forward, lambda x, pos: torch.is_grad_enabled())  # type: ignore[method-assign]


def _compiled(eager: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """Return a function that runs compiled `when` its arguments say so. It raises UserError if torch cannot compile, for lack of a C++
    compiler for example.
    """
    compiled = torch.compile(eager, dynamic=True)

    def run(*args: Any) -> Any:
        try:
            return compiled(*args) if when(*args) else eager(*args)
        except RuntimeError as error:
            if type(error).__module__.startswith("torch._"):
                cause = getattr(error, "inner_exception", error)
                raise UserError(f"compile: {first_line(cause)}. Leave the option out") from None
            raise

    return run
