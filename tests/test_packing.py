"""Packed batches against each sample alone: logits, loss and gradients, for the shapes that attention comes in."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch.testing import assert_close

from litgpt.activations.cache import Recompute, is_cacheable
from litgpt.packing import Packing, pack, shared_ends, take, thinned
from litgpt.sample import Sample
from tests.helpers import tiny
from tests.helpers.cases import quick

CPU = torch.device("cpu")
SHAPES: dict[str, dict[str, Any]] = {
    "grouped heads": {},
    "window": {"sliding_window_size": 5, "sliding_window_indices": [1, 0, 1, 1, 0]},
    "window over the stem only": {"sliding_window_size": 12},
    "soft cap": {"attention_logit_softcapping": 3.0},
    "learned positions": {"learned_positions": True},
    "parallel": {"parallel_residual": True, "bias": True, "norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP"},
    "q and k normalised": {"norm_qk": True},
}


def samples_of(lengths: list[int], stem: int) -> list[Sample]:
    generator = torch.Generator().manual_seed(3)
    common, samples = torch.randint(101, (stem,), generator=generator).tolist(), []
    for number, length in enumerate(lengths):
        own = [number, *torch.randint(101, (length - stem - 1,), generator=generator).tolist()]
        samples.append(Sample(array("i", common + own), bytearray([0] + [1] * (length - 1))))
    return samples


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("lengths", quick([[15, 22, 11], [12, 12], [30, 11, 12, 13, 11], [17]], [15, 22, 11]))
@pytest.mark.parametrize("stem", [0, 9])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients_are_those_of_each_sample_alone(shape: str, stem: int, lengths: list[int]) -> None:
    """In double precision, every weight trained, positions of the shared stem with loss too: they count once for each sample."""
    model = tiny.tiny(**SHAPES[shape]).double()
    samples = samples_of(lengths, stem)
    batch = pack(samples, CPU, stem)
    pos = model.packed_positions(batch.packing)
    assert len(batch.ids) == (stem if len(lengths) > 1 else 0) + sum(length - 1 - (stem if len(lengths) > 1 else 0) for length in lengths)
    hidden = model.tail(*model.prefix(batch.ids, pos), pos)
    packed = F.cross_entropy(model.logits(hidden)[batch.at], batch.targets, reduction="sum")
    alone = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        ids = torch.tensor(sample.input_ids).long()
        alone = alone + F.cross_entropy(model(ids[None, :-1])[0], ids[1:], reduction="sum")
    fp32 = shape == "soft cap"  # its softmax is in fp32
    assert_close(packed, alone, rtol=1e-6 if fp32 else 1e-12, atol=0)
    for mine, theirs in zip(gradients(model, packed), gradients(model, alone), strict=True):
        assert_close(mine, theirs, rtol=1e-3 if fp32 else 1e-9, atol=1e-5 if fp32 else 1e-11)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 4), st.integers(1, 3))
def test_rows_come_back_from_the_padded_form(lengths: list[int], stem: int, columns: int) -> None:
    packing = Packing.of(lengths, stem, CPU)
    x = torch.randn(stem + sum(lengths), columns)
    first, own = packing.spread(x)
    assert first.shape == (1, stem, columns) and own.shape == (len(lengths), max(lengths), columns)
    start = stem
    for b, length in enumerate(lengths):
        assert torch.equal(own[b, :length], x[start : start + length])
        start += length
    assert torch.equal(packing.gather(first if stem else None, own), x)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_activation_checkpointing_changes_memory_not_gradients(family: str) -> None:
    """Only the blocks' inputs are kept for the backward pass, and each block runs once more in it; the routers' loss too."""
    from tests.helpers import family_configs as configs

    adapters = {"lora_r": 3, "lora_dropout": 0.3, **tiny.ALL_LORA}
    found = {}
    for again in (False, True):
        model = tiny.move_adapters(configs.ours(family, **adapters)).train()
        model.activation_checkpointing = again
        calls = []
        model.blocks[1].attn.qkv.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        features = Recompute(model, samples_of([20, 15, 12], 9), CPU)([0, 1, 2])
        torch.manual_seed(5)
        loss = model.tail(features.x, features.taps, features.pos).square().mean()
        auxiliary = model.auxiliary_loss()
        loss = loss if auxiliary is None else loss + auxiliary
        found[again] = (
            loss.detach(),
            [torch.zeros(()) if g is None else g for g in torch.autograd.grad(loss, trained(model), allow_unused=True)],
        )
        assert len(calls) == 1 + again
        model.eval()
        with torch.no_grad():
            model.tail(features.x, features.taps, features.pos)
        assert model.auxiliary_loss() is None, "what the backward pass ran again leaves nothing behind"
    assert_close(found[True], found[False])


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if "lora_" in name]


def test_rows_that_occur_several_times_have_the_same_gradient_each_time() -> None:
    """It is the sum in their order, to the bit. x[rows] adds them up in the order in which two threads arrive."""
    x, rows, grad = torch.randn(4, 576, requires_grad=True), torch.arange(4).repeat(500), torch.randn(2000, 576)
    expected = torch.zeros(4, 576)
    for row, value in zip(rows.tolist(), grad, strict=True):
        expected[row] += value
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(5):
            (found,) = torch.autograd.grad(take(x, rows), x, grad)
            assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(threads)


def asked(question: list[int], answer: list[int], **more: Any) -> Sample:
    """A sample whose prompt is a question between two tokens and three that every prompt has."""
    prompt = [90, 91, *question, 92, 93, 94]
    return Sample(array("i", prompt + answer), bytearray([0] * len(prompt) + [1] * len(answer)), **more)


def test_words_of_questions_are_left_out() -> None:
    """Each with the given probability; never the template's tokens or the answer."""
    long, short = asked([*range(40)], [7, 8], weights=array("f", [0.0] * 45 + [0.5, 2.0])), asked([50, 51], [9])
    ends = shared_ends([long, short])
    assert ends == (2, 3)
    torch.manual_seed(2)
    kept = [0] * 40
    for _ in range(400):
        found = thinned(long, 0.3, ends)
        ids, length = found.input_ids.tolist(), len(found.input_ids)
        assert ids[:2] == [90, 91] and ids[-5:] == [92, 93, 94, 7, 8] and ids[2:-5] == sorted(ids[2:-5])
        assert list(found.loss_mask) == [0] * (length - 2) + [1, 1] and found.weights is not None
        assert found.weights.tolist() == [0.0] * (length - 2) + [0.5, 2.0]
        for token in ids[2:-5]:
            kept[token] += 1
    assert all(0.6 < count / 400 < 0.8 for count in kept), "four standard deviations around 0.7"
    assert thinned(short, 1.0, ends).input_ids.tolist() == [90, 91, 92, 93, 94, 9]
    assert thinned(short, 1.0, (4, 3)) is short, "nothing of it is its own"
    soft = asked([50, 51], [9], shares=(torch.tensor([[9]]), torch.ones(1, 1)))
    assert thinned(soft, 1.0, ends) is soft, "its probabilities belong to the whole prompt"


def hidden(model: Any, source: Recompute, indices: list[int]) -> torch.Tensor:
    """The last hidden states at the positions with loss."""
    features = source(indices)
    states = model.tail(features.x, features.taps, features.pos)
    return states if features.at is None else states[features.at]


@pytest.mark.parametrize("answer_only", [False, True])
def test_words_are_left_out_in_training_alone(answer_only: bool) -> None:
    lora = {"alora_enabled": True, "alora_invocation_tokens": [92, 93, 94]} if answer_only else {}
    model = tiny.tiny(lora_r=2, lora_query=True, lora_mlp=True, **lora)
    samples = [asked([*range(first, first + n)], [7, 8, 9]) for first, n in ((0, 12), (20, 7), (40, 9))]
    plain = Recompute(model, samples, CPU)
    model.word_dropout = 0.4
    source = Recompute(model, samples, CPU)
    assert not is_cacheable(model)
    model.train()
    torch.manual_seed(5)
    found = hidden(model, source, [0, 2])
    torch.manual_seed(5)
    thin = [thinned(samples[i], 0.4, (2, 3)) for i in (0, 2)]
    assert_close(found, hidden(model.eval(), Recompute(model, thin, CPU), [0, 1]))
    whole = hidden(model, plain, [0, 2])
    assert_close(hidden(model, source, [0, 2]), whole)
    assert found.shape == whole.shape and not torch.allclose(found, whole)
