"""Folders that appear whole or not at all, weights that are tensors and nothing else, adapters that fit their base."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from litgpt import atomic, checkpoint, lora
from litgpt.__main__ import main
from litgpt.config import Config
from litgpt.errors import UserError
from tests.helpers import tiny

WriteTokenizer = Callable[[Path], Path]


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "lit_model.pth"
    checkpoint.save_weights({"a": torch.ones(2)}, file)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        checkpoint.save_weights({"a": torch.zeros(2)}, file)
    assert checkpoint.load_weights(file)["a"].tolist() == [1, 1]


@pytest.mark.parametrize("share", [0, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_base_is_one_message_with_and_without_a_manifest(
    share: float, tmp_path: Path, write_tiny_tokenizer: WriteTokenizer
) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    atomic.write_manifest(base)
    file = base / "lit_model.pth"
    size = file.stat().st_size
    os.truncate(file, int(size * share))
    with pytest.raises(UserError, match="is damaged: lit_model.pth has ") as caught:
        checkpoint.load_model(base, torch.float32)
    assert f"not {size:,}" in str(caught.value) and "Copy or make it again" in str(caught.value)
    (base / "manifest.json").unlink()
    with pytest.raises(UserError, match="lit_model.pth is not a readable checkpoint") as caught:
        checkpoint.load_model(base, torch.float32)
    assert "\n" not in str(caught.value)


def test_changed_settings_do_not_stop_a_base_from_loading(tmp_path: Path, write_tiny_tokenizer: WriteTokenizer) -> None:
    """Only weights are compared: generation_config.json is the user's to change."""
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    atomic.write_manifest(base)
    (base / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    checkpoint.load_model(base, torch.float32)


# --- The base's file ---


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_does_not_change_with_its_file(
    dtype: torch.dtype, quantize: str | None, tmp_path: Path, write_tiny_tokenizer: WriteTokenizer
) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    model = checkpoint.load_model(base, dtype, quantize=quantize)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with (base / "lit_model.pth").open("r+b") as file:
        file.write(bytes((base / "lit_model.pth").stat().st_size))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    os.truncate(base / "lit_model.pth", 100)  # would end the process with SIGBUS
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, write_tiny_tokenizer: WriteTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    renew = checkpoint.load_base

    def load(*args: Any) -> None:
        renew(*args)
        os.utime(base / "lit_model.pth", ns=(1, 1))

    monkeypatch.setattr(checkpoint, "load_base", load)
    with pytest.raises(UserError, match=r"lit_model\.pth was changed while it was read"):
        checkpoint.load_model(base, torch.float32)


def test_an_adapter_knows_the_weights_that_it_was_trained_on(tmp_path: Path, write_tiny_tokenizer: WriteTokenizer) -> None:
    base, folder = tiny.write_base(tmp_path / "base", write_tiny_tokenizer), tmp_path / "adapter"
    folder.mkdir()
    file = base / "lit_model.pth"
    checkpoint.save_base(base, folder)
    facts = json.loads((folder / "base.json").read_text())
    assert facts == {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "bytes": file.stat().st_size,
        "mtime_ns": file.stat().st_mtime_ns,
    }
    os.utime(file, ns=(1, 1))
    checkpoint.require_same_base(folder, base)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="other weights") as caught:
        checkpoint.require_same_base(folder, base)
    assert str(folder) in str(caught.value) and str(base) in str(caught.value) and "restore" in str(caught.value)
    (folder / "base.json").unlink()
    checkpoint.require_same_base(folder, base)


# --- Weights ---


def test_weights_round_trip(tmp_path: Path) -> None:
    shared = torch.randn(3, 4).bfloat16()
    weights = {"a": shared, "b": torch.randn(2), "c": shared}
    checkpoint.save_weights(weights, tmp_path / "w.pth")
    back = checkpoint.load_weights(tmp_path / "w.pth")
    assert all(torch.equal(back[key], weights[key]) and back[key].dtype == weights[key].dtype for key in weights)
    assert back["a"].data_ptr() == back["c"].data_ptr()  # stored once, one tensor again
    checkpoint.save_weights({"model": weights}, tmp_path / "m.pth")  # type: ignore[dict-item]
    assert checkpoint.load_weights(tmp_path / "m.pth").keys() == weights.keys()


class Attack:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.proof),))


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    proof, file = tmp_path / "proof", tmp_path / "w.pth"
    for write in (lambda: torch.save({"a": Attack(proof)}, file), lambda: file.write_bytes(pickle.dumps({"a": Attack(proof)}))):
        write()
        with pytest.raises(UserError, match="not a readable checkpoint") as caught:
            checkpoint.load_weights(file)
        assert str(file) in str(caught.value)
        assert not proof.exists()
    pickle.loads(file.read_bytes())
    assert proof.exists()  # the attack is a real one


def test_broken_weights(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    with pytest.raises(UserError, match="w.pth is missing"):
        checkpoint.load_weights(file)
    checkpoint.save_weights({"a": torch.randn(100, 100)}, file)
    whole = file.read_bytes()
    for content in (b"", b"not a checkpoint", whole[:-1000], whole[: len(whole) // 2], whole[:100]):
        file.write_bytes(content)
        with pytest.raises(UserError, match="w.pth is not a readable checkpoint") as caught:
            checkpoint.load_weights(file)
        assert "\n" not in str(caught.value)
    for foreign in ([1, 2], {"a": 1}, {"a": torch.ones(1), "b": {"c": torch.ones(1)}}, torch.ones(3)):
        torch.save(foreign, file)
        with pytest.raises(UserError, match="w.pth holds no state dict"):
            checkpoint.load_weights(file)


# --- Checkpoint folders ---


def test_a_folder_of_runs_names_one(tmp_path: Path) -> None:
    (tmp_path / "faq" / "final").mkdir(parents=True)
    (tmp_path / "faq" / "final" / "lit_model.pth.lora").touch()
    with pytest.raises(UserError, match=r"the folder faq in it holds a model or an adapter, name .*faq$"):
        checkpoint.require_checkpoint(tmp_path)


def test_require_checkpoint_names_what_is_missing(tmp_path: Path, write_tiny_tokenizer: WriteTokenizer) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        checkpoint.require_checkpoint(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"lacks lit_model\.pth, model_config\.yaml, tokenizer\.json: copy what is missing"):
        checkpoint.require_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="litgpt convert_to_litgpt"):
        checkpoint.require_checkpoint(tmp_path)
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    assert checkpoint.require_checkpoint(base) == base
    (base / "model_config.yaml").unlink()
    with pytest.raises(UserError, match=r"lacks model_config\.yaml: copy what is missing"):
        checkpoint.require_checkpoint(base)


def test_tokenizer_files_are_copied(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    (tmp_path / "to").mkdir()
    checkpoint.copy_tokenizer_files(tiny_tokenizer_dir, tmp_path / "to")
    assert sorted(os.listdir(tmp_path / "to")) == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]


PIECES = b"".join(b"\x0a\x0a\x0a\x03" + piece + b"\x15\x00\x00\x80\xbf" for piece in (b"abc", b"<s>", b"xyz"))  # SentencePiece's protobuf


@pytest.mark.parametrize(
    ("name", "content", "fits"),
    [
        ("tokenizer.model", PIECES, True),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", True),  # tiktoken
        ("tokenizer.model", PIECES[:-1], False),
        ("tokenizer.model", b"-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEA\n", False),
        ("tokenizer.model", b"", False),
        ("tokenizer.model", b"\x7fELF" + bytes(200), False),
        ("chat_template.jinja", b"{% for m in messages %}{{ m }}{% endfor %}", True),
        ("chat_template.jinja", b"{% \xff %}", False),
        ("generation_config.json", b"[1]", False),
        ("special_tokens_map.json", b"{'a': 1}", False),
    ],
)
def test_what_is_copied_is_what_its_name_says(name: str, content: bytes, fits: bool, tmp_path: Path) -> None:
    for folder in ("from", "to"):
        (tmp_path / folder).mkdir()
    (tmp_path / "from" / name).write_bytes(content)
    if fits:
        checkpoint.copy_tokenizer_files(tmp_path / "from", tmp_path / "to")
        assert (tmp_path / "to" / name).read_bytes() == content
    else:
        with pytest.raises(UserError, match=name):
            checkpoint.copy_tokenizer_files(tmp_path / "from", tmp_path / "to")
        assert not any((tmp_path / "to").iterdir())


LITGPT_FIELDS = """
name hf_config block_size n_layer n_embd vocab_size padding_multiple padded_vocab_size norm_class_name norm_eps norm_qk norm_qk_type
post_attention_norm post_mlp_norm parallel_residual shared_attention_norm n_head head_size n_query_groups attn_bias attention_scores_scalar
sliding_window_size sliding_window_indices attention_logit_softcapping rope_base rotary_percentage rope_condense_ratio rope_adjustments
rope_interleave intermediate_size moe_intermediate_size bias mlp_class_name gelu_approximate n_expert n_shared_expert n_expert_groups
n_topk_groups n_topk_scores_per_group n_expert_per_token first_k_dense_replace routed_scaling_factor norm_topk_prob scale_embeddings
lm_head_bias final_logit_softcapping norm_1 norm_2 latent_attention rope_local_base_freq rope_indices
"""  # of version 0.5.13, whose Config refuses any other


def test_saved_config_is_litgpts(tmp_path: Path) -> None:
    """No adapter settings in model_config.yaml."""
    config = lora.Config(**tiny.TINY, lora_r=4, lora_query=True)
    checkpoint.save_config(config, tmp_path)
    values = yaml.safe_load((tmp_path / "model_config.yaml").read_text())
    assert values["n_layer"] == 5 and not any("lora" in key for key in values)
    assert Config.from_checkpoint(tmp_path) == Config(**tiny.TINY)
    assert values.keys() <= set(LITGPT_FIELDS.split())
    granite = Config(**tiny.TINY, logits_scaling=2.0)
    checkpoint.save_config(granite, tmp_path)
    assert yaml.safe_load((tmp_path / "model_config.yaml").read_text()).keys() - set(LITGPT_FIELDS.split()) == {"logits_scaling"}
    assert Config.from_checkpoint(tmp_path) == granite


@pytest.mark.parametrize("name", ["OLMo-1B-hf", "OLMo-2-1124-7B", "mine"])
@pytest.mark.parametrize(("norm", "affine"), [("LayerNorm", False), ("LayerNorm", True), ("RMSNorm", True)])
def test_norms_without_weights_are_told_as_litgpt_tells_them(name: str, norm: str, affine: bool, tmp_path: Path) -> None:
    """LitGPT 0.5.13: a LayerNorm of a model with OLMo in its name has none. Another model needs our field, which LitGPT refuses."""
    config = Config(**{**tiny.TINY, "name": name, "norm_class_name": norm, "norm_affine": affine})
    checkpoint.save_config(config, tmp_path)
    assert Config.from_checkpoint(tmp_path) == config
    values = yaml.safe_load((tmp_path / "model_config.yaml").read_text())
    assert ("norm_affine" in values) == (affine != (norm != "LayerNorm" or "OLMo" not in name))


# the coefficients of their config.json on the hub; of an unknown mixture transformers' default for Mixtral, Qwen 2 and Qwen 3
@pytest.mark.parametrize(("name", "default"), [("Mixtral-8x7B-v0.1", 0.02), ("Qwen3-30B-A3B", 0.001), ("mine", 0.001)])
@pytest.mark.parametrize("value", [None, 0.0, 0.3])
def test_the_routers_loss_is_in_the_file_only_if_it_is_not_the_models_own(
    name: str, default: float, value: float | None, tmp_path: Path
) -> None:
    value = default if value is None else value
    experts = {"name": name, "mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "router_aux_loss_coef": value}
    config = Config(**{**tiny.TINY, **experts})
    checkpoint.save_config(config, tmp_path)
    assert Config.from_checkpoint(tmp_path) == config
    values = yaml.safe_load((tmp_path / "model_config.yaml").read_text())
    assert values.keys() - set(LITGPT_FIELDS.split()) == ({"router_aux_loss_coef"} if value != default else set())
    text = yaml.safe_dump({**values, "rope_interleave": False, "latent_attention": None})  # LitGPT's, which trains without this loss
    (tmp_path / "model_config.yaml").write_text(text)
    assert Config.from_checkpoint(tmp_path).router_aux_loss_coef == (value if value != default else 0.0)


# --- The base into a model ---


def on_meta(**settings: Any) -> Any:
    with torch.device("meta"):
        return lora.GPT(lora.Config(**{**tiny.TINY, **settings}))


def test_load_base_lists_everything() -> None:
    weights = tiny.tiny().state_dict()
    weights["transformer.h.3.mlp.fc_3.weight"] = weights.pop("transformer.h.3.mlp.fc_1.weight")
    del weights["transformer.ln_f.weight"]
    weights["transformer.h.0.attn.qkv.weight"] = torch.zeros(60, 32)
    with pytest.raises(UserError) as caught:
        checkpoint.load_base(on_meta(), weights, torch.float32, "some/lit_model.pth")
    message = str(caught.value)
    for part in (
        "some/lit_model.pth does not fit model 'tiny'",
        "transformer.h.3.mlp.fc_1.weight is missing",
        "transformer.ln_f.weight is missing",
        "transformer.h.3.mlp.fc_3.weight is unknown",
        "transformer.h.0.attn.qkv.weight has shape (60, 32), not (64, 32)",
    ):
        assert part in message, message


@pytest.mark.parametrize("tied", ["one tensor", "no head", "equal values only"])
def test_tied_heads(tied: str) -> None:
    """The head is the embedding if the file says so; a head of its own stays one."""
    weights = tiny.tiny().state_dict()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    if tied == "no head":
        del weights["lm_head.weight"]
    if tied == "equal values only":
        weights["lm_head.weight"] = weights["lm_head.weight"].clone()
    for settings in ({}, {"lora_r": 2, "lora_head": True}):
        model = on_meta(**settings)
        checkpoint.load_base(model, weights, torch.bfloat16, "file")
        head = getattr(model.lm_head, "linear", model.lm_head)
        assert head.weight.dtype == torch.bfloat16
        assert (head.weight is model.transformer.wte.weight) == (tied != "equal values only")
        assert torch.equal(head.weight, weights["transformer.wte.weight"].bfloat16())


def test_adapters_are_fresh_and_fp32_after_load_base() -> None:
    model = on_meta(lora_r=2, skip2lora_enabled=True, **tiny.ALL_LORA)
    checkpoint.load_base(model, tiny.tiny().state_dict(), torch.bfloat16, "file")
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu"
        assert parameter.dtype == (torch.float32 if lora.lora_filter(name) else torch.bfloat16)
        assert (parameter.abs().max() == 0) == name.endswith("lora_B"), name


def test_load_adapter_lists_everything() -> None:
    model = tiny.tiny(lora_r=3, lora_query=True, lora_value=True, n_layer=2)
    weights = {name: value for name, value in model.state_dict().items() if lora.lora_filter(name)}
    del weights["transformer.h.0.attn.qkv.lora_A"]
    weights["transformer.h.1.attn.qkv.lora_A"] = torch.zeros(9, 32)
    weights["transformer.h.1.attn.proj.lora_A"] = torch.zeros(3, 32)
    before = model.transformer.h[0].attn.qkv.lora_B.clone()
    weights["transformer.h.0.attn.qkv.lora_B"] = before + 1
    weights["transformer.h.1.attn.qkv.lora_B"] = torch.full_like(before, float("inf"))
    with pytest.raises(UserError) as caught:
        checkpoint.load_adapter(model, weights, "some/lit_model.pth.lora")
    for part in (
        "some/lit_model.pth.lora",
        "transformer.h.0.attn.qkv.lora_A is missing",
        "transformer.h.1.attn.qkv.lora_A has shape (9, 32), not (6, 32)",
        "transformer.h.1.attn.proj.lora_A is unknown",
        "transformer.h.1.attn.qkv.lora_B holds non-finite numbers",
    ):
        assert part in str(caught.value)
    assert torch.equal(model.transformer.h[0].attn.qkv.lora_B, before)  # nothing was loaded


# --- Save, load, same logits ---

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"lora_r": 3, "lora_alpha": 7, **tiny.ALL_LORA},
    "lora in late blocks": {"lora_r": 3, "lora_query": True, "lora_block_indices": "last:2"},
    "skip2lora": {"lora_r": 3, "skip2lora_enabled": True, "skip2lora_block_indices": [0, 1, 2, 3]},
    "skip2lora by older name": {"lora_r": 3, "skip2lora_enabled": True, "skip2lora_positions": ["transformer.h.1", "transformer.h.4"]},
    "skip2lora before block 3": {
        "lora_r": 3,
        "skip2lora_enabled": True,
        "skip2lora_r": 2,
        "skip2lora_alpha": 9,
        "skip2lora_norm": "none",
        "skip2lora_output_layer": "transformer.h.3",
        **tiny.ALL_LORA,
    },
}


def build(settings: dict[str, Any]) -> Any:
    own = {{"skip2lora_positions": "skip2lora_block_indices"}.get(key, key): value for key, value in settings.items()}
    return tiny.move_adapters(tiny.tiny(**{**tiny.SPEAKING, **own}))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_folder_gives_the_same_logits(kind: str, tmp_path: Path, write_tiny_tokenizer: WriteTokenizer) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    model = build(ADAPTERS[kind])
    folder = tiny.write_adapter(tmp_path / "adapter", base, model, **ADAPTERS[kind])
    (folder / "hyperparameters.yaml").write_text((folder / "hyperparameters.yaml").read_text() + "train: {epochs: 3}\nseed: 1\n")
    assert checkpoint.is_adapter_folder(folder) and not checkpoint.is_adapter_folder(base)
    loaded = checkpoint.load_model(folder, torch.float32)
    idx = tiny.ids(2, 15, V=320)
    with torch.no_grad():
        assert torch.equal(loaded(idx), model(idx))
        plain = checkpoint.load_model(base, torch.float32)
        assert (plain(idx) - model(idx)).abs().max() > 0.01
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_adapter_with_another_base(tmp_path: Path, write_tiny_tokenizer: WriteTokenizer) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    settings = {"lora_r": 3, "lora_query": True}
    folder = tiny.write_adapter(tmp_path / "adapter", tmp_path / "moved", build(settings), **settings)
    with pytest.raises(UserError, match="correct checkpoint_dir") as caught:
        checkpoint.load_model(folder, torch.float32)
    assert str(tmp_path / "moved") in str(caught.value) and "hyperparameters.yaml" in str(caught.value)
    idx = tiny.ids(1, 9, V=320)
    with torch.no_grad():
        assert torch.equal(checkpoint.load_model(folder, torch.float32, base=base)(idx), build(settings)(idx))


@pytest.mark.parametrize("text", [None, "", "- 1", "a: [", "lora_r: 3", "checkpoint_dir: null", "just text"])
def test_broken_hyperparameters(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "hyperparameters.yaml").write_text(text)
    for base in (None, tmp_path):
        if base is not None and text in ("lora_r: 3", "checkpoint_dir: null"):
            assert checkpoint.adapter_settings(tmp_path, base)[0] == base
            continue
        with pytest.raises(UserError, match=r"hyperparameters\.yaml(, line \d+: not valid YAML| is missing| must hold)"):
            checkpoint.adapter_settings(tmp_path, base)


def test_a_base_that_is_named_as_litgpts_command_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`litgpt finetune_lora org/model` of LitGPT 0.5.13 writes `checkpoint_dir: org/model` for checkpoints/org/model."""
    (tmp_path / "hyperparameters.yaml").write_text("checkpoint_dir: org/model\nlora_r: 2\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="names org/model as the adapter's base"):
        checkpoint.adapter_settings(".")
    for place in ("checkpoints/org/model", "org/model"):
        Path(place).mkdir(parents=True)
        assert checkpoint.adapter_settings(".") == (Path(place), {"lora_r": 2})


def test_settings_and_adapter_must_agree(tmp_path: Path, write_tiny_tokenizer: WriteTokenizer) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    model = build({"lora_r": 3, "lora_query": True})
    folder = tiny.write_adapter(tmp_path / "adapter", base, model, lora_r=4, lora_query=True)
    with pytest.raises(UserError, match=r"lit_model\.pth\.lora does not fit the adapter settings .* has shape \(3, 32\), not \(4, 32\)"):
        checkpoint.load_model(folder, torch.float32)


def test_merged_weights_win_over_the_adapter(tmp_path: Path, write_tiny_tokenizer: WriteTokenizer) -> None:
    """A folder with both, as plain LoRA leaves it, is an ordinary checkpoint: its base may be gone."""
    folder = tiny.write_base(tmp_path / "final", write_tiny_tokenizer)
    checkpoint.save_weights({"model": {}}, folder / "lit_model.pth.lora")  # type: ignore[dict-item]
    assert not checkpoint.is_adapter_folder(folder)
    assert isinstance(checkpoint.load_model(folder, torch.bfloat16), lora.GPT)


@pytest.mark.parametrize(
    ("dtype", "stored", "by_adapter"),
    [(torch.bfloat16, torch.float32, True), (torch.float32, torch.bfloat16, True), (torch.float32, torch.float32, False)],
)
def test_below_fp32_base_and_adapter_answer_and_not_the_merged_weights(
    dtype: torch.dtype, stored: torch.dtype, by_adapter: bool, tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]
) -> None:
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    settings = {"lora_r": 2, "lora_query": True}
    folder = tiny.write_adapter(tmp_path / "adapter", base, tiny.move_adapters(tiny.tiny(**tiny.SPEAKING, **settings)), **settings)
    alone = checkpoint.load_model(folder, dtype).state_dict()
    shutil.copy(base / "model_config.yaml", folder)
    write_tiny_tokenizer(folder)
    weights = checkpoint.load_weights(base / "lit_model.pth")
    checkpoint.save_weights({name: value.to(stored) for name, value in weights.items()}, folder / "lit_model.pth")
    both = checkpoint.load_model(folder, dtype).state_dict()
    assert (both.keys() == alone.keys()) == by_adapter
    merged = checkpoint.load_model(base, dtype).state_dict().keys()
    (folder / checkpoint.BASE).write_text(json.dumps({"bytes": 1, "mtime_ns": 1, "sha256": "of other weights"}))
    assert checkpoint.load_model(folder, dtype).state_dict().keys() == merged
    (folder / checkpoint.BASE).unlink()
    shutil.rmtree(base)
    assert checkpoint.load_model(folder, dtype).state_dict().keys() == merged


DATA = ["--data", "JSON", "--data.json_path", "data.json"]
NEEDS_A_MODEL: dict[str, list[str]] = {
    "generate": [],
    "chat": [],
    "validate": [],
    "finetune": DATA,
    "finetune_full": DATA,
    "sweep": [*DATA, "--grid.lora_r", "[2, 4]"],
    "convert_from_litgpt": ["--output_dir", "new"],
    "convert_to_gguf": ["--gguf_file", "new.gguf"],
    "convert_to_litgpt": [],
    "merge_lora": [],
    "convert_adapter": ["--output_dir", "new", "--checkpoint_dir", "folder"],
    "add_tokens": ["--output_dir", "new", "--tokens", '["<x>"]'],
    "convert_pretrained_checkpoint": ["--output_dir", "new"],
    "prompts": [],
}


IN_PLACE = [(command, file) for command in NEEDS_A_MODEL for file in checkpoint.FOREIGN_ADAPTERS]
IN_PLACE += [(name, checkpoint.ADAPTER_WEIGHTS) for name in ("finetune", "finetune_full", "sweep", "convert_to_litgpt", "convert_adapter")]


@pytest.mark.parametrize(("command", "file"), IN_PLACE)
def test_an_adapter_in_place_of_a_model_names_the_command_that_helps(
    command: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder", file).write_text("{}")
    assert main([command, "folder", *NEEDS_A_MODEL[command]]) == 1
    helps = "litgpt merge_lora" if file == checkpoint.ADAPTER_WEIGHTS else "litgpt convert_adapter"
    assert re.search("holds an?( LoRA)? adapter", error := capsys.readouterr().err) and helps in error
    assert [*Path().iterdir()] == [Path("folder")]


HELPS = {
    "a Skip2-LoRA result": ("lit_model.pth.lora", "Skip2-LoRA adapter, which generate", "To train, name its base (the/base)"),
    "a LLaMA-Adapter": ("lit_model.pth.adapter", "LLaMA-Adapter, which generate", "To train, name its base (the/base)"),
    "a Trainer's folder": ("checkpoint-500/adapter_config.json", "checkpoint-500 in it holds", "folder/checkpoint-500"),
    "PEFT beside a config": ("adapter_config.json", "it holds an adapter", "OUTPUT_DIR --checkpoint_dir BASE"),
    "a config without weights": ("onnx/model.onnx", "lacks lit_model.pth", "copy what is missing"),
}


@pytest.mark.parametrize("command", ["finetune", "finetune_full", "add_tokens"])
@pytest.mark.parametrize("what", HELPS)
def test_other_folders_in_place_of_a_model(
    what: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file, *texts = HELPS[what]
    Path("folder", file).parent.mkdir(parents=True)
    Path("folder", file).write_text("{}")
    Path("folder/hyperparameters.yaml").write_text(f"checkpoint_dir: the/base\nskip2lora_enabled: {'Skip2' in what}\n")
    if "config" in what:
        Path("folder/config.json").write_text("{}")
    assert main([command, "folder", *NEEDS_A_MODEL[command]]) == 1
    error = capsys.readouterr().err
    assert all(text in error for text in texts), error
