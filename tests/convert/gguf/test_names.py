"""Names of tensors: those of the gguf library, for every architecture."""

from __future__ import annotations

import re

import gguf
import pytest

from litgpt.config import Config
from litgpt.convert.gguf.writer import has_tensor
from litgpt.convert.names import hf_table, shapes, slots
from litgpt.families import GGUF
from tests.helpers import family_configs as configs, gguf_files


def test_every_architecture_has_a_case() -> None:
    assert {architecture for *_, architecture, _ in gguf_files.CASES.values()} == GGUF.keys()


@pytest.mark.parametrize("case", gguf_files.CASES)
def test_names_are_those_of_the_gguf_library(case: str) -> None:
    """Its map from Hugging Face's names to GGUF's, and its lists of each architecture's tensors."""
    family, changes, architecture, _ = gguf_files.CASES[case]
    settings = configs.hf_config(family, **changes)
    config = Config.from_hf(settings.to_dict())
    keys = shapes(config, "the test")
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.n_layer)
    ours: dict[str, set[str]] = {}
    for name, slot in slots(GGUF[architecture].names(config.base_dict(), GGUF[architecture].joined), config, keys).items():
        for key in slot.keys:
            ours.setdefault(key, set()).add(re.sub(r"(_exps)\.\d+", r"\1", name))
    for name, slot in slots(hf_table(settings.model_type, config), config, keys).items():
        if slot.key == "lm_head.weight" and settings.tie_word_embeddings:
            continue
        merged = re.sub(r"\.experts\.\d+\.", ".experts.", name).replace(
            "model.layers", "layers" if ".experts." in name and "block" in name else "model.layers"
        )
        module, _, parameter = merged.replace("block_sparse_moe.experts", "feed_forward.experts").rpartition(".")
        theirs = f"{names.get_name(module)}.{parameter}"
        assert all(theirs in ours[key] for key in slot.keys), name
        assert has_tensor(architecture, theirs)
