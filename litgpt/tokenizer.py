"""Text to token ids and back, with a checkpoint's BOS, EOS and chat template."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.errors import UserError
from litgpt.files import decode_text, expand_path, json_if_there, read_bytes, read_own

if TYPE_CHECKING:
    import tokenizers
    import torch


MOST_TEXT = 2**21  # characters of a text, whose tokens take some 300 bytes each
TEMPLATES = "additional_chat_templates"  # folder of templates besides chat_template.jinja, by name
EXTRA_TOKENS = ("extra_special_tokens", "additional_special_tokens")  # in this order, as transformers reads them
STANDARD_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))  # other names are a model's own
OWN_TOKENS = "model_specific_special_tokens"  # a model's own special tokens by name
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
CLEANED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")  # lose their spaces, in this order, as in transformers
HELD = 8  # characters at the end of an answer whose spaces later ones may remove
MOST_FILE = 2**28  # bytes of tokenizer.json
MOST_ADDED = 2**22  # bytes of the texts of added tokens, each of which takes some 80 in memory
MOST_LOOKS = 2**27  # characters of a text times those of the longest piece, which a Unigram model compares
LONGEST_WORD = 1_000  # characters that a WordPiece model divides, in time that grows faster than their square
CONTENT = re.compile(rb'"content"\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"')  # of an added token in tokenizer.json
MOST_GROWTH = 64  # times that a decoder or a pre-tokenizer may lengthen a token
MOST_FIRST = 1_000  # tokens that a post-processor may put around a text
GROWTH = {"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "Lowercase": 2, "BertNormalizer": 12, "ByteLevel": 4}  # characters for one, at most


class Tokenizer:
    """The tokenizer of a checkpoint folder: `tokenizer.json`, with `tokenizer_config.json` and `generation_config.json` if present.

    Raises UserError, naming the file, for a folder without `tokenizer.json` and for unreadable files.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        self.folder = folder = expand_path(checkpoint_dir)
        self.processor = _load_backend(folder)
        """The tokenizer of the `tokenizers` package, under LitGPT's name."""
        self._steps = _growths(self.processor.normalizer)
        self._longest_piece = _longest_piece(self.processor, folder / "tokenizer.json")
        for part in ("decoder", "pre_tokenizer"):
            if (growth := _grown(1, _growths(getattr(self.processor, part)))) > MOST_GROWTH:
                raise UserError(f"{folder / 'tokenizer.json'}: its {part} makes a text {min(growth, 10**9):,} times as long: copy it again")
        config = {} if (padding := self.processor.padding) is None else {"pad_token": padding["pad_token"]}
        config |= _merged(*(json_if_there(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json")))
        self._config = {key: value for key, value in config.items() if value is not None}
        named = _named_tokens(self._config)
        self.special_tokens = {name: text for name, entry in named.items() if (text := _token_text(entry)) is not None}
        self.cleans_up = bool(self._config.get("clean_up_tokenization_spaces")) and type(self.processor.model).__name__ != "BPE"
        self.processor.no_padding()
        self.processor.encode_special_tokens = self._config.get("split_special_tokens") is True
        self._add_tokens([*named.values()])
        generation = folder / "generation_config.json"
        if not os.path.lexists(generation):  # transformers derives it from the model's config
            generation = folder / "config.json"
        bos_ids, eos_ids = (self._ids_in(generation, key) for key in ("bos_token_id", "eos_token_id"))
        self.bos_id = self._special_id("bos_token", bos_ids)
        self.eos_id = self._special_id("eos_token", eos_ids)
        self.stop_ids: set[int] = set(eos_ids) | ({self.eos_id} if self.eos_id is not None else set())
        """Ids that end a generated answer."""
        self.first_ids = self._first_ids()
        """Ids that tokenizer.json puts before a text: usually BOS or none. transformers 5 does not read `add_bos_token` either."""
        self.use_bos: bool = self.bos_id in self.first_ids
        templates = _chat_templates(self._config.get("chat_template"), folder)
        self.chat_template = templates.get("default")
        self.tool_template = templates.get("tool_use")  # of conversations with tools, if there is one

    def _add_tokens(self, named: list[Any]) -> None:
        """Add the tokens that other files than tokenizer.json name, as transformers does: tokenizer_config.json, else added_tokens.json and
        special_tokens_map.json. Special tokens become ones that are recognised in a text; BOS and EOS have to be in the vocabulary."""
        extra = entries if isinstance(entries := self._config.get(EXTRA_TOKENS[0]), list) else []
        present, listed = self.processor.get_added_tokens_decoder(), self._config.get("added_tokens_decoder")
        if listed is None:
            special = {text for name, text in self.special_tokens.items() if name in STANDARD_TOKENS} | set(map(_token_text, extra))
            legacy = json_if_there(self.folder / "added_tokens.json")
            flags = {text: {"content": text, "special": text in special, "normalized": text not in special} for text in legacy}
            listed = {str(number): flags[text] for text, number in legacy.items()}
            tokens = _listed_tokens(listed, self.folder) | present
        else:
            tokens = _listed_tokens(listed, self.folder)
        new = [tokens[number] for number in sorted(tokens)]
        known = {token.content for token in (*new, *present.values())}
        required = {self.special_tokens.get(name) for name in ("bos_token", "eos_token")}
        for entry in (*named, *extra):
            text = _token_text(entry)
            if text and text not in known and (text not in required or self.token_to_id(text) is not None):
                new.append(_added_token({"content": text, "special": not _is_marked(entry), **(entry if isinstance(entry, dict) else {})}))
        for token in new:
            token.special |= token.content in self.special_tokens.values()
        self.processor.add_tokens(new)

    def _first_ids(self) -> list[int]:
        self._require_bounded("a")
        for step in _parts(self.processor.post_processor):
            names = [piece["SpecialToken"]["id"] for piece in step.get("single") or () if "SpecialToken" in piece]
            if (count := sum(len(step["special_tokens"][name]["ids"]) for name in names)) > MOST_FIRST:
                raise UserError(f"tokenizer.json: its post_processor puts {count:,} tokens around a text: it is broken, copy it again")
        with _no_panics("tokenizer.json"):
            encoding = self.processor.encode("a")
        return [number for number, _ in takewhile(lambda pair: pair[1] is None, zip(encoding.ids, encoding.sequence_ids, strict=True))]

    def _ids_in(self, file: Path, key: str) -> list[int]:
        """Return the ids under `key` of a JSON file: a number or a list of numbers. Some models write -1 for none."""
        entry = json_if_there(file).get(key)
        values = [value for value in (entry if isinstance(entry, list) else [entry]) if value not in (None, -1)]
        for value in values:
            number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32
            if not number or self.processor.id_to_token(value) is None:
                raise UserError(f"{file}: {key} is {str(value)[:60]!r}, which is not an id of tokenizer.json: correct it")
        return values

    def _special_id(self, name: str, fallback: list[int]) -> int | None:
        """Return the id of a special token, by its text in tokenizer_config.json, else by generation_config.json."""
        entry, file = self._config.get(name), self.folder / "tokenizer_config.json"
        text = _token_text(entry)
        if entry is not None and text is None:
            raise UserError(f"{file}: {name} is {str(entry)[:60]!r}, a text is needed")
        token_id = None if text is None else self.token_to_id(text)
        if token_id is None and fallback:
            token_id = fallback[0]
        if token_id is None and text is not None and (name == "eos_token" or self._config.get("add_bos_token") is True):
            raise UserError(f"{file}: {name} is {text[:60]!r}, which tokenizer.json does not have: correct it")
        return token_id

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.processor.get_vocab_size(with_added_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token by its text in the vocabulary, or None."""
        return self.processor.token_to_id(token)

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """A pattern of the special tokens' texts."""
        texts = [token.content for token in self.processor.get_added_tokens_decoder().values() if token.special]
        return re.compile("|".join(map(re.escape, texts)) or "(?!)")

    def add(self, tokens: list[str], special: bool) -> str:
        """Add tokens to the vocabulary. Return tokenizer.json with them."""
        from tokenizers import AddedToken

        self.processor.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
        return self.to_json()

    def to_json(self) -> str:
        """Return tokenizer.json with the tokens of all files."""
        return str(self.processor.to_str(pretty=True))

    def ids(self, text: str, bos: bool | None = None, eos: bool = False) -> list[int]:
        """Return token ids. Special tokens in the text are recognised.

        `bos` defaults to what tokenizer.json does: its `first_ids`. They are not repeated if the text starts with them. Raises UserError if
        BOS or EOS is requested and the checkpoint has none.
        """
        ids = self._encode(text).ids
        first = [] if bos is False else self.first_ids
        if bos and not first:
            first = [_required(self.bos_id, "beginning-of-sequence (bos_token)")]
        if ids[: len(first)] != first:
            ids = [*first, *ids]
        if eos:
            ids = [*ids, _required(self.eos_id, "end-of-sequence (eos_token)")]
        return ids

    def ids_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids without added BOS or EOS, and each token's range of characters [start, end) in the text."""
        encoding = self._encode(text)
        return encoding.ids, encoding.offsets

    def _normalised_size(self, text: str) -> int:
        """Return a bound on the text's normalised length, measured part by part where the bound of the steps is too high."""
        bound, growth, size = _grown(len(text), self._steps), _grown(1, self._steps), 0
        if bound <= MOST_TEXT or growth > MOST_TEXT or self.processor.normalizer is None:
            return bound
        part = MOST_TEXT // growth
        for start in range(0, len(text), part):
            size += len(self.processor.normalizer.normalize_str(text[start : start + part]))
            if size > MOST_TEXT:
                return bound
        return size

    def _require_bounded(self, text: str) -> None:
        if (size := self._normalised_size(text)) > MOST_TEXT:
            grown = "" if size == len(text) else f", which tokenizer.json may replace by {size:,}"
            raise UserError(f"a text has {len(text):,} characters{grown}: at most {MOST_TEXT:,} are tokenised. Split it")
        if size * self._longest_piece > MOST_LOOKS:
            most = MOST_LOOKS // self._longest_piece
            raise UserError(
                f"a text has {size:,} characters: with pieces of {self._longest_piece:,} in tokenizer.json at most {most:,} are tokenised. "
                "Split it"
            )

    def _encode(self, text: str) -> tokenizers.Encoding:
        try:
            with _no_panics("tokenizer.json"):
                self._require_bounded(text)
                return self.processor.encode(text, add_special_tokens=False)
        except TypeError:  # the library takes UTF-8 only
            raise UserError(f"the text {text[:60]!r} holds half of a character, which UTF-8 cannot write: leave it out") from None

    def encode(
        self,
        string: str,
        device: torch.device | str | None = None,
        bos: bool | None = None,
        eos: bool = False,
        max_length: int = -1,
    ) -> torch.Tensor:
        """Return `ids` as a tensor (T,), int64, cut to `max_length` tokens if that is positive."""
        import torch

        ids = self.ids(string, bos=bos, eos=eos)
        return torch.tensor(ids[:max_length] if max_length > 0 else ids, dtype=torch.long, device=device)

    def decode(self, ids: torch.Tensor | Iterable[int] | int, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids, by default without special tokens."""
        values = [ids] if isinstance(ids, int) else ids.tolist() if hasattr(ids, "tolist") else list(ids)
        values = [values] if isinstance(values, int) else values
        with _no_panics("tokenizer.json"):
            text = self.processor.decode(values, skip_special_tokens=skip_special_tokens)
        for spaced in CLEANED if self.cleans_up else ():
            text = text.replace(spaced, spaced.strip())
        return text

    def decode_stream(self, ids: Iterable[Any], device: Any = None, skip_special_tokens: bool = True) -> Iterator[str]:
        """Yield pieces of text as ids (ints, or tensors of them) arrive; the joined pieces are `decode` of all ids.

        `device` is accepted for LitGPT's callers; it has no effect.
        """
        decoder = StreamDecoder(self, skip_special_tokens)
        for item in ids:
            if piece := decoder.push([item] if isinstance(item, int) else item.reshape(-1).tolist()):
                yield piece
        if rest := decoder.rest():
            yield rest


class StreamDecoder:
    """Text from ids that arrive one by one.

    A piece that ends within a UTF-8 character is held back. The ids of the last piece stay as context, so that SentencePiece's blank before
    a word is not dropped as the start of a text. With a tokenizer that removes spaces from its texts all ids stay, and the last
    characters are held back.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.skip = tokenizer, skip_special_tokens
        self.context: list[int] = []
        self.pending: list[int] = []
        self.shown = 0  # characters of the pending ids

    def push(self, ids: list[int]) -> str:
        """Return the text that is new and complete with these ids; "" if none is."""
        self.pending += ids
        piece = self.rest()
        if self.tokenizer.cleans_up:
            self.shown += len(piece[:-HELD])
            return piece[:-HELD]
        if not piece or piece.endswith("\ufffd"):
            return ""
        self.context, self.pending = self.pending, []
        return piece

    def rest(self) -> str:
        """Return what is held back."""
        before, text = (self.tokenizer.decode(ids, self.skip) for ids in (self.context, self.context + self.pending))
        return text[len(before) + self.shown :]


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    import tokenizers

    file = folder / "tokenizer.json"
    if not file.exists():
        if (folder / "tokenizer.model").is_file():
            raise UserError(
                f"{folder} has only tokenizer.model, but tokenizer.json is needed: copy it from the model's Hugging Face page, "
                "or write it with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        raise UserError(f"{file} is missing: a checkpoint folder holds it")
    added = sum(len(match[1]) for match in CONTENT.finditer(read_bytes(file, most=MOST_FILE)))
    if added > MOST_ADDED:
        raise UserError(
            f"{file}: its added tokens and replacements have {added:,} bytes, at most {MOST_ADDED:,} are read: it is broken, copy it again"
        )
    with _no_panics(str(file)):
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            reason = str(error)[:300]
            raise UserError(f"{file} is not a readable tokenizer: {reason}. Copy it again from where the model came from") from None
    backend.no_truncation()
    return backend


def _longest_piece(backend: tokenizers.Tokenizer, file: Path) -> int:
    """Return the longest piece's characters of a Unigram model, 0 for others. Raises UserError for a WordPiece model with endless words."""
    kind = type(backend.model).__name__
    if kind == "WordPiece" and (longest := backend.model.max_input_chars_per_word) > LONGEST_WORD:
        raise UserError(f"{file}: max_input_chars_per_word is {longest:,}, at most {LONGEST_WORD:,} are supported: correct it")
    return max(map(len, backend.get_vocab(with_added_tokens=False)), default=0) if kind == "Unigram" else 0


def _parts(part: Any) -> list[dict[str, Any]]:
    """Return the settings of each step of a part of tokenizer.json."""
    left, steps = [] if part is None else [json.loads(part.__getstate__())], []
    while left:
        steps.append(step := left.pop())
        left += [inner for key in ("normalizers", "pretokenizers", "processors", "decoders") for inner in step.get(key) or ()]
    return steps


def _growths(part: Any) -> list[tuple[int, int]]:
    """Return (factor, summand) of each step of a normalizer, pre-tokenizer or decoder that may lengthen a text."""
    steps = []
    for step in _parts(part):
        content = len(step.get("content") or "") if step["type"] == "Replace" else 0
        pattern = len((step.get("pattern") or {}).get("String") or "") if content else 0
        # a regular expression may match single characters, and the empty text between them
        factor = -(-content // pattern) if pattern else content + 1 if content else GROWTH.get(step["type"], 1)
        if step["type"] == "Precompiled":  # SentencePiece's: the length of a trie, the trie, and what characters are replaced by
            charsmap = base64.b64decode(step["precompiled_charsmap"] or "")
            factor = max(map(len, charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")))
        steps.append((factor, len(step.get("prepend") or "")))
    return [step for step in steps if step != (1, 0)]


def _grown(length: int, steps: list[tuple[int, int]]) -> int:
    """Return the largest length of a text after these steps, in any order."""
    length += sum(summand for _, summand in steps)
    for factor, _ in steps:
        length *= max(factor, 1)
    return length


@contextmanager
def _no_panics(file: str) -> Iterator[None]:
    """Turn a panic of the Rust library, which is not an Exception, into a UserError: for example a pattern that backtracks too much."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{file}: the tokenizer fails on a text: {str(error)[:200]}. Copy it again from where the model came from"
        ) from None


def _merged(config: dict[str, Any], named: dict[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json with special_tokens_map.json over it, as transformers does if no `added_tokens_decoder` is there.

    Extra tokens are joined; the older key counts alone. A model's own tokens in tokenizer_config.json take precedence.
    """
    extra, older = EXTRA_TOKENS
    if older in config and not config.get(extra):
        config[extra] = config.pop(older)
    own = {name: config.pop(name) for name in list(config) if _is_own(name) and isinstance(config[name], str)}
    if isinstance(config.get(extra), dict):
        own |= config.pop(extra)
    if own:
        config[OWN_TOKENS] = own
    if "added_tokens_decoder" not in config:
        objects = {name: value for name, value in named.items() if isinstance(value, dict) and name != extra}
        named = named | {name: {**value, "__type": "AddedToken", "special": True} for name, value in objects.items()}
        if isinstance(config.get(extra), list) and isinstance(named.get(extra), list):
            named[extra] = config[extra] + named[extra]
        config |= named
        if isinstance(config.get(extra), dict):
            config[OWN_TOKENS] = _mapping(config.get(OWN_TOKENS)) | config.pop(extra)
    return config if older not in config or extra in config else config | {extra: config[older]}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_own(name: str) -> bool:
    """Return True for the name of a special token that is a model's own."""
    return name.endswith("_token") and name not in (*STANDARD_TOKENS, "add_bos_token", "add_eos_token")


def _named_tokens(config: dict[str, Any]) -> dict[str, Any]:
    """Return the special tokens that have a name, such as bos_token, by their names: texts or objects."""
    marked = {name: value for name, value in config.items() if _is_own(name) and (isinstance(value, str) or _is_marked(value))}
    named = {name: config.get(name) for name in STANDARD_TOKENS} | _mapping(config.get(EXTRA_TOKENS[0])) | marked
    named |= _mapping(config.get(OWN_TOKENS))
    return {name: value for name, value in named.items() if _token_text(value) is not None}


def _is_marked(entry: Any) -> bool:
    """Return True for an object that declares itself an added token."""
    return isinstance(entry, dict) and entry.get("__type") == "AddedToken"


def _added_token(entry: dict[str, Any]) -> tokenizers.AddedToken:
    """Return a token with the flags of its object."""
    from tokenizers import AddedToken

    return AddedToken(entry["content"], **{key: entry[key] is True for key in FLAGS if key in entry})


def _token_text(entry: Any) -> str | None:
    """Return the text of a token in tokenizer_config.json: a string, or an object with the string under `content`."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _listed_tokens(listed: Any, folder: Path) -> dict[int, tokenizers.AddedToken]:
    """Return the tokens in `added_tokens_decoder`, or of added_tokens.json, by their ids."""
    try:
        if all(isinstance(entry["content"], str) and entry["content"] for entry in listed.values()):
            return {int(number): _added_token(entry) for number, entry in listed.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise UserError(f"{folder}: added_tokens_decoder of tokenizer_config.json, or added_tokens.json, lists no tokens by id: copy it again")


def template_files(folder: str | Path) -> list[str]:
    """Return the files in a checkpoint folder that hold a chat template each."""
    more = sorted(file.name for file in (Path(folder) / TEMPLATES).glob("*.jinja"))
    return ["chat_template.jinja", *(f"{TEMPLATES}/{name}" for name in more)]


def _chat_templates(entry: Any, folder: Path) -> dict[str, str]:
    """Return the templates by name: those of files if there are any, else of tokenizer_config.json: a text, a list or a mapping."""
    contents = {name: raw for name in template_files(folder) if (raw := read_own(folder, name)) is not None}
    if contents:
        names = {name: "default" if name == "chat_template.jinja" else Path(name).stem for name in contents}
        return {names[name]: decode_text(raw, folder / name) for name, raw in contents.items()}
    if isinstance(entry, list):
        entry = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
    templates = entry if isinstance(entry, dict) else {} if entry is None else {"default": entry}
    for name in ("default", "tool_use"):
        if not isinstance(templates.get(name, ""), str):
            raise UserError(f"{folder / 'tokenizer_config.json'}: chat_template is {str(templates[name])[:60]!r}, a text is needed")
    return templates


def _required(token_id: int | None, what: str) -> int:
    if token_id is None:
        raise UserError(
            f"the checkpoint's tokenizer has no {what} token: neither tokenizer_config.json nor generation_config.json names one"
        )
    return token_id
