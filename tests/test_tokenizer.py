from __future__ import annotations

import base64
import json
import struct
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, strategies as st
from tokenizers import AddedToken, Tokenizer as Backend, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from litgpt import checkpoint
from litgpt.data.base import Encoder
from litgpt.errors import UserError
from litgpt.prompts import ChatTemplate, PromptStyle
from litgpt.tokenizer import GROWTH, Tokenizer
from tests.helpers.tiny import put_bos_first

WriteTokenizer = Callable[[Path], Path]
TEXTS = ["Hello world, the year 2024 isn't", "  two  blanks\n\n\ttab", "naïve 日本語 👩‍👩‍👧 ∑", "<|im_start|>user\nhi<|im_end|>\n", ""]


def rewrite(folder: Path, name: str, **changes: object) -> Path:
    content = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def sentencepiece_dir(folder: Path, post_processor: bool = True) -> Path:
    """A Llama-like tokenizer: blanks as U+2581, bytes as fall-back, BOS added by the post-processor."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"helowrd",
        "▁h",
        "el",
        "▁w",
        "or",
        "ld",
        "lo",
        "▁hel",
        "▁hello",
    ]
    merges = [("▁", "h"), ("▁", "w"), ("e", "l"), ("l", "o"), ("o", "r"), ("l", "d"), ("▁h", "el"), ("▁hel", "lo")]
    tokenizer = Backend(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)],
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 1)])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}))
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_those_of_transformers(tiny_tokenizer_dir: Path, text: str) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_file=str(tiny_tokenizer_dir / "tokenizer.json"))
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    assert tokenizer.ids(text) == reference.encode(text)
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.decode(tokenizer.ids(text), skip_special_tokens=False) == text
    assert tokenizer.decode(torch.tensor(tokenizer.ids(text))) == reference.decode(reference.encode(text), skip_special_tokens=True)


def test_special_tokens_in_the_text_are_one_id_and_left_out_of_the_answer(tiny_tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    ids = tokenizer.ids("<|im_start|>user<|im_end|>")
    assert ids[0] == 1 and ids[-1] == 2
    assert tokenizer.decode(ids) == "user"
    assert tokenizer.token_to_id("<|im_end|>") == 2 and tokenizer.token_to_id("no such token") is None


def test_bos_and_eos_follow_the_files(tmp_path: Path, write_tiny_tokenizer: WriteTokenizer) -> None:
    folder = write_tiny_tokenizer(tmp_path / "t")
    plain = Tokenizer(folder)
    assert (plain.bos_id, plain.eos_id, plain.use_bos, plain.stop_ids) == (0, 2, False, {2})
    assert plain.ids("a", bos=True, eos=True) == [0, *plain.ids("a"), 2]

    adding = Tokenizer(put_bos_first(write_tiny_tokenizer(tmp_path / "b")))
    assert adding.use_bos and adding.ids("a") == [0, *plain.ids("a")]
    assert adding.ids("a", bos=False) == plain.ids("a")
    assert adding.ids("<|endoftext|>a") == [0, *plain.ids("a")], "BOS must not be doubled"

    rewrite(folder, "tokenizer_config.json", bos_token=None, eos_token=None)
    rewrite(folder, "generation_config.json", bos_token_id=1, eos_token_id=[2, 0])
    from_generation = Tokenizer(folder)
    assert (from_generation.bos_id, from_generation.eos_id, from_generation.stop_ids, from_generation.use_bos) == (1, 2, {0, 2}, False)
    assert not {"bos_token", "eos_token"} & set(from_generation.special_tokens)  # templates get what transformers gives them


def test_without_any_bos_asking_for_it_is_an_error(tmp_path: Path, write_tiny_tokenizer: WriteTokenizer) -> None:
    folder = write_tiny_tokenizer(tmp_path)
    rewrite(folder, "tokenizer_config.json", bos_token=None, add_bos_token=True)
    (folder / "generation_config.json").unlink()
    tokenizer = Tokenizer(folder)
    assert not tokenizer.use_bos and tokenizer.bos_id is None
    with pytest.raises(UserError, match="bos_token"):
        tokenizer.ids("a", bos=True)


@pytest.mark.parametrize("post_processor", [True, False])
@pytest.mark.parametrize("setting", [None, True, False])
def test_bos_as_in_transformers(tmp_path: Path, post_processor: bool, setting: bool | None) -> None:
    """`add_bos_token` beside a tokenizer.json is not read."""
    folder = rewrite(sentencepiece_dir(tmp_path, post_processor), "tokenizer_config.json", add_bos_token=setting, bos_token="<s>")
    tokenizer, theirs = Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_id == 1 and tokenizer.use_bos is post_processor
    assert tokenizer.ids("hello") == theirs("hello").input_ids
    assert tokenizer.ids("<s>hello").count(1) == 1


def test_two_tokens_before_every_text_as_in_transformers(tmp_path: Path) -> None:
    """GLM's post-processor writes [gMASK]<sop>, neither of which is BOS."""
    folder = rewrite(sentencepiece_dir(tmp_path, post_processor=False), "tokenizer_config.json", bos_token="<s>")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(["[gMASK]", "<sop>"])
    first = [backend.token_to_id(token) for token in ("[gMASK]", "<sop>")]
    template = ["[gMASK]", "<sop>", "$A"]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=list(zip(template, first, strict=False)))
    backend.save(str(folder / "tokenizer.json"))
    tokenizer, theirs = Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.first_ids == first and not tokenizer.use_bos
    assert tokenizer.ids("hello") == theirs("hello").input_ids == tokenizer.ids("[gMASK]<sop>hello")
    assert tokenizer.ids("hello", bos=False) == theirs("hello", add_special_tokens=False).input_ids
    encoder = Encoder(tokenizer, PromptStyle.from_name("default"), mask_prompt=False, last_turn_only=False, max_length=None, source="")
    sample = encoder.encode_all([(1, {"instruction": "a", "output": "b"})])[0][1][0]
    assert list(sample.input_ids[:2]) == first and not any(sample.loss_mask[:2]) and all(sample.loss_mask[2:])


def test_encode_is_a_cut_tensor(tiny_tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    ids = tokenizer.ids("write a response")
    encoded = tokenizer.encode("write a response", eos=True, max_length=len(ids))
    assert encoded.dtype == torch.int64 and encoded.tolist() == ids
    assert tokenizer.encode("write a response", eos=True).tolist() == [*ids, 2]


def test_offsets_cover_the_text_in_order(tiny_tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    text = "<|im_start|>the answer: ∑"
    ids, offsets = tokenizer.ids_with_offsets(text)
    assert ids == tokenizer.ids(text)
    assert offsets[0] == (0, len("<|im_start|>")) and offsets[-1][1] == len(text)
    ascii_pieces = [(i, span) for i, span in zip(ids, offsets, strict=True) if span[1] <= text.index("∑")]
    assert all(tokenizer.decode([i], skip_special_tokens=False) == text[slice(*span)] for i, span in ascii_pieces)


@given(st.text(max_size=60))
def test_stream_of_bytes_joins_to_the_text(tiny_tokenizer_dir: Path, text: str) -> None:
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    ids = tokenizer.ids(text)
    pieces = list(tokenizer.decode_stream(iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.text(alphabet="hello wrd é日🎉", max_size=40))
def test_stream_of_sentencepiece_keeps_the_blanks(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "sentencepiece"
    tokenizer = Tokenizer(folder if folder.is_dir() else sentencepiece_dir(folder))
    assert "".join(tokenizer.decode_stream(torch.tensor(tokenizer.ids(text)))) == tokenizer.decode(tokenizer.ids(text)) == text


def test_a_stream_that_ends_inside_a_character_gives_up_what_it_has(tiny_tokenizer_dir: Path) -> None:
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    ids = tokenizer.ids("a∑")
    assert len(ids) == 4, "one token a byte, or the test tests nothing"
    assert list(tokenizer.decode_stream(ids)) == ["a", "∑"]
    assert "".join(tokenizer.decode_stream(ids[:-1])) == tokenizer.decode(ids[:-1])


def test_chat_template_is_found_wherever_it_is(tmp_path: Path, write_tiny_tokenizer: WriteTokenizer) -> None:
    folder = write_tiny_tokenizer(tmp_path)
    assert (Tokenizer(folder).chat_template or "").startswith("{% for")
    rewrite(folder, "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}])
    assert Tokenizer(folder).chat_template == "d"
    rewrite(folder, "tokenizer_config.json", chat_template=None)
    assert Tokenizer(folder).chat_template is None
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer(folder).chat_template == "file"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, write_tiny_tokenizer: WriteTokenizer) -> None:
    (write_tiny_tokenizer(tmp_path) / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        Tokenizer(tmp_path)


def test_missing_tokenizers_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match="only tokenizer.model"):
        Tokenizer(tmp_path)


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}


@pytest.mark.parametrize(
    ("part", "steps", "message"),
    [
        ("normalizer", [REPLACE] * 6, "a text has 5 characters, which tokenizer.json may replace by 5,000,000: at most 2,097,152"),
        ("normalizer", [{**REPLACE, "pattern": {"Regex": "a"}, "content": "b" * 1_000_000}], "may replace by"),
        ("normalizer", [{"type": "Prepend", "prepend": "b" * 3_000_000}], "may replace by 3,000,0"),
        ("decoder", [REPLACE] * 6, "its decoder makes a text 1,000,000 times as long"),
        ("normalizer", [REPLACE, {**REPLACE, "content": ""}, {"type": "Lowercase"}], None),
        ("normalizer", [], None),
    ],
)
def test_what_multiplies_a_text_is_bounded(
    part: str, steps: list[object], message: str | None, tmp_path: Path, write_tiny_tokenizer: WriteTokenizer
) -> None:
    folder = rewrite(write_tiny_tokenizer(tmp_path), "tokenizer.json", **{part: {"type": "Sequence", f"{part}s": steps}})
    if message is None:
        assert Tokenizer(folder).ids("a b")
        return
    with pytest.raises(UserError, match=message):
        Tokenizer(folder).ids("aaaaa")


def charsmap(replacement: bytes) -> str:
    """SentencePiece's map of "a" to another text: a double-array trie of three units, and the text."""
    units = [0] * 512
    units[0], units[0x100 ^ ord("a")], units[0x101 ^ ord("a")] = 0x100 << 10, ord("a") | 1 << 8 | 1 << 10, 1 << 31
    trie = struct.pack("<512I", *units)
    return base64.b64encode(struct.pack("<I", len(trie)) + trie + replacement + b"\0").decode()


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def beginning(count: int) -> dict[str, object]:
    first = {"SpecialToken": {"id": "X", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"X": {"id": "X", "ids": [1] * count, "tokens": ["<|im_start|>"] * count}},
    }


@pytest.mark.parametrize(
    ("changes", "text", "message"),
    [
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"b" * 30_000)}},
            "a" * 80,
            "may replace by 2,400,000: at",
        ),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap(b"b" * 30_000)}}, "a" * 20 + "c" * 99_000, None),
        ({"normalizer": {"type": "NFKD"}}, "\ufdfa" * 120_000, "may replace by 2,160,000: at most 2,097,152 are tokenised"),
        ({"normalizer": {"type": "NFKD"}}, "\ufdfa" * 1000 + "c" * 200_000, None),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 40}}, "a", "its pre_tokenizer makes a text 1,000,000,000 times"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 2}}, "a", None),
        ({"post_processor": beginning(10**6)}, "a", "its post_processor puts 2,000,000 tokens around a text"),
        ({"post_processor": beginning(3)}, "a", None),
    ],
)
def test_other_steps_that_multiply_a_text(
    changes: dict[str, Any], text: str, message: str | None, tmp_path: Path, write_tiny_tokenizer: WriteTokenizer
) -> None:
    folder = rewrite(write_tiny_tokenizer(tmp_path), "tokenizer.json", **changes)
    if message is None:
        whole = Backend.from_file(str(folder / "tokenizer.json"))
        assert Tokenizer(folder).ids(text) == whole.encode(text).ids
        return
    with pytest.raises(UserError, match=message):
        Tokenizer(folder).ids(text)


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_how_far_normal_forms_lengthen_a_text(form: Any) -> None:
    composed = [letter for letter in map(chr, range(sys.maxunicode)) if unicodedata.decomposition(letter)]
    assert max(len(unicodedata.normalize(form, letter)) for letter in composed) == GROWTH[form]
    assert max(len(letter.lower()) for letter in map(chr, range(0x2FFFF))) == GROWTH["Lowercase"]


def test_long_texts_are_refused(tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(tiny_tokenizer_dir)
    with pytest.raises(UserError, match="a text has 2,097,153 characters: at most 2,097,152 are tokenised. Split it"):
        tokenizer.ids("a" * (2**21 + 1))
    monkeypatch.setattr("litgpt.tokenizer.MOST_TEXT", 3)
    assert tokenizer.ids("abc")
    with pytest.raises(UserError, match="a text has 4 characters"):
        tokenizer.ids_with_offsets("abcd")


def wordpiece(longest: int) -> dict[str, object]:
    vocab = {"[UNK]": 0, "a": 1, "##a": 2}
    return {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": longest,
        "vocab": vocab,
    }


def unigram(longest: int) -> dict[str, object]:
    return {"type": "Unigram", "unk_id": 0, "vocab": [["a" * n, -1.0] for n in range(1, longest + 1)]}


@pytest.mark.parametrize(
    ("changes", "text", "message"),
    [
        ({"model": wordpiece(10**9)}, "a", "max_input_chars_per_word is 1,000,000,000, at most 1,000 are supported"),
        ({"model": unigram(2000)}, "a" * 70_000, "a text has 70,000 characters: with pieces of 2,000 in tokenizer.json at most 67,108 are"),
        ({"model": unigram(20)}, "a" * 70_000, None),
        (
            {"added_tokens": [{"id": 320, "content": "x" * 2**22 + "\\n"}]},
            "a",
            "its added tokens and replacements have 4,194,307 bytes, at most",
        ),
    ],
    ids=["words", "pieces", "ordinary pieces", "an added token"],
)
def test_models_that_look_too_long_are_bounded(
    changes: dict[str, object], text: str, message: str | None, tmp_path: Path, write_tiny_tokenizer: WriteTokenizer
) -> None:
    folder = write_tiny_tokenizer(tmp_path)
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    rewrite(folder, "tokenizer.json", **{"added_tokens": [], "normalizer": None, "pre_tokenizer": None, **changes})
    if message is None:
        assert Tokenizer(folder).ids(text)
        return
    with pytest.raises(UserError, match=message):
        Tokenizer(folder).ids(text)


@pytest.mark.slow
def test_smollm2_known_ids(smollm2_dir: Path) -> None:
    tokenizer = Tokenizer(smollm2_dir)
    assert tokenizer.ids("Hello world, the year 2024 isn't") == [19556, 905, 28, 260, 713, 216, 34, 32, 34, 36, 3247, 982]
    assert not tokenizer.use_bos and tokenizer.stop_ids == {2}
    assert "".join(tokenizer.decode_stream(tokenizer.ids("naïve 日本語 👩‍👩‍👧"))) == "naïve 日本語 👩‍👩‍👧"


# --- what several files say ---


def test_files_that_disagree_are_read_as_transformers_reads_them(write_tiny_tokenizer: Callable[[Path], Path], tmp_path: Path) -> None:
    """Special tokens of special_tokens_map.json, a template beside the config's, EOS in config.json alone."""
    folder = write_tiny_tokenizer(tmp_path / "a")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("bos_token", "eos_token"):
        config[key] = None
    config["chat_template"] = "of the config"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}}))
    (folder / "chat_template.jinja").write_text("of the file")
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": [2, 5, 7]}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer(folder)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.chat_template == theirs.chat_template == "of the file"
    assert ours.stop_ids == set(
        transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(folder)).eos_token_id
    )
    (tmp_path / "b").mkdir()
    checkpoint.copy_tokenizer_files(folder, tmp_path / "b")
    assert Tokenizer(tmp_path / "b").stop_ids == ours.stop_ids


@pytest.mark.parametrize(
    "entry", [[{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}], {"default": "y", "rag": "z"}]
)
def test_the_default_of_several_templates(entry: Any, write_tiny_tokenizer: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path / "a")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": entry}))
    assert Tokenizer(folder).chat_template == "y"


A, B = "{% for m in messages %}A{{ m.content }}{{ pad_token }}{% endfor %}", "{% for m in messages %}B{{ m.content }}{% endfor %}"
NEW = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
OBJECT = {**NEW, "__type": "AddedToken", "special": True}
PADDING = {
    "strategy": "BatchLongest",
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 1,
    "pad_type_id": 0,
    "pad_token": "<|im_start|>",
}
PLACES: dict[str, dict[str, Any]] = {
    "one file": {"chat_template.jinja": A},
    "a file beside the config's": {"chat_template.jinja": A, "tokenizer_config.json": {"chat_template": B}},
    "a file and a folder": {"chat_template.jinja": A, "additional_chat_templates/tool_use.jinja": B},
    "the folder alone": {"additional_chat_templates/default.jinja": A, "additional_chat_templates/rag.jinja": B},
    "a list": {"tokenizer_config.json": {"chat_template": [{"name": "tool_use", "template": B}, {"name": "default", "template": A}]}},
    "a mapping": {"tokenizer_config.json": {"chat_template": {"default": A, "tool_use": B}}},
    "added in the config": {"tokenizer_config.json": {"added_tokens_decoder": {"320": {**NEW, "content": "<new>", "special": True}}}},
    "added and plain": {"tokenizer_config.json": {"added_tokens_decoder": {"320": {**NEW, "content": "<new>", "special": False}}}},
    "added in a file": {"added_tokens.json": {"<new>": 320}},
    "added in two files": {"added_tokens.json": {"<new>": 320}, "special_tokens_map.json": {"unk_token": "<new>"}},
    "added by two lists": {"tokenizer_config.json": {"extra_special_tokens": ["<new>"], "additional_special_tokens": ["there"]}},
    "added by the older list": {"tokenizer_config.json": {"additional_special_tokens": ["<new>"]}},
    "added by the map": {"special_tokens_map.json": {"additional_special_tokens": ["<new>"], "pad_token": "<|im_start|>"}},
    "added by a name": {
        "tokenizer_config.json": {
            "extra_special_tokens": {"image_token": "<new>", "source": "there"},
            "chat_template": A + "{{ image_token }}",
        }
    },
    "names of a model's own": {
        "tokenizer_config.json": {
            "model_specific_special_tokens": {"image_token": "<new>"},
            "sep_token": "there",
            "chat_template": A + "{{ image_token }}",
        }
    },
    "a name beside those of a model's own": {
        "tokenizer_config.json": {
            "model_specific_special_tokens": {"image_token": "there"},
            "audio_token": "<new>",
            "chat_template": A + "{{ image_token }}{{ audio_token }}",
        }
    },
    "an empty list counts more than the map's": {
        "tokenizer_config.json": {"additional_special_tokens": []},
        "special_tokens_map.json": {"additional_special_tokens": ["<new>"]},
    },
    "lists of both": {
        "tokenizer_config.json": {"extra_special_tokens": ["there"]},
        "special_tokens_map.json": {"extra_special_tokens": ["<new>", "there"]},
    },
    "listed as plain, and extra": {
        "tokenizer_config.json": {
            "extra_special_tokens": ["<new>"],
            "added_tokens_decoder": {"320": {**NEW, "content": "<new>", "special": False}},
        }
    },
    "added in a file, and extra": {
        "added_tokens.json": {"<new>": 320},
        "tokenizer_config.json": {"additional_special_tokens": ["<new>"]},
    },
    "in the order of their names": {"tokenizer_config.json": {"sep_token": "there", "unk_token": "<new>"}},
    "the map counts more": {"special_tokens_map.json": {"eos_token": "<|im_start|>", "bos_token": {"content": "<|im_end|>"}}},
    "the map is not read": {
        "tokenizer_config.json": {"added_tokens_decoder": {"320": {**NEW, "content": "<new>", "special": True}}, "pad_token": "<|im_end|>"},
        "special_tokens_map.json": {"eos_token": "<|im_start|>", "pad_token": "<|im_start|>"},
    },
    "a special token with flags": {"special_tokens_map.json": {"unk_token": {"content": "<new>", "rstrip": True, "special": False}}},
    "a special token as an object": {"tokenizer_config.json": {"unk_token": {**OBJECT, "content": "<new>", "lstrip": True}}},
    "a plain extra token with flags": {
        "tokenizer_config.json": {"extra_special_tokens": [{**OBJECT, "content": "<new>", "rstrip": True, "special": False}]}
    },
    "a special token that tokenizer.json has as a plain one": {
        "tokenizer.json": {"added_tokens": [{**NEW, "id": 2, "content": "<|im_end|>", "special": False}]}
    },
    "a plain token that tokenizer.json has with other flags": {
        "tokenizer.json": {"added_tokens": [{**NEW, "id": 320, "content": "<new>", "rstrip": True, "special": False}]},
        "added_tokens.json": {"<new>": 320},
    },
    "added in a file with the id of another": {"added_tokens.json": {"<new>": 2}},
    "a model's own name in two files": {
        "tokenizer_config.json": {"image_token": "there", "chat_template": A + "{{ image_token }}"},
        "special_tokens_map.json": {"image_token": "<new>"},
    },
    "a model's own name as an object": {
        "tokenizer_config.json": {"chat_template": A + "{{ image_token }}{{ audio_token }}", "audio_token": {**OBJECT, "content": "there"}},
        "special_tokens_map.json": {"image_token": {"content": "<new>", "rstrip": True}},
    },
    "a model's own names in both lists": {
        "tokenizer_config.json": {"extra_special_tokens": {"image": "<new>"}, "additional_special_tokens": {"source": "there"}},
        "chat_template.jinja": A + "{{ image }}{{ source }}",
    },
    "no list counts more than the map's": {
        "tokenizer_config.json": {"extra_special_tokens": None},
        "special_tokens_map.json": {"additional_special_tokens": ["<new>"]},
    },
    "the padding of tokenizer.json": {
        "tokenizer.json": {"padding": PADDING},
        "tokenizer_config.json": json.dumps({"chat_template": A}),
    },
    "a rule that is no token": {"tokenizer_config.json": {"add_eos_token": "<new>"}},
    "no special tokens in texts": {"tokenizer_config.json": {"split_special_tokens": True}},
    "ids alone": {
        "tokenizer_config.json": {"bos_token": None, "eos_token": None, "chat_template": A + "{{ bos_token }}{{ eos_token }}"},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 1},
    },
    "bos before no template": {"tokenizer_config.json": {"add_bos_token": True, "chat_template": A}},
}


@pytest.mark.parametrize("place", PLACES)
def test_every_place_and_form_as_in_transformers(place: str, write_tiny_tokenizer: WriteTokenizer, tmp_path: Path) -> None:
    """Templates, added tokens and BOS, in the folder and in a copy."""
    folder = write_tiny_tokenizer(tmp_path / "a")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if any(name.endswith("jinja") for name in PLACES[place]):
        del config["chat_template"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in PLACES[place].items():
        (folder / name).parent.mkdir(exist_ok=True)
        before = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(content if isinstance(content, str) else json.dumps({**before, **content}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    checkpoint.copy_tokenizer_files(folder, tmp_path / "copy")
    turns, tools = [{"role": "user", "content": "Hi <new> there"}], [{"type": "function", "function": {"name": "f"}}]
    for ours in (Tokenizer(folder), Tokenizer(tmp_path / "copy")):
        text = "a<new> b <|im_end|>c there"
        assert theirs.eos_token_id in (ours.eos_id, None) and theirs.bos_token_id in (ours.bos_id, None)
        assert ours.ids(text, bos=False) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ours.ids(text, bos=False)) == theirs.decode(ours.ids(text, bos=False), skip_special_tokens=True)
        style = ChatTemplate.from_tokenizer(ours)
        assert style is not None
        for listed in (None, tools):
            want = theirs.apply_chat_template(turns, tools=listed, tokenize=True, return_dict=False)
            assert ours.ids(style.render_marked(turns, tools=listed)[0], bos=style.bos) == want


def test_broken_lists_of_added_tokens(write_tiny_tokenizer: WriteTokenizer, tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path / "a")
    for content in ({"<x>": "y"}, {"": 3}, {"<x>": None}):
        (folder / "added_tokens.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match="added_tokens.json, lists no tokens by id"):
            Tokenizer(folder)


CLEANED_PARTS = ["hello", ",", "!", "?", ".", "do", "n", "n't", "'", "'m", "'s", "'ve", "'re", "t", "s", "w ' n't"]


@pytest.mark.parametrize("clean", [True, False, None])
@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "BPE"])
def test_spaces_are_cleaned_up_as_transformers_does(kind: str, clean: bool | None, tmp_path: Path) -> None:
    """All pairs of tokens, and a long text; its pieces make up the whole."""
    pieces = ["<unk>", *(f"\u2581{part}" for part in CLEANED_PARTS)]
    model: Any = models.BPE({piece: i for i, piece in enumerate(pieces)}, [])
    if kind == "WordPiece":
        model = models.WordPiece({piece.lstrip("\u2581"): i for i, piece in enumerate(pieces)}, unk_token="<unk>")
    elif kind == "Unigram":
        model = models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0)
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.WordPiece(cleanup=False) if kind == "WordPiece" else decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": clean}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    ours, theirs = Tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    count = len(pieces)
    pairs = [[1, i, j, 1] for i in range(1, count) for j in range(1, count)]
    for ids in [*pairs, [i for pair in pairs for i in pair]]:
        assert ours.decode(ids) == theirs.decode(ids) == "".join(ours.decode_stream(ids)), ids
    assert (" do n't" in theirs.decode(pairs[0] + [6, 8])) == (kind == "BPE" or not clean)
