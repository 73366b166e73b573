"""`tokenizer.ggml.pre`: the names of the ways in which byte-level BPE cuts text before it merges, and what each is in a tokenizer.json.

A way is a tuple of steps, each of which cuts the pieces that the last one left:

    gpt-2        the pattern that ByteLevel itself has: contractions, letters, digits, the rest, each with a blank before it; blanks
    digits       every digit by itself
    digit runs   digits away from the rest
    punctuation  runs of punctuation away from the rest
    else         a regular expression: what it matches, and what lies between

The patterns are those of the models' published tokenizer.json files; the names are llama.cpp's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _by_words(digits: str) -> str:
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"


def _by_case(contraction: str, digits: str) -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{contraction}|{start}{_UPPER}+{_LOWER}*{contraction}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"


class Cut(NamedTuple):
    """A way to cut text, and what goes with it."""

    steps: tuple[str, ...]
    whole_words: bool = False
    """a piece that is a token as it stands is taken whole, whatever the merges say"""
    bos: bool = False
    """BOS comes first, if the file does not say"""
    nfc: bool = False
    """the text is brought into Unicode's composed form first"""


_GPT_2 = Cut(("gpt-2",))
_DIGITS = Cut(("digits", "gpt-2"))
_LLAMA_3 = Cut((_by_words(r"\p{N}{1,3}"),), whole_words=True, bos=True)
_CL100K = Cut(_LLAMA_3.steps)
_QWEN = Cut((_by_words(r"\p{N}"),), nfc=True)
_O200K = Cut((_by_case(f"{_CONTRACTION}?", r"\p{N}{1,3}"),))

CUTS: dict[str, Cut] = {
    **dict.fromkeys(("gpt-2", "default", "phi-2", "jais", "gigachat"), _GPT_2),
    **dict.fromkeys(("olmo", "mpt", "gpt-neox"), Cut(("gpt-2",), nfc=True)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), _DIGITS),
    "command-r": Cut(_DIGITS.steps, nfc=True),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA_3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _CL100K),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), _QWEN),
    **dict.fromkeys(("gpt-4o", "llama4"), _O200K),
    "tekken": Cut((_by_case("", r"\p{N}"),), whole_words=True, bos=True),
    "falcon": Cut(("punctuation", "gpt-2", "digit runs", "[0-9][0-9][0-9]")),
    "deepseek-coder": Cut(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", "digits")),
}
"""By `tokenizer.ggml.pre`. Of several names for one way the first is written."""

_STEPS: dict[str, dict[str, Any]] = {
    "gpt-2": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "bytes": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    "digits": {"type": "Digits", "individual_digits": True},
    "digit runs": {"type": "Digits", "individual_digits": False},
    "punctuation": {"type": "Punctuation", "behavior": "Contiguous"},
}


def pre_tokenizer(cut: Cut) -> dict[str, Any]:
    """`pre_tokenizer` of a tokenizer.json."""
    steps = cut.steps if "gpt-2" in cut.steps else (*cut.steps, "bytes")
    pattern = {"type": "Split", "behavior": "Isolated", "invert": False}
    made = [_STEPS.get(step) or {**pattern, "pattern": {"Regex": step}} for step in steps]
    return made[0] if len(made) == 1 else {"type": "Sequence", "pretokenizers": made}


def steps_of(entry: dict[str, Any]) -> tuple[str, ...]:
    """The steps that a `pre_tokenizer` of a tokenizer.json takes. Raises ValueError for one that is not of these kinds."""
    if entry["type"] == "Sequence":
        return tuple(step for part in entry["pretokenizers"] for step in steps_of(part))
    if entry["type"] == "ByteLevel" and not entry["add_prefix_space"]:
        return ("gpt-2",) if entry.get("use_regex", True) else ()
    if entry["type"] == "Split" and (entry["behavior"], entry["invert"]) in (("Isolated", False), ("Removed", True)):
        step = entry["pattern"].get("Regex", "")
        return ("digits" if step == r"\p{N}" else step,)
    for step, form in _STEPS.items():
        if {key: value for key, value in entry.items() if key in form} == form:
            return (step,)
    raise ValueError(f"the pre-tokenizer {entry}")


def name_of(entry: dict[str, Any], whole_words: bool, nfc: bool) -> str:
    """The name of the way that a tokenizer.json cuts text. Raises ValueError if it has none.

    llama.cpp does not compose characters: the name that says so is preferred, but one that does not is no error.
    """
    steps = steps_of(entry)
    fitting = [name for name, cut in CUTS.items() if cut.steps == steps and cut.whole_words == whole_words]
    if not fitting:
        merges = " with ignore_merges" if whole_words else ""
        raise ValueError(f"the pre-tokenizer {entry}{merges}")
    return min(fitting, key=lambda name: CUTS[name].nfc != nfc)
