"""Data modules: where training samples come from. Importing this loads no heavy library."""

import importlib
from typing import Any

from litgpt.data.alpaca import Alpaca, Alpaca2k, AlpacaGPT4, Dolly
from litgpt.data.base import DataModule, Splits
from litgpt.data.instructions import FLAN, LIMA, Deita, LongForm
from litgpt.data.json_data import JSON
from litgpt.data.lit_data import LitData, MicroLlama, TinyLlama
from litgpt.data.python_docs import PythonDocs
from litgpt.data.text_files import OpenWebText, TextFiles, TinyStories
from litgpt.sample import Sample

__all__ = [
    "FLAN",
    "JSON",
    "LIMA",
    "Alpaca",
    "Alpaca2k",
    "AlpacaGPT4",
    "DataModule",
    "Deita",
    "Dolly",
    "LitData",
    "LongForm",
    "MicroLlama",
    "OpenWebText",
    "PythonDocs",
    "Sample",
    "Splits",
    "TextFiles",
    "TinyLlama",
    "TinyStories",
]


def __getattr__(name: str) -> Any:
    if name in ("SFTDataset", "get_sft_collate_fn"):  # they load torch
        return getattr(importlib.import_module("litgpt.data.lightning"), name)
    raise AttributeError(f"module 'litgpt.data' has no attribute {name!r}")
