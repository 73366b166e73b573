"""LoRA in PEFT's format: PEFT computes what we compute, both ways, and nothing is lost on a round trip."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from litgpt import checkpoint, lora
from litgpt.config import Config
from litgpt.convert import peft as ours
from litgpt.errors import UserError
from tests.helpers import family_configs as configs, tiny
from tests.helpers.cases import quick

FAMILIES = (
    *("llama", "llama wide heads", "llama multi-query tied", "mistral", "mixtral", "gpt_neox", "falcon", "falcon new decoder", "stablelm"),
    *(
        "phi",
        "phi3",
        "gemma",
        "gemma2",
        "gemma3",
        "qwen2",
        "qwen2_moe",
        "glm4",
        "deepseek_v2",
        "deepseek_v3",
        "qwen3",
        "qwen3_moe",
        "olmo",
        "olmo2",
        "smollm3",
        "granite",
        "gpt2",
    ),
)
ATTENTION = {f"lora_{part}": True for part in ("query", "key", "value", "projection")}
PATTERNS: dict[str, dict[str, Any]] = {
    "parts of qkv": {"lora_rank_pattern": {"q_proj": 5, "h.1.attn.qkv": 2}, "lora_alpha_pattern": {"attn.v_proj": 3}},
    "one qkv": {"lora_rank_pattern": {"attn.qkv": 4}, "lora_alpha_pattern": {"attn.qkv": 1.5}},
    "no effect of q": {"lora_alpha_pattern": {"q_proj": 0}},
    "others": {"lora_rank_pattern": {"attn.proj": 1, "lm_head": 6}, "lora_alpha_pattern": {"h.[01].mlp.proj": 2, "h.2.attn.proj": 4}},
}
CHOICES: dict[str, dict[str, Any]] = {
    "query and value": {"lora_query": True, "lora_value": True},
    "key": {"lora_key": True},
    "all": tiny.ALL_LORA,
    "all of some blocks": {**ATTENTION, "lora_mlp": True, "lora_block_indices": [0, 2]},
    "head": {"lora_head": True},
    "some blocks and head": {"lora_query": True, "lora_head": True, "lora_block_indices": [1]},
}
IDX = tiny.ids(2, 17)


def trained(family: str, **flags: Any) -> Any:
    """Our model with LoRA that has moved."""
    if base_of(family).n_expert:
        flags = {key: value for key, value in flags.items() if key != "lora_mlp"}
    return tiny.move_adapters(configs.ours(family, lora_r=3, lora_alpha=7, **flags), size=0.1)


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if lora.lora_filter(name)}


def kind_of(family: str) -> str:
    return configs.pair(family)[0].config.model_type


def base_of(family: str) -> Config:
    return Config(**configs.pair(family)[1])


@torch.no_grad()
def peft_logits(family: str, folder: Path) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(copy.deepcopy(configs.pair(family)[0]), folder)
    return model(IDX).logits


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's base: what reading an adapter needs of it."""

    @functools.cache
    def make(family: str) -> Path:
        folder = tmp_path_factory.mktemp("base")
        checkpoint.save_config(base_of(family), folder)
        configs.pair(family)[0].config.save_pretrained(folder)
        checkpoint.save_weights(configs.pair(family)[2], folder / "lit_model.pth")
        return folder

    return make


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("family", quick(FAMILIES, "llama", "mixtral", "falcon new decoder", "phi3", "gpt2"))
def test_peft_computes_the_same(family: str, tmp_path: Path) -> None:
    model = trained(family, **tiny.ALL_LORA)
    ours.write(tmp_path, *ours.to_peft(model.config, adapter_of(model), "org/base", kind_of(family)))
    with torch.no_grad():
        want, plain = model(IDX), configs.pair(family)[0](IDX).logits
    assert_close(peft_logits(family, tmp_path), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())
    assert (want - plain).abs().max() > 0.05


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "gemma2"])
def test_peft_computes_the_same_of_answer_only_lora(family: str, tmp_path: Path) -> None:
    """PEFT's aLoRA, whose layers take their offsets from the input ids: LoRA is on from the last invocation on."""
    invocation = IDX[0, 4:6].tolist()
    model = trained(family, **tiny.ALL_LORA, alora_enabled=True, alora_invocation_tokens=invocation)
    settings, tensors = ours.to_peft(model.config, adapter_of(model), "org/base", kind_of(family))
    ours.write(tmp_path, settings, tensors)
    assert settings["alora_invocation_tokens"] == invocation
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(configs.pair(family)[0]), tmp_path)
    with torch.no_grad():
        want, plain = model(IDX), configs.pair(family)[0](IDX).logits
        assert_close(theirs(input_ids=IDX).logits, want, rtol=1e-4, atol=1e-5 * want.abs().max().item())
        assert_close(want[0, :4], plain[0, :4], rtol=1e-4, atol=1e-5 * want.abs().max().item())
        assert (want[0, 4:] - plain[0, 4:]).abs().max() > 0.05
    own, weights = ours.from_peft(settings, tensors, model.config, tmp_path, kind_of(family))
    assert own["alora_enabled"] and own["alora_invocation_tokens"] == invocation and same(weights, adapter_of(model))


@pytest.mark.parametrize("family", quick(["llama", "gpt_neox", "phi3", "gpt2"], "gpt2"))
@pytest.mark.parametrize("choice", CHOICES)
def test_choices_of_layers(family: str, choice: str, tmp_path: Path) -> None:
    model = trained(family, **CHOICES[choice])
    ours.write(tmp_path, *ours.to_peft(model.config, adapter_of(model), "org/base", kind_of(family)))
    with torch.no_grad():
        assert_close(peft_logits(family, tmp_path), model(IDX), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", quick(FAMILIES, "llama", "mixtral", "falcon new decoder", "phi3", "gpt2"))
@pytest.mark.parametrize("choice", quick(["query and value", "all", "all of some blocks"], "all of some blocks"))
def test_ours_there_and_back(family: str, choice: str, tmp_path: Path) -> None:
    model = trained(family, lora_dropout=0.125, **CHOICES[choice])
    ours.write(tmp_path, *ours.to_peft(model.config, adapter_of(model), "org/base", kind_of(family)))
    settings, tensors = json.loads((tmp_path / "adapter_config.json").read_text()), load_file(tmp_path / "adapter_model.safetensors")
    own, weights = ours.from_peft(settings, tensors, base_of(family), tmp_path, kind_of(family))
    assert same(weights, adapter_of(model))
    again = lora.Config(**configs.pair(family)[1], **own)
    if again.latent_attention:  # keys and values have the same layers
        again.lora_key = model.config.lora_key
    again.lora_block_indices = again.lora_block_indices or model.config.lora_block_indices
    assert again == model.config


@pytest.mark.parametrize("family", quick(["llama", "gpt_neox", "phi3", "gpt2", "falcon new decoder"], "llama", "gpt2"))
@pytest.mark.parametrize("rslora", quick([False, True], True))
@pytest.mark.parametrize("patterns", PATTERNS)
def test_patterns_there_and_back(family: str, rslora: bool, patterns: str, tmp_path: Path) -> None:
    model = trained(family, lora_rslora=rslora, **tiny.ALL_LORA, **PATTERNS[patterns])
    settings, tensors = ours.to_peft(model.config, adapter_of(model), "org/base", kind_of(family))
    ours.write(tmp_path, settings, tensors)
    own, weights = ours.from_peft(settings, tensors, base_of(family), tmp_path, kind_of(family))
    again = configs.ours(family, **own)
    again.load_state_dict(weights, strict=False)
    with torch.no_grad():
        want = model(IDX)
        assert_close(peft_logits(family, tmp_path), want, rtol=1e-5, atol=1e-5)
        assert_close(again(IDX), want, rtol=1e-5, atol=1e-5)
    if family == "llama" and patterns != "parts of qkv":  # there B has columns that a part of a lower rank does not use
        assert same(weights, adapter_of(model))


def peft_adapter(family: str, folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """An adapter that PEFT makes and saves, with random A and B."""
    made = peft.get_peft_model(
        copy.deepcopy(configs.pair(family)[0]), peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 6, **settings})
    )
    generator = torch.Generator().manual_seed(5)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).to(dtype)
    made.save_pretrained(folder)
    return made.eval()


TARGETS: dict[str, tuple[str, dict[str, Any]]] = {
    "q and v": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "all linear layers": ("qwen3", {"target_modules": "all-linear"}),
    "gate alone": ("llama", {"target_modules": ["gate_proj"]}),
    "down and head": ("llama", {"target_modules": ["down_proj", "lm_head"]}),
    "some blocks": ("gemma2", {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [0, 2]}),
    "layers one by one": ("llama", {"target_modules": r".*\.(0\.self_attn\.q_proj|1\.self_attn\.v_proj|2\.mlp\.up_proj)"}),
    "joined": ("gpt_neox", {"target_modules": ["query_key_value", "dense_h_to_4h"]}),
    "joined and transposed": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "two of one name": ("gpt2", {"target_modules": ["c_proj"], "fan_in_fan_out": True}),
    "joined by group": ("falcon new decoder", {"target_modules": ["query_key_value"]}),
    "joined gate and up": ("phi3", {"target_modules": ["gate_up_proj", "qkv_proj"]}),
    "rank-stabilised": ("llama", {"target_modules": ["q_proj"], "use_rslora": True}),
    "rank and alpha by layer": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"],
            "rank_pattern": {"v_proj": 2, r"layers\.[01]\.self_attn\.o_proj": 7, "model.layers.2.self_attn.q_proj": 1},
            "alpha_pattern": {"up_proj": 3, "layers.1.self_attn.v_proj": 9.5},
        },
    ),
    "a rank of a joined layer": (
        "gpt_neox",
        {"target_modules": ["query_key_value", "dense"], "rank_pattern": {"query_key_value": 7}, "alpha_pattern": {"dense": 3}},
    ),
    "rank-stabilised by layer": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"v_proj": 8}}),
    "alpha by layer, the same": ("llama", {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 6}}),
}


@pytest.mark.parametrize(
    "kind",
    quick(
        TARGETS,
        "all linear layers",
        "down and head",
        "some blocks",
        "joined",
        "two of one name",
        "joined by group",
        "joined gate and up",
        "rank-stabilised",
        "rank and alpha by layer",
        "a rank of a joined layer",
    ),
)
@pytest.mark.parametrize("dtype", quick([torch.float32, torch.bfloat16], torch.bfloat16))
def test_theirs_here_and_back(kind: str, dtype: torch.dtype, tmp_path: Path, base_dir: Callable[[str], Path]) -> None:
    """We compute what PEFT computes; the way back gives the same tensors, bit for bit, in the same dtype, and the same layers."""
    family, settings = TARGETS[kind]
    made = peft_adapter(family, tmp_path / "theirs", dtype, **settings)
    before = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if "lora_" in name}  # PEFT saves the base's head too if it has LoRA
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    own, weights = ours.load(tmp_path / "theirs", base_dir(family))
    model = configs.ours(family, **own)
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        assert_close(model(IDX), made.float()(IDX).logits, rtol=1e-5, atol=1e-5)

    after, again = ours.to_peft(model.config, weights, "org/base", kind_of(family))
    assert same(again, tensors)
    (tmp_path / "ours").mkdir()
    ours.write(tmp_path / "ours", after, again)
    with torch.no_grad():
        assert_close(peft_logits(family, tmp_path / "ours"), model(IDX), rtol=1e-5, atol=1e-5)
    if not settings.get("use_rslora") and "rank_pattern" not in settings:
        assert (after["r"], after["lora_alpha"], after["rank_pattern"]) == (before["r"], before["lora_alpha"], {})
    if isinstance(settings["target_modules"], list):
        assert (set(after["target_modules"]), after["layers_to_transform"]) == (
            set(before["target_modules"]),
            before["layers_to_transform"],
        )


def test_names_and_settings_of_an_export() -> None:
    model = trained("gpt2", lora_query=True, lora_value=True, lora_projection=True, lora_mlp=True)
    settings, tensors = ours.to_peft(model.config, adapter_of(model), "openai-community/gpt2", "gpt2")
    assert settings["base_model_name_or_path"] == "openai-community/gpt2" and settings["fan_in_fan_out"]
    assert settings.keys() <= peft.LoraConfig.__dataclass_fields__.keys()
    assert settings["target_modules"] == ["c_attn", "c_fc", "c_proj"]  # attn.c_proj and mlp.c_proj, both of them
    assert settings["rank_pattern"] == {"c_attn": 6} and settings["alpha_pattern"] == {"c_attn": 14}
    assert tensors["base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"].shape == (6, 32)
    b = tensors["base_model.model.transformer.h.1.attn.c_attn.lora_B.weight"]  # rows q, k, v; columns of q's A, then of v's
    assert b.shape == (96, 6)
    assert not b[32:64].any() and not b[:32, 3:].any() and not b[64:, :3].any() and b[:32, :3].all() and b[64:, 3:].all()


def test_one_of_two_layers_of_a_name() -> None:
    model = trained("gpt2", lora_projection=True)
    settings, tensors = ours.to_peft(model.config, adapter_of(model), "gpt2", "gpt2")
    assert settings["target_modules"] == ["attn.c_proj"] and len(tensors) == 6 and not settings["rank_pattern"]


def test_an_adapter_before_its_first_step(tmp_path: Path) -> None:
    """B is zero everywhere: what is on must still be told from A."""
    for family in ("llama", "gpt2"):
        model = configs.ours(family, lora_r=3, lora_alpha=7, **tiny.ALL_LORA)
        own, weights = ours.from_peft(
            *ours.to_peft(model.config, adapter_of(model), "base", kind_of(family)), base_of(family), tmp_path, kind_of(family)
        )
        assert same(weights, adapter_of(model)) and lora.Config(**configs.pair(family)[1], **own) == model.config


def test_experts_are_refused() -> None:
    model = tiny.move_adapters(configs.ours("mixtral", lora_r=3, lora_mlp=True))
    with pytest.raises(UserError, match=r"no place for LoRA on .*mlp\.experts\.0\.fc_1"):
        ours.to_peft(model.config, adapter_of(model), "base", "mixtral")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "biases": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "modules to save": ({"modules_to_save": ["down_proj"]}, r"modules_to_save is \['down_proj'\]"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, r"not LoRA on a linear layer.*embed_tokens\.lora_embedding_A"),
    "a changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "a bias on B": ({"lora_bias": True}, "lora_bias is True"),
    "another task": ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
    "a pattern": ({"alpha_pattern": {"(a+)+$": 6}}, r"alpha_pattern has '\(a\+\)\+\$': it repeats a group"),
    "no pattern": ({"alpha_pattern": {"(a": 6}}, r"alpha_pattern has '\(a': it is not a regular expression"),
    "a list": ({"rank_pattern": ["q_proj"]}, "rank_pattern is .*: give names of layers with a value each"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_ours_cannot_express(kind: str, tmp_path: Path) -> None:
    settings, message = WRONG[kind]
    model_settings = {key: value for key, value in settings.items() if key != "task_type" and not key.endswith("_pattern")}
    peft_adapter("llama", tmp_path, **{"target_modules": ["q_proj"], **model_settings})
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    told |= {key: value for key, value in settings.items() if key != "target_modules"}  # some are reset when saved
    with pytest.raises(UserError, match=message):
        ours.from_peft(told, load_file(tmp_path / "adapter_model.safetensors"), base_of("llama"), tmp_path, "llama")


def test_all_problems_are_in_one_message(tmp_path: Path) -> None:
    peft_adapter("llama", tmp_path, target_modules=["q_proj"])
    settings = json.loads((tmp_path / "adapter_config.json").read_text()) | {"peft_type": "LOHA", "lora_dropout": 2, "bias": "all"}
    settings["use_dora"] = True
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers."
    del tensors[f"{prefix}0.self_attn.q_proj.lora_A.weight"]
    tensors[f"{prefix}1.self_attn.q_proj.lora_B.weight"] = torch.zeros(7, 4)
    tensors[f"{prefix}3.self_attn.q_proj.lora_B.weight"] = torch.zeros(32, 4)
    with pytest.raises(UserError) as caught:
        ours.from_peft(settings, tensors, base_of("llama"), tmp_path, "llama")
    message = str(caught.value)
    for text in (
        "peft_type is 'LOHA'",
        "bias is 'all'",
        "lora_dropout is 2",
        "only one of lora_A and lora_B is there for model.layers.0.self_attn.q_proj",
        "model.layers.2.self_attn.q_proj: with use_dora it needs a lora_magnitude_vector of 32 numbers",
        "model.layers.1.self_attn.q_proj has shapes (4, 32) and (7, 4), the layer is (in, out) (32, 32)",
        "not LoRA on a linear layer of this model: model.layers.3.self_attn.q_proj.lora_B.weight",
    ):
        assert text in message
    with pytest.raises(UserError, match="it has no LoRA weights"):
        ours.from_peft({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, {}, base_of("llama"), tmp_path, "llama")
    with pytest.raises(UserError, match="r is None and lora_alpha 'x'"):
        ours.from_peft({"peft_type": "LORA", "lora_alpha": "x"}, {}, base_of("llama"), tmp_path, "llama")


def test_another_head_is_not_lost(tmp_path: Path, base_dir: Callable[[str], Path]) -> None:
    """PEFT saves the head's own weight beside LoRA on it: one that is not the base's cannot be left out."""
    peft_adapter("llama", tmp_path, target_modules=["lm_head"])
    file, key = tmp_path / "adapter_model.safetensors", "base_model.model.lm_head.base_layer.weight"
    assert ours.load(tmp_path, base_dir("llama"))[0]["lora_head"]
    tensors = load_file(file)
    save_file({**tensors, key: tensors[key] + 1}, file)
    with pytest.raises(UserError, match="not LoRA on a linear layer of this model: lm_head.base_layer.weight"):
        ours.load(tmp_path, base_dir("llama"))


def test_broken_files(tmp_path: Path, base_dir: Callable[[str], Path]) -> None:
    peft_adapter("llama", tmp_path, target_modules=["q_proj"])
    file, base = tmp_path / "adapter_model.safetensors", base_dir("llama")
    assert ours.load(tmp_path, base)[0]["lora_query"]
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(UserError, match="not a readable safetensors file"):
        ours.load(tmp_path, base)
    file.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        ours.load(tmp_path, base)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        ours.load(tmp_path, base)


@pytest.mark.parametrize(
    "family", quick(["llama", "gpt_neox", "phi3", "gpt2", "falcon new decoder", "mixtral"], "llama", "falcon new decoder", "gpt2")
)
@pytest.mark.parametrize(
    "variant",
    quick(
        [{"lora_variant": "dora"}, {"lora_rslora": True}, {"lora_variant": "dora", "lora_rslora": True}],
        {"lora_variant": "dora", "lora_rslora": True},
    ),
    ids=str,
)
def test_peft_computes_the_same_of_dora_and_rslora(family: str, variant: dict[str, Any], tmp_path: Path) -> None:
    model = trained(family, **tiny.ALL_LORA, **variant)
    for name, value in model.named_parameters():
        value.data = value.data.abs() + 0.5 if name.endswith("magnitude") else value.data
    settings, tensors = ours.to_peft(model.config, adapter_of(model), "org/base", kind_of(family))
    ours.write(tmp_path, settings, tensors)
    assert settings["use_dora"] == any(name.endswith("lora_magnitude_vector") for name in tensors) == ("lora_variant" in variant)
    with torch.no_grad():
        want = model(IDX)
        assert_close(peft_logits(family, tmp_path), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("family", quick(["llama", "gpt_neox", "phi3", "gpt2", "falcon new decoder"], "falcon new decoder", "gpt2"))
def test_dora_there_and_back(family: str, tmp_path: Path) -> None:
    model = trained(family, **tiny.ALL_LORA, lora_variant="dora")
    for name, value in model.named_parameters():
        value.data = value.data.abs() + 0.5 if name.endswith("magnitude") else value.data
    told = ours.to_peft(model.config, adapter_of(model), "org/base", kind_of(family))
    settings, weights = ours.from_peft(*told, base_of(family), tmp_path, kind_of(family))
    assert same(weights, adapter_of(model)) and lora.Config(**configs.pair(family)[1], **settings) == model.config


@pytest.mark.parametrize(
    ("family", "targets"),
    [("llama", ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]), ("gpt2", ["c_attn"]), ("phi3", ["qkv_proj"])],
    ids=["single", "joined and transposed", "joined"],
)
def test_dora_of_peft(family: str, targets: list[str], tmp_path: Path, base_dir: Callable[[str], Path]) -> None:
    theirs = peft_adapter(family, tmp_path, target_modules=targets, use_dora=True, fan_in_fan_out=family == "gpt2")
    settings, weights = ours.load(tmp_path, base_dir(family))
    assert settings["lora_variant"] == "dora"
    model = configs.ours(family, **settings)
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        want = theirs(IDX).logits
        assert_close(model.eval()(IDX), want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_dora_on_some_layers_of_a_kind_is_refused(tmp_path: Path, base_dir: Callable[[str], Path]) -> None:
    """Here the kinds of layers are switched on; a layer that is left out would need the lengths of its rows."""
    peft_adapter("llama", tmp_path, target_modules=["gate_proj"], use_dora=True)
    with pytest.raises(UserError, match=r"has none on transformer\.h\.0\.mlp\.\w+: merge it with PEFT"):
        ours.load(tmp_path, base_dir("llama"))


def test_dora_on_part_of_a_joined_layer_has_no_place() -> None:
    model = trained("gpt_neox", lora_query=True, lora_variant="dora")
    with pytest.raises(UserError, match=r"PEFT's DoRA needs all rows of .*query_key_value, .*qkv:k"):
        ours.to_peft(model.config, adapter_of(model), "org/base", kind_of("gpt_neox"))
