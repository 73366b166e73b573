"""A checkpoint folder's tokenizer as GGUF metadata, tokenizer.ggml.*: the other direction of `gguf_tokenizer`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litgpt import files
from litgpt.convert.gguf.pretokenizers import name_of
from litgpt.convert.gguf.tokenizer import BLANK, BYTE, CONTROL, ENDS, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, ranked_merges
from litgpt.errors import UserError
from litgpt.tokenizer import Tokenizer

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def vocabulary(folder: Path, rows: int) -> dict[str, Any]:
    """tokenizer.* of the folder's tokenizer.json, for an embedding of so many rows.

    Raises UserError for tokenizers that GGUF has no words for, and for more tokens than rows. That an added token takes the blanks beside
    it (Phi 3), or that the text is composed first (NFC), is not said: readers know it of a model, or do without.
    """
    tokenizer, content = Tokenizer(folder), files.read_json(folder / "tokenizer.json")
    model = content["model"]
    try:
        if model["type"] != "BPE":
            raise ValueError(f"the model {model['type']}")
        pieces = model.get("byte_fallback", False)
        tokens, kinds = _tokens(content, rows, pieces)
        made = _sentencepiece(content, tokens, kinds) if pieces else _byte_level(content)
    except ValueError as error:
        raise UserError(f"{folder / 'tokenizer.json'}: a GGUF file has no words for {error}") from None
    special = {name: tokenizer.token_to_id(text) for name, text in tokenizer.special_tokens.items()}
    ids = {"bos": tokenizer.bos_id, "unknown": special.get("unk_token"), "padding": special.get("pad_token")}
    ends = dict.fromkeys(number for number in (tokenizer.eos_id, *sorted(tokenizer.stop_ids)) if number is not None)
    ids |= dict(zip(ENDS, ends, strict=False))
    found: dict[str, Any] = {"model": "llama" if pieces else "gpt2", **made, "tokens": tokens, "token_type": kinds}
    found |= {f"{name}_token_id": number for name, number in ids.items() if number is not None}
    found["add_bos_token"] = tokenizer.use_bos
    keys = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    return keys | ({} if tokenizer.chat_template is None else {"tokenizer.chat_template": tokenizer.chat_template})


def _tokens(content: Mapping[str, Any], rows: int, pieces: bool) -> tuple[list[str], list[int]]:
    """A text and a type for each row of the embedding. Rows without a token get one that only fills up."""
    model = content["model"]
    found = {number: (text, NORMAL) for text, number in model["vocab"].items()}
    if pieces:
        found |= {number: (text, BYTE) for number, (text, _) in found.items() if BYTE_PIECE.fullmatch(text)}
    for token in content.get("added_tokens") or []:
        text = token["content"]
        unknown = pieces and text == model.get("unk_token")
        found[token["id"]] = (text, UNKNOWN if unknown else CONTROL if token["special"] else USER_DEFINED)
    if (last := max(found)) >= rows:
        raise ValueError(f"the token {found[last][0]!r}, number {last}, of an embedding of {rows} rows")
    entries = [found.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    return [text.replace(BLANK, " ") if pieces and kind == USER_DEFINED else text for text, kind in entries], [kind for _, kind in entries]


def _merges(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in content["model"]["merges"]]
    return [(left, right) for left, right in pairs]


def _flat(entry: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, those of a sequence one by one."""
    if entry is None:
        return []
    return [step for part in entry[key] for step in _flat(part, key)] if entry["type"] == "Sequence" else [entry]


def _byte_level(content: Mapping[str, Any]) -> dict[str, Any]:
    model = content["model"]
    normalisers = [step["type"] for step in _flat(content["normalizer"], "normalizers")]
    if normalisers not in ([], ["NFC"]):
        raise ValueError(f"the normalizer {content['normalizer']}")
    if content["pre_tokenizer"] is None:
        raise ValueError("a tokenizer that does not cut text")
    pre = name_of(content["pre_tokenizer"], model.get("ignore_merges", False), bool(normalisers))
    return {"pre": pre, "merges": [f"{left} {right}" for left, right in _merges(content)]}


def _sentencepiece(content: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    """Scores in place of merges: the sooner a token is made, the better its score. `ranked_merges` of them must find the merges again."""
    prefix = False
    for step in _flat(content["normalizer"], "normalizers"):
        known = {key: value for key, value in step.items() if key != "type"}
        if step["type"] == "Prepend" and known == {"prepend": BLANK}:
            prefix = True
        elif step["type"] != "Replace" or known != {"pattern": {"String": " "}, "content": BLANK}:
            raise ValueError(f"the normalizer {dict(step)}")
    for step in _flat(content["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            prefix = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
        elif step["type"] != "Split" or step["pattern"] != {"String": " "}:
            raise ValueError(f"the pre-tokenizer {dict(step)}")
    normal = [token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL]
    known_tokens = set(normal)
    merges = [(left, right) for left, right in _merges(content) if {left, right, left + right} <= known_tokens]
    made = dict.fromkeys(left + right for left, right in merges)
    ranks = {token: rank for rank, token in enumerate((*made, *(token for token in normal if token not in made)))}
    again = ranked_merges({token: -float(ranks[token]) for token in normal})
    if set(again) != set(merges) or _made_in_order(again) != _made_in_order(merges):
        raise ValueError("merges that do not follow from scores of the tokens, as SentencePiece's do")
    scores = [-float(ranks[token]) if kind == NORMAL else 0.0 for token, kind in zip(tokens, kinds, strict=True)]
    return {"pre": "default", "scores": scores, "add_space_prefix": prefix}


def _made_in_order(merges: list[tuple[str, str]]) -> list[str]:
    """What each merge makes. Runs of one character, such as blanks, are left out: they tie, and come out as the longest in any order."""
    return [left + right for left, right in merges if len(set(left + right)) > 1]
