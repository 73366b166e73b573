"""LoRA on models of other packages: against PEFT and closed-form counts, merged, saved and loaded."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from litgpt.errors import UserError
from litgpt.lora import apply_lora, get_lora_parameters, load_lora, mark_only_lora_as_trainable, merge_lora_weights, save_lora
from tests.helpers import tiny

IDX = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def gpt2(**changes: int) -> Any:
    sizes = {"n_embd": 24, "n_layer": 2, "n_head": 3, "vocab_size": 50, "n_positions": 16, **changes}
    return tiny.randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)))


class MetaBlock(nn.Module):
    """A block with the module tree of Meta's Llama: 4 query heads, 2 key and value heads."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = nn.Module(), nn.Module()
        for parent, name, size, out in (
            (self.attention, "wq", dim, dim),
            (self.attention, "wk", dim, dim // 2),
            (self.attention, "wv", dim, dim // 2),
            (self.attention, "wo", dim, dim),
            (self.feed_forward, "w1", dim, hidden),
            (self.feed_forward, "w2", hidden, dim),
            (self.feed_forward, "w3", dim, hidden),
        ):
            setattr(parent, name, nn.Linear(size, out, bias=False))
        self.attention_norm, self.ffn_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, d = x.shape
        n, attention, mlp = self.attention_norm(x), self.attention, self.feed_forward
        q = attention.wq(n).view(B, T, 4, -1).transpose(1, 2)
        k, v = (layer(n).view(B, T, 2, -1).transpose(1, 2).repeat_interleave(2, 1) for layer in (attention.wk, attention.wv))
        x = x + attention.wo(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, d))
        n = self.ffn_norm(x)
        return x + mlp.w2(F.silu(mlp.w1(n)) * mlp.w3(n))


class Meta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(50, 24)
        self.layers = nn.ModuleList([MetaBlock(24, 40), MetaBlock(24, 40)])
        self.norm, self.output = nn.LayerNorm(24), nn.Linear(24, 50, bias=False)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        x = self.tok_embeddings(idx)
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(IDX)
    return getattr(out, "logits", out)


def perturb(model: nn.Module, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in get_lora_parameters(model):
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


MAKERS: dict[str, Callable[[], Any]] = {
    "gpt2": gpt2,
    "gpt2 as long as wide": lambda: gpt2(n_positions=24),
    "meta": lambda: tiny.randomise(Meta()),
}
TARGETS: list[tuple[str, Any, int]] = [  # model, targets, and the sum of in + out over the layers
    ("gpt2", ["c_attn"], 2 * (24 + 72)),
    ("gpt2", "attn.c_proj", 2 * (24 + 24)),
    ("gpt2", ["c_attn", "c_proj", "c_fc"], 2 * (24 + 72 + 24 + 24 + 24 + 96 + 96 + 24)),
    ("gpt2", "all-linear", 2 * (24 + 72 + 24 + 24 + 24 + 96 + 96 + 24)),
    ("gpt2 as long as wide", "all-linear", 2 * (24 + 72 + 24 + 24 + 24 + 96 + 96 + 24)),  # GPT-2 medium has 1,024 of both
    ("gpt2", "square", 2 * (24 + 24)),
    ("gpt2", "lm_head", 24 + 50),
    ("meta", ["wq", "wv"], 2 * (24 + 24 + 24 + 12)),
    ("meta", ["wq", "wk", "wv", "wo", "w1", "w2", "w3"], 2 * (2 * (24 + 24) + 2 * (24 + 12) + 3 * (24 + 40))),
    ("meta", "all-linear", 2 * (2 * (24 + 24) + 2 * (24 + 12) + 3 * (24 + 40))),
    ("meta", "square", 2 * 2 * (24 + 24)),
    ("meta", ["layers.1.attention.wq"], 24 + 24),
]


@pytest.mark.parametrize(("kind", "targets", "features"), TARGETS)
def test_counts_start_and_merge(kind: str, targets: Any, features: int) -> None:
    """r (in + out) parameters learn, called lora_*; the start is the base bit for bit; the merged model has the base's keys."""
    model = MAKERS[kind]()
    base, before = copy.deepcopy(model), sum(p.numel() for p in model.parameters())
    apply_lora(model, targets, r=3, alpha=5)
    learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in learns.values()) == 3 * features
    assert sum(p.numel() for p in model.parameters()) == before + 3 * features
    assert all(name.rpartition(".")[2].startswith("lora_") for name in learns)
    assert list(map(id, get_lora_parameters(model))) == list(map(id, learns.values()))
    assert torch.equal(logits(model), logits(base))
    perturb(model)
    tuned = logits(model)
    assert (tuned - logits(base)).abs().max() > 0.1
    merge_lora_weights(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_proj", "c_fc"]])
def test_gpt2_equals_peft(targets: list[str]) -> None:
    ours, theirs = gpt2(), gpt2()
    apply_lora(ours, targets, r=3, alpha=5)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=True))
    perturb(ours)
    state = {name: value for name, value in ours.named_parameters() if ".lora_" in name}
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            parameter.data = state.pop(name.removeprefix("base_model.model.").removesuffix(".default.weight")).data.clone()
    assert not state
    torch.testing.assert_close(logits(ours), logits(theirs.eval()), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in get_lora_parameters(ours)) == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.slow
def test_the_table_of_gpt2_as_a_process() -> None:
    """docs/gpt2_lora.py: GPT-2's own count before, and r (in + out) of each layer with LoRA behind it."""
    script = Path(__file__).parents[2] / "docs/gpt2_lora.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert {row[-5] for row in rows} == {"124,439,808"}
    learn = {(" ".join(row[:-6]), int(row[-6])): int(row[-3].replace(",", "")) for row in rows}
    assert learn["c_attn", 8] == 12 * 8 * (768 + 2304) == 294_912
    assert learn["square", 4] == 12 * 4 * (768 + 768)
    assert learn["all-linear", 16] == 12 * 16 * ((768 + 2304) + (768 + 768) + 2 * (768 + 3072))


def test_only_the_adapters_learn() -> None:
    model = gpt2()
    apply_lora(model, "all-linear", r=2, dropout=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(get_lora_parameters(model), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(IDX, labels=IDX).loss.backward()
        optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if ".lora_" in name}
    mark_only_lora_as_trainable(model)


@pytest.mark.parametrize("fresh", [True, False], ids=["a plain model", "a model with LoRA"])
@pytest.mark.parametrize("kind", ["gpt2", "meta"])
def test_saved_and_loaded(kind: str, fresh: bool, tmp_path: Path) -> None:
    """A plain model gets LoRA where the file has it, with each layer's rank and alpha."""
    model, other, file = MAKERS[kind](), MAKERS[kind](), tmp_path / "lora.safetensors"
    square, rest = ("attn.c_proj", "c_attn") if kind == "gpt2" else ("wo", ["w1", "w3"])
    for each in (model,) if fresh else (model, other):
        apply_lora(each, square, r=4, alpha=7, rslora=True)
        apply_lora(each, rest, r=2, alpha=3, dropout=0.25)
    perturb(model)
    save_lora(model, file)
    assert set(load_file(file)) == {name for name in model.state_dict() if ".lora_" in name}
    load_lora(other, file)
    assert torch.equal(logits(other), logits(model))
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}


def test_a_layer_in_two_places(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model.append(model[0])
    base, x = copy.deepcopy(model), torch.randn(2, 4)
    apply_lora(model, "square", r=2)
    assert model[0] is model[2] and len(get_lora_parameters(model)) == 2
    perturb(model)
    tuned = model(x)
    save_lora(model, tmp_path / "lora.safetensors")
    other = copy.deepcopy(base)
    load_lora(other, tmp_path / "lora.safetensors")
    assert torch.equal(other(x), tuned)
    merge_lora_weights(model)
    assert model[0] is model[2] and model.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(model(x), tuned)


def test_attention_that_reads_its_weight_gets_none() -> None:
    """`nn.MultiheadAttention` does not call out_proj."""
    names = apply_lora(nn.TransformerEncoderLayer(8, 2, 16), "all-linear", r=2)
    assert names == ["linear1", "linear2"]


def test_targets_that_fit_nothing() -> None:
    with pytest.raises(
        UserError, match="'q_proj', which fits no linear layer of the model: its linear layers are called c_attn, c_fc, c_proj"
    ):
        apply_lora(gpt2(), ["c_attn", "q_proj"])
    with pytest.raises(UserError, match="targets names no layer"):
        apply_lora(gpt2(), [])


@pytest.mark.parametrize("numbers", [{"r": -1}, {"r": 0}, {"r": 4.0}, {"alpha": float("nan")}, {"dropout": 1.0}, {"dropout": "0.1"}])
def test_numbers_out_of_range_are_told_by_the_callers_names(numbers: dict[str, Any]) -> None:
    [(name, value)] = numbers.items()
    model = gpt2()
    with pytest.raises(UserError, match=f"^{name} is {value!r}: a (whole )?number"):
        apply_lora(model, ["c_attn"], **numbers)
    assert model.state_dict().keys() == gpt2().state_dict().keys()


def rewritten(file: Path, **header: Any) -> None:
    save_file(load_file(file), file, {"lora": json.dumps({"version": 1, "layers": {}, **header})})


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    """Another version, another shape, other layers, other numbers, no file of ours: one message each, and the model is as it was."""
    model, file = gpt2(), tmp_path / "lora.safetensors"
    with pytest.raises(UserError, match="no LoRA to save"):
        save_lora(model, file)
    apply_lora(model, ["c_attn"], r=2, alpha=4)
    save_lora(model, file)
    wider = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=12, n_layer=1, n_head=3, vocab_size=50, n_positions=16))
    keys = wider.state_dict().keys()
    with pytest.raises(UserError) as error:
        load_lora(wider, file)
    assert "h.0.attn.c_attn.lora_A is (2, 24), the model needs (2, 12)" in str(error.value)
    assert "no linear layer transformer.h.1.attn.c_attn" in str(error.value)
    assert wider.state_dict().keys() == keys
    other = gpt2()
    apply_lora(other, ["c_attn", "c_fc"], r=2, alpha=5)
    with pytest.raises(UserError, match="has r 2 and alpha 5, in the file 2 and 4") as error:
        load_lora(other, file)
    assert "the file lacks transformer.h.0.mlp.c_fc, which has LoRA" in str(error.value)
    rewritten(file, version=2)
    with pytest.raises(UserError, match="has the form 2: this version reads 1"):
        load_lora(gpt2(), file)
    save_file(load_file(file), file)
    with pytest.raises(UserError, match="is not a file of save_lora"):
        load_lora(gpt2(), file)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="not a readable file"):
        load_lora(gpt2(), file)
    with pytest.raises(UserError, match="does not exist"):
        load_lora(gpt2(), tmp_path / "no.safetensors")


def test_other_adapters_are_saved_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="an adapter of another kind"):
        save_lora(tiny.tiny(lora_r=2, lora_query=True), tmp_path / "lora.safetensors")
