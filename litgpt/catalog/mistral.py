"""Mistral 7B: Llama's decoder, in its first version with attention over a sliding window."""

from __future__ import annotations

from typing import Any

from litgpt.catalog._rows import expand
from litgpt.catalog.llama import DECODER, decoder_from_hf

_7B = {**DECODER, "n_layer": 32, "n_query_groups": 8, "intermediate_size": 14336, "block_size": 32768}

MODELS = expand(
    "mistralai",
    _7B,
    {
        "Mistral-7B-v0.1 Mistral-7B-Instruct-v0.1": {"padded_vocab_size": 32000, "block_size": 4096, "sliding_window_size": 4096},
        "Mistral-7B-Instruct-v0.2": {"padded_vocab_size": 32000, "rope_base": 1000000},
        "Mistral-7B-v0.3 Mistral-7B-Instruct-v0.3": {"padded_vocab_size": 32768, "rope_base": 1000000},
    },
)


def _from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return {**decoder_from_hf(hf), "sliding_window_size": hf.get("sliding_window")}


ARCHITECTURES = {"mistral": _from_hf}
