"""Prompt styles as rows. `litgpt.prompts` makes classes of them, and says what the pieces mean.

Sources: the model cards and reference code of the models; Alpaca: Stanford Alpaca's two texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Style(NamedTuple):
    """One prompt style."""

    form: str  # "PlainStyle", "TurnStyle", or the class of another style, whose pieces it has but for these
    name: str  # for `data.prompt_style`
    pieces: Mapping[str, str | bool]


def plain(name: str, **pieces: str | bool) -> Style:
    return Style("PlainStyle", name, pieces)


def turns(name: str, **pieces: str | bool) -> Style:
    return Style("TurnStyle", name, pieces)


def like(other: str, name: str, **pieces: str | bool) -> Style:
    return Style(other, name, pieces)


def by_role(marker: str, end: str = "", between: str = "") -> dict[str, str]:
    """Return the pieces of a style whose roles share one form: `marker` with the role's name, the content, `end`, `between`."""
    system, user = (marker.replace("ROLE", role) + "{}" + end + between for role in ("system", "user"))
    reply_head = marker.replace("ROLE", "assistant")
    return {"system_turn": system, "user_turn": user, "reply_head": reply_head, "end_of_turn": end, "between": between}


TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TASK_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
INSTRUCTION = "### Instruction:\n{prompt}\n\n"
RESPONSE = "### Response:\n"

# By class name: the styles of no family, or of several.
OTHERS = {
    "Default": plain("default"),  # for base models, which continue a text
    "Alpaca": plain(
        "alpaca",
        system=TASK,
        system_with_input=TASK_WITH_INPUT,
        text="{system}\n\n" + INSTRUCTION + RESPONSE,
        text_with_input="{system}\n\n" + INSTRUCTION + "### Input:\n{input}\n\n" + RESPONSE,
    ),
    "FLAN": plain("flan", system=TASK, text="{system}\n\n" + INSTRUCTION + RESPONSE),
    "Longform": plain("longform", system=TASK_WITH_INPUT, text="{system}\n\n" + INSTRUCTION + RESPONSE),
    "H2Oai": plain("h2oai", text="<|prompt|>{prompt}</s><|answer|>", marker="<|answer|>"),
    "R1Base": turns(
        "r1-base",
        start="<｜begin▁of▁sentence｜>",
        system_turn="{}",
        user_turn="<｜User｜>{}",
        reply_head="<｜Assistant｜>",
        end_of_turn="<｜end▁of▁sentence｜>",
    ),
    "ChatML": turns("chatml", **by_role("<|im_start|>ROLE\n", "<|im_end|>", "\n")),
}
