"""The tokenizer in a GGUF file's metadata (tokenizer.ggml.*) as tokenizer.json, tokenizer_config.json and generation_config.json."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from litgpt.atomic import write_text
from litgpt.config import Config
from litgpt.convert.gguf.config import padding
from litgpt.convert.gguf.pretokenizers import pre_tokenizer
from litgpt.convert.gguf.reader import Source
from litgpt.errors import UserError
from litgpt.families import PRETOKENIZERS
from litgpt.tokenizer import FLAGS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # values of tokenizer.ggml.token_type
BLANK = "▁"  # a blank in SentencePiece
PHI_3_PLAIN = ("<s>", "<|endoftext|>")
SCHEMES = {"gpt2": "byte-level BPE", "llama": "SentencePiece, BPE", "t5": "SentencePiece, unigram"}
ENDS = ("eos", "eot", "eom")  # tokenizer.ggml.<name>_token_id of the tokens that end an answer


def write_tokenizer(source: Source, config: Config, folder: Path) -> None:
    """Write the three files into `folder`. Raises UserError for tokenizers that cannot be built."""
    kind = source.get("tokenizer.ggml.model", str)
    if kind not in SCHEMES:
        known = ", ".join(f"{name!r} ({scheme})" for name, scheme in SCHEMES.items())
        raise UserError(f"{source.path}: tokenizer.ggml.model is {kind!r}, but only {known} are supported")
    tokens, kinds = _vocabulary(source, kind)
    ids = {name: _token_id(source, name, len(tokens)) for name in (*ENDS, "bos", "unknown", "padding")}
    if kind == "gpt2":
        content = _byte_level(source, tokens)
    else:
        content = (_sentencepiece if kind == "llama" else _unigram)(source, tokens, kinds, ids["unknown"])
    strips = kind == "llama" and source.metadata.get("general.architecture") == "phi3"
    content["added_tokens"] = _added(tokens, kinds, (CONTROL,) if kind == "gpt2" else (CONTROL, UNKNOWN), strips)
    default = kind == "llama" or (kind == "gpt2" and PRETOKENIZERS[source.get("tokenizer.ggml.pre", str, "default")].bos)
    bos = ids["bos"] if source.get("tokenizer.ggml.add_bos_token", bool, default) else None
    if bos is not None:
        content["post_processor"] = _bos_first(tokens[bos], bos)
    try:
        tokenizers.Tokenizer.from_str(json.dumps(content, ensure_ascii=False)).save(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception, for instance for a merge that makes no token
        raise UserError(f"{source.path}: the tokenizer cannot be built: {error}") from None

    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    tokenizer_config: dict[str, Any] = {f"{name}_token": tokens[ids[key] or 0] for key, name in names.items() if ids[key] is not None}
    tokenizer_config |= {"add_bos_token": bos is not None, "clean_up_tokenization_spaces": False, "model_max_length": config.block_size}
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "tokenizer.chat_template" in source.metadata:
        tokenizer_config["chat_template"] = source.get("tokenizer.chat_template", str)
    ends = [number for number in dict.fromkeys(ids[name] for name in ENDS) if number is not None]
    generation = {"bos_token_id": ids["bos"], "eos_token_id": ends[0] if len(ends) == 1 else ends or None, "pad_token_id": ids["padding"]}
    generation = {key: value for key, value in generation.items() if value is not None}
    for file, values in (("tokenizer_config.json", tokenizer_config), ("generation_config.json", generation)):
        write_text(folder / file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _vocabulary(source: Source, model: str) -> tuple[list[str], list[int]]:
    """Return the tokens and their types (default: normal), without those that only pad the embedding.

    SentencePiece's user-defined tokens are searched in the raw text: they get blanks for U+2581.
    """
    tokens: list[str] = source.get("tokenizer.ggml.tokens", list)
    if not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{source.path}: tokenizer.ggml.tokens holds values that are not texts")
    size = len(tokens) - padding(tokens)
    kinds = [int(kind) for kind in _numbers(source, "tokenizer.ggml.token_type", len(tokens), NORMAL)[:size]]
    tokens = tokens[:size]
    if model != "gpt2":
        known = set(tokens)
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
            if kind == USER_DEFINED and (text := token.replace(BLANK, " ")) not in known:
                tokens[number] = text
    return tokens, kinds


def _numbers(source: Source, key: str, size: int, default: float | None = None) -> Sequence[Any]:
    """Return an array with a number for each token."""
    if key not in source.metadata and default is not None:
        return [default] * size
    array = source.get(key, np.ndarray)
    if len(array) != size:
        raise UserError(f"{source.path}: {len(array)} entries in {key} for {size} tokens")
    numbers: list[Any] = array.tolist()
    return numbers


def _token_id(source: Source, name: str, size: int) -> int | None:
    """Return tokenizer.ggml.<name>_token_id; None if it is missing or -1 (also written without a sign)."""
    key = f"tokenizer.ggml.{name}_token_id"
    number = source.get(key, int, -1)
    if number in (-1, 2**32 - 1):
        return None
    if not 0 <= number < size:
        raise UserError(f"{source.path}: {key} is {number}, but there are {size} tokens")
    return int(number)


def _bpe(tokens: Sequence[str], merges: Iterable[Sequence[str]], **settings: Any) -> dict[str, Any]:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return {"type": "BPE", "vocab": vocabulary, "merges": [list(pair) for pair in merges], **settings}


def _byte_level(source: Source, tokens: list[str]) -> dict[str, Any]:
    """GPT-2's scheme: the bytes of the text, written as printable characters, are cut by a pattern and merged."""
    pre = source.get("tokenizer.ggml.pre", str, "default")
    if pre not in PRETOKENIZERS:
        raise UserError(f"{source.path}: tokenizer.ggml.pre is {pre!r}; supported are {', '.join(sorted(PRETOKENIZERS))}")
    pairs = [str(merge).split(" ") for merge in source.get("tokenizer.ggml.merges", list)]
    if bad := [pair for pair in pairs if len(pair) != 2]:
        raise UserError(f"{source.path}: tokenizer.ggml.merges holds {' '.join(bad[0])!r}, which is not two tokens")
    return {
        "model": _bpe(tokens, pairs, ignore_merges=PRETOKENIZERS[pre].whole_words),
        "normalizer": {"type": "NFC"} if PRETOKENIZERS[pre].nfc else None,
        "pre_tokenizer": pre_tokenizer(PRETOKENIZERS[pre]),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    }


def _sentencepiece(source: Source, tokens: list[str], kinds: list[int], unknown: int | None) -> dict[str, Any]:
    """SentencePiece: blanks become U+2581, the neighbours whose union has the best score merge first, unknown characters become bytes."""
    scores = _numbers(source, "tokenizer.ggml.scores", len(source.get("tokenizer.ggml.tokens", list)))
    normal = {token: float(score) for token, kind, score in zip(tokens, kinds, scores, strict=False) if kind == NORMAL}
    unk = None if unknown is None else tokens[unknown]
    return {
        "model": _bpe(tokens, ranked_merges(normal), unk_token=unk, fuse_unk=True, byte_fallback=True),
        **_blanks(source),
    }


def _blanks(source: Source, *first: dict[str, Any]) -> dict[str, Any]:
    """Return the normaliser that replaces blanks by U+2581, after the normalisers `first`, and the decoder that reverses it."""
    prefix = source.get("tokenizer.ggml.add_space_prefix", bool, True)
    steps = [*first, *([{"type": "Prepend", "prepend": BLANK}] if prefix else [])]
    steps += [{"type": "Replace", "pattern": {"String": " "}, "content": BLANK}]
    words = [{"type": "Replace", "pattern": {"String": BLANK}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps[1:] else steps[0],
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [*words, strip] if prefix else words},
    }


def _unigram(source: Source, tokens: list[str], kinds: list[int], unknown: int | None) -> dict[str, Any]:
    """SentencePiece's unigram model: the most probable way to cut a text, by the scores, which are log-probabilities.

    Characters are replaced by the table `precompiled_charsmap` first.
    """
    if unknown is None:
        raise UserError(f"{source.path} has no tokenizer.ggml.unknown_token_id, which a unigram tokenizer needs")
    scores = _numbers(source, "tokenizer.ggml.scores", len(source.get("tokenizer.ggml.tokens", list)))
    table = source.get("tokenizer.ggml.precompiled_charsmap", np.ndarray, np.zeros(0, np.uint8))
    steps: list[dict[str, Any]] = []
    if len(table):
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table.astype(np.uint8).tobytes()).decode()})
    if source.get("tokenizer.ggml.remove_extra_whitespaces", bool, False):
        steps += [{"type": "Strip", "strip_left": True, "strip_right": True}]
        steps += [{"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]
    vocabulary = [[token, float(score)] for token, score in zip(tokens, scores, strict=False)]
    return {
        "model": {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": BYTE in kinds},
        **_blanks(source, *steps),
    }


def ranked_merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return every pair of tokens whose union is a token, by the union's score, best first; ties go by the earlier token."""
    ranked = []
    for number, (token, score) in enumerate(scores.items()):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in scores and right in scores:
                ranked.append((-score, number, cut, (left, right)))
    return [pair for *_, pair in sorted(ranked)]


def _added(tokens: list[str], kinds: list[int], control: tuple[int, ...], strips: bool) -> list[dict[str, Any]]:
    """Return the tokens that are found before the text is cut: control tokens (left out when decoding) and user-defined ones (kept).

    `strips`: control tokens but PHI_3_PLAIN absorb the blanks behind them. Files do not state it; llama.cpp, too, knows it for Phi 3 only.
    """
    flags = dict.fromkeys(FLAGS, False)
    return [
        {**flags, "id": i, "content": token, "rstrip": strips and kind == CONTROL and token not in PHI_3_PLAIN, "special": kind in control}
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if token and kind in (*control, USER_DEFINED)
    ]


def _bos_first(token: str, number: int) -> dict[str, Any]:
    """Return a post-processor that puts BOS before every text, as transformers' do."""
    bos = [{"SpecialToken": {"id": token, "type_id": place}} for place in (0, 1)]
    text = [{"Sequence": {"id": name, "type_id": place}} for place, name in enumerate("AB")]
    special = {token: {"id": token, "ids": [number], "tokens": [token]}}
    pair = [bos[0], text[0], bos[1], text[1]]
    return {"type": "TemplateProcessing", "single": [bos[0], text[0]], "pair": pair, "special_tokens": special}
