from __future__ import annotations

import itertools
import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from litgpt import families as catalog
from litgpt.checkpoint import load_weights, require_checkpoint
from litgpt.config import Config
from litgpt.convert.gguf.config import fit_adjustments
from litgpt.convert.gguf.reader import Reader
from litgpt.convert.to_litgpt import convert_to_litgpt
from litgpt.errors import UserError
from litgpt.model import GPT
from litgpt.rope import frequencies
from litgpt.tokenizer import Tokenizer

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
REVERSED_MODULES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def build(**changes: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(5)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 0.5, std=0.2)
    return model.eval()


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q or k as llama.cpp stores them: in each head, 0, h/2, 1, h/2 + 1, ..."""
    h = weight.shape[0] // heads
    order = [head * h + half * (h // 2) + j for head in range(heads) for j in range(h // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(
    path: Path,
    model: transformers.PreTrainedModel,
    tokenizer: Callable[[gguf.GGUFWriter], None],
    kind: str = "F32",
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    skip: tuple[str, ...] = (),
) -> Path:
    """The model as llama.cpp's converter would write it."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny Model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    tokenizer(writer)
    extra(writer)
    for name, tensor in model.state_dict().items():
        if name in skip or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        module, _, parameter = name.rpartition(".")
        if module.startswith("model.layers."):
            block, _, part = module.removeprefix("model.layers.").partition(".")
            module = f"blk.{block}.{MODULES[part]}"
        else:
            module = REVERSED_MODULES[module]
        array = tensor.float().numpy()
        if module.endswith("attn_q"):
            array = llama_cpp_order(array, config.num_attention_heads)
        if module.endswith("attn_k"):
            array = llama_cpp_order(array, config.num_key_value_heads)
        quantised = gguf.GGMLQuantizationType[kind if array.ndim > 1 else "F32"]
        writer.add_tensor(f"{module}.{parameter}", gguf.quantize(array, quantised), raw_dtype=quantised)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def byte_level(tiny_tokenizer_dir: Path) -> Callable[[gguf.GGUFWriter], None]:
    """The tiny tokenizer's vocabulary as GGUF metadata."""
    model = json.loads((tiny_tokenizer_dir / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([*tokens])
        writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(2)

    return add


@torch.inference_mode()
def assert_same_logits(reference: torch.nn.Module, folder: Path, tolerance: float = 1e-4) -> None:
    model = GPT(Config.from_checkpoint(require_checkpoint(folder)))
    model.load_state_dict(load_weights(folder / "lit_model.pth"))
    tokens = torch.randint(0, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.float()(tokens), reference(tokens).logits, atol=tolerance, rtol=tolerance)


ROPE_TABLE = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}, "head_dim": 64}


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, ROPE_TABLE, {"head_dim": 32}], ids=["plain", "tied", "llama 3.1", "head size"]
)
def test_logits_equal_those_of_transformers(tmp_path: Path, byte_level: Callable[[gguf.GGUFWriter], None], changes: dict[str, Any]) -> None:
    model = build(**changes)

    def rope_table(writer: gguf.GGUFWriter) -> None:
        if changes is ROPE_TABLE:
            plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
            writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32))
        if "head_dim" in changes:
            writer.add_key_length(changes["head_dim"])
            writer.add_value_length(changes["head_dim"])

    convert_to_litgpt(write_gguf(tmp_path / "tiny.gguf", model, byte_level, extra=rope_table), tmp_path / "lit")
    assert_same_logits(model, tmp_path / "lit")
    config = Config.from_checkpoint(tmp_path / "lit")
    assert (config.name, config.norm_eps) == ("Tiny-Model", 1e-6)
    if changes is ROPE_TABLE:
        assert config.rope_adjustments == {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}


@pytest.mark.parametrize(
    ("kind", "dtype", "bits"),
    [("Q8_0", torch.bfloat16, 8), ("F16", torch.float16, 11), ("BF16", torch.bfloat16, 8), ("Q4_1", torch.bfloat16, 8)],
)
def test_stored_dtypes(tmp_path: Path, byte_level: Callable[[gguf.GGUFWriter], None], kind: str, dtype: torch.dtype, bits: int) -> None:
    """Each stored weight is the file's, rounded to the dtype: what `gguf.dequantize` gives, within half a unit in the last place."""
    model = build()
    convert_to_litgpt(write_gguf(tmp_path / "tiny.gguf", model, byte_level, kind=kind), tmp_path / "lit")
    weights = load_weights(tmp_path / "lit" / "lit_model.pth")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    quantised = gguf.GGMLQuantizationType[kind]
    original = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    expected = torch.from_numpy(np.array(gguf.dequantize(gguf.quantize(original, quantised), quantised)))
    torch.testing.assert_close(weights["transformer.h.1.mlp.proj.weight"].float(), expected, rtol=2.0**-bits, atol=1e-7)

    convert_to_litgpt(tmp_path / "tiny.gguf", tmp_path / "wide", dtype="float32")
    exact = load_weights(tmp_path / "wide" / "lit_model.pth")["transformer.h.1.mlp.proj.weight"]
    assert torch.equal(exact, expected)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Llama-3.2-1B", "Llama-3.2-3B"])
def test_the_rope_table_of_every_llama_is_recognised(name: str) -> None:
    config = Config.from_name(name)
    plain = frequencies(Config.from_name(name, rope_adjustments=None))
    assert fit_adjustments((plain / frequencies(config)).tolist(), config) == config.rope_adjustments


def test_other_rope_tables_are_not_taken_for_llamas() -> None:
    config = Config(n_embd=64, n_head=1, rotary_percentage=1.0)
    assert fit_adjustments([1.0] * 32, config) == {}
    for strange in (np.full(32, 4.0), np.linspace(1, 8, 32), np.zeros(32), np.full(32, math.nan), -np.ones(32), np.full(32, 0.5)):
        assert fit_adjustments(strange.tolist(), config) is None


def tiny(tmp_path: Path, byte_level: Callable[[gguf.GGUFWriter], None], extra: Callable[[gguf.GGUFWriter], Any], **kwargs: Any) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", build(), byte_level, extra=extra, **kwargs)


def test_linear_rope_scaling(tmp_path: Path, byte_level: Callable[[gguf.GGUFWriter], None]) -> None:
    model = build(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})

    def scaling(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    convert_to_litgpt(write_gguf(tmp_path / "tiny.gguf", model, byte_level, extra=scaling), tmp_path / "lit")
    assert_same_logits(model, tmp_path / "lit")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), r"has no llama\.rope\.scaling\.original_context_length"),
        (lambda w: w.add_string("llama.rope.scaling.type", "odd"), r"llama\.rope\.scaling\.type is 'odd'"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 9, 8, dtype=np.float32)), r"rope_freqs\.weight is not Llama 3\.1's"),
        (lambda w: w.add_expert_count(8), "LLaMAMoE with n_expert 8 and n_expert_per_token 0"),
        (lambda w: w.add_uint16("split.count", 3), "split.count"),
        (lambda w: w.add_key_length(15), "dimension_count is 16, supported is only the whole head, here 15"),
        (lambda w: w.add_value_length(8), "value_length is 8"),
        (lambda w: w.add_pad_token_id(5000), "padding_token_id is 5000, but there are 320 tokens"),
        (lambda w: w.add_chat_template("x") or w.add_string("llama.attention.sliding_window", "y"), "sliding_window is y"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.zeros(64, np.float32)), r"missing: blk\.\{0,1\}\.attn_k\.bias"),
        (lambda w: w.add_tensor("blk.7.odd.weight", np.zeros(64, np.float32)), r"unknown: blk\.7\.odd\.weight"),
        (lambda w: w.add_tensor("odd.weight", np.zeros((2, 4), np.int32)), r"cannot be read \(I32: odd.weight\)"),
    ],
)
def test_unsupported_files_name_the_key(
    tmp_path: Path, byte_level: Callable[[gguf.GGUFWriter], None], extra: Callable[[gguf.GGUFWriter], Any], message: str
) -> None:
    path = tiny(tmp_path, byte_level, extra)
    with pytest.raises(UserError, match=message) as caught:
        convert_to_litgpt(path, tmp_path / "lit")
    assert str(path) in str(caught.value)
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".lock"] == ["tiny.gguf"], "nothing may be left behind"


def test_other_architectures_and_missing_tensors(tmp_path: Path, byte_level: Callable[[gguf.GGUFWriter], None]) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="architecture 'mamba', supported are llama, qwen2, "):
        convert_to_litgpt(tmp_path / "other.gguf", tmp_path / "lit")
    path = tiny(tmp_path, byte_level, lambda writer: None, skip=("model.norm.weight", "model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"missing: blk\.1\.ffn_up\.weight, output_norm\.weight"):
        convert_to_litgpt(path, tmp_path / "lit")


def test_names(tmp_path: Path, smollm2_gguf: Path, byte_level: Callable[[gguf.GGUFWriter], None]) -> None:
    path = tiny(tmp_path, byte_level, lambda writer: None)
    named = path.rename(tmp_path / "smollm2-135m-instruct-Q4_K_M.gguf")
    convert_to_litgpt(named, tmp_path / "a")
    assert Config.from_checkpoint(tmp_path / "a").name == "Tiny-Model", "a name alone does not make a model"
    with pytest.raises(UserError, match="is not of the model SmolLM2-135M: n_layer is 2, expected 30"):
        convert_to_litgpt(named, tmp_path / "b", model_name="SmolLM2-135M")


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, byte_level: Callable[[gguf.GGUFWriter], None]) -> None:
    path = tiny(tmp_path, byte_level, lambda writer: None)
    monkeypatch.chdir(tmp_path)
    convert_to_litgpt(path)
    assert require_checkpoint(Path("checkpoints") / "tiny")


# Tokenizers


PLAIN_TEXTS = [
    "Hello world, the year 2024 isn't",
    "def f(x: int) -> str:\n    return f'{x:>10}'\t# 100 %\n\n\n",
    "  leading and trailing  ",
    "naïve café, Ελληνικά, 日本語, العربية, 👩‍👩‍👧‍👦 🎉, \u00a0 \u200b",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
]


@pytest.mark.parametrize("text", PLAIN_TEXTS)
def test_smollm2_tokenizer(smollm2_dir: Path, text: str) -> None:
    tokenizer = Tokenizer(smollm2_dir)
    ids = tokenizer.ids(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert 0 not in ids or "<|endoftext|>" in text, "no blank may become <|endoftext|>"
    assert PreTrainedTokenizerFast(tokenizer_file=str(smollm2_dir / "tokenizer.json")).encode(text) == ids
    assert transformers.AutoTokenizer.from_pretrained(smollm2_dir).encode(text) == ids


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
def test_pre_tokenizers(tmp_path: Path, byte_level: Callable[[gguf.GGUFWriter], None], pre: str, digits: list[int], bos: bool) -> None:
    """How digits are cut, by the published patterns; whether BOS is added where the file does not say."""
    path = tiny(tmp_path, byte_level, lambda writer: writer.add_tokenizer_pre(pre))
    convert_to_litgpt(path, tmp_path / "lit")
    tokenizer = Tokenizer(tmp_path / "lit")
    assert tokenizer.use_bos is bos
    cut = tokenizer._backend.pre_tokenizer.pre_tokenize_str("1234567")
    assert [len(piece) for piece, _ in cut] == digits
    for text in ("I'll go  there\n\n now", "日本 ∑x"):
        assert tokenizer.decode(tokenizer.ids(text)) == text


def test_unknown_pre_tokenizers_are_named(tmp_path: Path, byte_level: Callable[[gguf.GGUFWriter], None]) -> None:
    path = tiny(tmp_path, byte_level, lambda writer: writer.add_tokenizer_pre("odd"))
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre is 'odd', supported are gpt-2, default, .*smollm.*llama-bpe"):
        convert_to_litgpt(path, tmp_path / "lit")


@pytest.mark.parametrize("add_bos", [False, True])
def test_byte_level_bos_types_and_user_tokens(tmp_path: Path, byte_level: Callable[[gguf.GGUFWriter], None], add_bos: bool) -> None:
    def tokens(writer: gguf.GGUFWriter) -> None:
        byte_level(writer)
        entries = writer.kv_data[0]
        entries["tokenizer.ggml.token_type"].value[300] = 4
        entries["tokenizer.ggml.tokens"].value[300] = "[A B]"
        entries["tokenizer.ggml.merges"].value[:] = entries["tokenizer.ggml.merges"].value[:30]
        writer.add_add_bos_token(add_bos)
        writer.add_eot_token_id(0)

    convert_to_litgpt(tiny(tmp_path, tokens, lambda writer: None), tmp_path / "lit")
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
    model = build(vocab_size=len(sentencepiece_vocabulary()) + 7)
    convert_to_litgpt(write_gguf(folder / "tiny.gguf", model, add_sentencepiece), folder / "lit")
    assert_same_logits(model, folder / "lit")
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


# The real file


@torch.inference_mode()
def test_smollm2_knows_the_capital_of_france(smollm2_dir: Path) -> None:
    tokenizer = Tokenizer(smollm2_dir)
    model = GPT(Config.from_checkpoint(smollm2_dir))
    model.load_state_dict(load_weights(smollm2_dir / "lit_model.pth"))
    logits = model.float()(tokenizer.encode("The capital of France is")[None])
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


@pytest.mark.slow
@torch.inference_mode()
def test_smollm2_logits_equal_those_of_transformers(smollm2_gguf: Path, tmp_path: Path) -> None:
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32)
    convert_to_litgpt(smollm2_gguf, tmp_path / "lit", dtype="float32")
    assert_same_logits(reference.eval(), tmp_path / "lit", tolerance=1e-3)


def assert_same_header(path: Path) -> None:
    ours, theirs = Reader(path), gguf.GGUFReader(path)
    assert [*ours.metadata] == [key for key in theirs.fields if not key.startswith("GGUF.")]
    for key, value in ours.metadata.items():
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == theirs.fields[key].contents()
    assert [*ours.tensors] == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors[:12]:
        found = ours.tensors[tensor.name]
        assert (found.start, found.size, list(reversed(found.shape))) == (tensor.data_offset, tensor.n_bytes, tensor.shape.tolist())
        assert np.array_equal(ours.array(tensor.name), gguf.dequantize(tensor.data, tensor.tensor_type))


def test_header_equals_that_of_the_gguf_library(tmp_path: Path, byte_level: Callable[[gguf.GGUFWriter], None]) -> None:
    assert_same_header(tiny(tmp_path, byte_level, lambda writer: writer.add_chat_template("é"), kind="Q4_0"))


@pytest.mark.slow
def test_header_of_smollm2(smollm2_gguf: Path) -> None:
    assert_same_header(smollm2_gguf)


def dequantisable(kind: gguf.GGMLQuantizationType) -> bool:
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_type_that_the_gguf_library_turns_into_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row and one of several parts, as the library does it at once."""
    kinds = [kind for kind in gguf.GGMLQuantizationType if dequantisable(kind)]
    assert {"Q4_0", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ2_XXS", "IQ4_NL", "TQ1_0", "BF16", "MXFP4"} <= {kind.name for kind in kinds}
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    content = {kind: np.random.default_rng(int(kind)).integers(0, 255, (3, 5, 256), np.uint8) for kind in kinds}
    for kind, numbers in content.items():
        block, size = gguf.GGML_QUANT_SIZES[kind]
        content[kind] = (
            numbers[..., : size * 256 // block] if size * 256 // block <= 256 else np.tile(numbers, 4)[..., : size * 256 // block]
        )
        writer.add_tensor(kind.name, content[kind], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr("litgpt.convert.gguf.reader.CHUNK", 2 * 256)
    reader = Reader(tmp_path / "x.gguf")
    for kind, numbers in content.items():
        expected = gguf.dequantize(numbers, kind)
        assert np.array_equal(reader.array(kind.name), expected, equal_nan=True), kind.name
        assert np.array_equal(reader.load(kind.name, part=1, parts=3).numpy(), expected[1], equal_nan=True), kind.name


# Broken and hostile files


class Whole(bytes):
    """The bytes of a sound file, not printed when a test fails."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, byte_level: Callable[[gguf.GGUFWriter], None]) -> Whole:
    return Whole(write_gguf(tmp_path_factory.mktemp("whole") / "tiny.gguf", build(), byte_level, kind="Q8_0").read_bytes())


def broken(tmp_path: Path, content: bytes) -> str:
    """The message for a broken file; no other exception may come, and nothing may be left behind."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        convert_to_litgpt(path, tmp_path / "lit")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "lit").exists()
    return str(caught.value)


def test_truncated_anywhere(tmp_path: Path, whole: Whole) -> None:
    header = whole.index(b"blk.0.attn_norm")
    places = [
        *range(40),
        *random.Random(0).sample(range(40, header), 40),
        *random.Random(1).sample(range(header, len(whole)), 40),
        len(whole) - 1,
    ]
    for size in places:
        message = broken(tmp_path, whole[:size])
        assert "starts with b'GGUF'" in message if size < 4 else "truncated" in message, size


def patched(whole: Whole, at: int, code: str, value: int) -> bytes:
    return whole[:at] + struct.pack(code, value) + whole[at + struct.calcsize(code) :]


@pytest.mark.parametrize("value", [10**6, 2**31, 2**63, 2**64 - 1])
@pytest.mark.parametrize(
    "field",
    [
        ("tensor count", lambda whole: 8),
        ("value count", lambda whole: 16),
        ("key length", lambda whole: 24),
        ("string length", lambda whole: whole.index(b"Tiny Model") - 8),
        ("array length", lambda whole: whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type") + 8),
        ("string array length", lambda whole: whole.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8),
        ("token length", lambda whole: whole.index(b"<|endoftext|>") - 8),
        ("tensor name length", lambda whole: whole.index(b"blk.0.attn_norm") - 8),
        ("dimension", lambda whole: whole.index(b"token_embd.weight") + len("token_embd.weight") + 4),
        ("offset", lambda whole: whole.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16 + 4),
    ],
    ids=lambda field: field[0],
)
def test_absurd_counts(tmp_path: Path, whole: Whole, field: tuple[str, Callable[[bytes], int]], value: int) -> None:
    content = patched(whole, field[1](whole), "<Q", value)
    assert "truncated" in broken(tmp_path, content) or field[0] == "dimension"


def test_wrong_magic_versions_and_types(tmp_path: Path, whole: Whole) -> None:
    assert "this one with b'PK" in broken(tmp_path, b"PK\x03\x04" + whole)
    assert "version 1 found" in broken(tmp_path, patched(whole, 4, "<I", 1))
    assert "version 99 found" in broken(tmp_path, patched(whole, 4, "<I", 99))
    assert "big-endian" in broken(tmp_path, patched(whole, 4, ">I", 3))
    name = whole.index(b"token_embd.weight") + len("token_embd.weight")
    assert "5 dimensions" in broken(tmp_path, patched(whole, name, "<I", 5))
    assert "unknown type 777" in broken(tmp_path, patched(whole, name + 20, "<I", 777))
    assert "Q8_1" in broken(tmp_path, patched(whole, name + 20, "<I", 9))
    assert "impossible dimensions" in broken(tmp_path, patched(whole, name + 4, "<Q", 0))
    kind = whole.index(b"tokenizer.ggml.token_type") + len("tokenizer.ggml.token_type")
    assert "value type 42" in broken(tmp_path, patched(whole, kind, "<I", 42))
    assert "value type 9 in an array" in broken(tmp_path, patched(whole, kind + 4, "<I", 9))
    assert "occurs twice" in broken(tmp_path, whole.replace(b"blk.1.attn_norm.weight", b"blk.0.attn_norm.weight"))
    assert "not UTF-8" in broken(tmp_path, whole.replace(b"Tiny Model", b"Tiny\xff\xff\xff\xff\xff\xff"))
    blocks = whole.index(b"llama.block_count") + len("llama.block_count") + 4
    assert "4294967295 blocks" in broken(tmp_path, patched(whole, blocks, "<I", 2**32 - 1))
    width = whole.index(b"llama.feed_forward_length") + len("llama.feed_forward_length") + 4
    assert "shape (64, 96) where (64, 4294967)" in broken(tmp_path, patched(whole, width, "<I", 4294967))
    heads = whole.index(b"llama.attention.head_count_kv") + len("llama.attention.head_count_kv") + 4
    assert "not a multiple" in broken(tmp_path, patched(whole, heads, "<I", 3))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_changed_bytes_give_one_clear_error_or_a_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, whole: Whole, data: st.DataObject
) -> None:
    header = whole.index(b"output_norm.weight")
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "fuzz.gguf").write_bytes(content)
    try:
        convert_to_litgpt(folder / "fuzz.gguf", folder / "lit")
    except UserError as error:
        assert "fuzz.gguf" in str(error)
        assert not (folder / "lit").exists()
    else:
        assert require_checkpoint(folder / "lit")
