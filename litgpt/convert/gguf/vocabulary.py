"""A checkpoint folder's tokenizer as GGUF metadata, tokenizer.ggml.*: the reverse of `litgpt.convert.gguf.tokenizer`."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litgpt.checkpoint import tokenizer_contents
from litgpt.convert.gguf.pretokenizers import name_of
from litgpt.convert.gguf.tokenizer import BLANK, BYTE, CONTROL, ENDS, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, ranked_merges
from litgpt.errors import UserError
from litgpt.tokenizer import Tokenizer

BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def vocabulary(folder: Path, rows: int) -> dict[str, Any]:
    """Return tokenizer.* of the folder's tokenizer.json, for an embedding with this number of rows.

    Raises UserError for tokenizers that GGUF cannot describe, and for more tokens than rows. Files do not state that an added token absorbs
    the blanks around it (Phi 3), or that the text is composed first (NFC): readers know it for a model, or ignore it.
    """
    tokenizer_contents(folder)  # raises UserError if a file is a link out of the folder
    tokenizer = Tokenizer(folder)
    content = json.loads(tokenizer.to_json())
    model = content["model"]
    try:
        if model["type"] != "BPE":
            raise ValueError(f"the model {model['type']}")
        pieces = model.get("byte_fallback", False)
        tokens, kinds = _tokens(content, rows, pieces)
        scheme = _sentencepiece(content, tokens, kinds) if pieces else _byte_level(content)
    except ValueError as error:
        raise UserError(f"{folder / 'tokenizer.json'}: a GGUF file cannot describe {error}") from None
    special = {name: tokenizer.token_to_id(text) for name, text in tokenizer.special_tokens.items()}
    ends = dict.fromkeys(number for number in (tokenizer.eos_id, *sorted(tokenizer.stop_ids)) if number is not None)
    ids = {"bos": tokenizer.bos_id, "unknown": special.get("unk_token"), "padding": special.get("pad_token")}
    ids |= dict(zip(ENDS, ends, strict=False))
    values: dict[str, Any] = {"model": "llama" if pieces else "gpt2", **scheme, "tokens": tokens, "token_type": kinds}
    values |= {f"{name}_token_id": number for name, number in ids.items() if number is not None}
    values["add_bos_token"] = tokenizer.use_bos
    keys = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    return keys | ({} if tokenizer.chat_template is None else {"tokenizer.chat_template": tokenizer.chat_template})


def _tokens(content: Mapping[str, Any], rows: int, pieces: bool) -> tuple[list[str], list[int]]:
    """Return a text and a type for each row of the embedding. Rows without a token get a filler."""
    model = content["model"]
    tokens = {number: (text, BYTE if pieces and BYTE_PIECE.fullmatch(text) else NORMAL) for text, number in model["vocab"].items()}
    for token in content.get("added_tokens") or []:
        unknown = pieces and token["content"] == model.get("unk_token")
        kind = UNKNOWN if unknown else CONTROL if token["special"] else USER_DEFINED
        tokens[token["id"]] = (token["content"].replace(BLANK, " ") if pieces and kind == USER_DEFINED else token["content"], kind)
    if (last := max(tokens)) >= rows:
        raise ValueError(f"the token {tokens[last][0]!r}, number {last}, of an embedding of {rows} rows")
    entries = [tokens.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    return [text for text, _ in entries], [kind for _, kind in entries]


def _flat(entry: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """Return the steps of a normaliser or pre-tokenizer, with sequences expanded."""
    if entry is None:
        return []
    return [step for part in entry[key] for step in _flat(part, key)] if entry["type"] == "Sequence" else [entry]


def _byte_level(content: Mapping[str, Any]) -> dict[str, Any]:
    normalisers = [step["type"] for step in _flat(content["normalizer"], "normalizers")]
    if normalisers not in ([], ["NFC"]):
        raise ValueError(f"the normalizer {content['normalizer']}")
    if content["pre_tokenizer"] is None:
        raise ValueError("a tokenizer that does not cut text")
    pre = name_of(content["pre_tokenizer"], content["model"].get("ignore_merges", False), bool(normalisers))
    return {"pre": pre, "merges": [f"{left} {right}" for left, right in content["model"]["merges"]]}


def _sentencepiece(content: Mapping[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    """Return scores instead of merges: the earlier a token is merged, the better its score. `ranked_merges` must recover the merges."""
    prefix = False
    for step in _flat(content["normalizer"], "normalizers"):
        if step == {"type": "Prepend", "prepend": BLANK}:
            prefix = True
        elif step != {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}:
            raise ValueError(f"the normalizer {dict(step)}")
    for step in _flat(content["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "Metaspace":
            prefix = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
        elif step["type"] != "Split" or step["pattern"] != {"String": " "}:
            raise ValueError(f"the pre-tokenizer {dict(step)}")
    normal = dict.fromkeys(token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL)
    merges = [(left, right) for left, right in content["model"]["merges"] if {left, right, left + right} <= normal.keys()]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys([*(left + right for left, right in merges), *normal]))}
    again = ranked_merges({token: -float(ranks[token]) for token in normal})
    if set(again) != set(merges) or _unions(again) != _unions(merges):
        raise ValueError("merges that do not follow from scores of the tokens, as SentencePiece's do")
    scores = [-float(ranks[token]) if kind == NORMAL else 0.0 for token, kind in zip(tokens, kinds, strict=True)]
    return {"pre": "default", "scores": scores, "add_space_prefix": prefix}


def _unions(merges: list[tuple[str, str]]) -> list[str]:
    """Return the token of each merge, without runs of one character, such as blanks: they tie, and any order gives the longest."""
    return [left + right for left, right in merges if len(set(left + right)) > 1]
