"""Text to token ids and back, with what a checkpoint folder says about BOS, EOS and the chat template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt.errors import UserError
from litgpt.files import read_json, read_text

if TYPE_CHECKING:
    import tokenizers
    import torch


class Tokenizer:
    """The tokenizer of a checkpoint folder: `tokenizer.json`, with `tokenizer_config.json` and `generation_config.json` if present.

    Raises UserError, naming the file, for a folder without `tokenizer.json` and for unreadable files.
    """

    def __init__(self, checkpoint_dir: str | Path) -> None:
        folder = Path(checkpoint_dir)
        self._backend = _load_backend(folder)
        self._config = _load_json(folder / "tokenizer_config.json")
        self.special_tokens: dict[str, str] = {
            name: text for name in ("bos_token", "eos_token", "pad_token", "unk_token") if (text := _token_text(self._config.get(name)))
        }
        generation = folder / "generation_config.json"
        bos_ids, eos_ids = (self._ids_in(generation, key) for key in ("bos_token_id", "eos_token_id"))
        self.bos_id = self._special_id("bos_token", bos_ids, folder)
        self.eos_id = self._special_id("eos_token", eos_ids, folder)
        self.stop_ids: set[int] = set(eos_ids) | ({self.eos_id} if self.eos_id is not None else set())
        """Every id that ends a generated answer."""
        said = self._config.get("add_bos_token")
        self.use_bos: bool = self.bos_id is not None and (said if isinstance(said, bool) else self._adds_bos())
        """Whether a text starts with BOS unless asked otherwise."""
        self.chat_template = _chat_template(self._config.get("chat_template"), folder / "chat_template.jinja")

    def _adds_bos(self) -> bool:
        with _panics_told("tokenizer.json"):
            return self.bos_id in self._backend.encode("a").ids

    def _ids_in(self, file: Path, key: str) -> list[int]:
        """The ids under `key` of generation_config.json: a number or a list of numbers. Some models write -1 for none."""
        entry = _load_json(file).get(key)
        values = [value for value in (entry if isinstance(entry, list) else [entry]) if value not in (None, -1)]
        for value in values:
            number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32
            if not number or self._backend.id_to_token(value) is None:
                raise UserError(f"{file}: {key} is {str(value)[:60]!r}, which is no id of tokenizer.json: correct it")
        return values

    def _special_id(self, name: str, fallback: list[int], folder: Path) -> int | None:
        """The id of a special token: tokenizer_config.json names its text, else generation_config.json its id."""
        given = self._config.get(name)
        named = _token_text(given)
        if given is not None and named is None:
            raise UserError(f"{folder / 'tokenizer_config.json'}: {name} is {str(given)[:60]!r}, a text is needed")
        found = None if named is None else self.token_to_id(named)
        if found is None and fallback:
            found = fallback[0]
        needed = name == "eos_token" or self._config.get("add_bos_token") is True
        if found is None and named is not None and needed:
            raise UserError(f"{folder / 'tokenizer_config.json'}: {name} is {named[:60]!r}, which tokenizer.json does not have: correct it")
        text = self._backend.id_to_token(found) if found is not None else None
        if text is not None:
            self.special_tokens.setdefault(name, text)
        return found

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its text in the vocabulary; None if there is none."""
        return self._backend.token_to_id(token)

    def ids(self, text: str, bos: bool | None = None, eos: bool = False) -> list[int]:
        """Token ids. Special tokens written in the text count as such.

        `bos` None: as the checkpoint says. BOS is not added to a text that starts with it. Raises UserError if BOS or EOS is asked for
        and the checkpoint has none.
        """
        ids = self._encode(text).ids
        if self.use_bos if bos is None else bos:
            first = _known(self.bos_id, "beginning-of-sequence (bos_token)")
            if ids[:1] != [first]:
                ids = [first, *ids]
        if eos:
            ids = [*ids, _known(self.eos_id, "end-of-sequence (eos_token)")]
        return ids

    def ids_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids without BOS or EOS added, and for each the characters [start, end) of the text that it stands for."""
        encoding = self._encode(text)
        return encoding.ids, encoding.offsets

    def _encode(self, text: str) -> tokenizers.Encoding:
        try:
            with _panics_told("tokenizer.json"):
                return self._backend.encode(text, add_special_tokens=False)
        except TypeError:  # the library takes what UTF-8 can write
            raise UserError(f"the text {text[:60]!r} holds half of a character, which UTF-8 cannot write: leave it out") from None

    def encode(
        self,
        string: str,
        device: torch.device | str | None = None,
        bos: bool | None = None,
        eos: bool = False,
        max_length: int = -1,
    ) -> torch.Tensor:
        """`ids` as a tensor (T,), int64, cut to `max_length` tokens if that is positive."""
        import torch

        ids = self.ids(string, bos=bos, eos=eos)
        return torch.tensor(ids[:max_length] if max_length > 0 else ids, dtype=torch.long, device=device)

    def decode(self, ids: torch.Tensor | Iterable[int] | int, skip_special_tokens: bool = True) -> str:
        """The text of token ids; special tokens are left out unless asked for."""
        values = [ids] if isinstance(ids, int) else ids.tolist() if hasattr(ids, "tolist") else list(ids)
        values = [values] if isinstance(values, int) else values
        with _panics_told("tokenizer.json"):
            return self._backend.decode(values, skip_special_tokens=skip_special_tokens)

    def decode_stream(self, ids: Iterable[Any], skip_special_tokens: bool = True) -> Iterator[str]:
        """Text piece by piece as ids (ints, or tensors of them) arrive; the pieces joined are `decode` of all of them.

        A piece is what the text grew by since the last one. It is held back while it ends within a UTF-8 character. The ids of
        the last piece stay as context, so that a SentencePiece blank at the start of a word is not taken for the start of a text.
        """
        context: list[int] = []
        pending: list[int] = []
        before = ""  # decode(context)
        for item in ids:
            pending.extend([item] if isinstance(item, int) else item.reshape(-1).tolist())
            text = self.decode(context + pending, skip_special_tokens)
            if len(text) > len(before) and not text.endswith("\ufffd"):
                yield text[len(before) :]
                context, pending = pending, []
                before = self.decode(context, skip_special_tokens)
        rest = self.decode(context + pending, skip_special_tokens)[len(before) :]
        if rest:
            yield rest


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    import tokenizers

    file = folder / "tokenizer.json"
    if not file.exists():
        if (folder / "tokenizer.model").is_file():
            raise UserError(
                f"{folder} has only tokenizer.model, and tokenizer.json is needed: copy it from the model's Hugging Face page, "
                "or write it with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        raise UserError(f"{file} is missing: a checkpoint folder holds it")
    try:
        with _panics_told(str(file)):
            backend = tokenizers.Tokenizer.from_file(str(file))
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{file} is not a readable tokenizer: {str(error)[:300]}. Copy it again from where the model came from") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


@contextmanager
def _panics_told(file: str) -> Iterator[None]:
    """A panic of the Rust library, which is no Exception, as a UserError: for one, a pattern that tries too many ways to match."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"{file}: the tokenizer fails on a text: {str(error)[:200]}. Copy it again from where the model came from"
        ) from None


def _load_json(file: Path) -> dict[str, Any]:
    """The content of a JSON object file; empty if there is no file."""
    return read_json(file) if file.exists() else {}


def _token_text(entry: Any) -> str | None:
    """A token in tokenizer_config.json is a string, or an object with the string under `content`."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def _chat_template(entry: Any, file: Path) -> str | None:
    """The template in tokenizer_config.json: a string, or the one named `default` in a list; else the file's."""
    if isinstance(entry, list):
        named = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
        entry = named.get("default")
    if isinstance(entry, str):
        return entry
    if entry is not None:
        raise UserError(f"{file.with_name('tokenizer_config.json')}: chat_template is {str(entry)[:60]!r}, a text is needed")
    return read_text(file) if file.exists() else None


def _known(token_id: int | None, what: str) -> int:
    if token_id is None:
        raise UserError(
            f"the checkpoint's tokenizer has no {what} token: neither tokenizer_config.json nor generation_config.json names one"
        )
    return token_id
