"""`tokenizer.ggml.pre` of a GGUF file and `pre_tokenizer` of a tokenizer.json, both ways."""

from typing import Any

from litgpt.families import PRETOKENIZERS, Cut

_STEPS: dict[str, dict[str, Any]] = {
    "gpt-2": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "bytes": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    "digits": {"type": "Digits", "individual_digits": True},
    "digit runs": {"type": "Digits", "individual_digits": False},
    "punctuation": {"type": "Punctuation", "behavior": "Contiguous"},
}


def pre_tokenizer(cut: Cut) -> dict[str, Any]:
    """Return the `pre_tokenizer` of a tokenizer.json."""
    steps = cut.steps if "gpt-2" in cut.steps else (*cut.steps, "bytes")
    pattern = {"type": "Split", "behavior": "Isolated", "invert": False}
    parts = [_STEPS.get(step) or {**pattern, "pattern": {"Regex": step}} for step in steps]
    return parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts}


def steps_of(entry: dict[str, Any]) -> tuple[str, ...]:
    """Return the steps of a `pre_tokenizer`. Raise ValueError for other kinds of steps."""
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
    """Return the name of the scheme by which a `pre_tokenizer` cuts text. Raise ValueError if it has none.

    llama.cpp does not compose characters: a name with the same `nfc` is preferred, not required.
    """
    steps = steps_of(entry)
    names = [name for name, cut in PRETOKENIZERS.items() if cut.steps == steps and cut.whole_words == whole_words]
    if not names:
        merges = " with ignore_merges" if whole_words else ""
        raise ValueError(f"the pre-tokenizer {entry}{merges}")
    return min(names, key=lambda name: PRETOKENIZERS[name].nfc != nfc)
