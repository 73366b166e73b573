from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, safe_open, save_file

from litgpt import checkpoint
from litgpt.checkpoint import load_weights, require_checkpoint
from litgpt.config import Config
from litgpt.convert import hf
from litgpt.convert.to_litgpt import convert_to_litgpt
from litgpt.errors import UserError
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from tests.helpers import family_configs as configs, tiny
from tests.helpers.cases import quick

LLAMA_SIZES = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
NEOX_SIZES = {key: value for key, value in LLAMA_SIZES.items() if key != "num_key_value_heads"} | {"hidden_size": 64}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def llama(**changes: object) -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA_SIZES, "tie_word_embeddings": False, **changes}))


MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {
    "llama grouped": llama,
    "llama tied": lambda: llama(tie_word_embeddings=True),
    "llama 3.1 rope": lambda: llama(rope_parameters=LLAMA3_ROPE),
    "llama linear rope": lambda: llama(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "llama own head size": lambda: llama(head_dim=16),
    "mistral window": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA_SIZES, sliding_window=5)),
    "neox quarter rotary": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            **NEOX_SIZES, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
        )
    ),
    "neox sequential": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**NEOX_SIZES, use_parallel_residual=False)),
}


def build(kind: str = "llama grouped") -> transformers.PreTrainedModel:
    """Return a model with random weights, biases and norms included: zeros and ones would hide mistakes."""
    torch.manual_seed(3)
    model = MODELS[kind]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 0.5, std=0.2)
    return model.eval()


def loaded(folder: Path) -> GPT:
    model = GPT(Config.from_checkpoint(folder))
    model.load_state_dict(load_weights(folder / "lit_model.pth"))
    return model.float().eval()


@torch.inference_mode()
def assert_same_logits(reference: transformers.PreTrainedModel, folder: Path) -> None:
    tokens = torch.randint(0, LLAMA_SIZES["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))
    expected = reference(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(loaded(folder)(tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_logits_equal_those_of_transformers(tmp_path: Path, kind: str) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path / "hf")
    convert_to_litgpt(tmp_path / "hf", tmp_path / "lit")
    assert_same_logits(model, tmp_path / "lit")


def test_in_place_from_shards(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]) -> None:
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    write_tiny_tokenizer(tmp_path)
    convert_to_litgpt(tmp_path)
    assert str(tmp_path) in capsys.readouterr().out
    assert require_checkpoint(tmp_path) == tmp_path
    assert_same_logits(model, tmp_path)


@pytest.mark.parametrize("stem", ["model", "pytorch_model"])
def test_names_of_a_compiled_model(stem: str, tmp_path: Path) -> None:
    suffix, save = ("safetensors", save_file) if stem == "model" else ("bin", torch.save)
    model = build()
    model.config.save_pretrained(tmp_path)
    state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
    shards = {f"{stem}-{n}-of-2.{suffix}": list(state)[n - 1 :: 2] for n in (1, 2)}
    for file, names in shards.items():
        save({name: state[name] for name in names}, tmp_path / file)
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    convert_to_litgpt(tmp_path)
    assert_same_logits(model, tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_files(tmp_path: Path, sharded: bool) -> None:
    model = build("neox quarter rotary")
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    state["embed_out.weight"] = state.pop("lm_head.weight")  # its name in every published file; transformers 5 renames it in memory
    state["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 4, 4)  # buffers that old files hold
    state["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    if sharded:
        names = list(state)
        shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
        for file, keys in shards.items():
            torch.save({key: state[key] for key in keys}, tmp_path / file)
        index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    convert_to_litgpt(tmp_path)
    assert_same_logits(model, tmp_path)


def test_tokenizer_and_generation_files_come_along(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    source, target = tmp_path / "hf", tmp_path / "new" / "lit"
    build().save_pretrained(source)
    write_tiny_tokenizer(source)
    convert_to_litgpt(source, target)
    assert {file.name for file in target.iterdir()} == {
        *("lit_model.pth", "model_config.yaml", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
        *("conversion.json", "manifest.json"),
    }
    assert Tokenizer(target).ids("the task") == Tokenizer(source).ids("the task")
    assert not (source / "lit_model.pth").exists()


def test_dtype_is_kept_or_changed(tmp_path: Path) -> None:
    build().to(torch.float16).save_pretrained(tmp_path / "hf")
    convert_to_litgpt(tmp_path / "hf", tmp_path / "same")
    convert_to_litgpt(tmp_path / "hf", tmp_path / "other", dtype="bfloat16")
    assert {w.dtype for w in load_weights(tmp_path / "same" / "lit_model.pth").values()} == {torch.float16}
    assert {w.dtype for w in load_weights(tmp_path / "other" / "lit_model.pth").values()} == {torch.bfloat16}


def test_a_tied_head_is_stored_once_under_both_keys(tmp_path: Path) -> None:
    build("llama tied").save_pretrained(tmp_path)
    convert_to_litgpt(tmp_path)
    weights = load_weights(tmp_path / "lit_model.pth")
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()


def test_a_tied_head_may_be_stored_under_either_name(tmp_path: Path) -> None:
    for folder in ("usual", "head"):
        build("llama tied").save_pretrained(tmp_path / folder)
    state = load_file(tmp_path / "head" / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "head" / "model.safetensors")
    for folder in ("usual", "head"):
        convert_to_litgpt(tmp_path / folder)
    assert_equal(converted(tmp_path / "usual"), converted(tmp_path / "head"))


def test_qkv_rows_are_all_q_then_k_then_v(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    convert_to_litgpt(tmp_path)
    attention = model.model.layers[1].self_attn
    expected = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert torch.equal(load_weights(tmp_path / "lit_model.pth")["transformer.h.1.attn.qkv.weight"], expected)


def test_names(tmp_path: Path) -> None:
    """A folder with a model's name takes that model's settings if they fit, else config.json's; --model_name has to fit."""
    sizes = {"vocab_size": 50304, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512}
    config = transformers.GPTNeoXConfig(**sizes, max_position_embeddings=512)
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "pythia-14m")
    convert_to_litgpt(tmp_path / "pythia-14m")
    named = Config.from_checkpoint(tmp_path / "pythia-14m")
    assert named == Config.from_name("pythia-14m") and named.vocab_size == 50254

    shutil.copytree(tmp_path / "pythia-14m", tmp_path / "mine")
    convert_to_litgpt(tmp_path / "mine")
    assert Config.from_checkpoint(tmp_path / "mine").name == "mine"
    convert_to_litgpt(tmp_path / "mine", model_name="EleutherAI/pythia-14m")
    assert Config.from_checkpoint(tmp_path / "mine") == named
    with pytest.raises(UserError, match="n_layer is 6, expected 24"):
        convert_to_litgpt(tmp_path / "mine", model_name="pythia-410m")

    (tmp_path / "mine").rename(tmp_path / "pythia-70m")
    convert_to_litgpt(tmp_path / "pythia-70m")
    assert Config.from_checkpoint(tmp_path / "pythia-70m").n_embd == 128


def test_every_misfit_is_in_one_message(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state["model.norm.weight"]
    for i in range(3):
        del state[f"model.layers.{i}.mlp.up_proj.weight"]
    state["model.layers.2.self_attn.q_proj.bias"] = torch.zeros(32)
    state["extra.weight"] = torch.zeros(1)
    state["lm_head.weight"] = torch.zeros(79, 32)
    save_file(state, file)
    with pytest.raises(UserError) as caught:
        convert_to_litgpt(tmp_path)
    message = str(caught.value)
    assert "missing: model.layers.{0..2}.mlp.up_proj.weight, model.norm.weight" in message
    assert "unknown: extra.weight, model.layers.2.self_attn.q_proj.bias" in message
    assert "shape (79, 32) where (80, 32) is expected: lm_head.weight" in message
    assert not (tmp_path / "lit_model.pth").exists()


@pytest.mark.parametrize(("kind", "bits"), [("F8_E4M3", 8), ("F8_E8M0", 8), ("F6_E2M3", 6), ("F4", 4)])
def test_floats_of_8_bits_need_scales(tmp_path: Path, kind: str, bits: int) -> None:
    build().save_pretrained(tmp_path)
    header = json.dumps({"lm_head.weight": {"dtype": kind, "shape": [64, 32], "data_offsets": [0, 256 * bits]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(256 * bits))
    with pytest.raises(UserError, match=rf"holds quantised weights, such as lm_head.weight \({kind}\): convert the unquantised"):
        convert_to_litgpt(tmp_path)


def test_a_missing_head_is_only_fine_when_tied(tmp_path: Path) -> None:
    build("llama tied").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"missing: lm_head\.weight"):
        convert_to_litgpt(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/model.safetensors", "a\\b.safetensors", "", "..", "model.pkl"])
def test_shards_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "hf"
    build().save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UserError, match="only plain .safetensors file names"):
        convert_to_litgpt(folder)


def test_missing_shards_and_broken_indexes_are_named(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        convert_to_litgpt(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(UserError, match=r"lacks model-1\.safetensors, model-2\.safetensors"):
        convert_to_litgpt(tmp_path)
    for content in ("{}", "[", '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        with pytest.raises(UserError, match=r"index\.json"):
            convert_to_litgpt(tmp_path)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("unpickled",)


def test_broken_and_hostile_weight_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"model\.safetensors"):
            convert_to_litgpt(tmp_path)
    file.unlink()
    torch.save({"lm_head.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin"):
        convert_to_litgpt(tmp_path)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_next"}, "model_type 'qwen3_next' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with 'gptq'"),
        ({"num_hidden_layers": 9999}, "9999 blocks"),
        ({"hidden_size": 2**30}, "does not fit|impossible"),
        ({"num_hidden_layers": 2}, "unknown: model.layers.2.input_layernorm.weight"),
    ],
)
def test_unsupported_settings(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    build().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        convert_to_litgpt(tmp_path)


def test_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        convert_to_litgpt(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        convert_to_litgpt(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"")
    (tmp_path / "model2.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"name one of them, such as .*model\.gguf"):
        convert_to_litgpt(tmp_path)


def test_an_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "hf")
    (tmp_path / "lit").mkdir()
    (tmp_path / "lit" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        convert_to_litgpt(tmp_path / "hf", tmp_path / "lit")
    assert [file.name for file in (tmp_path / "lit").iterdir()] == ["mine.txt"]


def in_memory(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    tied = model.config.get_text_config().tie_word_embeddings
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def converted(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights(folder / "lit_model.pth")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "family",
    quick(["mixtral", "qwen3_moe", "gpt_neox", "falcon new decoder", "gemma3", "gpt2", "phi3"], "qwen3_moe", "falcon new decoder", "gpt2"),
)
def test_names_that_transformers_has_in_memory(family: str, tmp_path: Path) -> None:
    """They differ from those in files for experts (all in one tensor) and heads; an unusual save leaves them in files."""
    model = configs.pair(family)[0]
    for folder in ("usual", "memory"):
        model.save_pretrained(tmp_path / folder)
    save_file(in_memory(model), tmp_path / "memory" / "model.safetensors")
    for folder in ("usual", "memory"):
        convert_to_litgpt(tmp_path / folder, tmp_path / f"lit {folder}")
    assert_equal(converted(tmp_path / "lit usual"), converted(tmp_path / "lit memory"))


def test_gpt2_as_the_hub_has_it(tmp_path: Path) -> None:
    """No prefix, no head, causal masks among the weights, a file in torch's format before 1.6, no word on tying in config.json."""
    model = configs.pair("gpt2")[0]
    model.save_pretrained(tmp_path / "usual")
    model.config.save_pretrained(tmp_path / "hub")
    settings = json.loads((tmp_path / "hub" / "config.json").read_text())
    del settings["tie_word_embeddings"]
    (tmp_path / "hub" / "config.json").write_text(json.dumps(settings))
    state = {name.removeprefix("transformer."): tensor for name, tensor in in_memory(model).items()}
    for i in range(3):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(state, tmp_path / "hub" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    for folder in ("usual", "hub"):
        convert_to_litgpt(tmp_path / folder, tmp_path / f"lit {folder}")
    assert_equal(converted(tmp_path / "lit usual"), converted(tmp_path / "lit hub"))


@pytest.mark.parametrize("spelling", ["files", "memory"])
def test_the_text_model_of_one_with_images(spelling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = configs.hf_config("gemma3").to_dict()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=100)
    model = tiny.randomise(transformers.Gemma3ForConditionalGeneration(config))
    model.save_pretrained(tmp_path / "hf")
    if spelling == "memory":
        save_file(in_memory(model), tmp_path / "hf" / "model.safetensors")
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert any("language_model." in name for name in file.keys())  # noqa: SIM118
    convert_to_litgpt(tmp_path / "hf", tmp_path / "lit")
    assert "vision tensors are left out" in capsys.readouterr().err
    tokens = torch.randint(3, 99, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(loaded(tmp_path / "lit")(tokens), expected, atol=1e-4, rtol=1e-4)


def test_memory_maps_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    model.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    convert_to_litgpt(tmp_path / "hf", tmp_path / "expected")
    opened: list[str] = []
    monkeypatch.setattr(hf, "RELEASE", 1)
    monkeypatch.setattr(hf, "safe_open", lambda file, framework: opened.append(file.name) or safe_open(file, framework))
    convert_to_litgpt(tmp_path / "hf", tmp_path / "lit")
    assert len(opened) > len(model.state_dict())
    assert_equal(converted(tmp_path / "lit"), converted(tmp_path / "expected"))


def test_the_content_of_the_shards_counts_not_the_index(tmp_path: Path) -> None:
    """As in transformers, which takes from the index only the names of the files."""
    folder, model = tmp_path / "hf", build()
    model.save_pretrained(folder, max_shard_size="20KB")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    content["weight_map"].update(dict.fromkeys(content["weight_map"], shards[0]), **{f"ghost.{shard}": shard for shard in shards})
    index.write_text(json.dumps(content))
    convert_to_litgpt(folder, tmp_path / "lit")
    assert_same_logits(model, tmp_path / "lit")
    tensors = load_file(folder / shards[-1])
    name, _ = tensors.popitem()
    save_file(tensors, folder / shards[-1])
    with pytest.raises(UserError, match=f"missing: {name}"):
        convert_to_litgpt(folder, tmp_path / "other")


def test_whole_numbers_are_not_weights(tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"transformer.h.1.mlp.fc_2.weight holds torch.int8.*unquantised"):
        convert_to_litgpt(tmp_path)
    assert not (tmp_path / "lit_model.pth").exists()


def test_more_experts_than_there_are_tensors(tmp_path: Path) -> None:
    configs.pair("mixtral")[0].save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"num_local_experts": 10**6}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="1000000 experts"):
        convert_to_litgpt(tmp_path)


def test_a_head_of_its_own_in_the_file_counts_more_than_the_flag(tmp_path: Path) -> None:
    theirs = tiny.hf_llama()
    theirs.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    hf.convert_hf(tmp_path / "hf", tmp_path / "lit")
    weights = load_weights(tmp_path / "lit" / "lit_model.pth")
    assert torch.equal(weights["lm_head.weight"], theirs.lm_head.weight) and not checkpoint.is_tied(weights)


@pytest.mark.parametrize(
    ("parameters", "others"),
    [
        ({"rope_type": "default", "rope_theta": 300.0}, {}),  # theta is lost beside rope_scaling
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}, {"rope_theta": 500.0}),
        ({"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 300.0}, {"rope_theta": 500}),
    ],
)
def test_the_older_spelling_of_rotary_scaling_replaces_the_newer(
    parameters: dict[str, Any], others: dict[str, Any], tmp_path: Path
) -> None:
    """Model cards tell to add it to a config.json that transformers 5 wrote."""
    tiny.hf_llama().save_pretrained(tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": parameters, "rope_scaling": yarn, **others}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "hf").rope_parameters
    ours = Config.from_hf(file)
    assert ours.rope_adjustments is not None
    assert (ours.rope_adjustments["rope_type"], ours.rope_adjustments["factor"]) == (theirs["rope_type"], theirs["factor"])
    assert ours.rope_base == theirs["rope_theta"]
