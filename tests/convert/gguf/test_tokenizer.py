"""Tokenizers out of GGUF files: the ids are those of SentencePiece itself, of transformers and of `tokenizers`."""

from __future__ import annotations

import base64
import itertools
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from hypothesis import given, settings, strategies as st
from transformers import PreTrainedTokenizerFast

from litgpt import families as catalog
from litgpt.config import Config
from litgpt.convert.gguf.reader import Reader
from litgpt.convert.gguf.tokenizer import write_tokenizer
from litgpt.convert.to_litgpt import convert_to_litgpt
from litgpt.errors import UserError
from litgpt.tokenizer import Tokenizer
from tests.helpers import gguf_files
from tests.helpers.gguf_files import AddMetadata

PLAIN_TEXTS = [
    "Hello world, the year 2024 isn't",
    "def f(x: int) -> str:\n    return f'{x:>10}'\t# 100 %\n\n\n",
    "  leading and trailing  ",
    "naïve café, Ελληνικά, 日本語, العربية, 👩‍👩‍👧‍👦 🎉, \u00a0 \u200b",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
]


@pytest.mark.slow
@pytest.mark.parametrize("text", PLAIN_TEXTS)
def test_smollm2_tokenizer(smollm2_dir: Path, text: str) -> None:
    tokenizer = Tokenizer(smollm2_dir)
    ids = tokenizer.ids(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert 0 not in ids or "<|endoftext|>" in text, "no blank may become <|endoftext|>"
    assert PreTrainedTokenizerFast(tokenizer_file=str(smollm2_dir / "tokenizer.json")).encode(text) == ids
    assert transformers.AutoTokenizer.from_pretrained(smollm2_dir).encode(text) == ids


@pytest.mark.slow
def test_smollm2_files(smollm2_dir: Path) -> None:
    tokenizer = Tokenizer(smollm2_dir)
    assert tokenizer.ids(PLAIN_TEXTS[0]) == [19556, 905, 28, 260, 713, 216, 34, 32, 34, 36, 3247, 982]
    # digits are cut off first, so the two blanks before one stay together
    assert tokenizer.ids("a  2") == [tokenizer.token_to_id(token) for token in ("a", "ĠĠ", "2")]
    assert tokenizer.special_tokens | {"n": "49152"} == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "n": str(tokenizer.vocab_size),
    }
    assert "add_generation_prompt" in (tokenizer.chat_template or "")
    reference = transformers.AutoTokenizer.from_pretrained(smollm2_dir)
    assert (reference.bos_token, reference.eos_token, reference.model_max_length) == ("<|im_start|>", "<|im_end|>", 8192)
    assert Config.from_checkpoint(smollm2_dir) == Config(**(catalog.find("SmolLM2-135M-Instruct") or {}))


@pytest.mark.parametrize(
    ("pre", "digits", "bos"),
    [("smollm", [1] * 7, False), ("gpt-2", [7], False), ("default", [7], False), ("llama-bpe", [3, 3, 1], True), ("tekken", [1] * 7, True)],
)
def test_pre_tokenizers(tmp_path: Path, byte_level: AddMetadata, pre: str, digits: list[int], bos: bool) -> None:
    """How digits are cut, by the published patterns; whether BOS is added where the file does not say."""
    path = gguf_files.write_tiny(tmp_path, byte_level, lambda writer: writer.add_tokenizer_pre(pre))
    convert_to_litgpt(path, tmp_path / "lit")
    tokenizer = Tokenizer(tmp_path / "lit")
    assert tokenizer.use_bos is bos
    cut = tokenizer.processor.pre_tokenizer.pre_tokenize_str("1234567")
    assert [len(piece) for piece, _ in cut] == digits
    for text in ("I'll go  there\n\n now", "日本 ∑x"):
        assert tokenizer.decode(tokenizer.ids(text)) == text


def test_unknown_pre_tokenizers_are_named(tmp_path: Path, byte_level: AddMetadata) -> None:
    path = gguf_files.write_tiny(tmp_path, byte_level, lambda writer: writer.add_tokenizer_pre("odd"))
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre is 'odd'; supported are codeshell, .*gpt-2, .*llama-bpe.*smollm"):
        convert_to_litgpt(path, tmp_path / "lit")


@pytest.mark.parametrize("add_bos", [False, True])
def test_byte_level_bos_types_and_user_tokens(tmp_path: Path, byte_level: AddMetadata, add_bos: bool) -> None:
    def tokens(writer: gguf.GGUFWriter) -> None:
        byte_level(writer)
        entries = writer.kv_data[0]
        entries["tokenizer.ggml.token_type"].value[300] = 4
        entries["tokenizer.ggml.tokens"].value[300] = "[A B]"
        entries["tokenizer.ggml.merges"].value[:] = entries["tokenizer.ggml.merges"].value[:30]
        writer.add_add_bos_token(add_bos)
        writer.add_eot_token_id(0)

    convert_to_litgpt(gguf_files.write_tiny(tmp_path, tokens, lambda writer: None), tmp_path / "lit")
    tokenizer = Tokenizer(tmp_path / "lit")
    assert tokenizer.stop_ids == {0, 2}
    ids = tokenizer.ids("x[A B]<|im_end|>")
    assert ids[-2:] == [300, 2] and ids[0] == (0 if add_bos else tokenizer.token_to_id("x"))
    assert tokenizer.decode(ids) == "x[A B]"
    assert PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "lit" / "tokenizer.json")).encode("x[A B]<|im_end|>") == ids
    assert tokenizer.use_bos is add_bos


PIECES = "the cat sat on a mat; then at hat that ate tea, eat".replace(";", "").replace(",", "").split()


def sentencepiece_vocabulary() -> list[tuple[str, float, int]]:
    """Piece, score and type, laid out as Llama 2's: special pieces, bytes, pieces by falling score, single characters last."""
    pieces = {piece[:i] for word in PIECES for piece in (f"▁{word}", word) for i in range(2, len(piece) + 1)} | {"▁▁", "▁▁▁▁"}
    order = sorted(pieces, key=lambda piece: (len(piece), piece))
    random.Random(4).shuffle(order)
    letters = sorted(set("".join(PIECES) + "▁"))
    vocabulary = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256))]
    vocabulary += [(piece, -float(i), 1) for i, piece in enumerate(order + letters)]
    return vocabulary


def reference_pieces(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE: join the neighbours whose union is the piece with the best score, the leftmost first, until there are none."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in scores]
        if not joins:
            return symbols
        _, i = min(joins)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def add_sentencepiece(writer: gguf.GGUFWriter) -> None:
    pieces, scores, types = zip(*sentencepiece_vocabulary(), strict=True)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    model = gguf_files.llama(vocab_size=len(sentencepiece_vocabulary()) + 7)
    convert_to_litgpt(gguf_files.write(folder / "tiny.gguf", model, add_sentencepiece), folder / "lit")
    gguf_files.assert_same_logits(model, folder / "lit")
    return folder / "lit"


@settings(max_examples=200)
@given(st.lists(st.sampled_from([*PIECES, "thatsat", "eate", "", "tttt"]), min_size=1, max_size=8).map(" ".join).filter(bool))
def test_sentencepiece_merges_by_score(sentencepiece_dir: Path, text: str) -> None:
    tokenizer = Tokenizer(sentencepiece_dir)
    vocabulary = sentencepiece_vocabulary()
    ids = {piece: i for i, (piece, _, _) in enumerate(vocabulary)}
    expected = [ids[piece] for piece in reference_pieces(text, {piece: score for piece, score, kind in vocabulary if kind == 1})]
    assert tokenizer.ids(text) == [1, *expected]
    assert tokenizer.decode(expected) == text


def test_sentencepiece_bytes_special_tokens_and_bos(sentencepiece_dir: Path) -> None:
    tokenizer = Tokenizer(sentencepiece_dir)
    assert tokenizer.use_bos and tokenizer.bos_id == 1 and tokenizer.stop_ids == {2}
    text = "the ∑ 日本 🎉\n"
    ids = tokenizer.ids(text, bos=False)
    assert 0 not in ids and [3 + byte for byte in "∑".encode()] == [i for i in ids if i in range(3, 259)][:3]
    assert tokenizer.decode(ids) == text == "".join(tokenizer.decode_stream(ids))
    assert tokenizer.ids("<s>the</s>") == [1, *tokenizer.ids("the", bos=False), 2]
    reference = PreTrainedTokenizerFast(tokenizer_file=str(sentencepiece_dir / "tokenizer.json"))
    assert reference.encode(text) == [1, *ids]
    assert tokenizer.vocab_size == len(sentencepiece_vocabulary())


def sentencepiece_metadata(name: str, as_blanks: bool) -> dict[str, Any]:
    model = gguf_files.GOLDEN["models"][name]
    pieces = [
        piece.replace("▁", " ") if kind == 4 and as_blanks else piece for piece, kind in zip(model["pieces"], model["types"], strict=True)
    ]
    values = {"tokens": pieces, "scores": model["scores"], "token_type": model["types"], "add_space_prefix": name == "llama"}
    values |= {"bos_token_id": model["bos"], "eos_token_id": model["eos"], "unknown_token_id": model["unk"], "model": "llama"}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.mark.parametrize(("name", "as_blanks"), [("llama", False), ("gemma", True), ("gemma", False)])
def test_sentencepieces_own_ids(tmp_path: Path, name: str, as_blanks: bool) -> None:
    """Read from a file, and read again from a file made of that: the ids are SentencePiece's, and the texts come back."""
    (tmp_path / "a").mkdir()
    path = gguf_files.write_metadata(tmp_path / "a.gguf", sentencepiece_metadata(name, as_blanks))
    write_tokenizer(Reader(path), Config(), tmp_path / "a")
    values, again = gguf_files.read_back(tmp_path / "a", 530, tmp_path / "b")
    assert values["tokenizer.ggml.tokens"][520:] == [f"[PAD{i}]" for i in range(520, 530)]
    assert values["tokenizer.ggml.token_type"] == [*gguf_files.GOLDEN["models"][name]["types"], *[5] * 10]
    for tokenizer in (Tokenizer(tmp_path / "a"), again):
        assert tokenizer.vocab_size == 520 and tokenizer.use_bos
        for text, ids in zip(gguf_files.GOLDEN["texts"], gguf_files.GOLDEN["models"][name]["ids"], strict=True):
            assert tokenizer.ids(text, bos=False) == ids, text
            assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("name", ["unigram", "unigram rules"])
def test_unigram_ids_are_sentencepieces(tmp_path: Path, name: str) -> None:
    """Of a model with bytes for unknown characters, and of one with a table of characters and without extra blanks."""
    model = gguf_files.GOLDEN["models"][name]
    values: dict[str, Any] = {"model": "t5", "tokens": model["pieces"], "scores": model["scores"], "token_type": model["types"]}
    values |= {"eos_token_id": model["eos"], "unknown_token_id": model["unk"], "add_space_prefix": True}
    values["remove_extra_whitespaces"] = "charsmap" in model
    if "charsmap" in model:
        values["precompiled_charsmap"] = list(base64.b64decode(model["charsmap"]))
    path = gguf_files.write_metadata(tmp_path / "a.gguf", {f"tokenizer.ggml.{key}": value for key, value in values.items()})
    write_tokenizer(Reader(path), Config(), tmp_path)
    tokenizer = Tokenizer(tmp_path)
    for text, ids in zip(gguf_files.GOLDEN["texts"], model["ids"], strict=True):
        assert tokenizer.ids(text, bos=False) == ids, text
        if name == "unigram":
            assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert not tokenizer.use_bos and tokenizer.stop_ids == {model["eos"]}


def test_a_unigram_file_must_name_its_unknown_token(tmp_path: Path) -> None:
    values = {"tokenizer.ggml.model": "t5", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.scores": [0.0]}
    path = gguf_files.write_metadata(tmp_path / "a.gguf", values)
    with pytest.raises(UserError, match="has no tokenizer.ggml.unknown_token_id, which a unigram tokenizer needs"):
        write_tokenizer(Reader(path), Config(), tmp_path)


def test_phi_3_takes_the_blanks_behind_its_control_tokens(tmp_path: Path) -> None:
    """As its tokenizer.json on the hub says: rstrip."""
    values = sentencepiece_metadata("gemma", True)
    values["tokenizer.ggml.token_type"] = [
        3 if piece == "<|user|>" else kind
        for piece, kind in zip(*(values[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type")), strict=True)
    ]
    for architecture, expected in (("phi3", "<|user|>the"), ("llama", "<|user|>\n the")):
        (tmp_path / architecture).mkdir()
        path = gguf_files.write_metadata(tmp_path / "a.gguf", values, architecture)
        write_tokenizer(Reader(path), Config(), tmp_path / architecture)
        tokenizer = Tokenizer(tmp_path / architecture)
        assert tokenizer.decode(tokenizer.ids("<|user|>\n the", bos=False), skip_special_tokens=False) == expected
