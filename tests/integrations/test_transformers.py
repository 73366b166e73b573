"""A Skip2-LoRA adapter on transformers' models: the same logits and the same text as here."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.testing import assert_close

from litgpt import checkpoint
from litgpt.convert import portable
from litgpt.errors import UserError
from litgpt.integrations.transformers import load_skip2lora
from tests.helpers import family_configs as configs, tiny
from tests.helpers.cases import quick

FAMILIES = (
    *("llama", "mistral", "mixtral", "gpt_neox", "gpt_neox sequential", "falcon", "falcon new decoder", "stablelm", "stablelm parallel"),
    *("phi", "phi3", "gemma", "gemma2", "gemma3", "qwen2", "qwen3", "qwen3_moe", "olmo", "olmo2", "smollm3", "granite", "gpt2"),
)
SKIP: dict[str, Any] = {"lora_r": 3, "lora_alpha": 7, "skip2lora_enabled": True}
BEHIND: dict[str, Any] = {"lora_query": True, "lora_value": True, "lora_projection": True, "lora_head": True}
PLACES: dict[str, dict[str, Any]] = {
    "lm_head": {"skip2lora_block_indices": [0, 2]},
    "literal taps": {"skip2lora_block_indices": "all", "skip2lora_norm": "none", "skip2lora_r": 2, "skip2lora_alpha": 1},
    "ln_f": {"skip2lora_output_layer": "transformer.ln_f", "lora_head": True},
    "block": {"skip2lora_output_layer": "transformer.h.2", "skip2lora_block_indices": [0, 1], **BEHIND, "lora_mlp": True},
    "warm-up": {"skip2lora_warmup": True, "skip2lora_block_indices": "all", **BEHIND},
    "patterns": {
        "skip2lora_output_layer": "transformer.h.2",
        **BEHIND,
        "lora_rank_pattern": {"q_proj": 5, "attn.proj": 2},
        "lora_alpha_pattern": {"v_proj": 3, "lm_head": 2},
    },
    "PiSSA": {"skip2lora_output_layer": "transformer.h.2", "lora_variant": "pissa", **BEHIND},
    "rsLoRA": {"skip2lora_output_layer": "transformer.h.2", "lora_rslora": True, **BEHIND},
}
IDX = tiny.ids(2, 17)


def hf_of(family: str) -> Any:
    return copy.deepcopy(configs.pair(family)[0])


def trained(family: str, folder: Path, size: float = 0.1, **settings: Any) -> Any:
    """Our model with an adapter that has moved by `size`, and its adapter folder."""
    model = tiny.move_adapters(configs.ours(family, **SKIP, **settings), size=size)
    tiny.write_adapter(folder, folder.parent / "gone", model, **SKIP, **settings)
    checkpoint.save_config(model.config, folder)
    return model


def assert_same(hf: Any, ours: Any, idx: torch.Tensor = IDX) -> None:
    with torch.no_grad():
        assert_close(hf(idx).logits, ours(idx), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", quick(FAMILIES, "llama", "mixtral", "gpt_neox", "falcon new decoder", "phi3", "gemma3", "gpt2"))
def test_logits_equal_ours(family: str, tmp_path: Path) -> None:
    hf, plain = hf_of(family), configs.pair(family)[0]
    ours = trained(family, tmp_path / "lm_head", **PLACES["lm_head"])
    tail = {key: value for key, value in PLACES["block"].items() if key != "lora_mlp" or not ours.config.n_expert}
    with load_skip2lora(hf, tmp_path / "lm_head"), torch.no_grad():
        assert_same(hf, ours)
        assert (hf(IDX).logits - plain(IDX).logits).abs().max() > 0.01
    ours = trained(family, tmp_path / "block", **tail)
    with load_skip2lora(hf, tmp_path / "block"):
        assert_same(hf, ours)
    with torch.no_grad():
        assert torch.equal(hf(IDX).logits, plain(IDX).logits)


@pytest.mark.parametrize("family", quick(["llama", "gpt_neox", "phi3"], "llama"))
@pytest.mark.parametrize("place", PLACES)
def test_places_and_both_kinds_of_folder(family: str, place: str, tmp_path: Path) -> None:
    ours = trained(family, tmp_path / "lit", **PLACES[place])
    weights = checkpoint.load_weights(tmp_path / "lit" / "lit_model.pth.lora")
    (tmp_path / "portable").mkdir()
    portable.write(tmp_path / "portable", ours.config, weights, "org/base", configs.pair(family)[0].config.model_type)
    for folder in ("lit", "portable"):
        hf = hf_of(family)
        load_skip2lora(hf, tmp_path / folder)
        assert_same(hf, ours)


@pytest.mark.parametrize("family", quick(["llama", "gpt_neox", "gemma3", "phi3", "gpt2", "falcon"], "llama", "gemma3"))
@pytest.mark.parametrize("place", quick(["lm_head", "block"], "block"))
def test_greedy_text_with_a_cache(family: str, place: str, tmp_path: Path) -> None:
    ours = trained(family, tmp_path / "adapter", size=0.6, **PLACES[place])  # enough to change what a tied random model repeats
    hf, prompt = hf_of(family), tiny.ids(1, 9)
    hf.generation_config.eos_token_id = None
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = hf.generate(prompt, **settings)[0, 9:].tolist()
    expected = list(tiny.generate(ours, prompt[0], 21, temperature=0.0))
    with load_skip2lora(hf, tmp_path / "adapter"):
        assert hf.generate(prompt, **settings)[0, 9:].tolist() == expected
        padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt[:, :9]], dim=1)
        batch = torch.cat([padded, tiny.ids(1, 13, seed=2)])
        mask = torch.ones_like(batch)
        mask[0, :4] = 0
        assert hf.generate(batch, attention_mask=mask, **settings)[0, 13:].tolist() == expected
    assert expected != plain


def test_remove_and_failed_passes(tmp_path: Path) -> None:
    ours = trained("llama", tmp_path / "adapter", **PLACES["lm_head"])
    hf = hf_of("llama")
    adapter = load_skip2lora(hf, tmp_path / "adapter")
    stop = hf.model.norm.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        hf(tiny.ids(3, 5))
    stop.remove()
    assert_same(hf, ours)  # nothing is left of the pass that failed
    assert not any("skip2lora" in name for name in hf.state_dict())
    adapter.remove()
    adapter.remove()
    with torch.no_grad():
        assert torch.equal(hf(IDX).logits, configs.pair("llama")[0](IDX).logits)


def test_bfloat16_models_keep_their_dtype(tmp_path: Path) -> None:
    ours = trained("llama", tmp_path / "adapter", **PLACES["block"])
    hf = hf_of("llama").bfloat16()
    with load_skip2lora(hf, tmp_path / "adapter"), torch.no_grad():
        got = hf(IDX).logits
        assert got.dtype == torch.bfloat16
        assert_close(got.float(), ours(IDX), rtol=0.1, atol=0.1)


def test_refusals(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    trained("llama", tmp_path / "adapter", **PLACES["lm_head"])
    with pytest.raises(UserError, match="n_layer is 2, the adapter's 3; intermediate_size is 60, the adapter's 56"):
        load_skip2lora(configs.hf_model("llama", num_hidden_layers=2, intermediate_size=60), tmp_path / "adapter")
    with pytest.raises(UserError, match="norm_class_name is LayerNorm, the adapter's RMSNorm"):
        load_skip2lora(hf_of("gpt_neox"), tmp_path / "adapter")
    with pytest.raises(UserError, match="Linear is not a causal LM of a supported family: .*llama"):
        load_skip2lora(torch.nn.Linear(2, 2), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"LlamaModel has no modules model\.layers\.0, model\.layers\.2, model\.norm: a plain causal LM"):
        load_skip2lora(transformers.AutoModel.from_config(configs.hf_config("llama")), tmp_path / "adapter")
    with pytest.raises(UserError, match="the folder adapter in it holds a model or an adapter"):
        load_skip2lora(hf_of("llama"), tmp_path)
    plain = tiny.move_adapters(configs.ours("llama", lora_r=2, lora_query=True))
    tiny.write_adapter(tmp_path / "lora", tmp_path, plain, lora_r=2, lora_query=True)
    checkpoint.save_config(plain.config, tmp_path / "lora")
    with pytest.raises(UserError, match="without Skip2-LoRA: `litgpt convert_adapter`"):
        load_skip2lora(hf_of("llama"), tmp_path / "lora")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"load it with peft\.PeftModel"):
        load_skip2lora(hf_of("llama"), tmp_path / "peft")
