"""Ways in which byte-level BPE cuts text before it merges, which `tokenizer.ggml.pre` of a GGUF file names.

A way is a tuple of steps, each of which cuts the pieces that the previous step left:

    gpt-2        the pattern of ByteLevel itself: contractions, letters, digits, the rest, each with a blank before it; blanks
    digits       every digit by itself
    digit runs   digits away from the rest
    punctuation  runs of punctuation away from the rest
    else         a regular expression: its matches, and the text between them

The patterns are those of the models' published tokenizer.json files; the names are llama.cpp's.
"""

from __future__ import annotations

from typing import NamedTuple

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"


class Cut(NamedTuple):
    """A way to cut text, and what goes with it."""

    steps: tuple[str, ...]
    whole_words: bool = False  # a piece that is a token is not merged from smaller ones
    bos: bool = False  # BOS comes first, if the file does not say
    nfc: bool = False  # the text is brought into Unicode's composed form first


def by_words(digits: str) -> str:
    """Return a pattern of words, with the letters of any case together."""
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"


def by_case(digits: str, contraction: str = "") -> str:
    """Return a pattern of words that begin at a capital letter."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = f"{start}{_UPPER}*{_LOWER}+{contraction}|{start}{_UPPER}+{_LOWER}*{contraction}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"


GPT_2 = Cut(("gpt-2",))
GPT_2_COMPOSED = Cut(("gpt-2",), nfc=True)
DIGITS = Cut(("digits", "gpt-2"))
THREE_DIGITS = Cut((by_words(r"\p{N}{1,3}"),))
LLAMA_3 = THREE_DIGITS._replace(whole_words=True, bos=True)
QWEN = Cut((by_words(r"\p{N}"),), nfc=True)

# Names that no family here has: their tokenizers are read all the same.
OTHERS: dict[str, Cut] = {
    **dict.fromkeys(("default", "jais", "gigachat"), GPT_2),
    **dict.fromkeys(("mpt", "gpt-neox"), GPT_2_COMPOSED),
    **dict.fromkeys(("starcoder", "refact", "codeshell"), DIGITS),
    "command-r": DIGITS._replace(nfc=True),
    **dict.fromkeys(("dbrx", "smaug-bpe"), THREE_DIGITS),
    **dict.fromkeys(("gpt-4o", "llama4"), Cut((by_case(r"\p{N}{1,3}", f"{_CONTRACTION}?"),))),
    "deepseek-coder": Cut(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", "digits")),
}
