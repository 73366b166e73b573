"""Named models, config files, Hugging Face configs, and what each refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from litgpt import config, families as catalog
from litgpt.config import Config
from litgpt.errors import UserError
from tests.helpers import family_configs, tiny

LATENT = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
EXPERTS = {"mlp_class_name": "LLaMAMoE", "intermediate_size": 8, "n_expert": 4, "n_expert_per_token": 2}


def test_defaults_and_derived_sizes() -> None:
    """LitGPT's defaults are Pythia-like."""
    config = Config()
    assert (config.n_layer, config.n_embd, config.n_head, config.head_size, config.n_query_groups) == (16, 4096, 32, 128, 32)
    assert (config.padded_vocab_size, config.intermediate_size, config.rope_n_elem) == (50688, 16384, 32)
    small = Config(vocab_size=100, padding_multiple=64, n_embd=64, n_head=8, n_query_groups=2, rotary_percentage=1.0)
    assert (small.padded_vocab_size, small.head_size, small.qkv_sizes, small.rope_n_elem) == (128, 8, (64, 16, 16), 8)
    assert Config(vocab_size=128, padding_multiple=64).padded_vocab_size == 128
    assert Config(vocab_size=100, padded_vocab_size=90).vocab_size == 90


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_embd": 30, "n_head": 4}, ["n_embd", "30", "n_head", "4"]),
        ({"n_head": 6, "n_embd": 60, "n_query_groups": 4}, ["n_head", "6", "n_query_groups", "4"]),
        ({"mlp_class_name": "LLaMAMLP"}, ["LLaMAMLP", "intermediate_size"]),
        ({"mlp_class_name": "DeepMLP", "name": "deep"}, ["mlp_class_name", "DeepMLP", "deep", "LLaMAMLP"]),
        ({"norm_class_name": "GroupNorm"}, ["norm_class_name", "GroupNorm", "RMSNorm"]),
        ({"norm_qk_type": "olmo3"}, ["norm_qk_type", "olmo3"]),
        ({"gelu_approximate": "erf"}, ["gelu_approximate", "erf", "tanh"]),
        ({"mlp_class_name": "LLaMAMoE", "intermediate_size": 8}, ["n_expert 0", "n_expert_per_token 0"]),
        ({"mlp_class_name": "LLaMAMoE", "intermediate_size": 8, "n_expert": 4, "n_expert_per_token": 5}, ["n_expert 4", "5"]),
        ({"n_expert": -1}, ["n_expert", "-1"]),
        ({"n_shared_expert": 1}, ["n_shared_expert", "LLaMAMoE"]),
        ({"clip_qkv": 0.0}, ["clip_qkv is 0.0"]),
        ({"alibi": True, "sliding_window_size": 8}, ["alibi does not go with sliding_window_size"]),
        ({"rope_interleave": True}, ["rope_interleave", "latent_attention"]),
        ({"latent_attention": {"kv_lora_rank": 8}}, ["latent_attention", "v_head_dim"]),
        ({"latent_attention": {**LATENT, "kv_lora_rank": None}, "bias": False}, ["kv_lora_rank is None"]),
        ({"latent_attention": LATENT}, ["latent_attention does not go with bias True"]),
        ({"latent_attention": LATENT, "bias": False, "n_head": 4, "n_embd": 32, "n_query_groups": 2}, ["n_query_groups 2"]),
        ({"latent_attention": {**LATENT, "qk_rope_head_dim": 3}, "bias": False}, ["is 3: pairs are rotated"]),
        ({**EXPERTS, "shared_expert_gate": True}, ["shared_expert_gate", "n_shared_expert"]),
        ({**EXPERTS, "n_shared_expert": "2"}, ["n_shared_expert", "'2'"]),
        ({**EXPERTS, "first_k_dense_replace": 99}, ["first_k_dense_replace is 99"]),
        ({**EXPERTS, "n_topk_groups": 2}, ["n_topk_groups", "need n_expert_groups"]),
        ({**EXPERTS, "n_expert_groups": 3}, ["n_expert_groups 3", "n_expert 4"]),
        ({**EXPERTS, "n_expert_groups": 4, "n_topk_groups": 2, "n_topk_scores_per_group": 2}, ["n_topk_scores_per_group 2"]),
        ({**EXPERTS, "n_expert_groups": 4, "n_topk_groups": 1, "n_topk_scores_per_group": 1}, ["n_expert_per_token 2"]),
        (
            {**EXPERTS, "n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 2, "router_aux_loss_coef": 0.1},
            ["router_aux_loss_coef", "bias"],
        ),
        ({"moe_intermediate_size": 0}, ["moe_intermediate_size", "0"]),
        ({"shared_attention_norm": True, "parallel_residual": False}, ["shared_attention_norm", "parallel_residual"]),
        ({"n_layer": 3, "sliding_window_size": 8, "sliding_window_indices": [1, 0]}, ["sliding_window_indices", "2 entries", "3 blocks"]),
        ({"n_layer": 2, "sliding_window_indices": "10"}, ["sliding_window_indices", "2 blocks"]),
        ({"n_layer": 2, "rope_indices": [0, 2]}, ["rope_indices", "2", "-1, 0, 1"]),
        ({"n_layer": 2, "rope_indices": [0, 1]}, ["rope_indices", "rope_local_base_freq"]),
        ({"norm_eps": "small"}, ["norm_eps", "small"]),
        ({"rope_base": 0}, ["rope_base", "0"]),
        ({"rope_base": 10**30}, ["rope_base", "at most 1e+18"]),
        ({"attention_logit_softcapping": 10**30}, ["attention_logit_softcapping", "at most 1e+18"]),
        ({"hf_config": 5}, ["hf_config is 5"]),
        ({"hf_config": {"name": [5]}}, ["name is [5]"]),
        ({"final_logit_softcapping": -30.0}, ["final_logit_softcapping", "-30.0"]),
        ({"attention_scores_scalar": float("nan")}, ["attention_scores_scalar", "nan"]),
        ({"rotary_percentage": 1.5}, ["rotary_percentage", "1.5"]),
        ({"router_aux_loss_coef": "x"}, ["router_aux_loss_coef", "'x'"]),
        ({"n_embd": 64, "n_head": 8, "rotary_percentage": 0.4}, ["rotary_percentage", "0.4", "3"]),
        ({"rope_adjustments": 8.0}, ["rope_adjustments", "8.0"]),
        ({"rope_adjustments": {"factor": 0}}, ["rope_adjustments", "factor is 0"]),
        (
            {"rope_adjustments": {"factor": 8.0, "low_freq_factor": 1.0, "colour": 1}},
            ["high_freq_factor is missing", "colour is not known"],
        ),
        ({"rope_adjustments": {"rope_type": "ntk", "factor": 8.0}}, ["rope_adjustments", "ntk", "yarn"]),
        ({"rope_adjustments": {"rope_type": "yarn", "factor": 8.0}}, ["beta_fast is missing", "attention_factor is missing"]),
        ({"rope_adjustments": {"rope_type": "longrope", "short_factor": [1.0]}}, ["short_factor must list 16", "long_factor is missing"]),
    ],
)
def test_impossible_settings(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Config(**settings)
    assert all(word in str(caught.value) for word in words), caught.value


def test_from_name() -> None:
    config = Config.from_name("Llama-2-7b-hf", block_size=128)
    assert (config.name, config.block_size, config.n_layer) == ("Llama-2-7b-hf", 128, 32)
    assert config.hf_config == {"org": "meta-llama", "name": "Llama-2-7b-hf"}
    assert Config.from_name("meta-llama/Llama-2-7b-hf") == Config.from_name("Llama-2-7b-hf")
    assert Config.from_name("meta-llama/Meta-Llama-3-8B").name == "Llama-3-8B"  # by the hub's name
    assert Config.from_name("Gemma-2-2b", n_layer=3).sliding_window_indices == [1, 0, 1]  # of its first blocks


@pytest.mark.parametrize("name", ["Lama-2-7b-hf", "someone/Llama-2-7b-hf", "meta-llama/Llama-2-7b"])
def test_from_name_suggests(name: str) -> None:
    with pytest.raises(UserError, match="Llama-2-7b-hf") as caught:
        Config.from_name(name)
    assert repr(name) in str(caught.value)


def test_every_named_model_is_consistent() -> None:
    for name in catalog.names():
        config = Config.from_name(name)
        assert config.name == name
        assert config.rope_n_elem % 2 == 0


# What the models' config.json on the hub say.
HUB: dict[str, dict[str, Any]] = {
    "Llama-2-7b-hf": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "Llama-3.2-1B": {
        "model_type": "llama",
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    "SmolLM2-135M": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000,
        "vocab_size": 49152,
    },
    "Mistral-7B-v0.1": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 4096,  # 32768 on the hub; LitGPT stops at the window
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 32000,
    },
    "pythia-160m": {
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
}


@pytest.mark.parametrize("name", HUB)
def test_named_models_agree_with_the_hub(name: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(HUB[name]))
    described, named = Config.from_hf(file).base_dict(), Config.from_name(name).base_dict()
    ignored = ("name", "hf_config", "vocab_size", "padding_multiple")  # the unpadded vocabulary is not in config.json
    assert {key: described[key] for key in described if key not in ignored} == {key: named[key] for key in named if key not in ignored}


def test_from_hf_reads_old_and_new_rotary_keys() -> None:
    """transformers 5 moved rope_theta and rope_scaling into rope_parameters."""
    new = {key: value for key, value in HUB["Llama-3.2-1B"].items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**HUB["Llama-3.2-1B"]["rope_scaling"], "rope_theta": 500000.0}
    assert Config.from_hf(new) == Config.from_hf(HUB["Llama-3.2-1B"])
    neox = {key: value for key, value in HUB["pythia-160m"].items() if not key.startswith("rot")}
    neox["rope_parameters"] = {"rope_theta": 10000, "rope_type": "default", "partial_rotary_factor": 0.25}
    assert Config.from_hf(neox) == Config.from_hf(HUB["pythia-160m"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, ["mamba", "llama", "gpt_neox"]),
        ({"model_type": None}, ["model_type"]),
        ({"hidden_act": "relu"}, ["hidden_act", "relu", "silu"]),
        ({"attention_bias": True}, ["attention_bias", "True"]),
        ({"mlp_bias": True}, ["mlp_bias", "True"]),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, ["ntk", "llama3"]),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": {"type": "linear", "factor": 2.0}}},
            ["'linear' of sliding_attention"],
        ),
        ({"model_type": "gemma3_text", "partial_rotary_factor": 0.5}, ["partial_rotary_factor 0.5"]),
    ],
)
def test_from_hf_refuses(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**HUB["Llama-2-7b-hf"], **changes}))
    with pytest.raises(UserError) as caught:
        Config.from_hf(file)
    assert all(word in str(caught.value) for word in [str(file), *words]), caught.value


@pytest.mark.parametrize("share", [None, 0.5, "left out"])
def test_the_share_of_rotated_dimensions_as_in_transformers(share: float | str | None, tmp_path: Path) -> None:
    hf = {**HUB["Llama-2-7b-hf"], "model_type": "stablelm", "partial_rotary_factor": share}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({key: value for key, value in hf.items() if value != "left out"}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert Config.from_hf(file).rotary_percentage == theirs.get("partial_rotary_factor", 1.0)


@pytest.mark.parametrize(
    ("family", "key", "other"),
    [
        ("gpt2", "n_layer", "num_hidden_layers"),
        ("gpt2", "n_positions", "max_position_embeddings"),
        ("bloom", "hidden_size", "n_embed"),
        ("mpt", "n_layers", "num_hidden_layers"),
        ("mixtral", "num_local_experts", "num_experts"),
        ("olmoe", "num_experts", "num_local_experts"),
        ("qwen3_moe", "num_local_experts", "num_experts"),
        ("glm4_moe", "n_routed_experts", "num_local_experts"),
        ("gpt_oss", "num_experts_per_tok", "experts_per_token"),  # which transformers does not read
    ],
)
def test_two_names_of_a_key_as_in_transformers(family: str, key: str, other: str, tmp_path: Path) -> None:
    hf = family_configs.hf_config(family, layer_types=None).to_dict()
    value = hf.pop(key)
    null = [{key: value, other: None}] if other == "n_embed" else []  # elsewhere transformers refuses it
    for names in ({other: value}, {key: value, other: 2 * value}, {other: 2 * value, key: value}, *null):
        (tmp_path / "config.json").write_text(json.dumps({**hf, **names}))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
        ours = Config.from_hf(tmp_path / "config.json", name="", hf_config={})
        assert ours.base_dict() == Config.from_hf(theirs, name="", hf_config={}).base_dict(), names


def test_from_hf_broken_files(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(UserError, match=r"config\.json is missing"):
        Config.from_hf(file)
    file.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Config.from_hf(file)
    file.write_text('{"model_type": "llama", "hidden_size": 8}')
    with pytest.raises(UserError, match="lacks the keys 'max_position_embeddings'"):
        Config.from_hf(file)
    file.write_text("[1, 2]")
    with pytest.raises(UserError, match=r"config\.json"):
        Config.from_hf(file)


def test_file_round_trip(tmp_path: Path) -> None:
    config = Config.from_name("Llama-3.2-1B")
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(config.base_dict()))
    assert Config.from_checkpoint(tmp_path) == config
    assert Config.from_checkpoint(tmp_path, block_size=77).block_size == 77


def test_litgpt_file_with_unused_fields(tmp_path: Path) -> None:
    """LitGPT writes all its fields; those of other architectures load where they say "not used"."""
    extra = {
        "scale_embeddings": False,
        "n_expert": 0,
        "norm_qk": False,
        "final_logit_softcapping": None,
        "norm_1": True,
        "rope_indices": None,
    }
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump({**tiny.TINY, **extra}))
    assert Config.from_checkpoint(tmp_path) == Config(**tiny.TINY)


def test_what_litgpts_files_mean_without_saying_it(tmp_path: Path) -> None:
    """Its experts' weights always sum to 1 whatever `norm_topk_prob` says, and its OLMo has norms without weights."""
    file = tmp_path / "model_config.yaml"
    fields = {**tiny.TINY, "norm_topk_prob": False, "norm_class_name": "LayerNorm", "name": "OLMo-1B-hf"}
    file.write_text(yaml.safe_dump({**fields, "n_shared_expert": None}))
    litgpts = Config.from_file(file)
    assert litgpts.norm_topk_prob and not litgpts.norm_affine
    file.write_text(yaml.safe_dump({**fields, "norm_affine": True}))
    own = Config.from_file(file)
    assert own.norm_affine and not own.norm_topk_prob
    groups = {**EXPERTS, "n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 2, "norm_topk_prob": False}
    file.write_text(yaml.safe_dump({**tiny.TINY, **groups, "latent_attention": None}))
    assert not Config.from_file(file).norm_topk_prob  # which it reads of experts in groups


def test_file_lists_every_problem(tmp_path: Path) -> None:
    file = tmp_path / "model_config.yaml"
    file.write_text(yaml.safe_dump({**tiny.TINY, "rope_interleaved": True, "colour": "red", "n_layers": 3}))
    with pytest.raises(UserError) as caught:
        Config.from_file(file)
    message = str(caught.value)
    for part in (
        str(file),
        "unknown field 'rope_interleaved' (did you mean rope_interleave?)",
        "unknown field 'colour'",
        "unknown field 'n_layers'",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("text", "words"), [(None, "is missing"), ("a: [", "not valid YAML"), ("", "holds no settings"), ("- 1", "no settings")]
)
def test_broken_files(text: str | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "model_config.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=words) as caught:
        Config.from_file(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_layer": "many"}, ["n_layer", "many"]),
        ({"n_head": 0}, ["n_head", "0"]),
        ({"n_embd": None}, ["n_embd"]),
        ({"vocab_size": -3}, ["vocab_size"]),
    ],
)
def test_values_of_the_wrong_kind_in_a_file(settings: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "model_config.yaml"
    file.write_text(yaml.safe_dump({**tiny.TINY, **settings}))
    with pytest.raises(UserError) as caught:
        Config.from_file(file)
    assert all(word in str(caught.value) for word in words), caught.value


def test_config_is_light() -> None:
    code = "import sys, litgpt.config; print([m for m in ('torch', 'numpy', 'transformers', 'lightning') if m in sys.modules])"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


def test_litgpts_names() -> None:
    assert [config.find_multiple(*pair) for pair in ((17, 5), (10, 2), (5, 10))] == [20, 10, 10]
    assert [row["name"] for row in config.configs] == list(config.name_to_config) and "pythia-14m" in config.name_to_config
    assert Config(hf_config={"name": "pythia-14m"}).name == "pythia-14m"
