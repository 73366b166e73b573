"""Named models have LitGPT 0.5.13's sizes and the published numbers of parameters."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from litgpt import families as catalog
from litgpt.config import Config
from litgpt.convert.compare import essence
from litgpt.model import GPT
from litgpt.prompts import STYLES, model_name_to_prompt_style
from tests.helpers.cases import quick

DEFAULTS: dict[str, Any] = {
    "block_size": 4096,
    "n_layer": 16,
    "n_embd": 4096,
    "vocab_size": 50254,
    "padding_multiple": 512,
    "norm_class_name": "LayerNorm",
    "norm_eps": 1e-5,
    "norm_qk": False,
    "norm_qk_type": "default",
    "post_attention_norm": False,
    "post_mlp_norm": False,
    "parallel_residual": True,
    "shared_attention_norm": False,
    "n_head": 32,
    "attn_bias": False,
    "attention_scores_scalar": None,
    "sliding_window_size": None,
    "sliding_window_indices": None,
    "attention_logit_softcapping": None,
    "rope_base": 10000,
    "rotary_percentage": 0.25,
    "rope_condense_ratio": 1,
    "rope_adjustments": None,
    "moe_intermediate_size": None,
    "bias": True,
    "mlp_class_name": "GptNeoxMLP",
    "gelu_approximate": "none",
    "n_expert": 0,
    "n_expert_per_token": 0,
    "scale_embeddings": False,
    "lm_head_bias": False,
    "final_logit_softcapping": None,
    "norm_1": True,
    "norm_2": True,
    "rope_local_base_freq": None,
    "rope_indices": None,
}
"""LitGPT's. Its other fields are in every row of the file, are for what is not built here, or mean something else (norm_topk_prob)."""

DIFFERENT: dict[str, dict[str, Any]] = {
    **{
        name: {"norm_eps": 1e-6}  # as all of Google's config.json say
        for name in catalog.names()
        if "Gemma" in name
    },
    "stable-code-3b": {"rope_base": 1000000},
    "Platypus2-70B": {"n_query_groups": 8},  # it is Llama 2 70B
    "Mathstral-7B-v0.1": {"sliding_window_size": None, "sliding_window_indices": None},
}
"""where LitGPT's figures are not those of the published checkpoints"""
for _name in ("Gemma-3-4b-it", "Gemma-3-12b-it", "Gemma-3-27b-it"):
    DIFFERENT[_name] = {"norm_eps": 1e-6, "padded_vocab_size": 262208}
LARGE = ("DeepSeek-V2", "DeepSeek-V2-Lite", "DeepSeek-V3", "Moonlight-16B-A3B", "Qwen1.5-MoE-A2.7B")  # thousands of experts
LONG = ("Phi-3-mini-128k-instruct", "Phi-3.5-mini-instruct", "Phi-4-mini-instruct", "Phi-4-mini-reasoning")
"""LitGPT leaves out their LongRoPE"""


def rows() -> dict[str, dict[str, Any]]:
    """name: LitGPT 0.5.13's fields with values other than its defaults. In the file: names by the hub's, `name=hub` where they differ."""
    found = {}
    for names, row in json.loads((Path(__file__).parent / "litgpt_0_5_13.json").read_text()).items():
        for key in ("sliding_window_indices", "rope_indices"):
            if key in row:
                row[key] = [int(digit) for digit in row[key]]
        for entry in names.split():
            name, _, hub = entry.rpartition("=")
            org, _, short = hub.partition("/")
            found[name or short] = {**row, "hf_config": {"org": org, "name": short}}
    return found


def test_all_of_litgpt() -> None:
    assert len(rows()) == 210
    assert not set(rows()) - set(catalog.names())


@pytest.mark.parametrize(("name", "row"), rows().items())
def test_figures_of_litgpt(name: str, row: dict[str, Any]) -> None:
    ours = Config.from_name(name).base_dict()
    expected = {**DEFAULTS, **row, **DIFFERENT.get(name, {})}
    if name in LONG:
        expected["rope_adjustments"] = ours["rope_adjustments"]
    assert {key: ours[key] for key in expected} == expected
    for key, value in DIFFERENT.get(name, {}).items():
        assert {**DEFAULTS, **row}[key] != value, f"{key} is no difference"
    new = {
        "learned_positions": False,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "norm_topk_prob": True,
    }
    assert {key: ours[key] for key in new} == new


OTHER_STYLES = {  # than LitGPT's, by the chat templates that the models are published with
    "Default": "OLMo-1B-hf OLMo-7B-hf",  # base models, without a template
    "OLMo": (
        "OLMo-2-1124-7B-SFT OLMo-2-1124-7B-DPO OLMo-2-1124-7B-Instruct OLMo-2-1124-13B-SFT OLMo-2-1124-13B-DPO OLMo-2-1124-13B-Instruct"
    ),
    "CodeLlama": "CodeLlama-34b-Instruct-hf",
    "Mistral": "Mistral-7B-Instruct-v0.1 Mixtral-8x7B-Instruct-v0.1 Mistral-7B-Instruct-v0.2",
    "MistralV3": (  # no space before [/INST], which is a token of its own
        "Mistral-7B-Instruct-v0.3 Mixtral-8x22B-Instruct-v0.1 Mathstral-7B-v0.1 Mistral-Large-Instruct-2407 Mistral-Large-Instruct-2411"
    ),
}


def test_prompt_styles_of_litgpt() -> None:
    theirs = json.loads((Path(__file__).parent / "litgpt_0_5_13_styles.json").read_text())
    by_name, other = ({name: style for style, names in of.items() for name in names.split()} for of in (theirs, OTHER_STYLES))
    expected = {name: by_name.get(name, "Default") for name in rows()}
    assert all(expected[name] != style for name, style in other.items())
    assert {name: type(model_name_to_prompt_style(name)).__name__ for name in expected} == expected | other


@pytest.mark.parametrize("name", LONG)
def test_longrope(name: str) -> None:
    """GGUF files of these models state the factor of attention as 1.190238."""
    config = Config.from_name(name)
    assert config.rope_adjustments is not None
    assert config.rope_adjustments["attention_factor"] == pytest.approx(1.190238118)
    for key in ("short_factor", "long_factor"):
        factors = config.rope_adjustments[key]
        assert len(factors) == config.rope_n_elem / 2 and factors == sorted(factors) and factors[0] >= 1


# As published: the sum of the tensors on the hub, a tied head counted once.
PARAMETERS = {
    "gpt2": 124439808,
    "gpt2-medium": 354823168,
    "gpt2-large": 774030080,
    "gpt2-xl": 1557611200,
    "distilgpt2": 81912576,
    "SmolLM2-135M": 134515008,
    "SmolLM-1.7B": 1711376384,
    "SmolLM3-3B": 3075098624,
    "Llama-2-70b-hf": 68976648192,
    "Platypus2-70B": 68976648192,
    "Llama-3.2-1B": 1235814400,
    "Mistral-7B-v0.1": 7241732096,
    "Mistral-Nemo-Base-2407": 12247782400,
    "Mistral-Small-24B-Base-2501": 23572403200,
    "Mixtral-8x7B-v0.1": 46702792704,
    "Qwen1.5-1.8B": 1836828672,
    "Qwen1.5-MoE-A2.7B": 14315784192,
    "Qwen1.5-4B": 3950369280,
    "Qwen2-1.5B": 1543714304,
    "Qwen2.5-0.5B": 494032768,
    "R1-Distill-Qwen-1.5B": 1777088000,
    "Qwen3-0.6B": 596049920,
    "bloom-560m": 559214592,
    "bloom-7b1": 7069016064,
    "bloom": 176247271424,
    "mpt-7b": 6649286656,
    "DeepSeek-V2-Lite": 15706484224,
    "DeepSeek-V2": 235741434880,
    "DeepSeek-V3": 671026419200,  # without the module that predicts a second token
    "Moonlight-16B-A3B": 15960111936 - 27 * 64,  # without rotary tables
    "Gemma-2-2b": 2614341888,
    "Gemma-3-270m": 268098176,
    "Gemma-3-1b-it": 999885952,
    "Gemma-3-4b-it": 4300079472 - 416866032 - 2950272,  # without the image encoder and its projection
    "phi-2": 2779683840,
    "Phi-3-mini-4k-instruct": 3821079552,
    "Phi-4-mini-instruct": 3836021760,
    "OLMo-1B-hf": 1176764416,
    "OLMo-2-0425-1B": 1484916736,
    "OLMo-2-0325-32B": 32234279936,
    "pythia-160m": 162322944,
    "gpt-neox-20b": 20554567680,
    "falcon-7b": 6921720704,
    "stablelm-2-1_6b": 1644515328,
    "h2o-danube2-1.8b-base": 1831201280,
    "h2o-danube3-500m-base": 513590784,
    "h2o-danube3-4b-base": 3961839360,
    "granite-3.0-2b-base": 2533531648,
    "granite-3.0-8b-base": 8170848256,
}
TIED = (
    "gpt2",
    "bloom",
    "mpt",
    "distilgpt2",
    "Smol",
    "Llama-3.2",
    "Qwen2",
    "Qwen3-0.6B",
    "Gemma",
    "Phi-4-mini",
    "OLMo-1B",
    "falcon-7b",
    "granite",
)


@pytest.mark.parametrize(
    ("name", "published"),
    quick(PARAMETERS.items(), *(row for row in list(PARAMETERS.items())[::4] if row[0] not in LARGE)),
)
def test_parameters(name: str, published: int) -> None:
    with torch.device("meta"):
        model = GPT(Config.from_name(name))
    total = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    assert total - name.startswith(TIED) * model.lm_head.weight.numel() == published


def llama_like(model_type: str, *sizes: int, **others: Any) -> dict[str, Any]:
    keys = ("vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size")
    return {"model_type": model_type, **dict(zip(keys, sizes, strict=True)), "rms_norm_eps": 1e-5, **others}


# What config.json on the hub says of models that LitGPT does not name, or names with other figures.
HUB = {
    "gpt2": {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257},
    "stable-code-3b": {
        **llama_like("stablelm", 50304, 32, 32, 32, 2560, 6912, max_position_embeddings=16384),
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "rope_theta": 1000000,
        "use_qkv_bias": False,
    },
    "Mathstral-7B-v0.1": llama_like(
        "mistral", 32768, 32, 32, 8, 4096, 14336, max_position_embeddings=32768, rope_theta=1000000.0, sliding_window=None
    ),
    "h2o-danube-1.8b-base": llama_like("mistral", 32000, 24, 32, 8, 2560, 6912, max_position_embeddings=16384, sliding_window=4096),
    "h2o-danube2-1.8b-base": llama_like("mistral", 32000, 24, 32, 8, 2560, 6912, max_position_embeddings=8192, sliding_window=None),
    "h2o-danube3-500m-chat": llama_like("llama", 32000, 16, 16, 8, 1536, 4096, max_position_embeddings=8192, rope_theta=100000),
    "h2o-danube3-4b-chat": llama_like("llama", 32000, 24, 32, 8, 3840, 10240, max_position_embeddings=8192, rope_theta=100000),
    "EuroLLM-9B-Instruct": llama_like("llama", 128000, 42, 32, 8, 4096, 12288, max_position_embeddings=4096),
    "Qwen1.5-4B": {
        **llama_like("qwen2", 151936, 40, 20, 20, 2560, 6912, max_position_embeddings=32768, rope_theta=5000000.0, rms_norm_eps=1e-6),
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 21,
    },
    "Qwen2-57B-A14B": {
        **llama_like("qwen2_moe", 151936, 28, 28, 4, 3584, 18944, max_position_embeddings=131072, rope_theta=1000000.0),
        "decoder_sparse_step": 1,
        "max_window_layers": 28,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-6,
        "moe_intermediate_size": 2560,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "shared_expert_intermediate_size": 20480,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
    },
    "granite-3.2-2b-instruct": {
        **llama_like("granite", 49155, 40, 32, 8, 2048, 8192, max_position_embeddings=131072, rope_theta=5000000.0),
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
    },
    "SmolLM-360M-Instruct": llama_like("llama", 49152, 32, 15, 5, 960, 2560, max_position_embeddings=2048),
}


@pytest.mark.parametrize(("name", "hub"), HUB.items())
def test_figures_of_the_hub(name: str, hub: dict[str, Any]) -> None:
    named, described = Config.from_name(name), Config.from_hf(hub)
    assert essence(named) == essence(described)


def test_names_are_unambiguous() -> None:
    hub = [(catalog.find(name) or {})["hf_config"]["name"] for name in catalog.names()]
    assert len(hub) == len(set(hub))
    assert not {name for name in hub if (catalog.find(name) or {})["hf_config"]["name"] != name}


def test_find_by_either_name() -> None:
    assert catalog.find("openai-community/gpt2") == catalog.find("gpt2") != None  # noqa: E711
    assert (catalog.find("deepseek-ai/DeepSeek-R1-Distill-Llama-8B") or {})["name"] == "R1-Distill-Llama-8B"
    assert catalog.find("someone/gpt2") is None and catalog.find("gpt5") is None


def test_rows_are_the_callers() -> None:
    """Changing what was found leaves the catalogue as it is."""
    changed = catalog.find("Gemma-3-1b-it") or {}
    changed["sliding_window_indices"][0] = 0
    assert (catalog.find("Gemma-3-1b-it") or {})["sliding_window_indices"][0] == 1


def test_only_its_own_family_gives_a_model_its_prompt_style() -> None:
    """So the order of families does not matter."""
    for name in catalog.names():
        for key, family in catalog.FAMILIES.items():
            patterns = [pattern for pattern in family.prompts if re.search(pattern, name, re.IGNORECASE)]
            assert not patterns or family is catalog.home(name), (name, key, patterns)


def test_prompt_styles_exist() -> None:
    assert {style for family in catalog.FAMILIES.values() for style in family.prompts.values()} <= STYLES.keys()


def test_every_module_is_a_family() -> None:
    files = {file.stem for file in Path(catalog.__file__).parent.glob("[a-z]*.py")}
    assert files == catalog.FAMILIES.keys() and next(iter(catalog.FAMILIES)) == "llama"
    for attribute in ("hf", "gguf", "pretokenizers", "styles"):
        names = [name for family in catalog.FAMILIES.values() for name in getattr(family, attribute)]
        assert len(set(names)) == len(names)
