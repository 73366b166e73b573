"""config.json of every architecture, read and written, compared with transformers' config classes."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from litgpt import families as catalog
from litgpt.config import Config
from litgpt.convert.hf import to_hf
from litgpt.errors import UserError
from litgpt.rope import frequencies, plain_frequencies
from tests.helpers import family_configs as configs
from tests.helpers.cases import quick

FAMILY = pytest.mark.parametrize("family", configs.QUICK_FIRST)
NOT_WRITTEN = {"architectures", "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "rope_parameters"}
UNUSED = {"max_window_layers", "no_rope_layer_interval"}  # layer_types and no_rope_layers are written instead


def same(one: Any, other: Any) -> bool:
    """Equal, floats up to rounding."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other or (isinstance(one, float) and isinstance(other, int | float) and math.isclose(one, other, rel_tol=1e-12)))


def loaded(content: dict[str, Any], folder: Path) -> Any:
    """Return transformers' config for a config.json, with a tokenizer's id of BOS, which CWM's needs."""
    (folder / "config.json").write_text(json.dumps({**content, "bos_token_id": 1}))
    return transformers.AutoConfig.from_pretrained(folder)


def rotary(hf: Any) -> list[tuple[list[float], float]]:
    """transformers' frequencies of each kind of layer, and the factors of attention."""
    given = getattr(hf, "rope_parameters", None)
    if given is None:
        return []
    found = []
    for layer, part in given.items() if configs.GLOBAL in given else [(None, given)]:
        if part["rope_type"] == "default":
            found.append(([part["rope_theta"], part.get("partial_rotary_factor", 1.0)], 1.0))
        else:
            frequencies, factor = ROPE_INIT_FUNCTIONS[part["rope_type"]](hf, "cpu", **({"layer_type": layer} if layer else {}))
            found.append((frequencies.tolist(), factor))
            if part["rope_type"] == "longrope":
                found.append((ROPE_INIT_FUNCTIONS["longrope"](hf, "cpu", seq_len=10**6)[0].tolist(), factor))
    return found


def old_style(hf: dict[str, Any]) -> dict[str, Any]:
    """Return a config as transformers 4 wrote it."""
    hf = dict(hf)
    given = dict(hf.pop("rope_parameters", {}))
    if not given:
        return hf
    key = "rope_type" if configs.GLOBAL in given else "type"  # transformers 5 reads no older key in families with two kinds of layers
    if configs.GLOBAL in given:
        hf["rope_local_base_freq"], given = given[configs.LOCAL]["rope_theta"], dict(given[configs.GLOBAL])
    names = ("rotary_emb_base", "rotary_pct") if hf["model_type"] == "gpt_neox" else ("rope_theta", "partial_rotary_factor")
    hf[names[0]] = given.pop("rope_theta")
    if (share := given.pop("partial_rotary_factor", None)) is not None:
        hf[names[1]] = share
    kind = given.pop("rope_type")
    hf["rope_scaling"] = None if kind == "default" else {key: kind, **given}
    return hf


@FAMILY
def test_written_as_it_was_read(family: str, tmp_path: Path) -> None:
    """transformers' config -> ours -> config.json -> transformers' config."""
    hf = configs.hf_config(family)
    config = Config.from_hf(hf.to_dict())
    written = to_hf(config, hf.model_type)
    assert written["model_type"] == hf.model_type == to_hf(config, hf.model_type)["model_type"]
    assert written["architectures"] == [type(transformers.AutoModelForCausalLM.from_config(hf)).__name__]
    again = loaded(written, tmp_path)
    before, after = hf.to_dict(), again.to_dict()
    if family == "falcon":
        before["num_kv_heads"] = 1  # one, whatever it says
    if family == "falcon new decoder":
        before["multi_query"] = False  # whatever it says
    meant = [key for key in type(hf)().to_dict() if key not in NOT_WRITTEN | UNUSED]
    implied = {"head_dim": config.head_size, "n_inner": config.intermediate_size, "use_bidirectional_attention": None}
    different = {key: (before[key], after[key]) for key in meant if not same(before[key], after[key])}
    assert not {key: pair for key, pair in different.items() if pair[0] or pair[1] != implied.get(key, ...)}
    for one, other in zip(rotary(hf), rotary(again), strict=True):
        assert one[0] == pytest.approx(other[0]) and one[1] == pytest.approx(other[1])
    back = Config.from_hf(again.to_dict(), name=config.name, hf_config=config.hf_config)
    assert same(config.base_dict(), back.base_dict())


@FAMILY
def test_both_styles_of_files(family: str) -> None:
    hf = configs.hf_config(family).to_dict()
    old = old_style(hf)
    assert ("rope_parameters" in old) is False and Config.from_hf(old) == Config.from_hf(hf)


@FAMILY
def test_architecture_is_found_by_the_fields(family: str) -> None:
    """Where two architectures compute the same, the first may stand for the other."""
    hf = configs.hf_config(family)
    config = Config.from_hf(hf.to_dict(), name="mine")
    same = {"mistral global": "llama", "phi4 mini": "phi3", "phi3": "mistral", "phi3 longrope": "llama", "seed_oss": "qwen2"}
    same |= {"ernie4_5": "llama", "helium": "llama", "glm4_moe_lite": "deepseek_v3", "cwm": "ministral"}
    assert to_hf(config)["model_type"] == same.get(family, hf.model_type)


def least_of(kind: str) -> dict[str, Any]:
    """Return the smallest config that is valid."""
    least: dict[str, Any] = {"vocab_size": 50, "max_position_embeddings": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
    least |= {"hidden_size": 32, "intermediate_size": 48, "model_type": kind}
    if kind == "falcon":
        least |= {"ffn_hidden_size": 48}
        del least["max_position_embeddings"], least["intermediate_size"]
    if kind == "gpt2":
        least = {"model_type": kind, "n_layer": 6, "n_embd": 32, "n_head": 4, "vocab_size": 50}
    if kind == "gemma3_text":
        del least["vocab_size"], least["max_position_embeddings"], least["num_attention_heads"]
    if kind == "deepseek_v2":
        least["num_experts_per_tok"] = 2
    least["num_key_value_heads"] = 2 if kind not in ("falcon", "gpt2", "gpt_neox", "deepseek_v2", "deepseek_v3", "glm4_moe_lite") else 4
    if kind in ("llama", "phi"):
        least["num_key_value_heads"] = None  # as many as heads
    return least


LISTS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
SAID = [
    ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 500}),
    ("stablelm", {"partial_rotary_factor": 0.75, "rope_theta": 500, "use_qkv_bias": True}),
    ("phi", {"partial_rotary_factor": 0.75, "hidden_act": "gelu"}),
    ("phi3", {"partial_rotary_factor": 0.75, "sliding_window": 9}),
    ("phi3", {"max_position_embeddings": 16384, "rope_scaling": {"type": "longrope", **LISTS}}),
    ("phi3", {"original_max_position_embeddings": 32, "rope_scaling": {"type": "longrope", **LISTS, "attention_factor": 1.5}}),
    ("phi3", {"original_max_position_embeddings": 32, "rope_scaling": {"type": "yarn", **LISTS}}),  # what early files call LongRoPE
    ("llama", {"rope_scaling": {"type": "longrope", **LISTS, "factor": 4.0, "original_max_position_embeddings": 16}}),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8, "beta_slow": 2}}),
    ("mistral", {"sliding_window": None, "head_dim": 6}),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 4}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2, "head_dim": 8}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9, "num_local_experts": 16}),
    ("qwen3_moe", {"mlp_only_layers": [0, 1]}),
    ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 3, "shared_expert_intermediate_size": 1408}),
    ("smollm3", {"no_rope_layer_interval": 3}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 9}),
    ("deepseek_v2", {"q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 2}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1, "rope_interleave": False, "norm_topk_prob": False}),
    ("olmo", {"clip_qkv": 8.0}),
    ("mpt", {"attn_config": {"clip_qkv": 6.0, "attn_impl": "triton"}, "learned_pos_emb": False}),
    ("gemma", {"hidden_act": "gelu"}),
    ("gemma3_text", {"sliding_window_pattern": 3, "rope_theta": 5e5, "rope_local_base_freq": 2e4}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    ("falcon", {"multi_query": False, "parallel_attn": False, "bias": True}),
    ("gpt2", {"n_inner": 80, "activation_function": "gelu"}),
    ("cwm", {"rope_theta": 500.0}),  # which counts beside a scaling only
]


@pytest.mark.parametrize(("kind", "said"), [(kind, {}) for kind in catalog.architectures()] + SAID, ids=str)
def test_what_a_file_leaves_out_is_transformers(kind: str, said: dict[str, Any]) -> None:
    """A short file is read as the file with all that transformers fills in and moves."""
    least = {**least_of(kind), **said}
    config = type(transformers.AutoConfig.for_model(kind)).from_dict(copy.deepcopy(least))
    filled = {**config.to_dict(), "architectures": None}
    assert len(filled) > len(least) + 8
    ours = Config.from_hf(least)
    assert ours == Config.from_hf(filled)
    if getattr(config, "layer_types", None) and ours.sliding_window_size is not None:
        assert ours.sliding_window_indices == [int(kind == configs.LOCAL) for kind in config.layer_types]
    if "rope_scaling" in said:
        factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu")[1]
        assert ours.rope_adjustments is not None and ours.rope_adjustments["attention_factor"] == pytest.approx(factor)


def test_rotary_settings_of_local_and_global_blocks(tmp_path: Path) -> None:
    """rope_scaling is added to what rope_parameters say of the global blocks, and LongRoPE is written as transformers reads it."""
    least = {**least_of("gemma3_text"), "max_position_embeddings": 64, "head_dim": 8, "original_max_position_embeddings": 16}
    nested = {configs.GLOBAL: {"rope_type": "default", "rope_theta": 300.0}, configs.LOCAL: {"rope_type": "default", "rope_theta": 70.0}}
    long = {"rope_type": "longrope", **LISTS}
    theirs = loaded({**least, "rope_parameters": copy.deepcopy(nested), "rope_scaling": long}, tmp_path)
    ours = Config.from_hf({**least, "rope_parameters": nested, "rope_scaling": long})
    again = loaded(to_hf(ours, "gemma3_text"), tmp_path)
    for config in (theirs, again):
        far = config.rope_parameters[configs.GLOBAL]
        assert far["rope_type"] == "longrope" and far["long_factor"] == LISTS["long_factor"]
        assert (far["rope_theta"], config.rope_parameters[configs.LOCAL]["rope_theta"]) == (ours.rope_base, ours.rope_local_base_freq)
    with pytest.raises(UserError, match="rope_parameters lacks full_attention and sliding_attention"):  # transformers ignores it
        Config.from_hf({**least, "rope_parameters": {"rope_type": "linear", "factor": 2.0}})


OLD_LONG = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
SPELLINGS: list[tuple[str, dict[str, Any]]] = [
    ("gpt_neox", {"rope_theta": 5e5}),
    ("gpt_neox", {"rotary_emb_base": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("olmo3", {"rope_theta": 2.5e5}),
    ("olmo3", {"rope_theta": 2.5e5, "rope_scaling": OLD_LONG}),
    ("olmo3", {"rope_theta": 2.5e5, "rope_scaling": {**OLD_LONG, "rope_type": "yarn"}}),
    ("olmo3", {"rope_parameters": {configs.GLOBAL: {**OLD_LONG, "rope_theta": 300.0}, configs.LOCAL: None}}),
    ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 8.0}}),
    ("gemma3_text", {"rope_scaling": {"type": "default", "rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 3e4}),
    ("gemma3_text", {"rope_parameters": {configs.GLOBAL: {"type": "linear", "factor": 8.0}}}),
    ("gemma3_text", {"rope_parameters": {configs.GLOBAL: None, configs.LOCAL: {"rope_type": "default", "rope_theta": 70.0}}}),
    ("phi3", {"rope_parameters": {**OLD_LONG, **LISTS, "rope_type": "default"}}),
    ("llama", {"rope_scaling": {"type": "llama3", "rope_type": "linear", "factor": 2.0}, "rope_parameters": OLD_LONG}),
]


@pytest.mark.parametrize(("kind", "said"), SPELLINGS, ids=str)
def test_rotary_settings_in_every_spelling(kind: str, said: dict[str, Any]) -> None:
    """The frequencies are those of transformers' model, bit for bit."""
    least = {**least_of(kind), "max_position_embeddings": 64, "pad_token_id": None, **said}
    config = type(transformers.AutoConfig.for_model(kind)).from_dict(copy.deepcopy(least))
    theirs = dict(transformers.AutoModel.from_config(config).rotary_emb.named_buffers())
    ours = Config.from_hf(copy.deepcopy(least))
    name = next(name for name in (f"{configs.GLOBAL}_inv_freq", "inv_freq") if name in theirs)
    assert torch.equal(frequencies(ours), theirs[name])
    if (local := theirs.get(f"{configs.LOCAL}_inv_freq")) is not None:
        assert ours.rope_local_base_freq is not None
        assert torch.equal(plain_frequencies(ours, ours.rope_local_base_freq), local)


def distinct() -> list[str]:
    """Return a name for each different row of the catalogue."""
    rows = {
        str({key: value for key, value in (catalog.find(name) or {}).items() if key not in ("name", "hf_config")}): name
        for name in catalog.names()
    }
    return sorted(rows.values())


@pytest.mark.parametrize("name", quick(distinct(), *distinct()[::8]))
def test_every_named_model_is_written(name: str, tmp_path: Path) -> None:
    """transformers loads what is written, and reading that gives the same model."""
    config = Config.from_name(name)
    again = loaded(to_hf(config), tmp_path)
    back = Config.from_hf(again.to_dict(), name=name)
    ignored = {
        "name",
        "hf_config",
        "vocab_size",
        "padding_multiple",
        "gelu_approximate",
        "attention_scores_scalar",
        "moe_intermediate_size",
    }
    one, other = ({k: v for k, v in c.base_dict().items() if k not in ignored} for c in (config, back))
    assert same(one, other), (one, other)
    assert (back.attention_scores_scalar or back.head_size) == (config.attention_scores_scalar or config.head_size)
    assert to_hf(back)["model_type"] == again.model_type


def test_models_with_images_are_read_as_text_models() -> None:
    text = configs.hf_config("gemma3 linear")
    whole = transformers.Gemma3Config(text_config=text.to_dict())
    assert Config.from_hf(whole.to_dict()) == Config.from_hf(text.to_dict())
    hub = {"model_type": "gemma3", "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}}
    hub["text_config"] |= {"sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # all that Gemma 3 4B's says
    named = Config.from_name("Gemma-3-4b-it")
    assert Config.from_hf(hub, name=named.name, hf_config=named.hf_config, vocab_size=262144) == Config(
        **{**named.base_dict(), "padding_multiple": 512}
    )


LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 30},
        ["shared_expert_intermediate_size 30", "moe_intermediate_size, 1408"],
    ),
    ({"model_type": "qwen2_moe", "mlp_only_layers": [1]}, ["mlp_only_layers [1]", "all blocks but the first"]),
    ({"model_type": "deepseek_v32"}, ["'deepseek_v32'", "indexer"]),
    ({"model_type": "deepseek_v3", "scoring_func": "softmax"}, ["scoring_func 'softmax'", "'sigmoid'"]),
    ({"model_type": "deepseek_v2", "norm_topk_prob": True}, ["norm_topk_prob True", "lacks the key 'num_experts_per_tok'"]),
    ({"model_type": "deepseek_v2", "num_experts_per_tok": 2, "topk_method": "best"}, ["topk_method 'best'", "'greedy'"]),
    ({"model_type": "deepseek_v2", "num_experts_per_tok": 2, "q_lora_rank": 0}, ["latent_attention", "q_lora_rank is 0"]),
    ({"model_type": "deepseek_v2", "num_experts_per_tok": 2, "num_key_value_heads": 2}, ["latent_attention", "n_query_groups 2"]),
    ({"model_type": ["llama"]}, ["model_type", "['llama']"]),
    ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config", "awq"]),
    ({"attention_bias": True}, ["attention_bias True", "mlp_bias False"]),
    ({"hidden_act": "relu"}, ["hidden_act 'relu'", "'silu'"]),
    ({"rope_scaling": {"type": "proportional", "factor": 2.0}}, ["'proportional'", "yarn"]),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}}, ["lacks the key 'low_freq_factor'"]),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, ["factor", "'2'"]),
    ({"rope_scaling": "linear"}, ["rope_scaling", "'linear'"]),
    (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": "x"}},
        ["original_max_position_embeddings", "'x'"],
    ),
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters", "type of layer"]),
    ({"model_type": "gpt_neox", "attention_bias": False}, ["attention_bias False"]),
    ({"model_type": "gpt_neox", "hidden_act": "relu"}, ["hidden_act 'relu'", "'gelu'"]),
    ({"model_type": "falcon", "new_decoder_architecture": True, "parallel_attn": False}, ["new_decoder_architecture", "parallel_attn"]),
    ({"model_type": "stablelm", "qk_layernorm": True}, ["qk_layernorm True"]),
    ({"model_type": "phi", "qk_layernorm": True}, ["qk_layernorm True"]),
    ({"model_type": "olmo", "clip_qkv": "8"}, ["clip_qkv is '8'", "positive number"]),
    ({"model_type": "mpt", "attn_config": {"alibi": False, "alibi_bias_max": 16}}, ["attn_config with alibi False, alibi_bias_max 16"]),
    ({"model_type": "bloom", "apply_residual_connection_post_layernorm": True}, ["apply_residual_connection_post_layernorm True"]),
    ({"model_type": "gemma", "use_bidirectional_attention": True}, ["use_bidirectional_attention True"]),
    ({"model_type": "gemma2", "layer_types": ["full_attention", "chunked_attention"]}, ["layer_types", "chunked_attention"]),
    ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, ["attn_logit_softcapping 50.0"]),
    (
        {
            "model_type": "gemma3_text",
            "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}, "full_attention": {}},
        },
        ["'linear'", "sliding_attention"],
    ),
    ({"model_type": "qwen3_moe", "mlp_only_layers": [0, 2]}, ["mlp_only_layers [0, 2]"]),
    ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, ["decoder_sparse_step 2"]),
    ({"model_type": "smollm3", "no_rope_layers": [1]}, ["no_rope_layers", "1 entries"]),
    ({"model_type": "granite", "attention_multiplier": 0}, ["attention_multiplier", "0"]),
    ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse_layer_idx True"]),
    ({"model_type": "gpt2", "add_cross_attention": True, "activation_function": "relu"}, ["add_cross_attention True", "'relu'"]),
    ({"num_hidden_layers": "two", "model_type": "smollm3"}, ["'two'"]),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[str(case[0])[:70] for case in REFUSED])
def test_what_cannot_be_built_is_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Config.from_hf({**LLAMA, **changes})
    assert all(word in str(caught.value) for word in words), caught.value
    Config.from_hf(LLAMA)


def test_all_problems_are_in_one_message() -> None:
    with pytest.raises(UserError) as caught:
        Config.from_hf(
            {"model_type": "olmo", "attention_bias": True, "hidden_act": "relu", "rope_scaling": {"type": "ntk"}, "hidden_size": 8}
        )
    lacks = "lacks the keys 'max_position_embeddings', 'vocab_size'"
    for word in ("attention_bias", "hidden_act", "ntk", lacks, "'intermediate_size'"):
        assert word in str(caught.value)


def test_biases_in_all_layers_or_in_none() -> None:
    """Granite's code models are Llama's decoder with biases."""
    config = Config.from_hf({**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert config.bias and not Config.from_hf(LLAMA).bias
    assert to_hf(config)["attention_bias"] is to_hf(config)["mlp_bias"] is True


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"factor": 4.0}, 1.1386294361),
        ({"factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.9}, 0.9753496504),
        ({"factor": 4.0, "mscale": 0.7}, 1.1386294361),
        ({"factor": 4.0, "attention_factor": 1.3}, 1.3),
        ({"factor": 0.5}, 1.0),
        ({"factor": None, "original_max_position_embeddings": 8}, 1.2079441542),
    ],
)
def test_yarn_factor_of_attention(scaling: dict[str, Any], expected: float) -> None:
    """As transformers 5.23 computes it."""
    config = Config.from_hf({**LLAMA, "rope_scaling": {"rope_type": "yarn", **scaling}})
    assert config.rope_adjustments is not None
    assert config.rope_adjustments["attention_factor"] == pytest.approx(expected)
    assert config.rope_adjustments["original_max_seq_len"] == scaling.get("original_max_position_embeddings", 64)
    assert (config.rope_adjustments["beta_fast"], config.rope_adjustments["beta_slow"]) == (32, 1)


def test_longrope_is_written_for_both_versions() -> None:
    """transformers 4 allows nothing beside the two lists."""
    config = Config.from_name("Phi-4-mini-instruct")
    assert to_hf(config)["rope_scaling"].keys() == {"type", "short_factor", "long_factor"}
    assert "attention_factor" in to_hf(Config.from_name("Phi-4-mini-instruct", block_size=4096))["rope_scaling"]


def test_norms_and_groups_of_parallel_blocks() -> None:
    """One norm for both branches, except for Falcon's large models and GPT-NeoX."""
    shared = {}
    for family in ("falcon", "falcon new decoder", "stablelm parallel", "phi", "gpt_neox", "gpt_neox sequential"):
        config = Config.from_hf(configs.hf_config(family).to_dict())
        shared[family] = (config.parallel_residual, config.shared_attention_norm, config.n_query_groups)
    assert shared == {
        "falcon": (True, True, 1),
        "falcon new decoder": (True, False, 2),
        "stablelm parallel": (True, True, 2),
        "phi": (True, True, 4),
        "gpt_neox": (True, False, 4),
        "gpt_neox sequential": (False, False, 4),
    }


def test_vocabulary_is_the_embedding() -> None:
    config = Config.from_hf({**LLAMA, "vocab_size": 60001})
    assert (config.vocab_size, config.padded_vocab_size) == (60001, 60001)


def test_architecture_of_named_and_nameless_models() -> None:
    mistral = Config.from_name("Mistral-7B-v0.3")
    assert to_hf(mistral)["model_type"] == "mistral"
    nameless = Config(**{**mistral.base_dict(), "name": "", "hf_config": {}})
    assert to_hf(nameless)["model_type"] == "llama"
    assert to_hf(nameless, "mistral")["model_type"] == "mistral"
    scaled = Config.from_name("Mistral-7B-v0.1", rope_adjustments={"factor": 4.0})
    assert to_hf(Config(**{**scaled.base_dict(), "name": "", "hf_config": {}}))["model_type"] == "mistral"
    assert to_hf(nameless, "gpt2")["model_type"] == "llama"  # GPT-2 cannot be this
    assert to_hf(Config.from_name("pythia-14m", attn_bias=True))["model_type"] == "gpt_neox"  # bias implies it
    assert to_hf(Config.from_name("Llama-2-7b-hf", gelu_approximate="tanh", rope_indices=[0] * 32))["model_type"] == "llama"  # unused
    linear = Config.from_name("Llama-2-7b-hf", rope_adjustments={"factor": 4.0})
    assert to_hf(linear)["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Llama-2-7b-hf", {"parallel_residual": True}, ["the nearest, llama", "parallel_residual False instead of True"]),
        ("Llama-2-7b-hf", {"scale_embeddings": True}, ["scale_embeddings False instead of True"]),
        ("pythia-14m", {"norm_1": False}, ["the nearest, gpt_neox, has norm_1 True instead of False"]),
        ("gpt2", {"lm_head_bias": True}, ["lm_head_bias"]),
        (
            "Mistral-7B-v0.1",
            {"sliding_window_indices": [1, 0] * 16, "n_query_groups": 32, "attn_bias": True, "norm_qk": True},
            ["instead of"],
        ),
    ],
)
def test_what_no_architecture_expresses(name: str, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="no architecture of transformers expresses this model") as caught:
        to_hf(Config.from_name(name, **changes))
    assert all(word in str(caught.value) for word in words), caught.value
