"""Decoding against transformers and the full pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from litgpt.errors import UserError
from tests.helpers import tiny
from tests.helpers.cases import quick


def greedy(model: Any, prompt: torch.Tensor, length: int, **settings: Any) -> list[int]:
    return list(tiny.generate(model, prompt, length, temperature=0.0, **settings))


@pytest.mark.parametrize("family", quick(["llama", "mistral", "neox"], "mistral"))
def test_greedy_text_of_transformers(family: str) -> None:
    changes = {"eos_token_id": None, "bos_token_id": None}
    hf = {"llama": tiny.hf_llama, "mistral": lambda **kw: tiny.hf_mistral(sliding_window=7, **kw), "neox": tiny.hf_neox}[family](**changes)
    prompt = tiny.ids(1, 9)
    want = hf.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False, pad_token_id=0)[0, 9:].tolist()
    assert len(want) == 30 and len(set(want)) > 2
    model = tiny.from_hf(hf)
    assert greedy(model, prompt[0], 39) == want
    stop = want[17]
    assert greedy(model, prompt[0], 39, stop_tokens=([stop],)) == want[: want.index(stop)]
    pair = want[20:22]
    first = next(i for i in range(29) if want[i : i + 2] == pair)
    assert greedy(model, prompt[0], 39, stop_tokens=(pair,)) == want[:first]


@pytest.mark.parametrize("output", quick(["lm_head", "transformer.ln_f", "transformer.h.2"], "transformer.h.2"))
def test_skip2lora_decodes_as_the_full_pass_says(output: str) -> None:
    settings = {
        "skip2lora_enabled": True,
        "lora_r": 3,
        "skip2lora_output_layer": output,
        "skip2lora_block_indices": [0, 1],
        **tiny.ALL_LORA,
    }
    model = tiny.move_adapters(tiny.tiny(**settings))
    ids = tiny.ids(1, 6)[0]
    got = greedy(model, ids, 30)
    with torch.no_grad():
        for token in got:
            assert int(model(ids[None])[0, -1].argmax()) == token
            ids = torch.cat((ids, torch.tensor([token])))
    assert got != greedy(tiny.tiny(), tiny.ids(1, 6)[0], 30)


def test_a_seed_repeats_the_draws() -> None:
    model, prompt = tiny.tiny(), tiny.ids(1, 5)[0]

    def run(seed: int) -> list[int]:
        return list(tiny.generate(model, prompt, 40, top_k=20, generator=torch.Generator().manual_seed(seed)))

    assert run(1) == run(1) != run(2)


def test_repetition_penalty_of_transformers() -> None:
    hf = tiny.hf_llama(eos_token_id=None, bos_token_id=None)
    prompt, settings = tiny.ids(1, 9), {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    want = hf.generate(prompt, attention_mask=torch.ones_like(prompt), repetition_penalty=1.7, **settings)[0, 9:].tolist()
    model = tiny.from_hf(hf)
    assert greedy(model, prompt[0], 39, repetition_penalty=1.7) == want != greedy(model, prompt[0], 39)


def test_the_cache_goes() -> None:
    model = tiny.tiny()
    ids = tiny.generate(model, tiny.ids(1, 9)[0], 15, temperature=0.0)
    next(ids)
    assert model.blocks[0].attn.kv_cache is None  # the model is free between two tokens
    assert len(list(ids)) == 5
    assert model.blocks[0].attn.kv_cache is None
    ids = tiny.generate(model, tiny.ids(1, 9)[0], 15, temperature=0.0)
    next(ids)
    ids.close()
    assert model.blocks[-1].attn.kv_cache is None


def test_prompt_computes_one_row_of_logits() -> None:
    model, seen = tiny.tiny(), []
    model.lm_head.register_forward_hook(lambda module, given, out: seen.append((tuple(out.shape), out.is_inference())))
    for _ in tiny.generate(model, tiny.ids(1, 20)[0], 23, temperature=0.0):
        assert not torch.is_inference_mode_enabled()  # the caller's code is not drawn in
    assert seen == [((1, 101), True)] * 3


def test_mode_is_restored_and_training_goes_on() -> None:
    model = tiny.move_adapters(tiny.tiny(lora_r=2, lora_dropout=0.5, **tiny.ALL_LORA))
    prompt = tiny.ids(1, 9)[0]
    want = greedy(model, prompt, 30)
    assert greedy(model.train(), prompt, 30) == want  # no dropout meanwhile
    assert model.training
    model(prompt[None]).sum().backward()
    assert model.transformer.h[0].attn.qkv.lora_A.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 65}, ["9 + 56 = 65 tokens", "at most 64"]),
        ({"length": 9}, ["max_returned_tokens is 9", "9 tokens"]),
        ({"prompt": torch.tensor([], dtype=torch.long)}, ["empty"]),
        ({"prompt": torch.tensor([3, 101])}, ["id 101", "has 101"]),
        ({"temperature": -0.5}, ["temperature is -0.5"]),
        ({"temperature": float("nan")}, ["temperature is nan"]),
        ({"top_k": 0}, ["top_k is 0"]),
        ({"top_p": 1.5}, ["top_p is 1.5"]),
        ({"top_p": -0.1}, ["top_p is -0.1"]),
        ({"min_p": 2.0}, ["min_p is 2.0"]),
        ({"repetition_penalty": 0.0}, ["repetition_penalty is 0.0"]),
        ({"presence_penalty": float("inf")}, ["presence_penalty is inf"]),
    ],
    ids=str,
)
def test_what_is_refused_before_anything_runs(settings: dict[str, Any], words: list[str]) -> None:
    arguments: dict[str, Any] = {"prompt": tiny.ids(1, 9)[0], "length": 20, **settings}
    with pytest.raises(UserError) as caught:
        tiny.generate(tiny.tiny(n_layer=1), arguments.pop("prompt"), arguments.pop("length"), **arguments)  # not even iterated
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_whole_context_can_be_used() -> None:
    model = tiny.tiny(n_layer=1)
    assert len(greedy(model, tiny.ids(1, 9)[0], 64)) == 55
    model.max_seq_length = 32
    with pytest.raises(UserError, match="at most 32"):
        tiny.generate(model, tiny.ids(1, 9)[0], 33)


def test_answers_of_one_model_may_alternate() -> None:
    model, prompts = tiny.tiny(), (tiny.ids(1, 9)[0], tiny.ids(1, 6, seed=1)[0])
    alone = [greedy(model, prompt, 20) for prompt in prompts]
    answers = [tiny.generate(model, prompt, 20, temperature=0.0) for prompt in prompts]
    first = [[next(answer) for answer in answers] for _ in range(5)]
    assert [list(ids) for ids in zip(*first, strict=True)] == [ids[:5] for ids in alone]
    assert [list(answer) for answer in answers] == [ids[5:] for ids in alone]
