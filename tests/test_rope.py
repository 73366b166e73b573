"""Rotary tables against transformers' and against complex multiplication."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from litgpt.config import Config
from litgpt.rope import RotaryTable, frequencies, is_long, plain_frequencies, rotate
from tests.helpers import family_configs, tiny
from tests.helpers.cases import quick


def config(**changes: object) -> Config:
    return Config(**{**tiny.TINY, **changes})


WITHOUT = ("gpt2", "mpt", "mpt scaled", "bloom", "falcon alibi")  # learned positions, or ALiBi


@pytest.mark.parametrize(
    "family",
    quick(
        [name for name in family_configs.FAMILIES if name not in WITHOUT], *(name for name in family_configs.QUICK if name not in WITHOUT)
    ),
)
def test_frequencies_are_the_buffers_of_transformers(family: str) -> None:
    """Bit for bit, of every kind of layer that has its own."""
    hf, fields, _ = family_configs.pair(family)
    ours = Config(**fields)
    buffers = {name.rpartition(".")[2]: buffer for name, buffer in hf.named_buffers() if name.endswith("inv_freq")}
    names = ("original_inv_freq", "inv_freq", "full_attention_inv_freq")  # a long text changes inv_freq itself
    want = next((buffers[name] for name in names if name in buffers), None)
    assert want is not None and torch.equal(frequencies(ours), want)
    if "sliding_attention_inv_freq" in buffers:
        assert ours.rope_local_base_freq is not None
        assert torch.equal(plain_frequencies(ours, ours.rope_local_base_freq), buffers["sliding_attention_inv_freq"])


@pytest.mark.parametrize("base", [10_000, 500_000, 1_000_000, 5_000_000])
@pytest.mark.parametrize("size", [20, 64, 80, 96, 128, 256])
def test_frequencies_of_real_sizes(base: int, size: int) -> None:
    hf = LlamaConfig(
        hidden_size=4 * size, num_attention_heads=4, rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": float(base)}
    )
    want, _ = ROPE_INIT_FUNCTIONS["linear"](hf, torch.device("cpu"))
    for scaling in ({"rope_condense_ratio": 3}, {"rope_adjustments": {"factor": 3.0}}):
        assert torch.equal(frequencies(config(n_embd=4 * size, n_head=4, rope_base=base, **scaling)), want)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("base", [10_000, 500_000])
def test_llama3_frequencies_against_transformers(factor: float, base: int) -> None:
    """With the real sizes of Llama 3.1 and 3.2: long, short and mixed waves all occur."""
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    hf = LlamaConfig(
        hidden_size=4096,
        num_attention_heads=32,
        rope_theta=float(base),
        rope_scaling={"rope_type": "llama3", "original_max_position_embeddings": 8192, **scaling},
    )
    want, _ = ROPE_INIT_FUNCTIONS["llama3"](hf, torch.device("cpu"))
    ours = config(n_embd=4096, n_head=32, rope_base=base, rope_adjustments={**scaling, "original_max_seq_len": 8192})
    got = frequencies(ours)
    assert torch.equal(got, want)
    plain = frequencies(config(n_embd=4096, n_head=32, rope_base=base))
    ratio = plain / got
    assert (ratio < 1.001).any() and (ratio > factor * 0.999).any() and ((ratio > 1.1) & (ratio < factor * 0.9)).any()


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("factor", "original", "base", "fast", "slow"), [(4.0, 32768, 1_000_000, 32.0, 1.0), (40.0, 4096, 10_000, 32.0, 1.0)]
)
def test_yarn_frequencies_against_transformers(factor: float, original: int, base: int, fast: float, slow: float, truncate: bool) -> None:
    """With the sizes of Qwen 2.5 and of DeepSeek: pairs that stay, that are slowed, and in between."""
    scaling = {"factor": factor, "beta_fast": fast, "beta_slow": slow, "truncate": truncate}
    hf = LlamaConfig(
        hidden_size=4096,
        num_attention_heads=32,
        max_position_embeddings=int(factor * original),
        rope_parameters={"rope_type": "yarn", "rope_theta": float(base), "original_max_position_embeddings": original, **scaling},
    )
    want, amplitude = ROPE_INIT_FUNCTIONS["yarn"](hf, torch.device("cpu"))
    adjustments = {"rope_type": "yarn", **scaling, "original_max_seq_len": original, "attention_factor": amplitude}
    ours = config(n_embd=4096, n_head=32, rope_base=base, rope_adjustments=adjustments)
    got = frequencies(ours)
    assert torch.equal(got, want)
    ratio = frequencies(config(n_embd=4096, n_head=32, rope_base=base)) / got
    assert (ratio < 1.001).any() and (ratio > factor * 0.999).any() and ((ratio > 1.1) & (ratio < factor * 0.9)).any()
    cos, sin = RotaryTable(ours)(50, torch.device("cpu"))
    assert_close(cos.square() + sin.square(), torch.full_like(cos, amplitude**2))


@pytest.mark.parametrize(
    ("mscales", "attention", "scores"),
    [({}, 1.0, 1.0), ({"mscale": 1.0}, 1.3688879454, 1.0), ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, 1.3688879454**2)],
)
def test_yarn_of_litgpt(mscales: dict[str, float], attention: float, scores: float) -> None:
    """0.1 ln 40 + 1 = 1.36888...; LitGPT's file says nothing of attention's factor."""
    yarn = {"factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_seq_len": 4096}
    ours = config(rope_adjustments={**yarn, **mscales})
    assert ours.rope_adjustments == {"rope_type": "yarn", **yarn, "attention_factor": pytest.approx(attention)}
    assert (ours.attention_scores_scalar or ours.head_size or 0) ** -0.5 == pytest.approx((ours.head_size or 0) ** -0.5 * scores)
    if len(mscales) == 2:
        assert ours.rope_adjustments == Config.from_name("DeepSeek-V3").rope_adjustments
    assert Config(**ours.base_dict()) == ours


def test_longrope_frequencies_against_transformers() -> None:
    """Phi 3's sizes; up to 4096 positions the short factors, beyond them the long ones, and cos and sin longer by the same factor."""
    generator = torch.Generator().manual_seed(0)
    short, long = (1 + torch.rand(48, generator=generator)).tolist(), (1 + 60 * torch.rand(48, generator=generator)).tolist()
    hf = Phi3Config(
        hidden_size=3072,
        num_attention_heads=32,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": 4096,
        },
    )
    adjustments = {"rope_type": "longrope", "short_factor": short, "long_factor": long, "original_max_seq_len": 4096}
    for length, beyond in ((4096, False), (4097, True)):
        assert is_long(config(n_embd=3072, n_head=32, rope_adjustments={**adjustments, "attention_factor": 1.0}), length) == beyond
        want, amplitude = ROPE_INIT_FUNCTIONS["longrope"](hf, torch.device("cpu"), seq_len=length)
        ours = config(n_embd=3072, n_head=32, rope_adjustments={**adjustments, "attention_factor": amplitude})
        assert torch.equal(frequencies(ours, beyond), want)
        cos, sin = halves(RotaryTable(ours)(9, torch.device("cpu"), beyond))
        angles = torch.outer(torch.arange(9.0), want)
        assert_close((cos, sin), (angles.cos() * amplitude, angles.sin() * amplitude))


def halves(table: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin (T, n/2) of (cos, cos) and (-sin, sin)."""
    (cos, again), (negative, sin) = (part.chunk(2, dim=-1) for part in table)
    assert torch.equal(cos, again) and torch.equal(negative, -sin)
    return cos, sin


def test_linear_frequencies_and_a_local_base() -> None:
    ours = config(rope_base=500, rope_adjustments={"factor": 8.0}, rope_local_base_freq=70.0)
    assert_close(frequencies(ours), 500 ** -(torch.arange(0, 8, 2) / 8) / 8)
    cos, sin = halves(RotaryTable(ours, local=True)(5, torch.device("cpu")))
    angles = torch.outer(torch.arange(5.0), 70 ** -(torch.arange(0, 8, 2) / 8))
    assert_close((cos, sin), (angles.cos(), angles.sin()))


def test_rotation_is_complex_multiplication() -> None:
    """(first + i second) * exp(i position theta), half-split; the dimensions behind the first n pass."""
    ours = config(rotary_percentage=0.5)  # n 4 of h 8
    x = torch.randn(2, 3, 11, 8, generator=torch.Generator().manual_seed(0))
    got = rotate(x, *RotaryTable(ours)(11, torch.device("cpu")))
    theta = torch.tensor([1.0, 10_000**-0.5])
    turn = torch.polar(torch.ones(11, 2), torch.arange(11.0)[:, None] * theta)
    want = torch.complex(x[..., :2], x[..., 2:4]) * turn
    assert_close(got, torch.cat((want.real, want.imag, x[..., 4:]), dim=-1))


def test_scores_depend_on_the_distance_alone() -> None:
    table = RotaryTable(config())
    cos, sin = table(30, torch.device("cpu"))
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))

    def score(m: int, n: int) -> torch.Tensor:
        return (rotate(q, cos[m : m + 1], sin[m : m + 1]) * rotate(k, cos[n : n + 1], sin[n : n + 1])).sum()

    assert_close(score(5, 2), score(27, 24), rtol=1e-5, atol=1e-5)
    assert (score(5, 2) - score(5, 3)).abs() > 1e-3


def test_condensed_positions() -> None:
    """rope_condense_ratio 4: position 8 is turned as position 2 is without it."""
    cpu = torch.device("cpu")
    cos, sin = RotaryTable(config(rope_condense_ratio=4))(9, cpu)
    plain_cos, plain_sin = RotaryTable(config())(9, cpu)
    assert_close((cos[8], sin[8]), (plain_cos[2], plain_sin[2]))


def test_table_grows_and_keeps_its_values() -> None:
    table = RotaryTable(config(block_size=100))
    short = table(3, torch.device("cpu"))
    long = table(80, torch.device("cpu"))
    assert long[0].shape == (80, 8)
    assert_close((long[0][:3], long[1][:3]), short, rtol=0, atol=0)
    assert table(80, torch.device("cpu"))[0].data_ptr() == long[0].data_ptr()  # made once


def test_angles_are_fp32_whatever_the_model() -> None:
    """bf16 rounds position 1001 to 1000: angles computed in it would be off by up to a radian. Only cos and sin may be rounded."""
    model = tiny.tiny(n_layer=1, block_size=2000).bfloat16()
    (rough,) = model.positions(tiny.ids(1, 1003)).rotary
    rough_cos, rough_sin = halves(rough)
    assert rough_cos.dtype == rough_sin.dtype == torch.bfloat16
    exact = torch.outer(torch.arange(1003, dtype=torch.float64), 10_000 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8))
    assert_close(rough_cos.double(), exact.cos(), rtol=0, atol=2**-8)
    assert_close(rough_sin.double(), exact.sin(), rtol=0, atol=2**-8)
    x = torch.randn(1, 1003, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = RotaryTable(model.config)(1003, torch.device("cpu"))
    assert_close(rotate(x.bfloat16(), *rough).float(), rotate(x, cos, sin), rtol=0, atol=0.05)
