"""GGUF files for tests: small models as llama.cpp's converter writes them, metadata alone, and the families that have a GGUF name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from litgpt.checkpoint import load_weights, require_checkpoint
from litgpt.config import Config
from litgpt.convert.gguf.reader import Reader
from litgpt.convert.gguf.tokenizer import write_tokenizer
from litgpt.convert.gguf.vocabulary import vocabulary
from litgpt.convert.hf import convert_hf
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from tests.helpers import family_configs as configs
from tests.helpers.cases import quick

AddMetadata = Callable[[gguf.GGUFWriter], None]

SENTENCEPIECE = Path(__file__).parents[1] / "convert" / "gguf" / "sentencepiece.json"  # by make_sentencepiece.py
GOLDEN = json.loads(SENTENCEPIECE.read_text(encoding="utf-8"))
TEXTS = [
    *GOLDEN["texts"],
    "Hello world, the year 2024 isn't IT'S 1234567 ⅷ ²",
    "\r\n  \n\n x\t\ty   ",
    "e\u0301 \u212b ﬁ",
    "price: $12.50 == a_b ~x`y`<z>^|",
    "<|sep|>mid<|end|>[X Y] [XY]",
]
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
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

V = 330  # rows of the embedding: ten more than the tiny tokenizer has tokens
IDS = torch.randint(0, V, (2, 30), generator=torch.Generator().manual_seed(0))
LLAMA_3 = configs.rope("llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
SIX = {"num_hidden_layers": 6, "layer_types": None}
GOOGLE = {"head_dim": 256, "query_pre_attn_scalar": 256}

# Test -> family, changes to its config, architecture of the file, whether transformers reads such a file and all of its settings.
# The changes make GGUF able to express it, or are what transformers takes for granted of such files.
CASES: dict[str, tuple[str, dict[str, Any], str, bool]] = {
    "llama": ("llama", {}, "llama", True),
    "llama multi-query tied": ("llama multi-query tied", {}, "llama", True),
    "llama wide heads": ("llama wide heads", {}, "llama", True),
    "llama 3.1": ("llama 3.1", {**LLAMA_3, "head_dim": 64}, "llama", False),
    "llama linear": ("llama linear", {}, "llama", False),
    "llama yarn": ("llama yarn", {}, "llama", False),
    "mistral": ("mistral", {}, "llama", False),
    "mixtral": ("mixtral", {}, "llama", False),
    "gpt_neox": ("gpt_neox", {}, "gptneox", False),
    "gpt_neox sequential": ("gpt_neox sequential", {}, "gptneox", False),
    "falcon": ("falcon", {}, "falcon", True),
    "falcon new decoder": ("falcon new decoder", {}, "falcon", False),
    "stablelm": ("stablelm", {}, "stablelm", True),
    "stablelm biased": ("stablelm biased", {}, "stablelm", True),
    "stablelm parallel": ("stablelm parallel", {}, "stablelm", True),
    "phi": ("phi", {}, "phi2", False),
    "phi3": ("phi3", {"sliding_window": None}, "phi3", True),
    "phi3 longrope": ("phi3 longrope", {}, "phi3", False),
    "phi4 mini": ("phi4 mini", {}, "phi3", False),
    "gemma": ("gemma", {}, "gemma", False),
    "gemma2": ("gemma2", {**GOOGLE, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, "gemma2", True),
    "gemma2 small caps": ("gemma2", {"query_pre_attn_scalar": 10}, "gemma2", False),
    "gemma3": ("gemma3", {**GOOGLE, **SIX}, "gemma3", True),
    "gemma3 linear": ("gemma3 linear", {"query_pre_attn_scalar": 10, **SIX}, "gemma3", False),
    "qwen2": ("qwen2", {}, "qwen2", True),
    "qwen3": ("qwen3", {"head_dim": 128}, "qwen3", True),
    "qwen3_moe": ("qwen3_moe", {"moe_intermediate_size": 768}, "qwen3moe", True),
    "olmo": ("olmo", {}, "olmo", False),
    "olmo2": ("olmo2", {}, "olmo2", False),
    "starcoder2": ("starcoder2", {"sliding_window": None}, "starcoder2", True),
    "smollm3": ("smollm3", {"no_rope_layers": None}, "smollm3", False),
    "granite": ("granite", {}, "granite", False),
    "gpt2": ("gpt2", {"max_position_embeddings": 1024}, "gpt2", True),
}
# Rows of q and k in pairs, joined layers, transposed layers, norms off by one, experts.
QUICK_FIRST = quick(CASES, "llama", "gpt_neox", "falcon", "phi3", "gemma3", "qwen3_moe", "gpt2")


def llama(seed: int = 5, **changes: Any) -> transformers.PreTrainedModel:
    """Return a small random Llama of transformers."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 0.5, std=0.2)
    return model.eval()


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of q or k as llama.cpp stores them: in each head, 0, h/2, 1, h/2 + 1, ..."""
    h = weight.shape[0] // heads
    order = [head * h + half * (h // 2) + j for head in range(heads) for j in range(h // 2) for half in (0, 1)]
    return weight[order]


def write(
    path: Path,
    model: transformers.PreTrainedModel,
    tokenizer: AddMetadata,
    kind: str = "F32",
    extra: AddMetadata = lambda writer: None,
    skip: tuple[str, ...] = (),
) -> Path:
    """Write the model as llama.cpp's converter does."""
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


def write_tiny(tmp_path: Path, byte_level: AddMetadata, extra: Callable[[gguf.GGUFWriter], Any], **kwargs: Any) -> Path:
    """Write tiny.gguf, with what `extra` adds."""
    return write(tmp_path / "tiny.gguf", llama(), byte_level, extra=extra, **kwargs)


def byte_level_of(tokenizer_dir: Path) -> AddMetadata:
    """Return a function that adds the tokenizer of a folder, byte-level BPE with three special tokens, to a GGUF file."""
    model = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]
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


def write_metadata(path: Path, values: dict[str, Any], architecture: str = "llama") -> Path:
    """Write a GGUF file of metadata only."""
    writer = gguf.GGUFWriter(path, architecture)
    adders = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in values.items():
        adders[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def read_back(folder: Path, rows: int, target: Path) -> tuple[dict[str, Any], Tokenizer]:
    """Return the folder's tokenizer as metadata, and the tokenizer that is read from a file with it."""
    values = vocabulary(folder, rows)
    target.mkdir()
    write_tokenizer(Reader(write_metadata(target / "x.gguf", values)), Config(), target)
    return values, Tokenizer(target)


def checkpoint_folder(folder: Path, write_tokenizer: Callable[[Path], Path], family: str, **changes: Any) -> tuple[Any, Path]:
    """Return a transformers model and the checkpoint folder made of its files."""
    hf = configs.hf_model(family, vocab_size=V, **changes)
    hf.save_pretrained(folder / "hf")
    write_tokenizer(folder / "hf")
    convert_hf(folder / "hf", folder / "lit")
    return hf, folder / "lit"


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor:
    model = GPT(Config.from_checkpoint(folder)).eval()
    model.load_state_dict(load_weights(folder / "lit_model.pth"))
    return model(IDS)
