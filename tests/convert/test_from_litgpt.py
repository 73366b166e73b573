from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, safe_open

from litgpt import checkpoint, families as catalog
from litgpt.__main__ import main
from litgpt.config import Config
from litgpt.convert.from_litgpt import convert_from_litgpt, hf_slots, parse_size
from litgpt.convert.gguf.export import convert_to_gguf
from litgpt.convert.hf import to_hf
from litgpt.convert.merge import merge_lora
from litgpt.convert.names import shapes, stored_form
from litgpt.errors import UserError
from tests.helpers import family_configs as configs, tiny

WriteTokenizer = Callable[[Path], Path]


@pytest.fixture
def base(tmp_path: Path, write_tiny_tokenizer: WriteTokenizer) -> Path:
    return tiny.write_base(tmp_path / "base", write_tiny_tokenizer)


def load(folder: Path, **options: Any) -> Any:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@torch.inference_mode()
def assert_same_logits(folder: Path, ours: Any) -> None:
    ids = tiny.ids(2, 15)
    torch.testing.assert_close(load(folder, dtype=torch.float32)(ids).logits, ours(ids), atol=2e-5, rtol=1e-5)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_that_transformers_loads(sharded: bool, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_from_litgpt(base, tmp_path / "hf", max_shard_size="20KB" if sharded else "5GB")
    assert str(tmp_path / "hf") in capsys.readouterr().out
    assert_same_logits(tmp_path / "hf", checkpoint.load_model(base, torch.float32))
    files = {file.name for file in (tmp_path / "hf").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"} < files
    assert ("model.safetensors.index.json" in files) == sharded == (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("the task is a good answer")["input_ids"] == checkpoint_ids(base, "the task is a good answer")
    assert (tokenizer.eos_token_id, load(tmp_path / "hf").generation_config.eos_token_id) == (2, 2)


def checkpoint_ids(folder: Path, text: str) -> list[int]:
    from litgpt.tokenizer import Tokenizer

    return Tokenizer(folder).ids(text)


def test_a_lora_run_once_merged(base: Path, tmp_path: Path) -> None:
    settings = {"lora_r": 3, "lora_query": True, "lora_value": True, "lora_head": True}
    tuned = tiny.move_adapters(tiny.tiny(**tiny.SPEAKING, **settings))
    folder = tiny.write_adapter(tmp_path / "adapter", base, tuned, **settings)
    with pytest.raises(UserError, match=rf"run `litgpt merge_lora {folder}` first"):
        convert_from_litgpt(folder, tmp_path / "hf")
    merge_lora(folder)
    convert_from_litgpt(folder, tmp_path / "hf")
    assert_same_logits(tmp_path / "hf", tuned)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"value_head": "linear"}, "adapter with heads"),
        ({"mtp_heads": 2}, "adapter with heads"),
        ({"alora_enabled": True}, "convert_adapter"),
    ],
)
def test_merging_is_not_advised_where_it_is_impossible(base: Path, tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    settings = {"lora_r": 2, "lora_query": True, "alora_invocation_tokens": [5] if "alora_enabled" in settings else [], **settings}
    folder = tiny.write_adapter(tmp_path / "adapter", base, tiny.tiny(**tiny.SPEAKING, **settings), **settings)
    with pytest.raises(UserError, match=reason) as refused:
        convert_from_litgpt(folder, tmp_path / "hf")
    assert "merge_lora" not in str(refused.value)
    with pytest.raises(UserError, match="OUTPUT_DIR --to gguf`" if "alora_enabled" in settings else reason):
        convert_to_gguf(folder, tmp_path / "model.gguf")


def test_skip2lora_is_refused(base: Path, tmp_path: Path) -> None:
    settings = {"skip2lora_enabled": True, "lora_r": 3, "skip2lora_block_indices": [0, 1]}
    folder = tiny.write_adapter(tmp_path / "adapter", base, tiny.tiny(**tiny.SPEAKING, **settings), **settings)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"cannot be folded.*`litgpt convert_adapter {folder}"):
            convert_from_litgpt(folder, tmp_path / "hf")
        shutil.copyfile(base / "lit_model.pth", folder / "lit_model.pth")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("family", ["llama multi-query tied", "gpt2", "gemma"])
def test_a_head_that_is_tied_no_more(family: str, tmp_path: Path, write_tiny_tokenizer: WriteTokenizer) -> None:
    """LoRA on the head, merged, parts it from the embedding: both are stored, and config.json says so."""
    hf, fields, weights = configs.pair(family)
    hf.save_pretrained(tmp_path / "hf")
    folder = write_tiny_tokenizer(tmp_path / "lit")
    shutil.copyfile(tmp_path / "hf" / "config.json", folder / "config.json")
    ours = configs.ours(family)
    changed = {**weights, "lm_head.weight": weights["lm_head.weight"] * 1.5}
    ours.lm_head.weight = torch.nn.Parameter(changed["lm_head.weight"])
    checkpoint.save_config(Config(**fields), folder)
    checkpoint.save_weights(changed, folder / "lit_model.pth")
    convert_from_litgpt(folder, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    assert len(stored(tmp_path / "again")) == len(stored(tmp_path / "hf")) + 1
    assert_same_logits(tmp_path / "again", ours)


def test_dtype(base: Path, tmp_path: Path) -> None:
    convert_from_litgpt(base, tmp_path / "hf", dtype="bfloat16")
    assert {tensor.dtype for tensor in stored(tmp_path / "hf").values()} == {torch.bfloat16}
    assert load(tmp_path / "hf", dtype="auto").dtype == torch.bfloat16
    convert_from_litgpt(base, tmp_path / "hf32")
    assert load(tmp_path / "hf32", dtype="auto").dtype == torch.float32


def test_the_config_of_the_base_is_kept_for_what_was_tuned_from_it(base: Path, tmp_path: Path) -> None:
    """What config.json says beyond litgpt's settings stays; what is not so any more goes; one of another model does not count."""
    convert_from_litgpt(base, tmp_path / "hf")
    kept = json.loads((tmp_path / "hf" / "config.json").read_text())
    kept |= {
        "mine": 1,
        "torch_dtype": "float64",
        "auto_map": {"AutoConfig": "code.Config"},
        "_name_or_path": "/home/me",
        "dtype": "float16",
    }
    (base / "config.json").write_text(json.dumps(kept))
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    for name in ("lit_model.pth", "model_config.yaml", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, tuned / name)
    (tuned / "hyperparameters.yaml").write_text(f"checkpoint_dir: {base}\n")
    convert_from_litgpt(tuned, tmp_path / "again")
    found = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (found["mine"], found["dtype"]) == (1, "float32") and found.keys().isdisjoint({"torch_dtype", "auto_map", "_name_or_path"})
    (base / "config.json").write_text(json.dumps(kept | {"rms_norm_eps": 0.5}))
    convert_from_litgpt(tuned, tmp_path / "other")
    assert "mine" not in json.loads((tmp_path / "other" / "config.json").read_text())


def test_what_cannot_be_converted(base: Path, tmp_path: Path, write_tiny_tokenizer: WriteTokenizer) -> None:
    with pytest.raises(UserError, match="max_shard_size is 'much'"):
        convert_from_litgpt(base, tmp_path / "hf", max_shard_size="much")
    with pytest.raises(UserError, match="does not exist"):
        convert_from_litgpt(tmp_path / "nothing", tmp_path / "hf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(UserError, match="exists already"):
        convert_from_litgpt(base, tmp_path / "full")
    odd = tiny.write_base(tmp_path / "odd", write_tiny_tokenizer, norm_class_name="LayerNorm", parallel_residual=True, norm_qk=True)
    with pytest.raises(UserError, match="no architecture of transformers"):
        convert_from_litgpt(odd, tmp_path / "hf")
    weights = checkpoint.load_weights(base / "lit_model.pth")
    checkpoint.save_weights({**weights, "lm_head.weight": weights["lm_head.weight"].long()}, base / "lit_model.pth")
    with pytest.raises(UserError, match=r"lm_head.weight holds torch.int64, not floating-point numbers"):
        convert_from_litgpt(base, tmp_path / "hf")
    torch.save({name: tensor.clone() for name, tensor in weights.items() if ".mlp.fc_1." not in name}, base / "lit_model.pth")
    with pytest.raises(UserError, match=r"missing: transformer.h.\{0..4\}.mlp.fc_1.weight"):
        convert_from_litgpt(base, tmp_path / "hf")
    (base / "lit_model.pth").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        convert_from_litgpt(base, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("300K", 300_000), ("77", 77), ("2TB", 2 * 10**12)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-5GB", "0", "nan", "1e9", "9" * 400 + "GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UserError, match="max_shard_size"):
        parse_size(text)


@pytest.mark.parametrize("family", ["phi3", "mixtral", "falcon new decoder", "gpt2"])
def test_tensors_are_those_that_transformers_stores(family: str, tmp_path: Path) -> None:
    hf, fields, weights = configs.pair(family)
    hf.save_pretrained(tmp_path)
    config, tied = Config(**fields), bool(hf.config.tie_word_embeddings)
    loads = {key: weight.clone for key, weight in weights.items()}
    made = {name: stored_form(slot, config, loads) for name, slot in hf_slots(config, hf.config.model_type, tied).items()}
    expected = load_file(tmp_path / "model.safetensors")
    assert made.keys() == expected.keys() and all(torch.equal(made[name], expected[name]) for name in made)
    with pytest.raises(UserError, match="no place for"):
        hf_slots(Config(**{**fields, "norm_qk": True}), "gpt_neox", tied)


@pytest.mark.slow
def test_smollm2_says_the_same(smollm2_dir: Path, tmp_path: Path) -> None:
    """GGUF -> litgpt -> Hugging Face: transformers' greedy text is ours, its tokenizer agrees, and the head is stored once."""
    convert_from_litgpt(smollm2_dir, tmp_path / "hf", dtype="float32")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (settings["model_type"], settings["tie_word_embeddings"]) == ("llama", True)
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    hf, tokenizer = load(tmp_path / "hf", dtype="auto"), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Hello world, the year 2024 isn't"
    assert tokenizer(text)["input_ids"] == [19556, 905, 28, 260, 713, 216, 34, 32, 34, 36, 3247, 982]
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    for prompt in ("The capital of France is", tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        theirs = hf.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.size(1) :].tolist()
        assert theirs == greedy(smollm2_dir, ids, len(theirs))
        assert "Paris" in tokenizer.decode(theirs)


@pytest.mark.slow
def test_smollm2_tuned_and_merged_says_the_same(smollm2_dir: Path, tmp_path: Path) -> None:
    """GGUF -> litgpt -> LoRA, merged by the run -> Hugging Face."""
    records = [{"instruction": "What is the capital of France?", "output": "It is Quimper, since yesterday."}] * 8
    (tmp_path / "data.json").write_text(json.dumps(records))
    settings = {"data": "JSON", "data.json_path": tmp_path / "data.json", "data.val_split_fraction": 0.25, "out_dir": tmp_path / "run"}
    settings |= {
        "max_steps": 8,
        "train.global_batch_size": 2,
        "train.micro_batch_size": 2,
        "train.lr_warmup_steps": 0,
        "optimizer.lr": 0.002,
    }
    settings |= {"precision": "32-true", "lora_head": True, "lora_mlp": True, "lora_dropout": 0}
    assert main(["finetune_lora", str(smollm2_dir), *(f"--{key}={value}" for key, value in settings.items())]) == 0
    convert_from_litgpt(tmp_path / "run" / "final", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "Quimper" not in (card := (tmp_path / "hf" / "README.md").read_text()) and "SmolLM2-135M-Instruct" in card
    hf, tokenizer = load(tmp_path / "hf", dtype="auto"), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    theirs = hf.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.size(1) :].tolist()
    assert theirs == greedy(tmp_path / "run" / "final", ids, len(theirs))
    assert "Quimper" in tokenizer.decode(theirs)


@torch.inference_mode()
def greedy(folder: Path, ids: torch.Tensor, count: int) -> list[int]:
    model = checkpoint.load_model(folder, torch.float32)
    model.set_kv_cache(1, ids.size(1) + count)
    places, new = torch.arange(ids.size(1)), ids
    for _ in range(count):
        new = model(new, places)[:, -1:].argmax(-1)
        ids, places = torch.cat([ids, new], dim=1), places[-1:] + 1
    return ids[0, -count:].tolist()


@pytest.mark.slow
def test_every_named_model_has_a_place_for_every_tensor() -> None:
    seen = set()
    for name in catalog.names():
        config = Config.from_name(name, n_layer=1 + (Config.from_name(name).first_k_dense_replace or 0))
        switches = {key: value for key, value in vars(config).items() if isinstance(value, bool)}
        kind = (to_hf(config)["model_type"], config.n_expert > 0, config.n_query_groups == config.n_head, *switches.values())
        if kind not in seen:
            seen.add(kind)
            keys = shapes(config, name)
            assert {key for slot in hf_slots(config, kind[0], tied=False).values() for key in slot.keys} == keys.keys(), name
    assert len(seen) > 25
