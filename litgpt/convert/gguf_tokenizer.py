"""The tokenizer in a GGUF file's metadata (tokenizer.ggml.*) as tokenizer.json, tokenizer_config.json and generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.checkpoint import write_text
from litgpt.config import Config
from litgpt.errors import UserError

if TYPE_CHECKING:
    import tokenizers

    from litgpt.convert.gguf import Settings

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Values of tokenizer.ggml.token_type"""

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre -> how text is cut before the merges: by a pattern, "gpt-2": by ByteLevel's own, "digits": single digits, then the same
SPLITS = {
    "default": "gpt-2",
    "gpt-2": "gpt-2",
    "olmo": "gpt-2",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "command-r": "digits",
    "llama-bpe": LLAMA3_SPLIT,
    "llama3": LLAMA3_SPLIT,
    "llama-v3": LLAMA3_SPLIT,
    "falcon3": LLAMA3_SPLIT,
    "smaug-bpe": LLAMA3_SPLIT,
    "tekken": TEKKEN_SPLIT,
}
# A word that is a token as it stands is taken whole, whatever the merges say.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
BOS_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")


def write_tokenizer(settings: Settings, config: Config, folder: Path) -> None:
    """Write the three files into `folder`. Raises UserError for tokenizers that cannot be built."""
    kind = settings.get("tokenizer.ggml.model", str)
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{settings.path}: tokenizer.ggml.model is {kind!r}, supported are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)"
        )
    tokens: list[str] = settings.get("tokenizer.ggml.tokens", list)
    if not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{settings.path}: tokenizer.ggml.tokens holds other things than texts")
    special = {name: _token_id(settings, name, len(tokens)) for name in ("bos", "eos", "eot", "unknown", "padding")}
    try:
        backend = _byte_level(settings, tokens) if kind == "gpt2" else _sentencepiece(settings, tokens, special["unknown"])
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception, for instance for a merge that makes no token
        raise UserError(f"{settings.path}: the tokenizer cannot be built: {error}") from None
    _add_special(backend, settings, tokens, kind)
    pre = settings.get("tokenizer.ggml.pre", str, "default")
    add_bos = settings.get("tokenizer.ggml.add_bos_token", bool, kind == "llama" or pre in BOS_BY_DEFAULT)
    if special["bos"] is None:
        add_bos = False
    elif add_bos:
        _put_first(backend, tokens[special["bos"]], special["bos"])

    tokenizer_config: dict[str, Any] = {
        f"{name}_token": tokens[number]
        for name, number in zip(("bos", "eos", "unk", "pad"), (special[key] for key in ("bos", "eos", "unknown", "padding")), strict=True)
        if number is not None
    }
    tokenizer_config |= {"add_bos_token": add_bos, "clean_up_tokenization_spaces": False, "model_max_length": config.block_size}
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "tokenizer.chat_template" in settings.values:
        tokenizer_config["chat_template"] = settings.get("tokenizer.chat_template", str)
    ends = [number for number in dict.fromkeys((special["eos"], special["eot"])) if number is not None]
    generation = {"bos_token_id": special["bos"], "eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": special["padding"]}
    backend.save(str(folder / "tokenizer.json"))
    write_text(folder / "tokenizer_config.json", _dump(tokenizer_config))
    write_text(folder / "generation_config.json", _dump({key: value for key, value in generation.items() if value not in (None, [])}))


def _dump(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _token_id(settings: Settings, name: str, size: int) -> int | None:
    """tokenizer.ggml.<name>_token_id; None if the file does not say, or says -1 (also written without a sign)."""
    key = f"tokenizer.ggml.{name}_token_id"
    number = settings.get(key, int, -1)
    if number in (-1, 2**32 - 1):
        return None
    if not 0 <= number < size:
        raise UserError(f"{settings.path}: {key} is {number}, but there are {size} tokens")
    return number


def _byte_level(settings: Settings, tokens: list[str]) -> tokenizers.Tokenizer:
    """GPT-2's scheme: the bytes of the text, written as printable characters, are cut by a pattern and merged."""
    from tokenizers import Regex, Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    pre = settings.get("tokenizer.ggml.pre", str, "default")
    if pre not in SPLITS:
        raise UserError(f"{settings.path}: tokenizer.ggml.pre is {pre!r}, supported are {', '.join(SPLITS)}")
    merges = settings.get("tokenizer.ggml.merges", list)
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if bad := [merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2]:
        raise UserError(f"{settings.path}: tokenizer.ggml.merges holds {bad[0]!r}, which is not two tokens")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in WHOLE_WORDS))
    split = SPLITS[pre]
    if split in ("gpt-2", "digits"):
        whole_text = ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), whole_text]) if split == "digits" else whole_text
    else:
        cut = Split(Regex(split), behavior="isolated")
        backend.pre_tokenizer = Sequence([cut, ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(settings: Settings, tokens: list[str], unknown: int | None) -> tokenizers.Tokenizer:
    """SentencePiece BPE: blanks become U+2581, the neighbours whose union has the best score merge first, unknown characters become bytes.

    Every way to cut a token into two tokens is a merge; they are ranked by the score of the union, best first.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = settings.values.get("tokenizer.ggml.scores")
    kinds = _token_types(settings, len(tokens))
    if scores is None or len(scores) != len(tokens):
        raise UserError(f"{settings.path}: tokenizer.ggml.scores needs one score for each of the {len(tokens)} tokens")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    mergeable = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    ranked = []
    for token in mergeable:
        score = float(scores[vocabulary[token]])
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                ranked.append((-score, vocabulary[token], cut, (left, right)))
    ranked.sort()
    prefix = settings.get("tokenizer.ggml.add_space_prefix", bool, True)
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            [pair for *_, pair in ranked],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    blanks = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks]) if prefix else blanks
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _token_types(settings: Settings, size: int) -> list[int]:
    """tokenizer.ggml.token_type; all normal if the file does not say."""
    kinds = settings.values.get("tokenizer.ggml.token_type")
    if kinds is None:
        return [NORMAL] * size
    if len(kinds) != size:
        raise UserError(f"{settings.path}: {len(kinds)} entries in tokenizer.ggml.token_type for {size} tokens")
    return [int(kind) for kind in kinds]


def _add_special(backend: tokenizers.Tokenizer, settings: Settings, tokens: list[str], kind: str) -> None:
    """Tokens that are found in the text before it is cut: control tokens (left out when decoding) and user-defined ones (kept)."""
    from tokenizers import AddedToken

    kinds = _token_types(settings, len(tokens))
    control = (CONTROL, UNKNOWN) if kind == "llama" else (CONTROL,)
    pairs = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if token]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, kind in pairs if kind in control])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token, kind in pairs if kind == USER_DEFINED])


def _put_first(backend: tokenizers.Tokenizer, token: str, number: int) -> None:
    """BOS before every text, as transformers' post-processors do it."""
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B:1"], special_tokens=[(token, number)]
    )
