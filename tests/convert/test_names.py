"""Tables of tensor names, and the parts of LitGPT tensors that they name."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from litgpt import families
from litgpt.config import Config
from litgpt.convert.names import Slot, Stored, fit, hf_table, respelled, rows, shapes, slots, stored_form, stored_shape, summary
from litgpt.errors import UserError
from tests.helpers import family_configs as configs


def test_rows_are_a_permutation_for_every_family() -> None:
    config = Config(n_head=4, n_query_groups=2, n_embd=32, padded_vocab_size=8, vocab_size=8)
    for parts in (("q", "k", "v"), ("qkv grouped",), ("all",)):
        assert sorted(torch.cat([rows(part, config) for part in parts]).tolist()) == list(range(64))
    neox = rows("qkv grouped", Config(n_head=2, n_embd=4, padded_vocab_size=8, vocab_size=8))
    assert neox.tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]  # head 0: q, k, v; head 1: q, k, v
    falcon = rows("qkv grouped", Config(n_head=4, n_query_groups=2, n_embd=4, padded_vocab_size=8, vocab_size=8))
    assert falcon.tolist() == [0, 1, 4, 6, 2, 3, 5, 7]  # q 0, q 1, k 0, v 0; q 2, q 3, k 1, v 1


def test_no_place_has_two_names() -> None:
    for kind, row in families.HF.items():
        for names in (row.names, *([row.variant.names] if row.variant else [])):
            assert len(set(names.values())) == len(names), kind


@pytest.mark.parametrize("family", configs.QUICK_FIRST)
def test_stored_and_back(family: str) -> None:
    """Every LitGPT tensor comes back bit for bit from its stored form, whose shape is the stated one."""
    _, fields, weights = configs.pair(family)
    config, keys = Config(**fields), {name: tuple(tensor.shape) for name, tensor in weights.items()}
    table = hf_table(configs.hf_config(family).model_type, config)
    stored = {}
    for name, slot in slots(table, config, keys).items():
        tensor = stored_form(slot, config, {key: weight.clone for key, weight in weights.items()})
        assert tensor.shape == stored_shape(slot, config, keys)
        stored[name] = Stored(tuple(tensor.shape), partial(torch.clone, tensor))
    loads = {key: load for keys, load in fit(stored, table, config, "the test", tied=False).items() for key in keys}
    assert loads.keys() == weights.keys() and all(torch.equal(load(), weights[key]) for key, load in loads.items())


def test_a_tensor_of_two_parts_has_two_keys() -> None:
    slot = Slot("transformer.h.0.mlp.fc_1.weight", "gate up")
    assert slot.keys == ("transformer.h.0.mlp.fc_1.weight", "transformer.h.0.mlp.fc_2.weight")
    assert Slot("transformer.h.0.mlp.fc_1.weight", "all").keys == ("transformer.h.0.mlp.fc_1.weight",)


def test_other_spellings_are_taken_for_a_name_that_the_table_has() -> None:
    stored = Stored((1,), lambda: torch.zeros(1))
    assert respelled({"wte.weight": stored}, {"transformer.wte.weight"}).keys() == {"transformer.wte.weight"}
    assert respelled({"wte.weight": stored}, {"wte.weight", "transformer.wte.weight"}).keys() == {"wte.weight"}
    assert respelled({"odd.weight": stored}, {"transformer.wte.weight"}).keys() == {"odd.weight"}


def test_impossible_settings_build_no_model() -> None:
    with pytest.raises(UserError, match="the model has 9 blocks by its settings, but only 8 tensors are stored"):
        shapes(Config(n_layer=9), "x", 8)


def test_names_in_one_line() -> None:
    assert summary(["h.0.a", "h.1.a", "h.2.a", "h.4.b", "h.6.b", "end"]) == "end, h.{0..2}.a, h.{4,6}.b"
    experts = [f"h.{block}.experts.{expert:02}.fc" for block in (1, 2) for expert in range(64)]
    assert summary(experts).endswith("h.{1,2}.experts.11.fc, and 52 more") and summary(experts[:13]).count("more") == 0
