"""Answer-only LoRA: replies computed alone, behind cached prompts, against full passes with LoRA masked by position."""

from __future__ import annotations

import itertools
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from litgpt.activations.cache import ActivationCache, CacheSettings, Recompute, activations, fingerprint, plan, shared
from litgpt.activations.prompts import replies
from litgpt.errors import UserError
from litgpt.generate.engine import Batch, Row, Session, generate_batch
from litgpt.generate.sampling import Sampling
from litgpt.lora import end_warmup, mark_only_lora_as_trainable, start_warmup
from litgpt.loss import HeadLoss, loss_of
from litgpt.packing import shared_stem
from litgpt.sample import Sample
from tests.helpers import tiny
from tests.helpers.cases import quick

CPU = torch.device("cpu")
OPEN = [7, 9, 7]  # the invocation
EVERYWHERE = {"lora_query": True, "lora_key": True, "lora_value": True, "lora_projection": True, "lora_mlp": True}
ALORA: dict[str, Any] = {"lora_r": 3, "lora_alpha": 5, **EVERYWHERE, "alora_enabled": True, "alora_invocation_tokens": OPEN}
WINDOW = {"sliding_window_size": 6, "sliding_window_indices": [1, 0, 1, 1, 0]}
SKIP = {"skip2lora_enabled": True, "skip2lora_block_indices": [0, 2, 4]}
CASES: dict[str, dict[str, Any]] = {
    "all blocks": {},
    "late blocks": {"lora_block_indices": [2, 4]},
    "window": WINDOW,
    "soft cap": {"attention_logit_softcapping": 5.0},
    "learned positions": {"learned_positions": True, "norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "bias": True},
    "normalised q and k": {"norm_qk": True},
    "alibi": {"alibi": True, "clip_qkv": 1.5, "rotary_percentage": 0.0},
    "parallel": {"parallel_residual": True, "shared_attention_norm": True, "norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP"},
    "experts": {"mlp_class_name": "LLaMAMoE", "n_expert": 4, "n_expert_per_token": 2, "moe_intermediate_size": 24},
    "latent attention": {
        "latent_attention": {"q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 6, "qk_nope_head_dim": 8, "v_head_dim": 7},
        "n_query_groups": 4,
        "rope_interleave": True,
        "lora_key": False,
        "lora_value": False,
    },
    "head": {"lora_head": True},
    "behind Skip2-LoRA": {**SKIP, "skip2lora_block_indices": [0, 2], "skip2lora_output_layer": "transformer.h.3"},
}


def conversation(turns: list[tuple[int, int]], stem: list[int], seed: int) -> Sample:
    """Prompts and replies of these lengths; every reply is opened by OPEN and learned."""
    generator = torch.Generator().manual_seed(seed)
    tokens, mask = list(stem), [0] * len(stem)
    for prompt, reply in turns:
        tokens += [*torch.randint(10, 101, (prompt,), generator=generator).tolist(), *OPEN]
        mask += [0] * (prompt + len(OPEN))
        tokens += torch.randint(10, 101, (reply,), generator=generator).tolist()
        mask += [1] * reply
    return Sample(array("i", tokens), bytearray(mask))


def samples(stem: int = 0) -> list[Sample]:
    first = list(range(10, 10 + stem))
    return [conversation(turns, first, seed) for seed, turns in enumerate([[(4, 5)], [(9, 1), (3, 7)], [(2, 3)], [(1, 2), (5, 4), (2, 6)]])]


def model_of(case: str, **settings: Any) -> Any:
    model = tiny.move_adapters(tiny.tiny(**{**ALORA, **CASES[case], **settings}))
    mark_only_lora_as_trainable(model)
    return model


def reference(model: Any, chosen: list[Sample]) -> torch.Tensor:
    """The sum of the losses, each reply in a full pass of its own: LoRA acts from the last OPEN on."""
    total = torch.zeros(())
    for sample in chosen:
        for start, stop in replies(sample, OPEN):
            ids = torch.tensor(sample.input_ids[: stop + 1])
            logits = model(ids[None, :-1])[0]
            total = total + F.cross_entropy(logits[start + len(OPEN) - 1 :], ids[start + len(OPEN) :], reduction="sum")
    return total


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def cached(model: Any, chosen: list[Sample], folder: Path = Path("unused"), mode: str = "memory") -> Any:
    settings = CacheSettings(mode, folder, torch.float32)
    cache = activations(model, chosen, range(len(chosen)), "training", settings, CPU)
    assert isinstance(cache, ActivationCache)
    return cache


@pytest.mark.parametrize(
    ("case", "stem"),
    quick(
        itertools.product(CASES, (9, 0)),
        *(("all blocks", 0), ("all blocks", 9), ("window", 9), ("latent attention", 9), ("behind Skip2-LoRA", 9)),
    ),
)
def test_replies_alone_are_full_passes(case: str, stem: int) -> None:
    model, chosen = model_of(case), samples(stem)
    loss = reference(model, chosen)
    want = gradients(model, loss)
    assert want and sum(gradient.abs().sum() > 0 for gradient in want.values()) > 0.8 * len(want)  # an expert may have no token
    for source in (Recompute(model, chosen, CPU), cached(model, chosen)):
        for batches in ([[0, 1, 2, 3]], [[2], [3, 1], [0]]):
            parts = [loss_of(model, source(batch), HeadLoss.of(model)) for batch in batches]
            assert_close(sum(parts), loss, rtol=1e-5, atol=1e-4)
            got = gradients(model, sum(parts))
            assert got.keys() == want.keys()
            for name in want:
                assert_close(got[name], want[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_long_rope_takes_factors_by_the_whole_sequence() -> None:
    rope = {
        "rope_type": "longrope",
        "original_max_seq_len": 20,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "attention_factor": 1.2,
    }
    model, chosen = model_of("all blocks", rope_adjustments=rope), samples()
    lengths = [len(sample.input_ids) for sample in chosen]
    assert min(lengths) <= 20 < max(lengths)
    whole = [chosen[i] for i in (0, 1, 2)]  # one reply each, or in one case a first one that is short with its sample long
    single = [sample for sample in whole if len(replies(sample, OPEN)) == 1]
    assert_close(loss_of(model, Recompute(model, single, CPU)(range(len(single))), HeadLoss.of(model)), reference(model, single))


@pytest.mark.parametrize("layer", ["lm_head", "transformer.ln_f", "transformer.h.4"])
def test_features_behind_a_warm_up(layer: str) -> None:
    """Behind answer-only LoRA, trained and frozen, the taps of the replies' positions are those of full passes."""
    blocks = [0, 2] if layer == "transformer.h.4" else [0, 2, 4]
    model = model_of("all blocks", **{**SKIP, "skip2lora_block_indices": blocks, "skip2lora_warmup": True, "skip2lora_output_layer": layer})
    chosen = samples(9)
    start_warmup(model)
    assert_close(loss_of(model, cached(model, chosen)([0, 1, 2, 3]), HeadLoss.of(model)), without_skip(model, chosen), rtol=1e-5, atol=1e-4)
    end_warmup(model)
    loss = reference(model, chosen)
    want = gradients(model, loss)
    for source in (Recompute(model, chosen, CPU), cached(model, chosen)):
        got = loss_of(model, source([0, 1, 2, 3]), HeadLoss.of(model))
        assert_close(got, loss, rtol=1e-5, atol=1e-4)
        for name, gradient in gradients(model, got).items():
            assert_close(gradient, want[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", ["lm_head", "transformer.ln_f"])
def test_features_of_answers_that_begin_alike(layer: str) -> None:
    """The stem of one question's answers reaches into the answers, so that it carries loss."""
    chosen = [conversation([(4, 20)], [], 1)] * 3
    chosen = [Sample(array("i", [*each.input_ids[:-3], 20 + i, 30, 40]), each.loss_mask) for i, each in enumerate(chosen)]
    assert shared_stem(chosen) == len(chosen[0].input_ids) - 3
    model = model_of("all blocks", **{**SKIP, "skip2lora_block_indices": [0, 2], "skip2lora_warmup": True, "skip2lora_output_layer": layer})
    start_warmup(model)
    end_warmup(model)
    loss = reference(model, chosen)
    for source in (Recompute(model, chosen, CPU), cached(model, chosen)):
        assert_close(loss_of(model, source([0, 1, 2]), HeadLoss.of(model)), loss, rtol=1e-5, atol=1e-4)


def without_skip(model: Any, chosen: list[Sample]) -> torch.Tensor:
    taps, model.skip_sum = model.skip_sum, lambda taps: 0.0
    for block in (blocks := [block for block in model.blocks if block.skip2lora is not None]):
        block.kept, block.skip2lora = block.skip2lora, None
    loss = reference(model, chosen)
    for block in blocks:
        block.skip2lora = block.kept
    model.skip_sum = taps
    return loss


def test_samples_that_are_trained_and_validated_are_cached_once() -> None:
    model, chosen = model_of("late blocks"), samples(9)
    cache, again = cached(model, chosen), [chosen[i] for i in (3, 1)]
    view = shared(cache, again, [0, 1])
    assert view is not None and view.store is cache.store
    assert_close(view([0, 1]).x, cache([3, 1]).x)
    assert_close(view([1]).targets, cache([1]).targets)
    assert shared(cache, samples(8), [0]) is None and shared(Recompute(model, chosen, CPU), again, [0]) is None


def test_a_cache_on_disk_is_found_again_and_is_the_prompts_own(tmp_path: Path) -> None:
    model, chosen = model_of("all blocks"), samples(9)
    first = cached(model, chosen, tmp_path, "disk")([1, 3])
    tiny.move_adapters(model, seed=9)  # other adapters, the same prompts
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    again = cached(model, chosen, tmp_path, "disk")([1, 3])
    assert torch.equal(first.x, again.x) and written == {file: file.stat().st_mtime_ns for file in written}
    layout = plan(model, chosen, range(4), torch.float32)
    before = fingerprint(model, chosen, layout, CPU)
    with torch.no_grad():
        model.transformer.h[4].mlp.proj.linear.weight[0, 0] += 1
    assert fingerprint(model, chosen, layout, CPU) != before


def test_replies_of_a_sample() -> None:
    assert replies(samples()[3], OPEN) == [(1, 5), (11, 17), (20, 28)]
    assert all(replies(sample, OPEN) for sample in samples())


@pytest.mark.parametrize("mask", [[0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
def test_a_reply_without_invocation(mask: list[int]) -> None:
    with pytest.raises(UserError, match=r"alora_invocation_tokens \[7, 9, 7\]"):
        replies(Sample(array("i", [1, 7, 9, 8, 5, 6]), bytearray(mask)), OPEN)


@pytest.mark.parametrize("parts", [[30], [12, 1, 17], [5, 7, 1, 1, 16]])
def test_answering_in_parts_is_the_full_pass(parts: list[int]) -> None:
    """With the key/value cache, however the tokens come: LoRA acts from the last invocation on, and not before the first."""
    model = model_of("all blocks")
    ids = tiny.ids(2, 30) + 10
    ids[0, 9:12] = ids[0, 18:21] = ids[1, 5:8] = torch.tensor(OPEN)
    ids %= 101
    whole = model(ids)
    plain = tiny.tiny()
    plain.load_state_dict({k.replace("linear.", ""): v for k, v in model.state_dict().items() if "lora_" not in k})
    with torch.no_grad():
        assert_close(whole[0, :18], plain(ids)[0, :18])
        assert (whole[0, 20:] - plain(ids)[0, 20:]).abs().max() > 0.1
        model.set_kv_cache(1)
        row, got, done = ids[1:], [], 0
        for part in parts:
            got.append(model(row[:, done : done + part], torch.arange(done, done + part)))
            done += part
    assert_close(torch.cat(got, dim=1), whole[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [{"lora_variant": "dora"}, dict.fromkeys(EVERYWHERE, False)])
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="alora_enabled"):
        model_of("all blocks", **wrong)


def test_conversations_and_batches_read_earlier_replies_without_lora() -> None:
    model = model_of("all blocks")
    session, sampling = Session(model), Sampling(temperature=0.0)
    first = [20, 21, 22, *OPEN]
    reply = list(session.answer(first, 5, sampling))
    second = [*first, *reply, 30, 31, *OPEN]
    fresh = list(tiny.generate(model, torch.tensor(second), len(second) + 5, temperature=0.0))
    assert list(session.answer(second, 5, sampling)) == fresh
    assert generate_batch(model, [second, first], 5, sampling) == [fresh, reply]
    batch, row, got = Batch(model, chunk=3, keep_bytes=2**20), Row(second, sampling), list[int]()
    batch.add(row)
    while len(got) < 5:
        got += [row.draw(logits) for _, logits in batch.step()]
    assert got == fresh
