"""The ways of cutting text, by the published patterns."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer as Backend

from litgpt.convert.gguf.pretokenizers import pre_tokenizer
from litgpt.families import PRETOKENIZERS
from tests.helpers import gguf_files


@pytest.mark.parametrize("name", PRETOKENIZERS)
def test_every_cut_splits_all_of_a_text(name: str) -> None:
    backend = Backend.from_str(
        json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": pre_tokenizer(PRETOKENIZERS[name])})
    )
    for text in gguf_files.TEXTS:
        pieces = backend.pre_tokenizer.pre_tokenize_str(text)
        assert backend.decoder is None and sum(end - start for _, (start, end) in pieces) >= len(text)


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-4o", "HelloWorld's 12345", ["Hello", "World's", "Ġ", "123", "45"]),
        ("tekken", "HelloWorld's 12", ["Hello", "World", "'s", "Ġ", "1", "2"]),
        ("qwen2", "I'LL 12", ["I", "'LL", "Ġ", "1", "2"]),
        ("gpt-2", "I'LL 12", ["I", "'", "LL", "Ġ12"]),
    ],
)
def test_published_patterns(name: str, text: str, pieces: list[str]) -> None:
    backend = Backend.from_str(
        json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": pre_tokenizer(PRETOKENIZERS[name])})
    )
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces
