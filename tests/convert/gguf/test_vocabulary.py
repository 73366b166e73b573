"""Tokenizers into GGUF metadata and back: the ids stay those of transformers and of `tokenizers`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import AddedToken, Regex, Tokenizer as Backend, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

from litgpt.convert.gguf.vocabulary import vocabulary
from litgpt.errors import UserError
from tests.helpers import gguf_files


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_transformers_sentencepiece_classes(tmp_path: Path, name: str) -> None:
    model = gguf_files.GOLDEN["models"][name]
    ids = {piece: i for i, piece in enumerate(model["pieces"])}
    merges = generate_merges(ids, dict(zip(model["pieces"], model["scores"], strict=True)))
    kind = {"llama": transformers.LlamaTokenizer, "gemma": transformers.GemmaTokenizer}[name]
    reference = kind(vocab=ids, merges=merges)
    reference.save_pretrained(tmp_path / "hf")
    values, tokenizer = gguf_files.read_back(tmp_path / "hf", 530, tmp_path / "b")
    assert values["tokenizer.ggml.add_space_prefix"] is (name == "llama")
    for text in gguf_files.TEXTS:
        if name == "llama" and text[:1].isspace():
            continue  # transformers adds no blank to one that is there, SentencePiece and llama.cpp do
        assert tokenizer.ids(text, bos=False) == reference.encode(text, add_special_tokens=False), text


def test_added_tokens_of_the_other_files(write_tiny_tokenizer: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = write_tiny_tokenizer(tmp_path / "a")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "extra_special_tokens": ["<new>"]}))
    values = vocabulary(folder, 322)
    assert values["tokenizer.ggml.tokens"][319:] == [*values["tokenizer.ggml.tokens"][319:320], "<new>", "[PAD321]"]
    assert values["tokenizer.ggml.token_type"][320:] == [3, 5]  # control, unused


def own(cls: Any) -> Callable[[], Backend]:
    """An untrained tokenizer that cuts text as a class of transformers does."""

    def make() -> Backend:
        given = json.loads(cls().backend_tokenizer.to_str())
        given["model"] |= {"vocab": {}, "merges": []}
        return Backend.from_str(json.dumps({**given, "added_tokens": [], "post_processor": None}))

    return make


def native(*steps: Any, **model: Any) -> Callable[[], Backend]:
    def make() -> Backend:
        backend = Backend(models.BPE(**model))
        backend.pre_tokenizer = Sequence([*steps])
        backend.decoder = transformers.GPT2Tokenizer().backend_tokenizer.decoder
        return backend

    return make


BYTES = ByteLevel(add_prefix_space=False, use_regex=False)


GPT_2 = ByteLevel(add_prefix_space=False, use_regex=True)


LLAMA_3 = Regex(TikTokenConverter().pattern)


CODE = [Split(Regex(pattern), "isolated") for pattern in ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")]


BYTE_LEVEL: dict[str, Callable[[], Backend]] = {
    "gpt-2": own(transformers.GPT2Tokenizer),
    "olmo": own(transformers.GPTNeoXTokenizer),
    "qwen2": own(transformers.Qwen2Tokenizer),
    "command-r": own(transformers.CohereTokenizer),
    "smollm": native(Digits(individual_digits=True), GPT_2),
    "llama-bpe": native(Split(LLAMA_3, "isolated"), BYTES, ignore_merges=True),
    "dbrx": native(Split(LLAMA_3, "removed", invert=True), BYTES),
    "falcon": native(Punctuation("contiguous"), GPT_2, Digits(individual_digits=False), Split(Regex("[0-9][0-9][0-9]"), "isolated")),
    "deepseek-coder": native(*CODE, Digits(individual_digits=True), BYTES),
}


def trained(backend: Backend) -> Backend:
    special = ["<|start|>", "<|end|>", "<|sep|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=special, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator([text for text in gguf_files.TEXTS for _ in range(3)], trainer)
    backend.add_tokens([AddedToken("[X Y]", normalized=False)])
    return backend


def save(backend: Backend, folder: Path, **settings: Any) -> Path:
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|start|>", "eos_token": "<|end|>", "add_bos_token": False, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_bpe(tmp_path: Path, name: str) -> None:
    """The way of cutting is recognised by what it is, and made again by its name alone."""
    backend = trained(BYTE_LEVEL[name]())
    folder = save(backend, tmp_path / "a", chat_template="{{ messages }}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    values, tokenizer = gguf_files.read_back(folder, 512, tmp_path / "b")
    assert (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert values["tokenizer.ggml.token_type"].count(4) == 1 and values["tokenizer.ggml.token_type"].count(3) == 3
    for text in gguf_files.TEXTS:
        ids = backend.encode(text).ids
        assert tokenizer.ids(text) == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=False) == backend.decode(ids, skip_special_tokens=False)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids, tokenizer.use_bos) == (0, 1, {1, 2}, False)
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.vocab_size == backend.get_vocab_size()


@pytest.mark.parametrize("add_bos", [False, True])
def test_bos_is_written(tmp_path: Path, add_bos: bool) -> None:
    backend = trained(BYTE_LEVEL["llama-bpe"]())
    if add_bos:
        backend.post_processor = TemplateProcessing(single=["<|start|>", "$A"], special_tokens=[("<|start|>", 0)])
    folder = save(backend, tmp_path / "a")
    _, tokenizer = gguf_files.read_back(folder, 512, tmp_path / "b")
    assert (tokenizer.ids("x")[0] == 0) is add_bos


def changed(**parts: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content.update(parts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(normalizer={"type": "NFKC"}), "the normalizer .*NFKC"),
        (changed(pre_tokenizer={"type": "Whitespace"}), "the pre-tokenizer .*Whitespace"),
        (changed(pre_tokenizer=None), "a tokenizer that does not cut text"),
        (
            changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
            "the pre-tokenizer .*'add_prefix_space': True",
        ),
        (changed(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "the model WordLevel"),
        (lambda content: content["model"].update(ignore_merges=True), "the pre-tokenizer .* with ignore_merges"),
        (lambda content: content["model"].update(byte_fallback=True), "the pre-tokenizer .*ByteLevel"),
        (lambda content: content["model"]["vocab"].update(zzz=700), "the token 'zzz', number 700, of an embedding of 512 rows"),
    ],
)
def test_what_gguf_has_no_words_for(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    content = json.loads(trained(BYTE_LEVEL["gpt-2"]()).to_str())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"tokenizer\.json: a GGUF file cannot describe {message}"):
        vocabulary(tmp_path, 512)


def test_merges_that_no_scores_give(tmp_path: Path) -> None:
    merges = [["a", "b"], ["b", "c"], ["ab", "c"]]  # a, bc would give abc too
    content = {"model": {"type": "BPE", "byte_fallback": True, "vocab": {t: i for i, t in enumerate(["a", "b", "c", "ab", "bc", "abc"])}}}
    content["model"]["merges"] = merges
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "normalizer": None, "pre_tokenizer": None}))
    with pytest.raises(UserError, match="merges that do not follow from scores"):
        vocabulary(tmp_path, 6)
    content["model"]["merges"] = [*merges[:2], ["a", "bc"], *merges[2:]]
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "normalizer": None, "pre_tokenizer": None}))
    assert vocabulary(tmp_path, 6)["tokenizer.ggml.scores"] == [-3.0, -4.0, -5.0, 0.0, -1.0, -2.0]
