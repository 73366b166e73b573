"""LoRA as a GGUF adapter: llama.cpp (xllamacpp, a build of it from PyPI) answers as the adapted model here does."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from litgpt import checkpoint, lora
from litgpt.__main__ import main
from litgpt.convert.adapter import convert_adapter
from litgpt.convert.gguf.export import convert_to_gguf
from litgpt.errors import UserError
from tests.helpers import gguf_files, tiny
from tests.helpers.cases import first, quick

PROMPTS = ([5, 17, 99, 3, 200, 41, 7], [50, 51, 52, 53], [300, 60, 4], [60] * 9)
LORA: dict[str, Any] = {"lora_r": 3, "lora_alpha": 7, **tiny.ALL_LORA}


def llama_cpp(base: Path, adapter: Path) -> Callable[[list[int], int], tuple[list[int], dict[int, torch.Tensor]]]:
    """Return a function from a prompt and V to llama.cpp's greedy answer and the log-probabilities (V,) of tokens that end a character."""
    x = pytest.importorskip("xllamacpp")
    settings = x.CommonParams()
    settings.model.path = str(base)
    settings.n_ctx, settings.n_gpu_layers, settings.warmup, settings.verbosity = 256, 0, False, -1
    settings.cpuparams.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = x.ggml_type.GGML_TYPE_F32
    settings.lora_adapters = [x.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = x.Server(settings)

    def answer(prompt: list[int], V: int) -> tuple[list[int], dict[int, torch.Tensor]]:
        body = json.dumps(
            {"prompt": prompt, "n_predict": 8, "temperature": -1, "n_probs": V, "return_tokens": True, "cache_prompt": False}
        ).encode()
        request = urllib.request.Request(f"{server.listening_address}/completion", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            content = json.load(reply)
        tokens, found, place = content["tokens"], dict[int, torch.Tensor](), 0
        for entry in content.get("completion_probabilities", ()):
            place = tokens.index(entry["id"], place)
            found[place] = torch.full((V,), -torch.inf)
            for top in entry["top_logprobs"]:
                found[place][top["id"]] = top["logprob"]
            place += 1
        return tokens, found

    return answer


def assert_same_answers(base: Path, adapter: Path, model: Any, prompts: Iterable[list[int]]) -> None:
    answer, compared = llama_cpp(base, adapter), 0
    for prompt in prompts:
        tokens, theirs = answer(prompt, model.config.V)
        if model.switch is not None:  # llama-server begins a token before the invocation
            start = model.switch.start_of(prompt)
            model.switch.start = max(0, start - 1) if start < len(prompt) else None
        for place, token in enumerate(tokens):
            ours = model(torch.tensor([prompt + tokens[:place]]))[0, -1].log_softmax(-1)
            assert ours[token] > ours.max() - 0.05
            if place in theirs:
                torch.testing.assert_close(theirs[place], ours, atol=2e-2, rtol=1e-2)
                compared += 1
    assert compared > 4


def adapted(base: Path, **settings: Any) -> tuple[Any, Path]:
    """Return the model of a checkpoint folder with random adapters, and their folder."""
    config = lora.Config.from_checkpoint(base, **settings)
    model = lora.GPT(config)
    model.load_state_dict(checkpoint.load_weights(base / "lit_model.pth"), strict=False)
    folder = tiny.write_adapter(base.parent / "adapter", base, tiny.move_adapters(model), **settings)
    checkpoint.save_config(config, folder)
    return model.eval(), folder


# Separate q, k and v in paired rows or not, joined ones, experts, a joined gate, other heads and norms; what llama.cpp has no place for.
FAMILIES = {
    "llama": (),
    "mixtral": (),
    "gpt_neox": (),
    "falcon new decoder": ("lora_head",),
    "phi3": (),
    "qwen2": (),
    "qwen3": (),
    "gemma2": ("lora_head",),
    "gpt2": ("lora_head",),
}


@pytest.mark.parametrize("case", quick(FAMILIES, "llama"))
@torch.inference_mode()
def test_llama_cpp_gives_the_same_probabilities(case: str, tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    family, changes, *_ = gguf_files.CASES[case]
    _, base = gguf_files.checkpoint_folder(tmp_path, write_tiny_tokenizer, family, **changes)
    model, folder = adapted(base, **{**LORA, **dict.fromkeys(FAMILIES[case], False)})
    convert_to_gguf(base, tmp_path / "base.gguf")
    assert main(["convert_adapter", str(folder), str(tmp_path / "out"), "--to", "gguf"]) == 0
    assert_same_answers(tmp_path / "base.gguf", tmp_path / "out/adapter.gguf", model, PROMPTS)


@torch.inference_mode()
@pytest.mark.parametrize(
    "settings",
    first(
        [
            {"lora_rslora": True},
            {"alora_enabled": True, "alora_invocation_tokens": [1, 17]},
            {
                "lora_rslora": True,
                "lora_rank_pattern": {"q_proj": 5, "mlp.fc_1": 1},
                "lora_alpha_pattern": {"h.1.attn.qkv": 2, "o_proj": 9},
            },
        ],
        0,
    ),
    ids=["rslora", "alora", "patterns"],
)
def test_settings(settings: dict[str, Any], tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    """rsLoRA's factor, and LoRA that acts from the last invocation on, or not at all without one."""
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    model, folder = adapted(base, **{**LORA, "lora_key": False, "lora_head": False, **settings})
    convert_to_gguf(base, tmp_path / "base.gguf")
    convert_adapter(folder, tmp_path / "mine.gguf")
    assert_same_answers(
        tmp_path / "base.gguf", tmp_path / "mine.gguf", model, ([5, 99, 1, 17, 60, 61, 1, 17, 62], [1, 17, 52, 53], *PROMPTS)
    )
    fields = gguf.GGUFReader(tmp_path / "mine.gguf").fields
    assert fields["general.type"].contents() == "adapter" and fields["adapter.type"].contents() == "lora"
    assert fields["adapter.lora.alpha"].contents() == pytest.approx(7 * 3**0.5 if "lora_rslora" in settings else 7)
    tokens = fields.get("adapter.alora.invocation_tokens")
    assert (tokens and tokens.contents()) == settings.get("alora_invocation_tokens")


@torch.inference_mode()
def test_experts_with_ranks_of_their_own(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    _, base = gguf_files.checkpoint_folder(tmp_path, write_tiny_tokenizer, "mixtral")
    patterns = {"lora_rank_pattern": {"mlp.experts.0.fc_1": 5, "mlp.experts.1.proj": 1}, "lora_alpha_pattern": {"mlp.experts.1.fc_1": 2}}
    model, folder = adapted(base, **{**LORA, **patterns})
    convert_to_gguf(base, tmp_path / "base.gguf")
    convert_adapter(folder, tmp_path / "mine.gguf")
    assert_same_answers(tmp_path / "base.gguf", tmp_path / "mine.gguf", model, PROMPTS)


def test_refusals(tmp_path: Path, write_tiny_tokenizer: Callable[[Path], Path]) -> None:
    """Each names the reason and the remedy, and leaves no file."""
    base = tiny.write_base(tmp_path / "base", write_tiny_tokenizer)
    tied = checkpoint.load_weights(base / "lit_model.pth")
    tied["lm_head.weight"] = tied["transformer.wte.weight"]
    for settings, message in (
        ({"skip2lora_enabled": True, "lora_r": 2}, "Skip2-LoRA reads several blocks and adds to the output layer"),
        ({"lora_variant": "dora", **LORA}, "llama.cpp has no dora: run `litgpt merge_lora`"),
        (LORA, "no place for LoRA on lm_head. The base's head is its embedding"),
    ):
        if settings is LORA:
            checkpoint.save_weights(tied, base / "lit_model.pth")
        _, folder = adapted(base, **settings)
        with pytest.raises(UserError, match=message):
            convert_adapter(folder, tmp_path / "out", to="gguf")
        assert not (tmp_path / "out").exists()
        shutil.rmtree(folder)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds adapter_config.json: convert it to a litgpt folder first"):
        convert_adapter(tmp_path / "peft", tmp_path / "x.gguf", base)
    (tmp_path / "x.gguf").write_text("mine")
    _, folder = adapted(base, **{**LORA, "lora_head": False})
    with pytest.raises(UserError, match="x.gguf exists already"):
        convert_adapter(folder, tmp_path / "x.gguf")
